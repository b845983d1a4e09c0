"""The folder that a build writes: whole or not at all, whatever interrupts it."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest

from furiosa_llm.builder.errors import OutputError
from furiosa_llm.builder.write import output_folder as output_folder_module
from furiosa_llm.builder.write.output_folder import check_free_space, output_folder
from furiosa_llm.runtime import LLM, SamplingParams
from furiosa_llm.runtime.artifact.errors import ArtifactError
from furiosa_llm.runtime.artifact.layout import Mesh
from furiosa_llm.runtime.artifact.reader import open_artifact
from tests.support.runtime.models import LlamaSize, llama

HOLD = """
import sys, time
from pathlib import Path
from furiosa_llm.builder.write.output_folder import output_folder
with output_folder(Path(sys.argv[1]), force=True) as folder:
    (folder / "half").write_text("half")
    print("writing", flush=True)
    time.sleep(60)
"""


def artifact(folder: Path, content: str) -> Path:
    folder.mkdir()
    (folder / "manifest.json").write_text(content)
    return folder


def write(destination: Path, content: str, *, force: bool = False) -> None:
    with output_folder(destination, force=force) as folder:
        (folder / "manifest.json").write_text(content)


def listed(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_it_appears_when_it_is_complete(tmp_path: Path) -> None:
    destination = tmp_path / "new" / "artifact"
    with output_folder(destination, force=False) as folder:
        (folder / "manifest.json").write_text("x")
        assert not destination.exists()
        assert listed(destination.parent) == [".artifact.building"]
    assert listed(destination) == ["manifest.json"]
    assert listed(destination.parent) == ["artifact"]
    assert destination.stat().st_mode & 0o777 == 0o755


def fail_while_writing(destination: Path, error: BaseException) -> None:
    with output_folder(destination, force=False) as folder:
        (folder / "half").write_text("x")
        raise error


@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt()])
def test_nothing_is_left_of_one_that_failed(error: BaseException, tmp_path: Path) -> None:
    with pytest.raises(type(error)):
        fail_while_writing(tmp_path / "artifact", error)
    assert listed(tmp_path) == []


def test_an_artifact_that_is_replaced_stays_until_the_end(tmp_path: Path) -> None:
    destination = artifact(tmp_path / "artifact", "old")
    with pytest.raises(ValueError, match="x"), output_folder(destination, force=True):
        raise ValueError("x")
    assert (destination / "manifest.json").read_text() == "old"
    write(destination, "new", force=True)
    assert (destination / "manifest.json").read_text() == "new"
    assert listed(tmp_path) == ["artifact"]


def killed_build(destination: Path) -> None:
    """A build that dies by SIGKILL while it writes."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(destination)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "writing\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()


def test_the_next_build_removes_what_a_killed_one_left(tmp_path: Path) -> None:
    killed_build(tmp_path / "artifact")
    assert listed(tmp_path) == [".artifact.building"]
    assert listed(tmp_path / ".artifact.building") == ["half"]
    write(tmp_path / "artifact", "new")
    assert listed(tmp_path) == ["artifact"]
    assert listed(tmp_path / "artifact") == ["manifest.json"]


def test_two_builds_of_one_output(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "artifact")], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "writing\n"
        with pytest.raises(OutputError, match=r"another build is writing .*artifact at this moment; wait for its end"):
            write(tmp_path / "artifact", "mine")
        assert listed(tmp_path / ".artifact.building") == ["half"], "the other build's files are untouched"
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def test_a_build_that_begins_while_another_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The new artifact is in its place, the old one not yet gone: what is beside them is the other build's."""
    destination, beside = artifact(tmp_path / "artifact", "old"), tmp_path / ".artifact.replaced"
    real = output_folder_module._remove
    refused: list[object] = []

    def remove(path: Path) -> None:
        if path == beside and not refused:
            with pytest.raises(OutputError, match="another build is writing") as caught:
                write(destination, "too early", force=True)
            refused.append(caught)
            assert listed(tmp_path) == [".artifact.replaced", "artifact"]
        real(path)

    monkeypatch.setattr(output_folder_module, "_remove", remove)
    write(destination, "new", force=True)
    assert len(refused) == 1
    assert (destination / "manifest.json").read_text() == "new"
    assert listed(tmp_path) == ["artifact"]


def test_what_fails_at_the_end_leaves_the_next_build_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: Path) -> None:
        (tmp_path / ".artifact.building").mkdir()
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(output_folder_module, "sync", fail)
    with pytest.raises(OutputError, match="Input/output error"):
        write(tmp_path / "artifact", "new")
    assert listed(tmp_path) == [".artifact.building", "artifact"]


