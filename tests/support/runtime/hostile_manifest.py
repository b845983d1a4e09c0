"""Hostile manifests: one field at a time, with the digest that each then has, and text that is none."""

from __future__ import annotations

import json

from furiosa_llm.runtime.artifact.manifest import MAX_MANIFEST_NBYTES
from tests.support.runtime.hostile import MANIFEST, Copy, Edit, Hostile, Json, copy_first, drop, manifest_kind, put


def _nested(levels: int) -> Json:
    """A list in a list, so deep."""
    value: Json = []
    for _ in range(levels):
        value = [value]
    return value


_FIELDS: list[tuple[Edit, str]] = [
    (put("other", "format", "name"), r"format 'other' version 2; this release reads 'furiosa-llm-onnx' version 2"),
    (put(3, "format", "version"), r"version 3; this release reads .* version 2; rebuild .* or install the release"),
    (put(1.0, "format", "version"), r"\$\.format\.version: found 1\.0, expected an integer of at least 0"),
    (drop("format"), r"expected an object with the key 'format'"),
    (drop("mesh"), r"manifest.json \$: found an object without it, expected the key 'mesh'"),
    (put(1, "surprise"), r"manifest.json \$: found the unknown key 'surprise', expected only the keys"),
    (put(1, "model", "surprise"), r"\$\.model: found the unknown key 'surprise'"),
    (put([], "model"), r"\$\.model: found a list, expected an object with the keys name"),
    (put(3, "model", "name"), r"\$\.model\.name: found 3, expected a string"),
    (put("robot", "model", "task"), r"\$\.model\.task: found \"robot\", expected one of decoder, encoder, other"),
    (put(0, "model", "max_sequence_length"), r"max_sequence_length: found 0, expected an integer of at least 1"),
    (put([True], "model", "eos_token_ids"), r"eos_token_ids\[0\]: found true, expected an integer of at least 0"),
    (put([-1], "model", "eos_token_ids"), r"eos_token_ids\[0\]: found -1"),
    (
        put(list(range(2000)), "model", "eos_token_ids"),
        r"eos_token_ids: found 2000 of them, expected a list of at most",
    ),
    (put(_nested(600), "plan", "refused"), r"\$\.plan: found one that is nested deeper, expected .* at most 32 levels"),
    (put(_nested(600), "provenance", "options", "dims"), r"provenance\.options: found one that is nested deeper"),
    (put([], "mesh", "shape"), r"\$\.mesh\.shape: found \[\], expected a list of at least one length"),
    (put([10**5], "mesh", "shape"), r"\$\.mesh\.shape: found .* whose product is at most 4096"),
    (put("x", "provenance", "source_sha256"), r"source_sha256: found \"x\", expected 64 lower-case hexadecimal"),
    (put({"onnx": 1}, "provenance", "libraries"), r"\$\.provenance\.libraries\.onnx: found 1, expected a string"),
    (put("../x", "files", 0, "path"), r"\$\.files\[0\]\.path: found \"\.\./x\", expected a plain file name"),
    (put("..", "files", 0, "path"), r"files\[0\]\.path: found \"\.\.\""),
    (
        put("manifest.json", "files", 0, "path"),
        r"plain file name other than manifest.json, verification.json, manifest.sig",
    ),
    (put("manifest.sig", "files", 0, "path"), r"plain file name other than manifest.json"),
    (
        put("verification.json", "files", 0, "path"),
        r"plain file name other than manifest.json, verification.json, manifest.sig",
    ),
    (put(-5, "files", 0, "nbytes"), r"\$\.files\[0\]\.nbytes: found -5"),
    (copy_first("files"), r"\$\.files\[3\]: found 'program.onnx' again, expected a path that item 0 of the list"),
    (put("zz.bin", "files", 0, "path"), r"\$\.files: found .*, expected the files sorted by path"),
    (drop("files", 1), r"\$\.files: found 2 files without it, expected source.onnx among the files"),
    (put("STRING", "tensors", 0, "dtype"), r"\$\.tensors\[0\]\.dtype: found \"STRING\", expected one of FLOAT"),
    (put("x.safetensors", "tensors", 0, "file"), r"tensors\[0\]\.file: found .* expected a \.safetensors file of"),
    (put([1], "tensors", 0, "local_shape"), r"tensors\[0\]\.local_shape: found \[1\], expected \[256, 8\]"),
    (put([7], "tensors", 0, "shard_axes"), r"shard_axes: found \[7\], expected distinct mesh axes below 2"),
    (
        put([], "tensors", 4, "shard_axes"),
        r"shard_axes: found \[\], expected \[0, 1\], the axes of its layout in their order",
    ),
    (put(["x"], "tensors", 0, "layout"), r"\$\.tensors\[0\]\.layout\[0\]: a layout is an integer"),
    (put(None, "tensors", 0, "layout"), r"expected a layout for each dimension, because the tensor has an origin"),
    (
        put("nothing", "tensors", 0, "origin"),
        r"stored\[0\]: found 'cos', whose origin is 'nothing', expected tensors of 'cos'",
    ),
    (put("sin", "tensors", 0, "origin"), r"stored\[0\]: found 'cos', whose origin is 'sin', expected tensors of 'cos'"),
    (put({"dim": 0, "start": 3, "stop": 3}, "tensors", 0, "part"), r"part\.stop: found 3, expected more than start, 3"),
    (
        put({"dim": 0, "start": 0, "stop": 999}, "tensors", 0, "part"),
        r"stored: found the parts \[\(0, 999\)\], expected parts that make up \[0, 256\)",
    ),
    (
        put({"dim": 0, "start": 0, "stop": 9}, "tensors", 0, "part"),
        r"stored: found the parts \[\(0, 9\)\], expected parts that make up \[0, 256\) of dimension 0",
    ),
    (put("x" * 64, "tensors", 0, "sha256"), r"tensors\[0\]\.sha256: found .*, expected 64 lower-case hexadecimal"),
    (put(None, "initializers", 0, "sha256"), r"initializers\[0\]\.sha256: found null, expected a digest if"),
    (copy_first("tensors"), r"\$\.tensors\[\d+\]: found 'cos' again, expected a name that item 0"),
    (
        put(["nothing"], "initializers", 0, "stored"),
        r"initializers\[0\]\.stored: found a list, expected names of entries",
    ),
    (
        put(["a b c"], "inputs", 0, "shape"),
        r"\$\.inputs\[0\]\.shape\[0\]: a dynamic dimension is `name`, `name \+ name`",
    ),
    (put(["batch"], "inputs", 0, "shape"), r"\$\.inputs\[0\]\.layout: found 2 of them, expected 1 layouts"),
    (put([4, None], "inputs", 0, "layout"), r"\$\.inputs\[0\]\.layout\[0\]: found 4, expected null for a dynamic"),
    (
        put({"prefix": 15, "of": 16}, "inputs", 2, "layout", 3),
        r"inputs\[2\]\.layout\[3\]: a layout's prefix is of a dimension that is split; found one of 16",
    ),
    (
        put({"prefix": 15, "of": {"size": 16, "axes": [0]}}, "inputs", 2, "layout", 3),
        r"layout\[3\]: found one of 15, expected a layout of 16 indices",
    ),
    (put(99, "inputs", 2, "layout", 3), r"layout\[3\]: found one of 99, expected a layout of 16 indices"),
    (put("other", "inputs", 2, "role"), r"layout\[1\]: .* because only states may be split"),
    (put("logits", "inputs", 0, "role"), r"\$\.inputs\[0\]\.role: found \"logits\", expected one of token_ids"),
    (
        put("token_ids", "inputs", 1, "role"),
        r"\$\.inputs: found 2 of them, expected at most one with the role 'token_ids'",
    ),
    (put("other", "inputs", 0, "role"), r"\$\.inputs: found none, expected one with the role 'token_ids'"),
    (put("other", "outputs", 0, "role"), r"\$\.outputs: found none, expected one with the role 'logits'"),
    (put("x", "states", 0, "input"), r"\$\.states\[0\]\.input: found \"x\", expected an entry of \$\.inputs"),
    (
        put("logits", "states", 0, "output"),
        r"\$\.states\[0\]\.output: found \"logits\", expected an entry of \$\.outputs",
    ),
    (
        put(9, "states", 0, "batch_dim"),
        r"\$\.states\[0\]\.batch_dim: found 9, expected a dimension whose size is fixed",
    ),
    (put(7, "states", 0, "sequence_dim"), r"\$\.states\[0\]\.sequence_dim: found 7, expected a dimension below 4"),
    (
        put(8, "outputs", 1, "layout", 1),
        r"\$\.states\[0\]: found .*, expected an input and an output that differ in their sequence dimension only",
    ),
    (
        put(3, "states", 0, "sequence_dim"),
        r"expected an input and an output that differ in their sequence dimension only",
    ),
    (
        put("elsewhere", "states", 0, "mode"),
        r"\$\.states\[0\]\.mode: found \"elsewhere\", expected one of append, in_place",
    ),
    (put("Scatter", "collectives", 0, "kind"), r"collectives\[0\]\.kind: found \"Scatter\", expected one of AllReduce"),
    (put([], "collectives", 0, "axes"), r"\$\.collectives\[0\]\.axes: found a list, expected at least one mesh axis"),
    (put(1, "collectives", 0, "dim"), r"collectives\[0\]\.dim: found 1, expected null, because an AllReduce"),
    (put(3, "collectives", 2, "dim"), r"\$\.collectives\[2\]\.dim: found 3, expected a dimension below 3"),
    (copy_first("collectives"), r"collectives\[3\]: found 'collective0' again, expected an id"),
    (put([], "plan"), r"\$\.plan: found a list, expected an object"),
    (
        put(float("1e300"), "model", "vocab_size"),
        r"\$\.model\.vocab_size: found 1e\+300, expected an integer of at least 1",
    ),
    (put(2**62, "files", 0, "nbytes"), r"\$\.files\[0\]\.nbytes: found 4611686018427387904, expected an integer"),
    (put(10**4000, "model", "vocab_size"), r"\$\.model\.vocab_size: found 10+, expected an integer of at least 1"),
    (put("/etc/passwd", "files", 0, "path"), r"files\[0\]\.path: found \"/etc/passwd\", expected a plain file name"),
    (put("C:\\x", "files", 0, "path"), r"files\[0\]\.path: found \"C:\\\\x\", expected a plain file name"),
    (put("..\\x", "files", 0, "path"), r"files\[0\]\.path: found \"\.\.\\\\x\", expected a plain file name"),
    (put("a\0b", "files", 0, "path"), r"files\[0\]\.path: found \"a\\u0000b\", expected a plain file name"),
    (put("", "files", 0, "path"), r"files\[0\]\.path: found \"\", expected a plain file name"),
    (put("", "tensors", 0, "name"), r"tensors\[0\]\.name: found \"\", expected a string that is not empty"),
    (put("../../etc/passwd", "tensors", 0, "file"), r"tensors\[0\]\.file: found .* expected a \.safetensors file of"),
    (
        put("program.onnx", "tensors", 0, "file"),
        r"tensors\[0\]\.file: found \"program\.onnx\", expected a \.safetensors",
    ),
    (put([1] * 65, "tensors", 0, "local_shape"), r"local_shape: found 65 of them, expected a list of at most 64 items"),
    (
        put([2] * 65, "initializers", 0, "shape"),
        r"initializers\[0\]\.shape: found 65 of them, expected a list of at most",
    ),
    (put([2] * 65, "inputs", 0, "shape"), r"inputs\[0\]\.shape: found 65 of them, expected a list of at most 64 items"),
    (
        put([2] * 65, "collectives", 0, "shape"),
        r"collectives\[0\]\.shape: found 65 of them, expected a list of at most",
    ),
    (put([1] * 100, "mesh", "shape"), r"\$\.mesh\.shape: found 100 of them, expected a list of at most 12 items"),
    (put([0, 2], "mesh", "shape"), r"\$\.mesh\.shape\[0\]: found 0, expected an integer of at least 1"),
    (put([2**61, 2**61], "mesh", "shape"), r"\$\.mesh\.shape: found .* whose product is at most 4096"),
    (put([0, 0], "collectives", 0, "axes"), r"collectives\[0\]\.axes: found \[0, 0\], expected distinct mesh axes"),
    (put(["batch", 2**62], "inputs", 0, "shape"), r"inputs\[0\]\.shape\[1\]: found \d+, expected an integer"),
    (
        put("0" * 64, "initializers", 0, "sha256"),
        r"initializers\[0\]\.sha256: found 0+\.\.\., expected .* stored as it was",
    ),
    (put("A" * 64, "files", 0, "sha256"), r"files\[0\]\.sha256: found .*, expected 64 lower-case hexadecimal"),
    (
        put(["embed"], "initializers", 0, "stored"),
        r"initializers\[0\]: found others, expected the dtype, shape and digest of its alias 'embed'",
    ),
    (put(["cos", "cos"], "initializers", 0, "stored"), r"found 'cos', .*|found several whole tensors"),
    (put(None, "tensors"), r"\$\.tensors: found null, expected a list"),
    (drop("tensors", 0, "part"), r"\$\.tensors\[0\]: found an object without it, expected the key 'part'"),
    (put("x", "tensors", 0, "surprise"), r"\$\.tensors\[0\]: found the unknown key 'surprise', expected only the keys"),
]


