"""What the scheduler finds of prompts in slots, keeps there, and gives up when pages run out."""

from __future__ import annotations

import pytest

from furiosa_llm.runtime.adapters.adapter import Adapter
from furiosa_llm.runtime.engine.scheduler import Scheduler
from furiosa_llm.runtime.runners.batch import Copy, Decode, Prefill, Row
from tests.support.runtime.scheduler_cases import complete, decode, limits, lone, members, prefill, prompt, run, start

# Prefixes


def test_a_running_prefix_is_copied() -> None:
    scheduler = Scheduler(limits())
    start(scheduler, [prompt(40)])
    scheduler.add(1, [*prompt(40), -1, -2])
    decode(scheduler)
    batch = prefill(scheduler)
    assert batch.copies == (Copy(source=0, target=1, length=40),)
    assert (batch.slot, batch.start, batch.tokens) == (1, 40, (-1, -2))
    assert scheduler.num_cached_tokens(1) == 40


def test_a_short_prefix_is_not_worth_a_copy() -> None:
    scheduler = Scheduler(limits())
    start(scheduler, [prompt(15)])
    scheduler.add(1, [*prompt(15), -1, -2])
    decode(scheduler)
    batch = prefill(scheduler)
    assert (batch.copies, batch.start, scheduler.num_cached_tokens(1)) == ((), 0, 0)


@pytest.mark.parametrize(("common", "found"), [(15, 0), (16, 16)])
def test_a_prefix_in_the_slot_itself_costs_nothing(common: int, found: int) -> None:
    """A short one would keep the prompt from being prefilled with others."""
    scheduler = Scheduler(limits())
    scheduler.add(0, prompt(common))
    prefill(scheduler, finished=[0])
    scheduler.add(1, [*prompt(common), -1, -2])
    batch = prefill(scheduler)
    assert (batch.copies, batch.start) == ((), found)


def test_a_conversation_goes_on_in_its_slot() -> None:
    """The last token of the first turn was sampled and never stepped: it is computed with the second turn."""
    scheduler = Scheduler(limits())
    start(scheduler, [prompt(40)])
    decode(scheduler, finished=[0])
    scheduler.add(1, [*prompt(40), 7, 7, -1])
    assert scheduler.cached_prefix([*prompt(40), 7, 7, -1]) == 41
    batch = prefill(scheduler)
    assert (batch.copies, batch.slot, batch.start, batch.tokens) == ((), 0, 41, (7, -1))


def test_several_completions_of_one_prompt_compute_it_once() -> None:
    scheduler = Scheduler(limits())
    start(scheduler, [prompt(32)] * 3)
    assert [scheduler.num_cached_tokens(number) for number in range(3)] == [0, 30, 30]


def test_another_prompt_does_not_overwrite_what_may_be_asked_for_again() -> None:
    scheduler = Scheduler(limits())
    scheduler.add(0, prompt(30))
    prefill(scheduler, finished=[0])
    scheduler.add(1, prompt(20, first=1))
    other = prefill(scheduler)
    assert (other.slot, other.copies) == (0, (Copy(source=0, target=3, length=30),))
    scheduler.add(2, [*prompt(30), -1])
    decode(scheduler)
    again = prefill(scheduler)
    assert (again.slot, again.copies, again.start) == (1, (Copy(source=3, target=1, length=29),), 29)
    assert scheduler.cached_pages == 0, "the copy is kept, what was copied is not"


def test_nothing_is_saved_over_what_was_used_since() -> None:
    scheduler = Scheduler(limits(slots_per_group=3))
    start(scheduler, [prompt(30), prompt(30, first=1)])
    decode(scheduler, finished=[1])
    decode(scheduler, finished=[0])
    start(scheduler, [prompt(20, first=2), prompt(20, first=3)])
    assert [scheduler.cached_prefix(prompt(32, first=number)) for number in range(2)] == [30, 0]


def test_what_a_prompt_was_copied_from_is_kept_longer() -> None:
    scheduler = Scheduler(limits(slots_per_group=6, num_pages=28, max_length=100, prefill_chunk_size=64))
    for number, length in ((0, 40), (1, 20)):
        scheduler.add(number, prompt(length, first=number))
        prefill(scheduler, finished=[number])
    start(scheduler, [prompt(8, first=2), [*prompt(20), -1, -2, -3], prompt(19, first=3)])
    assert scheduler.used_pages == 28
    assert scheduler.cached_prefix(prompt(42)) == 40
    assert 0 < scheduler.cached_prefix(prompt(22, first=1)) < 20


