"""Which leaves may be split, and which of them are split alike: those that play the same part in every layer."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from types import MappingProxyType

import onnx_ir as ir

from furiosa_llm.builder.factors.analysis import Analysis, NodeInfo, find_weight_derived
from furiosa_llm.builder.factors.factor import Factor, Kind
from furiosa_llm.builder.factors.states import States
from furiosa_llm.builder.rules import keeps_weights
from furiosa_llm.builder.shapes.growth import position_dim
from furiosa_llm.builder.shapes.interface import role_of


@dataclasses.dataclass(frozen=True, slots=True)
class LeafGroup:
    """Leaves that play the same part in every layer, and are therefore split alike."""

    leaves: tuple[Factor, ...]
    size: int
    nbytes: int
    """Bytes of the weights that the leaves occur in."""
    description: str
    """Where they occur: op type, operand, its shape and the dimension."""
    role: str
    """What they are to people: `vocabulary`, `key/value heads`, `feed-forward` and so on (see `_Roles`)."""
    weights: tuple[str, ...]
    """Names of the weights that the first of the leaves occurs in."""


_Place = tuple[str, int, tuple[int, ...], int, int]
"""Where a leaf occurs: op type, operand, the operand's shape, dimension, position in the dimension."""


def candidates(analysis: Analysis, states: States) -> list[Factor]:
    """Leaves worth splitting: the leaves of weights that are contracted or looked up, and that no op uses inside.

    The head vector, the innermost leaf of a KV cache, stays whole, because attention kernels work on whole heads.
    Inputs of the model that are not states stay whole, because every rank receives them unsplit.
    """
    weights = find_weight_derived(analysis)
    kept_whole = set(analysis.pinned) | set(_head_vectors(analysis, states, weights))
    for value in analysis.graph.inputs:
        if value not in states.values:
            kept_whole.update(leaf for factor in analysis.dims[value] for leaf in factor.leaves())
    found: dict[Factor, None] = {}
    for info in analysis.nodes:
        if not info.contracts and not info.looked_up:
            continue
        for weight in info.node.inputs:
            if weight is None or weight not in weights or len(analysis.dims[weight]) < 2:
                continue
            for d, factor in enumerate(analysis.dims[weight]):
                if not analysis.is_dynamic(weight, d):
                    found.update(dict.fromkeys(leaf for leaf in factor.leaves() if leaf.size > 1))
    return [leaf for leaf in found if leaf not in kept_whole]


def _head_vectors(analysis: Analysis, states: States, weights: AbstractSet[ir.Value]) -> Iterator[Factor]:
    """The dimensions of caches that are a head's vector: an op uses it inside, or one operand of a product has it.

    Where nothing shows them it is the innermost dimension, if it follows the positions; of three dimensions that
    holds the heads, too.
    """
    shown = {*analysis.pinned, *_vectors(analysis, weights)}
    for value in states.values:
        dims = analysis.dims[value]
        positions = [d for d in range(1, len(dims)) if analysis.is_dynamic(value, d)]
        written = None if positions or not value.is_graph_input() else position_dim(value)
        positions += [] if written is None else [written]
        if not positions:
            continue
        found = [leaf for d, dim in enumerate(dims) if d not in positions for leaf in dim.leaves() if leaf in shown]
        if found:
            yield from found
        elif positions[-1] + 1 < len(dims):
            leaves = list(dims[-1].leaves())
            yield from leaves if len(dims) > 3 else leaves[-1:]


def _vectors(analysis: Analysis, weights: AbstractSet[ir.Value]) -> Iterator[Factor]:
    """The leaves that only one operand of a product of scores or values has, and those that it contracts."""
    for info in analysis.nodes:
        operands = [value for value in info.node.inputs if value is not None]
        if not info.contracts or len(operands) != 2 or not weights.isdisjoint(operands):
            continue
        if any(len(analysis.dims[value]) < 3 for value in operands):
            continue  # a matrix that is an input: an adapter
        one, other = ({leaf for factor in analysis.dims[v] for leaf in factor.leaves()} for v in operands)
        yield from one ^ other
        yield from (leaf for factor in info.reduced for leaf in factor.leaves())


