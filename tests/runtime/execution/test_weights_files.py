"""What becomes of an artifact's files while it is loaded, and while it runs."""

from __future__ import annotations

import ctypes
import mmap
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from furiosa_llm.runtime.artifact.errors import ArtifactError
from furiosa_llm.runtime.artifact.layout import Mesh
from furiosa_llm.runtime.artifact.reader import open_artifact
from furiosa_llm.runtime.errors import ExecutionError
from furiosa_llm.runtime.execution.executor import Executor
from furiosa_llm.runtime.execution.weights_files import _replace, _without
from tests.support.runtime.models import LlamaSize, llama
from tests.support.runtime.spmd import WEIGHTS


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return llama(Mesh((2,)), LlamaSize(layers=1)).write(tmp_path_factory.mktemp("llama") / "artifact")


@pytest.fixture
def folder(written: Path, tmp_path: Path) -> Path:
    return shutil.copytree(written, tmp_path / "artifact")


def outputs(executor: Executor) -> Mapping[str, Any]:
    infos = executor.artifact.manifest.inputs
    sizes = {"batch": 1, "sequence": 3, "past": 0, "total": 3}
    given = {}
    for info in infos:
        shape = [dim if isinstance(dim, int) else sizes[dim] for dim in info.shape]
        kind = np.float32 if info.dtype == "FLOAT" else np.int64
        given[info.name] = np.ones(shape, dtype=kind) if info.role != "position_ids" else np.arange(3)[None]
    return executor.run(given)


def open_maps() -> list[str]:
    return Path("/proc/self/maps").read_text().splitlines()


def mapped_files(folder: Path) -> list[str]:
    return [line for line in open_maps() if line.endswith(str(folder / WEIGHTS))]


def truncate(path: Path) -> None:
    os.truncate(path, 0)


def overwrite(path: Path) -> None:
    with path.open("r+b") as file:
        file.write(bytes(path.stat().st_size))


def replace(path: Path) -> None:
    path.with_suffix(".new").write_bytes(bytes(path.stat().st_size))
    path.with_suffix(".new").rename(path)


def lose(path: Path) -> None:
    shutil.rmtree(path.parent)


@pytest.mark.parametrize("harm", [truncate, overwrite, replace, lose])
def test_a_running_model_is_out_of_reach(folder: Path, harm: Callable[[Path], None]) -> None:
    with Executor(open_artifact(folder), threads=1) as executor:
        assert not mapped_files(folder)
        before = outputs(executor)
        harm(folder / WEIGHTS)
        for name, array in outputs(executor).items():
            np.testing.assert_array_equal(array, before[name])


@pytest.mark.parametrize("harm", [replace, lose])
def test_what_was_checked_is_loaded_whatever_is_in_its_place_now(folder: Path, harm: Callable[[Path], None]) -> None:
    with Executor(open_artifact(folder), threads=1) as executor:
        before = outputs(executor)
    artifact = open_artifact(folder)
    harm(folder / WEIGHTS)
    with Executor(artifact, threads=1) as executor:
        for name, array in outputs(executor).items():
            np.testing.assert_array_equal(array, before[name])


@pytest.mark.parametrize("harm", [truncate, overwrite])
def test_files_that_are_written_to_before_they_are_loaded(folder: Path, harm: Callable[[Path], None]) -> None:
    artifact = open_artifact(folder)
    harm(folder / WEIGHTS)
    with pytest.raises(ArtifactError, match=r"was altered|was cut short"):
        Executor(artifact, threads=1)


