"""`ArtifactBuilder`: an ONNX model in, an artifact out."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from furiosa_llm.builder import configuration, writer
from furiosa_llm.builder.build import Build
from furiosa_llm.builder.compile import analyse_model
from furiosa_llm.builder.errors import OptionError
from furiosa_llm.builder.load import Source
from furiosa_llm.builder.manifest_of import manifest_of
from furiosa_llm.builder.planner import MAX_PADDING
from furiosa_llm.builder.program_shapes import program_shapes
from furiosa_llm.builder.proof import prove
from furiosa_llm.builder.report import BuildReport, report_of
from furiosa_llm.builder.tactics import Tactics
from furiosa_llm.builder.tensor_parallel import check_tensor_parallel_size, mesh_of
from furiosa_llm.builder.weights import num_shards
from furiosa_llm.runtime.artifact.manifest import PROGRAM_NAME, SOURCE_NAME, Manifest, ModelInfo, Provenance

_LIBRARIES = ("ml_dtypes", "numpy", "onnx", "onnx_ir")

Progress = Callable[[str, int, int], None]
"""Called with the stage's name, what is done and what there is to do (bytes for `write`, 0 or 1 for the others)."""


class ArtifactBuilder:
    """Builds an artifact from an ONNX model.

    Args:
        model: Path of the .onnx file. What lies beside it (tokenizer, configuration) goes into the artifact.
        name: The artifact's name; the model's folder or file name if empty.
        tensor_parallel_size: How many PEs share each matrix: 4 or 8.
        max_seq_len_to_capture: The longest sequence to serve, in tokens; at most, and if None, the model's own limit.
        dims: Sizes of dynamic input dimensions that do not follow from the model, by symbol or `input.symbol`.
        max_padding: By how much padding may make one dimension larger (1.34: a third).
        tactics: Choices that the planner must keep (see `read_tactics`).
        experimental_tp: Also allow tensor_parallel_size 1, 2 and 16.
        fuse_attention: Replace attention that is written out in small ops by one op with its cache in place, where both
            give the same numbers.
    """

    def __init__(
        self,
        model: str | os.PathLike[str],
        name: str = "",
        *,
        tensor_parallel_size: int = 4,
        max_seq_len_to_capture: int | None = None,
        dims: Mapping[str, int] | None = None,
        max_padding: float = MAX_PADDING,
        tactics: Tactics | None = None,
        experimental_tp: bool = False,
        fuse_attention: bool = True,
    ) -> None:
        check_tensor_parallel_size(tensor_parallel_size, experimental=experimental_tp)
        if not max_padding >= 1:  # not a number is not, either
            raise OptionError(f"max_padding must be at least 1 (no padding), got {max_padding}.")
        if max_seq_len_to_capture is not None and max_seq_len_to_capture < 1:
            raise OptionError(f"max_seq_len_to_capture must be at least 1, got {max_seq_len_to_capture}.")
        self._model = Path(model)
        self._name = name
        self._mesh = mesh_of(tensor_parallel_size)
        self._max_seq_len = max_seq_len_to_capture
        self._dims = dict(dims or {})
        self._max_padding = max_padding
        self._tactics = tactics
        self._fuse_attention = fuse_attention

    def build(
        self, save_dir: str | os.PathLike[str], *, force: bool = False, progress: Progress | None = None
    ) -> BuildReport:
        """Write the artifact to `save_dir`; raises a BuildError and leaves nothing behind if that fails."""
        started = time.monotonic()
        told = progress or (lambda *_: None)
        destination = Path(save_dir)
        with writer.output_folder(destination, force=force) as folder:
            analysed = analyse_model(
                self._model,
                self._dims,
                weights=True,
                fuse=self._fuse_attention,
                told=lambda stage: told(stage, 0, 1),
            )
            build = analysed.lowered_for(
                self._mesh,
                max_padding=self._max_padding,
                tactics=self._tactics,
                told=lambda stage: told(stage, 0, 1),
            )
            manifest = self._write(folder, build, told)
            told("prove", 0, 1)
            faults = tuple(map(str, prove(folder).faults))
        seconds = time.monotonic() - started
        return report_of(build, manifest, artifact=str(destination), seconds=seconds, faults=faults)

    def _write(self, folder: Path, build: Build, told: Progress) -> Manifest:
        """Write every file of the artifact, the manifest last."""
        tensors = build.tensors()
        shapes = program_shapes(build)
        total = sum(tensor.local_nbytes * num_shards(tensor, self._mesh) for tensor in tensors)
        placements, files = writer.write_weights(folder, tensors, self._mesh, _Counter(total, told).add)
        program = writer.program_proto(build.lowered.graph, placements, shapes, build.ir_version)
        original = writer.source_proto(build.source, build.stored_initializers())
        files.append(writer.write_bytes(folder, PROGRAM_NAME, program.SerializeToString(deterministic=True)))
        files.append(writer.write_bytes(folder, SOURCE_NAME, original.SerializeToString(deterministic=True)))
        companions = configuration.companions(build.source.path)
        files += [writer.write_bytes(folder, path.name, path.read_bytes()) for path in companions]
        manifest = manifest_of(
            build,
            info=self._model_info(build),
            provenance=self._provenance(build.source),
            placements=placements,
            shapes=shapes,
            files=files,
        )
        writer.write_manifest(folder, manifest)
        return manifest

    def _model_info(self, build: Build) -> ModelInfo:
        path = build.source.path
        limits = [n for n in (configuration.max_sequence_length(path), self._max_seq_len) if n is not None]
        logits = build.logits
        return ModelInfo(
            name=self._name or (path.stem if path.stem != "model" else path.resolve().parent.name),
            task=build.task,
            max_sequence_length=min(limits, default=None),
            vocab_size=build.probes.facts[logits].shape[-1] if logits is not None else None,
            eos_token_ids=configuration.eos_token_ids(path),
        )

    def _provenance(self, source: Source) -> Provenance:
        options: dict[str, Any] = {
            "tensor_parallel_size": self._mesh.size,
            "max_seq_len_to_capture": self._max_seq_len,
            "dims": dict(sorted(self._dims.items())),
            "max_padding": self._max_padding,
            "tactics": [] if self._tactics is None else self._tactics.to_json(),
            "fuse_attention": self._fuse_attention,
        }
        digest = hashlib.sha256()
        with source.path.open("rb") as file:
            while chunk := file.read(2**20):
                digest.update(chunk)
        return Provenance(
            tool=f"furiosa-llm-onnx {importlib.metadata.version('furiosa-llm-onnx')}",
            libraries={name: importlib.metadata.version(name.replace("_", "-")) for name in _LIBRARIES},
            options=options,
            source_sha256=digest.hexdigest(),
        )


class _Counter:
    """Turns bytes written into progress."""

    def __init__(self, total: int, told: Progress) -> None:
        self._done, self._total, self._told = 0, total, told

    def add(self, nbytes: int) -> None:
        self._done += nbytes
        self._told("write", self._done, self._total)
