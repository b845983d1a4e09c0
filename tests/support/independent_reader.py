"""A second reader of artifacts, written from docs/artifact-format.md alone: it shares no line with the first."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

BITS = {"DOUBLE": 64, "INT64": 64, "UINT64": 64, "FLOAT": 32, "INT32": 32, "UINT32": 32, "FLOAT16": 16}
BITS |= {"BFLOAT16": 16, "INT16": 16, "UINT16": 16, "FLOAT8E4M3FN": 8, "FLOAT8E5M2": 8, "BOOL": 8, "INT8": 8}
BITS |= {"UINT8": 8, "INT4": 4, "UINT4": 4, "FLOAT4E2M1": 4, "INT2": 2, "UINT2": 2}

Elements = npt.NDArray[np.uint8]
"""The bytes of each element, `[*shape, bytes]`; one byte for the bits of a smaller one."""


class IndependentReader:
    """An artifact, read whole: `manifest` is the JSON, `tensors` its stored tensors by name."""

    def __init__(self, folder: Path) -> None:
        data = (folder / "manifest.json").read_bytes()
        self.manifest: dict[str, Any] = json.loads(data)
        expect(self.manifest["format"] == {"name": "furiosa-llm-onnx", "version": 2}, "another format or version")
        prefix = b'{\n "digest": "'
        zeroed = prefix + b"0" * 64 + data[len(prefix) + 64 :]
        expect(data.startswith(prefix + self.manifest["digest"].encode()), "the digest does not come first")
        expect(hashlib.sha256(zeroed).hexdigest() == self.manifest["digest"], "manifest.json was altered")
        self.files: dict[str, bytes] = {
            entry["path"]: (folder / entry["path"]).read_bytes() for entry in self.manifest["files"]
        }
        for entry in self.manifest["files"]:
            content = self.files[entry["path"]]
            found = (len(content), hashlib.sha256(content).hexdigest())
            expect(found == (entry["nbytes"], entry["sha256"]), f"{entry['path']} was altered")
        self.tensors = {tensor["name"]: tensor for tensor in self.manifest["tensors"]}
        self.shape: list[int] = self.manifest["mesh"]["shape"]
        self.offsets = {name: self._offset(tensor) for name, tensor in self.tensors.items()}
        for name, tensor in self.tensors.items():
            start = self.offsets[name]
            stored = self.files[tensor["file"]][start : start + self._parts(tensor["shard_axes"]) * window(tensor)]
            expect(hashlib.sha256(stored).hexdigest() == tensor["sha256"], f"{name} was altered")
        self.program = onnx.ModelProto.FromString(self.files["program.onnx"])
        for initializer in self.program.graph.initializer:
            if initializer.data_location == onnx.TensorProto.EXTERNAL:
                place = {item.key: item.value for item in initializer.external_data}
                tensor, start = self.tensors[initializer.name], self.offsets[initializer.name]
                wanted = {"location": tensor["file"], "offset": str(start), "length": str(window(tensor))}
                expect(place == wanted, f"{initializer.name} lies elsewhere")

    def _offset(self, tensor: dict[str, Any]) -> int:
        """Where shard 0 begins in its file, by the file's header."""
        content = self.files[tensor["file"]]
        length = int.from_bytes(content[:8], "little")
        begin, end = json.loads(content[8 : 8 + length])[tensor["name"]]["data_offsets"]
        expect(end - begin == self._parts(tensor["shard_axes"]) * window(tensor), f"{tensor['name']} has another size")
        return int(8 + length + begin)

    def _parts(self, axes: list[int]) -> int:
        return math.prod(self.shape[axis] for axis in axes)

    def ranks(self) -> range:
        return range(math.prod(self.shape))

    def position(self, rank: int, axes: list[int]) -> int:
        coordinates = np.unravel_index(rank, self.shape)
        return int(sum(coordinates[axis] * self._parts(axes[i + 1 :]) for i, axis in enumerate(axes)))

    def window(self, name: str, rank: int) -> bytes:
        """The bytes that a rank sees of a stored tensor."""
        tensor = self.tensors[name]
        nbytes = window(tensor)
        start = self.offsets[name] + self.position(rank, tensor["shard_axes"]) * nbytes
        return self.files[tensor["file"]][start : start + nbytes]

    def whole(self, layout: Any) -> int:
        """The global size of a layout."""
        if isinstance(layout, int):
            return layout
        if "prod" in layout:
            return math.prod(map(self.whole, layout["prod"]))
        return sum(map(self.whole, layout["cat"])) if "cat" in layout else int(layout.get("size", layout.get("prefix")))

    def indices(self, layout: Any, rank: int) -> list[int]:
        """The global index behind each local one, -1 for padding."""
        if isinstance(layout, int):
            return list(range(layout))
        if "size" in layout:
            count = -(-layout["size"] // self._parts(layout["axes"]))
            start = self.position(rank, layout["axes"]) * count
            return [index if index < layout["size"] else -1 for index in range(start, start + count)]
        if "prefix" in layout:
            return [index if index < layout["prefix"] else -1 for index in self.indices(layout["of"], rank)]
        if "cat" in layout:
            sizes = [self.whole(part) for part in layout["cat"]]
            starts = [sum(sizes[:number]) for number in range(len(sizes))]
            parts = [self.indices(part, rank) for part in layout["cat"]]
            return [i if i < 0 else i + s for part, s in zip(parts, starts, strict=True) for i in part]
        found = [0]
        for part in layout["prod"]:
            inner, size = self.indices(part, rank), self.whole(part)
            found = [-1 if one < 0 or other < 0 else one * size + other for one in found for other in inner]
        return found

    def whole_tensor(self, names: list[str], shape: list[int]) -> bytes:
        """The packed bytes of the tensor of `shape` that stored tensors make up; each element is in one place."""
        bits = BITS[self.tensors[names[0]]["dtype"]]
        elements = np.zeros((*shape, max(1, bits // 8)), dtype=np.uint8)
        count = np.zeros(shape, dtype=np.int64)
        for tensor in (self.tensors[name] for name in names):
            shards = {self.position(rank, tensor["shard_axes"]): rank for rank in self.ranks()}
            for rank in shards.values():
                local = unpacked(self.window(tensor["name"], rank), bits, tensor["local_shape"])
                maps = [np.array(self.indices(layout, rank), dtype=np.int64) for layout in tensor["layout"]]
                valid = [indices >= 0 for indices in maps]
                if tensor["part"] is not None:
                    maps[tensor["part"]["dim"]] += tensor["part"]["start"]
                place = np.ix_(*(indices[keep] for indices, keep in zip(maps, valid, strict=True)))
                elements[place] = local[np.ix_(*valid)]
                count[place] += 1
                local[np.ix_(*valid)] = 0
                expect(not local.any(), f"{tensor['name']} has padding that is not zero")
        expect(bool((count == 1).all()), f"{names} are not one tensor")
        return packed(elements, bits)

    def original(self, name: str) -> bytes:
        """The packed bytes of a stored original initializer, compared with its digest."""
        entry = next(entry for entry in self.manifest["initializers"] if entry["name"] == name)
        data = self.whole_tensor(entry["stored"], entry["shape"])
        expect(hashlib.sha256(data).hexdigest() == entry["sha256"], f"{name} is not the original")
        return data


def expect(condition: bool, otherwise: str) -> None:
    if not condition:
        raise ValueError(otherwise)


def window(tensor: dict[str, Any]) -> int:
    """The bytes of one shard."""
    shape: list[int] = tensor["local_shape"]
    return -(-math.prod(shape) * BITS[tensor["dtype"]] // 8)


def unpacked(data: bytes, bits: int, shape: list[int]) -> Elements:
    if bits >= 8:
        return np.frombuffer(data, dtype=np.uint8).reshape(*shape, bits // 8).copy()
    each = [byte >> shift & (2**bits - 1) for byte in data for shift in range(0, 8, bits)]
    return np.array(each[: math.prod(shape)], dtype=np.uint8).reshape(*shape, 1)


def packed(elements: Elements, bits: int) -> bytes:
    if bits >= 8:
        return elements.tobytes()
    flat = [*elements.reshape(-1).tolist(), *[0] * (8 // bits - 1)]
    groups = [flat[i : i + 8 // bits] for i in range(0, len(flat) - 8 // bits + 1, 8 // bits)]
    return bytes(sum(code << bits * i for i, code in enumerate(group)) for group in groups)
