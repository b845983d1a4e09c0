"""The state sweep: follow partial sums through the graph under one assignment of factors to mesh axes.

How a value is split is never stored: it follows from its dimensions' factors and the assignment. Which values are
*partial* (to be summed over some mesh axes) is found here, in one topological pass that decides where collectives go.
The same sweep prices a plan and drives the lowering.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

import onnx_ir as ir

from furiosa_llm.builder.analysis import Analysis, NodeInfo, Port
from furiosa_llm.builder.factors import Factor, Kind
from furiosa_llm.builder.rules import WEIGHT_MOVERS
from furiosa_llm.runtime.artifact.layout import Mesh

Axes = tuple[int, ...]
Assignment = Mapping[Factor, Axes]
"""Leaf -> the mesh axes it is split over. Leaves that are absent are replicated."""


class InfeasibleError(Exception):
    """An assignment that no program can realise; the message says why. Caught by the planner."""


def find_weight_derived(analysis: Analysis) -> set[ir.Value]:
    """Initializers and what data movement alone makes of them."""
    derived = set(analysis.graph.initializers.values())
    for info in analysis.nodes:
        if info.node.op_type in WEIGHT_MOVERS and info.node.inputs[0] in derived:
            derived.update(info.node.outputs)
    return derived


@dataclasses.dataclass(frozen=True, slots=True)
class Collective:
    """A collective that the plan needs."""

    kind: str
    """AllReduce or AllGather."""
    value: ir.Value
    axes: Axes
    dim: int | None = None
    """The dimension that is gathered."""


@dataclasses.dataclass(slots=True)
class Step:
    """What to do at one node, besides the node itself."""

    info: NodeInfo
    reduce: list[ir.Value] = dataclasses.field(default_factory=list)
    """Inputs to AllReduce first; every later use sees the sum."""
    gather: dict[int, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    """Input number -> dimensions to make whole for this node."""
    mask: dict[int, Axes] = dataclasses.field(default_factory=dict)
    """Inputs that count once: over these axes the first rank alone contributes, the others contribute zeros."""
    slices: list[Port] = dataclasses.field(default_factory=list)
    """Output dimensions that are computed whole and cut to the rank's part afterwards."""
    lookup: Axes = ()
    """The table is split over these axes: look up what is here, zeros for the rest."""
    average_parts: int = 1
    """How many local means are added up."""
    partial: Axes = ()
    """The axes over which the outputs are partial sums."""


@dataclasses.dataclass(slots=True)
class Outcome:
    """What a sweep found."""

    steps: dict[ir.Node, Step]
    """Nodes at which there is something to do; all others run as they are."""
    collectives: list[Collective]
    output_reduce: list[ir.Value]
    """Graph outputs that are partial at the end."""
    output_gather: dict[ir.Value, tuple[int, ...]]
    """Graph outputs and their dimensions to make whole at the end."""
    weight_layouts: dict[ir.Value, set[tuple[int, ...]]]
    """For initializers that are wanted whole in some dimensions: those dimensions, for each way they are used."""


