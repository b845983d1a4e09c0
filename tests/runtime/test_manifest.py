"""manifest.json: what is written is what is read, and each malformed field is refused where it stands."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from furiosa_llm.runtime.artifact.errors import ArtifactError
from furiosa_llm.runtime.artifact.layout import Leaf, Mesh
from furiosa_llm.runtime.artifact.manifest import MAX_MANIFEST_NBYTES, Manifest, seal
from furiosa_llm.runtime.artifact.parse import parse_manifest
from tests.runtime.models import LlamaSize, llama

Json = Any
Change = Callable[[Json], None]


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    folder = llama(Mesh((2, 2)), LlamaSize(layers=1)).write(tmp_path_factory.mktemp("artifact") / "a")
    return parse_manifest((folder / "manifest.json").read_bytes())


def test_what_is_written_is_read(manifest: Manifest) -> None:
    data = manifest.to_bytes()
    assert parse_manifest(data) == manifest
    assert parse_manifest(data).to_bytes() == data
    assert isinstance(manifest.tensors[0].layout, tuple)
    assert Leaf(8, (0, 1)) in (manifest.inputs[2].layout or ())


def put(value: Json, *path: str | int) -> Change:
    def change(root: Json) -> None:
        for key in path[:-1]:
            root = root[key]
        root[path[-1]] = value

    return change


def drop(*path: str | int) -> Change:
    def change(root: Json) -> None:
        for key in path[:-1]:
            root = root[key]
        del root[path[-1]]

    return change


def copy_first(section: str) -> Change:
    def change(root: Json) -> None:
        root[section].append(root[section][0])

    return change


REFUSED: list[tuple[Change, str]] = [
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
    (put([], "mesh", "shape"), r"\$\.mesh\.shape: found \[\], expected a list of at least one length"),
    (put([10**5], "mesh", "shape"), r"\$\.mesh\.shape: found .* whose product is at most 4096"),
    (put("x", "provenance", "source_sha256"), r"source_sha256: found \"x\", expected 64 lower-case hexadecimal"),
    (put({"onnx": 1}, "provenance", "libraries"), r"\$\.provenance\.libraries\.onnx: found 1, expected a string"),
    (put("../x", "files", 0, "path"), r"\$\.files\[0\]\.path: found \"\.\./x\", expected a plain file name"),
    (put("..", "files", 0, "path"), r"files\[0\]\.path: found \"\.\.\""),
    (put("manifest.json", "files", 0, "path"), r"plain file name other than manifest.json"),
    (put(-5, "files", 0, "nbytes"), r"\$\.files\[0\]\.nbytes: found -5"),
    (copy_first("files"), r"\$\.files\[3\]: found 'program.onnx' again, expected a path that item 0 of the list"),
    (put("zz.bin", "files", 0, "path"), r"\$\.files: found .*, expected the files sorted by path"),
    (drop("files", 1), r"\$\.files: found 2 files without it, expected source.onnx among the files"),
    (put("STRING", "tensors", 0, "dtype"), r"\$\.tensors\[0\]\.dtype: found \"STRING\", expected one of FLOAT"),
    (put("x.safetensors", "tensors", 0, "file"), r"tensors\[0\]\.file: found .* expected a \.safetensors file of"),
    (put([1], "tensors", 0, "local_shape"), r"tensors\[0\]\.local_shape: found \[1\], expected \[256, 8\]"),
    (put([7], "tensors", 0, "shard_axes"), r"shard_axes: found \[7\], expected distinct mesh axes below 2"),
    (put([], "tensors", 4, "shard_axes"), r"shard_axes: found \[\], expected all of the axes \[0, 1\]"),
    (put(["x"], "tensors", 0, "layout"), r"\$\.tensors\[0\]\.layout\[0\]: a layout is an integer"),
    (put(None, "tensors", 0, "layout"), r"expected a layout for each dimension, because the tensor has an origin"),
    (put("nothing", "tensors", 0, "origin"), r"\$\.tensors\[0\]\.origin: found \"nothing\", expected null or the name"),
    (put("sin", "tensors", 0, "origin"), r"\$\.tensors\[0\]\.name: found \"cos\", expected one of the stored tensors"),
    (put({"dim": 0, "start": 3, "stop": 3}, "tensors", 0, "part"), r"part\.stop: found 3, expected more than start, 3"),
    (put({"dim": 0, "start": 0, "stop": 999}, "tensors", 0, "part"), r"expected a part of the original's shape"),
    (put({"dim": 0, "start": 0, "stop": 9}, "tensors", 0, "part"), r"layout: found FLOAT \[256, 8\], expected one of"),
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
    (put(7, "states", 0, "sequence_dim"), r"\$\.states\[0\]\.sequence_dim: found 7, expected a dimension below 4"),
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
]


@pytest.mark.parametrize(("change", "message"), REFUSED, ids=[message[:60] for _, message in REFUSED])
def test_a_malformed_field_is_refused(manifest: Manifest, change: Change, message: str) -> None:
    root = json.loads(manifest.to_bytes())
    change(root)
    with pytest.raises(ArtifactError, match=message) as caught:
        parse_manifest(seal(root))
    assert "rebuild the artifact with `furiosa-llm build`" in str(caught.value)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not whole UTF-8 JSON"),
        (b"\xff\xfe", "not whole UTF-8 JSON"),
        (b'{"format": {"name": ', "not whole UTF-8 JSON"),
        (b'{"a": 1, "a": 2}', "has the key 'a' more than once"),
        (b'{"a": NaN}', "found the number NaN, expected finite numbers"),
        (b'{"a": 1e999}', "found the number 1e999"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not whole UTF-8 JSON"),
        (b"[" * 100_000, "nested too deeply|not whole UTF-8 JSON"),
        (b"3", r"manifest.json \$: found 3, expected an object with the key 'format'"),
    ],
    ids=["empty", "binary", "cut", "repeated", "nan", "infinite", "long", "deep", "number"],
)
def test_what_is_no_manifest_is_refused(data: bytes, message: str) -> None:
    with pytest.raises(ArtifactError, match=message):
        parse_manifest(data)


def test_an_altered_manifest_is_refused(manifest: Manifest) -> None:
    data = manifest.to_bytes().replace(b'"vocab_size": null', b'"vocab_size": 4096')
    with pytest.raises(ArtifactError, match=r"manifest\.json was altered: its digest is \w+\.\.\., it says \w+"):
        parse_manifest(data)


def test_the_digest_comes_first(manifest: Manifest) -> None:
    root = json.loads(manifest.to_bytes())
    root["plan"] = root.pop("plan")
    root["digest"] = root.pop("digest")
    with pytest.raises(ArtifactError, match=r"\$\.digest: found it elsewhere, expected the digest as the first member"):
        parse_manifest(json.dumps(root, indent=1).encode())


def test_a_giant_manifest_is_refused_unread() -> None:
    with pytest.raises(ArtifactError, match=r"manifest\.json is \d+ bytes long, expected at most \d+; rebuild"):
        parse_manifest(b" " * (MAX_MANIFEST_NBYTES + 1))


def test_blocks_ascend(manifest: Manifest) -> None:
    root = json.loads(manifest.to_bytes())
    block = {"name": "a", "first_node": 3, "collectives": 1, "weight_nbytes": 0, "crossing": []}
    root["blocks"] = [block, {**block, "name": "b", "first_node": 3}]
    with pytest.raises(ArtifactError, match="expected blocks whose first nodes ascend"):
        parse_manifest(seal(root))


def test_the_plan_may_be_any_object(manifest: Manifest, tmp_path: Path) -> None:
    root = json.loads(manifest.to_bytes())
    root["plan"] = {"anything": [1, {"at": None}]}
    assert parse_manifest(seal(root)).plan == root["plan"]
