"""Which inputs and outputs carry state from step to step, found by following the data."""

from __future__ import annotations

import dataclasses
import functools
import operator
import re
from collections.abc import Callable, Iterator, Mapping, Sequence

import onnx_ir as ir

from furiosa_llm.builder.rules import op_of
from furiosa_llm.builder.shapes.flow import as_outputs, grown_output, is_kept, reached
from furiosa_llm.builder.shapes.interface import PROBE, SECOND_PROBE, role_of
from furiosa_llm.builder.shapes.interpreter import Fact, Facts
from furiosa_llm.runtime.artifact.manifest import StateMode

_STATE_OUTPUT = re.compile(r"present.*")
_POSITIONS = frozenset((getattr(PROBE, kind), getattr(SECOND_PROBE, kind)) for kind in ("sequence", "past", "total"))
"""The sizes of dimensions that count positions."""
MAX_REPLACED = 1024
"""Where more inputs or outputs than this may be states of a fixed size, none is taken for one: which of them belong
together takes a comparison of each with each."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class StatePair:
    """An input and the output that it becomes."""

    input: ir.Value
    output: ir.Value
    sequence_dim: int | None
    """The dimension in which the output is longer; None for a state of a fixed size."""
    mode: StateMode
    """`in_place`: the op writes new positions into the input's buffer if it has room."""
    named: bool = False
    """Whether the graph left a choice that numbers in names, or the order of inputs and outputs, settled."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class States:
    """The state of a model."""

    pairs: tuple[StatePair, ...]
    values: frozenset[ir.Value]
    """Every graph input and output that carries state, also without a partner (a prefill graph has no past)."""


def find_states(graph: ir.Graph, facts: Facts, others: Facts) -> States:
    """The state inputs and outputs of `graph`, and which output becomes which input.

    An input that ops append to pairs with the output that holds the result. An input that keeps its size pairs with an
    output that is computed from it and has the same type and shape at the sizes of `facts` and of `others`.
    """
    named = [value for value in graph.inputs if role_of(value) == "state"]
    pairs = {value: pair for value in named if (pair := _grown_pair(value, facts)) is not None}
    taken = {pair.output for pair in pairs.values()}
    left = [value for value in graph.inputs if value not in pairs and _keeps_its_size(value, facts, others)]
    if len(left) + len(pairs) == len(graph.inputs):
        left = []  # nothing new comes in, so there are no steps
    ends = [value for value in graph.outputs if value not in taken and _keeps_its_size(value, facts, others)]
    pairs |= {pair.input: pair for pair in _replaced_pairs(graph, left, ends, facts)}
    outputs = {pair.output for pair in pairs.values()}
    outputs |= {v for v in graph.outputs if _STATE_OUTPUT.fullmatch(str(v.name)) and v.producer() is not None}
    ordered = tuple(pairs[value] for value in graph.inputs if value in pairs)
    return States(pairs=ordered, values=frozenset((*named, *pairs)) | outputs)


def is_rolled(pair: StatePair) -> bool:
    """Whether a state of a fixed size has its new positions behind the others, of which the oldest fall out."""
    old = set(reached([pair.input], is_kept))
    value: ir.Value | None = pair.output
    while pair.mode == "replace" and value is not None and (node := value.producer()) is not None:
        if node.op_type == "Concat":
            return node.inputs[0] in old and node.inputs[-1] not in old
        value = node.inputs[0] if is_kept(node, 0) else None
    return False


# -- states that grow ----------------------------------------------------------------------------------------------


def _grown_pair(value: ir.Value, facts: Facts) -> StatePair | None:
    """The output that holds the same positions as `value`, and the new positions after them."""
    for appended, node in _appended(value):
        for output in as_outputs(appended):
            before, after = facts[value], facts[output]
            sizes = zip(before.shape, after.shape, strict=False)
            grown = [d for d, (a, b) in enumerate(sizes) if a != b]
            alike = before.dtype == after.dtype and len(before.shape) == len(after.shape)
            if alike and len(grown) == 1 and not _is_fixed(value, grown[0]):
                in_place = value in node.inputs and output in node.outputs and _writes_in_place(node)
                mode: StateMode = "in_place" if in_place else "append"
                return StatePair(input=value, output=output, sequence_dim=grown[0], mode=mode)
    return None


def _writes_in_place(node: ir.Node) -> bool:
    """Whether all caches of `node` are graph inputs and outputs that nothing else reads.

    Another reader of a cache in place would find it as long as its buffer.
    """
    entry = op_of(node)
    if entry is None or not entry.in_place:
        return False
    for port, out in entry.caches.items():
        before, after = node.inputs[port], node.outputs[out]
        if before is None or not before.is_graph_input() or not after.is_graph_output():
            return False
        if after.uses() or any(reader is not node for reader, _ in before.uses()):
            return False
    return True


def _is_fixed(value: ir.Value, d: int) -> bool:
    """Whether a dimension of an input has one size only: then no new positions are appended in it."""
    return value.shape is not None and isinstance(value.shape[d], int)


def _appended(value: ir.Value) -> Iterator[tuple[ir.Value, ir.Node]]:
    """Values that hold `value` with new positions, each with the node that appends these."""
    for form in reached([value], is_kept):
        for node, port in form.uses():
            grown = None if is_kept(node, port) else grown_output(node, port)
            if grown is not None and (node.op_type != "Concat" or port == 0):
                yield grown, node


# -- states of a fixed size ----------------------------------------------------------------------------------------


def _keeps_its_size(value: ir.Value, facts: Facts, others: Facts) -> bool:
    """Whether `value` has elements as a state has them, and at most one dynamic dimension, the batch.

    So a model for one sequence has inputs with one dynamic dimension that counts positions: these are no states.
    """
    fact, other = facts[value], others[value]
    changed = [pair for pair in zip(fact.shape, other.shape, strict=True) if pair[0] != pair[1]]
    kept = len(changed) <= 1 and _POSITIONS.isdisjoint(changed)
    return len(fact.shape) > 1 and kept and (fact.dtype.is_floating_point() or _is_state(value))


def _is_state(value: ir.Value) -> bool:
    """Whether a graph input is a state; quantised caches have integers."""
    return value.is_graph_input() and role_of(value) == "state"


def _replaced_pairs(
    graph: ir.Graph, inputs: Sequence[ir.Value], outputs: Sequence[ir.Value], facts: Facts
) -> Iterator[StatePair]:
    """Pair each output with the input that it is computed from, if earlier outputs leave exactly one such input.

    A layer's state depends on the states of all layers before it, so outputs that depend on fewer inputs come first:
    on fewer of its own type and shape, then on fewer of any.
    """
    if not outputs or max(len(inputs), len(outputs)) > MAX_REPLACED:
        return
    computed = _computed_from(graph, inputs)
    moved = {value: _moved_from(value) for value in inputs}
    sources = {
        output: [
            value
            for number, value in enumerate(inputs)
            if computed.get(output, 0) >> number & 1 and _are_alike(facts[value], facts[output])
        ]
        for output in outputs
    }
    taken: set[ir.Value] = set()
    for output in outputs:  # what is moved or written into comes out where it goes, whatever else depends on it
        written = [value for value in sources[output] if output in moved[value]]
        if len(written) == 1 and written[0] not in taken:
            taken.add(written[0])
            sources.pop(output)
            yield StatePair(input=written[0], output=output, sequence_dim=None, mode="replace")
    found: dict[ir.Value, ir.Value] = {}
    for output in sorted(sources, key=lambda output: (len(sources[output]), computed.get(output, 0).bit_count())):
        free = [value for value in sources[output] if value not in taken]
        if len(free) == 1:
            taken.add(free[0])
            found[free[0]] = output
    left = [value for value in inputs if value not in taken or value in found]
    named = _named_pairs(left, list(sources), found, facts)
    for value, output in (found | named).items():
        yield StatePair(input=value, output=output, sequence_dim=None, mode="replace", named=value in named)


def _named_pairs(
    inputs: Sequence[ir.Value], outputs: Sequence[ir.Value], found: Mapping[ir.Value, ir.Value], facts: Facts
) -> dict[ir.Value, ir.Value]:
    """Pairs of those types and shapes of which `found` pairs some inputs and outputs and leaves as many alone.

    What a layer takes over from the step before may be one position of what enters it: then its output is computed
    from the states of earlier layers, and not from its own. Equal numbers in names tell which belong together, else
    the order.
    """
    pairs: dict[ir.Value, ir.Value] = {}
    for first in found:
        own = [value for value in inputs if _are_alike(facts[value], facts[first])]
        ends = [output for output in outputs if _are_alike(facts[output], facts[first])]
        if len(own) != len(ends) or all(value in found for value in own) or first in pairs:
            continue
        numbers = [[tuple(re.findall(r"\d+", str(value.name))) for value in values] for values in (own, ends)]
        if len(set(numbers[0])) == len(own) and set(numbers[0]) == set(numbers[1]):
            ends = [ends[numbers[1].index(number)] for number in numbers[0]]
        pairs |= dict(zip(own, ends, strict=True))
    return pairs


def _are_alike(one: Fact, other: Fact) -> bool:
    return one.shape == other.shape and one.dtype == other.dtype


def _moved_from(value: ir.Value) -> set[ir.Value]:
    """The values that hold elements of `value`, possibly among others."""

    def outputs(node: ir.Node, port: int) -> Sequence[ir.Value]:
        grown = None if is_kept(node, port) else grown_output(node, port)
        return node.outputs if is_kept(node, port) else () if grown is None else (grown,)

    return _followed(value, outputs)


def _computed_from(graph: ir.Graph, inputs: Sequence[ir.Value]) -> dict[ir.Value, int]:
    """From the elements of which of `inputs` each value is computed: a bit for each of them.

    Of the caches of a node each output depends on the one that it is.
    """
    found = {value: 1 << number for number, value in enumerate(inputs)}
    for node in graph:
        if node.op_type in ("Shape", "Size"):
            continue
        entry = op_of(node)
        caches = {} if entry is None else entry.caches
        used = {port: found[value] for port, value in enumerate(node.inputs) if value in found}
        for out, output in enumerate(node.outputs if used else ()):
            others = {port for port, made in caches.items() if made != out} if out in caches.values() else ()
            bits = functools.reduce(operator.or_, (bit for port, bit in used.items() if port not in others), 0)
            if bits:
                found[output] = bits
    return found


def _followed(value: ir.Value, outputs: Callable[[ir.Node, int], Sequence[ir.Value]]) -> set[ir.Value]:
    """`value`, and the `outputs` of every node that reads one that is reached."""
    queue, seen = [value], {value}
    while queue:
        for node, port in queue.pop().uses():
            fresh = [output for output in outputs(node, port) if output not in seen]
            seen.update(fresh)
            queue.extend(fresh)
    return seen
