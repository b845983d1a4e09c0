"""The memory of states: slots that sequences are kept in, copied between, moved in memory and grown."""

from __future__ import annotations

import resource
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from furiosa_llm.runtime.artifact.dimensions import Shape
from furiosa_llm.runtime.artifact.dtypes import Array
from furiosa_llm.runtime.artifact.manifest import State
from furiosa_llm.runtime.execution.ort import Tensor
from furiosa_llm.runtime.execution.states import CAPACITY_STEP, SlotStates, StagedStates, grown_capacity

IN_PLACE = (
    State(input="past.key", output="present.key", sequence_dim=2, mode="in_place"),
    State(input="past.sum", output="present.sum", sequence_dim=1, mode="in_place"),
)
APPEND = (State(input="past.key", output="present.key", sequence_dim=2, mode="append"),)
SHAPES: dict[str, Shape] = {"past.key": ("batch", 2, "past", 3), "past.sum": ("batch", "past", 2)}
DTYPES = {"past.key": "FLOAT", "past.sum": "FLOAT16"}


class Bound:
    """What has been bound, by rank and name."""

    def __init__(self) -> None:
        self.inputs: dict[tuple[int, str], Tensor] = {}
        self.outputs: dict[tuple[int, str], Tensor] = {}
        self.made: dict[tuple[int, str], Array] = {}

    def bind_input(self, rank: int, name: str, tensor: Tensor) -> None:
        self.inputs[rank, name] = tensor

    def bind_output(self, rank: int, name: str, tensor: Tensor) -> None:
        self.outputs[rank, name] = tensor

    def array(self, rank: int, name: str) -> Array:
        return self.made[rank, name]


def slots(count: int, ranks: Sequence[int] = (0, 1)) -> SlotStates:
    return SlotStates(IN_PLACE, DTYPES, SHAPES, ranks=ranks, slots=count)


def rows(states: SlotStates, first: int, count: int) -> Bound:
    bound = Bound()
    states.touch(first + count)
    states.bind(bound, first, count)
    return bound


def resident_nbytes(array: Array) -> int:
    """How much of the memory of `array` there is, whatever else this process takes at the same time."""
    size = resource.getpagesize()
    first, last = array.ctypes.data // size, -(-(array.ctypes.data + array.nbytes) // size)
    with Path("/proc/self/pagemap").open("rb") as pages:
        pages.seek(8 * first)
        entries = np.frombuffer(pages.read(8 * (last - first)), dtype=np.uint64)
    return int((entries >> np.uint64(63)).sum()) * size


@pytest.mark.parametrize(
    ("length", "capacity", "grown"),
    [(1, 0, 256), (256, 0, 256), (257, 0, 512), (257, 256, 512), (513, 512, 768), (800, 256, 1024), (769, 768, 1280)],
)
def test_capacity_grows_in_steps_and_by_half(length: int, capacity: int, grown: int) -> None:
    assert grown_capacity(length, capacity) == grown
    assert grown % CAPACITY_STEP == 0


def test_a_slot_is_a_row_that_is_past_and_present_at_once() -> None:
    states = slots(4)
    assert states.reserve(1)
    assert states.capacity == CAPACITY_STEP
    bound = rows(states, 1, 2)
    assert set(bound.inputs) == {(rank, state.input) for rank in (0, 1) for state in IN_PLACE}
    for (rank, name), tensor in bound.inputs.items():
        present = bound.outputs[rank, name.replace("past", "present")]
        assert present.array.ctypes.data == tensor.array.ctypes.data == tensor.raw.data_ptr()
        assert present.array.shape == tensor.array.shape
        assert not tensor.array.any()
    assert bound.inputs[0, "past.key"].array.shape == (2, 2, CAPACITY_STEP, 3)
    assert bound.inputs[1, "past.sum"].array.shape == (2, CAPACITY_STEP, 2)
    assert bound.inputs[1, "past.sum"].array.dtype == np.float16
    bound.inputs[0, "past.key"].array[...] = np.arange(2)[:, None, None, None] + 1
    assert [int(rows(states, slot, 1).inputs[0, "past.key"].array.max()) for slot in range(4)] == [0, 1, 2, 0]
    assert not rows(states, 0, 4).inputs[1, "past.key"].array.any()


def test_growing_keeps_every_row() -> None:
    states = slots(3)
    states.reserve(5)
    before = {key: tensor.array for key, tensor in rows(states, 0, 3).inputs.items()}
    rng = np.random.default_rng(0)
    for array in before.values():
        array[...] = rng.random(array.shape)
    assert not states.reserve(CAPACITY_STEP)
    assert states.reserve(CAPACITY_STEP + 1)
    assert states.capacity == 2 * CAPACITY_STEP
    for (rank, name), tensor in rows(states, 0, 3).inputs.items():
        kept = before[rank, name]
        dim = 2 if name == "past.key" else 1
        first, rest = np.split(tensor.array, [CAPACITY_STEP], axis=dim)
        assert np.array_equal(first, kept)
        assert rest.shape == kept.shape
        assert not rest.any()


def test_positions_are_copied_between_slots() -> None:
    states = slots(3)
    states.reserve(9)
    whole = rows(states, 0, 3).inputs
    for tensor in whole.values():
        tensor.array[...] = np.arange(tensor.array.size).reshape(tensor.array.shape) % 2039
    before = {key: tensor.array.copy() for key, tensor in whole.items()}
    states.copy(2, 0, 7)
    for rank in (0, 1):
        key, total = whole[rank, "past.key"].array, whole[rank, "past.sum"].array
        assert np.array_equal(key[0, :, :7], before[rank, "past.key"][2, :, :7])
        assert np.array_equal(key[0, :, 7:], before[rank, "past.key"][0, :, 7:])
        assert np.array_equal(total[0, :7], before[rank, "past.sum"][2, :7])
        assert np.array_equal(total[0, 7:], before[rank, "past.sum"][0, 7:])
        assert np.array_equal(key[1:], before[rank, "past.key"][1:])


