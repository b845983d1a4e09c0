"""Q4_1 and Q8_0 taken apart, and the order of Q and K rows, against the `gguf` package and against the definition."""

from __future__ import annotations

import numpy as np
import pytest
from gguf import GGMLQuantizationType, quants

from furiosa_llm.example.errors import ModelFileError
from furiosa_llm.example.smollm2.blocks import BLOCK, decode_q4_1, decode_q8_0, unpermuted_rows
from furiosa_llm.example.smollm2.int4 import pack_nibbles

_ROWS, _COLUMNS = 6, 3 * BLOCK


def _random_matrix() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((_ROWS, _COLUMNS), dtype=np.float32)


def test_q4_1_equals_the_gguf_package() -> None:
    raw = quants.quantize(_random_matrix(), GGMLQuantizationType.Q4_1)
    weight = decode_q4_1(raw)
    assert weight.quants.shape == (_ROWS, 3, BLOCK)
    assert weight.quants.max() <= 15
    np.testing.assert_array_equal(weight.dense(), quants.dequantize(raw, GGMLQuantizationType.Q4_1))


def test_q8_0_equals_the_gguf_package() -> None:
    raw = quants.quantize(_random_matrix(), GGMLQuantizationType.Q8_0)
    np.testing.assert_array_equal(decode_q8_0(raw).dense(), quants.dequantize(raw, GGMLQuantizationType.Q8_0))


def test_q4_1_layout_by_hand() -> None:
    header = np.array([0.5, -2.0], dtype="<f2").view(np.uint8)
    nibbles = np.array([low | (15 - low) << 4 for low in range(16)], dtype=np.uint8)
    weight = decode_q4_1(np.concatenate([header, nibbles])[None])
    expected = 0.5 * np.array([*range(16), *range(15, -1, -1)]) - 2.0
    np.testing.assert_array_equal(weight.dense(), expected[None])


def test_rows_of_another_length_are_refused() -> None:
    with pytest.raises(ModelFileError, match=r"Q4_1 data has shape .* whole 20-byte blocks"):
        decode_q4_1(np.zeros((2, 30), dtype=np.uint8))


def test_unpermuted_rows_undo_the_converter() -> None:
    heads, width = 3, 8
    rows = np.arange(heads * width)
    # What GGUF's Llama converter does to the rows of Q and K: halves of a head become alternating rows.
    converted = rows.reshape(heads, 2, width // 2).swapaxes(1, 2).reshape(-1)
    assert not np.array_equal(converted, rows)
    np.testing.assert_array_equal(converted[unpermuted_rows(heads * width, heads)], rows)


def test_take_rows_reorders_the_dense_matrix() -> None:
    raw = quants.quantize(_random_matrix(), GGMLQuantizationType.Q4_1)
    order = np.random.default_rng(1).permutation(_ROWS)
    weight = decode_q4_1(raw)
    np.testing.assert_array_equal(weight.take_rows(order).dense(), weight.dense()[order])


def test_pack_nibbles_puts_the_even_value_low() -> None:
    packed = pack_nibbles(np.array([[1, 2, 3, 15]], dtype=np.uint8))
    np.testing.assert_array_equal(packed, [[0x21, 0xF3]])
