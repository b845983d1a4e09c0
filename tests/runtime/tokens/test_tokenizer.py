"""Tokenizer, chat template, and text that comes token by token."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from furiosa_llm.runtime.errors import InputError, TokenizerError
from furiosa_llm.runtime.tokens.text_stream import Detokenizer, TextStream
from furiosa_llm.runtime.tokens.tokenizer import Tokenizer
from tests.support.runtime.tokenizer_kinds import KINDS, make, spelled

ZOO = Path(__file__).parents[3] / "fixtures" / "zoo" / "tiny-llama-genai-fp32"
TOKENIZER = Tokenizer.from_folder(ZOO)
SPELLED = spelled("a", "b", "ab", "ba", "c", "abc")
USER = [{"role": "user", "content": "Grüß Gott 😀"}]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(ZOO / name, tmp_path)
    return tmp_path


def configure(folder: Path, **values: object) -> Tokenizer:
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    return Tokenizer.from_folder(folder)


@given(st.text(max_size=40))
def test_text_comes_back(text: str) -> None:
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text


def test_no_special_tokens_are_added() -> None:
    assert not {0, 1, 2} & set(TOKENIZER.encode("hello"))
    assert TOKENIZER.decode([1, *TOKENIZER.encode("hello"), 2]) == "hello"


@given(st.text(max_size=40))
def test_pieces_add_up_and_never_hold_half_a_character(text: str) -> None:
    detokenizer = Detokenizer(TOKENIZER)
    pieces = [detokenizer.push(token) for token in TOKENIZER.encode(text)]
    assert "".join(pieces) + detokenizer.flush() == text
    if "\N{REPLACEMENT CHARACTER}" not in text:
        assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("skip_special_tokens", [True, False])
@given(data=st.data())
def test_pieces_of_any_tokens_add_up_to_the_text_of_all(
    kind: str, skip_special_tokens: bool, data: st.DataObject
) -> None:
    tokenizer = KINDS[kind]
    # One beyond the vocabulary is unknown; models have such, where their vocabulary is padded.
    token_ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size), max_size=60))
    detokenizer = Detokenizer(tokenizer, skip_special_tokens=skip_special_tokens)
    pieces = [detokenizer.push(token) for token in token_ids]
    text = "".join(pieces) + detokenizer.flush()
    assert text == tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens)


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback"])
@given(text=st.text("aé😀 ", max_size=30))
def test_characters_in_pieces_come_whole(kind: str, text: str) -> None:
    tokenizer = KINDS[kind]
    detokenizer = Detokenizer(tokenizer)
    pieces = [detokenizer.push(token) for byte in text.encode() for token in _byte_token(kind, byte)]
    pieces.append(detokenizer.flush())
    # Llama's decoder takes the space before the first word away.
    assert "".join(pieces) == (text.removeprefix(" ") if kind == "byte_fallback" else text)
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)


def _byte_token(kind: str, byte: int) -> list[int]:
    # The byte tokens are the first 256 of the one kind, and lie behind 11 others in the other.
    return [byte if kind == "byte_level" else 11 + byte]


def test_a_character_comes_with_its_last_byte() -> None:
    detokenizer = Detokenizer(KINDS["byte_level"])
    assert [detokenizer.push(byte) for byte in "a😀b".encode()] == ["a", "", "", "", "😀", "b"]


def test_a_run_of_byte_tokens_comes_when_it_ends() -> None:
    # What is not UTF-8 as a whole is decoded byte by byte, so that a run is not known before its end.
    detokenizer = Detokenizer(KINDS["byte_fallback"])
    pieces = [detokenizer.push(token) for token in [5, *(11 + byte for byte in "é".encode()), 6]]
    assert pieces == ["a", "", "", "éb"]


def test_long_texts_are_not_decoded_again_and_again() -> None:
    decoded = []

    class Counting(Tokenizer):
        def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
            decoded.append(len(token_ids))
            return super().decode(token_ids, skip_special_tokens=skip_special_tokens)

    for token in (ord("a"), 0xFF, 0x80, 0xE2):
        decoded.clear()
        detokenizer = Detokenizer(Counting(KINDS["byte_level"]._tokenizer, {}, None))
        text = "".join([detokenizer.push(token) for _ in range(400)]) + detokenizer.flush()
        assert text == KINDS["byte_level"].decode([token] * 400)
        assert len(decoded) < 1.1 * 400
        assert max(decoded) < 20


@given(st.text("abc", max_size=12), st.lists(st.text("abc", min_size=1, max_size=3), min_size=1, max_size=3))
def test_text_ends_before_the_first_stop_string(text: str, stops: list[str]) -> None:
    stream = TextStream(TOKENIZER, stops)
    pieces = [stream.push(token) for letter in text for token in TOKENIZER.encode(letter)]
    pieces.append(stream.flush())
    found = [text.find(stop) for stop in stops if stop in text]
    # Letters come one by one, so of two stop strings that overlap the one that ends first is found.
    ends = [end for end in range(1, len(text) + 1) if text[:end].endswith(tuple(stops))]
    expected = text if not ends else text[: min(text[: ends[0]].find(s) for s in stops if s in text[: ends[0]])]
    assert (stream.stop_string is not None) == bool(found)
    assert "".join(pieces) == stream.text == expected


def test_stop_strings_wait_for_the_least_number_of_tokens() -> None:
    stream = TextStream(TOKENIZER, ["b"], min_tokens=3)
    pieces = [stream.push(token) for letter in "abcb" for token in TOKENIZER.encode(letter)]
    assert (pieces, stream.stop_string) == (["a", "b", "c", ""], "b")


@given(
    st.lists(st.sampled_from(["a", "b", "ab", "ba", "c", "abc"]), max_size=12),
    st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=3),
    st.booleans(),
    st.integers(0, 6),
)
def test_stop_strings_split_over_tokens(parts: list[str], stops: list[str], include: bool, min_tokens: int) -> None:
    stream = TextStream(SPELLED, stops, min_tokens=min_tokens, include_stop=include)
    pieces = []
    for part in parts:
        pieces.append(stream.push(SPELLED.encode(part)[0]))
        if stream.stop_string is not None:
            break
    pieces.append(stream.flush())
    text, expected, stop = "", None, None
    for count, part in enumerate(parts, 1):
        text += part
        new = range(len(text) - len(part) + 1, len(text) + 1)
        found = [(end, end - len(s), s) for end in new for s in stops if text[:end].endswith(s)]
        if found and count >= min_tokens:
            end, start, stop = min(found)
            expected = text[: end if include else start]
            break
    assert stream.stop_string == stop
    assert "".join(pieces) == stream.text == (text if expected is None else expected)


def test_a_stop_string_may_begin_early() -> None:
    stream = TextStream(SPELLED, ["abc"], min_tokens=2)
    assert [stream.push(SPELLED.encode(part)[0]) for part in ("ab", "c")] == ["", ""]
    assert (stream.text, stream.stop_string) == ("", "abc")


def test_a_stop_string_in_text_that_was_held_back() -> None:
    stream = TextStream(KINDS["byte_fallback"], ["é"])
    assert [stream.push(token) for token in [5, *(11 + byte for byte in "é".encode())]] == ["a", "", ""]
    assert (stream.flush(), stream.stop_string) == ("", "é")
    early = TextStream(KINDS["byte_fallback"], ["é"], min_tokens=4)
    pieces = [early.push(token) for token in [5, *(11 + byte for byte in "é".encode())]]
    assert ([*pieces, early.flush()], early.stop_string) == (["a", "", "", "é"], None)


@pytest.mark.parametrize("text", [5, None, b"text", ["text"]])
def test_what_is_not_text(text: Any) -> None:
    with pytest.raises(TokenizerError, match=f"of type {type(text).__name__}, expected text"):
        TOKENIZER.encode(text)


def test_half_a_surrogate_pair_is_not_text() -> None:
    with pytest.raises(TokenizerError, match=r"found 'a\\ud800', expected text of Unicode characters only"):
        TOKENIZER.encode("a\ud800")


def test_text_that_the_tokenizer_has_no_tokens_for() -> None:
    tokenizer = make(["a"], None, words=True)
    assert tokenizer.encode("a") == [0]
    with pytest.raises(TokenizerError, match=r"the tokenizer refuses 'b': .*Missing \[UNK\] token"):
        tokenizer.encode("b")


def test_special_tokens_are_added_or_shown_if_wished(folder: Path) -> None:
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
    }
    path.write_text(json.dumps(content))
    tokenizer = Tokenizer.from_folder(folder)
    plain = tokenizer.encode("hello")
    assert tokenizer.encode("hello", add_special_tokens=True) == [1, *plain]
    assert tokenizer.decode([1, *plain], skip_special_tokens=False) == "<s>hello"


def test_tokens_by_themselves() -> None:
    letter = TOKENIZER.encode("a")[0]
    assert TOKENIZER.decode_each([1, letter, TOKENIZER.vocab_size]) == ["<s>", "a", ""]
    assert TOKENIZER.id_to_token(letter) == "a"
    assert TOKENIZER.id_to_token(TOKENIZER.vocab_size) is None
    assert TOKENIZER.special_ids == {0, 1, 2, 3}
    assert KINDS["byte_fallback"].byte_ids == set(range(11, 267))
    assert all(not tokenizer.byte_ids for name, tokenizer in KINDS.items() if name != "byte_fallback")


def test_the_chat_template_writes_the_prompt() -> None:
    assert TOKENIZER.apply_chat_template(USER) == "user: Grüß Gott 😀\nassistant: "
    assert TOKENIZER.apply_chat_template(USER, add_generation_prompt=False) == "user: Grüß Gott 😀\n"


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{{ bos_token }}{{ messages[0].content }}{{ eos_token }}", "<s>Grüß Gott 😀</s>"),
        ("{{ messages | tojson }}", '[{"role": "user", "content": "Grüß Gott 😀"}]'),
        ("{% for m in messages %}{% break %}{% endfor %}end", "end"),
        ("{{ strftime_now('%Y') | length }}", "4"),
    ],
)
def test_what_templates_use(template: str, expected: str) -> None:
    assert TOKENIZER.apply_chat_template(USER, chat_template=template) == expected


def test_the_calls_of_vendors_scripts() -> None:
    assert (
        TOKENIZER.apply_chat_template(USER, tokenize=False, add_generation_prompt=True)
        == "user: Grüß Gott 😀\nassistant: "
    )
    assert TOKENIZER.apply_chat_template(USER, tokenize=True) == TOKENIZER.encode("user: Grüß Gott 😀\nassistant: ")
    template = "{{ tools | length }} {{ documents | length }} {{ thinking }} {{ messages[-1].content }}."
    options: dict[str, Any] = {"tools": [{}], "documents": [{}, {}], "thinking": True, "chat_template": template}
    assert TOKENIZER.apply_chat_template(USER, **options) == "1 2 True Grüß Gott 😀."
    continued: dict[str, Any] = {"continue_final_message": True, "add_generation_prompt": False}
    assert TOKENIZER.apply_chat_template(USER, **continued, **options).endswith("Grüß Gott 😀")
    empty: dict[str, Any] = {"chat_template": "{{ tools is none }} {{ documents is none }}", "tools": []}
    assert TOKENIZER.apply_chat_template(USER, **empty) == "False True"  # as transformers has it
    with pytest.raises(InputError, match="add_generation_prompt and continue_final_message exclude each other"):
        TOKENIZER.apply_chat_template(USER, continue_final_message=True)
    with pytest.raises(InputError, match="the final message has no text to continue"):
        TOKENIZER.apply_chat_template([{"role": "assistant", "content": None}], **continued)


@pytest.mark.parametrize(
    "template", ["{{ raise_exception('no system role') }}", "{% if", "{{ ''.__class__.__mro__ }}", "{{ 1 + 'a' }}"]
)
def test_a_template_that_refuses_or_reaches_out(template: str) -> None:
    with pytest.raises(TokenizerError, match="the chat template refuses the messages"):
        TOKENIZER.apply_chat_template(USER, chat_template=template)


def test_templates_of_the_configuration(folder: Path) -> None:
    assert Tokenizer.from_folder(folder).chat_template is None
    with pytest.raises(TokenizerError, match="the artifact has no chat template"):
        Tokenizer.from_folder(folder).apply_chat_template(USER)
    assert configure(folder, chat_template="one").apply_chat_template(USER) == "one"
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]
    assert configure(folder, chat_template=named).apply_chat_template(USER) == "plain"
    structured = configure(folder, chat_template="{{ bos_token }}", bos_token={"content": "<begin>", "lstrip": False})
    assert structured.apply_chat_template(USER) == "<begin>"


def test_a_folder_without_a_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text('{"version": 1}')
    with pytest.raises(TokenizerError, match=r"tokenizer\.json is not a tokenizer"):
        Tokenizer.from_folder(folder)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(TokenizerError, match=r"has no tokenizer\.json; put the tokenizer's files next to the model"):
        Tokenizer.from_folder(folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "cannot be read"), ("[]", "found a list, expected an object"), ("[" * 100_000, "cannot be read")],
)
def test_a_malformed_configuration(folder: Path, content: str, message: str) -> None:
    (folder / "tokenizer_config.json").write_text(content)
    with pytest.raises(TokenizerError, match=message):
        Tokenizer.from_folder(folder)


def test_a_template_that_is_no_text(folder: Path) -> None:
    (folder / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(TokenizerError, match=r"chat_template\.jinja cannot be read"):
        Tokenizer.from_folder(folder)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"add_bos_token": True}, [1]),
        ({"add_bos_token": True, "add_eos_token": True}, [1, 2]),
        ({"add_bos_token": False, "add_eos_token": True}, [2]),
        ({"add_bos_token": True, "bos_token": None}, []),
        ({"add_bos_token": True, "bos_token": "<unheard of>"}, []),
    ],
)
def test_the_configuration_says_what_is_around_a_sequence(
    folder: Path, config: dict[str, Any], expected: list[int]
) -> None:
    named = {"bos_token": "<s>", "eos_token": {"content": "</s>"}}
    tokenizer = configure(folder, **{**named, **config})
    text = tokenizer.encode("hello")
    found = tokenizer.encode("hello", add_special_tokens=True)
    assert [token for token in found if token not in text] == expected
    assert [token for token in found if token in text] == text
