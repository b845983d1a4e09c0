"""Divisions that a processor traps are computed otherwise, in any type and at any depth; other such ops are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from furiosa_llm.runtime.execution.ort import ORT_ERRORS, Session, SessionSettings, limit_memory, unwrap, wrap
from furiosa_llm.runtime.program.fatal_kernels import guard_kernels

INT64, INT32, FLOAT, BOOL = TensorProto.INT64, TensorProto.INT32, TensorProto.FLOAT, TensorProto.BOOL
LEAST: dict[int, int] = {INT64: -(2**63), INT32: -(2**31)}


def model_of(
    nodes: list[onnx.NodeProto], inputs: dict[str, int], outputs: dict[str, int], constants: dict[str, Any]
) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info(name, dtype, [None]) for name, dtype in inputs.items()],
        [helper.make_tensor_value_info(name, dtype, None) for name, dtype in outputs.items()],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def quotient(model: onnx.ModelProto, **feeds: Any) -> Any:
    session = Session(model, Path(), SessionSettings())
    dtypes = {np.dtype(np.int64): "INT64", np.dtype(np.int32): "INT32", np.dtype(np.float32): "FLOAT"}
    tensors = {name: wrap(value, dtypes[value.dtype]) for name, value in feeds.items()}
    found = session.run({name: tensor.raw for name, tensor in tensors.items()}, ["c"])["c"]
    return unwrap(found, dtypes[next(iter(feeds.values())).dtype]).array


@pytest.mark.parametrize("dtype", [INT64, INT32])
def test_the_least_integer_by_minus_one(dtype: int) -> None:
    kind = helper.tensor_dtype_to_np_dtype(dtype)
    model = model_of([helper.make_node("Div", ["a", "b"], ["c"])], {"a": dtype, "b": dtype}, {"c": dtype}, {})
    dividends, divisors = np.array([LEAST[dtype], 7, -7, 7, 0], kind), np.array([-1, -1, -1, 2, 5], kind)
    assert quotient(model, a=dividends, b=divisors).tolist() == [LEAST[dtype], -7, 7, 3, 0]


def test_a_constant_divisor_and_one_in_a_branch() -> None:
    constant = model_of([helper.make_node("Div", ["a", "b"], ["c"])], {"a": INT64}, {"c": INT64}, {"b": np.array([-1])})
    assert quotient(constant, a=np.array([LEAST[INT64]])).tolist() == [LEAST[INT64]]
    branches = [
        helper.make_graph([helper.make_node("Div", ["a", "b"], [name])], name, [], [onnx.ValueInfoProto(name=name)])
        for name in ("then", "else")
    ]
    for branch, name in zip(branches, ("then", "else"), strict=True):
        branch.output[0].CopyFrom(helper.make_tensor_value_info(name, INT64, None))
    nodes = [
        helper.make_node("Cast", ["a"], ["all"], to=BOOL),
        helper.make_node("ReduceMax", ["a"], ["most"], keepdims=0),
        helper.make_node("Cast", ["most"], ["yes"], to=BOOL),
        helper.make_node("If", ["yes"], ["c"], then_branch=branches[0], else_branch=branches[1]),
    ]
    inside = model_of(nodes, {"a": INT64, "b": INT64}, {"c": INT64}, {})
    assert quotient(inside, a=np.array([LEAST[INT64]]), b=np.array([-1])).tolist() == [LEAST[INT64]]


def test_numbers_of_a_type_that_nobody_knows_are_divided_as_ever() -> None:
    """What an op of onnxruntime's own gives has no type here."""
    nodes = [
        helper.make_node("QuickGelu", ["b"], ["unknown"], domain="com.microsoft", alpha=0.0),
        helper.make_node("Add", ["unknown", "unknown"], ["twice"]),
        helper.make_node("QuickGelu", ["a"], ["half"], domain="com.microsoft", alpha=0.0),
        helper.make_node("Div", ["half", "twice"], ["c"]),
    ]
    model = model_of(nodes, {"a": FLOAT, "b": FLOAT}, {}, {})
    model.graph.output.add(name="c")
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    a = np.array([1, 1, -3, 5, 0, 0], np.float32)
    b = np.array([-1, 3, -7, 0, -1, 1], np.float32)
    with np.errstate(divide="ignore"):
        assert quotient(model, a=a, b=b).tolist() == (a / 2 / b).tolist()
    assert len(model.graph.node) > len(nodes)


