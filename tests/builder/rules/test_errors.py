"""Ops whose shapes cannot be told: what is said of them, and what to do."""

from __future__ import annotations

import numpy as np
import pytest

from furiosa_llm.builder.errors import ShapeError
from tests.support.builder.graphs import Weights, model
from tests.support.builder.plans import prepare_proto

CASES = {
    "an equation for other operands": (
        'y = Einsum<equation="ij,jk->ik">(past_x)',
        "the equation 'ij,jk->ik' does not fit operands of .2. dimensions; export the model again",
    ),
    "an equation for other dimensions": (
        'y = Einsum<equation="ijk->ik">(past_x)',
        "the equation 'ijk->ik' does not fit operands of .2. dimensions",
    ),
    "an equation with a result from nowhere": (
        'y = Einsum<equation="ij->iz">(past_x)',
        "the equation 'ij->iz' does not fit",
    ),
    "an equation with two sizes of one letter": (
        'y = Einsum<equation="ij,ij->ij">(past_x, w)',
        "two sizes for 'j': 6 and 5, expected one; export the model again",
    ),
    "a computed axis": (
        "i = Cast<to=6>(past_i) y = com.microsoft.ExpandDims(past_x, i)",
        "ExpandDims .* needs a constant axis; export the model with Unsqueeze",
    ),
    "a selection by data": (
        "c = Greater(past_x, w0) f = Reshape(c, flat) y = Compress(past_x, f)",
        "Compress .* expected a constant condition; export the model without a selection by data",
    ),
    "streams that do not divide": (
        "y = com.microsoft.HyperConnectionPreMix<num_branches=5>(past_x, w)",
        r"\[4, 6\] are no 5 streams",
    ),
    "gates of other streams": (
        "y = com.microsoft.HyperConnectionPreMix<num_branches=3>(past_x, w)",
        "the gates are not one for each of 3 streams, or for each of their 2 features",
    ),
    "another block's output": (
        "y = com.microsoft.HyperConnectionPostMix<num_branches=3>(past_x, w, three)",
        r"the block's output is not \[4, 2\]",
    ),
    "a matrix of other streams": (
        "y = com.microsoft.HyperConnectionPostMix<num_branches=3>(past_x, two, three, w)",
        r"the matrix is not \[4, 3, 3\]",
    ),
    "a value of other tokens": (
        "y = com.microsoft.EngramGate(streams, streams, w, w, w)",
        r"input 2 is not \[1, 2, 4\]",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_the_error_says_what_to_do(name: str) -> None:
    nodes, message = CASES[name]
    words = nodes.replace(",", " ").replace("(", " ").replace(")", " ").split()
    weights: Weights = {
        "w": (4, 5),
        "w0": np.zeros((4, 6), np.float32),
        "flat": np.array([-1]),
        "two": (4, 2),
        "three": (4, 3),
        "streams": (1, 2, 3, 4),
    }
    inputs = "float[4, 6] past_x" + (", float past_i" if "past_i" in words else "")
    proto = model(inputs, "float y", nodes, {n: w for n, w in weights.items() if n in words})
    with pytest.raises(ShapeError, match=message):
        prepare_proto(proto)


@pytest.mark.parametrize(
    ("op", "nodes", "message"),
    [
        ("Upsample", "y = Upsample(past_x, past_s)", r"needs constant scales; export the model at one image size"),
        (
            "Resize",
            "y = Resize(past_x, , past_s)",
            r"follows from what the inputs hold, .*; export the model with const",
        ),
        ("Pad", "y = com.microsoft.Pad(past_x, past_p)", r"follows from what the inputs hold"),
    ],
)
def test_sizes_by_data_are_refused(op: str, nodes: str, message: str) -> None:
    second = "int64[8] past_p" if "past_p" in nodes else "float[4] past_s"
    inputs = f"float[1, 2, 4, 4] past_x, {second}"
    proto = model(inputs, "float[1, 2, a, b] y", nodes, opset=9 if op == "Upsample" else 21)
    with pytest.raises(ShapeError, match=rf"{op} .*{message}"):
        prepare_proto(proto)


def test_standard_shapes_that_contradict_are_refused() -> None:
    nodes = "y = com.microsoft.GatherND(past_x, index)"
    proto = model("float[4] past_x", "float[1] y", nodes, {"index": np.zeros((1, 3), np.int64)})
    with pytest.raises(ShapeError, match=r"GatherND .* does not fit its inputs"):
        prepare_proto(proto)
