"""What onnxruntime maps of weights while sessions are made: the files that were checked, and for no longer.

onnxruntime opens weights by path, maps them, packs most and leaves the others mapped. A file that is cut short under a
mapping ends the process, and one that is written to changes the model. So it is given the folder by its descriptor; a
session counts only if the files are still what was checked once it is made; and what is still mapped then is copied,
and the copy put in its place.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from furiosa_llm.runtime.artifact.errors import ArtifactError
from furiosa_llm.runtime.artifact.reader import Artifact
from furiosa_llm.runtime.artifact.temporary import temporary_folder
from furiosa_llm.runtime.errors import ExecutionError

Made = TypeVar("Made")
Span = tuple[int, int, int]
"""Addresses from one to another, and the byte of the file at the first."""

_MAP_FIXED = 0x10
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *(ctypes.c_int,) * 3, ctypes.c_long)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_one_at_a_time = threading.Lock()
"""Held from before sessions are made until what they map is copied: mappings are told apart by when they appear."""


def with_weights(artifact: Artifact, make: Callable[[Path], Made], *, mapped: bool) -> Made:
    """What `make` makes of a folder that has the weights of `artifact`: its own, or a copy if its files have changed.

    Nothing of the files is mapped any more when this returns, unless they are to stay `mapped`: then they must not have
    changed. Raises ArtifactError if the weights are not what was checked.
    """
    names = weights_of(artifact)
    with _one_at_a_time:
        if artifact.files.in_place(names):
            try:
                with _copied_behind(artifact, names, artifact.files.address, mapped=mapped):
                    made = make(artifact.files.address)
            except (ExecutionError, OSError):  # of what was in their place for a while
                if artifact.files.in_place(names):
                    raise
            else:
                if artifact.files.in_place(names):
                    return made
        if mapped:
            raise ArtifactError(f"{artifact.folder} has changed since it was opened; load it again, or not mapped")
        with _copy_of(artifact, names) as folder, _copied_behind(artifact, names, folder, mapped=False):
            return make(folder)


def mapped_check(artifact: Artifact) -> Callable[[], None]:
    """Raises ExecutionError once weights that are mapped were written to: a step would read past their end, or others.

    What is cut short while a step reads it still ends the process.
    """
    names = weights_of(artifact)

    def check() -> None:
        for name in names:
            if artifact.files.rewritten(name):
                raise ExecutionError(
                    f"{artifact.folder / name} was written to while it was mapped; restore it and load it again, or "
                    f"load it without mapped"
                )

    return check


def weights_of(artifact: Artifact) -> tuple[str, ...]:
    """The names of the weights files."""
    return tuple(sorted({tensor.file for tensor in artifact.manifest.tensors}))


@contextmanager
def _copy_of(artifact: Artifact, names: Sequence[str]) -> Iterator[Path]:
    """A folder of copies of the files, which are what was checked; raises ArtifactError if they are not any more."""
    try:
        with temporary_folder(Path(tempfile.gettempdir()), "furiosa-llm-weights-") as folder:
            for name in names:
                artifact.copy_file(name, folder / name)
            yield folder
    except OSError as error:
        raise ArtifactError(
            f"{artifact.folder} has changed, and its files cannot be copied to {tempfile.gettempdir()}: "
            f"{error.strerror}; load it again"
        ) from error


@contextmanager
def _copied_behind(artifact: Artifact, names: Sequence[str], folder: Path, *, mapped: bool) -> Iterator[None]:
    """Puts copies in the place of what the block maps of the files, unless they are to stay `mapped`."""
    if mapped:
        yield
        return
    files = {name: os.open(folder / name, os.O_RDONLY | os.O_CLOEXEC) for name in names}
    try:
        before = {name: list(_mapped(number)) for name, number in files.items()}
        yield
        for name, number in files.items():
            _replace(number, _without(_mapped(number), before[name]), artifact.folder / name)
    finally:
        for number in files.values():
            os.close(number)


def _mapped(number: int) -> Iterator[Span]:
    """Where this process has mapped the file that is open as `number`."""
    found, name = os.fstat(number), os.fsencode(Path(f"/proc/self/fd/{number}").readlink())
    path = name.replace(b"\n", rb"\012")
    place = [f"{os.major(found.st_dev):02x}:{os.minor(found.st_dev):02x}".encode(), str(found.st_ino).encode()]
    with Path("/proc/self/maps").open("rb") as maps:  # a name may have any byte but that which ends a line
        for line in maps:
            addresses, _, offset, there, inode, *named = line.rstrip(b"\n").split(maxsplit=5)
            # On some file systems of layers the device and number are those of another layer.
            if [there, inode] == place or named == [path]:
                start, stop = (int(address, 16) for address in addresses.split(b"-"))
                yield start, stop, int(offset, 16)


def _without(spans: Iterable[Span], others: Sequence[Span]) -> Iterator[Span]:
    """The parts of `spans` at addresses that none of `others` has: neighbours are shown as one."""
    for start, stop, offset in spans:
        at = start
        for first, last, _ in sorted(others):
            if last <= at or first >= stop:
                continue
            if first > at:
                yield at, first, offset + at - start
            at = max(at, last)
        if at < stop:
            yield at, stop, offset + at - start


def _replace(number: int, spans: Iterable[Span], path: Path) -> None:
    """Puts private memory with the same bytes in the place of mappings, which nobody reads yet.

    What is mapped more than once, such as a rotary table that every layer reads, is copied once.
    """
    places: dict[tuple[int, int], list[int]] = {}
    for start, stop, offset in spans:
        places.setdefault((offset, stop - start), []).append(start)
    for (offset, nbytes), starts in places.items():
        try:
            if len(starts) == 1:
                _map(starts[0], nbytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1)
                _libc.madvise(starts[0], nbytes, mmap.MADV_HUGEPAGE)  # saves tens of thousands of page faults
                _read(number, offset, (ctypes.c_uint8 * nbytes).from_address(starts[0]))
            else:
                _map_copy(number, offset, nbytes, starts)
        except OSError as error:
            raise ArtifactError(
                f"{path}: the system has no memory for {nbytes} bytes of its weights: {error.strerror}"
            ) from error


def _map_copy(number: int, offset: int, nbytes: int, starts: Sequence[int]) -> None:
    """Maps one copy of a part of a file at each of `starts`; nobody else has it."""
    memory = os.memfd_create("furiosa-llm weights")
    try:
        os.ftruncate(memory, nbytes)
        with mmap.mmap(memory, nbytes) as copy:
            _read(number, offset, copy)
        for start in starts:
            _map(start, nbytes, mmap.MAP_PRIVATE, memory)
    finally:
        os.close(memory)


def _map(start: int, nbytes: int, flags: int, number: int) -> None:
    """Maps the beginning of a file, or anonymous memory, at an address; raises OSError."""
    if _libc.mmap(start, nbytes, mmap.PROT_READ | mmap.PROT_WRITE, flags | _MAP_FIXED, number, 0) != start:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def _read(number: int, offset: int, target: ctypes.Array[ctypes.c_uint8] | mmap.mmap) -> None:
    """Fills `target` from a file; what is behind the file's end stays zero, as in a mapping."""
    done = 0
    with memoryview(target) as view:
        while (count := os.preadv(number, [view[done:]], offset + done)) > 0:
            done += count
