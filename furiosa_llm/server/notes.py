"""What is said of a request beside its answer: in headers, what was left out and what was changed; and in the log."""

from __future__ import annotations

from contextvars import ContextVar

from furiosa_llm.runtime.artifact.steering import STEERING

IGNORED = "x-furiosa-ignored"
"""Fields of the request that are not known, and have no effect."""
DROPPED = "x-furiosa-dropped"
"""What of a JSON schema is not enforced."""
MAX_TOKENS = "x-furiosa-max-tokens"
"""How many tokens there was room for, if more were asked for."""
HEADERS = (IGNORED, DROPPED, MAX_TOKENS)

_MAX_LENGTH = 1000
"""Of a header."""
_ESCAPES = {code: ascii(chr(code))[1:-1] for code in STEERING}

NOTES: ContextVar[dict[str, list[str]] | None] = ContextVar("notes", default=None)
"""Those of the request that is being answered, by header."""


def note(header: str, text: str) -> None:
    """Says `text` in a header of the answer, whose status has not been sent yet."""
    found = NOTES.get()
    if found is not None:
        found.setdefault(header, []).append(text)


def header_values(notes: dict[str, list[str]]) -> dict[str, str]:
    """The headers, in ASCII and without blanks around them, which HTTP forbids: they quote what was sent."""
    joined = {header: ascii("; ".join(dict.fromkeys(texts)))[1:-1] for header, texts in notes.items()}
    return {header: text[:_MAX_LENGTH].strip() for header, text in joined.items()}


def on_one_line(text: str) -> str:
    r"""What a client sent, or a foreign name, for log and metrics: with escapes such as \n, so that it ends no line."""
    return text.translate(_ESCAPES)