class Sweeper:
    """Sweeps one analysed graph; what does not depend on the assignment is computed once."""

    def __init__(
        self, analysis: Analysis, mesh: Mesh, candidates: Iterable[Factor], states: frozenset[ir.Value]
    ) -> None:
        self._analysis = analysis
        self._mesh = mesh
        self._states = states
        candidate_set = set(candidates)
        self._dims = {
            value: tuple(
                (d, tuple(leaf for leaf in factor.leaves() if leaf in candidate_set)) for d, factor in enumerate(dims)
            )
            for value, dims in analysis.dims.items()
        }
        self._dims = {v: tuple(pair for pair in dims if pair[1]) for v, dims in self._dims.items()}
        self._weight_derived = find_weight_derived(analysis)
        self._active = self._find_active()
        self._consumers = self._count_consumers()
        self._dynamic_leaves = frozenset(
            leaf
            for value, dims in self._dims.items()
            for d, found in dims
            if analysis.is_dynamic(value, d)
            for leaf in found
        )

    # -- what does not depend on the assignment ------------------------------------------------------------------

    def _find_active(self) -> list[NodeInfo]:
        """Nodes that a candidate or a partial sum can reach."""
        active: list[NodeInfo] = []
        partial: set[ir.Value] = set()
        for info in self._analysis.nodes:
            values = [v for v in (*info.node.inputs, *info.node.outputs) if v is not None]
            touched = any(self._dims[v] for v in values)
            reached = any(v in partial for v in info.node.inputs)
            if touched or reached:
                active.append(info)
            sources = [leaf for f in (*info.reduced, *info.looked_up) for leaf in f.leaves()]
            passes = reached and (info.rule.linear or info.rule.bilinear)
            if passes or (touched and sources):
                partial.update(info.node.outputs)
        return active

    def _count_consumers(self) -> dict[ir.Value, int]:
        """How many nodes read a value's elements, graph outputs counted.

        A reader of its shape alone does not count, nor does a node that only such readers follow.
        """
        counts: dict[ir.Value, int] = dict.fromkeys(self._analysis.graph.outputs, 1)
        for info in reversed(self._analysis.nodes):
            if info.rule.ignores_values or not any(counts.get(v) for v in info.node.outputs):
                continue
            for value in info.node.inputs:
                if value is not None:
                    counts[value] = counts.get(value, 0) + 1
        return counts

    # -- one sweep -----------------------------------------------------------------------------------------------

    def sweep(self, assignment: Assignment) -> Outcome:
        """Where collectives go under `assignment`; InfeasibleError if it cannot be realised."""
        self._check_leaves(assignment)
        first = _Pass(self, assignment, frozenset())
        outcome = first.run()
        deferrable = first.deferrable()
        return _Pass(self, assignment, deferrable).run() if deferrable else outcome

    def _check_leaves(self, assignment: Assignment) -> None:
        for leaf, axes in assignment.items():
            if leaf in self._analysis.pinned and axes:
                raise InfeasibleError(f"factor of {leaf.size} is used whole inside an op")
            if leaf in self._dynamic_leaves and leaf.size % self._mesh.parts(axes):
                raise InfeasibleError(f"factor of {leaf.size} would be padded inside a dynamic dimension")


