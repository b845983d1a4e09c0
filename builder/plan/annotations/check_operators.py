"""Check annotations against the operators: what a node's rule says of its dimensions, its sharding specs must respect.

Every component of a split axis is tied to the factors of the dimension, so that specs of differently shaped operands
can be compared: 4 shards of an axis of 512 and 4 shards of the 8 heads that it is made of are the same split.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence

import onnx
import onnx_ir as ir

from furiosa_llm.builder.factors.analysis import Analysis, NodeInfo
from furiosa_llm.builder.factors.factor import Factor, FactorConflictError, Kind, unify
from furiosa_llm.builder.plan.annotations.check_specs import Placed
from furiosa_llm.builder.plan.annotations.correspondence import Correspondence
from furiosa_llm.builder.plan.annotations.device_placement import DeviceSpec, Split
from furiosa_llm.builder.plan.annotations.finding import Finding, error, warning
from furiosa_llm.builder.plan.annotations.nodes import annotations_of, label_of
from furiosa_llm.builder.rules.rule import DimExpr, Signature, parse

Port = tuple[bool, int]
"""Whether it is an output, and its number."""


@dataclasses.dataclass(frozen=True, slots=True)
class _Part:
    """How one leaf is split: into how many parts, and which of them each device holds."""

    parts: int
    positions: tuple[tuple[int, int], ...]
    """(device, part), by device."""


_Parts = dict[Factor, _Part]


def check_operators(
    model: onnx.ModelProto, placed: Sequence[Placed], analysis: Analysis, correspondence: Correspondence
) -> Iterator[Finding]:
    """Check every annotated node of the main graph that the analysed graph still has."""
    infos = {info.node: info for info in analysis.nodes}
    specs: dict[tuple[str, int, str], DeviceSpec] = {}
    given: dict[tuple[str, str], DeviceSpec] = {}
    for entry in placed:
        if not entry.annotation.is_inner:
            configuration = entry.annotation.configuration
            specs[configuration, entry.annotation.number, entry.tensor] = entry.placement
            if entry.tensor in entry.annotation.node.output:
                given[configuration, entry.tensor] = entry.placement
    nodes: list[_Node] = []
    for annotation in annotations_of(model):
        counterpart = None if annotation.is_inner else correspondence.node(annotation.node)
        if counterpart is None or counterpart not in infos:
            continue
        placements: dict[Port, DeviceSpec] = {}
        for name, port, is_output, value in correspondence.operands(annotation.node):
            found = specs.get((annotation.configuration, annotation.number, name))
            if found is None and not is_output:
                found = given.get((annotation.configuration, name))  # by the standard, where its producer left it
            if found is not None and all(split.axis < len(analysis.dims[value]) for split in found.splits):
                placements[is_output, port] = found
        nodes.append(_Node(annotation.node, infos[counterpart], analysis, placements))
    # All axes are tied to their factors before any are compared: what one node says refines the factors of others.
    yield from (finding for node in nodes for finding in node.tie())
    yield from (finding for node in nodes for finding in node.check())


class _Node:
    """One annotated node."""

    def __init__(
        self, node: onnx.NodeProto, info: NodeInfo, analysis: Analysis, placements: Mapping[Port, DeviceSpec]
    ) -> None:
        self._node, self._info, self._analysis = node, info, analysis
        self._label = label_of(node)
        self._signature: Signature = parse(info.rule.text)
        self._placements = dict(placements)
        self._tied: dict[tuple[Port, int], list[tuple[Factor, Split]]] = {}

    def _value(self, port: Port) -> ir.Value:
        value = (self._info.node.outputs if port[0] else self._info.node.inputs)[port[1]]
        assert value is not None
        return value

    def _name(self, port: Port) -> str:
        return str((self._node.output if port[0] else self._node.input)[port[1]])

    def _expressions(self, port: Port) -> Sequence[DimExpr]:
        operands = self._signature.outputs if port[0] else self._signature.inputs
        operand = operands[port[1]] if port[1] < len(operands) else None
        return operand or ()

    # -- first: tie axes to factors ------------------------------------------------------------------------------

    def tie(self) -> Iterator[Finding]:
        """Refine the factors of every split axis so that its components are factors of their own."""
        for port, placement in self._placements.items():
            value = self._value(port)
            for axis, splits in itertools.groupby(placement.splits, key=lambda split: split.axis):
                components = list(splits)
                try:
                    self._tied[port, axis] = self._tie(value, axis, components)
                except FactorConflictError:
                    yield warning(
                        self._label,
                        self._name(port),
                        f"{placement.parts(axis)} shards of axis {axis} cut across what the axis is made of "
                        f"({self._analysis.dims[value][axis]!r}), so that the parts cannot be followed",
                        "split the axis at the borders of its components, outermost first",
                    )

    def _tie(self, value: ir.Value, axis: int, components: Sequence[Split]) -> list[tuple[Factor, Split]]:
        dim = self._analysis.dims[value][axis]
        known = math.prod(split.size for split in components if split.size is not None)
        factors: list[Factor] = []
        tied: list[tuple[Factor, Split]] = []
        for split in components:
            size = split.size if split.size is not None else dim.find().size // max(known, 1)
            if split.parts == 1:
                factors.append(Factor(size))
            elif split.size is not None and split.is_even:
                factors += [Factor(split.parts), Factor(size // split.parts)]
                tied.append((factors[-2], split))
            else:
                factors.append(Factor(size))
                tied.append((factors[-1], split))
        unify([dim], factors)
        return tied

    def _leaves(self, port: Port, placement: DeviceSpec, axis: int) -> _Parts | None:
        """The split leaves of an axis; None if its leaves cannot express the way in which it is split."""
        found: _Parts = {}
        if not placement.of_axis(axis):
            return found
        if (port, axis) not in self._tied:
            return None
        for factor, split in self._tied[port, axis]:
            root = factor.find()
            leaves = list(root.leaves())
            held = list(zip(placement.devices, split.positions, strict=True))
            if root.kind is Kind.LEAF:
                found[root] = _Part(split.parts, tuple(held))
                continue
            if root.kind is Kind.CONCATENATION or not split.is_even or split.size is None:
                return None
            if math.prod(leaf.size for leaf in leaves) != split.parts:
                return None  # a concatenation inside
            stride = split.parts
            for leaf in leaves:
                stride //= leaf.size
                found[leaf] = _Part(leaf.size, tuple((d, p // stride % leaf.size) for d, p in held))
        return found

    # -- then: compare -------------------------------------------------------------------------------------------

    def check(self) -> Iterator[Finding]:
        """Compare the operands' axes as the operator ties them."""
        parts: dict[tuple[Port, int], _Parts] = {}
        for port, placement in self._placements.items():
            for axis in range(len(self._analysis.dims[self._value(port)])):
                found = self._leaves(port, placement, axis)
                if found is None:
                    if (port, axis) in self._tied:
                        yield self._packed(port, axis)
                else:
                    parts[port, axis] = found
        wrong = list(self._check_whole(parts))
        yield from wrong
        if not wrong:
            yield from self._check_alike(parts)
            yield from self._check_complete(parts)

    def _packed(self, port: Port, axis: int) -> Finding:
        dim = self._analysis.dims[self._value(port)][axis]
        return warning(
            self._label,
            self._name(port),
            f"axis {axis} is packed of several parts ({dim!r}), and contiguous shards do not hold a share of each",
            "leave the tensor without a spec and shard what is cut out of it, or store the parts apart",
        )

    def _check_whole(self, parts: Mapping[tuple[Port, int], _Parts]) -> Iterator[Finding]:
        """Dimensions that the operator needs whole, or uses inside, must not be split."""
        for (port, axis), found in parts.items():
            if port[0] or not found:
                continue
            name = self._name(port)
            expression = next(iter(self._expressions(port)[axis : axis + 1]), None)
            if (port[1], axis) in self._info.full_inputs:
                yield self._needs_whole(name, axis, expression)
                continue
            pinned = {
                leaf
                for symbol in self._signature.pin & (expression.symbols if expression else frozenset())
                for leaf in self._info.symbols[symbol].leaves()
            }
            if pinned & found.keys():
                size = math.prod(leaf.size for leaf in pinned)
                yield error(
                    self._label,
                    name,
                    f"axis {axis} is split inside units of {size} that {self._node.op_type} works on as a whole",
                    f"split it between units only: into at most {self._size(port, axis) // size} shards",
                )

    def _size(self, port: Port, axis: int) -> int:
        return self._analysis.facts[self._value(port)].shape[axis]

    def _needs_whole(self, name: str, axis: int, expression: DimExpr | None) -> Finding:
        remedy = f"leave axis {axis} out of the node's spec for this tensor, so that it is gathered before the node"
        note = self._info.rule.note
        if note is not None:
            return warning(
                self._label,
                name,
                f"whether {self._node.op_type} can be split on axis {axis} is not known ({note})",
                remedy,
            )
        by_rule = expression is None or expression.kind == "full" or bool(expression.symbols & self._signature.full)
        if by_rule:
            return error(self._label, name, f"{self._node.op_type} needs axis {axis} whole, but it is split", remedy)
        return warning(
            self._label, name, f"the split of axis {axis} cannot be followed through {self._node.op_type}", remedy
        )

    def _by_symbol(self, parts: Mapping[tuple[Port, int], _Parts]) -> dict[str, list[tuple[Port, int, _Parts]]]:
        """For each symbol of the rule the dimensions that run over it, with how its leaves are split there."""
        found: dict[str, list[tuple[Port, int, _Parts]]] = {}
        for (port, axis), split in parts.items():
            expressions = self._expressions(port)
            expression = expressions[axis] if axis < len(expressions) else None
            # A concatenation has a part of each segment on every device, which one axis of shards cannot express.
            if expression is None or expression.kind != "product":
                continue
            for symbol in expression.symbols:
                if symbol in self._info.symbols:
                    leaves = set(self._info.symbols[symbol].leaves())
                    own = {leaf: part for leaf, part in split.items() if leaf in leaves}
                    found.setdefault(symbol, []).append((port, axis, own))
        return found

    def _check_alike(self, parts: Mapping[tuple[Port, int], _Parts]) -> Iterator[Finding]:
        """Inputs that an operator reads side by side must be split alike."""
        told: set[tuple[Port, int]] = set()
        for symbol, uses in self._by_symbol(parts).items():
            inputs = [use for use in uses if not use[0][0]]
            for port, axis, found in inputs[1:]:
                first_port, first_axis, first = inputs[0]
                if found == first or (port, axis) in told:
                    continue
                told.add((port, axis))
                what = "contracts" if symbol in self._signature.reduce else "aligns"
                yield error(
                    self._label,
                    self._name(port),
                    f"{self._node.op_type} {what} axis {axis} of this tensor with axis {first_axis} of "
                    f'"{self._name(first_port)}", but they are not split alike: '
                    f"{_describe(found)} against {_describe(first)}",
                    "split both axes into the same shards on the same devices",
                )

    def _check_complete(self, parts: Mapping[tuple[Port, int], _Parts]) -> Iterator[Finding]:
        """For every combination of shards that the operator computes with, some device must hold all of them."""
        splits: dict[str, _Parts] = {}
        for symbol, uses in self._by_symbol(parts).items():
            for port, _, found in uses:
                if not port[0]:
                    splits.setdefault(symbol, {}).update(found)
        for operand in self._signature.outputs:
            if operand is None:
                continue
            symbols = {s for dim in operand if dim.kind == "product" for s in dim.symbols} | self._signature.reduce
            needed = [part for s in sorted(symbols) for part in splits.get(s, {}).values()]
            for part, second in itertools.combinations(needed, 2):
                at, at_second = dict(part.positions), dict(second.positions)
                held = {(at[d], at_second[d]) for d in at.keys() & at_second.keys()}
                if len(held) < part.parts * second.parts:
                    yield error(
                        self._label,
                        self._name((True, 0)),
                        f"{self._node.op_type} computes with every pair of {part.parts} and {second.parts} shards, but "
                        f"devices hold {len(held)} of the {part.parts * second.parts} pairs",
                        "replicate one of the inputs, or split them over different device groups",
                    )
                    return


def _describe(parts: _Parts) -> str:
    if not parts:
        return "whole"
    held = [dict(part.positions) for part in parts.values()]
    devices = sorted(held[0], key=lambda device: ([positions[device] for positions in held], device))
    return f"{math.prod(part.parts for part in parts.values())} shards on devices {devices}"
