"""What is written out before it reaches a terminal."""

from __future__ import annotations

import json

import pytest

from furiosa_llm.runtime.artifact.steering import ESCAPES

BIDI_CONTROL = "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
"""All that have this property of Unicode."""


@pytest.mark.parametrize("steering", [*BIDI_CONTROL, *"\x00\x1b\r\x7f\x9b\u2028\u206f\ufff9\U000e0001\U000e0061"])
def test_it_is_written_as_json_has_it(steering: str) -> None:
    shown = f"a{steering}b".translate(ESCAPES)
    assert shown.isascii()
    assert shown.isprintable()
    assert json.loads(f'"{shown}"') == f"a{steering}b"


@pytest.mark.parametrize("text", ["a\tb\n", "می‌خواهم", "👩‍🔬", "עברית", "ខ្មែរ​", "é"])
def test_what_writing_needs_passes(text: str) -> None:
    assert text.translate(ESCAPES) == text
