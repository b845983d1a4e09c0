"""Repeated layers: find runs of equal pieces of a graph, and make a small graph in which one copy stands for many.

Two nodes are alike if they do the same to operands of the same facts, and are wired alike: to the same value, to a
node equally far back, or to a weight or input of their own that plays the same part throughout the copy. Names play no
part, so that layers are found in any exporter's graph; a period may be one layer or several.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from furiosa_llm.builder.shapes.interpreter import Fact, Facts, attribute_key

_CANDIDATES = 16
"""How many distances between nodes of one kind are tried as a period."""
_KEPT = 3
"""Copies that a reduced graph keeps: the first, one that stands for all copies between, and the last."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Repeat:
    """A run of equal pieces of a graph: nodes `start` to `start + period * copies`, in the graph's order."""

    start: int
    period: int
    copies: int

    @property
    def stop(self) -> int:
        """The node after the last copy."""
        return self.start + self.period * self.copies

    def copy_of(self, index: int) -> int:
        """Which copy node `index` is in."""
        return (index - self.start) // self.period

    def kept(self, index: int) -> int:
        """The node of a kept copy that stands for node `index` of the run."""
        copy = self.copy_of(index)
        return index - (copy - 1) * self.period if 1 < copy < self.copies - 1 else index


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Reduced:
    """A graph with fewer copies of its layers."""

    graph: ir.Graph
    stand_ins: Mapping[ir.Value, ir.Value]
    """Value of the whole graph -> the value of the reduced graph that stands for it."""
    counts: Mapping[ir.Value, int]
    """How many values of the whole graph a value of the reduced graph stands for."""

    def facts(self, whole: Facts) -> Facts:
        """The facts of the reduced graph's values."""
        return {new: whole[old] for old, new in self.stand_ins.items() if old in whole}


class _Wiring:
    """A graph's nodes in order, with what they do and where their operands come from."""

    def __init__(self, graph: ir.Graph, facts: Sequence[Facts]) -> None:
        self.nodes = list(graph)
        self.index = {node: i for i, node in enumerate(self.nodes)}
        facts_of = _FactNumbers(facts)
        numbers: dict[object, int] = {}
        keys = (_key(node, facts_of) for node in self.nodes)
        self.kinds = np.array([numbers.setdefault(key, len(numbers)) for key in keys], dtype=np.int64)

    def producer(self, value: ir.Value) -> tuple[int, int] | None:
        """The number of the node that gives `value`, and the number of the output."""
        node = value.producer()
        return None if node is None else (self.index[node], value.index() or 0)

    def alike(self, i: int, j: int, own: Mapping[ir.Value, ir.Value]) -> dict[ir.Value, ir.Value] | None:
        """The pairs of the own weights and inputs of nodes i < j if these are wired alike, else None.

        `own` are the pairs that were found before in the same copy.
        """
        pairs: dict[ir.Value, ir.Value] = {}
        for a, b in zip(self.nodes[i].inputs, self.nodes[j].inputs, strict=True):
            if a is None or b is None:  # both are None: their nodes have one key
                continue
            first, second = self.producer(a), self.producer(b)
            if first is None and second is None:
                if own.get(a, b) is not b or pairs.setdefault(a, b) is not b:
                    return None
            elif a is not b and (
                first is None or second is None or (i - first[0], first[1]) != (j - second[0], second[1])
            ):
                return None
        taken = {**own, **pairs}
        return pairs if len(set(taken.values())) == len(taken) else None


class _FactNumbers:
    """Numbers what is known of a value: values that are alike have one number. Sizes and positions make a difference,
    trained numbers (small biases are known) do not.
    """

    def __init__(self, facts: Sequence[Facts]) -> None:
        self._facts = facts
        self._by_content: dict[object, int] = {}
        self._by_object: dict[int, int] = {}

    def of(self, value: ir.Value | None) -> tuple[int, ...]:
        return () if value is None else tuple(self._number(facts[value]) for facts in self._facts)

    def _number(self, fact: Fact) -> int:
        number = self._by_object.get(id(fact))  # the interpreter makes equal facts one object
        if number is None:
            counts = fact.value is not None and fact.value.dtype.kind in "iub"
            content = fact.value.tobytes() if counts and fact.value is not None else None
            key = (fact.dtype, fact.shape, fact.zero, content)
            number = self._by_object[id(fact)] = self._by_content.setdefault(key, len(self._by_content))
        return number


