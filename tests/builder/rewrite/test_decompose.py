"""Fused ops that are taken apart: what comes instead gives the same, and is split where the op itself could not be."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from furiosa_llm.builder.rewrite.decompose import DECOMPOSITIONS
from tests.builder.test_traps import leaf, sweep
from tests.support.builder.graphs import Array, model
from tests.support.builder.plans import prepare_proto
from tests.support.builder.proofs import SIZES, TOLERANCE, prove
from tests.support.builder.stitching import session

QUANTISED = "y = com.microsoft.DynamicQuantizeMatMul(past_x, w, s, z, b)"
EMBEDDED = "ids, token_type_ids, words, places, kinds, g, b"
OP = "com.microsoft.EmbedLayerNormalization"


def dynamic_product(nodes: str = QUANTISED, **changes: Array | None) -> onnx.ModelProto:
    codes = np.random.default_rng(0).integers(0, 256, (16, 6), dtype=np.uint8)
    points = np.arange(6, dtype=np.uint8) + 125
    weights = {"w": codes, "s": np.linspace(0.01, 0.02, 6, dtype=np.float32), "z": points, "b": (6,)} | changes
    return model(
        "float[3, 4, 16] past_x", "float[3, 4, 6] y", nodes, {k: w for k, w in weights.items() if w is not None}
    )


def embedding(arguments: str = EMBEDDED, outputs: str = "y, n", *, opset: int = 21) -> onnx.ModelProto:
    """onnxruntime's op wants its second output named, read or not."""
    shapes = {"y": "float[2, 4, 8] y", "n": "int32[2] n", "t": "float[2, 4, 8] t"}
    weights = {"words": (9, 8), "places": (16, 8), "kinds": (2, 8), "g": (8,), "b": (8,)}
    used = arguments.replace(",", " ").split()
    inputs = ["some_ids", *[name for name in ("token_type_ids", "attention_mask", "position_ids") if name in used]]
    return model(
        ", ".join(f"int32[2, 4] {name}" for name in inputs),
        ", ".join(shapes[name] for name in outputs.replace(",", " ").split()),
        f"ids = Abs(some_ids) {outputs} = {OP}<epsilon=0.00001>({arguments})",
        {name: shape for name, shape in weights.items() if name in used},
        opset=opset,
    )


CASES = {
    "DynamicQuantizeMatMul": dynamic_product(),
    "DynamicQuantizeMatMul without zero points": dynamic_product(QUANTISED.replace("s, z, b", "s"), z=None, b=None),
    "EmbedLayerNormalization": embedding(),
    "EmbedLayerNormalization without segments": embedding("ids, , words, places, , g, b"),
    "EmbedLayerNormalization with places": embedding(f"{EMBEDDED}, , position_ids"),
    "EmbedLayerNormalization with a mask": embedding(f"{EMBEDDED}, attention_mask"),
    "EmbedLayerNormalization with a mask, opset 11": embedding(f"{EMBEDDED}, attention_mask", opset=11),
    "EmbedLayerNormalization with its sum": embedding(EMBEDDED, "y, n, t"),
}


@pytest.mark.parametrize("name", CASES)
def test_the_parts_give_what_the_op_gives(name: str) -> None:
    """Every split of the parts is right, compared with the op itself."""
    prepared = prepare_proto(CASES[name])
    assert {node.op_type for node in prepared.model.graph}.isdisjoint(DECOMPOSITIONS)
    proof = prove(CASES[name])
    assert proof.wrong == ()
    assert proof.plans > 0


def test_every_decomposition_has_a_case() -> None:
    assert set(DECOMPOSITIONS) == {name.split()[0] for name in CASES}


def test_the_contraction_behind_a_dynamic_scale_is_split() -> None:
    """One gathering of the activations, for their scale, and one sum."""
    prepared = prepare_proto(dynamic_product())
    outcome = sweep(prepared, {leaf(prepared, "w", 0): (0,)})
    assert [c.kind for c in outcome.collectives] == ["AllGather", "AllReduce"]


def test_the_words_of_a_fused_embedding_are_split() -> None:
    prepared = prepare_proto(embedding())
    outcome = sweep(prepared, {leaf(prepared, "words", 0): (0,)})
    assert [c.kind for c in outcome.collectives] == ["AllReduce"]


def test_nothing_is_taken_apart_that_was_not_fused() -> None:
    proto = model("float[3, 4] past_x", "float[3, 4] y", "y = com.microsoft.Gelu(past_x)")
    prepared = prepare_proto(proto)
    assert [node.op_type for node in prepared.model.graph] == ["Gelu"]
    feeds = prepared.feeds(SIZES)
    (found,) = session(onnx.ModelProto.FromString(proto.SerializeToString())).run(None, feeds)
    assert np.abs(found - prepared.expected(feeds)["y"]).max() < TOLERANCE
