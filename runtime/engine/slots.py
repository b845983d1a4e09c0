"""KV slots and pages: which tokens lie where, what can be reused, and the copies that keep decoding slots together."""

from __future__ import annotations

from dataclasses import dataclass, field

from furiosa_llm.runtime.adapters.adapter import Adapter, key_of
from furiosa_llm.runtime.runners.batch import Batch, Copy, Prefill, WantedLogits

WORTH_A_COPY = 16
"""The least number of tokens whose KV is taken over from a slot; fewer are computed again."""

LEAST_CHUNK = 2
"""The least number of tokens of a prompt that are computed after others, where the limits allow it.

onnxruntime multiplies a single row by other kernels than several, in which a sum has another order: so a prompt gives
the same bits however it is cut, and whatever of it is found, if the processor's kernels have no other reason to differ.
"""


@dataclass(slots=True, kw_only=True, eq=False)
class Slot:
    """One row of a group's KV. Free slots keep their tokens, for prompts that begin alike, until they are reused."""

    index: int
    tokens: list[int] = field(default_factory=list)
    """The first `length` of these are in the slot; the list may be a sequence's own and grow."""
    length: int = 0
    """How many tokens have their KV here, once every batch has run that was scheduled and has returned."""
    owner: SequenceState | None = None
    prompt_length: int = 0
    """How many of these were computed as a prompt, in chunks; the others one by one, as they were generated."""
    adapter: int = 0
    """The key of the adapter that they were computed with; 0 for none."""
    last_used: int = 0
    """When its last owner left it or it was copied from, in steps of the scheduler's own count; 0 if it is empty."""


@dataclass(slots=True, kw_only=True, eq=False)
class SequenceState:
    """A sequence from `add` until it leaves."""

    sequence_id: int
    arrival: int
    tokens: list[int]
    """Tokens of prompt and completion. While it decodes, all but the last one are in its slot."""
    prompt_length: int
    prompt_logits: bool
    adapter: Adapter | None = None
    batch_invariant: bool = False
    """Whether what it generated is computed again as it was at first, one token at a time."""
    delivered: int = 0
    """How many of the prompt's tokens had their logits computed already, where `prompt_logits` asks for them."""
    group: SlotGroup | None = None
    """The group it runs in; None while it waits."""
    seat: Slot | None = None
    pages: int = 0
    cached_tokens: int | None = None
    """How many tokens of the prompt it found in a slot when it was first admitted; None before."""
    aborted: bool = False
    """It leaves when the batch returns that it is in."""

    @property
    def slot(self) -> Slot:
        """The slot of a sequence that runs."""
        assert self.seat is not None, f"sequence {self.sequence_id} waits"
        return self.seat

    @property
    def reusable(self) -> int:
        """How many of its first tokens need not be computed if their KV is found: no logits after them are wanted."""
        if self.prompt_logits and self.delivered < self.prompt_length:
            return 0 if self.batch_invariant else self.delivered
        return reusable_length(self.prompt_length if self.batch_invariant else len(self.tokens))

    def chunk(self, start: int, size: int) -> tuple[int, WantedLogits]:
        """Where the prefill batch ends that begins at `start`, and which logits it wants."""
        behind_prompt = self.batch_invariant and start >= self.prompt_length
        whole = self.prompt_length if self.batch_invariant and not behind_prompt else len(self.tokens)
        end = start + 1 if behind_prompt else cut(start, size, whole)
        if self.prompt_logits and self.delivered < self.prompt_length:
            return (cut(start, size, self.delivered), "none") if start < self.delivered else (end, "all")
        return end, "last" if end == len(self.tokens) else "none"


def cut(start: int, size: int, whole: int) -> int:
    """Where a chunk of at most `size` tokens ends that begins at `start`, in a prompt of `whole` tokens."""
    end = min(start + size, whole)
    return end - 1 if end == whole - 1 and end - start > LEAST_CHUNK else end


def reusable_length(length: int) -> int:
    """How many of the first tokens of a prompt of `length` need not be computed if their KV is found."""
    return max(0, length - LEAST_CHUNK)


