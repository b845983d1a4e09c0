"""Quantised decoders of other blocks, bits and zero points than the zoo's: exact, with as few collectives as can be."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import onnx
import pytest

from furiosa_llm.builder import ArtifactBuilder
from furiosa_llm.runtime.artifact.reader import open_artifact
from tests.support.builder.parity import cases_of, feeds_of
from tests.support.builder.quantized_models import QuantizedModel
from tests.support.builder.stitching import SplitModel, session
from tests.support.tiers import tiered

TOLERANCE = 1e-5

SMALL = QuantizedModel(hidden=64, heads=4, kv_heads=2, head_dim=16, ffn=176, op="MatMulNBits")
"""The zoo's sizes: heads of half a block, a feed-forward of five and a half."""
WIDE = QuantizedModel(hidden=576, heads=9, kv_heads=3, head_dim=64, ffn=1536, op="MatMulNBits")
"""SmolLM2's sizes."""
MANY = dataclasses.replace(WIDE, kv_heads=9, ffn=1500)

DEQUANTIZED = dataclasses.replace(SMALL, op="DequantizeLinear")

ROWS = {
    "two bits": (dataclasses.replace(SMALL, bits=2), 5, 1),
    "eight bits and zero points": (dataclasses.replace(SMALL, bits=8, zero_points=True), 5, 1),
    "block 16": (dataclasses.replace(SMALL, block=16, ffn=184), 5, 1),
    "block 64": (dataclasses.replace(WIDE, block=64, ffn=1500), 5, 1),
    "one scale per channel": (dataclasses.replace(DEQUANTIZED, bits=8, block=0), 5, 1),
    "one scale and zero point per channel": (
        dataclasses.replace(DEQUANTIZED, bits=8, block=0, zero_points=True),
        5,
        1,
    ),
    "DequantizeLinear with zero points": (dataclasses.replace(DEQUANTIZED, zero_points=True), 5, 1),
    # A byte has the zero points of two blocks: the only two of the attention's output are not split, nor its heads.
    "zero points": (dataclasses.replace(SMALL, zero_points=True), 3, 1),
    # Two heads fill a block. 9 heads are 5 pairs over two ranks; the other two share the inputs of Q, K and V.
    "block 128 and heads of 64": (dataclasses.replace(MANY, block=128), 7, 1),
    # Three heads that share keys are a block and a half: they are not split with their blocks, but gathered. Their
    # output product has its columns split instead of its rows, and is gathered, too.
    "block 128 and groups of 192": (dataclasses.replace(WIDE, block=128), 3, 5),
    "block 256 and groups of 192": (dataclasses.replace(WIDE, block=256, ffn=1400), 3, 5),
}
"""Model, AllReduce and AllGather, the same at 4 and 8."""


FAST = ("eight bits and zero points", "one scale and zero point per channel", "DequantizeLinear with zero points")
LEFT = ("block 16", "block 64", "block 128 and heads of 64", "block 128 and groups of 192")
"""Over 8 PEs to `make test-release`; the rows beside them have the same mechanisms."""


@pytest.mark.parametrize(
    ("name", "tp"),
    tiered(
        [(name, tp) for name in ROWS for tp in (4, 8)],
        [(name, 4) for name in FAST],
        [(name, 8) for name in LEFT],
    ),
)
def test_quantised_decoder_is_split_exactly(name: str, tp: int, tmp_path: Path) -> None:
    model, all_reduces, all_gathers = ROWS[name]
    (tmp_path / "model").mkdir()
    path = model.write(tmp_path / "model")
    proto = onnx.load(path)
    reference = session(proto)
    names = [value.name for value in reference.get_outputs()]
    report = ArtifactBuilder(path, tensor_parallel_size=tp).build(tmp_path / "artifact")
    assert report.collectives == {"AllReduce": all_reduces, "AllGather": all_gathers}
    artifact = open_artifact(tmp_path / "artifact", full=True)
    split = SplitModel.of_artifact(artifact)
    stitched = split.session()
    for case in cases_of(proto):
        feeds = feeds_of(artifact.manifest.inputs, case, artifact.manifest.model.vocab_size)
        expected = dict(zip(names, reference.run(names, feeds), strict=True))
        errors = split.greatest_error(split.run(stitched, feeds), expected)
        assert {n: e for n, e in errors.items() if not e <= TOLERANCE} == {}, case.name