def test_nothing_is_saved_that_would_have_to_be_given_up_at_once() -> None:
    scheduler = Scheduler(limits(num_pages=10, max_length=40))
    scheduler.add(0, prompt(30))
    prefill(scheduler, finished=[0])
    scheduler.add(1, prompt(24, first=1))
    assert prefill(scheduler).copies == ()
    assert scheduler.used_pages == 7


def test_without_prefix_caching_nothing_is_found_or_kept() -> None:
    scheduler = Scheduler(limits(prefix_caching=False))
    start(scheduler, [prompt(30)])
    scheduler.add(1, prompt(30))
    decode(scheduler, finished=[0])
    assert (scheduler.used_pages, scheduler.cached_prefix(prompt(30))) == (0, 0)
    batch = prefill(scheduler, finished=[1])
    assert (batch.start, batch.copies) == (0, ())


def test_logits_behind_every_token_of_a_prompt_leave_nothing_to_reuse() -> None:
    scheduler = Scheduler(limits())
    start(scheduler, [prompt(30)])
    scheduler.add(1, prompt(30), prompt_logits=True)
    decode(scheduler)
    batch = prefill(scheduler)
    assert (batch.start, len(batch.tokens), batch.logits) == (0, 30, "all")


def test_a_prompt_under_way_is_not_found_before_it_has_run() -> None:
    scheduler = Scheduler(limits())
    scheduler.add(0, prompt(40))
    under_way = scheduler.schedule()
    assert under_way is not None
    assert scheduler.cached_prefix(prompt(40)) == 0
    complete(scheduler, under_way)
    assert scheduler.cached_prefix(prompt(40)) == 32


# Pages


def test_a_prompt_holds_the_pages_of_its_tokens_and_one_more() -> None:
    scheduler = Scheduler(limits())
    scheduler.add(0, prompt(40))
    scheduler.schedule()
    assert (scheduler.used_pages, scheduler.cached_pages) == (11, 0)


def test_a_sequence_takes_a_page_when_it_crosses_into_it_and_leaves_them_cached() -> None:
    scheduler = Scheduler(limits())
    start(scheduler, [prompt(7)])
    used = []
    for _ in range(6):
        decode(scheduler)
        used.append(scheduler.used_pages)
    assert used == [2, 3, 3, 3, 3, 4]
    decode(scheduler, finished=[0])
    assert (scheduler.used_pages, scheduler.cached_pages) == (4, 4)


def test_free_slots_give_up_their_pages_one_by_one_the_oldest_first() -> None:
    scheduler = Scheduler(limits(num_pages=14, max_length=40))
    for number in range(2):
        scheduler.add(number, prompt(20, first=number))
        prefill(scheduler, finished=[number])
    scheduler.add(2, prompt(20, first=2))
    prefill(scheduler)
    assert scheduler.used_pages == 14
    assert [scheduler.cached_prefix(prompt(22, first=number)) for number in range(3)] == [12, 20, 20]


def test_the_latest_gives_way_and_goes_on_where_it_was() -> None:
    scheduler = Scheduler(limits(num_pages=11, max_length=40))
    start(scheduler, [prompt(20), prompt(18, first=1)])
    batches = [decode(scheduler) for _ in range(5)]
    assert [members(batch) for batch in batches] == [[0, 1], [0, 1], [0], [0], [0]]
    assert (scheduler.num_preemptions, scheduler.num_running, scheduler.num_waiting) == (1, 1, 1)
    decode(scheduler, finished=[0])
    again = prefill(scheduler)
    assert (again.sequence_id, again.start, again.tokens) == (1, 16, (1016, 1017, 7, 7, 7))
    assert decode(scheduler).rows == (Row(sequence_id=1, start=21, token=7),)
    assert scheduler.num_cached_tokens(1) == 0


def test_a_preempted_sequence_comes_before_those_that_came_after_it() -> None:
    scheduler = Scheduler(limits(num_pages=11, max_length=40))
    start(scheduler, [prompt(20), prompt(18, first=1)])
    scheduler.add(2, prompt(2, first=2))
    for _ in range(4):
        decode(scheduler)
    assert scheduler.num_preemptions == 1
    decode(scheduler, finished=[0])
    assert prefill(scheduler).sequence_id == 1
    decode(scheduler)
    assert prefill(scheduler).sequence_id == 2


