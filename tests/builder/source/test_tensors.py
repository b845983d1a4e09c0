"""Sources read past the page cache: the same bytes from any place, wherever the file system can do it or not."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from furiosa_llm.builder import ModelLoadError
from furiosa_llm.builder.source import tensors
from furiosa_llm.builder.source.tensors import SourceTensor, read_packed, read_pieces

SIZE = 100_003
CONTENT = np.random.default_rng(0).integers(0, 256, SIZE, dtype=np.uint8)
PLACES = [(0, SIZE), (0, 1), (1, 4095), (4095, 2), (4096, 4096), (5000, 70_001), (SIZE - 1, 1), (98_304, 1699)]

Read = Callable[[int, list[memoryview], int, int], int]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "data").write_bytes(CONTENT.tobytes())
    return tmp_path / "data"


def tensor(file: Path, offset: int, nbytes: int) -> SourceTensor:
    shape = ir.Shape([nbytes])
    return SourceTensor(file.name, offset, nbytes, ir.DataType.UINT8, shape=shape, name="w", base_dir=file.parent)


def never_cached(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """As if nothing were in the page cache: gives the offsets that are read directly."""
    real, offsets = os.preadv, []

    def preadv(descriptor: int, buffers: list[memoryview], offset: int, flags: int = 0) -> int:
        if flags == os.RWF_NOWAIT:
            raise BlockingIOError
        offsets.append(offset)
        return real(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", preadv)
    return offsets


@pytest.mark.parametrize("piece", [8192, 4 * 2**20])
@pytest.mark.parametrize(("offset", "nbytes"), PLACES)
def test_blocks_are_cut_to_measure(
    offset: int, nbytes: int, piece: int, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensors, "_PIECE_NBYTES", piece)
    monkeypatch.setattr(tensors, "STREAMED_NBYTES", 5000)
    offsets = never_cached(monkeypatch)
    expected = CONTENT[offset : offset + nbytes]
    np.testing.assert_array_equal(read_packed(tensor(file, offset, nbytes)), expected)
    np.testing.assert_array_equal(np.concatenate(list(read_pieces(tensor(file, offset, nbytes)))), expected)
    assert offsets
    assert all(place % 4096 == 0 for place in offsets)


def test_what_is_cached_is_taken_from_there(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = []
    real = os.preadv

    def preadv(descriptor: int, buffers: list[memoryview], offset: int, flag: int = 0) -> int:
        flags.append(flag)
        return real(descriptor, buffers, offset, flag)

    file.read_bytes()
    monkeypatch.setattr(os, "preadv", preadv)
    np.testing.assert_array_equal(read_packed(tensor(file, 5, 50_000)), CONTENT[5:50_005])
    assert flags[0] == os.RWF_NOWAIT


@pytest.mark.parametrize("refused", [errno.EINVAL, errno.EOPNOTSUPP])
def test_a_file_system_without_it(refused: int, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real_open, real_read = os.open, os.preadv

    def opened(path: Path, flags: int, *rest: int) -> int:
        if flags & os.O_DIRECT and refused == errno.EINVAL:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real_open(path, flags, *rest)

    def preadv(descriptor: int, buffers: list[memoryview], offset: int, flags: int = 0) -> int:
        if flags:
            raise OSError(errno.EOPNOTSUPP, "Operation not supported")
        return real_read(descriptor, buffers, offset)

    monkeypatch.setattr(os, "open", opened)
    monkeypatch.setattr(os, "preadv", preadv)
    np.testing.assert_array_equal(read_packed(tensor(file, 4097, 60_000)), CONTENT[4097:64_097])


def test_a_file_that_ends_too_early(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    never_cached(monkeypatch)
    short = tensor(file, 90_000, 10_003)
    with file.open("r+b") as stream:
        stream.truncate(95_000)
    with pytest.raises(ModelLoadError, match=r"ends at byte 95000, but the data of \"w\" at byte 100003"):
        read_packed(short)


def test_a_disk_that_fails(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def preadv(*_: object) -> int:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "preadv", preadv)
    with pytest.raises(ModelLoadError, match="cannot be read: Input/output error; check the file"):
        read_packed(tensor(file, 0, 10))
