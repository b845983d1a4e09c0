"""What a seeded fault is: a mistake that a developer could make, as a change of one place in the source."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """`old`, which is in `file` once, becomes `new`; `effect` is what goes wrong for a user.

    `hints` are the tests that are run first: files or ids of tests, as pytest takes them.
    """

    name: str
    file: str
    old: str
    new: str
    effect: str
    hints: tuple[str, ...]

    def source(self, root: Path) -> str:
        """The text of the file in the tree at `root` with the fault in it."""
        text = (root / self.file).read_text(encoding="utf-8")
        assert text.count(self.old) == 1, f"{self.name}: {self.file} has {self.old!r} {text.count(self.old)} times"
        return text.replace(self.old, self.new)
