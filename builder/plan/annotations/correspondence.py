"""Find the nodes and values of a model file again in the graph that was made of it."""

from __future__ import annotations

from collections.abc import Iterator

import onnx
import onnx_ir as ir


class Correspondence:
    """Which nodes and values of a model's own graph are which in the normalised (and perhaps simplified) one.

    Normalising keeps the names of what it keeps, except for aliases: it removes an Identity or a Dropout, and the value
    keeps one of the two names. It keeps one of several equal nodes; the others are found by what reads them. Nodes that
    were folded or inlined have no counterpart.
    """

    def __init__(self, original: onnx.GraphProto, graph: ir.Graph) -> None:
        self._values: dict[str, ir.Value] = {str(v.name): v for v in graph.inputs}
        self._values.update((str(v.name), v) for v in graph.initializers.values())
        self._values.update((str(v.name), v) for node in graph for v in node.outputs if v.name)
        for node in original.node:
            self._learn_alias(node)
        for node in reversed(original.node):  # what a node reads, once the node itself is known
            self._learn_alias(node)
            counterpart = self.node(node)
            for name, value in zip(node.input, counterpart.inputs if counterpart is not None else (), strict=False):
                if name and value is not None:
                    self._values.setdefault(name, value)

    def _learn_alias(self, node: onnx.NodeProto) -> None:
        if node.op_type not in ("Identity", "Dropout") or node.domain or not node.input or not node.output:
            return
        for known, other in ((node.input[0], node.output[0]), (node.output[0], node.input[0])):
            if known in self._values:
                self._values.setdefault(other, self._values[known])

    def value(self, name: str) -> ir.Value | None:
        """The value that a name of the original graph stands for, if it is still there."""
        return self._values.get(name)

    def node(self, original: onnx.NodeProto) -> ir.Node | None:
        """The node that computes what `original` computes with the same operator and as many inputs."""
        found = self.value(next((name for name in original.output if name), ""))
        node = found.producer() if found is not None else None
        if node is None or (node.op_type, node.domain) != (original.op_type, _domain(original)):
            return None
        return node if len(node.inputs) == len(original.input) else None

    def operands(self, original: onnx.NodeProto) -> Iterator[tuple[str, int, bool, ir.Value]]:
        """Every tensor of a node that is still there: its original name, its port, whether it is an output, the value.

        A vector that several nodes share is a value of its own at each of them.
        """
        node = self.node(original)
        for is_output, names in enumerate((original.input, original.output)):
            values = () if node is None else node.outputs if is_output else node.inputs
            for port, name in enumerate(names):
                value = values[port] if port < len(values) else self.value(name)
                if name and value is not None:
                    yield name, port, bool(is_output), value


def _domain(node: onnx.NodeProto) -> str:
    return "" if node.domain == "ai.onnx" else node.domain
