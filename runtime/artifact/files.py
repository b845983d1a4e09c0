"""Opens the files of an artifact's folder: regular files only, links never followed, nothing waited for, and each once.

What was checked is what is used: a file is read through the descriptor that its check has used, whatever its name has
come to stand for since, and its times tell whether it was written to.
"""

from __future__ import annotations

import os
import stat
import time
import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from io import BufferedReader
from pathlib import Path

import numpy as np
import numpy.typing as npt

from furiosa_llm.runtime.artifact.errors import ArtifactError
from furiosa_llm.runtime.artifact.json_reader import REBUILD

_TICK = 0.02
"""Seconds within which a file may be written to twice and have the same time of change."""

Stamp = tuple[int, int, int, int, int]
"""What differs as soon as a file is another one or was written to: device, number, size and times of change."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Handles:
    """The descriptors of a `Folder` for a process that inherits them: the folder's, and files' with their stamps."""

    folder: int
    files: Mapping[str, tuple[int, Stamp]]

    @property
    def descriptors(self) -> tuple[int, ...]:
        """All of them."""
        return (self.folder, *(descriptor for descriptor, _ in self.files.values()))


class Folder:
    """An artifact's folder at `path`; the files that were opened stay open until nobody has this object any more.

    `inherited` are handles that this process has from its parent, in place of opening anything.
    """

    def __init__(self, path: Path, inherited: Handles | None = None) -> None:
        self.path = path
        self._folder = _open_folder(path) if inherited is None else inherited.folder
        self._files = {} if inherited is None else {name: number for name, (number, _) in inherited.files.items()}
        self._stamps = {} if inherited is None else {name: stamp for name, (_, stamp) in inherited.files.items()}
        self._close = weakref.finalize(self, _close_all, self._folder, self._files)

    def stream(self, name: str) -> BufferedReader:
        """The file `name` from its beginning, the same one in every call; raises ArtifactError as `open_regular`."""
        if name not in self._files:
            with open_regular(self.path / name, self._folder) as first:
                self._files[name] = os.dup(first.fileno())
        try:
            return open(f"/proc/self/fd/{self._files[name]}", "rb", opener=_reopener)
        except OSError as error:
            raise ArtifactError(f"{self.path / name} cannot be read: {error.strerror}; copy it again") from error

    def stamp(self) -> None:
        """Remembers what the open files are now, for `changed`; a file that was just written to is waited for."""
        newest = max((os.fstat(number).st_ctime_ns for number in self._files.values()), default=0) / 1e9
        if 0 <= time.time() - newest < _TICK:
            time.sleep(_TICK)
        self._stamps = {name: _stamp(os.fstat(number)) for name, number in self._files.items()}

    def changed(self, name: str) -> bool:
        """Whether the open file `name` may have other bytes than when `stamp` was called."""
        return _stamp(os.fstat(self._files[name])) != self._stamps[name]

    def rewritten(self, name: str) -> bool:
        """Whether the open file `name` has another size or time of writing than then, whatever became of its names."""
        size, written = _stamp(os.fstat(self._files[name]))[2:4]
        return (size, written) != self._stamps[name][2:4]

    def in_place(self, names: Iterable[str]) -> bool:
        """Whether the files `names` have not changed, and their names still stand for them."""
        try:
            return all(
                _stamp(os.stat(name, dir_fd=self._folder, follow_symlinks=False)) == self._stamps[name]
                for name in names
            )
        except OSError:
            return False

    def read(self, name: str, offset: int, nbytes: int) -> npt.NDArray[np.uint8]:
        """Bytes of the open file `name`, uint8 `[nbytes]`; raises ArtifactError if it has become too short."""
        data = np.empty(nbytes, dtype=np.uint8)
        done = 0
        while done < nbytes:
            try:
                count = os.preadv(self._files[name], [data.data[done:]], offset + done)
            except OSError as error:
                raise ArtifactError(f"{self.path / name} cannot be read: {error.strerror}; copy it again") from error
            if not count:
                raise ArtifactError(f"{name} was cut short while the artifact was open; {REBUILD}")
            done += count
        return data

    @property
    def address(self) -> Path:
        """A path of the folder itself in this process, whatever its name stands for now."""
        return Path(f"/proc/self/fd/{self._folder}")

    @property
    def handles(self) -> Handles:
        """For `Folder` in another process."""
        files = {name: (number, self._stamps[name]) for name, number in self._files.items()}
        return Handles(folder=self._folder, files=files)


def _open_folder(path: Path) -> int:
    try:
        return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read: {error.strerror}; check it and copy it again") from error


def _close_all(folder: int, files: Mapping[str, int]) -> None:
    for number in (folder, *files.values()):
        os.close(number)


def _stamp(found: os.stat_result) -> Stamp:
    return (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)


def open_regular(path: Path, folder: int | None = None) -> BufferedReader:
    """The regular file at `path`, open for reading; in the folder that is open as `folder`, if that is given.

    Raises ArtifactError for a link, a folder, a FIFO, a socket or a device, which is not even opened, and for a file
    that is missing or cannot be read.
    """
    try:
        # Looked at first, because opening a device may do something; and again afterwards, because another process may
        # have put something else there in between, for which O_NONBLOCK keeps this one from waiting.
        found = path.lstat() if folder is None else os.stat(path.name, dir_fd=folder, follow_symlinks=False)
        if not stat.S_ISREG(found.st_mode):
            raise not_regular(path)
        within = path if folder is None else path.name
        stream = open(within, "rb", opener=partial(_opener, folder))  # noqa: SIM115 - it is the caller's to close
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


def _opener(folder: int | None, path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)


def _reopener(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_CLOEXEC)
