"""A node as rules see it, and the types of rules, which are functions of a node."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from furiosa_llm.builder.errors import ShapeError
from furiosa_llm.builder.rules.facts import Fact, Facts, Shape
from furiosa_llm.builder.rules.rule import Rule

MICROSOFT = "com.microsoft"


def attributes_of(node: ir.Node) -> dict[str, Any]:
    """The node's attributes as plain Python values."""
    return {name: attribute.value for name, attribute in node.attributes.items()}


class SizeMismatchError(ShapeError):
    """A graph input has a dimension whose size follows from the graph; the prober sets this size and tries again."""

    def __init__(self, value: ir.Value, dim: int, found: int, expected: int, node: ir.Node) -> None:
        super().__init__(
            f'dimension {dim} of "{value.name}" must be {expected} for node {node.op_type} "{node.name}"; '
            "export the model again, its inputs contradict its weights."
        )
        self.value, self.dim, self.found, self.expected = value, dim, found, expected


@dataclasses.dataclass(frozen=True, slots=True)
class NodeView:
    """A node with what is known about its inputs and outputs, as rules see it."""

    node: ir.Node
    facts: Facts
    others: Facts
    """Facts at other sizes of the dynamic dimensions: what differs is dynamic."""
    opset: int
    """The version of the standard ops."""

    def swapped(self) -> NodeView:
        """The same node seen at the other sizes."""
        return NodeView(self.node, self.others, self.facts, self.opset)

    def has(self, port: int) -> bool:
        """Whether input `port` is there."""
        return port < len(self.node.inputs) and self.node.inputs[port] is not None

    def fact(self, port: int) -> Fact:
        """What is known about input `port`, which must be present."""
        value = self.node.inputs[port]
        assert value is not None
        return self.facts[value]

    def shape(self, port: int) -> tuple[int, ...]:
        """The shape of input `port`."""
        return self.fact(port).shape

    def out(self, port: int = 0) -> tuple[int, ...]:
        """The shape of output `port`."""
        return self.facts[self.node.outputs[port]].shape

    def rank(self, port: int) -> int:
        """The number of dimensions of input `port`."""
        return len(self.shape(port))

    def static_value(self, port: int) -> npt.NDArray[Any] | None:
        """The elements of input `port` if they are known and the same at all sizes."""
        value = self.node.inputs[port] if self.has(port) else None
        if value is None:
            return None
        first, second = self.facts[value].value, self.others[value].value
        same = first is not None and second is not None and np.array_equal(first, second)
        return first if same else None

    def is_dynamic(self, port: int, dim: int) -> bool:
        """Whether dimension `dim` of input `port` differs from run to run."""
        value = self.node.inputs[port]
        assert value is not None
        return self.facts[value].shape[dim] != self.others[value].shape[dim]

    def attribute(self, name: str, default: Any = None) -> Any:
        """An attribute's value, or `default`."""
        found = self.node.attributes.get(name)
        return default if found is None else found.value

    def axes(self, port: int, default: tuple[int, ...] | None = None) -> tuple[int, ...] | None:
        """The axes given as input `port` or as the attribute `axes`; None if given as a tensor of unknown content."""
        if self.has(port):
            value = self.static_value(port)
            return None if value is None else tuple(int(v) for v in np.atleast_1d(value))
        found = self.attribute("axes")
        return default if found is None else tuple(found)


RuleFunction = Callable[[NodeView], Rule]
Inferred = list[tuple[ir.DataType, Shape]]
"""The types and shapes of a node's outputs."""
ShapeRule = Callable[[ir.Node, Sequence[Fact | None]], Inferred]
"""Computes these from a node and what is known about its inputs."""
