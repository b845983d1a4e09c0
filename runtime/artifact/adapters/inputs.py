"""The inputs of a program that adapters are given to, and what they are without an adapter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from onnx import GraphProto, NodeProto, TensorProto, numpy_helper

from furiosa_llm.runtime.artifact.adapters.graph import ROWS
from furiosa_llm.runtime.artifact.dimensions import bind_sizes, parse_dimension, shape_of
from furiosa_llm.runtime.artifact.dtypes import DTYPES, Array
from furiosa_llm.runtime.artifact.graphs import COLLECTIVE_DOMAIN, used_names
from furiosa_llm.runtime.artifact.manifest import InputInfo, Manifest

_FLOATS = frozenset(("FLOAT", "FLOAT16", "BFLOAT16", "DOUBLE"))
_OF_STEPS = frozenset(("batch", "sequence", "past", "total"))
_STAY_ZERO = frozenset(
    (
        *("Cast", "Div", "Expand", "Gather", "Identity", "Neg", "Reshape", "Slice", "Split", "Squeeze", "Transpose"),
        "Unsqueeze",
    )
)
_ZERO_BY_ONE = frozenset(("MatMul", "FusedMatMul", "Einsum", "Mul"))
"""Ops whose outputs are zeros as soon as one operand is."""
_LEAVE_BE = frozenset(("Add", "Sub", "Sum", "Shape"))
"""Ops to which zeros mean nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterInputs:
    """What a program takes as an adapter; no `infos` if it takes none.

    `base` are the arrays without an adapter. `rows` is the input that says of every sequence which ranks are its own,
    if the program has one: then adapters lie side by side along their ranks, and a batch may mix them.
    """

    infos: tuple[InputInfo, ...] = ()
    base: Mapping[str, Array] = field(default_factory=dict)
    rows: InputInfo | None = None

    def sizes(self, arrays: Mapping[str, Array]) -> dict[str, int]:
        """The sizes of the dynamic dimensions of `arrays`; raises ArtifactError if they do not fit the inputs."""
        given = [info for info in self.infos if info.name in arrays]
        return bind_sizes((f"input {info.name!r:.120}", info.shape, arrays[info.name].shape) for info in given)

    def without(self, info: InputInfo, sizes: Mapping[str, int]) -> Array:
        """What the input is without an adapter, beside others of these `sizes`."""
        base, symbols = self.base[info.name], _symbols(info)
        if not symbols or base.any():
            return base
        return np.zeros(shape_of(info.shape, {**dict.fromkeys(symbols, 1), **sizes}), dtype=base.dtype)

    def drawn(self, info: InputInfo, random: np.random.Generator, *, rank: int) -> Array:
        """Small random numbers for the input, for an adapter of that rank where the graph leaves it open."""
        shape = shape_of(info.shape, dict.fromkeys(_symbols(info), rank))
        return (0.1 * random.standard_normal(shape)).astype(DTYPES[info.dtype].numpy)


def adapter_inputs(manifest: Manifest, graph: GraphProto, defaults: Mapping[str, Array]) -> AdapterInputs:
    """What the program `graph` takes as an adapter: of fixed weights' form, and without effect when left out.

    Left out, an input is what the model itself says (`defaults`), or zeros, if these add nothing to anything.
    """
    infos = [info for info in manifest.inputs if _is_weight(info)]
    neutral = _neutral(graph, {info.name for info in infos if info.name not in defaults})
    infos = [info for info in infos if info.name in neutral or info.name in defaults]
    base = {info.name: defaults[info.name] if info.name in defaults else _zeros(info) for info in infos}
    return AdapterInputs(
        infos=tuple(infos), base=base, rows=next((info for info in manifest.inputs if info.name == ROWS), None)
    )


def _is_weight(info: InputInfo) -> bool:
    floats = info.role == "other" and info.dtype in _FLOATS and len(info.shape) > 1
    return floats and info.shape[:2] != (1, 1) and not _symbols(info) & _OF_STEPS  # (1, 1, ...) is a mask, if anything


def _zeros(info: InputInfo) -> Array:
    return np.zeros(shape_of(info.shape, dict.fromkeys(_symbols(info), 1)), dtype=DTYPES[info.dtype].numpy)


def _symbols(info: InputInfo) -> set[str]:
    return {name for dim in info.shape if isinstance(dim, str) for name in parse_dimension(dim).names}


def _neutral(graph: GraphProto, names: set[str]) -> set[str]:
    """Those of the inputs `names` that add nothing to anything when all of them are zeros."""
    zeros: dict[str, frozenset[str]] = {name: frozenset((name,)) for name in names}
    constants = {tensor.name for tensor in graph.initializer if not tensor.dims and not _number(tensor)}
    spoiled: set[str] = set()
    for node in graph.node:
        of = [zeros.get(name, frozenset()) for name in node.input]
        if not any(of):
            spoiled.update(*(zeros.get(name, ()) for name in used_names(node)))
            continue
        clears = node.op_type == "Where" and all(name in constants or name in zeros for name in node.input[1:])
        if clears or _gives_zeros(node, [bool(one) for one in of]):
            zeros.update(dict.fromkeys(node.output, frozenset().union(*of)))
        elif node.op_type not in _LEAVE_BE:
            spoiled.update(*of)
    spoiled.update(*(zeros.get(value.name, ()) for value in graph.output))
    return names - spoiled


def _number(tensor: TensorProto) -> float:
    """The value of a scalar; 1 if it lies in another file."""
    return float(numpy_helper.to_array(tensor)) if tensor.data_location != TensorProto.EXTERNAL else 1.0


def _gives_zeros(node: NodeProto, zero: Sequence[bool]) -> bool:
    if node.domain == COLLECTIVE_DOMAIN or node.op_type in ("Concat", *_LEAVE_BE):
        return all(zero) and node.op_type != "Shape"
    if node.op_type in _ZERO_BY_ONE:
        return any(zero)
    if node.op_type == "Gemm":
        return any(zero[:2]) and (len(zero) < 3 or zero[2])
    return zero[0] and node.op_type in _STAY_ZERO
