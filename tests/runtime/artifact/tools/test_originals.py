"""Originals put together from shards that were cut index by index: every type, layout, part and size of piece."""

from __future__ import annotations

import dataclasses
import itertools
import re
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from furiosa_llm.runtime.artifact.dtypes import DTYPES
from furiosa_llm.runtime.artifact.errors import ArtifactError
from furiosa_llm.runtime.artifact.files import Folder
from furiosa_llm.runtime.artifact.layout import Cat, Dim, Leaf, Mesh, Prefix, Prod, index_map
from furiosa_llm.runtime.artifact.manifest import Part
from furiosa_llm.runtime.artifact.reader import Artifact
from furiosa_llm.runtime.artifact.tools.originals import padding_is_zero, read_original, read_whole
from furiosa_llm.runtime.artifact.tools.runs import extent_of, runs_of
from tests.support.runtime.shards import WEIGHTS, Original, Shards, shape_of, write

MESH = Mesh((2, 2))

LAYOUTS: dict[str, tuple[Dim, ...]] = {
    "scalar": (),
    "whole": (Leaf(5), Leaf(6)),
    "rows": (Leaf(8, (0, 1)), Leaf(6)),
    "padded rows": (Leaf(9, (0, 1)), Leaf(5)),
    "ranks of padding only": (Leaf(2, (0, 1)), Leaf(3)),
    "columns": (Leaf(4), Leaf(8, (1,))),
    "padded columns": (Leaf(4), Leaf(7, (1, 0))),
    "rows and columns": (Leaf(6, (1,)), Leaf(3), Leaf(5, (0,))),
    "heads": (Prod((Leaf(3, (0, 1)), Leaf(2))), Leaf(4)),
    "inner of a product": (Leaf(2), Prod((Leaf(3), Leaf(5, (0,))))),
    "every second": (Prod((Leaf(9), Leaf(2, (0,)))), Leaf(3)),
    "packed heads": (Cat((Prod((Leaf(4, (0, 1)), Leaf(2))), Leaf(3, (1, 0)), Leaf(5, (0, 1)))), Leaf(3)),
    "packed and whole": (Cat((Leaf(2), Leaf(3))), Leaf(4, (0,))),
    "prefix": (Leaf(3), Prefix(11, Prod((Leaf(3, (0, 1)), Leaf(4))))),
    "prefix of one block": (Prefix(5, Prod((Leaf(2, (0, 1)), Leaf(4)))),),
    "prefix within a product": (Prod((Leaf(3), Prefix(5, Prod((Leaf(2, (0,)), Leaf(3)))))),),
    "experts": (Leaf(3), Leaf(4, (1, 0)), Leaf(2)),
    "nothing": (Leaf(0), Leaf(4, (0,))),
    "nothing of what is split": (Leaf(0, (0,)), Leaf(4)),
}
TYPES = ["DOUBLE", "FLOAT", "FLOAT16", "BFLOAT16", "BOOL", "INT8", "UINT4", "INT4", "FLOAT4E2M1", "INT2"]


def stored(folder: Path, dtype: str, layout: tuple[Dim, ...], seed: int = 0) -> tuple[Original, Artifact]:
    original = Original.random("w", dtype, shape_of(layout), seed=seed)
    return original, write(folder, MESH, [original], {"w": Shards("w", layout)})


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_of_every_type(name: str, dtype: str, tmp_path: Path) -> None:
    original, artifact = stored(tmp_path / "a", dtype, LAYOUTS[name])
    assert read_original(artifact, "w").tobytes() == original.packed
    assert padding_is_zero(artifact, "w")


