"""Batches that are run sequence by sequence."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from furiosa_llm.runtime import Executor, open_artifact
from furiosa_llm.runtime.artifact.layout import Mesh
from furiosa_llm.runtime.execution.one_by_one import batch_dim, is_chunk_of_many
from tests.runtime.execution.test_executor import step_inputs
from tests.support.runtime.models import LlamaSize, llama

Array = npt.NDArray[Any]
SIZE = LlamaSize(layers=1)


@pytest.mark.parametrize(
    ("batch", "sequence", "past", "expected"),
    [(2, 2, 1, True), (1, 2, 1, False), (2, 1, 1, False), (2, 2, 0, False)],
)
def test_only_a_chunk_of_many_is_taken_apart(batch: int, sequence: int, past: int, *, expected: bool) -> None:
    assert is_chunk_of_many({"batch": batch, "sequence": sequence, "past": past}) is expected
    assert not is_chunk_of_many({"batch": batch})


def test_the_dimension_of_the_sequences() -> None:
    """What each of them has side by side is in it, too."""
    shapes = (("sequence", "batch"), (3, "batch*sequence"), ("batch*8", "past"), ("past", 4), ("sequence*batch", 2))
    assert [batch_dim(shape) for shape in shapes] == [1, 1, 0, None, None]


def test_a_chunk_of_three_sequences_is_that_of_each(tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    first, second = (rng.integers(0, SIZE.vocab, (3, length)) for length in (4, 5))
    with Executor(open_artifact(llama(Mesh((2,)), SIZE).write(tmp_path))) as executor:
        past = executor.run(step_inputs(SIZE, first))
        found = executor.run(step_inputs(SIZE, second, past))
        for row in range(3):
            one = {name: array[row : row + 1] for name, array in past.items()}
            expected: Mapping[str, Array] = executor.run(step_inputs(SIZE, second[row : row + 1], one))
            assert expected.keys() == found.keys()
            for name, array in expected.items():
                np.testing.assert_allclose(found[name][row : row + 1], array, rtol=1e-6, atol=1e-6)
        again = executor.run(step_inputs(SIZE, first))
        np.testing.assert_array_equal(again["logits"], past["logits"])
