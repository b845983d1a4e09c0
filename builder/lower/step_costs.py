"""What a step costs one PE, as functions of its sequences, its new tokens and its context.

The costs of ops (`builder/rules/cost.py`) at a few sizes give a polynomial for the whole program, so that a clock can
ask for the cost of millions of steps. Blocks, output head and tables are apart: a step needs the logits of one token
of a sequence, however many tokens it has. What the figures assume is in docs/simulation.md.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from furiosa_llm.builder.errors import ShapeError
from furiosa_llm.builder.lower.blocks import find_blocks
from furiosa_llm.builder.lower.build import Build
from furiosa_llm.builder.lower.check_shapes import interpreter
from furiosa_llm.builder.lower.program_shapes import local_inputs
from furiosa_llm.builder.rules.registry import cost_of, is_weight, nbytes_read, op_of
from furiosa_llm.builder.rules.view import NodeView
from furiosa_llm.builder.shapes.closures import graphs_of
from furiosa_llm.builder.shapes.interface import SizeSet
from furiosa_llm.builder.shapes.interpreter import Facts, attribute_key
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
        program = _Program(build)
        runs = [_Run(program, *sizes) for sizes in _RUNS]
    except ShapeError:
        return None
    nodes = program.nodes
    head = set(_head(program, runs[2]))
    terms = np.array([_terms(*sizes) for sizes in _RUNS], dtype=np.float64)
    flops = np.array([[run.flops[node] for node in nodes] for run in runs], dtype=np.float64)
    fitted = np.linalg.lstsq(terms, flops, rcond=None)[0]
    totals = flops.sum(axis=1)
    in_blocks = np.array([node not in head for node in nodes])
    one, states = runs[0], build.states.pairs
    per_sequence, per_position = _fit([run.state_nbytes(build) for run in runs], _RUNS, (2, 3))
    activations = _fit([_moved(program, run, head) for run in runs], _RUNS, (0, 1, 2, 3, 4))
    return StepCosts(
        tensor_parallel_size=build.plan.mesh.size,
        layers=max(len(find_blocks(build)), len(states) // 2, 1),
        weights=tuple(_weights(build, one, head)),
        flops_per_token=float((fitted[1] + fitted[2]) @ in_blocks),
        flops_per_row=float((fitted[1] + fitted[2]) @ ~in_blocks),
        attention=tuple(_attention(program, fitted)),
        state_nbytes_per_sequence=round(per_sequence, 3),
        state_nbytes_per_position=round(per_position, 3),
        state_bits=max((one.facts[pair.input].dtype.bitwidth for pair in one.grown(build)), default=0),
        activation_nbytes_per_token=round(float(activations[1]), 3),
        traffic=tuple(_traffic(build, nodes, one, head)),
        ops=sum(node.domain != COLLECTIVE_DOMAIN for node in nodes) - len(program.constant),
        residual=float(np.max(np.abs(terms @ fitted.sum(axis=1) - totals) / totals)),
    )


class _Program:
    """What a program is at all sizes."""

    def __init__(self, build: Build) -> None:
        self.build, self.nodes = build, list(build.lowered.graph)
        self.model = ir.Model(build.lowered.graph, ir_version=build.ir_version)
        self.opset = build.lowered.graph.opset_imports.get("", 1)
        kinds: dict[object, int] = {}
        self.kinds = {node: kinds.setdefault(self._kind(node), len(kinds)) for node in self.nodes}
        """Nodes of one number cost the same on equal inputs: layers repeat, and one of them is counted."""
        self.constant = _made_of_weights(self.nodes)
        self.reads: dict[frozenset[ir.Node], list[ir.Value]] = {}
        """By the nodes that are kernels; see `_reads`."""

    def is_weight(self, node: ir.Node, port: int) -> bool:
        return is_weight(NodeView(node, {}, {}, self.opset), port)

    def _kind(self, node: ir.Node) -> object:
        if graphs_of(node):  # what they read around them is no input
            return node
        attributes = tuple(sorted((name, attribute_key(a)) for name, a in node.attributes.items()))
        weights = tuple(v is not None and self.is_weight(node, port) for port, v in enumerate(node.inputs))
        present = tuple(v is not None for v in node.inputs)
        return node.domain, node.op_type, node.overload, len(node.outputs), present, weights, attributes


class _Run:
    """The facts and FLOPs of every value and node at one choice of sizes, and which nodes are kernels."""

    def __init__(self, program: _Program, batch: int, new: int, past: int) -> None:
        sizes = SizeSet(batch=batch, sequence=new, past=past, encoder=past, others=(batch,))
        self._program, mesh = program, program.build.plan.mesh
        self.facts: Facts = interpreter(program.model, mesh).run_inside(local_inputs(program.build, sizes))
        self.flops: dict[ir.Node, int] = {}
        kernels: set[ir.Node] = set()
        known: dict[tuple[int, ...], tuple[int, bool]] = {}
        for node in program.nodes:
            facts = (*map(self._fact_id, node.inputs), *map(self._fact_id, node.outputs))
            key = program.kinds[node], *facts
            if key not in known:
                flops = cost_of(self.view(node)).flops
                known[key] = flops, self._is_kernel(node, flops)
            self.flops[node], is_kernel = known[key]
            if is_kernel:
                kernels.add(node)
        self.kernels = frozenset(kernels)

    def _fact_id(self, value: ir.Value | None) -> int:
        """The interpreter has one object for equal facts."""
        return 0 if value is None else id(self.facts[value])

    def _is_kernel(self, node: ir.Node, flops: int) -> bool:
        """Whether a compiler would make `node` a kernel of its own, instead of fusing it with what is around it."""
        entry = op_of(node)
        if node.domain == COLLECTIVE_DOMAIN or (entry is not None and entry.caches):
            return True
        view = self.view(node)
        weights = (port for port in range(len(node.inputs)) if self._program.is_weight(node, port))
        if flops and any(view.rank(port) > 1 for port in weights):
            return True
        elements = [math.prod(self.facts[v].shape) for v in (*node.inputs, *node.outputs) if v is not None]
        return flops > _PRODUCT * sum(elements)

    def view(self, node: ir.Node) -> NodeView:
        return NodeView(node, self.facts, self.facts, self._program.opset)

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


def _attention(program: _Program, fitted: npt.NDArray[Any]) -> Iterator[Attention]:
    """Where a long run has fewer FLOPs than the polynomial says, queries see no more keys than a window."""
    past, run = next(((past, run) for past in _LONG if (run := _try(program, past)) is not None), (0, None))
    rest = np.array(_terms(1, 1, past))[:4] @ fitted[:4]
    slopes = zip(program.nodes, fitted[4].tolist(), rest.tolist(), strict=True)
    pairs = {node: (s, other) for node, s, other in slopes if s > 1}
    found: dict[int | None, float] = {}
    for node, (slope, others) in pairs.items():
        keys = past + 1 if run is None else (run.flops[node] - others) / slope
        window = round(keys) if keys < _WINDOWED * (past + 1) else None
        found[window] = found.get(window, 0.0) + slope
    for window, slope in found.items():
        yield Attention(flops_per_pair=slope, window=window)


def _try(program: _Program, past: int) -> _Run | None:
    try:
        return _Run(program, 1, 1, past)
    except ShapeError:
        return None


# -- the parts of the program --------------------------------------------------------------------------------------


def _head(program: _Program, run: _Run) -> Iterator[ir.Node]:
    """From the logits back to the product that makes them."""
    build = program.build
    outputs = {str(v.name): v for v in build.lowered.graph.outputs}
    start = None if build.logits is None else outputs.get(str(build.logits.name))
    waiting = [] if start is None else [start.producer()]
    seen: set[ir.Node] = set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        if node.domain == COLLECTIVE_DOMAIN or node not in run.kernels:
            waiting += [v.producer() for v in node.inputs if v is not None]
        else:
            waiting += [m for v in node.inputs if v is not None and (m := v.producer()) in program.constant]


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


def _moved(program: _Program, run: _Run, head: set[ir.Node]) -> int:
    """The bytes between kernels: an op that is none is fused with what it follows, and what stays inside is not moved.

    A value is written once, and read once by each group of fused ops. The weights of chosen experts are read in place.
    """
    if run.kernels not in program.reads:
        program.reads[run.kernels] = _reads(program, run.kernels, head)
    reads = program.reads[run.kernels]
    return run.nbytes(reads) + run.nbytes(list(dict.fromkeys(reads)))


def _reads(program: _Program, kernels: frozenset[ir.Node], head: set[ir.Node]) -> list[ir.Value]:
    """The values that groups of fused ops read of others, once for each group."""
    group: dict[ir.Node, int] = {}
    for number, node in enumerate(program.nodes):
        before = [group[m] for v in node.inputs if v is not None and (m := v.producer()) in group and m not in kernels]
        group[node] = max(before) if before and node not in kernels else number
    entries = [(node, entry) for node in program.nodes if (entry := op_of(node)) is not None and entry.caches]
    caches = {node.inputs[port] for node, entry in entries for port in entry.caches}
    reads = {
        (value, group[node])
        for node in program.nodes
        if node not in head
        for port, value in enumerate(node.inputs)
        if value is not None
        and (maker := value.producer()) is not None
        and not program.is_weight(node, port)
        and maker not in program.constant
        and group[maker] != group[node]
        and value not in caches
    }
    return [value for value, _ in reads]
