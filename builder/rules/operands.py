"""What an op takes: the numbers of inputs and outputs, the attributes, and operand shapes that fit each other."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import onnx_ir as ir
from onnx import AttributeProto

from furiosa_llm.builder.rules.facts import Shape

Shapes = Sequence[Shape | None]
OperandCheck = Callable[[ir.Node, Shapes], str | None]
"""What is wrong with the shapes of a node's inputs, if anything."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Operands:
    """What an op demands of its operands' shapes where ONNX's own shape inference does not check it.

    onnxruntime's own ops have no shape inference at all: their rules may count on what is checked here.
    """

    ranks: Mapping[int, Sequence[int]] = dataclasses.field(default_factory=dict)
    """Input -> the numbers of dimensions that it may have."""
    along_axis: bool = False
    """Whether the op works along a dimension of input 0, which a scalar does not have."""
    axis: tuple[int, int] | None = (0, -1)
    """What to add to minus the rank for the least `axis`, and to the rank for the greatest; None: see `check`."""
    check: OperandCheck | None = None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Definition:
    """What an op takes and gives."""

    inputs: range
    outputs: range
    required: frozenset[int]
    """The positions of inputs that may not be left out."""
    attributes: Mapping[str, int]
    """Name -> the number of its type."""
    required_attributes: frozenset[str]
    takes_others: bool = False
    """Whether the op may have attributes that are not listed here."""


def takes(inputs: range, required: Sequence[int], *integers: str, outputs: int = 1) -> Definition:
    """The definition of one of onnxruntime's ops: `integers` are its required attributes.

    See https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md.
    """
    return Definition(
        inputs=inputs,
        outputs=range(1, outputs + 1),
        required=frozenset(required),
        attributes=dict.fromkeys(integers, AttributeProto.INT),
        required_attributes=frozenset(integers),
        takes_others=True,
    )


def axis_fault(node: ir.Node, shapes: Shapes, lowest: int = 0, highest: int = -1) -> str | None:
    """What is wrong with the axis, if anything: kernels refuse an axis out of range, shape inference often does not."""
    attribute = node.attributes.get("axis")
    if attribute is None:
        return None
    rank = len(shapes[0]) if shapes and shapes[0] is not None else 0
    axis = attribute.as_int()
    if rank and not -rank + lowest <= axis <= rank + highest:
        return f"there is no axis {axis}"
    return None


def has(shapes: Shapes, port: int) -> bool:
    """Whether input `port` is there."""
    return port < len(shapes) and shapes[port] is not None


def of_one_batch(places: Mapping[int, int], then: OperandCheck | None = None) -> OperandCheck:
    """A check that inputs are of one sequence, or of equally many: `places` says which dimension counts them.

    `then` is checked behind it.
    """

    def check(node: ir.Node, shapes: Shapes) -> str | None:
        found: dict[int, int] = {}
        for port, d in places.items():
            shape = shapes[port] if port < len(shapes) else None
            if shape is not None and len(shape) > d and shape[d] != 1:
                found.setdefault(shape[d], port)
        if len(found) > 1:
            (one, first), (other, second), *_ = found.items()
            return f"input {first} is of {one} sequences, input {second} of {other}"
        return None if then is None else then(node, shapes)

    return check


def over_all_keys(keys: Sequence[int], past: int, masks: Mapping[int, Sequence[int]]) -> OperandCheck:
    """A check that masks are for all positions, old and new: `keys` are the inputs that may hold the new ones, `past`
    holds the old ones, and `masks` says with how many dimensions an input is a mask for each position, in its last one.
    """

    def check(node: ir.Node, shapes: Shapes) -> str | None:
        shared = node.attributes.get("past_present_share_buffer")
        if shared is not None and shared.as_int():
            return None
        new, old = (next((shapes[port] for port in ports if has(shapes, port)), None) for ports in (keys, (past,)))
        if new is None:
            return None
        total = new[2 if len(new) == 4 else 1] + (0 if old is None else old[-2])
        for port, ranks in masks.items():
            shape = shapes[port] if has(shapes, port) else None
            if shape is not None and len(shape) in ranks and shape[-1] not in (1, total):
                return f"input {port} is for {shape[-1]} positions instead of {total}"
        return None

    return check


NOTHING_SPECIAL = Operands()
AXES_INPUT = Operands(ranks={1: (0, 1)})
"""The axes in input 1 are a list or one number."""
ALONG_AXIS = Operands(along_axis=True)
SCALED = Operands(axis=None, check=lambda node, shapes: None if shapes[1] in ((), (1,)) else axis_fault(node, shapes))
"""The axis does not matter if there is one scale for all elements."""
