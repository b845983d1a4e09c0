"""Characters that steer a terminal or hide text in it, which no name and no text brings there."""

from __future__ import annotations

_LINES = (0x2028, 0x2029)
_DIRECTION = (0x061C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A))
"""Unicode's Bidi_Control: what turns the direction of text, by which a name reads as another."""
_HIDING = (*range(0x206A, 0x2070), *range(0xFFF9, 0xFFFC), *range(0xE0000, 0xE0080))
"""Deprecated controls, annotations and tags, which are not shown. What joins letters or divides words passes."""
STEERING = (*range(0x20), *range(0x7F, 0xA0), *_LINES, *_DIRECTION, *_HIDING)
"""All of them, ends of lines and tabs among them."""


def _escape(code: int) -> str:
    units = chr(code).encode("utf-16-be")
    return "".join(f"\\u{units[at : at + 2].hex()}" for at in range(0, len(units), 2))


ESCAPES = {code: _escape(code) for code in STEERING if chr(code) not in "\t\n"}
"""As JSON writes them, so that a document stays what it is."""
