"""Which rows of a large family of tests `make test` runs.

The others are marked `slow` and run with `make test-all`, or `release` and run with `make test-release`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

import pytest
from _pytest.mark import ParameterSet

MECHANISMS: dict[tuple[str, int], str] = {
    ("tiny-llama-optimum", 4): "attention that was fused",
    ("tiny-llama-9-3-optimum", 8): "padded key heads, query heads of each split further",
    ("tiny-qwen2-14-2-optimum", 8): "key heads on several ranks, padded query heads, biases",
    ("tiny-phi3-optimum", 8): "packed weights, stored in parts",
    ("tiny-neox-optimum", 4): "attention and feed-forward side by side, packed heads interleaved",
    ("tiny-bloom-optimum", 4): "attention biases by position",
    ("tiny-mixtral-dynamo-tf5", 4): "experts in a loop of indices",
    ("tiny-gptoss-genai-fp32-fullkv", 4): "experts in one op, attention sinks",
    ("tiny-mistral-dynamo-tf5", 4): "caches cut to a window",
    ("tiny-llama-genai-fp16-cuda", 4): "float16",
    ("tiny-llama-genai-int4", 4): "MatMulNBits, short blocks",
    ("tiny-llama-genai-int4-qdq", 8): "DequantizeLinear of packed INT4",
    ("tiny-llama-tied-genai-int4-shared", 4): "one quantised table for lookup and scores",
    ("tiny-t5-optimum/decoder_with_past_model.onnx", 4): "caches of an encoder's output",
    ("tiny-bert-optimum", 4): "an encoder of texts",
    ("tiny-vit-optimum", 4): "an encoder of images",
}
"""The rows of the zoo that `make test` runs from end to end, model and PEs, and what each has that no other has."""


def tiered(
    rows: Iterable[object], fast: Collection[object], release: Collection[object] = frozenset()
) -> list[ParameterSet]:
    """Parameters of a test, of which those not in `fast` or `release` are slow; a row that is a tuple has several."""
    values = {row: row if isinstance(row, tuple) else (row,) for row in rows}
    assert set(fast) | set(release) <= values.keys(), f"no rows: {(set(fast) | set(release)) - values.keys()}"
    marks = dict.fromkeys(values, pytest.mark.slow) | dict.fromkeys(release, pytest.mark.release)
    return [
        pytest.param(*row, id="-".join(map(str, row)), marks=() if key in fast else marks[key])
        for key, row in values.items()
    ]