def test_an_artifact_is_replaced_again_and_again_while_others_open_it(tmp_path: Path) -> None:
    """Two threads replace it by one of two; every reader finds one of them whole, or an error of ours."""
    both = [llama(Mesh((2,)), LlamaSize(layers=layers)).write(tmp_path / str(layers)) for layers in (1, 2)]
    digests = {open_artifact(folder).digest for folder in both}
    destination = tmp_path / "place" / "artifact"
    shutil.copytree(both[0], destination)
    params = SamplingParams(temperature=0.0, max_tokens=4)
    wrong: list[BaseException] = []

    def replace() -> None:
        for number in range(20):
            try:
                with output_folder(destination, force=True) as folder:
                    shutil.copytree(both[number % 2], folder, dirs_exist_ok=True)
            except BaseException as error:  # noqa: BLE001 - any other than these is the finding
                if "another build is writing" not in str(error):
                    wrong.append(error)

    with LLM.load_artifact(destination, threads=1) as served:
        expected = served.generate([[1, 2, 3]], params)[0].outputs[0].token_ids
        threads = [threading.Thread(target=replace) for _ in range(2)]
        for thread in threads:
            thread.start()
        seen = set()
        while any(thread.is_alive() for thread in threads):
            with suppress(ArtifactError):
                seen.add(open_artifact(destination, full=True).digest)
        assert served.generate([[1, 2, 3]], params)[0].outputs[0].token_ids == expected
    assert wrong == []
    assert seen <= digests
    assert seen
    assert listed(destination.parent) == ["artifact"]
    with LLM.load_artifact(destination, threads=1) as loaded:
        assert loaded.generate([[1, 2, 3]], params)[0].outputs[0].token_ids


def test_killed_between_taking_the_old_away_and_putting_the_new_in_place(tmp_path: Path) -> None:
    """The old artifact is back before anything else is done."""
    destination = tmp_path / "artifact"
    artifact(tmp_path / ".artifact.replaced", "old")
    artifact(tmp_path / ".artifact.building", "new")
    with pytest.raises(OutputError, match="exists already"):
        write(destination, "newer")
    assert (destination / "manifest.json").read_text() == "old"
    write(destination, "newer", force=True)
    assert (destination / "manifest.json").read_text() == "newer"
    assert listed(tmp_path) == ["artifact"]


def test_killed_before_the_old_was_removed(tmp_path: Path) -> None:
    destination = artifact(tmp_path / "artifact", "new")
    artifact(tmp_path / ".artifact.replaced", "old")
    write(destination, "newer", force=True)
    assert listed(tmp_path) == ["artifact"]
    assert (destination / "manifest.json").read_text() == "newer"


def test_a_folder_that_was_renamed_while_it_was_being_locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another build ends between opening the folder and locking it: a new one is made, not the finished one emptied."""
    destination, other = tmp_path / "artifact", tmp_path / "elsewhere"
    artifact(tmp_path / ".artifact.building", "finished")
    real = fcntl.flock
    calls: list[int] = []

    def flock(descriptor: int, operation: int) -> None:
        if not calls:
            (tmp_path / ".artifact.building").rename(other)
        calls.append(descriptor)
        real(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    write(destination, "mine")
    assert (other / "manifest.json").read_text() == "finished"
    assert (destination / "manifest.json").read_text() == "mine"
    assert len(calls) == 2


@pytest.mark.parametrize("kind", ["file", "link"])
def test_the_temporary_name_is_taken(kind: str, tmp_path: Path) -> None:
    elsewhere = artifact(tmp_path / "elsewhere", "precious")
    temporary = tmp_path / ".artifact.building"
    temporary.write_text("x") if kind == "file" else temporary.symlink_to(elsewhere)
    with pytest.raises(OutputError, match=r"\.artifact\.building is not a folder; .*remove it first"):
        write(tmp_path / "artifact", "x")
    assert (elsewhere / "manifest.json").read_text() == "precious"


def test_a_link_is_not_replaced(tmp_path: Path) -> None:
    elsewhere = artifact(tmp_path / "elsewhere", "precious")
    (tmp_path / "artifact").symlink_to(elsewhere)
    with pytest.raises(OutputError, match="exists and is not an artifact"):
        write(tmp_path / "artifact", "x", force=True)
    assert (elsewhere / "manifest.json").read_text() == "precious"


@pytest.mark.parametrize("name", [".", "..", "/"])
def test_an_output_without_a_name(name: str) -> None:
    with pytest.raises(OutputError, match="has no name of its own; give the name of a new folder"):
        write(Path(name), "x")


def test_a_disk_that_is_too_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=2_000_000_000))
    check_free_space(tmp_path, 1_900_000_000)
    with pytest.raises(OutputError, match=r"take 3\.3 GB, but .* has 2\.0 GB left; free some space or give"):
        check_free_space(tmp_path, 3_300_000_000)


def test_a_disk_that_fills_up(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="No space left on device; nothing was left behind"):
        fail_while_writing(tmp_path / "artifact", OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    assert listed(tmp_path) == []


def test_waiting_does_not_block(tmp_path: Path) -> None:
    """A pipe in place of the temporary folder is not opened and waited for."""
    os.mkfifo(tmp_path / ".artifact.building")
    with pytest.raises(OutputError, match="is not a folder"):
        write(tmp_path / "artifact", "x")


def test_a_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a read-only folder says to anybody but root."""

    def refuse(path: Path, *_: object, **__: object) -> None:
        if path.name.startswith("."):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(OutputError, match=r"cannot write to .*: Permission denied; give an output folder that can be"):
        write(tmp_path / "artifact", "x")
    assert listed(tmp_path) == []
