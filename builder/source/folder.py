"""The model in a folder as exporters leave it, and the name of its artifact."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from furiosa_llm.builder.errors import ModelLoadError
from furiosa_llm.builder.source.companions import BELOW, read_json

_MODEL = "model.onnx"
_WEIGHTS = ("*.safetensors", "pytorch_model*.bin", "*.gguf")
"""Of models that are not exported."""
_VARIANT = re.compile(r"model(?:[-_.](?P<variant>.+))?")
"""Stems that every exporter gives: `model_q4` is a variant."""
_PLACE = re.compile(r"|onnx|models?|snapshots|[0-9a-f]{16,64}")
"""Names of folders that say nothing of what lies in them."""


def find_model(path: Path) -> Path:
    """`path` itself, or the .onnx file that the folder `path` is about.

    That is the only one, the one that genai_config.json names, or `model.onnx` among its variants. Raises
    ModelLoadError if there is none, or no telling which.
    """
    if not path.is_dir():
        return path
    folder = models_folder(path)
    files = sorted(folder.glob("*.onnx"))
    if not files:
        raise ModelLoadError(f"{path} is a folder, expected an ONNX file; it holds no .onnx file{_unexported(path)}.")
    named = _named_by_genai(folder) or _MODEL
    chosen = files if len(files) == 1 else [file for file in files if file.name == named]
    if not chosen:
        names = ", ".join(file.name for file in files)
        raise ModelLoadError(
            f"{path} is a folder, expected an ONNX file; it holds {names}: give the path of one of them, for instance "
            f"{files[0]}."
        )
    return chosen[0]


def models_folder(path: Path) -> Path:
    """Where the .onnx files of the folder `path` lie: in itself or in its folder `onnx`, of the cache in a snapshot."""
    folder = _snapshot(path)
    below = folder / BELOW
    return below if not any(folder.glob("*.onnx")) and any(below.glob("*.onnx")) else folder


def variants(model: Path) -> Sequence[str]:
    """The names of the variants of `model` in its folder."""
    found = (file.name for file in model.parent.glob("*.onnx") if _VARIANT.fullmatch(file.stem))
    return sorted(name for name in found if name != model.name)


def default_name(model: Path) -> str:
    """The artifact's name where none is given: the model's file name, or where that is any model's, its folder's.

    Folders called `onnx` or by a hash have the name of the one above; a folder of the Hugging Face cache has the
    model's. A variant's name is behind it: `llama-q4`.
    """
    is_folder = model.is_dir()
    match = None if is_folder else _VARIANT.fullmatch(model.stem)
    if not is_folder and match is None:
        return model.stem
    folder = model.resolve() if is_folder else model.parent.resolve()
    named = [part for part in (folder, *folder.parents) if not _PLACE.fullmatch(part.name)]
    name = named[0].name.rpartition("--")[2] if named else "model"
    variant = None if match is None else match["variant"]
    return name if variant is None else f"{name}-{variant}"


def _snapshot(path: Path) -> Path:
    """The snapshot that the folder of a model in the Hugging Face cache has checked out, else `path`."""
    reference = path / "refs" / "main"
    if not reference.is_file():
        return path
    snapshot = path / "snapshots" / reference.read_text("utf-8").strip()
    if not snapshot.is_dir():
        raise ModelLoadError(f"{path} has no snapshot {snapshot.name}, which refs/main names; download it again.")
    return snapshot


def _named_by_genai(folder: Path) -> str | None:
    decoder = read_json(folder / _MODEL, "genai_config.json").get("model", {})
    for key in ("decoder", "filename"):
        decoder = decoder.get(key) if isinstance(decoder, Mapping) else None
    return decoder if isinstance(decoder, str) else None


def _unexported(folder: Path) -> str:
    found = next((file.name for pattern in _WEIGHTS for file in sorted(folder.glob(pattern))), None)
    if found is None:
        return ""
    return f", but {found}: export the model first, for instance by `optimum-cli export onnx --model {folder} OUTPUT`"
