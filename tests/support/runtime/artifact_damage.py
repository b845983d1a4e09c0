"""Random damage to an artifact's folder: of the manifest's and the header's values, of the models' fields, of bytes."""

from __future__ import annotations

import copy
import json
import os
import random
from collections.abc import Callable
from pathlib import Path

from furiosa_llm.runtime.artifact.manifest import DIGEST_PREFIX, manifest_digest, seal
from tests.support.builder.mutants import mutant
from tests.support.runtime.hostile import MANIFEST, PROGRAM, SOURCE, Copy, Json, with_header
from tests.support.runtime.spmd import WEIGHTS

Damage = Callable[[Path, random.Random], str]
"""Damages the artifact in a folder, and says how."""

VALUES: tuple[Json, ...] = (
    None, True, False, -1, 0, 1, 2, 3, 4, 5, 6, 8, 24, 255, 2**31, 2**47, 2**48, 2**62, 2**63, 10**40, 0.0, 1.0, 1e308,
    "", "x", ".", "..", "a/b", "\0", "é", "\ud800", "batch", "past + sequence", "A", "B", "FLOAT", "FLOAT16", "INT64",
    "AllReduce", "state", "program.onnx", WEIGHTS, "0" * 64, [], {}, [0], [1], [0, 1], [1, 0], [2], [[]], [8, 24],
    {"size": 24, "axes": [0]}, {"size": 24, "axes": [1, 0]}, {"size": 8, "axes": [0, 1]}, {"prod": [4, 6]},
    {"cat": [{"size": 12, "axes": [0, 1]}, {"size": 12, "axes": [1, 0]}]}, {"cat": [{"size": 16, "axes": [0]}, 8]},
    {"prod": [{"size": 2, "axes": [0]}, {"size": 12, "axes": [1]}]}, {"prefix": 24, "of": {"size": 25, "axes": [0]}},
    {"prod": [{"size": 4, "axes": [0]}, {"size": 6, "axes": [0]}]}, {"prod": [2**40, 2**40]},
    {"dim": 0, "start": 0, "stop": 8}, {"dim": 1, "start": 0, "stop": 12}, {"dim": 1, "start": 12, "stop": 24},
)  # fmt: skip
DEEP = 300


def _places(root: Json) -> list[tuple[str | int, ...]]:
    """The path of every value in a document, which an earlier damage may have nested deeply."""
    found: list[tuple[str | int, ...]] = []
    rest: list[tuple[tuple[str | int, ...], Json]] = [((), root)]
    while rest:
        path, value = rest.pop()
        found.append(path)
        keys = value.keys() if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
        rest += [((*path, key), value[key]) for key in keys]
    return found


def _get(root: Json, path: tuple[str | int, ...]) -> Json:
    for key in path:
        root = root[key]
    return root


def _damage_json(root: Json, rng: random.Random) -> str:
    """Change one to three values of a document: another value, another place's value, none, twice, or one deep list."""
    done = []
    for _ in range(rng.choice([1, 1, 2, 3])):
        path = rng.choice([place for place in _places(root) if place])
        key: Json = path[-1]
        holder = _get(root, path[:-1])
        way = rng.choice(["value", "value", "other", "swap", "drop", "twice", "nudge", "deep"])
        done.append(f"{way} {'.'.join(map(str, path))}")
        if way == "drop":
            del holder[key]
        elif way == "twice" and isinstance(holder, list):
            holder.insert(rng.randrange(len(holder) + 1), copy.deepcopy(holder[key]))
        elif way == "nudge" and isinstance(holder[key], int):
            holder[key] += rng.choice([-1, 1, 8, -(2**40)])
        elif way == "deep":
            for _ in range(DEEP):
                holder[key] = [holder[key]] if rng.random() < 0.5 else {"cat": [holder[key]]}
            break  # what lies so deep is not looked at again
        elif way in ("other", "swap"):
            near = [place for place in _places(root) if len(place) == len(path) and place[-1] == key] or [path]
            other = rng.choice(near)
            mine, its = holder[key], _get(root, other)
            holder[key] = copy.deepcopy(its)
            if way == "swap":
                _get(root, other[:-1])[other[-1]] = copy.deepcopy(mine)
        else:
            holder[key] = copy.deepcopy(rng.choice(VALUES))
    return ", ".join(done)


