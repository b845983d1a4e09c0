"""AllReduce and AllGather as operations on arrays: the order of the sum, its shares, and narrow types."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from furiosa_llm.runtime.execution.collectives import gather_operations, reduce_operations, run_operations


def parts_of(count: int, size: int, dtype: Any = np.float32) -> list[Any]:
    rng = np.random.default_rng(count * 1000 + size)
    return [rng.standard_normal(size).astype(dtype) for _ in range(count)]


def balanced(parts: list[Any]) -> Any:
    """The sum of neighbours, then of neighbouring pairs."""
    if len(parts) == 1:
        return parts[0]
    middle = 1 << ((len(parts) - 1).bit_length() - 1)
    return (balanced(parts[:middle]), balanced(parts[middle:]))


def test_pairs_are_added_first() -> None:
    a, b, c, d, e, f, g, h = parts_of(8, 257)
    out = np.empty_like(a)
    run_operations(reduce_operations((((a, b), (c, d)), ((e, f), (g, h))), out))
    assert np.array_equal(out, ((a + b) + (c + d)) + ((e + f) + (g + h)))


def test_a_sum_that_is_no_power_of_two() -> None:
    a, b, c, d, e, f = parts_of(6, 100)
    out = np.empty_like(a)
    run_operations(reduce_operations((((a, b), (c, d)), (e, f)), out))
    assert np.array_equal(out, ((a + b) + (c + d)) + (e + f))
    run_operations(reduce_operations((a, (b, (c, (d, e)))), out))
    assert np.array_equal(out, a + (b + (c + (d + e))))


@given(st.integers(1, 9), st.integers(0, 100_000), st.integers(1, 5))
def test_shares_add_up_to_the_same_bits(count: int, size: int, shares: int) -> None:
    parts = parts_of(count, size)
    whole, shared = np.empty_like(parts[0]), np.empty_like(parts[0])
    run_operations(reduce_operations(balanced(parts), whole))
    for index in range(shares):
        run_operations(reduce_operations(balanced(parts), shared, (index, shares)))
    assert np.array_equal(whole, shared)
    assert np.allclose(whole, np.sum(parts, axis=0), atol=1e-5)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("count", [1, 2, 4, 5])
def test_sixteen_bits_are_rounded_once(dtype: Any, count: int) -> None:
    parts = [part.astype(np.float32) for part in parts_of(count, 33, dtype)]
    out, exact = np.empty(33, dtype=dtype), np.empty(33, dtype=np.float32)
    run_operations(reduce_operations(balanced(parts), out))
    run_operations(reduce_operations(balanced(parts), exact))
    assert np.array_equal(out, exact.astype(dtype))


@pytest.mark.parametrize("dtype", [np.float64, np.int64, np.int32, np.int8])
def test_other_types_are_added_as_they_are(dtype: Any) -> None:
    parts = [np.arange(10, dtype=dtype) for _ in range(3)]
    out = np.empty_like(parts[0])
    run_operations(reduce_operations(balanced(parts), out))
    assert np.array_equal(out, 3 * np.arange(10))


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_gather_concatenates(dim: int) -> None:
    rng = np.random.default_rng(dim)
    parts = [rng.standard_normal((2, 3, 4)).astype(np.float32) for _ in range(3)]
    expected = np.concatenate(parts, axis=dim)
    out = np.empty_like(expected)
    for position, part in enumerate(parts):
        run_operations(gather_operations(part, position, out, dim))
    assert np.array_equal(out, expected)
