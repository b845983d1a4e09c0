"""The scheduler: batches and copies of small cases, refusals, and random traces against a simulated KV store."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from furiosa_llm.runtime.engine.scheduler import Scheduler
from furiosa_llm.runtime.engine.slots import Pages, SequenceState, SlotGroup
from furiosa_llm.runtime.errors import CapacityError, SchedulingError
from furiosa_llm.runtime.runners.batch import Copy, Decode, Prefill, Row
from tests.support.runtime.scheduler_cases import complete, decode, limits, lone, members, prefill, prompt, run, start
from tests.support.runtime.scheduler_model import Machine, run_trace
from tests.support.tiers import tiered

# Chunks and turns


def test_a_prompt_is_prefilled_in_chunks_and_then_decoded() -> None:
    scheduler = Scheduler(limits())
    scheduler.add(5, prompt(70))
    batches = [prefill(scheduler) for _ in range(3)]
    assert [(batch.start, len(batch.tokens), batch.logits) for batch in batches] == [
        (0, 32, "none"),
        (32, 32, "none"),
        (64, 6, "last"),
    ]
    assert decode(scheduler) == Decode(group=0, copies=(), rows=(Row(sequence_id=5, start=70, token=7),))
    assert decode(scheduler, finished=[5]).rows[0].start == 71
    assert not scheduler.has_unfinished


def test_prefills_and_decodes_alternate() -> None:
    scheduler = Scheduler(limits())
    start(scheduler, [prompt(8)])
    scheduler.add(1, prompt(96, first=1))
    kinds = "".join(type(run(scheduler)).__name__[0] for _ in range(7))
    assert kinds == "DPDPDPD"


def test_a_token_is_sampled_at_the_end_of_a_prompt_only() -> None:
    scheduler = Scheduler(limits())
    scheduler.add(0, prompt(40), prompt_logits=True)
    first = scheduler.schedule()
    assert first is not None
    assert (lone(first).logits, scheduler.sequences_to_sample(first)) == ("all", ())
    scheduler.complete(first, {})
    second = scheduler.schedule()
    assert second is not None
    assert (lone(second).logits, scheduler.sequences_to_sample(second)) == ("all", (0,))


def test_first_come_first_served() -> None:
    """A long prompt for which there are no pages yet is not passed by a short one for which there are."""
    scheduler = Scheduler(limits(num_pages=20, max_length=80))
    start(scheduler, [prompt(40)])
    scheduler.add(1, prompt(60, first=1))
    scheduler.add(2, prompt(4, first=2))
    assert members(decode(scheduler)) == [0]
    assert members(decode(scheduler, finished=[0])) == [0]
    assert prefill(scheduler).sequence_id == 1


def test_a_sequence_that_ends_with_its_prompt_is_never_decoded() -> None:
    scheduler = Scheduler(limits())
    scheduler.add(0, prompt(5))
    prefill(scheduler, finished=[0])
    assert not scheduler.has_unfinished
    assert scheduler.schedule() is None


# Slots


def test_the_last_row_leaves_without_a_copy() -> None:
    scheduler = Scheduler(limits())
    start(scheduler, [prompt(5, first=number) for number in range(3)])
    decode(scheduler, finished=[2])
    batch = decode(scheduler)
    assert members(batch) == [0, 1]
    assert batch.copies == ()


def test_the_last_row_moves_into_the_slot_that_was_left() -> None:
    scheduler = Scheduler(limits(prefix_caching=False))
    start(scheduler, [prompt(5, first=number) for number in range(3)])
    last = decode(scheduler, finished=[0]).rows[2]
    batch = decode(scheduler)
    assert members(batch) == [2, 1]
    assert batch.copies == (Copy(source=2, target=0, length=last.start + 1),)
    assert decode(scheduler).copies == ()


def test_a_prompt_takes_the_slot_that_was_left_and_nothing_moves() -> None:
    scheduler = Scheduler(limits())
    start(scheduler, [prompt(5, first=number) for number in range(3)])
    decode(scheduler, finished=[0])
    scheduler.add(3, prompt(5, first=3))
    joining = prefill(scheduler)
    batch = decode(scheduler)
    assert (joining.slot, joining.copies, batch.copies) == (0, (), ())
    assert members(batch) == [3, 1, 2]


def test_a_prompt_of_several_chunks_sits_behind_those_that_decode_meanwhile() -> None:
    scheduler = Scheduler(limits(prefix_caching=False))
    start(scheduler, [prompt(5, first=number) for number in range(3)])
    moved = decode(scheduler, finished=[0]).rows[2]
    scheduler.add(3, prompt(40, first=3))
    joining = prefill(scheduler)
    assert (joining.slot, joining.copies) == (2, (Copy(source=2, target=0, length=moved.start + 1),))
    assert members(decode(scheduler)) == [2, 1]
    assert prefill(scheduler).slot == 2
    batch = decode(scheduler)
    assert members(batch) == [2, 1, 3]
    assert batch.copies == ()


# Groups


def test_groups_are_filled_alike() -> None:
    scheduler = Scheduler(limits(num_groups=2))
    for number in range(4):
        scheduler.add(number, [*prompt(20), number])
    seen = set()
    for _ in range(20):
        batches = [batch for batch in (scheduler.schedule(), scheduler.schedule()) if batch is not None]
        assert len({batch.group for batch in batches}) == len(batches)
        for batch in batches:
            if isinstance(batch, Decode):
                seen.add((batch.group, len(batch.rows)))
            complete(scheduler, batch)
    assert {(0, 2), (1, 2)} <= seen
    assert {rows for _, rows in seen} <= {1, 2}


def test_a_prompt_goes_where_it_is_found() -> None:
    scheduler = Scheduler(limits(num_groups=2))
    start(scheduler, [prompt(30), prompt(30, first=1)])
    groups = {row.sequence_id: batch.group for batch in (decode(scheduler), decode(scheduler)) for row in batch.rows}
    assert sorted(groups.values()) == [0, 1]
    scheduler.add(2, [*prompt(30), -1])
    scheduler.add(3, [*prompt(30, first=1), -1])
    found = {p.sequence_id: p for p in (lone(b) for b in (run(scheduler) for _ in range(6)) if isinstance(b, Prefill))}
    assert {number: found[number].group for number in (2, 3)} == {2: groups[0], 3: groups[1]}
    assert {found[number].start for number in (2, 3)} == {29}


def test_a_group_may_have_one_sequence_more_if_a_prompt_is_found_there() -> None:
    scheduler = Scheduler(limits(num_groups=2))
    start(scheduler, [prompt(30), prompt(30, first=1), [*prompt(30), -1]])
    scheduler.add(3, [*prompt(30), -2])
    scheduler.add(4, [*prompt(30), -3])
    found = {p.sequence_id: p for p in (lone(b) for b in (run(scheduler) for _ in range(8)) if isinstance(b, Prefill))}
    assert (found[3].start, found[4].start) == (29, 0)
    assert found[3].group != found[4].group


def test_a_prompt_that_is_found_nowhere_goes_to_an_idle_group() -> None:
    scheduler = Scheduler(limits(num_groups=2))
    start(scheduler, [prompt(30), prompt(30, first=1)])
    assert {decode(scheduler).group, decode(scheduler).group} == {0, 1}
    while scheduler._next_group != 0:
        decode(scheduler)
    under_way = scheduler.schedule()
    assert under_way is not None
    assert under_way.group == 0
    scheduler.add(2, prompt(30, first=2))
    assert prefill(scheduler).group == 1


def test_a_prompt_waits_for_the_group_under_way_in_which_it_is_found() -> None:
    scheduler = Scheduler(limits(num_groups=2))
    start(scheduler, [prompt(30), prompt(30, first=1)])
    decode(scheduler)
    under_way = scheduler.schedule()
    assert isinstance(under_way, Decode)
    scheduler.add(2, [*prompt(30, first=members(under_way)[0]), -1])
    other = scheduler.schedule()
    assert isinstance(other, Decode)
    assert scheduler.num_waiting == 0
    complete(scheduler, under_way)
    assert prefill(scheduler).start == 29


def test_no_group_is_left_empty_for_a_prefix() -> None:
    scheduler = Scheduler(limits(num_groups=2))
    start(scheduler, [prompt(30)])
    group = decode(scheduler).group
    scheduler.add(1, [*prompt(30), -1])
    batch = prefill(scheduler)
    assert (batch.group, batch.start) == (1 - group, 0)


# Aborts


def test_an_abort_under_way_takes_effect_when_the_batch_returns() -> None:
    scheduler = Scheduler(limits())
    start(scheduler, [prompt(5), prompt(5, first=1)])
    batch = scheduler.schedule()
    assert batch is not None
    scheduler.abort(0)
    scheduler.abort(0)
    assert scheduler.sequences_to_sample(batch) == (1,)
    assert scheduler.has_unfinished
    scheduler.complete(batch, {0: 7, 1: 7})
    assert members(decode(scheduler)) == [1]
    assert scheduler.num_running == 1


def test_an_abort_between_batches_takes_effect_at_once() -> None:
    scheduler = Scheduler(limits())
    start(scheduler, [prompt(5), prompt(5, first=1)])
    scheduler.add(2, prompt(5, first=2))
    for number in (0, 1, 2, 3):
        scheduler.abort(number)
    assert not scheduler.has_unfinished
    assert scheduler.schedule() is None


def test_a_prompt_aborted_between_its_chunks_can_be_found() -> None:
    scheduler = Scheduler(limits())
    scheduler.add(0, prompt(70))
    prefill(scheduler)
    scheduler.abort(0)
    assert scheduler.used_pages == scheduler.cached_pages == 8
    assert scheduler.cached_prefix(prompt(70)) == 32


def test_a_sequence_may_finish_between_its_chunks() -> None:
    scheduler = Scheduler(limits())
    scheduler.add(0, prompt(70))
    batch = scheduler.schedule()
    assert batch is not None
    scheduler.complete(batch, {}, finished=[0])
    assert not scheduler.has_unfinished


def test_clear_forgets_everything() -> None:
    scheduler = Scheduler(limits(num_groups=2))
    start(scheduler, [prompt(30), prompt(30, first=1)])
    scheduler.add(2, prompt(5))
    under_way = scheduler.schedule()
    assert isinstance(under_way, Decode)
    aborted = members(under_way)[0]
    scheduler.abort(aborted)
    assert scheduler.clear() == tuple(number for number in range(3) if number != aborted)
    assert not scheduler.has_unfinished
    assert (scheduler.used_pages, scheduler.cached_prefix(prompt(30))) == (0, 0)
    with pytest.raises(
        SchedulingError, match=r"the batch of group \d is not under way: expected what schedule\(\) gave"
    ):
        complete(scheduler, under_way)


# Refusals


@pytest.mark.parametrize(
    ("changes", "length", "message"),
    [
        ({}, 200, "sequence 3 has 200 tokens, and max_length is 200: expected at most 199"),
        ({"num_pages": 5}, 20, "sequence 3 has 20 tokens, and the KV cache has 5 pages of 4: expected at most 19"),
    ],
)
def test_a_prompt_that_can_never_run_is_refused(changes: dict[str, Any], length: int, message: str) -> None:
    scheduler = Scheduler(limits(**changes))
    with pytest.raises(CapacityError, match=message):
        scheduler.add(3, prompt(length))
    scheduler.add(3, prompt(length - 1))
    assert scheduler.max_length == length


def test_a_prompt_that_just_fits_runs() -> None:
    scheduler = Scheduler(limits(num_pages=5))
    scheduler.add(0, prompt(18))
    prefill(scheduler)
    assert scheduler.used_pages == 5
    decode(scheduler, finished=[0])
    assert not scheduler.has_unfinished


def test_an_empty_prompt_and_an_id_that_is_taken_are_refused() -> None:
    scheduler = Scheduler(limits())
    with pytest.raises(SchedulingError, match="sequence 3 has an empty prompt"):
        scheduler.add(3, [])
    scheduler.add(3, [1])
    with pytest.raises(SchedulingError, match="sequence 3 is there already"):
        scheduler.add(3, [1])


def test_a_sequence_that_may_have_no_more_tokens_has_to_finish() -> None:
    scheduler = Scheduler(limits(max_length=10))
    scheduler.add(0, prompt(9))
    batch = scheduler.schedule()
    assert batch is not None
    with pytest.raises(CapacityError, match="sequence 0 has 10 tokens, and max_length is 10"):
        scheduler.complete(batch, {0: 7})
    scheduler.complete(batch, {0: 7}, finished=[0])
    assert not scheduler.has_unfinished


def test_a_wrong_result_is_refused_and_changes_nothing() -> None:
    scheduler = Scheduler(limits())
    start(scheduler, [prompt(5), prompt(5, first=1)])
    batch = scheduler.schedule()
    assert batch is not None
    with pytest.raises(SchedulingError, match="no token of sequence 1: expected one, or that it is finished"):
        scheduler.complete(batch, {0: 7})
    with pytest.raises(SchedulingError, match=r"sequence 9 is not in the batch: expected only \[0, 1\]"):
        scheduler.complete(batch, {0: 7, 1: 7}, finished=[9])
    scheduler.complete(batch, {0: 7}, finished=[1])
    assert members(decode(scheduler)) == [0]
    with pytest.raises(SchedulingError, match="the batch of group 0 is not under way"):
        scheduler.complete(batch, {0: 7, 1: 7})


def test_what_an_unknown_sequence_found_is_not_known() -> None:
    with pytest.raises(SchedulingError, match="sequence 4 is not known"):
        Scheduler(limits()).num_cached_tokens(4)


@pytest.mark.parametrize(
    "name", ["num_groups", "slots_per_group", "num_pages", "page_size", "max_length", "prefill_chunk_size"]
)
def test_limits_of_nothing_are_refused(name: str) -> None:
    with pytest.raises(CapacityError, match=f"{name} is 0: expected at least 1"):
        limits(**{name: 0})


@pytest.mark.parametrize(
    ("found", "start", "chunks"),
    [
        (19, 19, [(22, "all")]),
        (18, 17, [(19, "none"), (22, "all")]),
        (17, 17, [(19, "none"), (22, "all")]),
        (15, 0, [(3, "none")]),
    ],
)
def test_no_token_is_alone_before_the_logits_that_are_still_wanted(
    found: int, start: int, chunks: list[tuple[int, str]]
) -> None:
    """A prompt is preempted after the logits of 19 of its tokens, and finds `found` of them again."""
    group = SlotGroup(
        0, 1, Pages(64, 4), chunk_size=3, prefix_caching=True, prompts_together=True, batch_invariant=False
    )
    tokens = [*range(1, found + 1), 99]
    earlier = SequenceState(sequence_id=0, arrival=0, tokens=tokens, prompt_length=1, prompt_logits=False)
    group.admit(earlier, 1)
    earlier.slot.length = found
    group.leave(earlier, 2)
    prompt = SequenceState(
        sequence_id=1, arrival=1, tokens=list(range(1, 29)), prompt_length=28, prompt_logits=True, delivered=19
    )
    group.admit(prompt, 3)
    assert prompt.slot.length == start
    at = start
    for end, logits in chunks:
        assert prompt.chunk(at, 3) == (end, logits)
        at = end


# Random traces; `python -m tests.campaigns.fuzz_scheduler` runs more of them


@pytest.mark.parametrize("first_seed", tiered([0, 100, 200], [0]))
def test_random_traces(first_seed: int) -> None:
    machines = [run_trace(seed) for seed in range(first_seed, first_seed + 100)]
    assert sum(machine.scheduler.num_preemptions for machine in machines) > 20
    assert sum(len(batch.copies) for machine in machines for batch in machine.log) > 100


@given(st.randoms(use_true_random=False), st.integers(1, 25))
@settings(max_examples=50, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
def test_short_traces_that_hypothesis_makes_shorter(rng: random.Random, num_events: int) -> None:
    Machine(Scheduler, rng).run(num_events)


@pytest.mark.parametrize("seed", range(1000, 1020))
def test_a_trace_gives_the_same_batches_every_time(seed: int) -> None:
    assert run_trace(seed).log == run_trace(seed).log
