"""Write every file of an artifact: the weights, the two graphs, files from next to the model, and the manifest last."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from furiosa_llm.builder.lower.build import Build
from furiosa_llm.builder.lower.program_shapes import program_shapes
from furiosa_llm.builder.options import BuildOptions
from furiosa_llm.builder.source.companions import companions, eos_token_ids
from furiosa_llm.builder.source.pooling import pooling_json
from furiosa_llm.builder.write.manifest import manifest_of
from furiosa_llm.builder.write.onnx_files import program_proto, source_proto, write_bytes, write_manifest
from furiosa_llm.builder.write.output_folder import check_free_space
from furiosa_llm.builder.write.report import plan_json
from furiosa_llm.builder.write.shards import num_shards
from furiosa_llm.builder.write.streaming import FilePosition, WrittenWeights, write_weights
from furiosa_llm.runtime.artifact.adapters.files import AdapterFile
from furiosa_llm.runtime.artifact.adapters.fit import placed
from furiosa_llm.runtime.artifact.adapters.inputs import adapter_inputs
from furiosa_llm.runtime.artifact.adapters.stored import file_name, to_safetensors
from furiosa_llm.runtime.artifact.manifest import (
    PROGRAM_NAME,
    SOURCE_NAME,
    FileEntry,
    Manifest,
    ModelInfo,
    Provenance,
)
from furiosa_llm.runtime.artifact.pooling import POOLING_NAME
from furiosa_llm.runtime.artifact.progress import told
from furiosa_llm.runtime.artifact.reader import SplitModel

_LIBRARIES = ("ml_dtypes", "numpy", "onnx", "onnx_ir")


def write_artifact(
    folder: Path,
    build: Build,
    *,
    name: str,
    options: BuildOptions,
    plan: Mapping[str, Any] | None,
    adapters: Mapping[str, AdapterFile],
    workers: int,
) -> Manifest:
    """Write the artifact of `build` into `folder`; OutputError if the disk has no room.

    `plan` is written into the manifest; by default it is the build's.
    """
    tensors = build.tensors()
    shapes = program_shapes(build)
    total = sum(tensor.local_nbytes * num_shards(tensor, build.plan.mesh) for tensor in tensors)
    check_free_space(folder, total)
    weights = write_weights(folder, tensors, build.plan.mesh, _Counter(total).add, workers=workers)
    program = program_proto(build.lowered.graph, weights.placements, shapes, build.ir_version)
    original = source_proto(build.source, build.stored_initializers())
    pooling = pooling_json(build.source.path)
    files = [
        *weights.files,
        write_bytes(folder, PROGRAM_NAME, program.SerializeToString(deterministic=True)),
        write_bytes(folder, SOURCE_NAME, original.SerializeToString(deterministic=True)),
        *(write_bytes(folder, path.name, path.read_bytes()) for path in companions(build.source.path)),
        *([] if pooling is None else [write_bytes(folder, POOLING_NAME, pooling)]),
        *_write_adapters(folder, build, adapters, name),
    ]
    manifest = manifest_of(
        build,
        info=model_info(build, name, options.max_seq_len_to_capture),
        provenance=_provenance(build, options),
        weights=weights,
        shapes=shapes,
        files=files,
        plan=plan_json(build) if plan is None else plan,
    )
    write_manifest(folder, manifest)
    return manifest


def _write_adapters(folder: Path, build: Build, adapters: Mapping[str, AdapterFile], model: str) -> Iterator[FileEntry]:
    """Write each adapter as tensors of the program's inputs; raises AdapterError if one is not for this model."""
    if adapters:
        split = planned(build)
        initialized = build.source.model.graph.initializers
        given = {str(value.name): np.zeros(()) for value in build.model.graph.inputs if value.name in initialized}
        inputs = adapter_inputs(split.manifest, split.program.graph, given)
        for name, file in sorted(adapters.items()):
            yield write_bytes(folder, file_name(name), to_safetensors(placed(file, inputs, model=model)))


def planned(build: Build) -> SplitModel:
    """The artifact that `build` would give, without what is known only when its weights are written."""
    tensors, shapes = build.tensors(), program_shapes(build)
    unwritten = WrittenWeights(
        placements={t.name: FilePosition(file="", offset=0, nbytes=t.local_nbytes, sha256="") for t in tensors},
        files=(),
        source_digests=dict.fromkeys((id(tensor.source) for tensor in tensors), ""),
    )
    manifest = manifest_of(
        build,
        info=model_info(build, "", None),
        provenance=Provenance(tool="", libraries={}, options={}, source_sha256=""),
        weights=unwritten,
        shapes=shapes,
        files=(),
        plan={},
    )
    return SplitModel(
        manifest=manifest,
        program=program_proto(build.lowered.graph, unwritten.placements, shapes, build.ir_version),
        tensors={tensor.name: tensor for tensor in manifest.tensors},
    )


def model_info(build: Build, name: str, limit: int | None) -> ModelInfo:
    """What the manifest says of the model; `limit` is the longest sequence that was asked for."""
    limits = [build.max_length, limit]
    return ModelInfo(
        name=name,
        task=build.task,
        max_sequence_length=min((limit for limit in limits if limit is not None), default=None),
        vocab_size=build.vocab_size,
        eos_token_ids=eos_token_ids(build.source.path),
    )


def tool() -> str:
    """The tool that makes artifacts: this distribution and its version."""
    return f"furiosa-llm-onnx {importlib.metadata.version('furiosa-llm-onnx')}"


def _provenance(build: Build, options: BuildOptions) -> Provenance:
    return Provenance(
        tool=tool(),
        libraries={name: importlib.metadata.version(name.replace("_", "-")) for name in _LIBRARIES},
        options=options.to_json(),
        source_sha256=build.source.sha256,
    )


class _Counter:
    """Turns bytes written into progress."""

    def __init__(self, total: int) -> None:
        self._done, self._total, self._told = 0, total, told()

    def add(self, nbytes: int) -> None:
        self._done += nbytes
        self._told("write", self._done, self._total)
