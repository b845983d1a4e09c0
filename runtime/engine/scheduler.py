"""The scheduler: which batch a replica runs next, of all the sequences that it was given; no clock, no chance."""

from __future__ import annotations

import itertools
from bisect import insort
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields

from furiosa_llm.runtime.adapters.adapter import Adapter
from furiosa_llm.runtime.engine.slots import Pages, SequenceState, SlotGroup, reusable_length
from furiosa_llm.runtime.errors import CapacityError, SchedulingError
from furiosa_llm.runtime.runners.batch import Batch, Decode, Piece, Prefill, Row

PAGE_SIZE = 16
"""Tokens of one page of KV. Pages are only counted: small ones cost nothing, and waste 8 tokens a sequence."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerLimits:
    """What a replica has room for. Every number is at least 1."""

    num_groups: int
    """Batches that may be under way at once; as many as the pipeline has stages."""
    slots_per_group: int
    """Sequences of one group that may have KV at once."""
    num_pages: int
    """Pages of KV in the whole replica. A page is a unit of account: nothing lies in pages."""
    page_size: int
    """Tokens of one page."""
    max_length: int
    """Tokens of one sequence, prompt and completion."""
    prefill_chunk_size: int
    """The greatest number of tokens in a prefill batch."""
    prefix_caching: bool = True
    """Whether prompts find the KV of earlier ones that begin alike."""
    prompts_together: bool = True
    """Whether prompts that fit into one prefill batch are in it together."""
    batch_invariant: bool = False
    """Whether KV is always computed in the same steps, whoever else is served: what was generated is computed again
    token by token after a preemption, and not found by other prompts."""

    def __post_init__(self) -> None:
        for limit in fields(self):
            value = getattr(self, limit.name)
            if not isinstance(value, bool) and value < 1:
                raise CapacityError(f"{limit.name} is {value}: expected at least 1")


class Scheduler:
    """Sequences in, batches out: `add`, then `schedule` and `complete` in turn, with a batch of every group under way.

    First come, first served. A sequence stays in one group from its admission until it leaves or is preempted. Where
    the groups are, who sits in which slot, and which copies that takes is for `runtime/engine/slots.py`.
    """

    def __init__(self, limits: SchedulerLimits) -> None:
        self.limits = limits
        self.num_preemptions = 0
        """How often a sequence lost its place to an earlier one, since the scheduler was made."""
        self._arrivals = itertools.count()
        self._reset()

    def _reset(self) -> None:
        limits = self.limits
        self._pages = Pages(limits.num_pages, limits.page_size)
        self._groups = [
            SlotGroup(
                index,
                limits.slots_per_group,
                self._pages,
                chunk_size=limits.prefill_chunk_size,
                prefix_caching=limits.prefix_caching,
                prompts_together=limits.prompts_together,
                batch_invariant=limits.batch_invariant,
            )
            for index in range(limits.num_groups)
        ]
        self._sequences: dict[int, SequenceState] = {}
        self._waiting: list[SequenceState] = []
        self._next_group = 0
        self._uses = itertools.count(1)

    @property
    def max_length(self) -> int:
        """Tokens that one sequence may have, prompt and completion: the limit, or what fits into all pages if fewer.

        Whoever samples finishes a sequence that has as many.
        """
        return min(self.limits.max_length, self.limits.num_pages * self.limits.page_size)

    @property
    def has_unfinished(self) -> bool:
        """Whether anything waits or runs, aborted sequences whose batch is under way included."""
        return bool(self._sequences)

    @property
    def num_running(self) -> int:
        """Sequences that have a slot."""
        return len(self._sequences) - len(self._waiting)

    @property
    def num_waiting(self) -> int:
        """Sequences that have none yet, or lost it."""
        return len(self._waiting)

    @property
    def used_pages(self) -> int:
        """Pages held by sequences, and by tokens that free slots keep."""
        return self._pages.held + self._pages.cached

    @property
    def cached_pages(self) -> int:
        """Pages held by tokens that free slots keep; they are given up as soon as a sequence needs them."""
        return self._pages.cached

    def add(
        self,
        sequence_id: int,
        prompt: Sequence[int],
        *,
        prompt_logits: bool = False,
        adapter: Adapter | None = None,
    ) -> None:
        """Takes a sequence in, after the sequences that are waiting.

        `prompt_logits`: its prefill batches want the logits after every token of the prompt, each once. It is computed
        with `adapter`, and finds no KV that was computed with another.

        Raises:
            CapacityError: It can never run, since the prompt leaves no room for a completion.
            SchedulingError: There is a sequence of this id already, or the prompt is empty.
        """
        if sequence_id in self._sequences:
            raise SchedulingError(f"sequence {sequence_id} is there already: expected an id that no other has")
        if not prompt:
            raise SchedulingError(f"sequence {sequence_id} has an empty prompt: expected at least one token")
        self._refuse_if_too_long(sequence_id, len(prompt))
        sequence = SequenceState(
            sequence_id=sequence_id,
            arrival=next(self._arrivals),
            tokens=list(prompt),
            prompt_length=len(prompt),
            prompt_logits=prompt_logits,
            adapter=adapter,
            batch_invariant=self.limits.batch_invariant,
        )
        self._sequences[sequence_id] = sequence
        self._waiting.append(sequence)

    def abort(self, sequence_id: int) -> None:
        """Drops a sequence: at once, or when the batch returns that it is in. One that is not there is no error."""
        sequence = self._sequences.get(sequence_id)
        if sequence is None:
            return
        if sequence.group is None:
            self._waiting.remove(sequence)
            del self._sequences[sequence_id]
        elif sequence_id in _members(sequence.group.under_way):
            sequence.aborted = True
        else:
            self._leave(sequence)

    def clear(self) -> tuple[int, ...]:
        """Forgets everything: sequences, batches under way, and what the slots hold.

        Returns:
            The ids of the sequences that had neither finished nor been aborted, in the order of their arrival.
        """
        unfinished = tuple(sequence.sequence_id for sequence in self._sequences.values() if not sequence.aborted)
        self._reset()
        return unfinished

    def num_cached_tokens(self, sequence_id: int) -> int:
        """How many tokens of its prompt a sequence found in a slot when it was first admitted; 0 before.

        Raises:
            SchedulingError: There is no such sequence, or it has left.
        """
        if sequence_id not in self._sequences:
            raise SchedulingError(f"sequence {sequence_id} is not known: expected one that has not left")
        return self._sequences[sequence_id].cached_tokens or 0

    def cached_prefix(self, tokens: Sequence[int], adapter: int = 0) -> int:
        """How many tokens of a new prompt, with the adapter of that key, would be found in a slot at this moment."""
        prompt = list(tokens)
        return max(group.match(prompt, reusable_length(len(prompt)), adapter) for group in self._groups)

    def schedule(self) -> Batch | None:
        """The next batch, of a group that has none under way; None if nothing can run before a batch returns."""
        order = self._groups[self._next_group :] + self._groups[: self._next_group]
        idle = [group for group in order if group.under_way is None]
        self._admit()
        for group in idle:
            batch = self._next_batch(group)
            if batch is not None:
                group.under_way = batch
                group.last_was_prefill = isinstance(batch, Prefill)
                self._next_group = (group.index + 1) % len(self._groups)
                return batch
        return None

    def sequences_to_sample(self, batch: Batch) -> tuple[int, ...]:
        """The sequences whose next token `complete` expects: all sequences of a decode, or those whose prefill ends.

        Sequences that were aborted meanwhile are left out.

        Raises:
            SchedulingError: The batch is not under way.
        """
        self._group_of(batch)
        members = [self._sequences[sequence_id] for sequence_id in _members(batch)]
        if isinstance(batch, Prefill):
            pairs = zip(batch.pieces, members, strict=True)
            members = [sequence for piece, sequence in pairs if piece.end == len(sequence.tokens)]
        return tuple(sequence.sequence_id for sequence in members if not sequence.aborted)

    def complete(self, batch: Batch, tokens: Mapping[int, int], finished: Collection[int] = ()) -> None:
        """Takes note that a batch under way has run.

        Args:
            batch: As it came from `schedule`.
            tokens: The token sampled for each of `sequences_to_sample`. Tokens of aborted sequences are dropped.
            finished: The sequences of the batch that leave. What was sampled for them is not stepped.

        Raises:
            SchedulingError: The batch is not under way, a token is missing, or something is not of this batch.
            CapacityError: A sequence has as many tokens as it may have, and is not finished.
        """
        group = self._group_of(batch)
        self._check_result(batch, tokens, finished)
        to_sample = self.sequences_to_sample(batch)
        group.under_way = None
        self._note_computed(group, batch)
        for sequence_id in to_sample:
            if sequence_id not in finished:
                self._sequences[sequence_id].tokens.append(tokens[sequence_id])
        for sequence_id in _members(batch):
            sequence = self._sequences[sequence_id]
            if sequence.aborted or sequence_id in finished:
                self._leave(sequence)

    def _group_of(self, batch: Batch) -> SlotGroup:
        group = self._groups[batch.group] if batch.group < len(self._groups) else None
        if group is None or group.under_way is not batch:
            raise SchedulingError(
                f"the batch of group {batch.group} is not under way: expected what schedule() gave, once"
            )
        return group

    def _check_result(self, batch: Batch, tokens: Mapping[int, int], finished: Collection[int]) -> None:
        members = _members(batch)
        for sequence_id in itertools.chain(tokens, finished):
            if sequence_id not in members:
                raise SchedulingError(f"sequence {sequence_id} is not in the batch: expected only {sorted(members)}")
        for sequence_id in self.sequences_to_sample(batch):
            if sequence_id in finished:
                continue
            if sequence_id not in tokens:
                raise SchedulingError(f"no token of sequence {sequence_id}: expected one, or that it is finished")
            self._refuse_if_too_long(sequence_id, len(self._sequences[sequence_id].tokens) + 1)

    def _refuse_if_too_long(self, sequence_id: int, length: int) -> None:
        """Refuses a sequence that may not have another token."""
        if length < self.max_length:
            return
        limits = self.limits
        if self.max_length == limits.max_length:
            reason = f"max_length is {limits.max_length}"
        else:
            reason = f"the KV cache has {limits.num_pages} pages of {limits.page_size}"
        raise CapacityError(
            f"sequence {sequence_id} has {length} tokens, and {reason}: expected at most {self.max_length - 1}, so that"
            " one more can follow"
        )

    def _note_computed(self, group: SlotGroup, batch: Batch) -> None:
        if isinstance(batch, Decode):
            for row in batch.rows:
                self._sequences[row.sequence_id].slot.length += 1
            return
        for piece in batch.pieces:
            sequence = self._sequences[piece.sequence_id]
            sequence.slot.length = piece.end
            sequence.delivered = max(sequence.delivered, min(piece.end, sequence.prompt_length))
            if piece.end == len(sequence.tokens):
                group.prefilling.remove(sequence)
                group.decoding.append(sequence)

    def _leave(self, sequence: SequenceState) -> None:
        if sequence.group is not None:
            sequence.group.leave(sequence, next(self._uses))
        del self._sequences[sequence.sequence_id]

    def _admit(self) -> None:
        """Admits sequences in order while there is a group that could prefill one at once.

        A sequence may still go to another group that suits it better, and wait there for its turn.
        """
        while self._waiting:
            sequence = self._waiting[0]
            needed = self._pages.needed(len(sequence.tokens) + 1)
            open_groups = [group for group in self._groups if group.takes(sequence)]
            ready = any(group.is_ready_for_a_prompt for group in open_groups)
            if not ready or self._pages.held + needed > self._pages.total:
                return
            del self._waiting[0]
            group = _choose_group(sequence, open_groups)
            group.admit(sequence, next(self._uses))
            if sequence.cached_tokens is None:
                sequence.cached_tokens = sequence.slot.length

    def _next_batch(self, group: SlotGroup) -> Batch | None:
        """The batch whose turn it is, or the other kind if there is no batch of it."""
        if group.prefilling and group.prefill_is_next:
            return self._prefill(group)
        decode = self._decode(group)
        return self._prefill(group) if decode is None and group.prefilling else decode

    def _prefill(self, group: SlotGroup) -> Prefill:
        pieces: list[Piece] = []
        for sequence in group.prefilling:
            start = sequence.slot.length
            end, logits = sequence.chunk(start, self.limits.prefill_chunk_size)
            pieces.append(
                Piece(
                    sequence_id=sequence.sequence_id,
                    slot=sequence.slot.index,
                    start=start,
                    tokens=tuple(sequence.tokens[start:end]),
                    logits=logits,
                    adapter=sequence.adapter,
                )
            )
        return Prefill(group=group.index, copies=group.take_copies(), pieces=tuple(pieces))

    def _decode(self, group: SlotGroup) -> Decode | None:
        if not self._make_room_for_next_tokens(group) or not group.decoding:
            return None
        group.compact()
        rows = tuple(
            Row(
                sequence_id=sequence.sequence_id,
                start=sequence.slot.length,
                token=sequence.tokens[-1],
                adapter=sequence.adapter,
            )
            for sequence in group.decoding
        )
        return Decode(group=group.index, copies=group.take_copies(), rows=rows)

    def _make_room_for_next_tokens(self, group: SlotGroup) -> bool:
        """Gives each decoding sequence the page of its next token, the earliest first; False if it has to wait.

        When pages run out, the latest of the sequences that have no batch under way gives up its own. It may be the one
        that needs the page.
        """
        in_need = [sequence for sequence in group.decoding if len(sequence.tokens) > sequence.pages * self._pages.size]
        for sequence in sorted(in_need, key=_arrival):
            while sequence.group is group and not self._pages.evict(1):
                running = list(self._running_in_idle_groups())
                if running == [sequence]:
                    assert any(other.under_way for other in self._groups), "a sequence by itself always fits"
                    return False
                self._preempt(max(running, key=_arrival))
            if sequence.group is group:
                sequence.pages += 1
                self._pages.held += 1
        return True

    def _running_in_idle_groups(self) -> Iterator[SequenceState]:
        for group in self._groups:
            if group.under_way is None:
                yield from group.decoding
                yield from group.prefilling

    def _preempt(self, sequence: SequenceState) -> None:
        """Sends a sequence back to its place among the waiting ones. It will compute again what is not found then."""
        assert sequence.group is not None, f"sequence {sequence.sequence_id} waits"
        sequence.group.leave(sequence, next(self._uses))
        insort(self._waiting, sequence, key=_arrival)
        self.num_preemptions += 1


def _members(batch: Batch | None) -> Collection[int]:
    """The ids of the sequences in a batch."""
    if batch is None:
        return ()
    if isinstance(batch, Prefill):
        return {piece.sequence_id: None for piece in batch.pieces}
    return {row.sequence_id: None for row in batch.rows}


def _arrival(sequence: SequenceState) -> int:
    return sequence.arrival


def _choose_group(sequence: SequenceState, open_groups: Sequence[SlotGroup]) -> SlotGroup:
    """The group with the longest match, of the groups that have the fewest sequences or one more.

    No match is worth leaving a group empty while another is not: a stage would have nothing to do.
    """
    least = min(group.load for group in open_groups)
    suitable = [group for group in open_groups if group.load <= least + min(least, 1)]

    def rank(group: SlotGroup) -> tuple[int, int, bool]:
        return (-group.worthwhile_match(sequence), group.load, not group.is_ready_for_a_prompt)

    return min(suitable, key=rank)