def _resized(root: Json) -> None:
    """Alike in every place of the manifest, so that only the other files tell."""
    root["inputs"][2]["shape"][1] = root["outputs"][1]["shape"][1] = 16
    root["inputs"][2]["layout"][1]["size"] = root["outputs"][1]["layout"][1]["size"] = 16


def _block(**changed: Json) -> Edit:
    block = {"name": "b", "first_node": 0, "collectives": 1, "weight_nbytes": 0, "crossing": []} | changed
    return put([block], "blocks")


def _second_block(first_node: int) -> Edit:
    block = {"name": "a", "first_node": 0, "collectives": 1, "weight_nbytes": 0, "crossing": []}
    return put([block, {**block, "name": "b", "first_node": first_node}], "blocks")


_AGAINST_THE_PROGRAM: list[tuple[str, Edit, str]] = [
    ("mlp", _block(first_node=99), "expected more than 99, where block 'b' starts"),
    ("mlp", _block(crossing=["x"]), "no node writes 'x', expected one, because it crosses into block 'b'"),
    ("mlp", _block(collectives=2), "block 'b' has 1 collectives, expected 2"),
    ("mlp", _second_block(0), "expected blocks whose first nodes ascend"),
    (
        "mlp",
        put([4], "mesh", "shape"),
        r"axes: found \[0, 1\], expected distinct mesh axes below 1|axes are distinct mesh",
    ),
    ("mlp", put("FLOAT16", "inputs", 0, "dtype"), "input 'x' is FLOAT, expected FLOAT16"),
    ("mlp", put("DOUBLE", "collectives", 0, "dtype"), "of collective 'collective0' is FLOAT, expected DOUBLE"),
    ("mlp", put([0], "collectives", 0, "axes"), r"'axes': \[0, 1\]\}, expected AllReduce \{'axes': \[0\]\}"),
    ("mlp", put([1, 0], "collectives", 0, "axes"), r"'axes': \[0, 1\]\}, expected AllReduce \{'axes': \[1, 0\]\}"),
    ("mlp", put(["batch", 4], "collectives", 0, "shape"), r"is \['batch', 8\], expected \['batch', 4\]"),
    ("mlp", put(["batch"], "collectives", 0, "shape"), r"is \['batch', 8\], expected \['batch'\]"),
    ("mlp", put([], "collectives"), "found 1 collective nodes, expected the 0 of"),
    (
        "llama",
        Edit("collectives in another order", lambda r: r["collectives"].reverse()),
        "found 3 collective nodes, first",
    ),
    ("llama", Edit("a state of another size", _resized), "has the local shape .*, expected .*4, 'past', 16"),
    (
        "mlp",
        Edit("inputs renamed", lambda r: r["inputs"][0].update(name="z")),
        r"found the inputs \['x'\], expected \['z'\]",
    ),
    (
        "mlp",
        Edit("no first tensor", lambda r: (r["tensors"].pop(0), r["initializers"].pop(0))),
        "has a tensor 'A' that",
    ),
]


