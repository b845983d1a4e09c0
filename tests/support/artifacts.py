"""Artifacts of the zoo's models and of SmolLM2, each built once for all tests and workers, and for the runs after.

They lie under `build/test-artifacts`, or in the folder that FURIOSA_LLM_TEST_ARTIFACTS names, by a digest of all that
they follow from: the sources of the builder and of the format, the versions of the packages that it builds with, the
model's files, and the options. Tests read them and take copies of what they change.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import os
import pickle
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

from rich.console import Console

from furiosa_llm.builder import ArtifactBuilder, BuildReport
from furiosa_llm.example.smollm2.recipe import ensure

ROOT = Path(__file__).resolve().parents[2]
ZOO = ROOT / "fixtures" / "zoo"
SOURCES = (ROOT / "builder", ROOT / "runtime" / "artifact")
PACKAGES = ("furiosa-llm-onnx", "numpy", "onnx", "onnx-ir", "onnxruntime", "protobuf", "safetensors")


@dataclass(frozen=True, slots=True, kw_only=True)
class BuiltModel:
    """An artifact that is not to be changed, and what the builder reported of it."""

    folder: Path
    report: BuildReport


def artifact_of(name: str, tensor_parallel_size: int = 4, beside: Mapping[str, str] | None = None) -> Path:
    """The artifact of a model of the zoo, by the name of its folder or of a file in it; not to be changed.

    `beside` holds files to put beside the model, by name.
    """
    return built_model(name, tensor_parallel_size, tuple((beside or {}).items())).folder


@functools.cache
def built_model(name: str, tensor_parallel_size: int = 4, beside: tuple[tuple[str, str], ...] = ()) -> BuiltModel:
    """The same, with the builder's report."""
    files = [path for path in sorted((ZOO / name.partition("/")[0]).iterdir()) if path.is_file()]
    return _built(ZOO / name, _digest(files, repr((name, tensor_parallel_size, beside))), tensor_parallel_size, beside)


@functools.cache
def smollm2_artifact(shape: str, tensor_parallel_size: int = 4) -> Path:
    """The artifact of SmolLM2 in `shape`; not to be changed. Its recipe, noted beside it, stands for its bytes."""
    source: Path = ensure(shape, console=Console(quiet=True))
    options = repr((shape, tensor_parallel_size, (source / "recipe.json").read_text(encoding="utf-8")))
    return _built(source, _digest([], options), tensor_parallel_size, ()).folder


def _built(source: Path, digest: str, tensor_parallel_size: int, beside: tuple[tuple[str, str], ...]) -> BuiltModel:
    place = _generation() / digest
    with _locked(place.with_suffix(".lock")):
        if not place.exists():
            _build(source, tensor_parallel_size, beside, place)
    report = pickle.loads((place / "report").read_bytes())  # our own, written below
    return BuiltModel(folder=place / "artifact", report=report)


def _build(source: Path, tensor_parallel_size: int, beside: tuple[tuple[str, str], ...], place: Path) -> None:
    with tempfile.TemporaryDirectory(dir=place.parent) as temporary:
        if beside:
            source = Path(shutil.copytree(source, Path(temporary) / source.name))
            for file, text in beside:
                (source / file).write_text(text, encoding="utf-8")
        if (source / "model.onnx").exists():
            source /= "model.onnx"
        made = Path(temporary) / "made"
        made.mkdir()
        report = ArtifactBuilder(source, tensor_parallel_size=tensor_parallel_size).build(made / "artifact")
        (made / "report").write_bytes(pickle.dumps(replace(report, artifact=str(place / "artifact"))))
        made.rename(place)


@functools.cache
def _generation() -> Path:
    """The folder of what these sources build; what others built is removed."""
    cache = Path(os.environ.get("FURIOSA_LLM_TEST_ARTIFACTS") or ROOT / "build" / "test-artifacts")
    sources = [path for folder in SOURCES for path in sorted(folder.rglob("*.py"))]
    generation = cache / _digest(sources, repr([(package, version(package)) for package in PACKAGES]))
    generation.mkdir(parents=True, exist_ok=True)
    for other in cache.iterdir():
        if other != generation:
            shutil.rmtree(other, ignore_errors=True)
    return generation


def _digest(files: list[Path], options: str) -> str:
    digest = hashlib.sha256(options.encode())
    for path in files:
        content = path.read_bytes()
        digest.update(f"\0{path.relative_to(ROOT)}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()[:32]


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