def group_leaves(
    analysis: Analysis,
    states: States,
    leaves: Sequence[Factor],
    counts: Mapping[ir.Value, int] = MappingProxyType({}),
    apart: Mapping[Factor, object] = MappingProxyType({}),
) -> list[LeafGroup]:
    """Leaves with the same signature: where they occur in which operand of which weight, and in what place.

    `counts` says for how many weights of the model a weight stands (1 if absent); leaves that differ in `apart` are not
    grouped.
    """
    wanted = set(leaves)
    places: dict[Factor, list[_Place]] = {leaf: [] for leaf in leaves}
    weights_of: dict[Factor, dict[ir.Value, None]] = {leaf: {} for leaf in leaves}
    weights = find_weight_derived(analysis)
    for info in analysis.nodes:
        for port, value in enumerate(info.node.inputs):
            if value is None or value not in weights:
                continue
            shape = analysis.facts[value].shape
            for d, factor in enumerate(analysis.dims[value]):
                for position, leaf in enumerate(factor.leaves()):
                    if leaf in wanted:
                        places[leaf].append((info.node.op_type, port, shape, d, position))
                        if value.is_initializer():
                            weights_of[leaf][value] = None
    members: dict[object, list[Factor]] = {}
    for leaf in leaves:
        members.setdefault((leaf.size, tuple(sorted(places[leaf])), apart.get(leaf)), []).append(leaf)
    roles = _Roles(analysis, states)
    groups = []
    for alike in members.values():
        first = alike[0]
        where = sorted({f"{op}[{port}]{list(shape)} dim {d}" for op, port, shape, d, _ in places[first]})
        groups.append(
            LeafGroup(
                leaves=tuple(alike),
                size=first.size,
                nbytes=sum(_nbytes(analysis, w) * counts.get(w, 1) for leaf in alike for w in weights_of[leaf]),
                description=", ".join(where),
                role=roles.of(first),
                weights=tuple(str(w.name) for w in weights_of[first]),
            )
        )
    return sorted(groups, key=lambda g: -g.nbytes)


def _nbytes(analysis: Analysis, value: ir.Value) -> int:
    fact = analysis.facts[value]
    return math.prod(fact.shape) * fact.dtype.bitwidth // 8


class _Roles:
    """Names for leaves, by what they do in the graph: for reports, and for people to choose leaves by."""

    def __init__(self, analysis: Analysis, states: States) -> None:
        dims = analysis.dims
        weights = {v for v in find_weight_derived(analysis) if len(dims[v]) > 1}
        tables = [(info, v) for info in analysis.nodes if info.looked_up for v in info.node.inputs if v in weights]
        self._state = _leaves(f for value in states.values for f in dims[value])
        self._looked_up = _leaves(f for info, _ in tables for f in info.looked_up)
        self._vocabulary = _leaves(f for info, _ in tables if _reads_tokens(info) for f in info.looked_up)
        self._hidden = _leaves(f for _, table in tables for f in dims[table])
        self._hidden_sizes = {leaf.size for leaf in self._hidden}
        self._scores = _leaves(dims[v][-1] for v in analysis.graph.outputs if v not in states.values and dims[v])
        self._contracted = _leaves(f for info in analysis.nodes for f in info.reduced)
        self._computed = _leaves(
            f for info in analysis.nodes if not weights.isdisjoint(info.node.inputs) for f in _computed(info)
        )
        self._stacked = _leaves(dims[value][0] for value in weights if len(dims[value]) == 3)
        self._beside: dict[Factor, set[Factor]] = {}
        for value in weights:
            for product in (p for factor in dims[value] for p in _products(factor)):
                for leaf in product:
                    self._beside.setdefault(leaf, set()).update(product)

    def of(self, leaf: Factor) -> str:
        """The name of `leaf`."""
        roles = (
            ("key/value heads", leaf in self._state),
            ("vocabulary", leaf in self._vocabulary),
            ("lookup table", leaf in self._looked_up),
            ("query heads per key/value head", not self._state.isdisjoint(self._beside.get(leaf, ()))),
            ("output", leaf in self._scores and leaf not in self._hidden),
            ("hidden", leaf in self._hidden),
            ("heads", any(mate.size > 2 for mate in self._beside.get(leaf, set()) - {leaf})),
            ("experts", leaf in self._stacked),
            ("hidden", leaf.size in self._hidden_sizes and leaf not in self._beside),
            ("feed-forward", leaf in self._contracted and leaf in self._computed),
        )
        return next((role for role, applies in roles if applies), "inner")


def _reads_tokens(info: NodeInfo) -> bool:
    """Whether token ids are looked up, perhaps in another form."""
    for value in info.node.inputs:
        source = value
        while source is not None and (node := source.producer()) is not None and keeps_weights(node):
            source = node.inputs[0]
        if source is not None and source.is_graph_input() and role_of(source) == "token_ids":
            return True
    return False


def _products(factor: Factor) -> Iterator[list[Factor]]:
    """The products below `factor` that several leaves make up."""
    root = factor.find()
    if root.kind is Kind.PRODUCT:
        leaves = [leaf for leaf in root.leaves() if leaf.size > 1]
        if len(leaves) > 1:
            yield leaves
    elif root.kind is Kind.CONCATENATION:
        for kid in root.kids:
            yield from _products(kid)


def _computed(info: NodeInfo) -> Iterator[Factor]:
    """The dimensions that a contraction gives its output."""
    contracted = {id(f.find()) for f in info.reduced}
    return (f for f in info.symbols.values() if contracted and id(f.find()) not in contracted)


def _leaves(factors: Iterator[Factor]) -> set[Factor]:
    return {leaf for factor in factors for leaf in factor.leaves() if leaf.size > 1}
