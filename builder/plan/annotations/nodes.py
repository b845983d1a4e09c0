"""The annotations of a model, node by node, and the shapes that it declares."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import onnx

from furiosa_llm.runtime.artifact.graphs import all_nodes

DeclaredShape = tuple[int | str | None, ...]
"""For each dimension its size, its symbol, or None if nothing is said of it."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Annotation:
    """What one node says for one configuration."""

    node: onnx.NodeProto
    number: int
    """The node's place among all nodes of the model."""
    label: str
    """The node for messages: `MatMul "/lm_head/MatMul"`."""
    configuration: str
    specs: tuple[onnx.ShardingSpecProto, ...]
    stage: int | None
    is_inner: bool
    """Whether the node is inside a branch, a loop or a function, where names have another scope."""


def label_of(node: onnx.NodeProto) -> str:
    """A node for messages: its operator and its name, or what it computes if it has none."""
    if node.name:
        return f'{node.op_type} "{node.name}"'
    output = next((name for name in node.output if name), "")
    return f'{node.op_type} of "{output}"' if output else node.op_type


def annotations_of(model: onnx.ModelProto) -> Iterator[Annotation]:
    """Every annotation of the model's nodes, those in branches, loops and functions included."""
    for number, (node, is_inner) in enumerate(nodes_of(model)):
        for entry in node.device_configurations:
            yield Annotation(
                node=node,
                number=number,
                label=label_of(node),
                configuration=entry.configuration_id,
                specs=tuple(entry.sharding_spec),
                stage=entry.pipeline_stage if entry.HasField("pipeline_stage") else None,
                is_inner=is_inner,
            )


def nodes_of(model: onnx.ModelProto) -> Iterator[tuple[onnx.NodeProto, bool]]:
    """Every node of the model, and whether it is inside a branch, a loop or a function."""
    for node in model.graph.node:
        yield from ((inner, inner is not node) for inner in all_nodes([node]))
    for function in model.functions:
        yield from ((node, True) for node in all_nodes(function.node))


def declared_shapes(model: onnx.ModelProto) -> dict[str, DeclaredShape]:
    """The shapes that the main graph declares, of inputs, outputs, weights and other values."""
    graph = model.graph
    found: dict[str, DeclaredShape] = {}
    for value in (*graph.value_info, *graph.output, *graph.input):
        if value.type.HasField("tensor_type") and value.type.tensor_type.HasField("shape"):
            found[value.name] = tuple(_size(dim) for dim in value.type.tensor_type.shape.dim)
    found.update((tensor.name, tuple(tensor.dims)) for tensor in graph.initializer)
    for node in graph.node:
        if node.op_type == "Constant" and len(node.output) == 1:
            found.update((node.output[0], tuple(a.t.dims)) for a in node.attribute if a.name == "value")
    return found


def declared_ranks(model: onnx.ModelProto) -> dict[str, int]:
    """The numbers of dimensions that the main graph declares."""
    return {name: len(shape) for name, shape in declared_shapes(model).items()}


def _size(dim: onnx.TensorShapeProto.Dimension) -> int | str | None:
    if dim.HasField("dim_value"):
        return dim.dim_value
    return dim.dim_param or None


def devices_of(spec: onnx.ShardingSpecProto) -> Sequence[Sequence[int]]:
    """For each entry of a spec's device list the devices that it stands for."""
    groups = {entry.key: tuple(entry.value) for entry in spec.index_to_device_group_map}
    return [groups.get(key, (key,)) for key in spec.device]
