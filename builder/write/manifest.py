"""Put a build's manifest together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import onnx_ir as ir

from furiosa_llm.builder.factors.factor import Factor
from furiosa_llm.builder.lower.blocks import find_blocks
from furiosa_llm.builder.lower.build import Build
from furiosa_llm.builder.lower.program_shapes import ValueShape, global_shapes
from furiosa_llm.builder.shapes.interface import role_of
from furiosa_llm.builder.write.streaming import FilePosition, WrittenWeights
from furiosa_llm.runtime.artifact.dimensions import Shape
from furiosa_llm.runtime.artifact.graphs import COLLECTIVE_DOMAIN
from furiosa_llm.runtime.artifact.layout import Dim
from furiosa_llm.runtime.artifact.manifest import (
    Block,
    Collective,
    CollectiveKind,
    FileEntry,
    InputInfo,
    InputRole,
    Manifest,
    ModelInfo,
    OriginalInitializer,
    OutputInfo,
    OutputRole,
    Provenance,
    State,
    StoredTensor,
)


def manifest_of(
    build: Build,
    *,
    info: ModelInfo,
    provenance: Provenance,
    weights: WrittenWeights,
    shapes: Mapping[str, ValueShape],
    files: Sequence[FileEntry],
    plan: Mapping[str, Any],
) -> Manifest:
    """The manifest of a build whose weights are written and whose program has the local `shapes`."""
    return Manifest(
        provenance=provenance,
        model=info,
        mesh=build.plan.mesh,
        files=tuple(sorted(files, key=lambda file: file.path)),
        tensors=_tensors(build, weights.placements),
        initializers=_initializers(build, weights.source_digests),
        inputs=_inputs(build),
        outputs=_outputs(build),
        states=_states(build),
        collectives=_collectives(build, shapes),
        blocks=_blocks(build),
        plan=plan,
    )


def _tensors(build: Build, placements: Mapping[str, FilePosition]) -> tuple[StoredTensor, ...]:
    originals = build.source.model.graph.initializers.items()
    names = {id(value.const_value): name for name, value in reversed(list(originals))}
    origins = {t.name: names.get(id(t.source)) for t in build.tensors() if t.source is not None}
    return tuple(
        StoredTensor(
            name=tensor.name,
            file=placements[tensor.name].file,
            dtype=tensor.dtype.name,
            local_shape=tensor.local_shape,
            shard_axes=tensor.shard_axes,
            layout=tensor.layout,
            part=tensor.part if origins.get(tensor.name) is not None else None,
            origin=origins.get(tensor.name),
            sha256=placements[tensor.name].sha256,
        )
        for tensor in build.tensors()
    )


def _initializers(build: Build, digests: Mapping[int, str]) -> tuple[OriginalInitializer, ...]:
    stored = build.stored_initializers()
    found = []
    for name, value in build.source.model.graph.initializers.items():
        tensor = value.const_value
        assert tensor is not None
        shape = tuple(tensor.shape.numpy())
        parts = stored.get(name, ())
        digest = digests[id(tensor)] if parts else None
        found.append(OriginalInitializer(name=name, dtype=tensor.dtype.name, shape=shape, stored=parts, sha256=digest))
    return tuple(found)


def _inputs(build: Build) -> tuple[InputInfo, ...]:
    found = []
    roles = build.roles
    for (value, role), shape in zip(roles.items(), global_shapes(build, list(roles)), strict=True):
        found.append(
            InputInfo(
                name=str(value.name),
                dtype=build.probes.facts[value].dtype.name,
                shape=shape,
                layout=_static_layouts(shape, build.lowered.input_layouts[str(value.name)]),
                role="state" if value in build.states.values else cast(InputRole, role.name),
            )
        )
    return tuple(found)


def _outputs(build: Build) -> tuple[OutputInfo, ...]:
    logits = build.logits
    found = []
    values = build.model.graph.outputs
    for value, shape in zip(values, global_shapes(build, values), strict=True):
        role: OutputRole = "logits" if value is logits else "state" if value in build.states.values else "other"
        found.append(
            OutputInfo(
                name=str(value.name),
                dtype=build.probes.facts[value].dtype.name,
                shape=shape,
                layout=_static_layouts(shape, build.lowered.output_layouts[str(value.name)]),
                role=role,
            )
        )
    return tuple(found)


def _static_layouts(shape: Shape, layouts: tuple[Dim, ...]) -> tuple[Dim | None, ...]:
    return tuple(None if isinstance(size, str) else dim for size, dim in zip(shape, layouts, strict=True))


def _states(build: Build) -> tuple[State, ...]:
    batch = _fixed_batch(build)
    return tuple(
        State(
            input=str(pair.input.name),
            output=str(pair.output.name),
            sequence_dim=pair.sequence_dim,
            mode=pair.mode,
            batch_dim=None if batch is None else _place_of(batch, build.analysis.dims[pair.input]),
        )
        for pair in build.states.pairs
    )


def _fixed_batch(build: Build) -> Factor | None:
    """The dimension of the tokens that runs over several sequences, if their number is fixed."""
    dims = (build.analysis.dims[v][0] for v in build.model.graph.inputs if role_of(v) == "token_ids" and _is_fixed(v))
    return next((factor.find() for factor in dims if factor.find().size > 1), None)


def _is_fixed(tokens: ir.Value) -> bool:
    return tokens.shape is not None and len(tokens.shape) > 1 and isinstance(tokens.shape[0], int)


def _place_of(factor: Factor, dims: Sequence[Factor]) -> int | None:
    """Which of `dims` is `factor`, if one is."""
    places = [d for d, own in enumerate(dims) if own.find() is factor]
    return places[0] if len(places) == 1 else None


def _collectives(build: Build, shapes: Mapping[str, ValueShape]) -> tuple[Collective, ...]:
    nodes = (node for node in build.lowered.graph if node.domain == COLLECTIVE_DOMAIN)
    return tuple(_collective(node, shapes) for node in nodes)


def _collective(node: ir.Node, shapes: Mapping[str, ValueShape]) -> Collective:
    value = node.inputs[0]
    assert value is not None
    dtype, dims = shapes[str(value.name)]
    return Collective(
        id=str(node.name),
        kind=cast(CollectiveKind, node.op_type),
        axes=tuple(node.attributes["axes"].as_ints()),
        dim=node.attributes["dim"].as_int() if "dim" in node.attributes else None,
        dtype=dtype.name,
        shape=tuple(f"{node.name}.{d}" if dim is None else dim for d, dim in enumerate(dims)),
    )


def _blocks(build: Build) -> tuple[Block, ...]:
    spans = find_blocks(build)
    return tuple(
        Block(
            name=f"block.{number}",
            first_node=span.first_node,
            collectives=span.collectives,
            weight_nbytes=span.weight_nbytes,
            crossing=span.crossing,
        )
        for number, span in enumerate(spans)
    )
