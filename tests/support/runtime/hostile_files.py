"""Hostile folders: what lies in place of files, files that were altered, and headers of weights that lie."""

from __future__ import annotations

import json
import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

from tests.support.runtime.hostile import MANIFEST, PROGRAM, SOURCE, Copy, Hostile, Json, with_header
from tests.support.runtime.spmd import WEIGHTS

_LINK = "is not a regular file; copy the artifact with its links followed"


def _gone(name: str) -> Callable[[Copy], object]:
    return lambda copy: (copy.folder / name).unlink()


def _instead(name: str, make: Callable[[Path], object]) -> Callable[[Copy], None]:
    """Something else in place of a file, which lies beside it now."""

    def apply(copy: Copy) -> None:
        path = copy.folder / name
        shutil.move(path, copy.folder / "elsewhere")
        make(path)

    return apply


def _to_a_folder(path: Path) -> None:
    (path.parent / "folder").mkdir()
    path.symlink_to("folder")


def _a_socket(path: Path) -> None:
    # The name of a socket is short: it is bound where its folder is open.
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        with socket.socket(socket.AF_UNIX) as bound:
            bound.bind(f"/proc/self/fd/{folder}/{path.name}")
    finally:
        os.close(folder)


_INSTEAD: list[tuple[str, Callable[[Path], object]]] = [
    ("a link", lambda path: path.symlink_to("elsewhere")),
    ("a link to nothing", lambda path: path.symlink_to("nothing")),
    ("a link to itself", lambda path: path.symlink_to(path.name)),
    ("a link to a folder", _to_a_folder),
    ("a FIFO", os.mkfifo),
    ("a folder", Path.mkdir),
    ("a socket", _a_socket),
]


def _cut(name: str) -> Callable[[Copy], object]:
    return lambda copy: (copy.folder / name).write_bytes((copy.folder / name).read_bytes()[:-1])


def _empty(name: str) -> Callable[[Copy], object]:
    return lambda copy: (copy.folder / name).write_bytes(b"")


def _swapped(copy: Copy) -> None:
    program, source = copy.folder / PROGRAM, copy.folder / SOURCE
    first = program.read_bytes()
    program.write_bytes(source.read_bytes())
    source.write_bytes(first)


