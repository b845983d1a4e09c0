"""Lines for weights that are in too few parts: which, how much of all, and why."""

from __future__ import annotations

from pathlib import Path

import pytest

from furiosa_llm.builder.options import BuildOptions
from furiosa_llm.builder.pipeline import analyse_model
from furiosa_llm.builder.source.tensors import weights_of
from furiosa_llm.builder.write.whole import shortfalls
from tests.support.builder.exported import exported

KEYS = "/part1 [64, 32] and 1 like it, 13% of the weights, are in 4 parts for 8 PEs: key/value heads: "
ANGLES = "cos_cache [128, 8] and 1 like it, 2% of the weights, are whole on every PE: GroupQueryAttention uses it whole"


@pytest.mark.parametrize(
    ("name", "size", "expected"),
    [
        ("genai-exclude-lm-head", 8, [f"{KEYS}4 over 8 needs padding to 8", ANGLES]),
        ("genai-exclude-lm-head", 4, [ANGLES]),
        ("bsnh", 4, []),
        ("gidx-ordered", 4, ["6% of the weights, are whole on every PE: MatMulNBits with g_idx"]),
        ("dake", 4, ["wpe [32, 64], 4% of the weights, is whole on every PE: hidden: "]),
    ],
)
def test_lines(name: str, size: int, expected: list[str], tmp_path: Path) -> None:
    """Over eight PEs four key heads are the cause for their weights of all layers, in one line."""
    build = analyse_model(exported(name, tmp_path), BuildOptions()).lowered_for(BuildOptions(tensor_parallel_size=size))
    found = shortfalls(build, sum(tensor.nbytes for tensor in weights_of(build.source.model)))
    assert len(found) == len(expected)
    for line, part in zip(found, expected, strict=True):
        assert part in line
