"""The placements that collectives give, and whether each collective is the one that its input needs."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx_ir as ir

from furiosa_llm.builder.proof import pieces
from furiosa_llm.builder.proof.interpretation import LocalFacts
from furiosa_llm.builder.proof.pieces import Dim, Gathered
from furiosa_llm.builder.proof.placement import REBUILD, ContradictionError, Held, Placement
from furiosa_llm.runtime.artifact.layout import Mesh


def transfer(node: ir.Node, held: Held | None, mesh: Mesh) -> list[Held]:
    """The output's placement; ContradictionError if the collective is not what its input needs."""
    if not isinstance(held, Placement):
        raise ContradictionError(f"a collective of a {held}", "a tensor that is partial or split", REBUILD)
    if held.scale != 1:
        raise ContradictionError("a mean of parts that is not divided by their number", "a product first", REBUILD)
    axes = tuple(node.attributes["axes"].as_ints()) if "axes" in node.attributes else ()
    if node.op_type == "AllReduce":
        return [_all_reduce(held, axes)]
    if node.op_type == "AllGather":
        return [_all_gather(held, axes, node.attributes["dim"].as_int(), mesh)]
    raise ContradictionError(f"a collective {node.op_type}", "AllReduce or AllGather", REBUILD)


def _all_reduce(data: Placement, axes: tuple[int, ...]) -> Placement:
    if data.partial != frozenset(axes) or not axes or len(set(axes)) != len(axes):
        raise ContradictionError(
            f"an AllReduce over axes {list(axes)} of a tensor that is partial over {sorted(data.partial)}",
            "a sum over exactly the axes over which the tensor is partial: others are counted too often",
            REBUILD,
        )
    return dataclasses.replace(data, partial=frozenset())


def _all_gather(data: Placement, axes: tuple[int, ...], d: int, mesh: Mesh) -> Placement:
    if not 0 <= d < len(data.dims):
        raise ContradictionError(f"an AllGather of dimension {d}", f"one of {len(data.dims)}", REBUILD)
    dim = _with_axes(data.dims[d], axes, mesh)
    if data.partial:
        raise ContradictionError("an AllGather of a partial sum", "an AllReduce first", REBUILD)
    if set(axes) != set(pieces.axes_of(dim)) or not axes or len(set(axes)) != len(axes):
        raise ContradictionError(
            f"an AllGather over axes {list(axes)} of a dimension {d} that is split as ({pieces.text(dim)})",
            "the axes that the dimension is split over",
            REBUILD,
        )
    return dataclasses.replace(data, dims=(*data.dims[:d], _gathered(dim, axes, mesh), *data.dims[d + 1 :]))


def _with_axes(dim: Dim, axes: tuple[int, ...], mesh: Mesh) -> Dim:
    """Copies, read as a split over those of `axes` that nothing else in the dimension is split over."""
    missing = tuple(pieces.Axis(a, mesh.shape[a]) for a in axes if a not in pieces.axes_of(dim))
    place = next((i for i, piece in enumerate(dim) if isinstance(piece, pieces.Copies)), None)
    if not missing or place is None:
        return dim
    copies = dim[place]
    assert isinstance(copies, pieces.Copies)
    return pieces.join(dim[:place], missing, pieces.run(copies.count), dim[place + 1 :])


def _gathered(dim: Dim, axes: tuple[int, ...], mesh: Mesh) -> Dim:
    group = mesh.groups(axes)[0]
    order = np.concatenate([pieces.index_map(dim, mesh, rank) for rank in group])
    size = pieces.global_size(dim)
    if np.array_equal(order, np.arange(size[0])):
        return pieces.run(size)
    return (Gathered(size[0], order.astype(np.int64).tobytes()),)


def is_ordering(node: ir.Node, held: Held | None) -> bool:
    """Whether a Gather may put gathered parts in order."""
    return node.op_type == "Gather" and isinstance(held, Placement) and _unordered(node, held) is not None


def _unordered(node: ir.Node, data: Placement) -> Gathered | None:
    if not data.dims:
        return None
    axis = (node.attributes["axis"].as_int() if "axis" in node.attributes else 0) % len(data.dims)
    dim = data.dims[axis]
    return dim[0] if len(dim) == 1 and isinstance(dim[0], Gathered) else None


def put_in_order(node: ir.Node, data: Placement, facts: LocalFacts, constant: np.ndarray | None) -> list[Held]:
    """The outputs of a Gather that undoes the order of an AllGather and drops its padding."""
    found = _unordered(node, data)
    assert found is not None
    axis = (node.attributes["axis"].as_int() if "axis" in node.attributes else 0) % len(data.dims)
    values = facts.values(node.inputs[1])
    positions = constant if values is None else values[0]
    order = np.frombuffer(found.order, dtype=np.int64)
    right = (
        positions is not None
        and positions.shape == (found.size,)
        and bool(((positions >= 0) & (positions < len(order))).all())
        and np.array_equal(order[positions], np.arange(found.size))
    )
    if not right:
        raise ContradictionError("gathered parts that are put in another order", "the order of the whole", REBUILD)
    whole = pieces.run((found.size, found.size))
    return [dataclasses.replace(data, dims=(*data.dims[:axis], whole, *data.dims[axis + 1 :]))]