class Pages:
    """The accounts of a replica's KV memory, in pages of `size` tokens, over the slots of all groups."""

    def __init__(self, total: int, size: int) -> None:
        self.total = total
        self.size = size
        self.held = 0
        """Pages that running sequences hold."""
        self.cached = 0
        """Pages of tokens that free slots keep."""
        self.slots: list[Slot] = []

    @property
    def free(self) -> int:
        """Pages that nothing holds."""
        return self.total - self.held - self.cached

    def needed(self, length: int) -> int:
        """Pages that `length` tokens take."""
        return -(-length // self.size)

    def evict(self, wanted: int, but_not: Slot | None = None) -> bool:
        """Frees pages of free slots, the least recently used first, until `wanted` are free; False if it cannot."""
        while self.free < wanted:
            keeping = [slot for slot in self.slots if slot.owner is None and slot.length > 0 and slot is not but_not]
            if not keeping:
                return False
            oldest = min(keeping, key=_age)
            left = self.needed(oldest.length) - (wanted - self.free)
            self.keep_only(oldest, max(0, left) * self.size)
        return True

    def keep_only(self, slot: Slot, length: int) -> None:
        """Forgets what a free slot keeps after its first `length` tokens, and frees the pages of it."""
        self.cached -= self.needed(slot.length) - self.needed(length)
        slot.length = length
        if length == 0:
            slot.tokens, slot.last_used = [], 0


class SlotGroup:
    """The slots of one group, the sequences in them, and the copies that its next batch has to begin with.

    Decoding sequences need not be in the first slots until a decode is scheduled: a slot in the middle that was left
    may be taken by the next prompt, and then nothing is moved. Copies are noted in the order in which they are decided,
    and what is known of the slots is what holds after the last of them.
    """

    def __init__(
        self,
        index: int,
        num_slots: int,
        pages: Pages,
        *,
        chunk_size: int,
        prefix_caching: bool,
        prompts_together: bool,
        batch_invariant: bool,
    ) -> None:
        self.index = index
        self.slots = [Slot(index=number) for number in range(num_slots)]
        self.prefilling: list[SequenceState] = []
        self.decoding: list[SequenceState] = []
        self.under_way: Batch | None = None
        self.last_was_prefill = False
        self._copies: list[Copy] = []
        self._pages = pages
        pages.slots += self.slots
        self._chunk_size = chunk_size
        self._prefix_caching = prefix_caching
        self._prompts_together = prompts_together
        self._batch_invariant = batch_invariant

    @property
    def load(self) -> int:
        """How many sequences run in this group."""
        return len(self.decoding) + len(self.prefilling)

    @property
    def prefill_is_next(self) -> bool:
        """Whether it is a prefill's turn: the two kinds of batch alternate while both are possible."""
        return not (self.last_was_prefill and self.decoding)

    @property
    def is_ready_for_a_prompt(self) -> bool:
        """Whether a sequence that is admitted now is in the next batch."""
        return self.under_way is None and self.prefill_is_next

    def takes(self, sequence: SequenceState) -> bool:
        """Whether a sequence may be admitted: there is a free slot, and no other is prefilled, or it can be so too."""
        return self.load < len(self.slots) and (not self.prefilling or self._joins(sequence))

    def _joins(self, sequence: SequenceState) -> bool:
        """Whether one batch prefills a sequence and those that wait for it, each from its first token to its last.

        A sequence of which much is in a slot, or will be after that batch, is better prefilled by itself.
        """
        if not self._prompts_together or isinstance(self.under_way, Prefill):
            return False
        everyone = [*self.prefilling, sequence]
        if sum(len(one.tokens) for one in everyone) > self._chunk_size:
            return False
        if any(one.chunk(0, self._chunk_size)[0] < len(one.tokens) for one in everyone):
            return False
        return not (self.worthwhile_match(sequence) or any(self._is_like(sequence, one) for one in self.prefilling))

    def _is_like(self, sequence: SequenceState, other: SequenceState) -> bool:
        """Whether other tokens of a sequence are in a slot already, or a sequence would find much in another's slot."""
        if other.slot.length:
            return True
        if not self._prefix_caching or key_of(sequence.adapter) != key_of(other.adapter):
            return False
        limit = min(sequence.reusable, len(other.tokens))
        return common_prefix(other.tokens, sequence.tokens, limit) >= WORTH_A_COPY

    def take_copies(self) -> tuple[Copy, ...]:
        """The copies that were decided since the last batch, in order; the batch that is about to start has them."""
        copies = tuple(self._copies)
        self._copies.clear()
        return copies

    def match(self, tokens: list[int], limit: int, adapter: int) -> int:
        """How many of the first `limit` tokens one of the slots has, computed with the adapter of that key."""
        return self._longest_match(tokens, limit, self.slots, adapter)[1] if self._prefix_caching else 0

    def worthwhile_match(self, sequence: SequenceState) -> int:
        """How many of a sequence's tokens need not be computed; 0 if they are fewer than are worth a copy."""
        match = self.match(sequence.tokens, sequence.reusable, key_of(sequence.adapter))
        return match if match >= WORTH_A_COPY else 0

    def admit(self, sequence: SequenceState, now: int) -> None:
        """Gives a sequence a slot, the KV that is found for it, and the pages of its tokens and the next one.

        A sequence that is whole after the group's next batch may sit anywhere among the decoding ones. Another one sits
        behind them, where it is in nobody's way while some of them leave.
        """
        num_decoding = len(self.decoding)
        if self._is_prefilled_next(sequence):
            places = [slot for slot in self.slots[: self.load + 1] if slot.owner is None]
        else:
            self.compact()
            places = [next(slot for slot in self.slots[num_decoding:] if slot.owner is None)]
        sequence.pages = self._pages.needed(len(sequence.tokens) + 1)
        self._seat(sequence, places, now)
        if sequence.prompt_logits and sequence.slot.length == sequence.delivered - 1:
            sequence.slot.length = max(0, sequence.delivered - LEAST_CHUNK)  # or one token would be computed alone
        self._pages.held += sequence.pages
        sequence.group = self
        self.prefilling.append(sequence)

    def _is_prefilled_next(self, sequence: SequenceState) -> bool:
        """Whether this group's next batch prefills a sequence from what is found for it to its end."""
        end, _ = sequence.chunk(self.worthwhile_match(sequence), self._chunk_size)
        return self.is_ready_for_a_prompt and end == len(sequence.tokens)

    def _seat(self, sequence: SequenceState, places: list[Slot], now: int) -> None:
        """Takes the place that has the longest match itself, or else copies the longest match into the oldest place.

        A match that is not worth a copy is none: prompts are prefilled together from their first tokens.

        Pages are freed before anything is saved, so that nothing is copied that would be given up next.
        """
        tokens, limit = sequence.tokens, sequence.reusable if self._prefix_caching else 0
        adapter = key_of(sequence.adapter)
        source, match = self._longest_match(tokens, limit, self.slots, adapter)
        target, match_in_place = self._longest_match(tokens, limit, places, adapter)
        if source is None or match < WORTH_A_COPY:
            self._pages.evict(sequence.pages)
            target, match = min(places, key=_age), 0
            self._overwrite(target, 0, sequence.pages)
        elif target is not None and match_in_place == match:
            self._pages.evict(sequence.pages - self._pages.needed(target.length), but_not=target)
            self._overwrite(target, match, sequence.pages)
        else:
            self._pages.evict(sequence.pages, but_not=source)
            target = min(places, key=_age)
            self._overwrite(target, 0, sequence.pages, but_not=source)
            self._copies.append(Copy(source=source.index, target=target.index, length=match))
            self._note_use(source, match, now)
            self._pages.evict(sequence.pages)
        target.tokens, target.length, target.owner = tokens, match, sequence
        target.prompt_length, target.adapter = sequence.prompt_length, adapter
        sequence.seat = target

    def _offered(self, slot: Slot, adapter: int) -> int:
        """How many of a slot's tokens a sequence with that adapter may take over, if they are its own prompt's.

        Where bits must not depend on who else is served, generated tokens are not among them, nor is a prompt of one.
        """
        if slot.adapter != adapter:
            return 0
        if not self._batch_invariant:
            return slot.length
        return min(slot.length, slot.prompt_length) if slot.prompt_length >= LEAST_CHUNK else 0

    def _overwrite(self, target: Slot, kept: int, pages: int, but_not: Slot | None = None) -> None:
        """Gives up a free slot from its first `kept` tokens on; the rest goes elsewhere if `pages` are free."""
        if self._pages.free >= pages:
            self._save(target, kept, behind=self.load + 1, but_not=but_not)
        self._pages.keep_only(target, 0)

    def _note_use(self, source: Slot, length: int, now: int) -> None:
        """A free slot of which little but the copied tokens would be left is of no more use than the copy."""
        if source.owner is None and source.length - length < WORTH_A_COPY:
            self._pages.keep_only(source, 0)
        else:
            source.last_used = now

    def compact(self) -> None:
        """Moves decoding sequences from the last slots into slots that were left, until they have the first ones."""
        count = len(self.decoding)
        self.decoding.sort(key=_slot_index)
        if count == 0 or self.decoding[-1].slot.index < count:
            return
        holes = [slot for slot in self.slots[:count] if slot.owner is None]
        movers = [sequence for sequence in self.decoding if sequence.slot.index >= count]
        for hole, sequence in zip(holes, movers, strict=True):
            self._save(hole, 0, behind=count)
            self._pages.keep_only(hole, 0)
            left = sequence.slot
            self._copies.append(Copy(source=left.index, target=hole.index, length=left.length))
            hole.tokens, hole.length, hole.owner = left.tokens, left.length, sequence
            hole.prompt_length, hole.adapter = left.prompt_length, left.adapter
            left.tokens, left.length, left.owner, left.last_used = [], 0, None, 0
            sequence.seat = hole
        self.decoding.sort(key=_slot_index)

    def _save(self, slot: Slot, kept: int, *, behind: int, but_not: Slot | None = None) -> None:
        """Copies what a free slot keeps to a free slot behind the first ones that was used less recently, if any.

        Otherwise the first slots, through which every sequence passes, would never keep anything for long.
        """
        if slot.length - kept < WORTH_A_COPY:
            return
        spares = [spare for spare in self.slots[behind:] if spare.owner is None and spare is not but_not]
        spare = min(reversed(spares), key=_age, default=slot)
        if spare.last_used >= slot.last_used:
            return
        self._pages.keep_only(spare, 0)
        self._copies.append(Copy(source=slot.index, target=spare.index, length=slot.length))
        spare.tokens, spare.length, spare.last_used = slot.tokens, slot.length, slot.last_used
        spare.prompt_length, spare.adapter = slot.prompt_length, slot.adapter
        self._pages.cached += self._pages.needed(spare.length)

    def leave(self, sequence: SequenceState, now: int) -> None:
        """Frees a sequence's slot and pages; the slot keeps its tokens if prompts may find them there."""
        slot = sequence.slot
        (self.prefilling if sequence in self.prefilling else self.decoding).remove(sequence)
        self._pages.held -= sequence.pages
        self._pages.cached += self._pages.needed(slot.length)
        slot.owner, slot.last_used = None, now
        if not self._prefix_caching:
            self._pages.keep_only(slot, 0)
        sequence.seat, sequence.group, sequence.pages = None, None, 0

    def _longest_match(self, tokens: list[int], limit: int, slots: list[Slot], adapter: int) -> tuple[Slot | None, int]:
        best, longest = None, 0
        for slot in slots:
            most = min(self._offered(slot, adapter), limit)
            if most > longest:
                length = common_prefix(slot.tokens, tokens, most)
                if length > longest:
                    best, longest = slot, length
        return best, longest


def common_prefix(left: list[int], right: list[int], limit: int) -> int:
    """How many tokens two lists have in common at their beginnings, at most `limit`; neither is shorter than that.

    Slices are compared as wholes, first longer and longer ones, then halves, so that no loop runs over tokens.
    """
    same, step = 0, WORTH_A_COPY
    while same < limit and left[same : min(same + step, limit)] == right[same : min(same + step, limit)]:
        same = min(same + step, limit)
        step *= 2
    different = min(same + step, limit)
    while different - same > 1:
        middle = (same + different) // 2
        if left[same:middle] == right[same:middle]:
            same = middle
        else:
            different = middle
    return same


def _age(slot: Slot) -> int:
    return slot.last_used


def _slot_index(sequence: SequenceState) -> int:
    return sequence.slot.index
