"""Which nodes of a program onnxruntime has no CPU kernel for here: it is asked, by a session of each kind of node.

A session says more than the registry of kernels does: onnxruntime casts float16, and writes out ops that are functions.
What a kernel refuses as it runs, for the sizes that it gets, is not known before.
"""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from collections.abc import Sequence

import onnx
import onnx_ir as ir
import onnxruntime as ort
from onnx import NodeProto, TensorProto
from onnxruntime.capi import onnxruntime_pybind11_state as ort_state

from furiosa_llm.builder.errors import UnsupportedModelError
from furiosa_llm.builder.lower.build import Build
from furiosa_llm.builder.lower.check_shapes import interpreter
from furiosa_llm.builder.lower.program_shapes import local_inputs
from furiosa_llm.builder.shapes.interface import PROBE, lengths
from furiosa_llm.builder.shapes.interpreter import Facts
from furiosa_llm.runtime.artifact.compute import NARROW, QUANTISED, widen
from furiosa_llm.runtime.artifact.graphs import COLLECTIVE_DOMAIN, attribute_graphs
from furiosa_llm.runtime.artifact.options import FLOAT32

_IR_VERSION = 11
_SHOWN = 8

Opsets = tuple[tuple[str, int], ...]
Types = tuple[tuple[str, int] | None, ...]
"""Of each input of a node the type and the number of dimensions; None for one that is left out."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class MissingKernel:
    """An op that has no CPU kernel here for some types."""

    op: str
    types: tuple[str, ...]
    """The types of what it reads, each once."""
    count: int
    """The number of nodes of the program."""
    in_float32: bool
    """Whether it has one if the program computes in float32."""

    def __str__(self) -> str:
        return f"{self.op} of {', '.join(self.types)} ({self.count} nodes)"


def missing_kernels(build: Build) -> tuple[MissingKernel, ...]:
    """What the program of `build` has no CPU kernels for on this machine."""
    graph = build.lowered.graph
    program = ir.Model(graph, ir_version=build.ir_version)
    facts = interpreter(program, build.plan.mesh).run(local_inputs(build, PROBE), lengths(build.model.graph, PROBE))
    opsets = tuple((name, version) for name, version in graph.opset_imports.items() if name != COLLECTIVE_DOMAIN)
    kinds: dict[object, tuple[ir.Node, Types, list[ir.Node]]] = {}
    for node in graph:
        types = _types(node, facts)
        kinds.setdefault((node.op_identifier(), types, _attributes(node)), (node, types, []))[2].append(node)
    found: Counter[tuple[str, tuple[str, ...], bool]] = Counter()
    for node, types, alike in kinds.values():
        proto = _plain(ir.to_proto(node))
        if node.domain == COLLECTIVE_DOMAIN or any(True for _ in attribute_graphs(proto)):
            continue
        if not _has_kernel(proto.SerializeToString(), types, opsets):
            found[node.op_type, _names(types), _has_kernel_in_float32(proto, types, opsets)] += len(alike)
    return tuple(
        MissingKernel(op=op, types=types, count=count, in_float32=in_float32)
        for (op, types, in_float32), count in found.items()
    )


def check_kernels(missing: Sequence[MissingKernel]) -> None:
    """Raises UnsupportedModelError if kernels are missing that computing in float32 does not need either."""
    if not all(one.in_float32 for one in missing):
        raise UnsupportedModelError(
            f"{described(missing)}; export the model in float32, or build it all the same with --allow-no-kernel "
            f"(allow_no_kernel=True), to plan it or to run it elsewhere."
        )


def described(missing: Sequence[MissingKernel]) -> str:
    """What is missing, and how it runs all the same, as one line."""
    more = f" and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else ""
    line = f"onnxruntime has no CPU kernels here for {'; '.join(map(str, missing[:_SHOWN]))}{more}"
    if all(one.in_float32 for one in missing):
        return f"{line}: the artifact runs with --compute {FLOAT32} (compute={FLOAT32!r})"
    return line


def _plain(node: NodeProto) -> NodeProto:
    """`node` with names that follow from their places, so that nodes of one kind are alike."""
    own = NodeProto(op_type=node.op_type, domain=node.domain)
    own.attribute.extend(sorted(node.attribute, key=lambda attribute: attribute.name))
    own.input.extend(f"i{place}" if name else "" for place, name in enumerate(node.input))
    own.output.extend(f"o{place}" if name else "" for place, name in enumerate(node.output))
    return own


def _types(node: ir.Node, facts: Facts) -> Types:
    return tuple(None if v is None else (facts[v].dtype.name, len(facts[v].shape)) for v in node.inputs)


def _attributes(node: ir.Node) -> tuple[object, ...]:
    """What tells attributes apart; equal ones that are no numbers and texts may count as different."""
    values = ((attribute.name, attribute.value) for attribute in node.attributes.values())
    return tuple((n, v if isinstance(v, int | float | str) else repr(v)) for n, v in values)


def _names(types: Types) -> tuple[str, ...]:
    return tuple(dict.fromkeys(kind[0] for kind in types if kind is not None))


def _has_kernel_in_float32(proto: NodeProto, types: Types, opsets: Opsets) -> bool:
    """Whether a node has a kernel in the types that it has after `in_float32`, if its float4 operands are weights."""
    own = NodeProto()
    own.CopyFrom(proto)
    widen(own)
    dequantises = own.op_type == "DequantizeLinear"
    wide = tuple(None if kind is None else (_wide(kind[0], dequantises=dequantises), kind[1]) for kind in types)
    return _has_kernel(own.SerializeToString(), wide, opsets)


def _wide(dtype: str, *, dequantises: bool) -> str:
    if dtype in QUANTISED and dequantises:
        return "FLOAT8E4M3FN"
    return "FLOAT" if dtype in NARROW | QUANTISED else dtype


@functools.lru_cache(maxsize=4096)
def _has_kernel(node: bytes, types: Types, opsets: Opsets) -> bool:
    """Whether onnxruntime makes a session of one node; it is no answer if it refuses that for another reason."""
    proto = NodeProto.FromString(node)
    inputs = {
        name: onnx.helper.make_tensor_value_info(name, TensorProto.DataType.Value(kind[0]), [None] * kind[1])
        for name, kind in zip(proto.input, types, strict=True)
        if kind is not None
    }
    outputs = [onnx.ValueInfoProto(name=name) for name in proto.output if name]
    graph = onnx.helper.make_graph([proto], "kernel", list(inputs.values()), outputs)
    imports = [onnx.helper.make_opsetid(domain, version) for domain, version in opsets]
    model = onnx.helper.make_model(graph, opset_imports=imports, ir_version=_IR_VERSION)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    try:
        ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    except ort_state.NotImplemented:
        return False
    except ort_state.InvalidGraph as error:
        return " of operator (" not in str(error)  # which names a type that is not among the op's own
    except (RuntimeError, ValueError, ort_state.Fail, ort_state.InvalidArgument):
        return True
    return True