class _Pass:
    """One pass; `deferred` values may stay partial although something whole is added to them."""

    def __init__(self, sweeper: Sweeper, assignment: Assignment, deferred: frozenset[ir.Value]) -> None:
        self._s = sweeper
        self._axes = {leaf: axes for leaf, axes in assignment.items() if axes}
        self._deferred = deferred
        self._partial: dict[ir.Value, Axes] = {}
        self._gathered: set[tuple[ir.Value, int]] = set()
        self._blocked: dict[ir.Value, ir.Node] = {}
        self._partial_seen: dict[ir.Node, set[int]] = {}
        self._outcome = Outcome({}, [], [], {}, {})

    def run(self) -> Outcome:
        for value in self._s._analysis.graph.inputs:
            self._check_value(value)
        for info in self._s._active:
            step = self._visit(info)
            if step is not None:
                self._outcome.steps[info.node] = step
        self._finish_outputs()
        return self._outcome

    def deferrable(self) -> frozenset[ir.Value]:
        """Sums that were made whole although their only reader adds another partial sum to them."""
        found = set()
        for value in self._blocked:
            readers = list(value.uses())
            if len(readers) == 1 and not value.is_graph_output():
                seen = self._partial_seen.get(readers[0].node, set())
                if seen - {readers[0].idx} and readers[0].node.op_type in ("Add", "Sum"):
                    found.add(value)
        return frozenset(found)

    def _split(self, value: ir.Value) -> list[tuple[int, list[Factor]]]:
        """The dimensions of a value that are split now, with their split leaves."""
        found = []
        for d, leaves in self._s._dims[value]:
            split = [leaf for leaf in leaves if leaf in self._axes]
            if split:
                found.append((d, split))
        return found

    def _visit(self, info: NodeInfo) -> Step | None:
        step = Step(info)
        split = {p: s for p, v in enumerate(info.node.inputs) if v is not None and (s := self._split(v))}
        lookup_axes = self._lookup_axes(info)
        self._demand_whole(info, step, split, lookup_axes)
        reduced = self._reduced_axes(info)
        incoming = self._incoming(info, step)
        step.lookup = lookup_axes
        step.partial = _union(incoming, _union(reduced, lookup_axes))
        if len(step.partial) != len(incoming) + len(reduced) + len(lookup_axes):
            raise InfeasibleError(f"{info.node.op_type} would sum twice over one mesh axis")
        if reduced:
            step.mask |= {p: reduced for p in info.rule.masked if info.node.inputs[p] is not None}
            step.average_parts = self._s._mesh.parts(reduced) if info.rule.average else 1
        self._check_node(info, step, split)
        for port, value in enumerate(info.node.outputs):
            if step.partial and not info.rule.ignores_values:
                self._partial[value] = step.partial
            step.slices += [(port, d) for d, _ in self._split(value) if (port, d) in info.full_outputs]
        outputs_split = any(self._split(v) for v in info.node.outputs)
        return step if split or outputs_split or step.partial or step.reduce else None

    def _demand_whole(
        self, info: NodeInfo, step: Step, split: dict[int, list[tuple[int, list[Factor]]]], lookup: Axes
    ) -> None:
        """Gather what the node needs whole; a table that cannot be looked up in parts is needed whole, too."""
        whole_axis = info.rule.axis if info.looked_up and not lookup else None
        for port, dims in split.items():
            value = info.node.inputs[port]
            assert value is not None
            if info.rule.ignores_values:
                continue
            wanted = tuple(
                d for d, _ in dims if (port, d) in info.full_inputs or self._is_lookup(info, port, d, whole_axis)
            )
            if not wanted:
                continue
            step.gather[port] = wanted
            if value.is_initializer():
                self._outcome.weight_layouts.setdefault(value, set()).add(wanted)
                continue
            self._reduce(value, step)
            for d in wanted:
                if (value, d) not in self._gathered:
                    self._gathered.add((value, d))
                    axes = _axes_in_order(next(s for e, s in dims if e == d), self._axes)
                    self._outcome.collectives.append(Collective("AllGather", value, axes, d))

    def _is_lookup(self, info: NodeInfo, port: int, d: int, axis: int | None) -> bool:
        if axis is None:
            return False
        value = info.node.inputs[port]
        assert value is not None
        factor = self._s._analysis.dims[value][d].find()
        return any(factor is f.find() for f in info.looked_up)

    def _lookup_axes(self, info: NodeInfo) -> Axes:
        for factor in info.looked_up:
            root = factor.find()
            if root.kind is Kind.LEAF and root in self._axes:
                return self._axes[root]
        return ()

    def _reduced_axes(self, info: NodeInfo) -> Axes:
        """The axes over which a contraction is split; every segment of a concatenation must agree on them."""
        axes: Axes = ()
        for factor in info.reduced:
            split = [leaf for leaf in factor.leaves() if leaf in self._axes]
            if not split:
                continue
            if len({frozenset(self._segment_axes(s)) for s in _segments(factor)}) != 1:
                raise InfeasibleError(
                    f"{info.node.op_type} contracts a concatenation whose segments are split differently"
                )
            found = _axes_in_order(split, self._axes)
            if any(leaf.size % self._s._mesh.parts(self._axes[leaf]) for leaf in split):
                self._check_padding(info)
            axes = _union(axes, found)
        return axes

    def _segment_axes(self, segment: Factor) -> Axes:
        return tuple(a for leaf in segment.leaves() for a in self._axes.get(leaf, ()))

    def _check_padding(self, info: NodeInfo) -> None:
        """Padding holds zeros in weights only: a contraction over it needs a weight on one side."""
        if not any(v in self._s._weight_derived for v in info.node.inputs if v is not None):
            raise InfeasibleError(f"{info.node.op_type} would contract padding that holds no zeros")
        if info.rule.average:
            raise InfeasibleError(f"{info.node.op_type} would average over padding")

    def _incoming(self, info: NodeInfo, step: Step) -> Axes:
        """Decide which partial inputs pass through; the rest is summed first. Returns the axes that pass."""
        if info.rule.ignores_values:
            return ()
        node = info.node
        ports = [p for p, v in enumerate(node.inputs) if v is not None and v in self._partial]
        if not ports:
            return ()
        self._partial_seen[node] = set(ports)
        passing = self._passing(info, ports, step)
        for port in ports:
            if port not in passing:
                value = node.inputs[port]
                assert value is not None
                self._reduce(value, step)
        axes: Axes = ()
        for port in passing:
            axes = _union(axes, self._partial_of(node, port))
        return axes

    def _passing(self, info: NodeInfo, ports: list[int], step: Step) -> list[int]:
        node, rule = info.node, info.rule
        single = all(self._s._consumers.get(v) == 1 for p in ports if (v := node.inputs[p]) is not None)
        if not single or any(p in step.gather for p in ports):
            return []
        if rule.bilinear:
            value = node.inputs[ports[0]]
            assert value is not None
            facts = self._s._analysis.facts
            grows = facts[value].shape != facts[node.outputs[0]].shape
            return [] if len(ports) > 1 or grows else ports
        if not rule.linear or any(p not in rule.linear for p in ports):
            return []
        others = [p for p in rule.linear if p < len(node.inputs) and node.inputs[p] is not None and p not in ports]
        masked = [p for p in others if not self._is_zero(node.inputs[p])]
        if any(not self._is_constant(node.inputs[p]) for p in masked) and node.outputs[0] not in self._deferred:
            self._blocked[node.outputs[0]] = node
            return []
        axes: Axes = ()
        for port in ports:
            axes = _union(axes, self._partial_of(node, port))
        for port in ports:
            if missing := tuple(a for a in axes if a not in self._partial_of(node, port)):
                step.mask[port] = missing
        step.mask |= dict.fromkeys(masked, axes)
        return ports

    def _partial_of(self, node: ir.Node, port: int) -> Axes:
        value = node.inputs[port]
        assert value is not None
        return self._partial[value]

    def _is_zero(self, value: ir.Value | None) -> bool:
        assert value is not None
        return self._s._analysis.facts[value].zero

    def _is_constant(self, value: ir.Value | None) -> bool:
        return value is not None and value.is_initializer()

    def _reduce(self, value: ir.Value, step: Step) -> None:
        axes = self._partial.pop(value, ())
        if axes:
            step.reduce.append(value)
            self._outcome.collectives.append(Collective("AllReduce", value, axes))

    def _check_value(self, value: ir.Value) -> None:
        self._check_disjoint([leaf for _, split in self._split(value) for leaf in split], (), str(value.name))

    def _check_node(self, info: NodeInfo, step: Step, split: dict[int, list[tuple[int, list[Factor]]]]) -> None:
        """No mesh axis may be used by two different factors, or by a factor and a partial sum, inside one node."""
        whole = {(p, d) for p, dims in step.gather.items() for d in dims}
        leaves = [leaf for p, dims in split.items() for d, found in dims if (p, d) not in whole for leaf in found]
        outputs = [
            leaf
            for p, v in enumerate(info.node.outputs)
            for d, found in self._split(v)
            if (p, d) not in info.full_outputs
            for leaf in found
        ]
        if info.rule.ignores_values:
            return
        self._check_disjoint([*leaves, *outputs], (), f"{info.node.op_type} {info.node.name}")
        self._check_disjoint(outputs, step.partial, f"{info.node.op_type} {info.node.name}")

    def _check_disjoint(self, leaves: Sequence[Factor], partial: Axes, where: str) -> None:
        owner: dict[int, Factor | None] = dict.fromkeys(partial)
        for leaf in leaves:
            for axis in self._axes[leaf]:
                if owner.setdefault(axis, leaf) is not leaf:
                    raise InfeasibleError(f"{where} would use mesh axis {axis} twice")

    def _finish_outputs(self) -> None:
        for value in dict.fromkeys(self._s._analysis.graph.outputs):
            if value in self._partial:
                axes = self._partial.pop(value)
                self._outcome.output_reduce.append(value)
                self._outcome.collectives.append(Collective("AllReduce", value, axes))
            if value in self._s._states:
                continue
            wanted = []
            for d, split in self._split(value):
                wanted.append(d)
                if (value, d) not in self._gathered:
                    self._outcome.collectives.append(
                        Collective("AllGather", value, _axes_in_order(split, self._axes), d)
                    )
            if wanted:
                self._outcome.output_gather[value] = tuple(wanted)


