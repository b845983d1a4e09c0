"""Sequences of tensors become the tensors in them; what cannot is refused by name."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from furiosa_llm.builder.errors import UnsupportedModelError
from tests.builder.test_traps import leaf, sweep
from tests.support.builder.graphs import model
from tests.support.builder.op_case import ints
from tests.support.builder.plans import prepare_proto
from tests.support.builder.proofs import prove

WEIGHTS = {"zero": np.array(0), "one": np.array(1), "last": np.array(-1), "three": np.array(3), "parts": ints(2, 4)}
Y = "float[6, 6] y"

REPLACED = {
    "parts of given sizes": "s = SplitToSequence<axis=1>(past_x, parts) a = SequenceAt(s, last) "
    "b = SequenceAt(s, zero) y = Concat<axis=1>(a, b)",
    "parts of one size": "s = SplitToSequence<axis=1>(past_x, three) a = SequenceAt(s, one) y = Concat<axis=1>(a, a)",
    "rows": "s = SplitToSequence<axis=0, keepdims=0>(past_x) a = SequenceAt(s, one) y = Add(past_x, a)",
    "stacked": "n = Neg(past_x) s = SequenceConstruct(past_x, n) t = ConcatFromSequence<axis=1, new_axis=1>(s) "
    "y = ReduceMax<keepdims=0, axes=[1]>(t)",
    "joined again": "s = SplitToSequence<axis=1>(past_x, parts) y = ConcatFromSequence<axis=1>(s)",
    "grown and shrunk": "e = SequenceEmpty() s = SequenceInsert(e, past_x) n = Neg(past_x) "
    "t = SequenceInsert(s, n, zero) u = SequenceErase(t, one) l = SequenceLength(u) f = Cast<to=1>(l) "
    "a = SequenceAt(u, zero) y = Mul(a, f)",
    "an element as it is": "s = SequenceConstruct(past_x) y = SequenceAt(s, zero)",
}
REFUSED = {
    "at a computed position": (
        "s = SequenceConstruct(past_x, past_x) i = Cast<to=7>(past_i) y = SequenceAt(s, i)",
        "computed",
    ),
    "of unknown sizes": ("i = Cast<to=7>(past_i) s = SplitToSequence(past_x, i) y = SequenceAt(s, zero)", "number"),
    "out of range": ("s = SequenceConstruct(past_x) y = SequenceAt(s, one)", "position 1 is out of range"),
}


def sequence_model(nodes: str, opset: int) -> onnx.ModelProto:
    used = nodes.replace(",", " ").replace("(", " ").replace(")", " ").split()
    inputs = "float[6, 6] past_x" + (", float past_i" if "past_i" in used else "")
    return model(inputs, Y, nodes, {name: weight for name, weight in WEIGHTS.items() if name in used}, opset=opset)


@pytest.mark.parametrize("opset", [11, 17])
@pytest.mark.parametrize("name", REPLACED)
def test_the_tensors_give_what_the_sequence_gives(name: str, opset: int) -> None:
    proto = sequence_model(REPLACED[name], opset)
    prepared = prepare_proto(proto)
    assert not any("Sequence" in node.op_type for node in prepared.model.graph)
    proof = prove(proto)
    assert proof.wrong == ()
    assert proof.plans > 0


@pytest.mark.parametrize("name", REFUSED)
def test_a_sequence_that_depends_on_data_is_refused(name: str) -> None:
    nodes, reason = REFUSED[name]
    with pytest.raises(UnsupportedModelError, match=f"sequence of tensors, and .*{reason}.*; export the model"):
        prepare_proto(sequence_model(nodes, 17))


def test_parts_of_a_product_stay_split() -> None:
    """Queries and keys by torch.split: each part of the columns is split for itself."""
    weights = {"w": (6, 6), "parts": ints(2, 4), "zero": np.array(0)}
    nodes = "p = MatMul(past_x, w) s = SplitToSequence<axis=1>(p, parts) a = SequenceAt(s, zero) y = Neg(a)"
    prepared = prepare_proto(model("float[4, 6] past_x", "float[4, 2] y", nodes, weights))
    first = next(iter(prepared.analysis.dims[prepared.model.graph.initializers["w"]][1].leaves()))
    assert [c.kind for c in sweep(prepared, {first: (0,)}).collectives] == ["AllGather"]
    assert leaf(prepared, "past_x", 1).size == 6
