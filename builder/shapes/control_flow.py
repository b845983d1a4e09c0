"""Types and shapes of the outputs of If, Loop and Scan, found by interpreting their graphs.

Both branches of an If must give the same types and shapes, and the values that a Loop or Scan carries must keep their
types and shapes. If a Loop collects something from each iteration, the number of its iterations must be known.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir

from furiosa_llm.builder.errors import UnsupportedModelError
from furiosa_llm.builder.rules.facts import Fact, Facts
from furiosa_llm.builder.shapes.closures import BRANCHES, num_captured

Walk = Callable[[ir.Graph, Facts], None]
"""Interprets the nodes of a graph: reads the facts of its inputs and captured values, adds the facts of its nodes."""
Inputs = Sequence[Fact | None]

SIBLINGS = "siblings"
"""The key under which a graph carries the names of the model files next to its own."""


class ControlFlow:
    """Interprets the graphs inside nodes.

    If `lenient`, an If whose condition is known at these sizes has the outputs of the branch that is taken: this serves
    to find out which branches are always taken.
    """

    def __init__(self, walk: Walk, siblings: Sequence[str], *, lenient: bool) -> None:
        self._walk = walk
        self._siblings = siblings
        self._lenient = lenient

    def infer(self, node: ir.Node, inputs: Inputs, around: Facts) -> list[Fact]:
        """Facts of the outputs of a node; UnsupportedModelError if they are not the same in every run.

        `around` are the facts of the graph that the node is in; a closure does not look at them.
        """
        count = num_captured(node)
        own, captured = inputs[: len(inputs) - count], inputs[len(inputs) - count :]
        scope = Scope(node, captured, around if not count and not node.domain else {}, self._walk)
        match node.op_type:
            case "If":
                return self._if(scope, own)
            case "Loop":
                return _loop(scope, own)
            case _:
                return _scan(scope, own)

    def _if(self, scope: Scope, own: Inputs) -> list[Fact]:
        condition = own[0]
        if condition is None or condition.dtype is not ir.DataType.BOOL or _elements(condition) != 1:
            raise scope.fault(f"its condition is {_shown(condition)}", "one boolean")
        if self._lenient and condition.value is not None:
            return scope.run(BRANCHES[0 if condition.value.item() else 1], [])
        branches = [scope.run(name, []) for name in BRANCHES]
        found = []
        for output, then, other in zip(scope.node.outputs, *branches, strict=True):
            if (then.dtype, then.shape) != (other.dtype, other.shape):
                if then.dtype is other.dtype and condition.value is not None and _reads_constants(scope.node):
                    found.append(then if condition.value.item() else other)  # tables for short and for long contexts
                    continue
                raise scope.fault(
                    f'its branches give "{output.name}" as {_shown(then)} and {_shown(other)}, so they cannot be '
                    "inlined (its condition is not a constant)",
                    "the same type and shape from both",
                    self._remedy(scope.node.inputs[0]),
                )
            found.append(_common(then, other))
        return found

    def _remedy(self, condition: ir.Value | None) -> str:
        remedy = "export the branches as separate models, for instance the prefill and the with-past decoder"
        if condition is not None and condition.is_graph_input():
            choice = f"--fix {condition.name}=true or --fix {condition.name}=false (in Python fixed)"
            remedy = f"say which is meant with {choice}, or {remedy}"
        if not self._siblings:
            return remedy
        return f"build one of the files beside it instead ({', '.join(self._siblings)}), or {remedy}"


def _reads_constants(node: ir.Node) -> bool:
    """Whether the branches of an If compute with nothing but constants, whatever its sizes."""
    return all(value is not None and value.is_initializer() for value in node.inputs[1:])


@dataclasses.dataclass(frozen=True, slots=True)
class Scope:
    """A node with graphs, and the values that these graphs can read."""

    node: ir.Node
    captured: Inputs
    around: Facts
    walk: Walk

    def run(self, name: str, given: Sequence[Fact]) -> list[Fact]:
        """Facts of the outputs of one of the node's graphs."""
        graph = self.node.attributes[name].as_graph()
        arguments = (*given, *self.captured)
        if len(arguments) != len(graph.inputs):
            raise self.fault(f"{name} has {len(graph.inputs)} inputs", str(len(arguments)))
        facts = self.around
        try:
            for value, fact in zip(graph.inputs, arguments, strict=True):
                assert fact is not None
                facts[value] = fact
            self.walk(graph, facts)
            return [facts[value] for value in graph.outputs]
        finally:  # what is inside is not known outside; a copy of all that is around would cost each node as much
            for value in (*graph.inputs, *(output for node in graph for output in node.outputs)):
                facts.pop(value, None)

    def fault(self, found: str, expected: str, remedy: str = "export the model again") -> UnsupportedModelError:
        """The error that refuses the node."""
        return UnsupportedModelError(
            f'node {self.node.op_type} "{self.node.name}": {found}, expected {expected}; {remedy}.'
        )

    def check_carried(self, before: Sequence[Fact], after: Sequence[Fact]) -> None:
        """Refuse the node unless each value carried from one iteration to the next keeps its type and shape."""
        for position, (first, later) in enumerate(zip(before, after, strict=True)):
            if (first.dtype, first.shape) != (later.dtype, later.shape):
                raise self.fault(
                    f"what it carries at position {position} goes in as {_shown(first)} and comes out as "
                    f"{_shown(later)}",
                    "the same type and shape in every iteration",
                    "export the model with its loops unrolled",
                )


