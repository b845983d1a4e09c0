"""The commands that README.md and the guides in docs/ name."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
GUIDES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
_COMMAND = re.compile(r"^(?: {4}(?:\$ )?)?(furiosa-llm \S.*)$", re.MULTILINE)
_OPTIONAL = re.compile(r" \[[^][]*\]")
_BEHIND = re.compile(r"\s(?:\[|#|&|\||>|\n)")


def commands(guide: Path) -> Iterator[list[str]]:
    """The arguments of each command, in order; what is optional is left out, and what is redirected."""
    for found in _COMMAND.finditer(guide.read_text(encoding="utf-8")):
        yield shlex.split(_BEHIND.split(_OPTIONAL.sub("", found[1]))[0])[1:]
