"""The adapters in an artifact's folder: a file for each, in safetensors' form, whose tensors are named as the inputs.

They are no weights of the program, and so not called `.safetensors`.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from furiosa_llm.runtime.artifact.adapters.files import AdapterFile, read_adapter, read_tensors
from furiosa_llm.runtime.artifact.dtypes import DTYPES, Array
from furiosa_llm.runtime.artifact.errors import AdapterError
from furiosa_llm.runtime.artifact.reader import Artifact

_FILE = re.compile(r"adapter-(.+)\.lora")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_STORED = {np.dtype(dtype.numpy): dtype.safetensors for dtype in DTYPES.values() if dtype.bits >= 8}


def read_adapters(paths: Mapping[str, str | os.PathLike[str]]) -> dict[str, AdapterFile]:
    """The adapters in files, by their names; AdapterError for what is none."""
    return {check_name(name): read_adapter(Path(path)) for name, path in paths.items()}


def module_names(adapters: Mapping[str, AdapterFile]) -> set[str]:
    """The modules that adapters name, as options of a build have them."""
    return {".".join(module) for file in adapters.values() for module in file.modules}


def check_name(name: str) -> str:
    """`name`; raises AdapterError for one that no file can have."""
    if not _NAME.fullmatch(name):
        raise AdapterError(
            f"adapter name {name!r:.80}: expected at most 64 letters, digits, dots, dashes and underscores"
        )
    return name


def file_name(name: str) -> str:
    """The file of the adapter `name`."""
    return f"adapter-{check_name(name)}.lora"


def own_adapters(artifact: Artifact) -> dict[str, Path]:
    """The files of the adapters that the manifest lists, by name."""
    matches = ((_FILE.fullmatch(entry.path), entry.path) for entry in artifact.manifest.files)
    return {match[1]: artifact.folder / path for match, path in matches if match is not None}


def read_own(path: Path) -> AdapterFile:
    """One of these files."""
    return AdapterFile(path=path, modules={}, tensors=read_tensors(path))


def to_safetensors(tensors: Mapping[str, Array]) -> bytes:
    """The bytes of a safetensors file, the same for equal tensors."""
    header: dict[str, object] = {}
    data: list[bytes] = []
    offset = 0
    for name, array in sorted(tensors.items()):
        data.append(np.ascontiguousarray(array).tobytes())
        stop = offset + len(data[-1])
        header[name] = {"dtype": _STORED[array.dtype], "shape": list(array.shape), "data_offsets": [offset, stop]}
        offset = stop
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + b"".join(data)
