"""The segments of a lane that has all ranks, and the collectives between them, as one graph: one call a step."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from onnx import NodeProto, TensorProto, helper

from furiosa_llm.runtime.artifact.graphs import renamed
from furiosa_llm.runtime.program.lanes import Exchange, Lanes, LaneSection, Part, lane_segment
from furiosa_llm.runtime.program.stacking import Shards


def joined(lanes: Lanes) -> Lanes:
    """`lanes` in one section, if there is one lane and nothing must be exchanged outside of its graph; else as it is.

    Partial sums of types that onnxruntime does not add are exchanged outside, and so is what has a shape that only a
    run tells: it is to be counted.
    """
    exchanges = [exchange for section in lanes.sections for exchange in section.exchanges]
    if len(lanes.ranks) > 1 or not all(_fits(exchange, lanes) for exchange in exchanges):
        return lanes
    nodes: list[NodeProto] = []
    initializers: dict[str, Shards] = {}
    made: set[str] = set()
    for index, section in enumerate(lanes.sections):
        segment, begun = section.segments[0], len(nodes)
        if segment is not None:
            own = {*segment.initializers, *(name for node in segment.nodes for name in node.output if name)}
            # Sections have copies of what constants are made of, which onnxruntime may fuse with the one node they are
            # for: they stay copies.
            copies = {name: f"section{index}/{name}" for name in own if name in made or name in initializers}
            initializers.update({copies.get(name, name): shards for name, shards in segment.initializers.items()})
            nodes.extend(renamed(node, copies, f"section{index}") for node in segment.nodes)
        for exchange in section.exchanges:
            nodes.extend(_as_nodes(exchange, lanes))
        made.update(name for node in nodes[begun:] for name in node.output)
    leaving = {lanes.name(rank, name) for name in lanes.program.outputs for rank in range(lanes.mesh.size)}
    whole = lane_segment(nodes, leaving, initializers)
    return replace(lanes, sections=(LaneSection(segments=(whole,), exchanges=()),))


def _fits(exchange: Exchange, lanes: Lanes) -> bool:
    """Whether the lane's graph can have the rest of `exchange`, whose parts it has added as far as it can."""
    added = exchange.total is None or isinstance(exchange.total, Part)
    return added and lanes.program.has_known_shape(lanes.types[exchange.out])


def _as_nodes(exchange: Exchange, lanes: Lanes) -> Iterator[NodeProto]:
    """What makes the result of `exchange`: the parts side by side, or their sum in the result's own type.

    In front of who reads it is a Reshape to what it is, which onnxruntime neither drops nor fuses: nodes of two
    sections that became one would round otherwise than apart.
    """
    kind = lanes.types[exchange.out]
    whole, shape = f"whole/{exchange.out}", f"shape/{exchange.out}"
    if not isinstance(exchange.total, Part):
        parts = [part.name for part in exchange.parts]
        yield helper.make_node("Concat", parts, [whole], axis=exchange.call.collective.dim or 0)
    elif lanes.types[exchange.total.name].dtype != kind.dtype:
        yield helper.make_node("Cast", [exchange.total.name], [whole], to=TensorProto.DataType.Value(kind.dtype))
    else:
        whole = exchange.total.name
    rank = len(kind.shape or ())
    same = helper.make_tensor(shape, TensorProto.INT64, [rank], [0] * rank)
    yield helper.make_node("Constant", [], [shape], value=same)
    yield helper.make_node("Reshape", [whole, shape], [exchange.out])