def _flip_middle(copy: Copy, name: str) -> None:
    copy.flip(name, (copy.folder / name).stat().st_size // 2)


def _flip_padding(copy: Copy) -> None:
    """One space of the header's padding becomes a tab, which JSON allows there."""
    path = copy.folder / WEIGHTS
    content = path.read_bytes()
    path.write_bytes(content.replace(b"} ", b"}\t", 1))


def _shards_swapped(copy: Copy) -> None:
    """Shards 0 and 1 of the last tensor change places."""
    path = copy.folder / WEIGHTS
    tensor = copy.read()["tensors"][-1]
    content = bytearray(path.read_bytes())
    window = 4 * tensor["local_shape"][0] * tensor["local_shape"][1]
    start = len(content) - 4 * window
    content[start : start + 2 * window] = content[start + window : start + 2 * window] + content[start : start + window]
    path.write_bytes(content)


FILES: list[Hostile] = [
    Hostile(
        name="no manifest", base="mlp", apply=_gone(MANIFEST), message=r"is not an artifact: it has no manifest\.json"
    ),
    *(
        Hostile(name=f"no {name}", base="mlp", apply=_gone(name), message=f"{name} is missing; copy the artifact again")
        for name in (PROGRAM, SOURCE, WEIGHTS)
    ),
    *(
        Hostile(name=f"{what} in place of {name}", base="mlp", apply=_instead(name, make), message=f"{name} {_LINK}")
        for what, make in _INSTEAD
        for name in (MANIFEST, PROGRAM, WEIGHTS)
    ),
    *(
        Hostile(
            name=f"{name} cut short", base="mlp", apply=_cut(name), message=rf"{name}: found \d+ bytes, expected \d+"
        )
        for name in (PROGRAM, SOURCE, WEIGHTS)
    ),
    *(
        Hostile(name=f"{name} empty", base="mlp", apply=_empty(name), message=rf"{name}: found 0 bytes, expected \d+")
        for name in (PROGRAM, SOURCE, WEIGHTS)
    ),
    *(
        Hostile(
            name=f"one bit of {name}",
            base="int4",
            apply=lambda copy, name=name: _flip_middle(copy, name),  # type: ignore[misc]
            message=rf"{name} was altered: found sha256 \w+\.\.\., expected \w+",
        )
        for name in (PROGRAM, SOURCE, "genai_config.json")
    ),
    Hostile(
        name="program and source swapped",
        base="mlp",
        apply=_swapped,
        message=r"program\.onnx: found \d+ bytes, expected",
    ),
    Hostile(
        name="one bit of the last weight",
        base="mlp",
        apply=lambda copy: copy.flip(WEIGHTS, -1),
        message=f"{WEIGHTS} was altered in the tensor 'B': found sha256",
        full=True,
    ),
    Hostile(
        name="one bit of packed INT4",
        base="int4",
        apply=lambda copy: copy.flip(WEIGHTS, -1),
        message=f"{WEIGHTS} was altered in the tensor 'lm_head.MatMul.weight_DQ_Q4'",
        full=True,
    ),
    Hostile(
        name="shards swapped",
        base="mlp",
        apply=_shards_swapped,
        message=f"{WEIGHTS} was altered in the tensor 'B'",
        full=True,
    ),
    Hostile(
        name="bytes behind the last tensor",
        base="mlp",
        apply=lambda copy: copy.write(WEIGHTS, (copy.folder / WEIGHTS).read_bytes() + bytes(8)),
        message=rf"{WEIGHTS}: found \d+ bytes, expected \d+, where the last tensor ends",
    ),
    Hostile(
        name="the header's padding",
        base="int4",
        apply=_flip_padding,
        message=f"{WEIGHTS} was altered in its header",
        full=True,
    ),
]


def _header_kind(name: str, change: Callable[[Json], object], message: str) -> Hostile:
    return Hostile(name=f"header: {name}", base="mlp", apply=lambda copy: copy.header(change), message=message)


def _raw_header(name: str, header: Callable[[Json], bytes], message: str, size: int | None = None) -> Hostile:
    def apply(copy: Copy) -> None:
        found, data = copy.weights()
        copy.write(WEIGHTS, with_header(header(found), data, size))

    return Hostile(name=f"header: {name}", base="mlp", apply=apply, message=message)


def _text(header: Json) -> bytes:
    return json.dumps(header).encode()


def _overlap(header: Json) -> None:
    header["B"]["data_offsets"] = header["A"]["data_offsets"]


def _beyond(header: Json) -> None:
    header["B"]["data_offsets"][1] += 4096


HEADERS: list[Hostile] = [
    _raw_header(
        "longer than the file", _text, "found a safetensors header of 1099511627776 bytes in a file of", 1 << 40
    ),
    _raw_header("of no length", _text, "found a safetensors header of 0 bytes in a file of", 0),
    _raw_header(
        "giant", lambda h: _text(h) + b" " * 2**18, r"header of \d+ bytes, expected at most \d+ for the tensors"
    ),
    _raw_header("cut short", lambda h: _text(h)[:-1], "header is not whole UTF-8 JSON"),
    _raw_header("no object", lambda _: b"[]", r"header \$: found a list, expected an object"),
    _raw_header("deep", lambda _: b"[" * 50_000, "header is nested too deeply|not whole UTF-8 JSON"),
    _raw_header(
        "a name twice", lambda h: _text(h)[:-1] + b',"A":' + _text(h["A"]) + b"}", "has the key 'A' more than once"
    ),
    _raw_header(
        "not a number", lambda h: _text(h).replace(b'"shape"', b'"x": NaN, "shape"', 1), "found the number NaN"
    ),
    _header_kind("a tensor missing", lambda h: h.pop("A"), "begins at byte|where the last tensor ends"),
    _header_kind(
        "another dtype",
        lambda h: h["A"].update(dtype="F16"),
        r"tensor 'A' is F16 \[4, 8, 6\] of 768 bytes, expected F32",
    ),
    _header_kind("another shape", lambda h: h["A"].update(shape=[4, 6, 8]), r"tensor 'A' is F32 \[4, 6, 8\]"),
    _header_kind(
        "a backward window",
        lambda h: h["A"].update(data_offsets=[8, 0]),
        r"A\.data_offsets: found \[8, 0\], expected \[begin, end\]",
    ),
    _header_kind("a hole", lambda h: h["A"].update(data_offsets=[0, 8]), "begins at byte"),
    _header_kind("an overlap", _overlap, "begins at byte"),
    _header_kind("a window out of range", _beyond, "expected .*, where the last tensor ends"),
    _header_kind(
        "a negative window",
        lambda h: h["A"].update(data_offsets=[-8, 0]),
        r"data_offsets\[0\]: found -8, expected an integer",
    ),
    _header_kind(
        "a fraction",
        lambda h: h["A"].update(data_offsets=[0.0, 8]),
        r"data_offsets\[0\]: found 0\.0, expected an integer",
    ),
    _header_kind(
        "a huge window",
        lambda h: h["B"].update(data_offsets=[768, 2**63]),
        r"data_offsets\[1\]: found \d+, expected an integer",
    ),
    _header_kind(
        "three offsets", lambda h: h["A"].update(data_offsets=[0, 4, 8]), r"found \[0, 4, 8\], expected \[begin, end\]"
    ),
    _header_kind("an unknown key", lambda h: h["A"].update(extra=1), "found the unknown key 'extra'"),
    _header_kind(
        "a key missing", lambda h: h["A"].pop("shape"), "found an object without it, expected the key 'shape'"
    ),
    _header_kind("another name", lambda h: h.update(C=h.pop("A")), f"{WEIGHTS} has no tensor 'A'"),
    _header_kind("many dimensions", lambda h: h["A"].update(shape=[1] * 100), "expected a list of at most 65 items"),
    _header_kind(
        "metadata that is no text",
        lambda h: h.update(__metadata__={"a": 1}),
        r"__metadata__\.a: found 1, expected a string",
    ),
]

KINDS: list[Hostile] = [*FILES, *HEADERS]