def _damage_bytes(content: bytes, rng: random.Random) -> bytes:
    data = bytearray(content)
    for _ in range(rng.choice([1, 1, 1, 2, 8])):
        start = rng.randrange(len(data) + 1)
        stop = min(len(data), start + rng.choice([0, 1, 1, 2, 8, 64]))
        new = rng.choice(
            [b"", b"\xff", b"\0", bytes(rng.randrange(256) for _ in range(4)), bytes(data[start:stop]) * 2]
        )
        data[start:stop] = new
    return bytes(data)


def damage_manifest(folder: Path, rng: random.Random) -> str:
    """Values of the manifest, most often under the right digest."""
    path = folder / MANIFEST
    root = json.loads(path.read_bytes())
    shown = _damage_json(root, rng)
    sealed = rng.random() < 0.8 and isinstance(root, dict)
    try:
        data = (
            seal({key: value for key, value in root.items() if key != "digest"})
            if sealed
            else json.dumps(root).encode()
        )
    except UnicodeEncodeError:
        data = json.dumps(root).encode()
    path.write_bytes(data)
    return f"manifest: {shown}"


def damage_manifest_bytes(folder: Path, rng: random.Random) -> str:
    """Bytes of the manifest, in half of the cases under the right digest."""
    path = folder / MANIFEST
    data = _damage_bytes(path.read_bytes(), rng)
    if rng.random() < 0.5:
        start = len(DIGEST_PREFIX)
        data = data[:start] + manifest_digest(data).encode() + data[start + 64 :]
    path.write_bytes(data)
    return "bytes of the manifest"


def _refreshed(folder: Path, rng: random.Random) -> str:
    if rng.random() < 0.75:
        Copy(folder).refresh()
        return ", digests corrected"
    return ""


def damage_header(folder: Path, rng: random.Random) -> str:
    """Values of the weights' header."""
    weights = Copy(folder)
    header, data = weights.weights()
    shown = _damage_json(header, rng)
    size = rng.choice([None, None, None, None, 0, 7, 2**20, 2**63])
    (folder / WEIGHTS).write_bytes(with_header(json.dumps(header).encode(), data, size))
    return f"header: {shown}, length {size}{_refreshed(folder, rng)}"


def damage_file_bytes(folder: Path, rng: random.Random) -> str:
    """Bytes of any file, or of the weights' header; those of weights without another digest."""
    name = rng.choice([PROGRAM, SOURCE, WEIGHTS])
    path = folder / name
    path.write_bytes(_damage_bytes(path.read_bytes(), rng))
    return f"bytes of {name}" + (_refreshed(folder, rng) if name != WEIGHTS else "")


def damage_model(folder: Path, rng: random.Random) -> str:
    """Fields of program.onnx or source.onnx."""
    name = rng.choice([PROGRAM, PROGRAM, SOURCE])
    path = folder / name
    content = path.read_bytes()
    try:
        shown, data = mutant(content, rng)
    except IndexError:  # some mutations are for files that are longer
        shown, data = "bytes", _damage_bytes(content, rng)
    path.write_bytes(data)
    return f"{name}: {shown}{_refreshed(folder, rng)}"


def damage_folder(folder: Path, rng: random.Random) -> str:
    """Something else in place of a file."""
    name = rng.choice([MANIFEST, PROGRAM, SOURCE, WEIGHTS])
    path, other = folder / name, folder / rng.choice([PROGRAM, SOURCE, WEIGHTS])
    way = rng.choice(["gone", "link", "loop", "FIFO", "folder", "empty", "another file", "sparse"])
    content = other.read_bytes()
    path.unlink()
    if way == "link":
        path.symlink_to(other)
    elif way == "loop":
        path.symlink_to(path.name)
    elif way == "FIFO":
        os.mkfifo(path)
    elif way == "folder":
        path.mkdir()
    elif way == "empty":
        path.touch()
    elif way == "another file":
        path.write_bytes(content)
    elif way == "sparse":
        with path.open("wb") as file:
            file.truncate(2**40)
    return f"{way} in place of {name}"


DAMAGES: tuple[Damage, ...] = (
    *(damage_manifest,) * 6,
    *(damage_manifest_bytes,) * 2,
    *(damage_header,) * 3,
    *(damage_model,) * 3,
    *(damage_file_bytes,) * 2,
    damage_folder,
)
