"""Datasets of prompts: what a line may hold, and what is said of others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from furiosa_llm.dataset import Row, read_dataset
from furiosa_llm.runtime.errors import InputError
from furiosa_llm.runtime.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer(zoo: Path) -> Tokenizer:
    return Tokenizer.from_folder(zoo / "tiny-llama-optimum")


def _rows(tmp_path: Path, *lines: Any) -> list[Row]:
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines), "utf-8")
    return read_dataset(path)


def test_prompts_in_each_form(tmp_path: Path, tokenizer: Tokenizer) -> None:
    messages = [{"role": "user", "content": "hello"}]
    rows = _rows(
        tmp_path,
        {"prompt": "hello", "max_tokens": 3, "reference": "x"},
        "",
        {"prompt_token_ids": [5, 6]},
        {"messages": messages},
    )
    assert [row.where.rpartition(", ")[2] for row in rows] == ["line 1", "line 3", "line 4"]
    assert [row.max_tokens for row in rows] == [3, None, None]
    assert rows[0].others == {"reference": "x"}
    assert rows[0].token_ids(tokenizer, None) == tokenizer.encode("hello")
    assert rows[1].token_ids(None, 7) == [5, 6]
    assert rows[2].token_ids(tokenizer, None) == tokenizer.encode(tokenizer.apply_chat_template(messages))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 1: is not valid JSON"),
        ([1], "line 1: found a list, expected an object with one of prompt, prompt_token_ids, messages"),
        ({"text": "a"}, "line 1: found none of them, expected one of prompt, prompt_token_ids, messages"),
        ({"prompt": "a", "messages": []}, "line 1: found prompt, messages, expected one of"),
        ({"prompt": 1}, "line 1: prompt: found a int, expected text"),
        ({"prompt_token_ids": "a"}, "line 1: prompt_token_ids: found a str, expected a list"),
        ({"messages": "a"}, "line 1: messages: found a str, expected a list"),
        ({"prompt": "a", "max_tokens": 0}, "line 1: max_tokens: found 0, expected an integer of at least 1"),
        ({"prompt": "a", "max_tokens": True}, "line 1: max_tokens: found True, expected"),
    ],
)
def test_a_line_that_is_no_prompt(tmp_path: Path, line: Any, message: str) -> None:
    with pytest.raises(InputError) as found:
        _rows(tmp_path, line)
    assert message in str(found.value)
    assert "data.jsonl" in str(found.value)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"prompt_token_ids": [9]}, "line 1: prompt_token_ids[0] is 9, but the model's tokens are 0 to 4"),
        ({"prompt_token_ids": []}, "line 1: the prompt has no tokens"),
        ({"prompt": "a"}, "line 1: the artifact has no tokenizer.json"),
        ({"messages": [{"role": "user", "content": "a"}]}, "line 1: messages need a tokenizer, and the model has none"),
    ],
)
def test_a_prompt_that_the_model_cannot_take(tmp_path: Path, line: Any, message: str) -> None:
    [row] = _rows(tmp_path, line)
    with pytest.raises(InputError) as found:
        row.token_ids(None, 5)
    assert message in str(found.value)


def test_messages_that_the_chat_template_cannot_take(tmp_path: Path, tokenizer: Tokenizer) -> None:
    [row] = _rows(tmp_path, {"messages": [{"content": "a"}]})
    with pytest.raises(InputError, match="line 1: messages: found"):
        row.token_ids(tokenizer, None)


def test_an_empty_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"data.jsonl is empty, expected one JSON object a line"):
        _rows(tmp_path, "", "  ")


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nothing.jsonl cannot be read: .*No such file"):
        read_dataset(tmp_path / "nothing.jsonl")
