"""Digests of every file of the artifacts of the zoo, to compare two checkouts: `python -m tests.support.digests`.

Prints a line for each file: digest, tensor parallel size, model, file. The versions of the tool and of the libraries in
a manifest are left out. Models that are given as arguments are built instead of the zoo's.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from furiosa_llm import ArtifactBuilder

ZOO = Path(__file__).resolve().parents[2] / "fixtures" / "zoo"


def digest(file: Path) -> str:
    """SHA-256 of a file; of a manifest without what names versions, and without the digest over them."""
    data = file.read_bytes()
    if file.name == "manifest.json":
        manifest = json.loads(data)
        del manifest["digest"]
        for version in ("tool", "libraries"):
            manifest.get("provenance", manifest).pop(version, None)
        for part in manifest.get("parts", ()):
            del part["digest"]
        data = json.dumps(manifest).encode()
    return hashlib.sha256(data).hexdigest()


def digests(model: Path, size: int) -> Iterator[tuple[str, str]]:
    """The digest and the path of every file of an artifact of `model`."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "artifact"
        ArtifactBuilder(model, tensor_parallel_size=size).build(folder)
        for file in sorted(path for path in folder.rglob("*") if path.is_file()):
            yield digest(file), str(file.relative_to(folder))


def models() -> list[Path]:
    """Every model of the zoo, and every folder of it that becomes a composite artifact."""
    parts = [path for path in ZOO.glob("*/*.onnx") if path.name != "decoder_model_merged.onnx"]
    return sorted([*parts, *(path.parent for path in parts if path.name == "encoder_model.onnx")])


def main() -> None:
    """Print the digests."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", type=Path, nargs="*")
    parser.add_argument("--tp", type=int, nargs="+", default=[4, 8])
    arguments = parser.parse_args()
    for model in arguments.models or models():
        name = model.relative_to(ZOO) if model.is_relative_to(ZOO) else model
        for size in arguments.tp:
            for sha256, file in digests(model, size):
                sys.stdout.write(f"{sha256} {size} {name} {file}\n")


if __name__ == "__main__":
    main()
