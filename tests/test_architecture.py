"""ARCHITECTURE.md fits on a screen and a half, names every folder, and every path in it leads somewhere."""

from __future__ import annotations

import re

from tests.test_layers import MAP
from tests.test_packaging import FOLDERS, ROOT

TOPS = ("builder", "runtime", "furiosa_llm", "benchmarks", "fixtures", "tests", "docs")
PATHS = set(re.findall(rf"\b(?:{'|'.join(TOPS)})/(?:\w+/)*(?:[\w-]+\.\w+)?", MAP))


def test_the_map_is_short() -> None:
    assert len(MAP.splitlines()) <= 150


def test_every_folder_has_its_line() -> None:
    folders = {path.parent for folder in FOLDERS.values() for path in (ROOT / folder).rglob("*.py")}
    assert {f"{folder.relative_to(ROOT)}/" for folder in folders} - PATHS == set()


def test_every_path_leads_somewhere() -> None:
    assert [path for path in sorted(PATHS) if not (ROOT / path).exists()] == []
    assert len(PATHS) > 60


def test_what_to_change_is_found() -> None:
    _, _, table = MAP.partition("## To change X, go to Y")
    rows = re.findall(r"^\| (.+) \| (.+) \|$", table, flags=re.MULTILINE)[1:]
    assert len(rows) >= 12
    assert [what for what, where in rows if not any(path in where for path in PATHS)] == []
