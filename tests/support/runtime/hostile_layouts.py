"""Hostile layouts and parts: indices that are stored twice or never, and sizes that nothing could hold."""

from __future__ import annotations

from collections.abc import Callable

from tests.support.runtime.hostile import SOURCE, Copy, Edit, Hostile, Json, manifest_kind, put

_ROWS = {"size": 24, "axes": [0, 1]}
_SIZES = r"a layout's size is an integer from 0 to 2\*\*48; found"


def _relaid(name: str, layout: Json, local_shape: list[int], axes: list[int]) -> Edit:
    """Tensor A of `mlp`, float32 [8, 24], laid out otherwise, with all that must agree with that in the manifest."""
    return Edit(name, lambda root: root["tensors"][0].update(layout=layout, local_shape=local_shape, shard_axes=axes))


def _nested(depth: int) -> Json:
    value: Json = 24
    for _ in range(depth):
        value = {"cat": [value]}
    return value


_LAYOUTS: list[tuple[Edit, str]] = [
    (
        _relaid("an axis in two dimensions", [{"size": 8, "axes": [0]}, _ROWS], [4, 6], [0, 1]),
        r"\$\.tensors\[0\]\.layout: found mesh axis 0 in dimensions 0 and 1, expected each mesh axis in one dimension",
    ),
    (
        _relaid(
            "an axis twice in a product",
            [8, {"prod": [{"size": 4, "axes": [0]}, {"size": 6, "axes": [0]}]}],
            [8, 6],
            [0],
        ),
        r"tensors\[0\]\.layout\[1\]: found one in which two parts of a product are split over mesh axis 0: .* nowhere",
    ),
    (
        _relaid(
            "segments over other axes",
            [8, {"cat": [{"size": 16, "axes": [0, 1]}, {"size": 8, "axes": [0]}]}],
            [8, 8],
            [0, 1],
        ),
        r"layout\[1\]: found one in which parts of a concatenation are split over mesh axes \[0, 1\] and \[0\]:",
    ),
    (
        _relaid("a segment that is whole", [8, {"cat": [{"size": 16, "axes": [0, 1]}, 8]}], [8, 12], [0, 1]),
        r"layout\[1\]: found one in which parts of a concatenation are split over mesh axes \[0, 1\] and \[\]:",
    ),
    (
        _relaid(
            "a fault within a prefix",
            [8, {"prefix": 24, "of": {"prod": [{"size": 5, "axes": [0]}, {"size": 5, "axes": [0]}]}}],
            [8, 9],
            [0],
        ),
        r"layout\[1\]: found one in which two parts of a product are split over mesh axis 0",
    ),
    (
        _relaid("shards counted otherwise", [8, _ROWS], [8, 6], [1, 0]),
        r"shard_axes: found \[1, 0\], expected \[0, 1\], the axes",
    ),
    (
        _relaid("shards stored twice", [8, {"size": 24, "axes": [0]}], [8, 12], [0, 1]),
        r"shard_axes: found \[0, 1\], expected \[0\]",
    ),
    (
        _relaid("shards that are not stored", [8, _ROWS], [8, 6], [0]),
        r"shard_axes: found \[0\], expected \[0, 1\], the axes",
    ),
    (
        _relaid("more columns", [8, {"size": 28, "axes": [0, 1]}], [8, 7], [0, 1]),
        r"layout: found FLOAT \[8, 28\], expected one of FLOAT \[8, 24\]",
    ),
    (_relaid("fewer dimensions", [_ROWS], [6], [0, 1]), r"layout: found FLOAT \[24\], expected one of FLOAT \[8, 24\]"),
    (
        _relaid("another local shape", [8, _ROWS], [8, 7], [0, 1]),
        r"local_shape: found \[8, 7\], expected \[8, 6\], the local shape of",
    ),
    (_relaid("a giant size", [8, 2**48], [8, 2**48], []), rf"tensors\[0\]\.layout\[1\]: {_SIZES} 281474976710656"),
    (_relaid("a negative size", [8, -1], [8, 6], []), rf"layout\[1\]: {_SIZES} -1"),
    (_relaid("a size of 1.5", [8, {"size": 1.5, "axes": [0]}], [8, 6], [0]), rf"layout\[1\]: {_SIZES} 1\.5"),
    (_relaid("a size that is true", [8, {"size": True, "axes": [0]}], [8, 6], [0]), rf"layout\[1\]: {_SIZES} True"),
    (
        _relaid("a giant product", [8, {"prod": [2**30, 2**30]}], [8, 6], []),
        r"layout\[1\]: a layout has fewer than 2\*\*48 indices; found",
    ),
    (
        _relaid("a giant sum", [8, {"cat": [2**47, 2**47]}], [8, 6], []),
        r"layout\[1\]: a layout has fewer than 2\*\*48 indices; found",
    ),
    (
        _relaid("a deep layout", [8, _nested(100)], [8, 24], []),
        r"layout\[1\]: a layout is nested deeper than 64 levels",
    ),
    (
        _relaid("a wide layout", [8, {"cat": [1] * 5000}], [8, 5000], []),
        r"layout\[1\]: a layout has at most 1024 parts; found one with more",
    ),
    (
        _relaid("an axis that is none", [8, {"size": 24, "axes": [2]}], [8, 6], [0]),
        r"axes are distinct mesh axes below 2; found \[2\]",
    ),
    (
        _relaid("an axis twice in a leaf", [8, {"size": 24, "axes": [0, 0]}], [8, 6], [0]),
        r"axes are distinct mesh axes below 2; found \[0, 0\]",
    ),
    (
        _relaid("a layout of another kind", [8, {"sum": [24]}], [8, 6], [0]),
        r"layout\[1\]: a layout is an integer, .*; found \{'sum': \[24\]\}",
    ),
    (
        _relaid("a product of nothing", [8, {"prod": []}], [8, 6], [0]),
        r"layout\[1\]: a layout is an integer, .*; found \{'prod': \[\]\}",
    ),
    (
        _relaid("a tensor of 2**95 bytes", [2**47, 2**46], [2**47, 2**46], []),
        r"local_shape: found .*, expected a shape of fewer than 2\*\*62",
    ),
    (
        _relaid("no elements, but a giant dimension", [0, 2**47], [0, 2**47], []),
        r"layout: found \[0, 140737488355328\], expected at most 1048576",
    ),
    (
        put([8] * 65, "tensors", 0, "layout"),
        r"tensors\[0\]\.layout: found 65 of them, expected a list of at most 64 items",
    ),
    (put("INT32", "tensors", 0, "dtype"), r"layout: found INT32 \[8, 24\], expected one of FLOAT \[8, 24\]"),
    (
        put({"dim": 2, "start": 0, "stop": 24}, "tensors", 0, "part"),
        r"stored: found .*, expected parts that make up \[0, 0\) of dimension 2",
    ),
]

