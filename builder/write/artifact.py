"""From a source to an artifact: every stage in order, then the files, the manifest last, and the proof."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from furiosa_llm.builder.errors import OptionError
from furiosa_llm.builder.lower.build import Build
from furiosa_llm.builder.lower.program_shapes import program_shapes
from furiosa_llm.builder.options import BuildOptions
from furiosa_llm.builder.pipeline import Analysed, Stage, analyse_source
from furiosa_llm.builder.proof import prove
from furiosa_llm.builder.source import companions as configuration
from furiosa_llm.builder.source.load import Source
from furiosa_llm.builder.source.pooling import pooling_json
from furiosa_llm.builder.write import onnx_files
from furiosa_llm.builder.write.manifest import manifest_of
from furiosa_llm.builder.write.output_folder import check_free_space, output_folder
from furiosa_llm.builder.write.report import BuildReport, plan_json, report_of
from furiosa_llm.builder.write.shards import num_shards
from furiosa_llm.builder.write.streaming import MAX_WORKERS, write_weights
from furiosa_llm.runtime.artifact.manifest import PROGRAM_NAME, SOURCE_NAME, Manifest, ModelInfo, Provenance
from furiosa_llm.runtime.artifact.pooling import POOLING_NAME

_LIBRARIES = ("ml_dtypes", "numpy", "onnx", "onnx_ir")

Progress = Callable[[str, int, int], None]
"""Called with the stage's name, what is done and what there is to do (bytes for `write`, 0 or 1 for the others)."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Assembly:
    """How an artifact is made, whatever it is built from."""

    options: BuildOptions
    name: str
    """The artifact's."""
    load: Callable[[], Source]
    """Gives the source, its files checked."""
    lower: Callable[[Analysed, Stage], Build]
    """Plans and lowers it."""
    check: Callable[[Source, Manifest], None]
    """Raises if what was written cannot be vouched for: the source has changed meanwhile, or was damaged."""
    plan: Mapping[str, Any] | None = None
    """The manifest's; by default it is told by the build."""

    def build(self, destination: Path, *, force: bool, progress: Progress | None, workers: int | None) -> BuildReport:
        """Write the artifact to `destination`, or nothing; see `ArtifactBuilder`."""
        started = time.monotonic()
        told = progress or (lambda *_: None)

        def stage(name: str) -> None:
            told(name, 0, 1)

        threads = _checked_workers(workers)
        with output_folder(destination, force=force) as folder:
            stage("load")
            source = self.load()
            analysed = analyse_source(source, self.options.dims, fuse=self.options.fuse_attention, told=stage)
            build = self.lower(analysed, stage)
            manifest = self._write(folder, build, told, threads)
            self.check(source, manifest)
            stage("prove")
            faults = tuple(map(str, prove(folder).faults))
        seconds = time.monotonic() - started
        return report_of(build, manifest, artifact=str(destination), seconds=seconds, faults=faults)

    def _write(self, folder: Path, build: Build, told: Progress, workers: int) -> Manifest:
        """Write every file of the artifact, the manifest last; OutputError if the disk has no room."""
        tensors = build.tensors()
        shapes = program_shapes(build)
        total = sum(tensor.local_nbytes * num_shards(tensor, build.plan.mesh) for tensor in tensors)
        check_free_space(folder, total)
        weights = write_weights(folder, tensors, build.plan.mesh, _Counter(total, told).add, workers=workers)
        program = onnx_files.program_proto(build.lowered.graph, weights.placements, shapes, build.ir_version)
        original = onnx_files.source_proto(build.source, build.stored_initializers())
        companions = configuration.companions(build.source.path)
        pooling = pooling_json(build.source.path)
        files = [
            *weights.files,
            onnx_files.write_bytes(folder, PROGRAM_NAME, program.SerializeToString(deterministic=True)),
            onnx_files.write_bytes(folder, SOURCE_NAME, original.SerializeToString(deterministic=True)),
            *(onnx_files.write_bytes(folder, path.name, path.read_bytes()) for path in companions),
            *([] if pooling is None else [onnx_files.write_bytes(folder, POOLING_NAME, pooling)]),
        ]
        manifest = manifest_of(
            build,
            info=self._model_info(build),
            provenance=self._provenance(build),
            weights=weights,
            shapes=shapes,
            files=files,
            plan=plan_json(build) if self.plan is None else self.plan,
        )
        onnx_files.write_manifest(folder, manifest)
        return manifest

    def _model_info(self, build: Build) -> ModelInfo:
        path = build.source.path
        limits = [configuration.max_sequence_length(path), self.options.max_seq_len_to_capture]
        logits = build.logits
        return ModelInfo(
            name=self.name,
            task=build.task,
            max_sequence_length=min((limit for limit in limits if limit is not None), default=None),
            vocab_size=build.probes.facts[logits].shape[-1] if logits is not None else None,
            eos_token_ids=configuration.eos_token_ids(path),
        )

    def _provenance(self, build: Build) -> Provenance:
        return Provenance(
            tool=f"furiosa-llm-onnx {importlib.metadata.version('furiosa-llm-onnx')}",
            libraries={name: importlib.metadata.version(name.replace("_", "-")) for name in _LIBRARIES},
            options=self.options.to_json(),
            source_sha256=build.source.sha256,
        )


def default_name(model: Path) -> str:
    """The artifact's name where none is given: the model's file name, or its folder's if the file is called `model`.

    A folder with a model of several files has its own name.
    """
    if model.is_dir():
        return model.resolve().name
    return model.stem if model.stem != "model" else model.parent.resolve().name


def _checked_workers(workers: int | None) -> int:
    if workers is None:
        return MAX_WORKERS
    if not 1 <= workers <= MAX_WORKERS:
        raise OptionError(f"workers must be 1 to {MAX_WORKERS}, got {workers}.")
    return workers


class _Counter:
    """Turns bytes written into progress."""

    def __init__(self, total: int, told: Progress) -> None:
        self._done, self._total, self._told = 0, total, told

    def add(self, nbytes: int) -> None:
        self._done += nbytes
        self._told("write", self._done, self._total)
