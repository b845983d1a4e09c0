"""A small model with an op in it, and the rule's text there; the tables of them are in `op_cases*.py`.

Inputs named `past...` and outputs named `present...` are states and may be split. Sizes are such that most of them need
padding on two or four ranks.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from tests.support.builder.graphs import Weights, model, random

Array = npt.NDArray[Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class OpCase:
    """A model with one node of interest."""

    op: str
    label: str
    text: str
    """The rule's text at the last node with this op."""
    inputs: str
    outputs: str
    nodes: str
    weights: Weights
    opset: int
    runs: bool
    """Whether onnxruntime has a kernel for it."""

    @property
    def name(self) -> str:
        return f"{self.op} {self.label}".strip()

    def model(self) -> onnx.ModelProto:
        return model(self.inputs, self.outputs, self.nodes, self.weights, opset=self.opset)


def case(
    op: str,
    text: str,
    inputs: str,
    outputs: str,
    nodes: str,
    label: str = "",
    /,
    *,
    opset: Any = 21,
    runs: Any = True,
    **weights: Any,
) -> OpCase:
    """A row of the table. `opset` is an int and `runs` a bool; weights are arrays or shapes, by name."""
    return OpCase(
        op=op,
        label=label,
        text=text,
        inputs=inputs,
        outputs=outputs,
        nodes=nodes,
        weights=weights,
        opset=opset,
        runs=runs,
    )


X = "float[6, 5] past_x"
Y = "float[6, 5] present_y"


def number(value: float) -> Array:
    return np.array(value, dtype=np.float32)


def ints(*values: int) -> Array:
    return np.array(values, dtype=np.int64)


def positive(*shape: int) -> Array:
    return np.abs(random(*shape)) / 10


def codes(*shape: int) -> Array:
    """Bytes of packed weights."""
    return np.random.default_rng(list(shape)).integers(0, 256, shape, dtype=np.uint8)
