"""The folder that a build writes: a temporary one next to the destination, renamed at the very end.

A build holds a lock on its temporary folder, which ends with the process. The lock distinguishes a folder that an
interrupted build has left, which is removed, from one that another build is writing, which is an error. It goes along
when the folder takes the destination's name: until it is free the other build is still putting the old one away.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from furiosa_llm.builder.errors import OutputError
from furiosa_llm.runtime.artifact.files import sync
from furiosa_llm.runtime.artifact.manifest import MANIFEST_NAME
from furiosa_llm.runtime.artifact.temporary import hold
from furiosa_llm.runtime.artifact.units import nbytes as shown

_SPARE_NBYTES = 64 * 2**20
"""Free space to demand beyond the weights: for program, tokenizer and the file system's own data."""


@contextlib.contextmanager
def output_folder(destination: Path, *, force: bool) -> Iterator[Path]:
    """A temporary folder next to `destination` that takes its place if the block succeeds, and vanishes otherwise.

    What a killed build has left is removed first, and an artifact that it was about to replace is put back. Raises
    OutputError if the destination exists and `force` is not given, is not an artifact, is being written by another
    build, or cannot be written.
    """
    _check_name(destination)
    temporary = destination.with_name(f".{destination.name}.building")
    replaced = destination.with_name(f".{destination.name}.replaced")
    with contextlib.ExitStack() as stack:
        try:
            destination.parent.mkdir(parents=True, exist_ok=True)
            descriptor = stack.enter_context(_locked(temporary, destination))
        except OSError as error:
            raise OutputError(
                f"cannot write to {destination.parent}: {error.strerror}; give an output folder that can be written."
            ) from error
        try:
            _check_not_ending(destination)
            _restore(destination, replaced)
            _check_destination(destination, force=force)
            yield temporary
            _publish(temporary, destination, replaced)
        except BaseException as error:
            if _is_at(descriptor, temporary):
                shutil.rmtree(temporary, ignore_errors=True)
            if not isinstance(error, OSError):
                raise
            raise OutputError(
                f"writing {destination} failed: {error.strerror or error}; nothing was left behind. "
                "Check the free space and the rights of that folder."
            ) from error


def check_free_space(folder: Path, nbytes: int) -> None:
    """Raise OutputError unless the file system of `folder` has room for `nbytes` of weights and for the small files."""
    free = shutil.disk_usage(folder).free
    if free < nbytes + _SPARE_NBYTES:
        raise OutputError(
            f"the artifact's weights take {shown(nbytes)}, but {folder.parent} has {shown(free)} left; free some space "
            "or give an output on another disk."
        )


def _check_name(destination: Path) -> None:
    if not destination.name or destination.name == "..":
        raise OutputError(f'the output "{destination}" has no name of its own; give the name of a new folder.')


def _check_destination(destination: Path, *, force: bool) -> None:
    if not os.path.lexists(destination):
        return
    if not force:
        raise OutputError(f"{destination} exists already; give another output, or --force (force=True) to replace it.")
    is_folder = destination.is_dir() and not destination.is_symlink()
    if not is_folder or not ((destination / MANIFEST_NAME).is_file() or not any(destination.iterdir())):
        raise OutputError(
            f"{destination} exists and is not an artifact (it has no {MANIFEST_NAME}), so --force does not replace it; "
            "give another output or remove it yourself."
        )


@contextlib.contextmanager
def _locked(temporary: Path, destination: Path) -> Iterator[int]:
    """The temporary folder, made or emptied, open and locked until the block ends."""
    descriptor = _open_folder(temporary, destination)
    try:
        temporary.chmod(0o755)
        for entry in temporary.iterdir():
            _remove(entry)
        yield descriptor
    finally:
        os.close(descriptor)


def _open_folder(temporary: Path, destination: Path) -> int:
    while True:
        with contextlib.suppress(FileExistsError):
            temporary.mkdir()
        try:
            return _hold(temporary, destination)
        except FileNotFoundError:
            continue  # another build has just renamed it
        except NotADirectoryError as error:
            raise OutputError(
                f"{temporary} is not a folder; builds of {destination} are written there: remove it first."
            ) from error


def _hold(folder: Path, destination: Path) -> int:
    try:
        return hold(folder)
    except BlockingIOError as error:
        raise OutputError(
            f"another build is writing {destination} at this moment; wait for its end, or give another output."
        ) from error


def _check_not_ending(destination: Path) -> None:
    """Raise OutputError if the build that wrote what is at the destination has not ended."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        os.close(_hold(destination, destination))


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.lstat())
    except FileNotFoundError:
        return False


def _restore(destination: Path, replaced: Path) -> None:
    """Put an artifact back if a build was killed while it replaced it."""
    if not os.path.lexists(replaced):
        return
    if os.path.lexists(destination):
        _remove(replaced)
    else:
        replaced.rename(destination)


def _publish(temporary: Path, destination: Path, replaced: Path) -> None:
    if os.path.lexists(destination):
        destination.rename(replaced)
    temporary.rename(destination)
    sync(destination.parent)
    if os.path.lexists(replaced):
        _remove(replaced)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()
