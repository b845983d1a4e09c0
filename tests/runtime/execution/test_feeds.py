"""What a decoder's inputs are fed in a step, for rows of equal and of unequal lengths."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from furiosa_llm.runtime.artifact.dtypes import Array
from furiosa_llm.runtime.artifact.manifest import InputInfo, InputRole
from furiosa_llm.runtime.errors import UnsupportedError
from furiosa_llm.runtime.execution.feeds import StepFeeds, is_of_each_row


def info(role: InputRole, *shape: str) -> InputInfo:
    return InputInfo(name=role, dtype="INT64", role=role, shape=shape, layout=(None,) * len(shape))


INPUTS = [
    info("token_ids", "batch", "sequence"),
    info("attention_mask", "batch", "total"),
    info("position_ids", "batch", "sequence"),
]


def fed(feeds: StepFeeds, token_ids: list[list[int]], past: int | list[int]) -> dict[str, Array]:
    return dict(feeds.update(np.array(token_ids, dtype=np.int64), past))


def test_rows_of_unequal_lengths() -> None:
    found = fed(StepFeeds(INPUTS), [[7], [8], [9]], [2, 0, 4])
    assert found["token_ids"].tolist() == [[7], [8], [9]]
    assert found["position_ids"].tolist() == [[2], [0], [4]]
    assert found["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1, 0, 0, 0, 0], [1, 1, 1, 1, 1]]


def test_prompts_of_unequal_lengths() -> None:
    """What follows a shorter one is padding, and a number for all rows is that of the longest."""
    feeds = StepFeeds([*INPUTS, info("sequence_length", "batch"), info("total_length")])
    found = dict(feeds.update(np.array([[7, 0], [8, 9]], dtype=np.int64), [0, 0], lengths=[1, 2]))
    assert found["token_ids"].tolist() == [[7, 0], [8, 9]]
    assert found["attention_mask"].tolist() == [[1, 0], [1, 1]]
    assert (found["sequence_length"].tolist(), found["total_length"].tolist()) == ([1, 2], 2)
    assert isinstance(found["total_length"], np.ndarray)  # a scalar of numpy would have no memory to bind


def test_equal_shapes_reuse_memory() -> None:
    feeds = StepFeeds([*INPUTS, info("past_length", "batch"), info("total_length")])
    first = fed(feeds, [[7, 8, 9]], 4)
    assert first["position_ids"].tolist() == [[4, 5, 6]]
    assert first["attention_mask"].tolist() == [[1] * 7]
    assert set(fed(feeds, [[1, 2, 3]], 7)) == {"attention_mask"}
    assert first["token_ids"].tolist() == [[1, 2, 3]]
    assert first["position_ids"].tolist() == [[7, 8, 9]]
    assert (first["past_length"].tolist(), first["total_length"].tolist()) == ([7], 10)
    assert set(fed(feeds, [[1], [2]], [7, 3])) == {"token_ids", "position_ids", "attention_mask", "past_length"}
    assert first["total_length"].tolist() == 8


@pytest.mark.parametrize(
    ("shape", "lead"),
    [
        (("batch", 1, "sequence", "total"), (2, 1)),
        (("batch", 8, "sequence", 6), (2, 8)),
        (("batch", "sequence", "total"), (2,)),
        ((2, 1, 2, "total"), (2, 1)),
        ((1, 1, "sequence", 6), (1, 1)),
        (("sequence", "total"), ()),
    ],
)
def test_masks_of_new_positions_by_all(shape: tuple[int | str, ...], lead: tuple[int, ...]) -> None:
    """Of each row, or of all rows at once, and of so many places as a cache has."""
    found = fed(StepFeeds([replace(info("attention_mask"), shape=shape)]), [[7, 8], [8, 9]], 3)["attention_mask"]
    seen = np.arange(6 if shape[-1] == 6 else 5) <= np.array([[3], [4]])
    assert found.shape == (*lead, *seen.shape)
    assert (found == seen).all()


def test_a_mask_of_the_places_of_a_cache() -> None:
    found = fed(StepFeeds([replace(info("attention_mask"), shape=("batch", 6))]), [[7], [8]], [3, 1])
    assert found["attention_mask"].tolist() == [[1, 1, 1, 1, 0, 0], [1, 1, 0, 0, 0, 0]]
    with pytest.raises(UnsupportedError, match="cannot be made"):  # ones would be added to what is to be hidden
        StepFeeds([replace(info("attention_mask"), shape=("batch", 6), dtype="FLOAT")])


@pytest.mark.parametrize("shape", [("sequence",), (1, "sequence"), (3, 1, "sequence")])
def test_positions_of_all_rows_at_once(shape: tuple[int | str, ...]) -> None:
    found = fed(StepFeeds([replace(info("position_ids"), shape=shape)]), [[7, 8], [8, 9]], 3)["position_ids"]
    assert found.shape == tuple(2 if size == "sequence" else size for size in shape)
    assert (found == [3, 4]).all()


def test_rows_of_unequal_lengths_need_inputs_of_each_row() -> None:
    alone = replace(info("position_ids"), shape=("sequence",))
    assert [is_of_each_row(one) for one in (*INPUTS, alone, info("total_length"))] == [True, True, True, False, True]


def test_an_integer_of_which_nothing_tells_what_it_counts_is_refused_with_the_way_out() -> None:
    with pytest.raises(UnsupportedError, match=r"'other' .* build with --role other=past_length .*total_length"):
        StepFeeds([*INPUTS, info("other", "batch")])
