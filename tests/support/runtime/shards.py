"""Writes an artifact of stored tensors of any type and layout, cut index by index, so that no fast path is trusted."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import TensorProto, helper

from furiosa_llm.runtime.artifact.dtypes import DTYPES
from furiosa_llm.runtime.artifact.layout import Dim, Leaf, Mesh, axes_of, global_size, index_map, local_size
from furiosa_llm.runtime.artifact.manifest import (
    FileEntry,
    InputInfo,
    Manifest,
    ModelInfo,
    OriginalInitializer,
    OutputInfo,
    Part,
    Provenance,
    StoredTensor,
)
from furiosa_llm.runtime.artifact.reader import Artifact, open_artifact

WEIGHTS = "weights-00001.safetensors"
Codes = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Original:
    """An original initializer: the bytes of each element, `[*shape, bytes]`; one byte for the bits of a smaller one."""

    name: str
    dtype: str
    codes: Codes
    stored: tuple[str, ...]

    @staticmethod
    def random(name: str, dtype: str, shape: Sequence[int], stored: Sequence[str] = (), seed: int = 0) -> Original:
        """Elements of any bits, none of them all zeros, which is what padding is."""
        bits = DTYPES[dtype].bits
        codes = np.random.default_rng(seed).integers(1, 2 ** min(bits, 8), (*shape, max(1, bits // 8)))
        return Original(name, dtype, codes.astype(np.uint8), tuple(stored) or (name,))

    @property
    def packed(self) -> bytes:
        return packed(self.codes, DTYPES[self.dtype].bits)


@dataclass(frozen=True)
class Shards:
    """A stored tensor of an original: the layout of all of it or, along `part`, of a part."""

    origin: str
    layout: tuple[Dim, ...]
    part: Part | None = None


def packed(codes: Codes, bits: int) -> bytes:
    """Elements below a byte, one after the other, from the lowest bits of each byte on: with Python's integers."""
    if bits >= 8:
        return codes.tobytes()
    flat = codes.reshape(-1).tolist()
    number = sum(code << (bits * position) for position, code in enumerate(flat))
    return number.to_bytes(-(-len(flat) * bits // 8), "little")


def cut(original: Original, stored: Shards, mesh: Mesh, rank: int) -> bytes:
    """What a rank sees: every element looked up by `index_map`."""
    codes = original.codes
    if stored.part is not None:
        codes = np.take(codes, np.arange(stored.part.start, stored.part.stop), axis=stored.part.dim)
    for dim, layout in enumerate(stored.layout):
        indices = index_map(layout, mesh, rank)
        padded = np.concatenate([codes, np.zeros_like(np.take(codes, [], axis=dim).sum(axis=dim, keepdims=True))], dim)
        codes = np.take(padded, indices, axis=dim).astype(np.uint8)
    return packed(codes, DTYPES[original.dtype].bits)


def write(
    folder: Path,
    mesh: Mesh,
    originals: Sequence[Original],
    shards: Mapping[str, Shards],
    source: bytes | None = None,
) -> Artifact:
    """An artifact with these stored tensors, opened with every digest compared; source.onnx has nothing but these."""
    folder.mkdir()
    by_name = {original.name: original for original in originals}
    header: dict[str, Any] = {}
    body = b""
    tensors = []
    for name, stored in shards.items():
        original = by_name[stored.origin]
        tensor, data = _stored(name, stored, original, mesh)
        local, bits = tensor.local_shape, DTYPES[original.dtype].bits
        count = mesh.parts(tensor.shard_axes)
        shape = [count, *local] if bits >= 8 else [count, len(data) // count]
        place = [len(body), len(body) + len(data)]
        header[name] = {"dtype": DTYPES[original.dtype].safetensors, "shape": shape, "data_offsets": place}
        body += data
        tensors.append(tensor)
    text = json.dumps(header).encode()
    start = 8 + len(text)
    (folder / WEIGHTS).write_bytes(len(text).to_bytes(8, "little") + text + body)
    (folder / "program.onnx").write_bytes(_program(tensors, header, start))
    (folder / "source.onnx").write_bytes(source_of(originals) if source is None else source)
    (folder / "manifest.json").write_bytes(_manifest(folder, mesh, originals, tensors).to_bytes())
    return open_artifact(folder, full=True)


def _stored(name: str, stored: Shards, original: Original, mesh: Mesh) -> tuple[StoredTensor, bytes]:
    axes = tuple(dict.fromkeys(axis for dim in stored.layout for axis in axes_of(dim)))
    by_shard = {mesh.position(rank, axes): cut(original, stored, mesh, rank) for rank in range(mesh.size)}
    data = b"".join(by_shard[shard] for shard in sorted(by_shard))
    tensor = StoredTensor(
        name=name,
        file=WEIGHTS,
        dtype=original.dtype,
        local_shape=tuple(local_size(dim, mesh) for dim in stored.layout),
        shard_axes=axes,
        layout=stored.layout,
        part=stored.part,
        origin=stored.origin,
        sha256=hashlib.sha256(data).hexdigest(),
    )
    return tensor, data


def source_of(originals: Sequence[Original]) -> bytes:
    """The source.onnx of a model of one Identity, all of whose initializers are stored."""
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "g", values[:1], values[1:])
    for original in originals:
        proto = graph.initializer.add(name=original.name, dims=original.codes.shape[:-1])
        proto.data_type = TensorProto.DataType.Value(original.dtype)
        proto.data_location = TensorProto.EXTERNAL
        proto.external_data.add(key="location", value="artifact")
    model = helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 21)])
    return bytes(model.SerializeToString())