def _key(node: ir.Node, facts: _FactNumbers) -> object:
    """A key for what a node does, and to operands of which facts."""
    attributes = tuple(sorted((name, attribute_key(a)) for name, a in node.attributes.items()))
    operands = tuple(facts.of(v) for v in (*node.inputs, *node.outputs))
    origins = tuple(None if v is None else (v.is_initializer(), v.is_graph_input()) for v in node.inputs)
    leaves = tuple(v.is_graph_output() for v in node.outputs)
    return node.domain, node.op_type, attributes, operands, origins, leaves


def find_repeats(graph: ir.Graph, facts: Sequence[Facts]) -> list[Repeat]:
    """The runs of at least four equal copies: the longest is cut out first, then runs before and after it."""
    wiring = _Wiring(graph, facts)
    found: list[Repeat] = []
    spans = [(0, len(wiring.nodes))]
    while spans:
        start, stop = spans.pop()
        repeat = _longest(wiring, start, stop)
        if repeat is not None:
            found.append(repeat)
            spans += [(start, repeat.start), (repeat.stop, stop)]
    return sorted(found, key=lambda r: r.start)


def _longest(wiring: _Wiring, start: int, stop: int) -> Repeat | None:
    """The run within nodes `start` to `stop` whose reduction drops the most nodes."""
    best: Repeat | None = None
    for period in _periods(wiring.kinds[start:stop]):
        equal = wiring.kinds[start : stop - period] == wiring.kinds[start + period : stop]
        for first, last in _runs(equal):
            if last - first < _KEPT * period or (best is not None and last - first <= _dropped(best)):
                continue
            repeat = _wired(wiring, start + first, start + last, period)
            if repeat is not None and (best is None or _dropped(repeat) > _dropped(best)):
                best = repeat
    return best


def _dropped(repeat: Repeat) -> int:
    return (repeat.copies - _KEPT) * repeat.period


def _periods(kinds: npt.NDArray[np.int64]) -> list[int]:
    """The commonest distances from a node to the next of its kind, in ascending order."""
    last: dict[int, int] = {}
    gaps: Counter[int] = Counter()
    for i, kind in enumerate(kinds.tolist()):
        if kind in last:
            gaps[i - last[kind]] += 1
        last[kind] = i
    return sorted(gap for gap, count in gaps.most_common(_CANDIDATES) if count >= _KEPT)


def _runs(flags: npt.NDArray[np.bool_]) -> Iterator[tuple[int, int]]:
    """Where `flags` are set: the first index, and the index after the last."""
    edges = np.flatnonzero(np.diff(np.concatenate(([False], flags, [False])).astype(np.int8)))
    yield from zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True)


def _wired(wiring: _Wiring, first: int, last: int, period: int) -> Repeat | None:
    """The longest run of copies among nodes of which `i` and `i + period` are of one kind for first <= i < last."""
    best: Repeat | None = None
    start = first
    own: dict[ir.Value, ir.Value] = {}
    for i in range(first, last + 1):
        if (i - start) % period == 0:
            own = {}
        pairs = wiring.alike(i, i + period, own) if i < last else None
        if pairs is not None:
            own |= pairs
            continue
        copies = (i - start) // period + 1
        if copies > _KEPT and (best is None or copies > best.copies):
            best = Repeat(start=start, period=period, copies=copies)
        start, own = i + 1, {}
    return best if best is not None and _is_closed(wiring, best) else None


def _is_closed(wiring: _Wiring, repeat: Repeat) -> bool:
    """Whether only the copy itself and the next copy read the outputs of each copy between the first and the last, and
    only the copy itself reads its own weights and inputs.
    """
    last = repeat.copies - 1
    shared = _external(wiring, repeat, 1) & _external(wiring, repeat, last)
    for copy in range(1, last):
        begin = repeat.start + copy * repeat.period
        for node in wiring.nodes[begin : begin + repeat.period]:
            readers = (wiring.index[user] for value in node.outputs for user, _ in value.uses())
            if any(not begin <= reader < begin + 2 * repeat.period for reader in readers):
                return False
        for value in _external(wiring, repeat, copy) - shared if copy > 1 else ():
            if any(not begin <= wiring.index[user] < begin + repeat.period for user, _ in value.uses()):
                return False
    return True


