"""Opens the files of an artifact's folder: regular files only, links never followed, nothing waited for."""

from __future__ import annotations

import os
import stat
from io import BufferedReader
from pathlib import Path

from furiosa_llm.runtime.artifact.errors import ArtifactError
from furiosa_llm.runtime.artifact.json_reader import REBUILD


def open_regular(path: Path) -> BufferedReader:
    """The regular file at `path`, open for reading.

    Raises ArtifactError for a link, a folder, a FIFO, a socket or a device, which is not even opened, and for a file
    that is missing or cannot be read.
    """
    try:
        # Looked at first, because opening a device may do something; and again afterwards, because another process may
        # have put something else there in between, for which O_NONBLOCK keeps this one from waiting.
        if not stat.S_ISREG(path.lstat().st_mode):
            raise not_regular(path)
        stream = open(path, "rb", opener=_opener)  # noqa: SIM115 - it is the caller's to close
    except FileNotFoundError as error:
        raise ArtifactError(f"{path} is missing; copy the artifact again or {REBUILD}") from error
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read: {error.strerror}; copy the artifact again") from error
    if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
        stream.close()
        raise not_regular(path)
    return stream


def not_regular(path: Path) -> ArtifactError:
    """What is said of a path that is no regular file."""
    return ArtifactError(f"{path} is not a regular file; copy the artifact with its links followed (`cp -rL`)")


def size_of(stream: BufferedReader) -> int:
    """The bytes of an open file."""
    return os.fstat(stream.fileno()).st_size


def sync(path: Path) -> None:
    """Have everything of a file or folder on disk; raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _opener(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
