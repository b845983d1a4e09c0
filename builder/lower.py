"""Lowering: emit the SPMD program of a plan, node by node, in the order of the original graph.

Integers in the program are global. `Shape` of a split value is followed by a node that restores the global sizes, so
that all shape arithmetic computes what it computed before; an operand that holds sizes is made local where it is
consumed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from furiosa_llm.builder.analysis import Analysis, NodeInfo
from furiosa_llm.builder.factors import to_dim
from furiosa_llm.builder.planner import Plan
from furiosa_llm.builder.program import COLLECTIVE_DOMAIN, Axes, ProgramBuilder, ShardedTensor
from furiosa_llm.builder.rule import ShapeOperand
from furiosa_llm.builder.sweep import Step
from furiosa_llm.runtime.artifact.layout import (
    Cat,
    Dim,
    Leaf,
    Prod,
    axes_of,
    global_size,
    index_map,
    local_size,
    simplify,
)

IntVector = npt.NDArray[np.int64]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Lowered:
    """The program of a plan."""

    graph: ir.Graph
    tensors: dict[str, ShardedTensor]
    input_layouts: dict[str, tuple[Dim, ...]]
    output_layouts: dict[str, tuple[Dim, ...]]
    expected_shapes: dict[str, tuple[int, ...]]
    """Local shapes (at the analysis' sizes) that the program's values must have, by name."""


def lower(analysis: Analysis, plan: Plan, model: ir.Model) -> Lowered:
    """Emit the program."""
    return _Lowering(analysis, plan, model).run()


class _Lowering:
    def __init__(self, analysis: Analysis, plan: Plan, model: ir.Model) -> None:
        self._analysis = analysis
        self._plan = plan
        self._mesh = plan.mesh
        self._axes = dict(plan.assignment)
        self._model = model
        self._program = ProgramBuilder(model, plan.mesh)
        self._now: dict[ir.Value, ir.Value] = {}
        self._gathered: dict[tuple[ir.Value, tuple[int, ...]], ir.Value] = {}
        self._localised: dict[tuple[object, ...], ir.Value] = {}
        self._layouts: dict[ir.Value, tuple[Dim, ...]] = {}
        self._expected: dict[str, tuple[int, ...]] = {}

    def run(self) -> Lowered:
        graph = self._analysis.graph
        for value in graph.inputs:
            emitted = ir.Value(name=value.name, type=value.type)
            self._program.graph.inputs.append(emitted)
            self._now[value] = emitted
            self._expect(value, emitted)
        for info in self._analysis.nodes:
            self._emit(info, self._plan.outcome.steps.get(info.node) or Step(info))
        for value in graph.outputs:
            self._program.graph.outputs.append(self._output(value))
        for name, value in self._model.graph.initializers.items():
            assert value.const_value is not None
            if not value.uses():
                self._program.store_unused(name, value.const_value)
        return Lowered(
            graph=self._program.graph,
            tensors=self._program.tensors,
            input_layouts={str(v.name): self._layout(v) for v in graph.inputs},
            output_layouts={str(v.name): self._output_layout(v) for v in graph.outputs},
            expected_shapes=self._expected,
        )

    # -- layouts -------------------------------------------------------------------------------------------------

    def _layout(self, value: ir.Value) -> tuple[Dim, ...]:
        if value not in self._layouts:
            self._layouts[value] = tuple(simplify(to_dim(f, self._axes)) for f in self._analysis.dims[value])
        return self._layouts[value]

    def _split_dims(self, value: ir.Value) -> list[int]:
        return [d for d, dim in enumerate(self._layout(value)) if axes_of(dim)]

    def _output_layout(self, value: ir.Value) -> tuple[Dim, ...]:
        whole = self._plan.outcome.output_gather.get(value, ())
        return tuple(Leaf(global_size(d)) if i in whole else d for i, d in enumerate(self._layout(value)))

    def _expect(self, value: ir.Value, emitted: ir.Value, whole: Sequence[int] = ()) -> None:
        """Note the local shape that an emitted value must have, for the check of the finished program."""
        self._expected[str(emitted.name)] = tuple(
            global_size(dim) if d in whole else local_size(dim, self._mesh) for d, dim in enumerate(self._layout(value))
        )

    # -- one node ------------------------------------------------------------------------------------------------

    def _emit(self, info: NodeInfo, step: Step) -> None:
        node = info.node
        name = node.name or str(node.outputs[0].name)
        for value in step.reduce:
            self._now[value] = self._all_reduce(value)
        inputs = [None if v is None else self._operand(v, p, step) for p, v in enumerate(node.inputs)]
        attributes: dict[str, object] = dict(node.attributes)
        for attribute, symbols in info.rule.attributes.items():
            dims = [to_dim(info.symbols[s], self._axes) for s in symbols.split()]
            attributes[attribute] = int(np.prod([local_size(dim, self._mesh) for dim in dims]))
        for operand in info.rule.shape_operands:
            self._localise(info, operand, inputs, attributes)
        if step.lookup:
            outputs = [self._lookup(info, step, inputs, attributes, name)]
        else:
            names = [str(v.name) if v.name else "" for v in node.outputs]
            outputs = self._program.node(
                node.op_type,
                inputs,
                name=name,
                outputs=self._raw_names(node, names, step, info),
                domain=node.domain,
                attributes=attributes,
            )
        for port, (value, emitted) in enumerate(zip(node.outputs, outputs, strict=True)):
            self._now[value] = self._finish(info, step, port, value, emitted)

    def _raw_names(self, node: ir.Node, names: list[str], step: Step, info: NodeInfo) -> list[str]:
        """Names of what the node itself gives; the plain name belongs to the value once it is finished."""
        changed = {port for port, _ in step.slices}
        if step.average_parts > 1 or (node.op_type == "Shape" and self._split_dims(_present(node.inputs[0]))):
            changed.add(0)
        free = [n not in self._program_names() for n in names]
        return [f"{n}/raw" if p in changed or not free[p] else n for p, n in enumerate(names)]

    def _program_names(self) -> set[str]:
        """Graph outputs keep their names for their final form, given in `_output`."""
        return {str(v.name) for v in self._analysis.graph.outputs}

    def _finish(self, info: NodeInfo, step: Step, port: int, value: ir.Value, emitted: ir.Value) -> ir.Value:
        """What a node's output needs after the node: averaging, global sizes, the rank's part."""
        name = str(value.name)
        if step.average_parts > 1:
            dtype = self._analysis.facts[value].dtype
            factor = self._program.constant(np.array(1 / step.average_parts, dtype=dtype.numpy()), dtype)
            emitted = self._program.one("Mul", [emitted, factor], name=f"{name}/average")
        if info.node.op_type == "Shape":
            emitted = self._globalise(info.node, emitted)
        whole = {d for p, d in step.slices if p == port}
        self._expect(value, emitted, tuple(whole))
        for d in sorted(whole):
            dim = self._layout(value)[d]
            axes = axes_of(dim)
            shards = np.stack([np.maximum(index_map(dim, self._mesh, r), 0) for r in self._representatives(axes)])
            indices = self._program.per_rank(f"indices/{name}", axes, shards)
            emitted = self._program.one("Gather", [emitted, indices], name=f"{name}/part{d}", axis=d)
            whole.discard(d)
            self._expect(value, emitted, tuple(whole))
        return emitted

    def _representatives(self, axes: Axes) -> list[int]:
        """For each position along `axes` one rank that has it."""
        ranks = {self._mesh.position(r, axes): r for r in reversed(range(self._mesh.size))}
        return [ranks[p] for p in range(self._mesh.parts(axes))]

    def _operand(self, value: ir.Value, port: int, step: Step) -> ir.Value:
        whole = step.gather.get(port, ())
        if value.is_initializer():
            assert value.const_value is not None
            layout = tuple(Leaf(global_size(dim)) if d in whole else dim for d, dim in enumerate(self._layout(value)))
            emitted = self._program.weight(str(value.name).split("/use")[0], value.const_value, layout)
        else:
            emitted = self._gather(value, whole) if whole else self._now[value]
        if port in step.mask:
            emitted = self._masked(value, emitted, step.mask[port])
        return emitted

    def _masked(self, value: ir.Value, emitted: ir.Value, axes: Axes) -> ir.Value:
        dtype = self._analysis.facts[value].dtype
        zero = self._program.constant(np.zeros((), dtype=dtype.numpy()), dtype)
        name = f"{emitted.name}/once"
        return self._program.one("Where", [self._program.is_first(axes), emitted, zero], name=name)

    # -- collectives ---------------------------------------------------------------------------------------------

    def _all_reduce(self, value: ir.Value, name: str | None = None) -> ir.Value:
        axes = next(c.axes for c in self._plan.outcome.collectives if c.kind == "AllReduce" and c.value is value)
        label = f"{value.name}/AllReduce"
        (emitted,) = self._program.node(
            "AllReduce",
            [self._now[value]],
            name=label,
            outputs=[name or label],
            domain=COLLECTIVE_DOMAIN,
            attributes={"axes": list(axes)},
        )
        self._expect(value, emitted)
        return emitted

    def _gather(self, value: ir.Value, whole: tuple[int, ...]) -> ir.Value:
        """`value` with some dimensions whole; gathered once for all who need the same."""
        done: tuple[int, ...] = ()
        emitted = self._now[value]
        for d in whole:
            done += (d,)
            if (value, done) not in self._gathered:
                self._gathered[value, done] = self._all_gather(value, emitted, d)
                self._expect(value, self._gathered[value, done], done)
            emitted = self._gathered[value, done]
        return emitted

    def _all_gather(self, value: ir.Value, emitted: ir.Value, d: int) -> ir.Value:
        dim = self._layout(value)[d]
        axes = axes_of(dim)
        label = f"{value.name}/AllGather{d}"
        (gathered,) = self._program.node(
            "AllGather", [emitted], name=label, domain=COLLECTIVE_DOMAIN, attributes={"axes": list(axes), "dim": d}
        )
        order = np.concatenate([index_map(dim, self._mesh, r) for r in self._representatives(axes)])
        positions = np.full(global_size(dim), -1, dtype=np.int64)
        valid = order >= 0
        positions[order[valid][::-1]] = np.flatnonzero(valid)[::-1]
        if np.array_equal(positions, np.arange(len(order))):
            return gathered
        return self._program.one("Gather", [gathered, self._indices(positions)], name=f"{label}/order", axis=d)

    def _indices(self, positions: IntVector) -> ir.Value:
        return self._program.constant(positions)

    def _output(self, value: ir.Value) -> ir.Value:
        if value in self._plan.outcome.output_reduce:
            self._now[value] = self._all_reduce(value)
        whole = self._plan.outcome.output_gather.get(value, ())
        emitted = self._gather(value, whole) if whole else self._now[value]
        name = str(value.name)
        produced_elsewhere = emitted.producer() is None or any(emitted is o for o in self._program.graph.outputs)
        if produced_elsewhere:
            emitted = self._program.one("Identity", [emitted], name=f"{name}/output")
        self._expected[name] = self._expected.pop(str(emitted.name), self._expected.get(name, ()))
        emitted.name = name
        emitted.type = ir.TensorType(self._analysis.facts[value].dtype)
        self._expect(value, emitted, whole)
        return emitted

    # -- table lookup --------------------------------------------------------------------------------------------

    def _lookup(
        self, info: NodeInfo, step: Step, inputs: list[ir.Value | None], attributes: dict[str, object], name: str
    ) -> ir.Value:
        """Look up what the rank holds of a split table, zeros elsewhere; indices out of range still fail."""
        p = self._program
        axis = info.rule.axis
        assert axis is not None
        table = _present(info.node.inputs[0])
        dim = self._layout(table)[axis]
        count, size = local_size(dim, self._mesh), global_size(dim)
        indices = _present(inputs[1])
        kind = self._analysis.facts[_present(info.node.inputs[1])].dtype
        integer = kind.numpy()

        def scalar(number: int) -> ir.Value:
            return p.constant(np.array(number, dtype=integer), kind)

        shards = np.arange(self._mesh.parts(step.lookup), dtype=integer) * count
        offset = p.per_rank(f"first_row/{table.name}", step.lookup, shards)
        wrapped = p.one("Add", [indices, scalar(size)], name=f"{name}/from_end")
        negative = p.one("Less", [indices, scalar(0)], name=f"{name}/is_negative")
        positive = p.one("Where", [negative, wrapped, indices], name=f"{name}/index")
        local = p.one("Sub", [positive, offset], name=f"{name}/local_index")
        above = p.one("GreaterOrEqual", [local, scalar(0)], name=f"{name}/is_above")
        below = p.one("Less", [local, scalar(count)], name=f"{name}/is_below")
        inside = p.one("And", [above, below], name=f"{name}/is_here")
        excess = p.one("Div", [positive, scalar(size)], name=f"{name}/excess")
        invalid = p.one("Mul", [excess, scalar(count)], name=f"{name}/invalid")
        safe = p.one("Where", [inside, local, invalid], name=f"{name}/safe_index")
        (rows,) = p.node(
            info.node.op_type,
            [inputs[0], safe, *inputs[2:]],
            name=f"{name}/rows",
            domain=info.node.domain,
            attributes=attributes,
        )
        output = info.node.outputs[0]
        dtype = self._analysis.facts[output].dtype
        mask = inside
        for _ in range(len(self._layout(table)) - axis - 1):
            mask = p.unsqueeze_last(mask, name=f"{name}/mask")
        zero = p.constant(np.zeros((), dtype=dtype.numpy()), dtype)
        final = str(output.name)
        label = f"{final}/raw" if final in self._program_names() else final
        return p.node("Where", [mask, rows, zero], name=f"{name}/here", outputs=[label])[0]

    # -- sizes ---------------------------------------------------------------------------------------------------

    def _globalise(self, node: ir.Node, emitted: ir.Value) -> ir.Value:
        """Restore the global sizes behind Shape."""
        value = _present(node.inputs[0])
        layout = self._layout(value)
        part = slice(
            node.attributes["start"].as_int() if "start" in node.attributes else 0,
            node.attributes["end"].as_int() if "end" in node.attributes else None,
        )
        dims = list(range(len(layout)))[part]
        static = {
            i: global_size(layout[d]) for i, d in enumerate(dims) if axes_of(layout[d]) and not self._dynamic(value, d)
        }
        scale = {
            i: self._parts(layout[d]) for i, d in enumerate(dims) if axes_of(layout[d]) and self._dynamic(value, d)
        }
        name = str(node.outputs[0].name)
        if static:
            emitted = self._replace(emitted, static, len(dims), f"{name}/global")
        if scale:
            factors = np.array([scale.get(i, 1) for i in range(len(dims))], dtype=np.int64)
            emitted = self._program.one(
                "Mul", [emitted, self._program.constant(factors)], name=f"{name}/global_product"
            )
        return emitted

    def _dynamic(self, value: ir.Value, d: int) -> bool:
        return self._analysis.is_dynamic(value, d)

    def _parts(self, dim: Dim) -> int:
        return global_size(dim) // local_size(dim, self._mesh)

    def _replace(self, vector: ir.Value, elements: dict[int, int], length: int, name: str) -> ir.Value:
        """A vector of sizes with some elements replaced by constants."""
        mask = np.array([i in elements for i in range(length)])
        values = np.array([elements.get(i, 0) for i in range(length)], dtype=np.int64)
        if mask.all():
            return self._program.constant(values)
        return self._program.one(
            "Where", [self._program.constant(mask), self._program.constant(values), vector], name=name
        )

    def _localise(
        self, info: NodeInfo, operand: ShapeOperand, inputs: list[ir.Value | None], attributes: dict[str, object]
    ) -> None:
        """Make an operand that holds sizes or positions local."""
        if operand.kind == "dims":
            self._localise_dims(info, operand.port, inputs)
        elif operand.kind == "split":
            self._localise_split(info, operand.port, inputs, attributes)
        else:
            self._localise_bounds(info, operand, inputs)

    def _localise_dims(self, info: NodeInfo, port: int, inputs: list[ir.Value | None]) -> None:
        output, target = info.node.outputs[0], _present(info.node.inputs[port])
        split = self._split_dims(output)
        if not split:
            return
        layout, raw = self._layout(output), self._analysis.facts[target].value
        assert raw is not None, f"{info.node.op_type} {info.node.name}: the target shape of a split value is not known"
        offset = len(layout) - len(raw)
        left_alone = {"Reshape": (-1, 0), "Expand": (1,)}.get(info.node.op_type, ())
        whole = {d for p, d in info.full_outputs if p == 0}
        static: dict[int, int] = {}
        divide: dict[int, int] = {}
        for d in split:
            if d < offset or int(raw[d - offset]) in left_alone or d in whole:
                continue
            if self._dynamic(output, d):
                divide[d - offset] = self._parts(layout[d])
            else:
                static[d - offset] = local_size(layout[d], self._mesh)
        key = ("dims", target, tuple(static.items()), tuple(divide.items()))
        if key not in self._localised:
            self._localised[key] = self._local_vector(_present(inputs[port]), target, raw, static, divide)
        inputs[port] = self._localised[key]

    def _local_vector(
        self, vector: ir.Value, original: ir.Value, raw: IntVector, static: dict[int, int], divide: dict[int, int]
    ) -> ir.Value:
        if original.is_initializer():
            values = [static.get(i, int(v) // divide.get(i, 1)) for i, v in enumerate(raw)]
            return self._program.constant(np.array(values, dtype=np.int64))
        name = str(original.name)
        if static:
            vector = self._replace(vector, static, len(raw), f"{name}/local")
        if divide:
            divisors = np.array([divide.get(i, 1) for i in range(len(raw))], dtype=np.int64)
            vector = self._program.one("Div", [vector, self._program.constant(divisors)], name=f"{name}/local_quotient")
        return vector

    def _localise_split(
        self, info: NodeInfo, port: int, inputs: list[ir.Value | None], attributes: dict[str, object]
    ) -> None:
        axis = info.rule.axis
        assert axis is not None
        if not axes_of(self._layout(_present(info.node.inputs[0]))[axis]) or (0, axis) in info.full_inputs:
            return
        sizes = [local_size(self._layout(v)[axis], self._mesh) for v in info.node.outputs]
        attributes.pop("num_outputs", None)
        vector = self._program.constant(np.array(sizes, dtype=np.int64))
        inputs[port:] = [vector]

    def _localise_bounds(self, info: NodeInfo, operand: ShapeOperand, inputs: list[ir.Value | None]) -> None:
        node = info.node
        data, bounds = _present(node.inputs[0]), _present(node.inputs[operand.port])
        raw = self._analysis.facts[bounds].value
        axes_fact = (
            self._analysis.facts[_present(node.inputs[3])].value if len(node.inputs) > 3 and node.inputs[3] else None
        )
        if raw is None:
            return
        rank = len(self._layout(data))
        axes = range(len(raw)) if axes_fact is None else [int(a) % rank for a in axes_fact]
        changed: dict[int, int] = {}
        for i, axis in enumerate(axes):
            dim = self._layout(data)[axis]
            if not axes_of(dim) or (0, axis) in info.full_inputs:
                continue
            size = global_size(dim)
            position = min(max(int(raw[i]) + size if int(raw[i]) < 0 else int(raw[i]), 0), size)
            changed[i] = self._local_prefix(to_dim(self._analysis.dims[data][axis], self._axes), position)
        if changed:
            values = np.array([changed.get(i, int(v)) for i, v in enumerate(raw)], dtype=raw.dtype)
            inputs[operand.port] = self._program.constant(values)

    def _local_prefix(self, dim: Dim, position: int) -> int:
        """The local length of the first `position` indices, which end at a boundary of the layout."""
        if position == 0:
            return 0
        if position == global_size(dim):
            return local_size(dim, self._mesh)
        if isinstance(dim, Prod):
            inner = int(np.prod([global_size(part) for part in dim.parts[1:]]))
            rest = int(np.prod([local_size(part, self._mesh) for part in dim.parts[1:]]))
            assert position % inner == 0, "a slice bound inside a product"
            return self._local_prefix(dim.parts[0], position // inner) * rest
        if isinstance(dim, Cat):
            local = 0
            for part in dim.parts:
                size = min(position, global_size(part))
                local += self._local_prefix(part, size)
                position -= size
            return local
        assert not dim.axes, "a slice bound inside a split factor"
        return position


def _present(value: ir.Value | None) -> ir.Value:
    assert value is not None
    return value