def _raw(name: str, data: bytes, message: str) -> Hostile:
    return Hostile(
        name=f"a manifest that is {name}",
        base="mlp",
        apply=lambda copy: (copy.folder / MANIFEST).write_bytes(data),
        message=message,
    )


def _altered(copy: Copy) -> None:
    path = copy.folder / MANIFEST
    path.write_bytes(path.read_bytes().replace(b'"vocab_size": null', b'"vocab_size": 4096'))


def _digest_last(copy: Copy) -> None:
    root = copy.read()
    root["digest"] = root.pop("digest")
    (copy.folder / MANIFEST).write_bytes(json.dumps(root, indent=1).encode())


def _giant(copy: Copy) -> None:
    with (copy.folder / MANIFEST).open("wb") as file:
        file.truncate(MAX_MANIFEST_NBYTES + 1)


KINDS: list[Hostile] = [
    *(manifest_kind("llama", edit, message) for edit, message in _FIELDS),
    *(manifest_kind(base, edit, message) for base, edit, message in _AGAINST_THE_PROGRAM),
    _raw("empty", b"", "not whole UTF-8 JSON"),
    _raw("binary", b"\xff\xfe", "not whole UTF-8 JSON"),
    _raw("cut short", b'{"format": {"name": ', "not whole UTF-8 JSON"),
    _raw("an object with a key twice", b'{"a": 1, "a": 2}', "has the key 'a' more than once"),
    _raw("not a number", b'{"a": NaN}', "found the number NaN, expected finite numbers"),
    _raw("infinite", b'{"a": -Infinity}', "found the number -Infinity, expected finite numbers"),
    _raw("beyond floats", b'{"a": 1e999}', "found the number 1e999"),
    _raw("one long number", b'{"a": ' + b"9" * 5000 + b"}", "not whole UTF-8 JSON"),
    _raw("deep", b"[" * 100_000, "nested too deeply|not whole UTF-8 JSON"),
    _raw("half a character", b'{"a": "\\ud800"}', "not whole UTF-8 JSON"),
    _raw("a number", b"3", r"manifest.json \$: found 3, expected an object with the key 'format'"),
    Hostile(
        name="a manifest that is altered",
        base="mlp",
        apply=_altered,
        message=r"was altered: its digest is \w+\.\.\., it",
    ),
    Hostile(
        name="a manifest with its digest last",
        base="mlp",
        apply=_digest_last,
        message="found it elsewhere, expected the",
    ),
    Hostile(
        name="a giant manifest",
        base="mlp",
        apply=_giant,
        message=r"artifact/manifest\.json is 67108865 bytes long, expected at most 67108864",
    ),
]
