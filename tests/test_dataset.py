"""Datasets: those that come with the package, and what is said of bad ones."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fixtures.mlperf import as_lines, decoder_samples, encoder_samples
from furiosa_llm.dataset import read_dataset
from furiosa_llm.mlperf.benchmarks import default_dataset
from furiosa_llm.runtime.errors import InputError
from furiosa_llm.runtime.tokens.tokenizer import Tokenizer


@pytest.fixture
def tokenizer(zoo: Path) -> Tokenizer:
    return Tokenizer.from_folder(zoo / "tiny-llama-optimum")


def write(folder: Path, *lines: str) -> Path:
    path = folder / "samples.jsonl"
    path.write_text("\n".join(lines))
    return path


def test_the_packages_datasets_are_those_that_fixtures_make() -> None:
    assert default_dataset("decoder").read_text("utf-8") == as_lines(decoder_samples())
    assert default_dataset("encoder").read_text("utf-8") == as_lines(encoder_samples())


def test_every_prompt_of_the_packages_is_another_and_has_what_it_is_compared_to() -> None:
    decoders, encoders = read_dataset(default_dataset("decoder")), read_dataset(default_dataset("encoder"))
    assert len({str(one.prompt) for one in decoders}) == len(decoders) == 64
    assert len({str(one.prompt) for one in encoders}) == len(encoders) == 56
    assert all(one.reference for one in decoders)
    labels = [one.label for one in encoders]
    assert all(labels.count(label) == 2 for label in labels)


def test_each_form_of_a_prompt_gives_its_tokens(tmp_path: Path, tokenizer: Tokenizer) -> None:
    messages = [{"role": "user", "content": "Hello"}]
    path = write(
        tmp_path,
        json.dumps({"prompt": "Hello there", "max_tokens": 7, "reference": "r", "label": "l"}),
        "",
        json.dumps({"prompt_token_ids": [3, 4]}),
        json.dumps({"messages": messages}),
    )
    text, ids, chat = read_dataset(path)
    assert (text.max_tokens, text.reference, text.label) == (7, "r", "l")
    assert (ids.max_tokens, ids.reference, ids.label) == (None, None, None)
    assert text.token_ids(tokenizer, None) == tokenizer.encode("Hello there")
    assert ids.token_ids(None, None) == [3, 4]
    assert chat.token_ids(tokenizer, None) == tokenizer.encode(tokenizer.apply_chat_template(messages))
    assert chat.where == f"{path}, line 4"


def test_count_takes_the_first(tmp_path: Path) -> None:
    path = write(tmp_path, '{"prompt": "a"}', '{"prompt": "b"}', "never read")
    assert [one.prompt for one in read_dataset(path, 2)] == ["a", "b"]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("no json", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[1]", "found a list, expected an object"),
        ("{}", "found none of them; expected one of prompt, prompt_token_ids, messages"),
        ('{"prompt": "a", "prompt_token_ids": [1]}', "found prompt, prompt_token_ids; expected one of"),
        ('{"prompt": "a", "refrence": "b"}', "found refrence; expected"),
        ('{"prompt": ""}', "prompt is '', expected a text that is not empty"),
        ('{"prompt": 5}', "prompt is 5, expected a text"),
        ('{"prompt_token_ids": []}', r"prompt_token_ids is \[\], expected a list of integers"),
        ('{"prompt_token_ids": [1, true]}', "prompt_token_ids is .*, expected a list of integers"),
        ('{"messages": [{"role": "user"}]}', "messages is .*, expected a list of objects with role and content"),
        ('{"prompt": "a", "max_tokens": 0}', "max_tokens is 0, expected an integer of at least 1"),
        ('{"prompt": "a", "max_tokens": true}', "max_tokens is True, expected an integer of at least 1"),
        ('{"prompt": "a", "label": 3}', "label is 3, expected a text"),
        ('{"prompt": "a", "reference": ["b"]}', "reference is .*, expected a text"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, said: str) -> None:
    path = write(tmp_path, '{"prompt": "good"}', line)
    with pytest.raises(InputError, match=rf"--dataset: .*samples.jsonl, line 2: {said}"):
        read_dataset(path)


def test_a_file_without_samples_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has no samples"):
        read_dataset(write(tmp_path, "", "  "))


def test_fewer_samples_than_asked_for_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--count is 3, but .* has 1 samples"):
        read_dataset(write(tmp_path, '{"prompt": "a"}'), 3)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--dataset: .*none.jsonl cannot be read"):
        read_dataset(tmp_path / "none.jsonl")


def test_what_the_model_cannot_read_is_named_by_its_line(tmp_path: Path) -> None:
    [sample] = read_dataset(write(tmp_path, '{"prompt_token_ids": [3000]}'))
    with pytest.raises(InputError, match=r"samples.jsonl, line 1: .*3000"):
        sample.token_ids(None, 1024)
    [chat] = read_dataset(write(tmp_path, '{"messages": [{"role": "user", "content": "a"}]}'))
    with pytest.raises(InputError, match=r"line 1: messages need a tokenizer"):
        chat.token_ids(None, 1024)
