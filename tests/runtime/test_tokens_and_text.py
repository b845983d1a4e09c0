"""Tokenizer, chat template, and text that comes token by token."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from furiosa_llm.runtime.errors import TokenizerError
from furiosa_llm.runtime.text_stream import Detokenizer, TextStream
from furiosa_llm.runtime.tokenizer import Tokenizer

ZOO = Path(__file__).parents[2] / "fixtures" / "zoo" / "tiny-llama-genai-fp32"
TOKENIZER = Tokenizer.from_folder(ZOO)
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


@given(st.lists(st.integers(3, 1023), max_size=30))
def test_any_tokens_give_the_text_of_all_of_them(token_ids: list[int]) -> None:
    detokenizer = Detokenizer(TOKENIZER)
    pieces = [detokenizer.push(token) for token in token_ids]
    text = "".join(pieces) + detokenizer.flush()
    # Bytes that are no UTF-8 may be shown by another number of replacement characters, piece by piece.
    assert text.replace("\N{REPLACEMENT CHARACTER}", "") == TOKENIZER.decode(token_ids).replace(
        "\N{REPLACEMENT CHARACTER}", ""
    )


@given(st.text("abc", max_size=12), st.lists(st.text("abc", min_size=1, max_size=3), min_size=1, max_size=3))
def test_text_ends_before_the_first_stop_string(text: str, stops: list[str]) -> None:
    stream = TextStream(TOKENIZER, stops)
    pieces = [stream.push(token) for letter in text for token in TOKENIZER.encode(letter)]
    pieces.append(stream.flush())
    found = [text.find(stop) for stop in stops if stop in text]
    # Letters come one by one, so of two stop strings that overlap the one that ends first is found.
    ends = [end for end in range(1, len(text) + 1) if text[:end].endswith(tuple(stops))]
    expected = text if not ends else text[: min(text[: ends[0]].find(s) for s in stops if s in text[: ends[0]])]
    assert stream.stopped == bool(found)
    assert "".join(pieces) == stream.text == expected


def test_stop_strings_wait_for_the_least_number_of_tokens() -> None:
    stream = TextStream(TOKENIZER, ["b"], min_tokens=3)
    pieces = [stream.push(token) for letter in "abcb" for token in TOKENIZER.encode(letter)]
    assert (pieces, stream.stopped) == (["a", "b", "c", ""], True)


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
    with pytest.raises(TokenizerError, match=r"has no tokenizer\.json; put the tokenizer's files beside the model"):
        Tokenizer.from_folder(folder)


@pytest.mark.parametrize(("content", "message"), [("{", "cannot be read"), ("[]", "found a list, expected an object")])
def test_a_malformed_configuration(folder: Path, content: str, message: str) -> None:
    (folder / "tokenizer_config.json").write_text(content)
    with pytest.raises(TokenizerError, match=message):
        Tokenizer.from_folder(folder)


def test_a_template_that_is_no_text(folder: Path) -> None:
    (folder / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(TokenizerError, match=r"chat_template\.jinja cannot be read"):
        Tokenizer.from_folder(folder)
