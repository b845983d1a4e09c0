"""Folders in the cache outside the repository that are built step by step, never half."""

from __future__ import annotations

import fcntl
import json
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from furiosa_llm.example.errors import CacheError

_STATE = "recipe.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One step of a recipe: `write(scratch)` leaves exactly `files` in the folder `scratch`."""

    name: str
    files: tuple[str, ...]
    write: Callable[[Path], None]


def is_complete(folder: Path, recipe: str) -> bool:
    """Whether `folder` holds everything that the recipe of that version makes, each file with the size it was given."""
    state = _read_state(folder)
    if state.get("recipe") != recipe or not state.get("complete"):
        return False
    return all(_is_finished(folder, files) for files in state["steps"].values())


def build_folder(folder: Path, recipe: str, steps: Sequence[Step], console: Console) -> None:
    """Runs the steps that `folder` still lacks, and marks it complete.

    A step writes into a scratch folder; its files are renamed into place when it is done, and the step is then noted in
    `recipe.json`. An interrupted build goes on after the last noted step; a build of another recipe version starts
    again. One process builds at a time; others wait for it.

    Raises `CacheError` when the disk refuses.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder):
            if is_complete(folder, recipe):
                return
            state = _read_state(folder)
            done: dict[str, dict[str, int]] = state.get("steps", {}) if state.get("recipe") == recipe else {}
            for step in steps:
                if not _is_finished(folder, done.get(step.name, {})):
                    done[step.name] = _run_step(folder, step, console)
                    _write_state(folder, {"recipe": recipe, "steps": done, "complete": False})
            _write_state(folder, {"recipe": recipe, "steps": done, "complete": True})
    except OSError as error:
        raise CacheError(
            f"cannot build {folder}: {error}; free space or allow writing there, "
            "or choose another place with XDG_CACHE_HOME"
        ) from error


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _run_step(folder: Path, step: Step, console: Console) -> dict[str, int]:
    """Runs one step in a fresh scratch folder, moves its files into `folder` and returns their sizes in bytes."""
    scratch = folder / f".{step.name}.partial"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    start = time.perf_counter()
    with console.status(f"{folder.name}: {step.name}"):
        step.write(scratch)
    sizes = {name: (scratch / name).stat().st_size for name in step.files}
    for name in step.files:
        (scratch / name).replace(folder / name)
    scratch.rmdir()
    seconds = time.perf_counter() - start
    console.print(f"{folder.name}: {step.name}, {sum(sizes.values()) / 1e6:.1f} MB in {seconds:.1f} s", highlight=False)
    return sizes


def _is_finished(folder: Path, files: dict[str, int]) -> bool:
    if not files:
        return False
    paths = {folder / name: nbytes for name, nbytes in files.items()}
    return all(path.is_file() and path.stat().st_size == nbytes for path, nbytes in paths.items())


def _read_state(folder: Path) -> dict[str, Any]:
    """The noted state, or nothing where it is missing or unreadable: the build then starts again."""
    try:
        state = json.loads((folder / _STATE).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError, UnicodeDecodeError):
        return {}
    return state if isinstance(state, dict) and isinstance(state.get("steps"), dict) else {}


def _write_state(folder: Path, state: dict[str, Any]) -> None:
    temporary = folder / f"{_STATE}.tmp"
    temporary.write_text(json.dumps(state, indent=1) + "\n", encoding="utf-8")
    temporary.replace(folder / _STATE)
