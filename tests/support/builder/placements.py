"""Try every placement of one op on two ranks, and see which ones its rule does not claim.

Each input is whole (R), split in halves along a dimension (S0, S1, ...) or a partial sum (P); a placement is right if
every output can be put together from what the two ranks give: it is the same on both, halves, or a sum. At most two
inputs are placed at a time, or all inputs in dimensions of one size. Attributes and sizes stay as they are, so that
splits which change one (a number of heads, a Reshape's target) are not found here: what a rule claims is proved
elsewhere; here it is what a rule leaves out.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
from onnx import helper
from onnxruntime.capi import onnxruntime_pybind11_state as ort_errors

from furiosa_llm.builder.rules.rule import Operand, Signature, parse
from furiosa_llm.builder.write.closures import open_closures
from tests.support.builder.graphs import Array
from tests.support.builder.op_case import OpCase
from tests.support.builder.plans import prepare_proto
from tests.support.builder.proofs import SIZES, TOLERANCE

WHOLE, PARTIAL = "R", "P"
Placement = tuple[str, ...]
Ways = Sequence[set[str]]
_NO_SUCH_SHAPES = (
    ort_errors.Fail,
    ort_errors.InvalidArgument,
    ort_errors.NotImplemented,
    ort_errors.RuntimeException,
)
_MOST_BY_SIZE = 64


class Trial:
    """The node of a case alone, what goes into it and what comes out."""

    def __init__(self, case: OpCase) -> None:
        prepared = prepare_proto(case.model())
        domain, _, op_type = case.op.rpartition(".")
        infos = [i for i in prepared.analysis.nodes if (i.node.domain, i.node.op_type) == (domain, op_type)]
        self.rule, node = infos[-1].rule, infos[-1].node
        self.ports = {port: str(value.name) for port, value in enumerate(node.inputs) if value is not None}
        self.outputs = [str(value.name) for value in node.outputs if value.name]
        model = ir.to_proto(prepared.model)
        self.inputs = _values(model, dict.fromkeys(self.ports.values()), prepared.feeds(SIZES))
        (proto,) = (n for n in model.graph.node if [name for name in n.output if name] == self.outputs)
        try:
            self._session = _quiet_session(self._alone(proto, model, of_known_shape=()))
        except ort_errors.Fail:  # MatMulNBits wants to know the size of its bias: it cannot be cut then
            vectors = [name for name, array in self.inputs.items() if array.ndim == 1]
            self._session = _quiet_session(self._alone(proto, model, of_known_shape=vectors))
        self.expected = self.run(self.inputs)

    def _alone(self, node: onnx.NodeProto, model: onnx.ModelProto, of_known_shape: Collection[str]) -> onnx.ModelProto:
        shapes = {name: list(array.shape) if name in of_known_shape else None for name, array in self.inputs.items()}
        inputs = [helper.make_tensor_value_info(n, _type(a), shapes[n]) for n, a in self.inputs.items()]
        outputs = [helper.make_empty_tensor_value_info(name) for name in self.outputs]
        graph = helper.make_graph([node], "op", inputs, outputs)
        alone = helper.make_model(graph, opset_imports=model.opset_import, ir_version=10)
        open_closures(alone)
        return alone

    def run(self, feeds: Mapping[str, Array]) -> list[Array]:
        """The outputs for some inputs."""
        results: list[Array] = self._session.run(self.outputs, dict(feeds))
        return results


def _type(array: Array) -> int:
    return int(ir.DataType.from_numpy(array.dtype))


def _quiet_session(model: onnx.ModelProto) -> ort.InferenceSession:
    """A session that says nothing of the shapes that do not fit, which are most."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    return ort.InferenceSession(model.SerializeToString(), options)


def _values(model: onnx.ModelProto, names: Mapping[str, None], feeds: Mapping[str, Array]) -> dict[str, Array]:
    """What values hold when the model runs."""
    known = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer} | dict(feeds)
    wanted = [name for name in names if name not in known]
    if wanted:
        whole = onnx.ModelProto.FromString(model.SerializeToString())
        del whole.graph.output[:]
        whole.graph.output.extend(helper.make_empty_tensor_value_info(name) for name in wanted)
        session = _quiet_session(whole)
        needed = {value.name for value in session.get_inputs()}
        found = session.run(wanted, {name: array for name, array in feeds.items() if name in needed})
        known |= dict(zip(wanted, found, strict=True))
    return {name: known[name] for name in names}


def unclaimed(trial: Trial) -> list[str]:
    """The right placements that the rule does not claim: `S0, R -> S1`."""
    found = []
    for placement, ways in _right_placements(trial):
        if not _is_claimed(trial, placement, ways):
            found.append(f"{', '.join(placement)} -> {', '.join('/'.join(sorted(way)) for way in ways)}")
    return found