def _program(tensors: Sequence[StoredTensor], header: Mapping[str, Any], start: int) -> bytes:
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "g", values[:1], values[1:])
    for tensor in tensors:
        proto = graph.initializer.add(name=tensor.name, dims=tensor.local_shape)
        proto.data_type = TensorProto.DataType.Value(tensor.dtype)
        proto.data_location = TensorProto.EXTERNAL
        place = {
            "location": WEIGHTS,
            "offset": start + header[tensor.name]["data_offsets"][0],
            "length": DTYPES[tensor.dtype].nbytes(tensor.local_shape),
        }
        for key, value in place.items():
            proto.external_data.add(key=key, value=str(value))
    model = helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 21)])
    return bytes(model.SerializeToString())


def _manifest(folder: Path, mesh: Mesh, originals: Sequence[Original], tensors: Sequence[StoredTensor]) -> Manifest:
    return Manifest(
        provenance=Provenance(tool="test 0", libraries={}, options={}, source_sha256="0" * 64),
        model=ModelInfo(name="test", task="other", max_sequence_length=None, vocab_size=None, eos_token_ids=()),
        mesh=mesh,
        files=tuple(_file(path) for path in sorted(folder.iterdir())),
        tensors=tuple(tensors),
        initializers=tuple(
            OriginalInitializer(
                name=original.name,
                dtype=original.dtype,
                shape=original.codes.shape[:-1],
                stored=original.stored,
                sha256=hashlib.sha256(original.packed).hexdigest(),
            )
            for original in originals
        ),
        inputs=(InputInfo(name="x", dtype="FLOAT", shape=(1,), layout=(Leaf(1),), role="other"),),
        outputs=(OutputInfo(name="y", dtype="FLOAT", shape=(1,), layout=(Leaf(1),), role="other"),),
        states=(),
        collectives=(),
        blocks=(),
        plan={},
    )


def _file(path: Path) -> FileEntry:
    data = path.read_bytes()
    return FileEntry(path=path.name, nbytes=len(data), sha256=hashlib.sha256(data).hexdigest())


def shape_of(layout: Sequence[Dim]) -> tuple[int, ...]:
    """The global shape of a layout."""
    return tuple(global_size(dim) for dim in layout)
