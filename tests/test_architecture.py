"""ARCHITECTURE.md has a line for every file."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_the_map_lists_every_file() -> None:
    listed = set(re.findall(r"^\| `([^`]+\.py)` \| .+ \|$", (ROOT / "ARCHITECTURE.md").read_text(), flags=re.MULTILINE))
    folders = ("builder", "runtime", "furiosa_llm", "benchmarks", "fixtures")
    found = {str(file.relative_to(ROOT)) for folder in folders for file in (ROOT / folder).rglob("*.py")}
    assert listed == found
