"""New nodes and constants for a graph that is rewritten."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from onnx_ir.tape import Tape


class NodeWriter:
    """Makes nodes, and the constants that they read; `put_before` puts the nodes into the graph."""

    def __init__(self, graph: ir.Graph, name: Callable[[str], str]) -> None:
        """Writes for `graph`; `name` gives the name of an output or constant with a given label."""
        self._graph = graph
        self._name = name
        self._tape = Tape()

    def add(self, op_type: str, inputs: Sequence[ir.Value | None], label: str = "", **attributes: object) -> ir.Value:
        """The output of a new node with an op of the standard."""
        return self.add_all(op_type, inputs, [label], attributes=attributes)[0]

    def add_all(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        labels: Sequence[str],
        *,
        domain: str = "",
        attributes: Mapping[str, object] | None = None,
    ) -> Sequence[ir.Value]:
        """The outputs of a new node, one for each label; the node has the name of the first output."""
        outputs = [ir.Value(name=self._name(label)) for label in labels]
        given: Mapping[str, Any] = attributes or {}
        return self._tape.op_multi_out(op_type, inputs, given, outputs=outputs, domain=domain, name=outputs[0].name)

    def constant(self, array: npt.NDArray[Any], label: str = "") -> ir.Value:
        """A new initializer."""
        value = self._tape.initializer(ir.Tensor(array, name=self._name(label)))
        self._graph.register_initializer(value)
        return value

    def vector(self, *numbers: int, label: str = "") -> ir.Value:
        """A new int64 vector."""
        return self.constant(np.array(numbers, dtype=np.int64), label)

    def put_before(self, node: ir.Node) -> tuple[ir.Node, ...]:
        """Put the nodes made since the last call before `node`, and return them."""
        nodes, self._tape = tuple(self._tape.nodes), Tape()
        self._graph.insert_before(node, nodes)
        return nodes