def _external(wiring: _Wiring, repeat: Repeat, copy: int) -> set[ir.Value]:
    """The weights and graph inputs that a copy reads."""
    begin = repeat.start + copy * repeat.period
    nodes = wiring.nodes[begin : begin + repeat.period]
    return {v for node in nodes for v in node.inputs if v is not None and v.producer() is None}


def reduce_repeats(graph: ir.Graph, facts: Sequence[Facts]) -> Reduced | None:
    """`graph` with three copies of every repeated piece, or None if nothing in it repeats.

    Args:
        graph: A normalised graph; it is not changed.
        facts: What is known of its values at several sets of sizes, by one interpreter.
    """
    repeats = find_repeats(graph, facts)
    return _Reduction(graph, repeats).run() if repeats else None


class _Reduction:
    def __init__(self, graph: ir.Graph, repeats: Sequence[Repeat]) -> None:
        self._graph = graph
        self._nodes = list(graph)
        self._index = {node: i for i, node in enumerate(self._nodes)}
        self._kept = list(range(len(self._nodes)))
        for repeat in repeats:
            for i in range(repeat.start, repeat.stop):
                self._kept[i] = repeat.kept(i)
        self._stand_ins: dict[ir.Value, ir.Value] = {}

    def run(self) -> Reduced:
        dropped = {i for i, kept in enumerate(self._kept) if kept != i}
        alone = self._only_read_by(dropped)
        for value in itertools.chain(self._graph.inputs, self._graph.initializers.values()):
            if value not in alone:
                self._stand_ins[value] = _copy(value)
        nodes = [self._clone(i) for i in range(len(self._nodes)) if i not in dropped]
        for i in sorted(dropped):
            self._let_stand_in(self._nodes[i], self._nodes[self._kept[i]])
        outputs = dict.fromkeys(self._stand_ins[value] for value in self._graph.outputs)
        graph = ir.Graph(
            [self._stand_ins[value] for value in self._graph.inputs if value not in alone],
            list(outputs),
            nodes=nodes,
            initializers=[self._stand_ins[v] for v in self._graph.initializers.values() if v not in alone],
            opset_imports=self._graph.opset_imports,
            name=self._graph.name,
        )
        return Reduced(graph=graph, stand_ins=self._stand_ins, counts=Counter(self._stand_ins.values()))

    def _only_read_by(self, dropped: set[int]) -> set[ir.Value]:
        """Weights and inputs that only dropped nodes read."""
        values = {v for i in dropped for v in self._nodes[i].inputs if v is not None and v.producer() is None}
        return {
            v for v in values if not v.is_graph_output() and all(self._index[user] in dropped for user, _ in v.uses())
        }

    def _clone(self, i: int) -> ir.Node:
        node = self._nodes[i]
        for value in node.inputs:
            if value is not None and value not in self._stand_ins:  # given by a dropped copy
                producer = value.producer()
                assert producer is not None
                kept = self._nodes[self._kept[self._index[producer]]]
                self._stand_ins[value] = self._stand_ins[kept.outputs[value.index() or 0]]
        outputs = [_copy(value) for value in node.outputs]
        self._stand_ins.update(zip(node.outputs, outputs, strict=True))
        inputs = [None if value is None else self._stand_ins[value] for value in node.inputs]
        attributes = list(node.attributes.values())
        clone = ir.Node(
            node.domain, node.op_type, inputs, attributes, outputs=outputs, name=node.name, overload=node.overload
        )
        clone.meta.update(node.meta)
        return clone

    def _let_stand_in(self, dropped: ir.Node, kept: ir.Node) -> None:
        for old, new in zip((*dropped.inputs, *dropped.outputs), (*kept.inputs, *kept.outputs), strict=True):
            if old is not None and new is not None:
                self._stand_ins.setdefault(old, self._stand_ins[new])


def _copy(value: ir.Value) -> ir.Value:
    copy = ir.Value(name=value.name, shape=value.shape, type=value.type, const_value=value.const_value)
    copy.meta.update(value.meta)
    return copy