_STATE = {"prod": [{"size": 2, "axes": [0]}, {"size": 4, "axes": [0]}]}
_QKV, _GATE, _UP = 2, 6, 7
"""Where the packed matrix of layer 0 stands among the initializers of `parts`, and its two parts among the tensors."""


def _of_part(index: int, **changed: Json) -> Callable[[Json], None]:
    return lambda root: root["tensors"][index].update(changed)


def _second_half_twice(root: Json) -> None:
    """Both parts become another layout, and both are the first half."""
    root["initializers"][_QKV].update(stored=[], sha256=None)
    root["tensors"][3]["part"] = {"dim": 1, "start": 0, "stop": 64}


def _taken_out_of_stored(root: Json) -> None:
    """A whole layout that no `stored` names is complete, but then source.onnx must have the data."""
    root["initializers"][_QKV].update(stored=[], sha256=None)


def _alias(**changed: Json) -> Callable[[Json], None]:
    return lambda root: root["initializers"].append({**root["initializers"][_QKV], "name": "alias", **changed})


def _other_rows(root: Json) -> None:
    tensor = root["tensors"][3]
    tensor.update(local_shape=[32, 32], shard_axes=[2, 0])
    tensor["layout"][0] = {"size": 64, "axes": [2]}


_PARTS: list[tuple[str, Callable[[Json], object], str]] = [
    (
        "overlap",
        _of_part(3, part={"dim": 1, "start": 32, "stop": 96}),
        r"initializers\[2\]\.stored: found the parts \[\(0, 64\), \(32, 96\)\], expected",
    ),
    (
        "leave a gap",
        _of_part(3, part={"dim": 1, "start": 80, "stop": 128}),
        r"found the parts \[\(0, 64\), \(80, 128\)\], expected parts that make up \[0, 128\)",
    ),
    (
        "run beyond the end",
        _of_part(3, part={"dim": 1, "start": 64, "stop": 129}),
        r"found the parts \[\(0, 64\), \(64, 129\)\], expected",
    ),
    (
        "of another width",
        _of_part(2, part={"dim": 1, "start": 0, "stop": 63}),
        r"found the parts \[\(0, 63\), \(64, 128\)\], expected",
    ),
    (
        "in another order",
        lambda r: r["initializers"][_QKV]["stored"].reverse(),
        r"found the parts \[\(64, 128\), \(0, 64\)\], expected",
    ),
    (
        "in part",
        lambda r: r["initializers"][_QKV]["stored"].pop(),
        r"found the parts \[\(0, 64\)\], expected parts that make up \[0, 128\)",
    ),
    (
        "of two dimensions",
        _of_part(3, part={"dim": 0, "start": 0, "stop": 64}),
        "found several whole tensors or parts of several dimensions",
    ),
    ("one of them whole", _of_part(3, part=None), "found several whole tensors or parts of several dimensions"),
    (
        "laid out otherwise beside",
        _other_rows,
        "found parts with other layouts, expected parts that are laid out alike but for dimension 1",
    ),
    (
        "of a dimension that is none",
        _of_part(3, part={"dim": 9, "start": 64, "stop": 128}),
        "found several whole tensors or parts of several",
    ),
    (
        "of another original",
        _of_part(3, origin="cos_cache"),
        r"stored\[1\]: found '.*part1', whose origin is 'cos_cache', expected",
    ),
    (
        "without an origin",
        _of_part(3, origin=None),
        r"tensors\[3\]\.part: found an object, expected null, because the tensor has no",
    ),
    (
        "of a second layout, one twice",
        _second_half_twice,
        r"part: found \[0, 64\) of dimension 1, expected parts of '.*' that make up all of it",
    ),
    (
        "without a stored",
        _taken_out_of_stored,
        r"source\.onnx: initializer '.*qkv.*' has external data, expected inline data",
    ),
    (
        "and an alias of another shape",
        _alias(shape=[128, 64]),
        r"initializers\[19\]: found others, expected the dtype, shape and digest of its alias",
    ),
    (
        "and an alias of another digest",
        _alias(sha256="0" * 64),
        r"initializers\[19\]: found others, expected the dtype, shape and digest of its alias",
    ),
    (
        "and an alias of half",
        _alias(stored=["model.layers.0.attn.qkv_proj.MatMul.weight/part0"]),
        r"stored\[0\]: found '.*part0', whose origin is",
    ),
    ("and an alias that the source has not", _alias(), r"source\.onnx: found no initializer 'alias', expected one"),
]


