"""Small tensors evaluated as onnxruntime evaluates them."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx_ir as ir
import pytest

from furiosa_llm.builder.rules import OPS
from furiosa_llm.builder.rules.evaluate import quiet
from furiosa_llm.builder.shapes.interpreter import attributes_of
from tests.support.builder.graphs import Array, model
from tests.support.builder.op_case import ints
from tests.support.builder.plans import prepare_proto
from tests.support.builder.stitching import session


@dataclasses.dataclass(frozen=True)
class Case:
    """One node, what goes into it, and its attributes as they are written."""

    op: str
    inputs: tuple[Array | None, ...]
    attributes: str = ""
    outputs: int = 1
    opset: int = 21


A, B = np.array([[3, -1, 2], [0, 5, -4]]), np.array([[1, 2, 3], [4, -5, 6]])
F = np.array([[0.5, -1.5, 2.5], [3.25, 0.0, -4.0]], dtype=np.float32)
P = np.abs(F) + np.float32(0.25)
T, N = A > 0, B > 0
one, two = np.array(1), np.array(2)

CASES = (
    *(Case(op, (A,)) for op in ("Abs", "Identity", "Neg", "Sign", "NonZero", "EyeLike")),
    *(Case(op, (F,)) for op in ("Abs", "Ceil", "Floor", "Exp", "Round", "Sign", "NonZero", "Neg")),
    *(Case(op, (P,)) for op in ("Log", "Reciprocal", "Sqrt")),
    *(Case(op, (A, B)) for op in ("Add", "Sub", "Mul", "Div", "Mod", "Max", "Min", "Equal", "Greater", "Less")),
    *(Case(op, (A, B)) for op in ("GreaterOrEqual", "LessOrEqual")),
    *(Case(op, (F, P)) for op in ("Add", "Div", "Sum", "Mean", "Max", "Min")),
    *(Case(op, (T, N)) for op in ("And", "Or", "Xor")),
    *(Case(op, (F - F,)) for op in ("Log", "Reciprocal")),
    Case("Div", (F, F - F)),
    Case("Mod", (A, B), "fmod=1"),
    Case("Pow", (A, two)),
    Case("Pow", (P, np.array(0.5, np.float32))),
    Case("Not", (T,)),
    Case("IsNaN", (np.array([1, np.nan], np.float32),)),
    Case("Cast", (F,), "to=7"),
    Case("CastLike", (F, A)),
    Case("Clip", (A, np.array(-2), two)),
    Case("Clip", (F,), "min=-1.0, max=2.0", opset=10),
    Case("Where", (T, A, B)),
    Case("Concat", (A, B), "axis=-1"),
    Case("Split", (A,), "axis=1, num_outputs=2", 2),
    Case("Split", (A, ints(1, 2)), "axis=1", 2),
    Case("Slice", (A, ints(-1), ints(-10), ints(1), ints(-2))),
    Case("Slice", (A, ints(0, 1), ints(2, 3))),
    Case("Gather", (A, ints(1, -1)), "axis=1"),
    Case("GatherElements", (A, np.array([[2, -1]])), "axis=1"),
    Case("GatherND", (A, np.array([[1, 2], [0, -1]]))),
    Case("GatherND", (A, np.array([[2], [0]])), "batch_dims=1"),
    Case("ScatterElements", (A, np.array([[2, -3]]), np.array([[7, 8]])), "axis=1"),
    Case("ScatterElements", (A, np.array([[2, 2]]), np.array([[7, 8]])), 'axis=1, reduction="add"'),
    Case("ScatterND", (A, np.array([[1]]), np.array([[7, 8, 9]]))),
    Case("ScatterND", (A, np.array([[1, 1], [1, 1]]), ints(7, 9)), 'reduction="max"'),
    Case("ScatterND", (A, np.array([[1, 1], [1, 1]]), ints(7, 9)), 'reduction="mul"'),
    Case("Reshape", (A, ints(0, -1, 1))),
    Case("Reshape", (np.zeros((0, 3), np.int64), ints(0, 5)), "allowzero=1"),
    Case("Flatten", (A.reshape(1, 2, 3),), "axis=-1"),
    Case("Squeeze", (A.reshape(1, 2, 3), ints(0))),
    Case("Unsqueeze", (A, ints(0, -1))),
    Case("Transpose", (A,), "perm=[1, 0]"),
    Case("Expand", (A, ints(2, 1, 3))),
    Case("Tile", (A, ints(2, 3))),
    Case("Pad", (A, ints(1, 0, 2, 1))),
    Case("Pad", (A, ints(1, 2), one, ints(-1))),
    Case("Pad", (A, ints(0, 1, 0, 2)), 'mode="reflect"'),
    Case("Pad", (A, ints(0, 1, 0, 2)), 'mode="edge"'),
    Case("Pad", (A, ints(-1, 0, 2, -1))),
    Case("Trilu", (A,)),
    Case("Trilu", (A, one), "upper=0"),
    Case("EyeLike", (A,), "k=1, dtype=1"),
    Case("Range", (one, np.array(9), two)),
    Case("ConstantOfShape", (ints(2, 3),), "value=int64[1] {7}"),
    Case("CumSum", (A, one)),
    Case("CumSum", (A, one), "exclusive=1, reverse=1"),
    Case("OneHot", (ints(1, -1, 5), np.array(3), ints(4, 9))),
    Case("OneHot", (A[:1], np.array(4), ints(0, 1)), "axis=1"),
    Case("Compress", (A, np.array([True, False, True])), "axis=1"),
    Case("Compress", (A, np.array([True, False, True]))),
    *(Case(op, (A,), attributes) for op in ("ArgMax", "ArgMin") for attributes in ("axis=1", "keepdims=0")),
    Case("ArgMax", (np.array([[2, 2, 1]]),), "axis=1, select_last_index=1"),
    *(Case(op, (A, ints(1))) for op in ("ReduceMax", "ReduceMin", "ReduceProd", "ReduceSum")),
    Case("ReduceMean", (F, ints(-1)), "keepdims=0"),
    Case("ReduceSum", (A,), "noop_with_empty_axes=1"),
)


@pytest.mark.parametrize("case", CASES, ids=[f"{number}-{case.op}" for number, case in enumerate(CASES)])
def test_value_is_onnxruntimes(case: Case) -> None:
    names = [f"i{n}" for n in range(len(case.inputs))]
    weights = {name: array for name, array in zip(names, case.inputs, strict=True) if array is not None}
    outputs = [f"o{n}" for n in range(case.outputs)]
    attributes = f"<{case.attributes}>" if case.attributes else ""
    nodes = f"{', '.join(outputs)} = {case.op}{attributes}({', '.join(names)})"
    proto = model("float[1] unused", ", ".join(f"float {name}" for name in outputs), nodes, weights, opset=case.opset)
    for value in proto.graph.output:
        value.ClearField("type")
    expected = session(proto).run(outputs, {"unused": np.zeros(1, np.float32)})
    given = attributes_of(ir.from_proto(proto.graph.node[0]))
    evaluate = OPS["", case.op].value
    assert evaluate is not None
    found = evaluate(given, list(case.inputs))
    for array, wanted in zip(found if isinstance(found, tuple) else (found,), expected, strict=True):
        assert array.dtype == wanted.dtype
        np.testing.assert_allclose(array, wanted, rtol=1e-6)


def test_every_evaluator_has_a_case() -> None:
    assert {op_type for (_, op_type), op in OPS.items() if op.value is not None} == {case.op for case in CASES}


@pytest.mark.parametrize(
    "nodes", ["t = Tile(c, many)", "t = Pad(c, pads)", "t = OneHot(c, number, pair)", "t = Expand(c, many)"]
)
def test_what_would_be_large_is_not_evaluated(nodes: str) -> None:
    """A gigabyte of equal numbers, which a graph asks for in a few bytes."""
    weights = {"c": ints(1), "many": ints(2**30), "pads": ints(0, 2**30), "number": np.array(2**30), "pair": ints(0, 1)}
    used = {name: weight for name, weight in weights.items() if name in nodes}
    rank = 2 if "OneHot" in nodes else 1
    shape = ", ".join(f"n{d}" for d in range(rank))
    proto = model("float[1] past_x", f"float[1] present_y, int64[{shape}] t", f"{nodes} present_y = Neg(past_x)", used)
    prepared = prepare_proto(proto)
    (fact,) = (prepared.probes.facts[v] for v in prepared.model.graph.outputs if v.name == "t")
    assert fact.value is None
    assert max(fact.shape) >= 2**30


def test_what_numpy_cannot_do_is_no_traceback() -> None:
    def expand(_: object, __: object) -> Array:
        return np.broadcast_to(np.zeros(1), np.broadcast_shapes((1,), (1,) * 50))

    with pytest.raises(ValueError, match="numpy: this function only supports up to 32 dimensions"):
        quiet(expand)({}, [])