@pytest.mark.parametrize(("nbytes", "elements"), [(1, 8), (8, 8), (24, 16), (64, 64)])
@pytest.mark.parametrize("dtype", ["FLOAT", "INT8", "INT4", "INT2"])
def test_pieces_of_any_size(
    dtype: str, nbytes: int, elements: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("furiosa_llm.runtime.artifact.tools.originals._PIECE_NBYTES", max(8, nbytes))
    monkeypatch.setattr("furiosa_llm.runtime.artifact.tools.originals._PIECE_ELEMENTS", elements)
    for name, layout in LAYOUTS.items():
        original, artifact = stored(tmp_path / name, dtype, layout)
        assert read_original(artifact, "w").tobytes() == original.packed, name
        assert padding_is_zero(artifact, "w"), name


@pytest.mark.parametrize("least", [0, 2**40])
def test_runs_are_copied_and_gathered_alike(least: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("furiosa_llm.runtime.artifact.tools.runs._MIN_RUN_NBYTES", least)
    for name, layout in LAYOUTS.items():
        original, artifact = stored(tmp_path / name, "FLOAT16", layout)
        assert read_original(artifact, "w").tobytes() == original.packed, name
        assert padding_is_zero(artifact, "w"), name


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("dim", [0, 1])
def test_parts_are_joined(dim: int, dtype: str, tmp_path: Path) -> None:
    """Packed query, key and value with one key head for two ranks: each part has axes of its own."""
    cuts = ((0, 6, (0, 1)), (6, 9, (0,)), (9, 14, ()))
    parts, names = {}, ("q", "k", "v")
    for name, (start, stop, axes) in zip(names, cuts, strict=True):
        dims = [Leaf(3), Leaf(3)]
        dims[dim] = Leaf(stop - start, axes)
        parts[name] = Shards("w", tuple(dims), Part(dim=dim, start=start, stop=stop))
    original = Original.random("w", dtype, (14, 3) if dim == 0 else (3, 14), names)
    artifact = write(tmp_path / "a", MESH, [original], parts)
    assert read_original(artifact, "w").tobytes() == original.packed
    assert all(padding_is_zero(artifact, name) for name in names)


def test_a_second_layout_gives_the_same(tmp_path: Path) -> None:
    original = Original.random("w", "FLOAT", (6, 8))
    layouts = {"w": Shards("w", (Leaf(6), Leaf(8, (0, 1)))), "w/1": Shards("w", (Leaf(6, (0,)), Leaf(8)))}
    artifact = write(tmp_path / "a", MESH, [original], layouts)
    assert read_whole(artifact, ["w/1"]).tobytes() == read_original(artifact, "w").tobytes() == original.packed


def dims(depth: int = 2) -> st.SearchStrategy[Dim]:
    """Layouts that use mesh axis 0 in one leaf and axis 1 in another at most."""
    leaf: st.SearchStrategy[Dim] = st.builds(Leaf, st.integers(1, 7), st.sampled_from([(), (), (0,), (1,), (1, 0)]))
    nested = st.recursive(
        leaf, lambda inner: st.builds(lambda kind, parts: kind(tuple(parts)), st.sampled_from([Prod, Cat]),
                                      st.lists(inner, min_size=1, max_size=3)), max_leaves=4)  # fmt: skip
    return nested


@given(dims())
@settings(max_examples=100)
def test_runs_are_the_index_map(dim: Dim) -> None:
    for rank in range(MESH.size):
        extent = extent_of(dim, MESH, rank)
        assert extent.index_map().tolist() == index_map(dim, MESH, rank).tolist()
        runs = runs_of(dim, MESH, rank).tolist()
        assert all(length > 0 for _, _, length in runs)
        ends = [(local + length, whole + length) for local, whole, length in runs]
        assert not set(ends) & {(local, whole) for local, whole, _ in runs}, "two runs that are one"


# -- padding ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["FLOAT", "BFLOAT16", "INT8", "INT4", "INT2"])
@pytest.mark.parametrize("name", ["padded rows", "ranks of padding only", "padded columns", "prefix", "packed heads"])
def test_every_bit_of_padding_is_looked_at(
    name: str, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Originals have no zero byte (or smaller element), so that zeros are padding: set, they must be found."""
    _, artifact = stored(tmp_path / "a", dtype, LAYOUTS[name])
    monkeypatch.setattr(Folder, "changed", lambda *_: False)  # or the tensor's digest would be the first to say so
    path, bits = artifact.folder / WEIGHTS, min(8, DTYPES[dtype].bits)
    data = path.read_bytes()
    found = []
    for position, shift in itertools.product(range(artifact.offsets["w"], len(data)), range(0, 8, bits)):
        is_padding = not data[position] >> shift & (2**bits - 1)
        changed = bytearray(data)
        changed[position] ^= 1 << (shift + bits - 1)
        path.write_bytes(changed)
        assert padding_is_zero(artifact, "w") is not is_padding, (position, shift)
        found.append(is_padding)
    assert True in found
    assert False in found


def test_unused_bits_of_a_last_byte_are_padding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, artifact = stored(tmp_path / "a", "INT4", (Leaf(3),))
    monkeypatch.setattr(Folder, "changed", lambda *_: False)
    path = artifact.folder / WEIGHTS
    data = bytearray(path.read_bytes())
    data[-1] |= 0x10
    path.write_bytes(data)
    assert not padding_is_zero(artifact, "w")


# -- what does not make up an original -------------------------------------------------------------------------------


def test_names_that_are_not_stored(tmp_path: Path) -> None:
    _, artifact = stored(tmp_path / "a", "FLOAT", (Leaf(3),))
    with pytest.raises(ArtifactError, match=r"found the initializer 'x', unknown to manifest\.json; expected one"):
        read_original(artifact, "x")


def test_parts_that_do_not_follow_each_other(tmp_path: Path) -> None:
    names = ("a", "b")
    parts = {name: Shards("w", (Leaf(2),), Part(dim=0, start=2 * i, stop=2 * i + 2)) for i, name in enumerate(names)}
    artifact = write(tmp_path / "a", MESH, [Original.random("w", "FLOAT", (4,), names)], parts)
    assert read_whole(artifact, ["a"]).size == 8
    expected = "'b' is the part of dimension 0 that starts at 2, expected the part of dimension 0 that starts at 0"
    with pytest.raises(ArtifactError, match=re.escape(expected)):
        read_whole(artifact, ["b", "a"])


def test_whole_tensors_are_not_parts(tmp_path: Path) -> None:
    originals = [Original.random(name, "FLOAT", (4,)) for name in ("a", "b")]
    artifact = write(tmp_path / "a", MESH, originals, {name: Shards(name, (Leaf(4),)) for name in ("a", "b")})
    with pytest.raises(ArtifactError, match="'a' is a whole tensor, expected the part"):
        read_whole(artifact, ["a", "b"])


def test_parts_of_different_originals(tmp_path: Path) -> None:
    names = {"v": ("a", "b"), "w": ("c", "d")}
    originals = [Original.random(name, dtype, (4,), names[name]) for name, dtype in (("v", "FLOAT"), ("w", "INT32"))]
    shards = {
        part: Shards(name, (Leaf(2),), Part(dim=0, start=start, stop=start + 2))
        for name, parts in names.items()
        for part, start in zip(parts, (0, 2), strict=True)
    }
    artifact = write(tmp_path / "a", MESH, originals, shards)
    with pytest.raises(ArtifactError, match=r"'d' is INT32 \[2\], expected FLOAT \[2\] like 'a'"):
        read_whole(artifact, ["a", "d"])


def test_a_tensor_that_the_builder_made(tmp_path: Path) -> None:
    _, artifact = stored(tmp_path / "a", "FLOAT", (Leaf(3),))
    made = dataclasses.replace(artifact.tensors["w"], layout=None, origin=None)
    altered = dataclasses.replace(artifact, tensors={"w": made})
    assert padding_is_zero(altered, "w")
    with pytest.raises(ArtifactError, match="stored tensor 'w' has no layout, expected one that was cut"):
        read_whole(altered, ["w"])


def test_an_entry_that_its_tensors_do_not_make_up(tmp_path: Path) -> None:
    _, artifact = stored(tmp_path / "a", "FLOAT", (Leaf(3),))
    for changes in ({"shape": (4,)}, {"dtype": "INT32"}):
        entry = dataclasses.replace(artifact.manifest.initializers[0], **changes)
        altered = dataclasses.replace(artifact, manifest=dataclasses.replace(artifact.manifest, initializers=(entry,)))
        with pytest.raises(ArtifactError, match=r"initializer 'w' is stored as FLOAT \[3\], expected"):
            read_original(altered, "w")


@pytest.mark.slow
def test_memory_is_that_of_the_original(tmp_path: Path) -> None:
    """40 MB in columns over 4 ranks: the original, and pieces of the shards."""
    original = Original("w", "FLOAT", np.ones((2500, 4000, 4), dtype=np.uint8), ("w",))
    artifact = write(tmp_path / "a", MESH, [original], {"w": Shards("w", (Leaf(2500), Leaf(4000, (0, 1))))})
    tracemalloc.start()
    whole = read_original(artifact, "w")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert whole.tobytes() == original.packed
    assert whole.nbytes == 40_000_000 < peak < 60_000_000
