"""Build other weights of a model with the plan of an artifact: nothing is planned again, everything is checked."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NoReturn

import onnx

from furiosa_llm.builder.errors import PlanError
from furiosa_llm.builder.options import recorded_options
from furiosa_llm.builder.pipeline import Assembly
from furiosa_llm.builder.source.folder import default_name
from furiosa_llm.builder.source.from_artifact import load_with_weights
from furiosa_llm.builder.source.load import Source
from furiosa_llm.builder.write.build_report import BuildReport
from furiosa_llm.builder.write.onnx_files import source_proto
from furiosa_llm.runtime.artifact.graphs import all_graphs
from furiosa_llm.runtime.artifact.manifest import Manifest
from furiosa_llm.runtime.artifact.progress import Progress, shown
from furiosa_llm.runtime.artifact.reader import Artifact, open_artifact
from furiosa_llm.runtime.artifact.source import read_source

_WEIGHT_TYPES = frozenset(
    (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16, onnx.TensorProto.DOUBLE)
)
"""Initializers of these types may have other elements. Initializers of other types may not, unless they are stored,
because shapes depend on them."""

_NOTES = ("doc_string", "metadata_props")
_MODEL_NOTES = (*_NOTES, "producer_name", "producer_version", "domain", "model_version", "ir_version")


def build_by_plan_of(
    artifact: str | os.PathLike[str],
    model: str | os.PathLike[str],
    save_dir: str | os.PathLike[str],
    *,
    name: str = "",
    force: bool = False,
    progress: bool | Progress | None = None,
    workers: int | None = None,
    allow_no_kernel: bool = False,
) -> BuildReport:
    """Build `model`, other weights of the model that `artifact` was built from, with that artifact's options and plan.

    Args:
        artifact: Folder of the artifact whose plan is taken; its weights are not read.
        model: The .onnx file with the new weights.
        save_dir: Folder to write.
        name: The new artifact's name; from the model's path if empty.
        force: Replace `save_dir` if it is an artifact already.
        progress: See `ArtifactBuilder.build`.
        workers: See `ArtifactBuilder.build`.
        allow_no_kernel: See `ArtifactBuilder.build`.

    Raises:
        PlanError: The model's graph is not the artifact's; the first difference is named.
        ArtifactError: `artifact` is not one.
        BuildError: As a build of the model would.
    """
    opened = open_artifact(artifact, full=False)
    options = recorded_options(opened.manifest.provenance.options)

    def load_same() -> Source:
        source = load_with_weights(Path(model), options.fixed, options.lora_modules)
        _check_same_graph(source, opened)
        return source

    def check(source: Source, manifest: Manifest) -> None:
        source.guard.check_unchanged()
        _check_same_layouts(opened.manifest, manifest)

    assembly = Assembly(
        options=options,
        name=name or default_name(Path(model)),
        load=load_same,
        check=check,
        allow_no_kernel=allow_no_kernel,
        plan=opened.manifest.plan,
    )
    with shown(progress):
        return assembly.build(Path(save_dir), force=force, workers=workers)


def _check_same_graph(source: Source, artifact: Artifact) -> None:
    """Raise PlanError unless the model is the artifact's except for its weights' elements and notes for people."""
    stored = {entry.name for entry in artifact.manifest.initializers if entry.stored}
    expected = read_source(artifact)
    _check_initializers(source.proto, expected)
    found = source_proto(source, stored)
    originals = {tensor.name: tensor for tensor in expected.graph.initializer}
    for tensor in found.graph.initializer:
        steers = tensor.name not in stored and tensor.data_type not in _WEIGHT_TYPES
        if steers and tensor.raw_data != originals[tensor.name].raw_data:
            _refuse(f"other elements of initializer {tensor.name!r:.80}", "the same, for they may steer shapes")
    for model in (found, expected):
        _strip(model)
    for node, other in zip(found.graph.node, expected.graph.node, strict=False):
        if node != other:
            _refuse(f"node {node.name!r:.80} ({node.op_type})", f"{other.name!r:.80} ({other.op_type}) as it is there")
    if len(found.graph.node) != len(expected.graph.node):
        _refuse(f"{len(found.graph.node)} nodes", f"{len(expected.graph.node)}")
    if found != expected:
        _refuse("other inputs, outputs, functions or operator set versions", "the same")


def _check_initializers(found: onnx.ModelProto, expected: onnx.ModelProto) -> None:
    kinds, wanted = _kinds(found), _kinds(expected)
    for name, kind in wanted.items():
        if name not in kinds:
            _refuse(f"no initializer {name!r:.80}", kind)
        if kinds[name] != kind:
            _refuse(f"{kinds[name]} for initializer {name!r:.80}", kind)
    for name, kind in kinds.items():
        if name not in wanted:
            _refuse(f"an initializer {name!r:.80}, {kind}", "none of that name")


def _kinds(model: onnx.ModelProto) -> dict[str, str]:
    return {t.name: f"{onnx.TensorProto.DataType.Name(t.data_type)} {list(t.dims)}" for t in model.graph.initializer}


def _strip(model: onnx.ModelProto) -> None:
    """Remove what does not make graphs different: initializers, which are compared separately, and notes for people."""
    for field in _MODEL_NOTES:
        model.ClearField(field)
    for graph in (model.graph, *all_graphs(model.graph.node)):
        for field in (*_NOTES, "name", "value_info"):
            graph.ClearField(field)
        for part in (*graph.node, *graph.input, *graph.output):
            for field in _NOTES:
                part.ClearField(field)
    model.graph.ClearField("initializer")


def _check_same_layouts(before: Manifest, after: Manifest) -> None:
    layouts = [{(t.origin, t.part): t.layout for t in m.tensors if t.origin is not None} for m in (before, after)]
    for key, layout in layouts[0].items():
        if layouts[1].get(key) != layout:
            raise PlanError(
                f"this release lays initializer {key[0]!r:.80} out otherwise than {before.provenance.tool} did; "
                "build it anew, without --reuse-plan."
            )


def _refuse(found: str, expected: str) -> NoReturn:
    raise PlanError(
        f"the model's graph is not the one that the plan was made for: found {found}, expected {expected}; "
        "build it anew, without --reuse-plan."
    )
