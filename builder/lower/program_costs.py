"""What each node of a lowered program costs one PE, at any sizes of its inputs."""

from __future__ import annotations

import onnx_ir as ir

from furiosa_llm.builder.lower.build import Build
from furiosa_llm.builder.lower.check_shapes import interpreter
from furiosa_llm.builder.lower.program_shapes import local_inputs
from furiosa_llm.builder.rules.cost import Cost
from furiosa_llm.builder.rules.registry import costs_of
from furiosa_llm.builder.shapes.interface import SizeSet
from furiosa_llm.runtime.artifact.graphs import COLLECTIVE_DOMAIN


def program_costs(build: Build, sizes: SizeSet) -> dict[ir.Node, Cost]:
    """The cost of each node except collectives, in the order in which they run; the same on every rank.

    Nodes count as they are written, even where a compiler folds or fuses them (the transposition of a weight). Sizes
    that follow from data are the interpreter's, so the cost of an export that picks the tokens of each expert with
    NonZero is too high.

    Raises ShapeError if the model does not take the sizes.
    """
    program = ir.Model(build.lowered.graph, ir_version=build.ir_version)
    facts = interpreter(program, build.plan.mesh).run_inside(local_inputs(build, sizes))
    opset = program.graph.opset_imports.get("", 1)
    return {n: c for n, c in costs_of(program.graph, facts, opset).items() if n.domain != COLLECTIVE_DOMAIN}
