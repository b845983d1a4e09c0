"""One topological pass over the graph under one assignment: what is partial, what is gathered, what is infeasible."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence

import onnx_ir as ir

from furiosa_llm.builder.factors.analysis import Analysis, NodeInfo
from furiosa_llm.builder.factors.factor import Factor, Kind, segments_of, to_dim
from furiosa_llm.builder.factors.states import States
from furiosa_llm.builder.plan.outcome import Assignment, Axes, Collective, InfeasibleError, NodeAction, Outcome
from furiosa_llm.builder.plan.padding import (
    Contents,
    content_at,
    have_common_leaves,
    output_content,
    padded_places,
)
from furiosa_llm.builder.plan.storage import can_be_stored
from furiosa_llm.builder.rules.elementwise import CUT
from furiosa_llm.builder.rules.facts import present
from furiosa_llm.builder.rules.padding import Content
from furiosa_llm.runtime.artifact.layout import Dim, Mesh, simplify

Split = list[tuple[int, list[Factor]]]
"""The dimensions of a value that are split, with their split leaves."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Ground:
    """What a pass needs to know that does not depend on the assignment."""

    analysis: Analysis
    mesh: Mesh
    states: States
    leaves: Mapping[ir.Value, tuple[tuple[int, tuple[Factor, ...]], ...]]
    """For every value, the dimensions that have leaves which may be split, each with these leaves."""
    packed: frozenset[tuple[ir.Value, int]]
    """The dimensions of weights that have concatenations among their factors."""
    storable: dict[tuple[ir.Value, int, tuple[tuple[Factor, Axes], ...]], bool]
    """Whether such a dimension can be stored when these leaves are split so, as far as passes have asked."""
    in_prefixes: frozenset[Factor]
    """The leaves that are below some prefix: splitting them makes padding, even if they are split evenly."""
    active: Sequence[NodeInfo]
    """The nodes that a split leaf or a partial sum can reach."""
    consumers: Mapping[ir.Value, int]
    """How many nodes read a value's elements."""