def _segments(factor: Factor) -> list[Factor]:
    """The segments of every concatenation below `factor`, or the factor itself if there is none."""
    root = factor.find()
    if root.kind is Kind.LEAF:
        return [root]
    if root.kind is Kind.CONCATENATION:
        return [s for kid in root.kids for s in _segments(kid)]
    # A product of a concatenation and other factors: each segment with all the rest.
    return [root] if not any(_has_concatenation(kid) for kid in root.kids) else list(_expand(root))


def _has_concatenation(factor: Factor) -> bool:
    root = factor.find()
    return root.kind is Kind.CONCATENATION or any(_has_concatenation(kid) for kid in root.kids)


def _expand(product_: Factor) -> Iterable[Factor]:
    rows: list[list[Factor]] = [[]]
    for kid in product_.kids:
        parts = _segments(kid) if _has_concatenation(kid) else [kid.find()]
        rows = [[*row, part] for row in rows for part in parts]
    for row in rows:
        yield Factor(0, Kind.PRODUCT, row)


def _union(a: Axes, b: Axes) -> Axes:
    return tuple(sorted({*a, *b}))


def _axes_in_order(leaves: Sequence[Factor], axes: Mapping[Factor, Axes]) -> Axes:
    return tuple(dict.fromkeys(axis for leaf in leaves for axis in axes[leaf]))
