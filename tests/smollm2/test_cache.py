"""Folders built step by step: resumed, rebuilt on another recipe, and refused with a reason when the disk refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
from rich.console import Console

from furiosa_llm.example.cache import Step, build_folder, is_complete
from furiosa_llm.example.errors import CacheError

QUIET = Console(quiet=True)


class Recorder:
    """Steps that write one file each and note that they ran; the step named `failing` is interrupted halfway."""

    def __init__(self, failing: str = "") -> None:
        self.ran: list[str] = []
        self.failing = failing

    def step(self, name: str) -> Step:
        def write(scratch: Path) -> None:
            self.ran.append(name)
            (scratch / f"{name}.txt").write_text("half")
            if name == self.failing:
                raise KeyboardInterrupt
            (scratch / f"{name}.txt").write_text(f"whole {name}")

        return Step(name=name, files=(f"{name}.txt",), write=write)

    def steps(self) -> list[Step]:
        return [self.step("first"), self.step("second")]


def test_interrupted_build_goes_on_where_it_stopped(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    interrupted = Recorder(failing="second")
    with pytest.raises(KeyboardInterrupt):
        build_folder(folder, "1", interrupted.steps(), QUIET)
    assert not is_complete(folder, "1")
    assert not (folder / "second.txt").exists()

    resumed = Recorder()
    build_folder(folder, "1", resumed.steps(), QUIET)
    assert resumed.ran == ["second"]
    assert is_complete(folder, "1")
    assert (folder / "second.txt").read_text() == "whole second"
    assert not list(folder.glob("*.partial")) + list(folder.glob(".*.partial"))


def test_finished_folder_is_left_alone(tmp_path: Path) -> None:
    build_folder(tmp_path, "1", Recorder().steps(), QUIET)
    again = Recorder()
    build_folder(tmp_path, "1", again.steps(), QUIET)
    assert again.ran == []


def test_another_recipe_builds_anew(tmp_path: Path) -> None:
    build_folder(tmp_path, "1", Recorder().steps(), QUIET)
    assert not is_complete(tmp_path, "2")
    again = Recorder()
    build_folder(tmp_path, "2", again.steps(), QUIET)
    assert again.ran == ["first", "second"]


def test_truncated_or_missing_file_is_made_again(tmp_path: Path) -> None:
    build_folder(tmp_path, "1", Recorder().steps(), QUIET)
    (tmp_path / "first.txt").write_text("cut")
    assert not is_complete(tmp_path, "1")
    again = Recorder()
    build_folder(tmp_path, "1", again.steps(), QUIET)
    assert again.ran == ["first"]


def test_unreadable_state_builds_anew(tmp_path: Path) -> None:
    build_folder(tmp_path, "1", Recorder().steps(), QUIET)
    (tmp_path / "recipe.json").write_text("{")
    again = Recorder()
    build_folder(tmp_path, "1", again.steps(), QUIET)
    assert again.ran == ["first", "second"]


def test_disk_trouble_says_where_and_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CacheError, match=r"cannot build .*file/model: .*XDG_CACHE_HOME"):
        build_folder(tmp_path / "file" / "model", "1", Recorder().steps(), QUIET)