# -- what is right -----------------------------------------------------------------------------------------------


def _right_placements(trial: Trial) -> Iterator[tuple[Placement, Ways]]:
    for placement in dict.fromkeys(_placements(list(trial.inputs.values()))):
        placed = list(zip(trial.inputs.items(), placement, strict=True))
        try:
            first, second = (trial.run({n: _part(a, how, rank) for (n, a), how in placed}) for rank in (0, 1))
        except _NO_SUCH_SHAPES:
            continue
        ways = [_ways(*arrays) for arrays in zip(trial.expected, first, second, strict=True)]
        if all(ways):
            yield placement, ways


def _placements(arrays: Sequence[Array]) -> Iterator[Placement]:
    options = [[*_splits(array), *([PARTIAL] if array.dtype.kind == "f" else [])] for array in arrays]
    for count in (1, 2):
        for chosen in itertools.combinations(range(len(arrays)), count):
            for ways in itertools.product(*(options[i] for i in chosen)):
                how = dict(zip(chosen, ways, strict=True))
                yield tuple(how.get(i, WHOLE) for i in range(len(arrays)))
    for size in sorted({size for array in arrays for size in array.shape if size and size % 2 == 0}):
        same = [[f"S{d}" for d, s in enumerate(array.shape) if s == size] or [WHOLE] for array in arrays]
        yield from itertools.islice(itertools.product(*same), _MOST_BY_SIZE)


def _splits(array: Array) -> list[str]:
    return [f"S{d}" for d, size in enumerate(array.shape) if size and size % 2 == 0]


def _part(array: Array, placement: str, rank: int) -> Array:
    if placement == WHOLE:
        return array
    if placement == PARTIAL:
        noise = np.random.default_rng(5).standard_normal(array.shape).astype(array.dtype)
        return np.asarray(array - noise if rank else noise, dtype=array.dtype)
    return np.ascontiguousarray(np.split(array, 2, axis=int(placement[1:]))[rank])


def _ways(whole: Array, first: Array, second: Array) -> set[str]:
    """How two ranks' outputs make the whole one."""
    found = {WHOLE} if _same(first, whole) and _same(second, whole) else set()
    if first.shape != second.shape or first.ndim != whole.ndim:
        return found
    if first.shape == whole.shape and whole.dtype.kind != "b" and _same(first + second, whole):
        found.add(PARTIAL)
    for d in range(whole.ndim):
        if _same(np.concatenate([first, second], axis=d), whole):
            found.add(f"S{d}")
    return found


def _same(found: Array, expected: Array) -> bool:
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return False
    if found.dtype.kind in "iub":
        return bool(np.array_equal(found, expected))
    scale = float(np.abs(expected).max(initial=0.0)) or 1.0
    error = np.abs(found.astype(np.float64) - expected.astype(np.float64))
    return bool(error.max(initial=0.0) / scale < TOLERANCE)


# -- what a rule claims ------------------------------------------------------------------------------------------


def _is_claimed(trial: Trial, placement: Placement, ways: Ways) -> bool:
    rule, how = trial.rule, dict(zip(trial.inputs, placement, strict=True))
    partial = {port for port, name in trial.ports.items() if how[name] == PARTIAL}
    if partial:
        alone = set(placement) <= {WHOLE, PARTIAL}
        return alone and (partial <= set(rule.linear) or (rule.bilinear and len(partial) == 1))
    signature = parse(rule.text)
    operands = [operand for operand in (*signature.inputs, *signature.outputs) if operand]
    symbols = {symbol for operand in operands for dim in operand for symbol in dim.symbols}
    return any(_claims(trial, signature, s, how, ways) for s in symbols - signature.pin - signature.full)


def _claims(trial: Trial, signature: Signature, symbol: str, how: Mapping[str, str], ways: Ways) -> bool:
    """Whether splitting `symbol` is this placement, as far as its parts are halves."""
    sizes = trial.rule.sizes
    for port, name in trial.ports.items():
        operand = signature.inputs[port] if port < len(signature.inputs) else None
        if _place(operand, symbol, sizes) not in (None, how[name]):
            return False
    contracted = symbol in signature.reduce | signature.lookup
    outputs = [operand for operand in signature.outputs if operand is not None]
    claimed = [PARTIAL if contracted else _place(operand, symbol, sizes) for operand in outputs]
    return all(place is None or place in way for place, way in zip(claimed, ways, strict=False))


def _place(operand: Operand, symbol: str, sizes: Mapping[str, int]) -> str | None:
    """How an operand lies when `symbol` is split; None if its parts are no halves."""
    for d, dim in enumerate(operand or ()):
        if symbol in dim.symbols:
            leading = [s for s in dim.segments[0] if sizes.get(s, 2) > 1]
            return f"S{d}" if len(dim.segments) == 1 and leading[:1] == [symbol] else None
    return WHOLE
