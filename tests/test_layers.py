"""Imports inside builder/ and runtime/ run one way, along the rooms of ARCHITECTURE.md, and never in a circle."""

from __future__ import annotations

import functools
import re
from collections import defaultdict
from graphlib import TopologicalSorter

import pytest

from tests.test_packaging import FOLDERS, ROOT, imports, within

MAP = (ROOT / "ARCHITECTURE.md").read_text()
FILES = {
    package + "".join(f".{part}" for part in path.relative_to(ROOT / folder).with_suffix("").parts): str(
        path.relative_to(ROOT)
    )
    for package, folder in FOLDERS.items()
    for path in (ROOT / folder).rglob("*.py")
}
"""Module -> file; a package's `__init__` has its own name."""


def rooms(folder: str) -> list[str]:
    """The files and folders of `folder` in the map, each of which imports of those above it alone."""
    return re.findall(rf"^\| `{folder}/(\w+(?:\.py|/))` \|", MAP, flags=re.MULTILINE)


def room_of(path: str) -> str:
    """The room that a file of builder/ or runtime/ lies in."""
    parts = path.split("/")
    return parts[1] if len(parts) == 2 else f"{parts[1]}/"


def file_of(name: str) -> str | None:
    """The file that an import of a dotted name reads: a module, a package, or the module that has the attribute."""
    for candidate in (name, f"{name}.__init__", name.rpartition(".")[0], f"{name.rpartition('.')[0]}.__init__"):
        if candidate in FILES:
            return FILES[candidate]
    return None


@functools.cache
def arrows() -> list[tuple[str, str]]:
    """Each pair of files of which the first imports the second."""
    pairs = {(path, file_of(name)) for folder in FOLDERS.values() for path, name in imports(folder)}
    return sorted((path, found) for path, found in pairs if found is not None and found != path)


@pytest.mark.parametrize("folder", ["builder", "runtime"])
def test_the_map_has_every_room(folder: str) -> None:
    in_tree = {room_of(path) for path in FILES.values() if path.startswith(f"{folder}/")}
    assert sorted(rooms(folder)) == sorted(in_tree)


@pytest.mark.parametrize("folder", ["builder", "runtime"])
def test_imports_run_down_the_map(folder: str) -> None:
    order = {room: place for place, room in enumerate(rooms(folder))}
    inside = [(a, b) for a, b in arrows() if a.startswith(f"{folder}/") and b.startswith(f"{folder}/")]
    assert len(inside) > 100
    assert [(a, b) for a, b in inside if order[room_of(b)] > order[room_of(a)]] == []


def test_no_files_import_each_other() -> None:
    graph: dict[str, set[str]] = defaultdict(set)
    for path, imported in arrows():
        graph[path].add(imported)
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the files


def test_the_proof_shares_nothing_with_what_it_proves() -> None:
    allowed = {"errors.py", "shapes/", "rules/", "proof/"}
    used = {room_of(b) for a, b in arrows() if a.startswith("builder/proof/") and b.startswith("builder/")}
    assert used - allowed == set()


def test_the_builder_needs_no_onnxruntime_of_the_runtime() -> None:
    """Neither do the files that it imports there, nor those that they import."""
    seen: set[str] = set()
    pending = [b for a, b in arrows() if a.startswith("builder/") and b.startswith("runtime/")]
    while pending:
        path = pending.pop()
        if path not in seen:
            seen.add(path)
            pending += [b for a, b in arrows() if a == path]
    assert "runtime/placement/capacity.py" in seen
    assert {path for path, name in imports("runtime") if path in seen and within(name, "onnxruntime")} == set()


@pytest.mark.parametrize(("folder", "most"), [("builder", 11), ("runtime", 9)])
def test_few_files_lie_at_the_root(folder: str, most: int) -> None:
    assert len(list((ROOT / folder).glob("*.py"))) <= most
