"""Idle ranks: those whose partial sums are zero because their shards of a weight are nothing but padding.

Three key heads of a model on eight ranks, two ranks for each, leave two ranks without one: they would compute zeros,
for others to add. Padding is stored as zeros, and multiplied by finite numbers it stays zero.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping

from onnx import NodeProto

from furiosa_llm.runtime.artifact.graphs import used_names
from furiosa_llm.runtime.artifact.layout import Cat, Dim, Leaf, Mesh, parts_of
from furiosa_llm.runtime.artifact.manifest import Manifest
from furiosa_llm.runtime.program.segments import Program

OnRanks = frozenset[tuple[int, str]]
"""(rank, value) pairs."""

_ZERO_BY_ONE: Mapping[str, tuple[int, ...]] = {
    "MatMul": (0, 1),
    "MatMulNBits": (2,),
    "DequantizeLinear": (1,),
    "Cast": (0,),
    "Reshape": (0,),
    "Transpose": (0,),
}
"""Operands of which one that is all zeros makes a result of zeros; of quantised weights these are the scales."""
_BIAS = 5
"""The operand of MatMulNBits that is added to its product."""


def padded_shards(manifest: Manifest) -> OnRanks:
    """The shards of stored tensors that are nothing but padding."""
    mesh = manifest.mesh

    @functools.cache  # the layers of a model have the same few layouts
    def padded(layout: tuple[Dim, ...]) -> list[int]:
        return [rank for rank in range(mesh.size) if any(_is_padding(dim, mesh, rank) for dim in layout)]

    return frozenset(
        (rank, tensor.name)
        for tensor in manifest.tensors
        if tensor.layout is not None and tensor.shard_axes
        for rank in padded(tensor.layout)
    )


def zero_parts(program: Program, mesh: Mesh, padded: OnRanks) -> OnRanks:
    """What ranks give to sums, and is zero; nothing of sums that have nothing else."""
    zeros = set(padded)
    for node in program.model.graph.node if padded else ():
        zeros.update((rank, node.output[0]) for rank in range(mesh.size) if _is_zero(node, rank, zeros))
    sums = [
        {(rank, call.input) for rank in group}
        for section in program.sections
        for call in section.collectives
        if call.collective.kind == "AllReduce"
        for group in mesh.groups(call.collective.axes)
    ]
    alone = {part for parts in sums if parts <= zeros for part in parts}
    return frozenset({part for parts in sums for part in parts & zeros} - alone)


def _is_zero(node: NodeProto, rank: int, zeros: Collection[tuple[int, str]]) -> bool:
    if node.op_type == "Add":
        return all((rank, name) in zeros for name in used_names(node))
    ports = _ZERO_BY_ONE.get(node.op_type, ())
    return any((rank, node.input[port]) in zeros for port in ports) and not any(node.input[_BIAS:])


def _is_padding(dim: Dim, mesh: Mesh, rank: int) -> bool:
    """Whether all local indices of `rank` are padding."""
    if isinstance(dim, Leaf):
        count = -(-dim.size // mesh.parts(dim.axes))
        return dim.size > 0 and mesh.position(rank, dim.axes) * count >= dim.size
    parts = [_is_padding(part, mesh, rank) for part in parts_of(dim)]
    return all(parts) if isinstance(dim, Cat) else any(parts)