class SweepPass:
    """One pass; `deferred` values may stay partial although they are larger, or something whole is added to them."""

    def __init__(self, ground: Ground, assignment: Assignment, deferred: frozenset[ir.Value]) -> None:
        self._ground = ground
        self._analysis = ground.analysis
        self._axes = {leaf: axes for leaf, axes in assignment.items() if axes}
        self._uneven = {leaf for leaf, axes in self._axes.items() if leaf.size % ground.mesh.parts(axes)}
        self._pads = bool(self._uneven) or not ground.in_prefixes.isdisjoint(self._axes)
        self._deferred = deferred
        self._partial: dict[ir.Value, Axes] = {}
        self._contents: dict[ir.Value, Contents] = {}
        self._gathered: set[tuple[ir.Value, int]] = set()
        self._blocked: set[ir.Value] = set()
        self._partial_seen: dict[ir.Node, set[int]] = {}
        self._outcome = Outcome()

    def run(self) -> Outcome:
        """Sweep the graph; InfeasibleError if the assignment cannot be realised."""
        for value in self._analysis.graph.inputs:
            self._check_interface(value)
            self._contents[value] = dict.fromkeys(self._places(value), Content.FINITE)
        for info in self._ground.active:
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
                if seen - {readers[0].idx}:
                    found.add(value)
        return frozenset(found)

    # -- one node ------------------------------------------------------------------------------------------------

    def _split(self, value: ir.Value) -> Split:
        found = []
        for d, leaves in self._ground.leaves[value]:
            split = [leaf for leaf in leaves if leaf in self._axes]
            if split:
                found.append((d, split))
        return found

    def _visit(self, info: NodeInfo) -> NodeAction | None:
        step, node = NodeAction(info), info.node
        split = {p: s for p, v in enumerate(node.inputs) if v is not None and (s := self._split(v))}
        if info.rule.ignores_values:
            return step if split else None
        step.lookup = self._lookup_axes(info)
        self._demand_whole(info, step, split)
        reduced = self._reduced_axes(info)
        incoming = self._incoming(info, step)
        step.partial = _union(incoming, _union(reduced, step.lookup))
        if len(step.partial) != len(incoming) + len(reduced) + len(step.lookup):
            raise InfeasibleError(f"{node.op_type} would sum twice over one mesh axis")
        if reduced:
            step.mask |= {p: reduced for p in info.rule.masked if node.inputs[p] is not None}
            step.average_parts = self._ground.mesh.parts(reduced) if info.rule.average else 1
        self._check_node(info, step, split)
        for port, value in enumerate(node.outputs):
            if step.partial:
                self._partial[value] = step.partial
            step.slices += [(port, d) for d, _ in self._split(value) if (port, d) in info.full_outputs]
        if self._pads:
            self._follow_padding(info, step)
        outputs_split = any(self._split(v) for v in node.outputs)
        return step if split or outputs_split or step.partial or step.reduce else None

    def _demand_whole(self, info: NodeInfo, step: NodeAction, split: Mapping[int, Split]) -> None:
        """Gather what the node needs whole, including a table that cannot be looked up in parts."""
        tables = [] if step.lookup else [factor.find() for factor in info.looked_up]
        for port, dims in split.items():
            value = info.node.inputs[port]
            assert value is not None
            roots = [factor.find() for factor in self._analysis.dims[value]]
            wanted = tuple(d for d, _ in dims if (port, d) in info.full_inputs or roots[d] in tables)
            if not wanted:
                continue
            step.gather[port] = wanted
            if value.is_initializer():
                self._outcome.weight_layouts.setdefault(value, set()).add(wanted)
            else:
                self._reduce(value, step)
                self._gather(value, [pair for pair in dims if pair[0] in wanted])

    def _gather(self, value: ir.Value, dims: Split) -> None:
        for d, leaves in dims:
            if self._analysis.is_dynamic(value, d):
                raise InfeasibleError(f'"{value.name}" would be gathered along a dynamic dimension')
            if (value, d) not in self._gathered:
                self._gathered.add((value, d))
                axes = _axes_in_order(leaves, self._axes)
                self._outcome.collectives.append(Collective("AllGather", value, axes, d))

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
            by_segment = {
                frozenset(a for s in part.leaves() for a in self._axes.get(s, ())) for part in segments_of(factor)
            }
            if len(by_segment) != 1:
                raise InfeasibleError(
                    f"{info.node.op_type} contracts a concatenation whose segments are split differently"
                )
            axes = _union(axes, _axes_in_order(split, self._axes))
        return axes

    # -- partial sums --------------------------------------------------------------------------------------------

    def _incoming(self, info: NodeInfo, step: NodeAction) -> Axes:
        """Decide which partial inputs pass through, and sum the others first. Returns the axes that pass."""
        node = info.node
        ports = [p for p, v in enumerate(node.inputs) if v is not None and v in self._partial]
        if not ports:
            return ()
        if info.rule.padding == "sum" and len(info.rule.linear) > 1:
            self._partial_seen[node] = set(ports)
        passing = self._passing(info, ports, step)
        for port in ports:
            if port not in passing:
                self._reduce(present(node.inputs[port]), step)
        return self._partial_axes(node, passing)

    def _passing(self, info: NodeInfo, ports: list[int], step: NodeAction) -> list[int]:
        node, rule = info.node, info.rule
        single = all(self._ground.consumers.get(present(node.inputs[p])) == 1 for p in ports)
        if not single or any(p in step.gather for p in ports):
            return []
        if rule.bilinear:
            facts = self._analysis.facts
            grows = facts[present(node.inputs[ports[0]])].shape != facts[node.outputs[0]].shape
            if grows and len(ports) == 1 and node.outputs[0] not in self._deferred:
                self._blocked.add(node.outputs[0])
                return []
            return [] if len(ports) > 1 else ports
        if not rule.linear or any(p not in rule.linear for p in ports):
            return []
        others = [p for p in rule.linear if p < len(node.inputs) and node.inputs[p] is not None and p not in ports]
        added = [p for p in others if not self._analysis.facts[present(node.inputs[p])].zero]
        constant = all(present(node.inputs[p]).is_initializer() for p in added)
        if not constant and node.outputs[0] not in self._deferred:
            self._blocked.add(node.outputs[0])
            return []
        axes = self._partial_axes(node, ports)
        for port in ports:
            if missing := tuple(a for a in axes if a not in self._partial_axes(node, [port])):
                step.mask[port] = missing
        step.mask |= dict.fromkeys(added, axes)
        return ports

    def _partial_axes(self, node: ir.Node, ports: Sequence[int]) -> Axes:
        axes: Axes = ()
        for port in ports:
            axes = _union(axes, self._partial[present(node.inputs[port])])
        return axes

    def _reduce(self, value: ir.Value, step: NodeAction) -> None:
        axes = self._partial.pop(value, ())
        if axes:
            step.reduce.append(value)
            self._outcome.collectives.append(Collective("AllReduce", value, axes))

    # -- padding -------------------------------------------------------------------------------------------------

    def _places(self, value: ir.Value, whole: Collection[int] = ()) -> dict[Factor, list[int]]:
        """Where a value of which the dimensions `whole` have been gathered is padded, with the dimensions."""
        found: dict[Factor, list[int]] = {}
        for d, _ in self._split(value) if self._pads else ():
            if d not in whole:
                for place in padded_places(self._analysis.dims[value][d], self._axes, self._uneven):
                    found.setdefault(place, []).append(d)
        return found

    def _follow_padding(self, info: NodeInfo, step: NodeAction) -> None:
        """Make sure that padding does no harm at this node, and find out what its outputs' padding holds."""
        inputs = {p: self._content(v, step.gather.get(p, ())) for p, v in enumerate(info.node.inputs) if v is not None}
        for factor in info.reduced:
            for place in padded_places(factor, self._axes, self._uneven):
                self._contract_padding(info, step, inputs, place)
        positions = inputs.get(info.rule.indices, {}) if info.rule.indices is not None else {}
        divisor = inputs.get(info.rule.divisor, {}) if info.rule.divisor is not None else {}
        integers = self._analysis.facts[info.node.outputs[0]].dtype.is_integer()
        if any(content is not Content.ZERO for content in positions.values()) or (divisor and integers):
            raise InfeasibleError(f"{info.node.op_type} would look up or divide by padding")
        for port, value in enumerate(info.node.outputs):
            zero, cut = self._analysis.facts[value].zero, {d for p, d in step.slices if p == port}
            self._contents[value] = {
                place: Content.FINITE if not cut.isdisjoint(dims) else output_content(info, inputs, place, zero=zero)
                for place, dims in self._places(value).items()
            }

    def _content(self, value: ir.Value, whole: Collection[int]) -> Contents:
        """What padding holds in an input whose dimensions `whole` have been gathered, and so have no padding."""
        if value.is_initializer():
            return dict.fromkeys(self._places(value, whole), Content.ZERO)
        known = self._contents.get(value, {})
        return {place: known[place] for place in self._places(value, whole)} if whole else known

    def _contract_padding(
        self, info: NodeInfo, step: NodeAction, inputs: Mapping[int, Contents], place: Factor
    ) -> None:
        found = {port: content_at(contents, place) for port, contents in inputs.items()}
        if info.rule.average:
            raise InfeasibleError(f"{info.node.op_type} would average over padding")
        if all(content is not Content.ZERO or port in info.rule.offset for port, content in found.items()):
            # The end of a weight's last block holds what the exporter left there, so the operand that ends before it is
            # the one to be cleared.
            # An input that is used as a weight was cut from what is whole, and its padding is an element of that.
            ending = [
                port
                for port, contents in inputs.items()
                if place in contents and (place.kind is Kind.PREFIX or _is_cut(info.node.inputs[port]))
            ]
            if not ending or info.rule.offset:
                raise InfeasibleError(f"{info.node.op_type} would contract padding that holds no zeros")
            found[ending[0]] = Content.ANY
        for port, content in found.items():
            if content is Content.ANY:
                places = self._places(present(info.node.inputs[port]), step.gather.get(port, ()))
                dims = {d for other, at in places.items() if have_common_leaves(other, place) for d in at}
                step.clear[port] = sorted({*step.clear.get(port, ()), *dims})

    # -- feasibility ---------------------------------------------------------------------------------------------

    def _check_interface(self, value: ir.Value) -> None:
        """Of inputs and outputs only states may be split, and only in dimensions whose size is known."""
        split = self._split(value)
        if split and value not in self._ground.states.values:
            raise InfeasibleError(f'input "{value.name}" would be split')
        if any(self._analysis.is_dynamic(value, d) for d, _ in split):
            raise InfeasibleError(f'a dynamic dimension of state "{value.name}" would be split')
        self._check_value(value)

    def _check_value(self, value: ir.Value, whole: Collection[int] = ()) -> None:
        """No mesh axis may split two dimensions of one value, not even by one leaf: ranks would hold a diagonal."""
        owner: dict[int, tuple[Factor, int]] = {}
        for d, leaves in self._split(value):
            for leaf in leaves if d not in whole else ():
                for axis in self._axes[leaf]:
                    if owner.setdefault(axis, (leaf, d)) != (leaf, d):
                        raise InfeasibleError(f'"{value.name}" would be split twice over mesh axis {axis}')
            if (value, d) in self._ground.packed and d not in whole and not self._can_be_stored(value, d, leaves):
                raise InfeasibleError(f'segments inside of "{value.name}" would be split over different axes')

    def _can_be_stored(self, value: ir.Value, d: int, leaves: Sequence[Factor]) -> bool:
        """Whether dimension `d`, whose split leaves are given, can be stored; known since an earlier pass, mostly."""
        known, key = self._ground.storable, (value, d, tuple((leaf, self._axes[leaf]) for leaf in leaves))
        if key not in known:
            known[key] = can_be_stored(simplify(to_dim(self._analysis.dims[value][d], self._axes)))
        return known[key]

    def _check_node(self, info: NodeInfo, step: NodeAction, split: Mapping[int, Split]) -> None:
        """No mesh axis may be used by two different factors, or by a factor and a partial sum, inside one node."""
        node = info.node
        inputs: list[Factor] = []
        for port, dims in split.items():
            whole = step.gather.get(port, ())
            self._check_value(present(node.inputs[port]), whole)
            inputs += [leaf for d, leaves in dims if d not in whole for leaf in leaves]
        outputs: list[Factor] = []
        cut: list[Factor] = []
        for port, value in enumerate(node.outputs):
            self._check_value(value)
            for d, leaves in self._split(value):
                if (port, d) not in info.full_outputs:
                    outputs += leaves
                    continue
                cut += leaves
                if self._analysis.is_dynamic(value, d):
                    raise InfeasibleError(f'"{value.name}" would be cut along a dynamic dimension')
        where = f"{node.op_type} {node.name}"
        self._check_disjoint([*inputs, *outputs], (), where)
        self._check_disjoint([*outputs, *cut], step.partial, where)

    def _check_disjoint(self, leaves: Sequence[Factor], partial: Axes, where: str) -> None:
        owner: dict[int, Factor | None] = dict.fromkeys(partial)
        for leaf in leaves:
            for axis in self._axes[leaf]:
                if owner.setdefault(axis, leaf) is not leaf:
                    raise InfeasibleError(f"{where} would use mesh axis {axis} twice")

    # -- outputs -------------------------------------------------------------------------------------------------

    def _finish_outputs(self) -> None:
        for value in dict.fromkeys(self._analysis.graph.outputs):
            if value in self._partial:
                axes = self._partial.pop(value)
                self._outcome.output_reduce.append(value)
                self._outcome.collectives.append(Collective("AllReduce", value, axes))
            if value in self._ground.states.values:
                self._check_interface(value)
                if Content.ANY in self._contents.get(value, {}).values():
                    raise InfeasibleError(f'the padding of state "{value.name}" may hold anything')
            elif split := self._split(value):
                self._gather(value, split)
                self._outcome.output_gather[value] = tuple(d for d, _ in split)
        for pair in self._ground.states.pairs:
            if self._layout(pair.input, pair.sequence_dim) != self._layout(pair.output, pair.sequence_dim):
                raise InfeasibleError(f'state "{pair.input.name}" would come out split otherwise than it goes in')

    def _layout(self, value: ir.Value, sequence_dim: int | None) -> list[Dim]:
        factors = [factor for d, factor in enumerate(self._analysis.dims[value]) if d != sequence_dim]
        return [simplify(to_dim(factor, self._axes)) for factor in factors]


def _is_cut(value: ir.Value | None) -> bool:
    producer = None if value is None else value.producer()
    return producer is not None and bool(producer.meta.get(CUT))


def _union(a: Axes, b: Axes) -> Axes:
    return tuple(sorted({*a, *b}))


def _axes_in_order(leaves: Sequence[Factor], axes: Mapping[Factor, Axes]) -> Axes:
    return tuple(dict.fromkeys(axis for leaf in leaves for axis in axes[leaf]))
