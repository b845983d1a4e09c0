"""The unsplit model of an artifact is foreign, too: it may neither run for ever nor take all memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import NodeProto, TensorProto, helper

from furiosa_llm.runtime.artifact.manifest import InputInfo, OutputInfo
from furiosa_llm.runtime.errors import ExecutionError, StepTimeoutError
from furiosa_llm.runtime.program.limits import WorkLimits
from furiosa_llm.runtime.verification.reference import ReferenceModel

LIMITS = WorkLimits(load_seconds=60, step_seconds=0.05, step_nbytes=2**22)
NUMBER: Any = {"dtype": "FLOAT", "shape": (1,), "layout": (None,)}


def endless() -> list[NodeProto]:
    body = helper.make_graph(
        [helper.make_node("Identity", ["go"], ["on"]), helper.make_node("Identity", ["before"], ["after"])],
        "body",
        [
            helper.make_tensor_value_info("turn", TensorProto.INT64, []),
            helper.make_tensor_value_info("go", TensorProto.BOOL, []),
            helper.make_tensor_value_info("before", TensorProto.FLOAT, None),
        ],
        [
            helper.make_tensor_value_info("on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("after", TensorProto.FLOAT, None),
        ],
    )
    true = helper.make_node("Constant", [], ["true"], value=helper.make_tensor("true", TensorProto.BOOL, [], [True]))
    return [true, helper.make_node("Loop", ["", "true", "x"], ["y"], body=body)]


def bloated() -> list[NodeProto]:
    size = helper.make_tensor("size", TensorProto.INT64, [1], [2**24])
    return [
        helper.make_node("Constant", [], ["size"], value=size),
        helper.make_node("Expand", ["x", "size"], ["wide"]),
        helper.make_node("ReduceMax", ["wide"], ["y"]),
    ]


@pytest.mark.parametrize(
    ("nodes", "error", "text"),
    [
        (endless, StepTimeoutError, r"model\.onnx: a run was not done within 0\.05 s; give a greater step_timeout"),
        (bloated, ExecutionError, r"cannot run .*model\.onnx: .*Available memory"),
    ],
)
def test_it_runs_within_limits(
    nodes: Callable[[], list[NodeProto]], error: type[ExecutionError], text: str, tmp_path: Path
) -> None:
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy")
    graph = helper.make_graph(nodes(), "graph", [x], [y])
    model = helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 18)])
    onnx.save(model, tmp_path / "model.onnx")
    reference = ReferenceModel(
        tmp_path / "model.onnx",
        inputs=[InputInfo(name="x", role="other", **NUMBER)],
        outputs=[OutputInfo(name="y", role="other", **NUMBER)],
        states=[],
        limits=LIMITS,
    )
    with pytest.raises(error, match=text):
        reference.run({"x": np.ones(1, dtype=np.float32)})
