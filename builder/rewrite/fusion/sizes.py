"""The sizes of a graph's inputs as values."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from furiosa_llm.builder.rewrite.writer import NodeWriter

Kinds = Mapping[str, tuple[int | str, ...]]
"""What each dimension of each graph input is, see `furiosa_llm.builder.shapes.interface.dimension_kinds`."""


class Sizes:
    """Sizes of the graph's inputs other than caches, as int64 vectors of one element, each written once.

    A cache in place is longer than its valid positions, so its length is of no use.
    """

    def __init__(self, graph: ir.Graph, kinds: Kinds) -> None:
        self._graph = graph
        self._names = {v.name for v in graph.inputs} | {v.name for node in graph for v in node.outputs}
        self._names |= set(graph.initializers)
        self._next = 0
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
        return NodeWriter(self._graph, self._name)

    def _name(self, _: str) -> str:
        number = max(len(self._names), self._next)
        while f"fused/{number}" in self._names:
            number += 1
        self._next = number + 1
        self._names.add(f"fused/{number}")
        return f"fused/{number}"

    def has(self, *kinds: str) -> bool:
        """Whether inputs other than caches have these sizes."""
        return all(kind in self._sources for kind in kinds)

    def __getitem__(self, kind: str) -> ir.Value:
        """The size `kind`; `past` is `total` minus `sequence`."""
        if kind not in self._known:
            if kind == "past":
                self._known[kind] = self._new.add("Sub", [self["total"], self["sequence"]])
            else:
                self._known[kind] = size_of(self._new, *self._sources[kind])
            self._new.put_before(self._graph[0])
        return self._known[kind]

    def replace_shape_of(self, cache: ir.Value) -> None:
        """Make every node that reads the shape of the graph input `cache` get it from the other inputs."""
        for node in [node for node, _ in cache.uses() if node.op_type == "Shape" and not node.domain]:
            start, end = (None if a is None else a.as_int() for a in map(node.attributes.get, ("start", "end")))
            dims = self._kinds[str(cache.name)][start:end]
            parts = [self._new.vector(dim) if isinstance(dim, int) else self[dim] for dim in dims]
            shape = self._new.add("Concat", parts, axis=0)
            self._new.put_before(node)
            node.outputs[0].replace_all_uses_with(shape, replace_graph_outputs=True)
            self._graph.remove(node, safe=True)


def size_of(writer: NodeWriter, value: ir.Value, d: int) -> ir.Value:
    """Dimension `d` of `value` as an int64 vector of one element."""
    return writer.add("Gather", [writer.add("Shape", [value]), writer.vector(d)])
