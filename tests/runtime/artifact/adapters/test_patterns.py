"""Names of modules by foreign expressions, compared with Python's own."""

from __future__ import annotations

import re

import pytest

from furiosa_llm.runtime.artifact.adapters.patterns import NamePattern

NAMES = [
    "q_proj",
    "layers.0.self_attn.q_proj",
    "layers.10.self_attn.q_proj",
    "layers.1.mlp.up_proj",
    "xq_proj",
    "layers.7",
]
KEYS = [
    *("q_proj", "self_attn.q_proj", "^layers.0.self_attn.q_proj", "^q_proj$", "layers.7"),
    *(
        r"layers\.\d+\.self_attn\.q_proj",
        r".*\.q_proj",
        r"layers.[0-6].*",
        r"[kq]_proj|up_proj",
        r"^layers\.1.?\..*proj$",
    ),
    *(r"x?q_proj", r"l.*", r"^.*", r"x*q_proj|^layers.*mlp.up_proj", r"[^a-k]_proj"),
]


@pytest.mark.parametrize("key", KEYS)
def test_they_match_as_expressions_do(key: str) -> None:
    expected = [re.fullmatch(rf"(.*\.)?({key})", name) is not None for name in NAMES]
    assert [NamePattern(key).matches(name) for name in NAMES] == expected


def test_no_expression_takes_long() -> None:
    """Python's own takes a step for each way to divide the name among the parts."""
    assert not NamePattern("a*" * 100 + "b").matches("a" * 256)
    assert not NamePattern("a*").matches("a" * 257)


@pytest.mark.parametrize("key", ["(a)", "a{3}", "a(?=b)", "a**", "", "a" * 257, "\\", "[a", "a\\1"])
def test_what_is_refused(key: str) -> None:
    with pytest.raises(ValueError, match="has "):
        NamePattern(key)
