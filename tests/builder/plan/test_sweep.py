"""Partial sums: through which ops they pass, where they are added up, and that the result is right either way.

In each model `p` is a product whose contraction (6 indices) is split: a partial sum on every rank.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx
import pytest

from furiosa_llm.builder.plan.sweep import Sweeper
from furiosa_llm.runtime.artifact.layout import Mesh
from tests.support.builder.graphs import Array, model, random
from tests.support.builder.plans import Prepared, prepare_proto
from tests.support.builder.proofs import prove

PARTIAL = "p = MatMul(past_x, w)"
TWO = f"{PARTIAL} q = MatMul(past_z, v)"


@dataclasses.dataclass(frozen=True)
class Case:
    """What is done with `p`, and the values that are added up over the ranks."""

    nodes: str
    reduced: tuple[str, ...] = ("y",)
    shape: str = "3, 5"
    opset: int = 21
    dtype: str = "float"

    def model(self) -> onnx.ModelProto:
        inputs = "float[3, 6] past_x, float[3, 4] past_z, float[3, 5] r"
        weights: dict[str, Array | tuple[int, ...]] = {
            "w": (6, 5),
            "v": (4, 5),
            "b": (5,),
            "c": (3, 5),
            "big": (2, 3, 5),
        }
        weights |= {name: np.array(values) for name, values in INTEGERS.items() if name in self.nodes}
        weights |= {"zeros": np.zeros((4, 5), np.float32), "half": np.array(0.5, np.float32), "full": (4, 5)}
        used = {name: weight for name, weight in weights.items() if name in self.nodes}
        return model(inputs, f"{self.dtype}[{self.shape}] y", self.nodes, used, opset=self.opset)


INTEGERS = {
    "axis1": [1],
    "axis_1": 1,
    "flat": [15],
    "wide": [2, 3, 5],
    "pieces": [3, 2],
    "from1": [1],
    "to4": [4],
    "twice": [2, 1],
    "rows": [[2, 0], [1, 1]],
    "picks": [[0, 1], [2, 4], [3, 3]],
    "points": [[0], [2]],
    "scattered": [[3] * 5, [0] * 5, [1] * 5],
    "targets": [[3], [0], [1]],
    "pads": [0, 1, 0, 1],
    "kept": [True, False, True, False, False],
}

PASSES = {
    "Add a constant": Case(f"{PARTIAL} y = Add(p, b)"),
    "Add another": Case(f"{TWO} y = Add(p, q)"),
    "Sum": Case(f"{TWO} y = Sum(p, b, q)"),
    "Mean": Case(f"{TWO} y = Mean(p, b, q)"),
    "Sub from a constant": Case(f"{PARTIAL} y = Sub(b, p)"),
    "Neg": Case(f"{PARTIAL} y = Neg(p)"),
    "Mul": Case(f"{PARTIAL} y = Mul(p, r)"),
    "Mul from the left": Case(f"{PARTIAL} y = Mul(c, p)"),
    "Div": Case(f"{PARTIAL} e = Exp(r) y = Div(p, e)"),
    "Where": Case(f"{TWO} g = Greater(r, half) y = Where(g, p, q)"),
    "Where and a constant": Case(f"{PARTIAL} g = Greater(r, half) y = Where(g, b, p)"),
    "Cast": Case(f"{PARTIAL} y = Cast<to=11>(p)", dtype="double"),
    "Reshape": Case(f"{PARTIAL} y = Reshape(p, flat)", shape="15"),
    "Flatten": Case(f"{PARTIAL} y = Flatten<axis=0>(p)", shape="1, 15"),
    "Unsqueeze": Case(f"{PARTIAL} y = Unsqueeze(p, axis1)", shape="3, 1, 5"),
    "Squeeze": Case(f"{PARTIAL} u = Unsqueeze(p, axis1) y = Squeeze(u, axis1)"),
    "Transpose": Case(f"{PARTIAL} y = Transpose(p)", shape="5, 3"),
    "Expand": Case(f"{PARTIAL} y = Expand(p, wide)", shape="2, 3, 5"),
    "Concat": Case(f"{TWO} y = Concat<axis=0>(p, c, q)", shape="9, 5"),
    "Split": Case(f"{PARTIAL} s, t = Split<axis=1>(p, pieces) y = Concat<axis=1>(t, s)"),
    "Slice": Case(f"{PARTIAL} y = Slice(p, from1, to4, axis1)", shape="3, 3"),
    "Tile": Case(f"{PARTIAL} y = Tile(p, twice)", shape="6, 5"),
    "Trilu": Case(f"{PARTIAL} y = Trilu(p)"),
    "CumSum": Case(f"{PARTIAL} y = CumSum(p, axis_1)"),
    "ReduceSum": Case(f"{PARTIAL} y = ReduceSum(p, axis1)", shape="3, 1"),
    "ReduceMean": Case(f"{PARTIAL} y = ReduceMean(p, axis1)", shape="3, 1"),
    "Gather": Case(f"{PARTIAL} y = Gather(p, rows)", shape="2, 2, 5"),
    "GatherElements": Case(f"{PARTIAL} y = GatherElements<axis=1>(p, picks)", shape="3, 2"),
    "GatherND": Case(f"{PARTIAL} y = GatherND(p, points)", shape="2, 5"),
    "ScatterElements into zeros": Case(f"{PARTIAL} y = ScatterElements<axis=0>(zeros, scattered, p)", shape="4, 5"),
    "ScatterElements adds to a constant": Case(
        f'{PARTIAL} y = ScatterElements<axis=0, reduction="add">(full, scattered, p)', shape="4, 5"
    ),
    "ScatterND": Case(f"{PARTIAL} y = ScatterND(zeros, targets, p)", shape="4, 5"),
    "Pad": Case(f"{PARTIAL} y = Pad(p, pads)", shape="3, 7"),
    "Compress": Case(f"{PARTIAL} y = Compress<axis=1>(p, kept)", shape="3, 2"),
    "residuals of two branches": Case(f"{TWO} s = Add(r, p) y = Add(s, q)"),
}
"""Everything up to the output is partial; one AllReduce there, unless other values are named."""

STOPS = {
    "Relu": Case(f"{PARTIAL} y = Relu(p)", ("p",)),
    "Add an activation": Case(f"{PARTIAL} y = Add(p, r)", ("p",)),
    "Mul by itself": Case(f"{PARTIAL} y = Mul(p, p)", ("p",)),
    "Mul of two": Case(f"{TWO} y = Mul(p, q)", ("p", "q")),
    "Mul that grows": Case(f"{PARTIAL} y = Mul(p, big)", ("p",), shape="2, 3, 5"),
    "Div by it": Case(f"{PARTIAL} y = Div(r, p)", ("p",)),
    "Where it decides": Case(f"{PARTIAL} g = Greater(p, half) y = Where(g, r, c)", ("p",)),
    "Cast to fewer bits": Case(f"{PARTIAL} y = Cast<to=10>(p)", ("p",), dtype="float16"),
    "two readers": Case(f"{PARTIAL} m = Neg(p) e = Mul(p, r) y = Add(m, e)", ("p",)),
    "Softmax": Case(f"{PARTIAL} y = Softmax(p)", ("p",)),
    "Pad with ones": Case(f"{PARTIAL} y = Pad(p, pads, half)", ("p",), shape="3, 7"),
    "ReduceMax": Case(f"{PARTIAL} y = ReduceMax(p, axis1)", ("p",), shape="3, 1"),
    "MatMul": Case(f"{PARTIAL} t = Transpose(v) y = MatMul(p, t)", ("p",), shape="3, 4"),
    "ScatterElements multiplies": Case(
        f'{PARTIAL} y = ScatterElements<axis=0, reduction="mul">(zeros, scattered, p)', ("p",), shape="4, 5"
    ),
}
"""The sum is made before the op."""


def reduced_values(prepared: Prepared) -> tuple[str, ...]:
    """Which values are added up if everything that is contracted first is split."""
    weights = [prepared.model.graph.initializers.get(name) for name in ("w", "v")]
    products = [node for node in prepared.model.graph if node.op_type == "MatMul"][:2]
    read = {value for node in products for value in node.inputs}
    leaves = [prepared.analysis.dims[w][0].find() for w in weights if w is not None and w in read]
    sweeper = Sweeper(prepared.analysis, Mesh((2,)), leaves, prepared.states)
    outcome = sweeper.sweep(dict.fromkeys(leaves, (0,)))
    return tuple(str(collective.value.name) for collective in outcome.collectives)


@pytest.mark.parametrize("name", [*PASSES, *STOPS])
def test_sums_are_made_where_they_must_be(name: str) -> None:
    case = {**PASSES, **STOPS}[name]
    assert reduced_values(prepare_proto(case.model())) == case.reduced


@pytest.mark.parametrize("name", [*PASSES, *STOPS])
def test_result_is_right(name: str) -> None:
    case = {**PASSES, **STOPS}[name]
    assert prove(case.model(), most_plans=4).wrong == ()


def test_readers_of_the_shape_alone_do_not_count() -> None:
    nodes = f"{PARTIAL} cut = Slice(p, from1, to4, axis1) s = Shape(cut) y = Neg(p)"
    weights = {"w": random(6, 5), "from1": np.array([1]), "to4": np.array([4]), "axis1": np.array([1])}
    proto = model("float[3, 6] past_x", "float[3, 5] y, int64[2] s", nodes, weights)
    assert reduced_values(prepare_proto(proto)) == ("y",)
    assert prove(proto).wrong == ()
