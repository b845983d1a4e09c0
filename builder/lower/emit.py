"""Lowering: emit the SPMD program of a plan, node by node, in the order of the original graph."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from furiosa_llm.builder.factors.analysis import Analysis, NodeInfo
from furiosa_llm.builder.lower.layouts import Layouts
from furiosa_llm.builder.lower.lookup import emit_lookup
from furiosa_llm.builder.lower.program_builder import ProgramBuilder, ShardedTensor
from furiosa_llm.builder.lower.sizes import SizeRewriter
from furiosa_llm.builder.plan.outcome import Assignment, NodeAction, Outcome
from furiosa_llm.builder.rules.facts import present
from furiosa_llm.runtime.artifact.graphs import COLLECTIVE_DOMAIN
from furiosa_llm.runtime.artifact.layout import Dim, Mesh, axes_of, global_size, local_size


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Lowered:
    """The program of a plan."""

    graph: ir.Graph
    tensors: dict[str, ShardedTensor]
    input_layouts: dict[str, tuple[Dim, ...]]
    output_layouts: dict[str, tuple[Dim, ...]]
    expected_shapes: dict[str, tuple[int, ...]]
    """Local shapes (at the analysis' sizes) that the program's values must have, by name."""


def lower(analysis: Analysis, mesh: Mesh, assignment: Assignment, outcome: Outcome, model: ir.Model) -> Lowered:
    """Emit the program of an assignment whose sweep had this outcome.

    `model` is the source; its initializers are kept even if the program does not read them.
    """
    lowering = _Lowering(analysis, Layouts(analysis, assignment, mesh), outcome, ProgramBuilder(analysis.graph, mesh))
    lowering.run()
    lowering.keep_unused(model)
    return lowering.result()


class _Lowering:
    def __init__(self, analysis: Analysis, layouts: Layouts, outcome: Outcome, program: ProgramBuilder) -> None:
        self._analysis = analysis
        self._layouts = layouts
        self._outcome = outcome
        self._program = program
        self._sizes = SizeRewriter(analysis, layouts, program)
        self._now: dict[ir.Value, ir.Value] = {}
        self._gathered: dict[tuple[ir.Value, tuple[int, ...]], ir.Value] = {}
        self._expected: dict[ir.Value, tuple[int, ...]] = {}
        self._output_names = {str(value.name) for value in analysis.graph.outputs}
        self._sums = {c.value: c.axes for c in outcome.collectives if c.kind == "AllReduce"}

    def run(self) -> None:
        graph = self._analysis.graph
        for value in graph.inputs:
            emitted = ir.Value(name=value.name, type=value.type)
            self._program.graph.inputs.append(emitted)
            self._now[value] = emitted
            self._expected[emitted] = self._layouts.local_shape(value)
        for info in self._analysis.nodes:
            self._emit(info, self._outcome.steps.get(info.node) or NodeAction(info))
        for value in graph.outputs:
            self._program.graph.outputs.append(self._output(value))

    def keep_unused(self, model: ir.Model) -> None:
        """Store the initializers that the program does not read, so that the original model can be rebuilt."""
        used = {id(tensor.source) for tensor in self._program.tensors.values()}
        for name, value in model.graph.initializers.items():
            assert value.const_value is not None
            if id(value.const_value) not in used:
                self._program.store_unused(name, value.const_value)

    def result(self) -> Lowered:
        graph = self._analysis.graph
        return Lowered(
            graph=self._program.graph,
            tensors=self._program.tensors,
            input_layouts={str(value.name): self._layouts.of(value) for value in graph.inputs},
            output_layouts={
                str(value.name): self._layouts.with_whole(value, self._outcome.output_gather.get(value, ()))
                for value in graph.outputs
            },
            expected_shapes={str(value.name): shape for value, shape in self._expected.items()},
        )

    # -- one node ------------------------------------------------------------------------------------------------

    def _emit(self, info: NodeInfo, step: NodeAction) -> None:
        node = info.node
        for value in step.reduce:
            self._now[value] = self._all_reduce(value)
        inputs = [None if v is None else self._operand(v, p, step) for p, v in enumerate(node.inputs)]
        attributes = dict(node.attributes) | self._local_attributes(info)
        for operand in info.rule.shape_operands:
            self._sizes.localise(info, operand, inputs, attributes)
        names = self._raw_names(info, step)
        if step.lookup:
            table = self._layouts.of(present(node.inputs[0]))
            facts = self._analysis.facts
            arguments = (self._program, info, step.lookup, table, inputs, attributes, facts, names[0])
            outputs = [emit_lookup(*arguments)]
        else:
            name = node.name or str(node.outputs[0].name)
            outputs = self._program.node(
                node.op_type, inputs, name=name, outputs=names, domain=node.domain, attributes=attributes
            )
        for port, (value, emitted) in enumerate(zip(node.outputs, outputs, strict=True)):
            self._now[value] = self._finish(info, step, port, value, emitted)

    def _local_attributes(self, info: NodeInfo) -> dict[str, object]:
        """The attributes that are sizes, with each rank's local sizes."""
        mesh = self._layouts.mesh

        def size(symbols: str) -> int:
            return math.prod(local_size(self._layouts.of_factor(info.symbols[s]), mesh) for s in symbols.split())

        return {
            attribute: [size(product) for product in products.split(",")] if "," in products else size(products)
            for attribute, products in info.rule.attributes.items()
        }

    def _raw_names(self, info: NodeInfo, step: NodeAction) -> list[str]:
        """Names of the node's own outputs; the plain name belongs to the value after `_finish`."""
        changed = {port for port, _ in step.slices}
        if step.average_parts > 1 or info.rule.ignores_values:
            changed.add(0)
        names = [str(value.name) if value.name else "" for value in info.node.outputs]
        return [f"{n}/raw" if p in changed or n in self._output_names else n for p, n in enumerate(names)]

    def _finish(self, info: NodeInfo, step: NodeAction, port: int, value: ir.Value, emitted: ir.Value) -> ir.Value:
        """Append what an output needs after its node: averaging, global sizes, the rank's part."""
        name = str(value.name)
        if step.average_parts > 1:
            dtype = self._analysis.facts[value].dtype
            factor = self._program.constant(np.array(1 / step.average_parts, dtype=dtype.numpy()), dtype)
            emitted = self._program.one("Mul", [emitted, factor], name=f"{name}/average")
        if info.node.op_type == "Shape":
            emitted = self._sizes.globalise(info.node, emitted)
        whole = {d for p, d in step.slices if p == port}
        self._expected[emitted] = self._layouts.local_shape(value, whole)
        for d in sorted(whole):
            emitted = self._own_part(value, emitted, d)
            whole.discard(d)
            self._expected[emitted] = self._layouts.local_shape(value, whole)
        return emitted

    def _own_part(self, value: ir.Value, emitted: ir.Value, d: int) -> ir.Value:
        """The rank's part of a dimension that was computed whole; its padding repeats element 0."""
        dim = self._layouts.of(value)[d]
        shards = np.stack([np.maximum(indices, 0) for indices in self._layouts.index_maps(dim)])
        indices = self._program.per_rank(f"indices/{value.name}", axes_of(dim), shards)
        return self._program.one("Gather", [emitted, indices], name=f"{value.name}/part{d}", axis=d)

    def _operand(self, value: ir.Value, port: int, step: NodeAction) -> ir.Value:
        whole = step.gather.get(port, ())
        if value.is_initializer():
            emitted = self._program.weight(value, self._layouts.with_whole(value, whole))
        else:
            emitted = self._gather(value, whole)
        for d in step.clear.get(port, ()):
            emitted = self._cleared(value, emitted, d)
        if port in step.mask:
            emitted = self._masked(value, emitted, self._program.is_first(step.mask[port]), "once")
        return emitted

    def _cleared(self, value: ir.Value, emitted: ir.Value, d: int) -> ir.Value:
        """Zeros where dimension `d` is padded."""
        layout = self._layouts.of(value)
        shards = np.stack([indices >= 0 for indices in self._layouts.index_maps(layout[d])])
        trailing = (1,) * (len(layout) - 1 - d)
        valid = self._program.per_rank(
            f"valid/{value.name}", axes_of(layout[d]), shards.reshape(*shards.shape, *trailing)
        )
        return self._masked(value, emitted, valid, "cleared")

    def _masked(self, value: ir.Value, emitted: ir.Value, mask: ir.Value, label: str) -> ir.Value:
        """Zeros where the mask is false. This takes Where, because zero times infinity is not zero."""
        dtype = self._analysis.facts[value].dtype
        zero = self._program.constant(np.zeros((), dtype=dtype.numpy()), dtype)
        return self._program.one("Where", [mask, emitted, zero], name=f"{emitted.name}/{label}")

    # -- collectives ---------------------------------------------------------------------------------------------

    def _all_reduce(self, value: ir.Value) -> ir.Value:
        axes = self._sums[value]
        attributes = {"axes": list(axes)}
        emitted = self._collective("AllReduce", self._now[value], f"{value.name}/AllReduce", attributes)
        self._expected[emitted] = self._layouts.local_shape(value)
        return emitted

    def _collective(self, kind: str, data: ir.Value, name: str, attributes: Mapping[str, object]) -> ir.Value:
        return self._program.node(kind, [data], name=name, domain=COLLECTIVE_DOMAIN, attributes=attributes)[0]

    def _gather(self, value: ir.Value, whole: tuple[int, ...]) -> ir.Value:
        """`value` with some dimensions whole; gathered once for all nodes that need the same dimensions whole."""
        emitted = self._now[value]
        for count in range(1, len(whole) + 1):
            key = (value, whole[:count])
            if key not in self._gathered:
                self._gathered[key] = self._all_gather(value, emitted, whole[count - 1])
                self._expected[self._gathered[key]] = self._layouts.local_shape(value, whole[:count])
            emitted = self._gathered[key]
        return emitted

    def _all_gather(self, value: ir.Value, emitted: ir.Value, d: int) -> ir.Value:
        dim = self._layouts.of(value)[d]
        name = f"{value.name}/AllGather{d}"
        gathered = self._collective("AllGather", emitted, name, {"axes": list(axes_of(dim)), "dim": d})
        order = np.concatenate(self._layouts.index_maps(dim))
        valid = np.flatnonzero(order >= 0)
        positions = np.empty(global_size(dim), dtype=np.int64)
        positions[order[valid]] = valid
        if np.array_equal(positions, np.arange(len(order))):
            return gathered
        indices = self._program.constant(positions)
        return self._program.one("Gather", [gathered, indices], name=f"{name}/order", axis=d)

    def _output(self, value: ir.Value) -> ir.Value:
        if value.is_graph_input():
            return self._now[value]
        if value in self._outcome.output_reduce:
            self._now[value] = self._all_reduce(value)
        whole = self._outcome.output_gather.get(value, ())
        emitted = self._gather(value, whole)
        if emitted.producer() is None or emitted.is_graph_output():
            emitted = self._program.one("Identity", [emitted], name=f"{value.name}/output")
        emitted.name = value.name
        emitted.type = ir.TensorType(self._analysis.facts[value].dtype)
        self._expected[emitted] = self._layouts.local_shape(value, whole)
        return emitted