def test_logits_of_a_prompt_are_not_computed_twice() -> None:
    scheduler = Scheduler(limits(num_pages=15, max_length=60, prefill_chunk_size=8, prefix_caching=False))
    start(scheduler, [prompt(13)])
    scheduler.add(1, prompt(40, first=1), prompt_logits=True)
    decode(scheduler)
    before = [run(scheduler) for _ in range(4)]
    assert [lone(batch).logits for batch in before[::2]] == ["all", "all"]
    while not scheduler.num_preemptions:
        before.append(run(scheduler))
    decode(scheduler, finished=[0])
    delivered = max(lone(batch).end for batch in before if isinstance(batch, Prefill))
    after = []
    while scheduler._groups[0].prefilling or scheduler.num_waiting:
        after.append(prefill(scheduler))
    assert [batch.logits for batch in after] == ["none"] * (delivered // 8) + ["all"] * (5 - delivered // 8)
    assert 16 <= delivered < 40


def test_alone_among_idle_groups_a_sequence_waits_for_pages() -> None:
    scheduler = Scheduler(limits(num_groups=2, num_pages=12, max_length=48))
    start(scheduler, [prompt(22), prompt(22, first=1)])
    batches = [scheduler.schedule(), scheduler.schedule()]
    for batch in batches:
        assert isinstance(batch, Decode)
        complete(scheduler, batch)
    first, second = scheduler.schedule(), scheduler.schedule()
    assert isinstance(first, Decode)
    assert isinstance(second, Decode)
    complete(scheduler, second)
    assert scheduler.schedule() is None
    assert scheduler.num_preemptions == 0
    complete(scheduler, first, finished=scheduler.sequences_to_sample(first))
    assert members(decode(scheduler)) == [row.sequence_id for row in second.rows]


def test_no_token_is_computed_alone_behind_others() -> None:
    scheduler = Scheduler(limits(max_length=40, prefill_chunk_size=8, prefix_caching=False))
    for length in (2, 8, 9, 16, 17, 18, 25):
        scheduler.add(length, prompt(length))
        chunks: list[int] = []
        while sum(chunks) < length:
            batch = scheduler.schedule()
            assert batch is not None
            chunks.append(len(lone(batch).tokens))
            ended = sum(chunks) == length
            scheduler.complete(batch, {length: 7} if ended else {}, [length] if ended else [])
        assert max(chunks) <= 8
        assert min(chunks) >= 2


# Adapters


def _adapter(key: int) -> Adapter:
    return Adapter(key=key, name=str(key), arrays={})


def test_kv_of_one_adapter_serves_no_other() -> None:
    """Not in the slot itself, not by a copy, and not where it was saved or moved to."""
    one, two = _adapter(1), _adapter(2)
    scheduler = Scheduler(limits(prefill_chunk_size=64, slots_per_group=6))
    scheduler.add(0, prompt(40), adapter=one)
    prefill(scheduler)
    for number, (adapter, cached) in enumerate([(None, 0), (two, 0), (one, 38), (two, 38), (None, 38)], 1):
        assert scheduler.cached_prefix(prompt(40), 0 if adapter is None else adapter.key) == cached
        scheduler.add(number, prompt(40), adapter=adapter)
        decode(scheduler)
        assert prefill(scheduler).adapter is adapter
        assert scheduler.num_cached_tokens(number) == cached


def test_a_slot_that_is_moved_keeps_its_adapter() -> None:
    one, two = _adapter(1), _adapter(2)
    scheduler = Scheduler(limits())
    for number, adapter in enumerate((one, two)):
        scheduler.add(number, prompt(20), adapter=adapter)
        prefill(scheduler)
        decode(scheduler, finished=[] if number == 0 else [0])
    assert [row.adapter for row in decode(scheduler, finished=[1]).rows] == [two]
    assert scheduler.cached_prefix(prompt(20), 2) == 18
    scheduler.add(2, [*prompt(20), -1], adapter=two)
    assert prefill(scheduler).start == 19
    scheduler.add(3, [*prompt(20), -1], adapter=_adapter(3))
    decode(scheduler)
    assert prefill(scheduler).start == 0


def test_who_is_preempted_finds_its_own_kv_again() -> None:
    one, two = _adapter(1), _adapter(2)
    scheduler = Scheduler(limits(num_pages=17))
    for number, adapter in enumerate((one, two)):
        scheduler.add(number, prompt(30), adapter=adapter)
    while not scheduler.num_preemptions:
        run(scheduler)
    run(scheduler, finished=[0])
    assert scheduler.cached_prefix(prompt(30), 1) == scheduler.cached_prefix(prompt(30), 2) == 28
    batch = prefill(scheduler)
    assert (batch.sequence_id, batch.adapter) == (1, two)
    assert batch.start > 28