def _loop(scope: Scope, own: Inputs) -> list[Fact]:
    trips, condition, *rest = [*own, None, None][: max(len(own), 2)]
    carried = [_any_elements(fact) for fact in rest if fact is not None]
    if len(carried) != len(rest) or len(carried) > len(scope.node.outputs):
        raise scope.fault(f"it carries {len(rest)} values and gives {len(scope.node.outputs)}", "all that it carries")
    for fact, dtype in ((trips, ir.DataType.INT64), (condition, ir.DataType.BOOL)):
        if fact is not None and (fact.dtype is not dtype or _elements(fact) != 1):
            raise scope.fault(f"its number of iterations or its condition is {_shown(fact)}", f"one {dtype.name}")
    iteration = Fact(dtype=ir.DataType.INT64, shape=())
    goes_on = Fact(dtype=ir.DataType.BOOL, shape=(), value=np.array(True))  # true, as otherwise the body would not run
    results = scope.run("body", [iteration, goes_on, *carried])
    again, after = results[0], results[1 : 1 + len(carried)]
    scope.check_carried(carried, after)
    collected = results[1 + len(carried) :]
    if not collected:
        return after_iterations(after)
    starts = condition is None or _is_true(condition)
    if not (starts and _is_true(again)) or trips is None or trips.value is None:
        raise scope.fault(
            "it collects values from each iteration, and how many there are depends on the inputs' elements",
            "a number of iterations that follows from constants and sizes",
            "export the model with its loops unrolled",
        )
    count = max(int(trips.value.item()), 0)
    return [*after_iterations(after), *(Fact(dtype=f.dtype, shape=(count, *f.shape)) for f in collected)]


def after_iterations(carried: Sequence[Fact]) -> list[Fact]:
    """Facts of the values that a loop carries when it has ended, after any number of iterations."""
    return [_any_elements(fact) for fact in carried]


def _scan(scope: Scope, own: Inputs) -> list[Fact]:
    attributes = scope.node.attributes
    count = attributes["num_scan_inputs"].as_int()
    given = [fact for fact in own if fact is not None]
    if len(given) != len(own) or not 0 < count <= len(given):
        raise scope.fault(f"it has {len(given)} inputs, {count} of them to scan", "all of them, and one to scan")
    carried = [_any_elements(fact) for fact in given[: len(given) - count]]
    if len(carried) > len(scope.node.outputs):
        raise scope.fault(
            f"it carries {len(carried)} values and gives {len(scope.node.outputs)}", "all that it carries"
        )
    scanned, lengths = [], set()
    for fact, axis in zip(given[len(given) - count :], _axes(scope, "scan_input_axes", count), strict=True):
        rank = len(fact.shape)
        if not -rank <= axis < rank:
            raise scope.fault(f"it scans axis {axis} of {_shown(fact)}", "an axis that is there")
        at = axis % rank
        lengths.add(fact.shape[at])
        scanned.append(Fact(dtype=fact.dtype, shape=fact.shape[:at] + fact.shape[at + 1 :]))
    if len(lengths) != 1:
        raise scope.fault(f"it scans {sorted(lengths)} elements at a time", "equally many of each input")
    results = scope.run("body", [*carried, *scanned])
    scope.check_carried(carried, results[: len(carried)])
    found = after_iterations(results[: len(carried)])
    collected = results[len(carried) :]
    for fact, axis in zip(collected, _axes(scope, "scan_output_axes", len(collected)), strict=True):
        rank = len(fact.shape) + 1
        if not -rank <= axis < rank:
            raise scope.fault(f"it collects {_shown(fact)} along axis {axis}", "an axis that is there")
        at = axis % rank
        found.append(Fact(dtype=fact.dtype, shape=(*fact.shape[:at], *lengths, *fact.shape[at:])))
    return found


def _axes(scope: Scope, name: str, count: int) -> Sequence[int]:
    attribute = scope.node.attributes.get(name)
    axes = [0] * count if attribute is None else list(attribute.as_ints())
    if len(axes) != count:
        raise scope.fault(f"{name} has {len(axes)} entries", str(count))
    return axes


def _common(first: Fact, second: Fact) -> Fact:
    """What is known of a value that is either of two."""
    same = first.value is not None and second.value is not None and np.array_equal(first.value, second.value)
    return dataclasses.replace(first, value=first.value if same else None, zero=first.zero and second.zero)


def _any_elements(fact: Fact) -> Fact:
    return Fact(dtype=fact.dtype, shape=fact.shape)


def _is_true(fact: Fact) -> bool:
    return fact.value is not None and bool(fact.value.all())


def _elements(fact: Fact) -> int:
    return int(np.prod(fact.shape, dtype=np.int64))


def _shown(fact: Fact | None) -> str:
    return "missing" if fact is None else f"{fact.dtype.name}{list(fact.shape)}"
