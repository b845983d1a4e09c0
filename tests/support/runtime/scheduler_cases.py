"""Small cases for the scheduler: limits, prompts, and batches that run at once."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from furiosa_llm.runtime.engine.scheduler import Scheduler, SchedulerLimits
from furiosa_llm.runtime.runners.batch import Batch, Copy, Decode, Piece, Prefill


def limits(**changes: Any) -> SchedulerLimits:
    roomy: dict[str, Any] = {
        "num_groups": 1,
        "slots_per_group": 4,
        "num_pages": 100,
        "page_size": 4,
        "max_length": 200,
        "prefill_chunk_size": 32,
    }
    return SchedulerLimits(**(roomy | changes))


def prompt(length: int, first: int = 0) -> list[int]:
    """Tokens that no prompt with another `first` has."""
    return list(range(first * 1000, first * 1000 + length))


def complete(scheduler: Scheduler, batch: Batch, finished: Collection[int] = ()) -> None:
    scheduler.complete(batch, dict.fromkeys(scheduler.sequences_to_sample(batch), 7), finished)


def run(scheduler: Scheduler, finished: Collection[int] = ()) -> Batch:
    """One batch, at whose end those of `finished` that were in it leave."""
    batch = scheduler.schedule()
    assert batch is not None
    complete(scheduler, batch, set(finished) & set(scheduler.sequences_to_sample(batch)))
    return batch


@dataclass(frozen=True, slots=True, kw_only=True)
class Lone(Piece):
    """The only piece of a prefill batch."""

    group: int
    copies: tuple[Copy, ...]


def lone(batch: Batch | None) -> Lone:
    assert isinstance(batch, Prefill)
    (piece,) = batch.pieces
    fields = {field.name: getattr(piece, field.name) for field in dataclasses.fields(piece)}
    return Lone(group=batch.group, copies=batch.copies, **fields)


def prefill(scheduler: Scheduler, finished: Collection[int] = ()) -> Lone:
    return lone(run(scheduler, finished))


def decode(scheduler: Scheduler, finished: Collection[int] = ()) -> Decode:
    batch = run(scheduler, finished)
    assert isinstance(batch, Decode)
    return batch


def members(batch: Decode) -> list[int]:
    return [row.sequence_id for row in batch.rows]


def start(scheduler: Scheduler, prompts: Sequence[list[int]]) -> None:
    """Sequences 0, 1, 2, ..., prefilled until all of them decode."""
    for sequence_id, tokens in enumerate(prompts):
        scheduler.add(sequence_id, tokens)
    while scheduler.num_waiting or any(group.prefilling for group in scheduler._groups):
        run(scheduler)
