"""What a step costs one PE, as functions of its sequences, its new tokens and its context.

The costs of ops (`builder/rules/cost.py`) at a few sizes give a polynomial for the whole program, so that a clock can
ask for the cost of millions of steps. Blocks, output head and tables are apart: a step needs the logits of one token
of a sequence, however many tokens it has. What the figures assume is in docs/simulation.md.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from furiosa_llm.builder.errors import ShapeError
from furiosa_llm.builder.lower.blocks import find_blocks
from furiosa_llm.builder.lower.build import Build
from furiosa_llm.builder.lower.check_shapes import interpreter
from furiosa_llm.builder.lower.program_shapes import local_inputs
from furiosa_llm.builder.rules.cost import Cost
from furiosa_llm.builder.rules.registry import costs_of, is_weight, nbytes_read, op_of
from furiosa_llm.builder.rules.view import NodeView
from furiosa_llm.builder.shapes.interface import SizeSet
from furiosa_llm.builder.shapes.interpreter import Facts
from furiosa_llm.runtime.artifact.graphs import COLLECTIVE_DOMAIN

VERSION = 2
_RUNS = ((1, 1, 32), (1, 1, 64), (1, 8, 32), (2, 8, 40), (2, 1, 72), (3, 4, 48))
"""Sequences, new tokens of each, past tokens of each: one run more than a polynomial has terms."""
_LONG = (32767, 8191, 2047)
"""Past tokens of the run that shows the windows of attention; shorter where a model has no positions for it."""
_PRODUCT = 16
"""FLOPs for each element read or written from which a node is a kernel of its own."""
_WINDOWED = 0.95
"""The share of the keys of a long context that a query sees at most if it has a window."""
_TABLE = 1 / 1024
"""The largest share of a weight that one token reads if rows of it are looked up."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """Stored tensors of which one token reads the same share; `share` < 1: experts, or the rows of a table."""

    part: str
    """`block`, `head` or `table`."""
    nbytes: int
    share: float
    bits: int
    """Of an element as it is stored."""
    floating: bool


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Attention:
    """What attention computes for each pair of a query and a key."""

    flops_per_pair: float
    window: int | None
    """The most keys that a query sees; None: the whole context."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """Equal collectives: what each gives a rank for one token, in the blocks or in the head."""

    kind: str
    parts: int
    nbytes: int
    count: int
    head: bool


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class StepCosts:
    """The costs of a step on one PE of a model with one stage."""

    version: int = VERSION
    """Of the form of these fields, in `plan --json`."""
    tensor_parallel_size: int
    layers: int
    weights: tuple[Weights, ...]
    flops_per_token: float
    """In the blocks, without attention."""
    flops_per_row: float
    """In the head, for the logits of one token."""
    attention: tuple[Attention, ...]
    state_nbytes_per_sequence: float
    state_nbytes_per_position: float
    """The cache, of which a step reads all that there is of its sequences; none without a cache."""
    state_bits: int
    activation_nbytes_per_token: float
    """Read and written between kernels, if chains of cheap ops are fused."""
    traffic: tuple[Traffic, ...]
    ops: int
    """Nodes of the program that a step runs, without collectives and what is folded as the program is loaded."""
    residual: float
    """The largest relative difference of the polynomial from a run that it was made of."""


def step_costs(build: Build) -> StepCosts | None:
    """The costs of `build`; None for a model that does not take steps of the sizes that are tried."""
    try:
        runs = [_Run(build, *sizes) for sizes in _RUNS]
    except ShapeError:
        return None
    nodes = list(build.lowered.graph)
    head = set(_head(build, nodes, runs[2]))
    terms = np.array([_terms(*sizes) for sizes in _RUNS], dtype=np.float64)
    flops = np.array([[run.costs[node].flops for node in nodes] for run in runs], dtype=np.float64)
    fitted = np.linalg.lstsq(terms, flops, rcond=None)[0]
    totals = flops.sum(axis=1)
    in_blocks = np.array([node not in head for node in nodes])
    one, states = runs[0], build.states.pairs
    per_sequence, per_position = _fit([run.state_nbytes(build) for run in runs], _RUNS, (2, 3))
    activations = _fit([_moved(nodes, run, head) for run in runs], _RUNS, (0, 1, 2, 3, 4))
    return StepCosts(
        tensor_parallel_size=build.plan.mesh.size,
        layers=max(len(find_blocks(build)), len(states) // 2, 1),
        weights=tuple(_weights(build, one, head)),
        flops_per_token=float((fitted[1] + fitted[2]) @ in_blocks),
        flops_per_row=float((fitted[1] + fitted[2]) @ ~in_blocks),
        attention=tuple(_attention(build, nodes, fitted)),
        state_nbytes_per_sequence=round(per_sequence, 3),
        state_nbytes_per_position=round(per_position, 3),
        state_bits=max((one.facts[pair.input].dtype.bitwidth for pair in one.grown(build)), default=0),
        activation_nbytes_per_token=round(float(activations[1]), 3),
        traffic=tuple(_traffic(build, nodes, one, head)),
        ops=sum(node.domain != COLLECTIVE_DOMAIN for node in nodes) - len(_made_of_weights(nodes)),
        residual=float(np.max(np.abs(terms @ fitted.sum(axis=1) - totals) / totals)),
    )


class _Run:
    """The facts and costs of every value and node at one choice of sizes."""

    def __init__(self, build: Build, batch: int, new: int, past: int) -> None:
        sizes = SizeSet(batch=batch, sequence=new, past=past, encoder=past, others=(batch,))
        program = ir.Model(build.lowered.graph, ir_version=build.ir_version)
        self.facts: Facts = interpreter(program, build.plan.mesh).run_inside(local_inputs(build, sizes))
        self.opset = program.graph.opset_imports.get("", 1)
        self.costs: Mapping[ir.Node, Cost] = costs_of(program.graph, self.facts, self.opset)

    def view(self, node: ir.Node) -> NodeView:
        return NodeView(node, self.facts, self.facts, self.opset)

    def nbytes(self, values: Sequence[ir.Value | None]) -> int:
        return sum(self.facts[value].nbytes for value in values if value is not None and value in self.facts)

    def grown(self, build: Build) -> Iterator[Any]:
        """The pairs of states, as values of the program."""
        inputs = {str(v.name): v for v in build.lowered.graph.inputs}
        outputs = {str(v.name): v for v in build.lowered.graph.outputs}
        for pair in build.states.pairs:
            first, last = inputs.get(str(pair.input.name)), outputs.get(str(pair.output.name))
            if first is not None and last is not None:
                yield _Pair(first, last)

    def state_nbytes(self, build: Build) -> int:
        return sum(self.facts[pair.output].nbytes for pair in self.grown(build))


@dataclasses.dataclass(frozen=True, slots=True)
class _Pair:
    input: ir.Value
    output: ir.Value


def _terms(batch: int, new: int, past: int) -> tuple[int, ...]:
    """Those of the polynomial: 1, tokens, sequences, positions, and pairs of a query and a key."""
    return 1, batch * new, batch, batch * (past + new), batch * new * (past + new)


def _fit(values: Sequence[float], runs: Sequence[tuple[int, int, int]], which: Sequence[int]) -> npt.NDArray[Any]:
    terms = np.array([[_terms(*run)[term] for term in which] for run in runs], dtype=np.float64)
    return np.linalg.lstsq(terms, np.array(values, dtype=np.float64), rcond=None)[0]


def _attention(build: Build, nodes: Sequence[ir.Node], fitted: npt.NDArray[Any]) -> Iterator[Attention]:
    """Where a long run has fewer FLOPs than the polynomial says, queries see no more keys than a window."""
    past, run = next(((past, run) for past in _LONG if (run := _try(build, past)) is not None), (0, None))
    rest = np.array(_terms(1, 1, past))[:4] @ fitted[:4]
    pairs = {node: (s, other) for node, s, other in zip(nodes, fitted[4].tolist(), rest.tolist(), strict=True) if s > 1}
    found: dict[int | None, float] = {}
    for node, (slope, others) in pairs.items():
        keys = past + 1 if run is None else (run.costs[node].flops - others) / slope
        window = round(keys) if keys < _WINDOWED * (past + 1) else None
        found[window] = found.get(window, 0.0) + slope
    for window, slope in found.items():
        yield Attention(flops_per_pair=slope, window=window)


def _try(build: Build, past: int) -> _Run | None:
    try:
        return _Run(build, 1, 1, past)
    except ShapeError:
        return None


# -- the parts of the program --------------------------------------------------------------------------------------


def _is_kernel(node: ir.Node, run: _Run) -> bool:
    """Whether a compiler would make `node` a kernel of its own, instead of fusing it with what is around it."""
    entry = op_of(node)
    if node.domain == COLLECTIVE_DOMAIN or (entry is not None and entry.caches):
        return True
    view, flops = run.view(node), run.costs[node].flops
    if flops and any(is_weight(view, port) and view.rank(port) > 1 for port in range(len(node.inputs))):
        return True
    elements = [math.prod(run.facts[v].shape) for v in (*node.inputs, *node.outputs) if v is not None]
    return flops > _PRODUCT * sum(elements)


def _head(build: Build, nodes: Sequence[ir.Node], run: _Run) -> Iterator[ir.Node]:
    """From the logits back to the product that makes them."""
    outputs = {str(v.name): v for v in build.lowered.graph.outputs}
    start = None if build.logits is None else outputs.get(str(build.logits.name))
    waiting = [] if start is None else [start.producer()]
    constant = _made_of_weights(nodes)
    seen: set[ir.Node] = set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        if node.domain == COLLECTIVE_DOMAIN or not _is_kernel(node, run):
            waiting += [v.producer() for v in node.inputs if v is not None]
        else:
            waiting += [m for v in node.inputs if v is not None and (m := v.producer()) in constant]


def _made_of_weights(nodes: Sequence[ir.Node]) -> set[ir.Node]:
    """The nodes whose outputs follow from weights alone."""
    found: set[ir.Node] = set()
    for node in nodes:
        if all(v is None or v.is_initializer() or v.producer() in found for v in node.inputs):
            found.add(node)
    return found


def _weights(build: Build, one: _Run, head: set[ir.Node]) -> Iterator[Weights]:
    """A tensor that several nodes read counts as the one that reads most of it does."""
    tensors = build.lowered.tensors
    reads: dict[str, tuple[float, bool]] = {}
    for node in build.lowered.graph:
        ports = [(p, str(v.name)) for p, v in enumerate(node.inputs) if v is not None and str(v.name) in tensors]
        counted = nbytes_read(one.view(node)) if ports else {}
        for port, name in ports:
            share = min(counted[port] / max(tensors[name].local_nbytes, 1), 1.0)
            reads[name] = max(reads.get(name, (0.0, False)), (share, node in head))
    kinds: Counter[tuple[str, float, int, bool]] = Counter()
    for name, (share, in_head) in reads.items():
        tensor = tensors[name]
        part = "head" if in_head else "table" if share <= _TABLE else "block"
        kinds[part, share, tensor.dtype.bitwidth, tensor.dtype.is_floating_point()] += tensor.local_nbytes
    for (part, share, bits, floating), nbytes in sorted(kinds.items()):
        yield Weights(part=part, nbytes=nbytes, share=share, bits=bits, floating=floating)


def _traffic(build: Build, nodes: Sequence[ir.Node], one: _Run, head: set[ir.Node]) -> Iterator[Traffic]:
    found = Counter(
        (
            node.op_type,
            build.plan.mesh.parts(tuple(node.attributes["axes"].as_ints())),
            one.nbytes(node.outputs),
            node in head,
        )
        for node in nodes
        if node.domain == COLLECTIVE_DOMAIN
    )
    for (kind, parts, nbytes, in_head), count in sorted(found.items()):
        yield Traffic(kind=kind, parts=parts, nbytes=nbytes, count=count, head=in_head)


def _moved(nodes: Sequence[ir.Node], run: _Run, head: set[ir.Node]) -> int:
    """The bytes between kernels: an op that is none is fused with what it follows, and what stays inside is not moved.

    A value is written once, and read once by each group of fused ops. The weights of chosen experts are read in place.
    """
    group: dict[ir.Node, int] = {}
    kernels = {node for node in nodes if _is_kernel(node, run)}
    for number, node in enumerate(nodes):
        before = [group[m] for v in node.inputs if v is not None and (m := v.producer()) in group and m not in kernels]
        group[node] = max(before) if before and node not in kernels else number
    entries = [(node, entry) for node in nodes if (entry := op_of(node)) is not None and entry.caches]
    caches = {node.inputs[port] for node, entry in entries for port in entry.caches}
    constant = _made_of_weights(nodes)
    reads = {
        (value, group[node])
        for node in nodes
        if node not in head
        for port, value in enumerate(node.inputs)
        if value is not None
        and (maker := value.producer()) is not None
        and not is_weight(run.view(node), port)
        and maker not in constant
        and group[maker] != group[node]
        and value not in caches
    }
    return run.nbytes([value for value, _ in reads]) + run.nbytes(list({value for value, _ in reads}))