@pytest.mark.parametrize(
    ("nodes", "constants"),
    [
        ([helper.make_node("Div", ["x", "b"], ["c"])], {}),
        ([helper.make_node("Div", ["a", "two"], ["c"])], {"two": np.array(2)}),
        ([helper.make_node("Sqrt", ["x"], ["r"]), helper.make_node("Div", ["r", "r"], ["c"])], {}),
        ([helper.make_node("Cast", ["a"], ["f"], to=FLOAT), helper.make_node("Div", ["f", "f"], ["c"])], {}),
    ],
)
def test_what_cannot_trap_is_left_alone(nodes: list[onnx.NodeProto], constants: dict[str, Any]) -> None:
    model = model_of(nodes, {"a": INT64, "x": FLOAT}, {"c": FLOAT}, constants)
    before = model.SerializeToString()
    guard_kernels(model)
    assert model.SerializeToString() == before


@pytest.mark.parametrize(
    ("node", "constants", "reason"),
    [
        (helper.make_node("STFT", ["x", "step"], ["c"]), {}, "frames of no constant length"),
        (helper.make_node("STFT", ["x", "step", "", "none"], ["c"]), {"none": np.array(0)}, "frames of no constant"),
        (helper.make_node("STFT", ["x", "step", "x"], ["c"]), {}, "frames of no constant length"),
        (helper.make_node("GatherND", ["x", "a"], ["c"], batch_dims=-(2**40)), {}, "no plausible batch_dims"),
        (helper.make_node("Unique", ["a"], ["c"]), {}, "takes memory that no limit counts"),
    ],
)
def test_what_cannot_be_guarded_is_refused(node: onnx.NodeProto, constants: dict[str, Any], reason: str) -> None:
    model = model_of([node], {"a": INT64, "x": FLOAT}, {"c": FLOAT}, {"step": np.array(4), **constants})
    with pytest.raises(RuntimeError, match=f"{node.op_type} .*{reason}"):
        guard_kernels(model)


def test_short_time_transforms_of_known_frames_pass() -> None:
    node = helper.make_node("STFT", ["x", "step", "window"], ["c"])
    guard_kernels(model_of([node], {"x": FLOAT}, {}, {"step": np.array(4), "window": np.ones(8, np.float32)}))


@pytest.mark.parametrize("shape", [(), (5,), (0, 3), (2, 3, 4), (1,) * 20])
def test_indices_are_those_of_any_shape(shape: tuple[int, ...]) -> None:
    data = np.random.default_rng(0).integers(0, 2, shape).astype(np.int32)
    graph = helper.make_graph(
        [helper.make_node("NonZero", ["a"], ["c"])],
        "g",
        [helper.make_tensor_value_info("a", INT32, [None] * len(shape))],
        [helper.make_tensor_value_info("c", INT64, None)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    tensor = wrap(data, "INT32")
    found = unwrap(Session(model, Path(), SessionSettings()).run({"a": tensor.raw}, ["c"])["c"], "INT64").array
    expected = np.array(np.nonzero(np.atleast_1d(data)))
    assert np.array_equal(found.reshape(expected.shape), expected)


def test_indices_of_many_dimensions_count_before_they_are_made() -> None:
    """16 MiB of numbers in 22 dimensions have 704 MiB of indices, which the kernel keeps in memory of its own."""
    nodes = [
        helper.make_node("Expand", ["a", "many"], ["wide"]),
        helper.make_node("NonZero", ["wide"], ["found"]),
        helper.make_node("Size", ["found"], ["c"]),
    ]
    model = model_of(nodes, {"a": INT32}, {"c": INT64}, {"many": np.array([2] * 22)})
    limit_memory(2**26)
    session = Session(model, Path(), SessionSettings(arena=True))
    with pytest.raises(ORT_ERRORS, match="Available memory"):
        session.run({"a": wrap(np.ones(1, np.int32), "INT32").raw}, ["c"])