def test_copies_survive_growing() -> None:
    states = slots(4, (0,))
    states.reserve(1)
    rows(states, 0, 1).inputs[0, "past.key"].array[...] = 5
    states.copy(0, 3, 2)
    states.reserve(CAPACITY_STEP + 1)
    assert (rows(states, 3, 1).inputs[0, "past.key"].array[:, :, :2] == 5).all()
    assert not rows(states, 3, 1).inputs[0, "past.key"].array[:, :, 2:].any()


def test_a_slot_behind_unused_ones_survives_growing() -> None:
    states = slots(4, (0,))
    states.reserve(1)
    rows(states, 2, 1).inputs[0, "past.key"].array[...] = 5
    states.reserve(CAPACITY_STEP + 1)
    assert (rows(states, 2, 1).inputs[0, "past.key"].array[:, :, :CAPACITY_STEP] == 5).all()


def test_slots_that_nobody_uses_take_no_memory() -> None:
    shapes: dict[str, Shape] = {"past.key": ("batch", 64, "past", 64)}
    states = SlotStates(IN_PLACE[:1], DTYPES, shapes, ranks=(0,), slots=64)
    row_nbytes = 64 * 64 * 4 * CAPACITY_STEP
    states.reserve(1)
    bound = Bound()
    states.touch(1)
    states.bind(bound, 0, 1)
    bound.inputs[0, "past.key"].array[...] = 1
    states.reserve(CAPACITY_STEP + 1)
    assert states.capacity == 2 * CAPACITY_STEP
    # 64 rows would be 256 MiB, and twice that when grown; the row in use is 4, and 8.
    [buffer] = states._buffers.values()
    assert buffer.nbytes == 64 * 2 * row_nbytes
    assert row_nbytes <= resident_nbytes(buffer) < 8 * row_nbytes


def staged(count: int) -> StagedStates:
    return StagedStates(APPEND, DTYPES, SHAPES, ranks=(0,), slots=count)


def step(states: StagedStates, slots: Sequence[int], past: int, total: int, window: int = 10**6) -> Array:
    """The past that a step reads; it makes a present whose new positions hold their slots' numbers."""
    bound = Bound()
    states.reserve(total)
    states.touch(max(slots) + 1)
    states.stage(bound, slots, past)
    given = bound.inputs[0, "past.key"].array
    cached = min(past, window)
    assert states.cached(past) == cached
    assert given.shape == (len(slots), 2, cached, 3)
    made = np.empty((len(slots), 2, cached + total - past, 3), dtype=np.float32)
    made[:, :, :cached] = given
    for row, slot in enumerate(slots):
        made[row, :, cached:] = (1000 * slot + np.arange(past, total))[:, None]
    bound.made[0, "present.key"] = made[:, :, -window:]
    states.finish(bound, slots, past, total)
    return given.copy()


def numbered(slot: int, length: int) -> Array:
    return np.broadcast_to((1000 * slot + np.arange(length, dtype=np.float32))[:, None], (2, length, 3))


def test_what_is_appended_is_the_next_past() -> None:
    states = staged(2)
    for past, total in ((0, 3), (3, 4), (4, 300), (300, 301)):
        for slot in range(2):
            (given,) = step(states, [slot], past, total)
            assert np.array_equal(given, numbered(slot, past))


def test_slots_of_equal_length_are_stepped_together() -> None:
    states = staged(4)
    for slot in range(4):
        step(states, [slot], 0, 5 + slot % 2)
    first = step(states, [2, 0], 5, 6)
    assert np.array_equal(first, [numbered(2, 5), numbered(0, 5)])
    together = step(states, [0, 1, 2, 3], 6, 7)
    assert np.array_equal(together, [numbered(slot, 6) for slot in range(4)])


def test_an_appended_state_is_cut_and_begun_anew() -> None:
    states = staged(1)
    step(states, [0], 0, 9)
    (given,) = step(states, [0], 4, 5)
    assert np.array_equal(given, numbered(0, 4))
    (given,) = step(states, [0], 0, 2)
    assert given.size == 0
    (given,) = step(states, [0], 2, 3)
    assert np.array_equal(given, numbered(0, 2))


def test_an_appended_state_is_copied() -> None:
    states = staged(3)
    step(states, [0], 0, 6)
    step(states, [2], 0, 8)
    states.copy(2, 1, 5)
    states.copy(2, 0, 7)
    assert np.array_equal(step(states, [1], 5, 6)[0], numbered(2, 5))
    assert np.array_equal(step(states, [0], 7, 8)[0], numbered(2, 7))
    assert np.array_equal(step(states, [2], 8, 9)[0], numbered(2, 8))


def test_a_window_is_all_that_is_given_again() -> None:
    states = staged(2)
    step(states, [1], 0, 5, window=8)
    assert states.cached(100) == 100
    step(states, [1], 5, 20, window=8)
    assert states.cached(100) == 8
    (given,) = step(states, [1], 20, 21, window=8)
    assert np.array_equal(given, numbered(1, 20)[:, 12:])
    (given,) = step(states, [1], 21, 24, window=8)
    assert np.array_equal(given, numbered(1, 21)[:, 13:])