def test_files_that_are_replaced_while_they_are_loaded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sessions that were made of others are not used, and neither is what onnxruntime made of their absence."""
    with Executor(open_artifact(folder), threads=1) as executor:
        before = outputs(executor)
    for harm in (replace, lose):
        other = shutil.copytree(folder, folder.with_name(harm.__name__))
        artifact = open_artifact(other)
        in_place = artifact.files.in_place

        def then_harmed(names: Any, in_place: Any = in_place, harm: Any = harm, other: Path = other) -> bool:
            found: bool = in_place(names)
            if found:
                harm(other / WEIGHTS)
            return found

        monkeypatch.setattr(artifact.files, "in_place", then_harmed)
        with Executor(artifact, threads=1) as executor:
            for name, array in outputs(executor).items():
                np.testing.assert_array_equal(array, before[name])


def test_mapped_weights_that_are_written_to(folder: Path) -> None:
    artifact = open_artifact(folder)
    with Executor(artifact, threads=1, mapped=True) as executor:
        assert mapped_files(folder)
        outputs(executor)
        truncate(folder / WEIGHTS)
        with pytest.raises(ExecutionError, match=re.escape(f"{WEIGHTS} was written to while it was mapped")):
            outputs(executor)
    with pytest.raises(ArtifactError, match="has changed since it was opened; load it again, or not mapped"):
        Executor(artifact, threads=1, mapped=True)


CUT_WITHIN_A_STEP = """
import os, sys
from furiosa_llm.runtime import LLM, SamplingParams
from furiosa_llm.runtime.errors import ExecutionError
from furiosa_llm.runtime.runners import loaded_model

real, cut = loaded_model.mapped_check, []

def mapped_check(artifact):
    check = real(artifact)
    def looked_at():
        check()
        if cut:  # the step has been let through, and reads what is there no more
            os.truncate(cut[0], 0)
    return looked_at

loaded_model.mapped_check = mapped_check
with LLM.load_artifact(sys.argv[1], threads=1, mapped=True) as llm:
    params = SamplingParams(temperature=0.0, max_tokens=1)
    llm.generate([[1, 2, 3]], params)
    cut.append(sys.argv[2])
    print("cut", flush=True)
    llm.generate([[1, 2, 3]], params)
"""


@pytest.mark.slow
def test_mapped_weights_that_are_cut_within_a_step(folder: Path) -> None:
    """What docs/limits.md says of them: the process ends, by the signal, and gives no token of what is not there."""
    command = [sys.executable, "-c", CUT_WITHIN_A_STEP, str(folder), str(folder / WEIGHTS)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (ended.returncode, ended.stdout) == (-signal.SIGBUS, "cut\n"), ended.stderr


def test_what_is_mapped_next_to_others_is_told_apart() -> None:
    assert list(_without([(0, 100, 7000)], [(50, 60, 1), (10, 20, 1)])) == [
        (0, 10, 7000),
        (20, 50, 7020),
        (60, 100, 7060),
    ]
    assert list(_without([(10, 20, 0), (30, 40, 5)], [(5, 20, 0)])) == [(30, 40, 5)]


def test_what_is_mapped_twice_is_copied_once(tmp_path: Path) -> None:
    """And each mapping stays by itself: what one session wrote into its own, no other would see."""
    page = mmap.PAGESIZE
    path = tmp_path / WEIGHTS
    path.write_bytes(bytes([1] * page + [2] * page))
    with path.open("rb") as file:
        maps = [mmap.mmap(file.fileno(), page, flags=mmap.MAP_PRIVATE, offset=offset) for offset in (0, page, page)]
        places = [(ctypes.c_uint8 * page).from_buffer(given) for given in maps]
        starts = [ctypes.addressof(place) for place in places]
        _replace(
            file.fileno(),
            [(start, start + page, offset) for start, offset in zip(starts, (0, page, page), strict=True)],
            path,
        )
    truncate(path)
    assert [bytes(place) for place in places] == [bytes([1] * page), bytes([2] * page), bytes([2] * page)]
    inodes = {int(line[0].split("-")[0], 16): line[4] for line in map(str.split, open_maps())}
    assert inodes[starts[1]] == inodes[starts[2]] != "0"
    places[1][0] = 9
    assert places[2][0] == 2
