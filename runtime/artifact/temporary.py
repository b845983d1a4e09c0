"""Temporary folders that no killed process leaves for good: the next one removes those that nobody holds."""

from __future__ import annotations

import contextlib
import fcntl
import glob
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

from furiosa_llm.runtime.artifact.files import sync

_SUFFIX = ".tmp"
_MODE = 0o700
"""Of `tempfile.mkdtemp`: what has another one is somebody's own."""


@contextlib.contextmanager
def temporary_folder(parent: Path, prefix: str) -> Iterator[Path]:
    """A new folder in `parent` that is gone when the block ends; what killed processes have left there goes first.

    Its lock ends with the process, and says whether a folder of that prefix is still used. Raises OSError.
    """
    for left in parent.glob(f"{glob.escape(prefix)}*{_SUFFIX}"):
        with contextlib.suppress(OSError):
            _remove_unless_held(left)
    folder, descriptor = _new(parent, prefix)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(descriptor)


def replace_file(path: Path, data: bytes) -> None:
    """Give the file at `path` these bytes, all at once; raises OSError, and then it is what it was."""
    with temporary_folder(path.parent, f".{path.name}-") as folder:
        new = folder / path.name
        new.write_bytes(data)
        sync(new)
        new.replace(path)
    sync(path.parent)


def _new(parent: Path, prefix: str) -> tuple[Path, int]:
    """A new folder, and the descriptor that holds it."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=prefix, suffix=_SUFFIX, dir=parent))
        with contextlib.suppress(FileNotFoundError, BlockingIOError):  # another process has just taken it for left
            return folder, hold(folder)


def hold(folder: Path) -> int:
    """A descriptor of the folder, locked until it is closed or the process ends.

    Raises BlockingIOError if another one holds it, FileNotFoundError if it is not there, or not any more once it is
    locked, NotADirectoryError if it is no folder.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not os.path.samestat(os.fstat(descriptor), folder.lstat()):
            raise FileNotFoundError(folder)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _remove_unless_held(folder: Path) -> None:
    status = folder.lstat()
    if status.st_uid != os.geteuid() or stat.S_IMODE(status.st_mode) != _MODE:
        return
    descriptor = hold(folder)
    try:
        shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(descriptor)