def _origins_swapped(root: Json) -> None:
    first, second = root["tensors"][_GATE], root["tensors"][_UP]
    first["origin"], second["origin"] = second["origin"], first["origin"]


def _originals_swapped(copy: Copy, names: tuple[str, str]) -> None:
    """Two originals of one shape change places, in the manifest and in source.onnx."""
    swapped = dict(zip(names, reversed(names), strict=True))

    def manifest(root: Json) -> None:
        for tensor in root["tensors"]:
            tensor["origin"] = swapped.get(tensor["origin"], tensor["origin"])
        for original in root["initializers"]:
            original["stored"] = [swapped.get(name, name) for name in original["stored"]]

    def source(model: Json) -> None:
        for tensor in model.graph.initializer:
            for entry in tensor.external_data:
                entry.value = swapped.get(entry.value, entry.value)

    copy.edit(manifest)
    copy.model(SOURCE, source)


_CODES = 17
"""A stored INT4 matrix of `int4`, 176 columns in blocks of 32."""


def _prefix(size: int) -> Edit:
    return put({"prefix": size, "of": {"prod": [{"size": 6, "axes": [0, 1]}, 32]}}, "tensors", _CODES, "layout", 1)


KINDS: list[Hostile] = [
    *(manifest_kind("mlp", edit, message) for edit, message in _LAYOUTS),
    *(manifest_kind("parts", Edit(f"parts {name}", change), message) for name, change, message in _PARTS),
    manifest_kind(
        "int4",
        _prefix(90),
        r"layout\[1\]: a layout's prefix is more than half of its dimension, but not all; found 90 of 192",
    ),
    manifest_kind("int4", _prefix(192), r"layout\[1\]: a layout's prefix is more than half .*; found 192 of 192"),
    manifest_kind(
        "int4", _prefix(180), r"layout: found INT4 \[64, 180\], expected one of INT4 \[64, 176\], as its origin is"
    ),
    manifest_kind(
        "int4", put("UINT4", "tensors", _CODES, "dtype"), r"layout: found UINT4 \[64, 176\], expected one of INT4"
    ),
    manifest_kind(
        "int4", put([64, 32], "tensors", _CODES, "local_shape"), r"local_shape: found \[64, 32\], expected \[64, 64\]"
    ),
    manifest_kind(
        "padded",
        put(4, "tensors", 2, "layout", 1, "prod", 0, "size"),
        r"layout: found FLOAT \[144, 192\], expected one of",
    ),
    manifest_kind(
        "padded",
        put([1, 0], "tensors", 2, "layout", 1, "prod", 0, "axes"),
        r"shard_axes: found \[0, 1\], expected \[1, 0\]",
    ),
    manifest_kind(
        "padded",
        put([0], "tensors", 2, "layout", 1, "prod", 1),
        r"layout\[1\]: a layout is an integer, .*; found \[0\]",
    ),
    manifest_kind(
        "padded",
        Edit("origins swapped", _origins_swapped),
        r"stored\[0\]: found 'onnx::MatMul_763', whose origin is 'onnx::MatMul_764'",
    ),
    manifest_kind(
        "llama",
        put(_STATE, "inputs", 2, "layout", 1),
        r"\$\.inputs\[2\]\.layout\[1\]: found one in which two parts of a product",
    ),
    manifest_kind(
        "llama",
        put(_STATE, "outputs", 1, "layout", 1),
        r"\$\.outputs\[1\]\.layout\[1\]: found one in which two parts of a product",
    ),
    Hostile(
        name="originals that are stored as they were swapped",
        base="int4",
        apply=lambda copy: _originals_swapped(copy, ("cos_cache", "sin_cache")),
        message=r"initializers\[2\]\.sha256: found .*, expected .*, as the tensor 'sin_cache' is stored as it was",
    ),
]
