"""New nodes and constants for a graph, and the sizes of its inputs as values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

Kinds = Mapping[str, tuple[int | str, ...]]
"""What each dimension of each graph input is, see `furiosa_llm.builder.shapes.interface.dimension_kinds`."""


class NodeWriter:
    """Makes nodes with names of their own, and the constants that they read; the graph has them after `put_before`."""

    def __init__(self, graph: ir.Graph, names: set[str | None]) -> None:
        """Writes for `graph`; `names` are those taken, shared by all writers of one graph."""
        self._graph = graph
        self._names = names
        self._nodes: list[ir.Node] = []

    def add(self, op_type: str, inputs: Sequence[ir.Value | None], **attributes: object) -> ir.Value:
        """The output of a new node of the standard's."""
        return self.add_all(op_type, inputs, 1, "", attributes)[0]

    def add_all(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        num_outputs: int,
        domain: str,
        attributes: Mapping[str, object],
    ) -> tuple[ir.Value, ...]:
        """The outputs of a new node."""
        outputs = tuple(ir.Value(name=self._name()) for _ in range(num_outputs))
        # The function checks what it is given; its annotation lists all that an attribute may hold.
        attrs = [ir.convenience.convert_attribute(name, value) for name, value in attributes.items()]  # type: ignore[arg-type]
        self._nodes.append(ir.Node(domain, op_type, inputs, attrs, outputs=outputs, name=outputs[0].name))
        return outputs

    def constant(self, array: npt.NDArray[Any]) -> ir.Value:
        """A new initializer."""
        name = self._name()
        tensor = ir.Tensor(array, name=name)
        value = ir.Value(name=name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
        self._graph.register_initializer(value)
        return value

    def vector(self, *numbers: int) -> ir.Value:
        """A new int64 vector."""
        return self.constant(np.array(numbers, dtype=np.int64))

    def size(self, value: ir.Value, d: int) -> ir.Value:
        """Dimension `d` of `value` as an int64 vector of one element."""
        return self.add("Gather", [self.add("Shape", [value]), self.vector(d)])

    def put_before(self, node: ir.Node) -> tuple[ir.Node, ...]:
        """Put the nodes made since the last call before `node`, and return them."""
        nodes, self._nodes = tuple(self._nodes), []
        self._graph.insert_before(node, nodes)
        return nodes

    def _name(self) -> str:
        number = len(self._names)
        while f"fused/{number}" in self._names:
            number += 1
        self._names.add(f"fused/{number}")
        return f"fused/{number}"


class Sizes:
    """Sizes of the graph's inputs other than caches as int64 vectors of one element, each written once.

    A cache in place is longer than what is valid of it, so that its length says nothing.
    """

    def __init__(self, graph: ir.Graph, kinds: Kinds) -> None:
        self._graph = graph
        self._names = {v.name for v in graph.inputs} | {v.name for node in graph for v in node.outputs}
        self._names |= set(graph.initializers)
        self._new = self.writer()
        self._sources: dict[str, tuple[ir.Value, int]] = {}
        for value in graph.inputs:
            dims = kinds[str(value.name)]
            for d, kind in enumerate(dims):
                if isinstance(kind, str) and "past" not in dims:
                    self._sources.setdefault(kind, (value, d))
        self._kinds = kinds
        self._known: dict[str, ir.Value] = {}

    def writer(self) -> NodeWriter:
        """A writer of nodes that may read the sizes."""
        return NodeWriter(self._graph, self._names)

    def has(self, *kinds: str) -> bool:
        """Whether inputs other than caches have these sizes."""
        return all(kind in self._sources for kind in kinds)

    def __getitem__(self, kind: str) -> ir.Value:
        """The size `kind`; `past` is what `total` and `sequence` leave."""
        if kind not in self._known:
            if kind == "past":
                self._known[kind] = self._new.add("Sub", [self["total"], self["sequence"]])
            else:
                self._known[kind] = self._new.size(*self._sources[kind])
            self._new.put_before(self._graph[0])
        return self._known[kind]

    def replace_shape_of(self, cache: ir.Value) -> None:
        """Let every node that asks for the shape of the graph input `cache` have it from the other inputs."""
        for node in [node for node, _ in cache.uses() if node.op_type == "Shape" and not node.domain]:
            start, end = (None if a is None else a.as_int() for a in map(node.attributes.get, ("start", "end")))
            dims = self._kinds[str(cache.name)][start:end]
            parts = [self._new.vector(dim) if isinstance(dim, int) else self[dim] for dim in dims]
            shape = self._new.add("Concat", parts, axis=0)
            self._new.put_before(node)
            node.outputs[0].replace_all_uses_with(shape, replace_graph_outputs=True)
            self._graph.remove(node, safe=True)
