"""A store of tokens that runs the scheduler's batches and checks each, and random traces of what may happen to it."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from furiosa_llm.runtime.adapters.adapter import Adapter
from furiosa_llm.runtime.engine.scheduler import Scheduler, SchedulerLimits
from furiosa_llm.runtime.engine.slots import LEAST_CHUNK, WORTH_A_COPY
from furiosa_llm.runtime.runners.batch import Batch, Copy, Decode, Piece, Prefill, Row

MakeScheduler = Callable[[SchedulerLimits], Scheduler]


class WrongScheduleError(AssertionError):
    """The scheduler did what it must not do."""


def expect(condition: bool, complaint: str) -> None:
    if not condition:
        raise WrongScheduleError(complaint)


@dataclass(slots=True, kw_only=True, eq=False)
class Client:
    """A sequence as whoever asked for it knows it."""

    sequence_id: int
    prompt: tuple[int, ...]
    budget: int
    """How many tokens it is to generate."""
    prompt_logits: bool
    adapter: Adapter | None = None
    tokens: list[int] = field(default_factory=list)
    """Prompt and completion."""
    stepped: int = 0
    """How many of these were stepped since it was last started."""
    delivered: list[int] = field(default_factory=list)
    """Behind which positions of the prompt there were logits, where all are wanted."""
    group: int | None = None
    starts: int = 0
    passed_over: int = 0
    """Batches of its group since the last one that it was in, or since it was admitted again."""
    ends: int = 0
    """How often it was answered or aborted; once, in the end."""


Position = tuple[int, bool, Adapter | None]
"""A token in a slot, whether it was computed alone (in a batch that has one token of its sequence), and with what."""

ADAPTERS = (None, *(Adapter(key=key, name=str(key), arrays={}) for key in (1, 2)))


class SlotStore:
    """The tokens in every slot: what a runner's KV would be computed from, and how."""

    def __init__(self, limits: SchedulerLimits) -> None:
        self.slots: list[list[list[Position]]] = [
            [[] for _ in range(limits.slots_per_group)] for _ in range(limits.num_groups)
        ]

    def run(self, batch: Batch) -> None:
        slots = self.slots[batch.group]
        for copy in batch.copies:
            self._copy(slots, copy)
        if isinstance(batch, Prefill):
            for piece in batch.pieces:
                self._write(slots, piece.slot, piece.start, piece.tokens, piece.adapter)
            return
        for index, row in enumerate(batch.rows):
            self._write(slots, index, row.start, (row.token,), row.adapter)

    @staticmethod
    def _copy(slots: list[list[Position]], copy: Copy) -> None:
        expect(copy.source != copy.target, f"{copy} copies a slot to itself")
        expect(0 < copy.length <= len(slots[copy.source]), f"{copy} of a slot that has {len(slots[copy.source])}")
        slots[copy.target] = slots[copy.source][: copy.length]

    @staticmethod
    def _write(
        slots: list[list[Position]], slot: int, start: int, tokens: tuple[int, ...], adapter: Adapter | None
    ) -> None:
        expect(start <= len(slots[slot]), f"slot {slot} has {len(slots[slot])} tokens, and {start} are built on")
        slots[slot] = slots[slot][:start] + [(token, len(tokens) == 1, adapter) for token in tokens]


class Machine:
    """A scheduler, its clients and the store, and what may happen next. Every check is made on the way."""

    def __init__(self, make: MakeScheduler, rng: random.Random, *, adapters: bool = False) -> None:
        self.random = rng
        self.adapters = ADAPTERS if adapters else ADAPTERS[:1]
        self.limits = random_limits(self.random)
        self.scheduler = make(self.limits)
        self.store = SlotStore(self.limits)
        self.clients: dict[int, Client] = {}
        self.left: list[Client] = []
        self.under_way: list[Batch] = []
        self.last_batches: dict[int, Batch] = {}
        self.log: list[Batch] = []
        self.next_id = 0
        self.restarts = 0
        self.prefixes = [self._random_tokens(self.random.choice([4, 20, 40])) for _ in range(3)]

    def _random_tokens(self, count: int) -> tuple[int, ...]:
        return tuple(self.random.randrange(3) for _ in range(count))

    def run(self, num_events: int) -> None:
        """Random events, and then whatever is left to its end."""
        events = [self.add] * 4 + [self.schedule] * 8 + [self.complete] * 7 + [self.abort]
        for _ in range(num_events):
            self.random.choice(events)()
            self.check_accounts()
            if self.random.random() < 0.003:
                self.clear()
        self.drain()

    def drain(self) -> None:
        work = sum(len(client.prompt) + client.budget for client in self.clients.values())
        # Without preemption a step is a token at most; with it the earliest sequence still gets on at every second one.
        for _ in range(40 + 4 * work * (1 + len(self.clients))):
            if not self.scheduler.has_unfinished:
                break
            self.schedule()
            self.complete()
            self.check_accounts()
        self._check_the_end()

    def _check_the_end(self) -> None:
        scheduler = self.scheduler
        expect(not scheduler.has_unfinished and not self.under_way, "it does not come to an end")
        expect(not self.clients, f"sequences {sorted(self.clients)} were lost")
        expect(all(client.ends == 1 for client in self.left), "a sequence ended twice")
        expect((scheduler.num_running, scheduler.num_waiting) == (0, 0), "something still runs or waits")
        expect(scheduler.used_pages == scheduler.cached_pages, "pages are held by nobody")
        expect(scheduler.schedule() is None, "a batch of nothing")

    # What may happen

    def add(self) -> None:
        for _ in range(self.random.choice([1, 1, 1, 4])):
            self._add_one()

    def _add_one(self) -> None:
        limit = self.scheduler.max_length
        prompt = self.random.choice(self.prefixes) + self._random_tokens(self.random.randrange(1, 9))
        if self.clients and self.random.random() < 0.3:
            prompt = self.random.choice(list(self.clients.values())).prompt
        if self.left and self.random.random() < 0.2:
            prompt = tuple(self.random.choice(self.left).tokens) + self._random_tokens(2)
        prompt = prompt[: self.random.choice([limit - 1, limit - 1, limit // 2, 1 + limit // 20])] or (0,)
        client = Client(
            sequence_id=self.next_id,
            prompt=prompt,
            budget=self.random.choice([1, 2, 5, 12, 30]),
            prompt_logits=self.random.random() < 0.2,
            adapter=self.adapters[(self.next_id // 2) % len(self.adapters)],
            tokens=list(prompt),
        )
        self.next_id += 1
        self.clients[client.sequence_id] = client
        self.scheduler.add(client.sequence_id, prompt, prompt_logits=client.prompt_logits, adapter=client.adapter)

    def abort(self) -> None:
        if self.clients:
            sequence_id = self.random.choice(list(self.clients))
            self.scheduler.abort(sequence_id)
            self.scheduler.abort(sequence_id)
            self._end(sequence_id)

    def clear(self) -> None:
        expect(self.scheduler.clear() == tuple(self.clients), "clear() names other sequences than those unfinished")
        self.under_way.clear()
        self.last_batches.clear()
        for sequence_id in list(self.clients):
            self._end(sequence_id)
        self.store = SlotStore(self.limits)
        expect(self.scheduler.used_pages == 0, "pages are held after clear()")

    def schedule(self) -> None:
        before = Snapshot(self.scheduler)
        batch = self.scheduler.schedule()
        self._check_preemptions(before)
        if batch is None:
            stuck = self.scheduler.has_unfinished and not self.under_way
            expect(not stuck, "nothing is under way, and nothing is scheduled")
            return
        expect(all(batch.group != other.group for other in self.under_way), "two batches of one group are under way")
        self._check_turn(batch, before)
        if isinstance(batch, Prefill):
            self._check_prefill(batch)
        else:
            self._check_decode(batch)
        self._count_passed_over(batch)
        self.under_way.append(batch)
        self.last_batches[batch.group] = batch
        self.log.append(batch)

    def complete(self) -> None:
        if not self.under_way:
            return
        batch = self.under_way.pop(self.random.randrange(len(self.under_way)))
        self.store.run(batch)
        self._check_store(batch)
        tokens: dict[int, int] = {}
        finished: set[int] = set()
        wanted = self.scheduler.sequences_to_sample(batch)
        expect(len(set(wanted)) == len(wanted), "a sequence is sampled twice")
        expect(set(wanted) == self._expected_to_sample(batch), "other sequences are sampled than those that are whole")
        for sequence_id in wanted:
            client = self.clients[sequence_id]
            client.tokens.append((sequence_id * 7 + len(client.tokens) ** 2) % 3)
            tokens[sequence_id] = client.tokens[-1]
            spent = len(client.tokens) - len(client.prompt) >= client.budget
            if spent or len(client.tokens) >= self.scheduler.max_length or self.random.random() < 0.02:
                finished.add(sequence_id)
        self.scheduler.complete(batch, tokens, finished)
        for sequence_id in finished:
            client = self.clients[sequence_id]
            positions = list(range(len(client.prompt))) if client.prompt_logits else []
            expect(client.delivered == positions, f"logits of the prompt behind {client.delivered}")
            self._end(sequence_id)

    def _end(self, sequence_id: int) -> None:
        client = self.clients.pop(sequence_id)
        client.ends += 1
        self.left.append(client)

    # What must hold

    def _check_prefill(self, batch: Prefill) -> None:
        size, slots = batch.num_tokens, {piece.slot for piece in batch.pieces}
        expect(0 < size <= self.limits.prefill_chunk_size, f"{size} tokens in a prefill")
        expect(len(slots) == len(batch.pieces), "two prompts in one slot")
        expect(len(slots) == 1 or self.limits.prompts_together, "several prompts in a prefill")
        for piece in batch.pieces:
            whole = piece.start == 0 and len(piece.tokens) == len(self.clients[piece.sequence_id].tokens)
            expect(whole or len(slots) == 1, "a part of a prompt beside another")
            self._check_piece(piece, batch.group)
        if self.limits.prefix_caching:
            self._check_unlike(batch.pieces)

    def _check_unlike(self, pieces: Sequence[Piece]) -> None:
        """No sequence would have found much of its prompt if it had waited for the others."""
        for index, piece in enumerate(pieces):
            reusable = len(piece.tokens) - LEAST_CHUNK
            for other in pieces[:index]:
                same = piece.tokens[:WORTH_A_COPY] == other.tokens[:WORTH_A_COPY] and piece.adapter is other.adapter
                expect(not same or reusable < WORTH_A_COPY, "two prompts that begin alike in a prefill")

    def _check_piece(self, piece: Piece, group: int) -> None:
        expect(piece.sequence_id in self.clients, "a sequence runs that has left")
        client = self.clients[piece.sequence_id]
        if client.starts == 0:
            self._check_order(client)
            found = self.scheduler.num_cached_tokens(piece.sequence_id)
            expect(found == piece.start or self.scheduler.num_preemptions > 0, "the cached tokens are not those used")
        if client.starts == 0 or piece.start != client.stepped or client.group != group:
            self.restarts += client.starts > 0
            client.starts += 1
        expect(self.restarts <= self.scheduler.num_preemptions, "a sequence starts again that was not preempted")
        expect(list(piece.tokens) == client.tokens[piece.start : piece.end], "other tokens than the sequence's")
        if self.limits.prefill_chunk_size > LEAST_CHUNK and not self._is_replay(client, piece):
            expect(len(piece.tokens) >= LEAST_CHUNK or piece.start == 0, f"a single token behind {piece.start}")
        client.stepped, client.group = piece.end, group
        if piece.logits == "all":
            client.delivered += range(piece.start, piece.end)
            inside = client.prompt_logits and piece.end <= len(client.prompt)
            expect(inside, "logits behind tokens that are not the prompt's")
        else:
            expect((piece.logits == "last") == (piece.end == len(client.tokens)), f"{piece.logits} of the logits")

    def _is_replay(self, client: Client, piece: Piece) -> bool:
        """Whether the piece has one of the tokens that the sequence generated, and no more."""
        return self.limits.batch_invariant and len(client.prompt) <= piece.start == piece.end - 1

    def _check_order(self, client: Client) -> None:
        """First come, first served: earlier sequences that have not started are about to start in other groups."""
        earlier = {one.sequence_id for one in self.clients.values() if one.sequence_id < client.sequence_id}
        passed_over = {sequence_id for sequence_id in earlier if self.clients[sequence_id].starts == 0}
        expect(not passed_over & Snapshot(self.scheduler).waiting, f"{passed_over} came earlier and wait")
        groups = [
            running & passed_over for running in map(Snapshot(self.scheduler).running_in, range(self.limits.num_groups))
        ]
        expect(sum(map(bool, groups)) < self.limits.num_groups, f"{passed_over} came earlier")

    def _check_decode(self, batch: Decode) -> None:
        expect(0 < len(batch.rows) <= self.limits.slots_per_group, f"{len(batch.rows)} rows")
        for row in batch.rows:
            expect(row.sequence_id in self.clients, "a sequence runs that has left")
            client = self.clients[row.sequence_id]
            expect(client.group == batch.group, "a sequence is decoded in another group than it was prefilled in")
            expect(row.start == client.stepped == len(client.tokens) - 1, f"{row} does not follow {client.stepped}")
            expect(row.token == client.tokens[-1], f"{row}: expected the token {client.tokens[-1]}")
            client.stepped += 1
        pages = sum(-(-(row.start + 1) // self.limits.page_size) for row in batch.rows)
        expect(pages <= self.limits.num_pages, "one batch has more pages than there are")

    def _check_turn(self, batch: Batch, before: Snapshot) -> None:
        """Prefills and decodes alternate while both are possible."""
        last = self.last_batches.get(batch.group)
        if last is None or self.scheduler.num_preemptions != before.num_preemptions:
            return
        if isinstance(last, Prefill) and isinstance(batch, Prefill):
            expect(not before.decoding[batch.group], "a second prefill while others want to decode")
        if isinstance(last, Decode) and isinstance(batch, Decode):
            expect(not before.prefilling[batch.group], "a second decode while a prompt is half prefilled")
            expect(not self._head_fits(len(batch.rows)), "a second decode while there is room for a prompt")

    def _head_fits(self, num_decoding: int) -> bool:
        """Whether the first of those that wait would have a slot beside so many others, and pages."""
        waiting = self.scheduler._waiting
        if not waiting or num_decoding == self.limits.slots_per_group:
            return False
        free = self.limits.num_pages - self.scheduler.used_pages + self.scheduler.cached_pages
        return -(-(len(waiting[0].tokens) + 1) // self.limits.page_size) <= free

    def _count_passed_over(self, batch: Batch) -> None:
        members = set(_members(batch))
        after = Snapshot(self.scheduler)
        for sequence_id in after.running_in(batch.group):
            client = self.clients.get(sequence_id)
            if client is not None:
                client.passed_over = 0 if sequence_id in members else client.passed_over + 1
                expect(client.passed_over <= 1, f"sequence {sequence_id} starves in group {batch.group}")

    def _check_preemptions(self, before: Snapshot) -> None:
        """Only the latest of those that run in idle groups give way."""
        after = Snapshot(self.scheduler)
        busy = {batch.group for batch in self.under_way}
        idle = [group for group in range(self.limits.num_groups) if group not in busy]
        victims = after.waiting - before.waiting
        for sequence_id in victims & set(self.clients):
            self.clients[sequence_id].passed_over = 0
        staying = {sequence_id for group in idle for sequence_id in after.running_in(group)}
        if victims and staying:
            expect(min(victims) > max(staying), f"{victims} are preempted, and {staying} stay")

    def _expected_to_sample(self, batch: Batch) -> set[int]:
        if isinstance(batch, Decode):
            return {row.sequence_id for row in batch.rows} & set(self.clients)
        clients = (self.clients.get(piece.sequence_id) for piece in batch.pieces)
        return {client.sequence_id for client in clients if client and client.stepped == len(client.tokens)}

    def _check_store(self, batch: Batch) -> None:
        """What a sequence's slot has after a batch is the sequence, from its first token to the last one stepped."""
        slots = self.store.slots[batch.group]
        if isinstance(batch, Prefill):
            seats = {piece.sequence_id: piece.slot for piece in batch.pieces}
        else:
            seats = {row.sequence_id: index for index, row in enumerate(batch.rows)}
        for sequence_id, index in seats.items():
            client = self.clients.get(sequence_id)
            if client is not None:
                found = [token for token, _, _ in slots[index]]
                expect(found == client.tokens[: client.stepped], f"slot {index} is not sequence {sequence_id}")
                own = all(adapter is client.adapter for _, _, adapter in slots[index])
                expect(own, f"slot {index} has KV of another adapter than sequence {sequence_id}'s")
                if self.limits.batch_invariant:
                    self._check_steps(client, [alone for _, alone, _ in slots[index]])

    def _check_steps(self, client: Client, alone: list[bool]) -> None:
        """Each token was computed as it is if nobody else is served: the prompt in chunks, the others one by one."""
        length = len(client.prompt)
        expect(all(alone[length:]), f"generated tokens of sequence {client.sequence_id} were computed together")
        if length >= LEAST_CHUNK < self.limits.prefill_chunk_size:
            expect(not any(alone[:length]), f"a token of the prompt of sequence {client.sequence_id} came alone")

    def check_accounts(self) -> None:
        """Pages are those of the sequences that run and of what free slots keep, neither more nor fewer."""
        scheduler = self.scheduler
        held, cached = recount(scheduler)
        expect(scheduler.used_pages == held + cached, f"{scheduler.used_pages} pages used, counted {held} + {cached}")
        expect(scheduler.cached_pages == cached, f"{scheduler.cached_pages} pages cached, counted {cached}")
        expect(scheduler.used_pages <= self.limits.num_pages, f"{scheduler.used_pages} pages used")
        if not self.limits.prefix_caching:
            expect(cached == 0, "free slots keep tokens though prefix caching is off")
        dropped = scheduler.num_running + scheduler.num_waiting - len(self.clients)
        expect(0 <= dropped <= sum(len(_members(batch)) for batch in self.under_way), "sequences are lost, or live on")


class Snapshot:
    """Who waits and who runs where: read from the scheduler's own books."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.num_preemptions = scheduler.num_preemptions
        self.waiting = {sequence.sequence_id for sequence in scheduler._waiting}
        self.decoding = [{sequence.sequence_id for sequence in group.decoding} for group in scheduler._groups]
        self.prefilling = [{sequence.sequence_id for sequence in group.prefilling} for group in scheduler._groups]

    def running_in(self, group: int) -> set[int]:
        return self.decoding[group] | self.prefilling[group]


def recount(scheduler: Scheduler) -> tuple[int, int]:
    """Pages of sequences that run, and of free slots, from what is in the slots and what is under way."""
    held = cached = 0
    size = scheduler.limits.page_size
    for group in scheduler._groups:
        for slot in group.slots:
            if slot.owner is None:
                cached += -(-slot.length // size)
                continue
            steps = {row.sequence_id for row in group.under_way.rows} if isinstance(group.under_way, Decode) else set()
            length = slot.length + (slot.owner.sequence_id in steps)
            if slot.owner in group.prefilling:
                length = len(slot.owner.tokens) + 1
            # A sequence that was prefilled and not stepped since still has the page of its next token.
            fewest, most = -(-length // size), -(-(len(slot.owner.tokens) + 1) // size)
            expect(fewest <= slot.owner.pages <= most, f"{slot.owner.pages} pages held, expected {fewest} to {most}")
            held += slot.owner.pages
    return held, cached


def _members(batch: Batch) -> list[int]:
    parts: Sequence[Piece | Row] = batch.pieces if isinstance(batch, Prefill) else batch.rows
    return [one.sequence_id for one in parts]


def random_limits(rng: random.Random) -> SchedulerLimits:
    """Limits under which slots, pages and lengths all run out now and then."""
    page_size = rng.choice([1, 2, 3, 4, 8, 16])
    max_length = rng.choice([3, 12, 40, 64, 64])
    least = -(-max_length // page_size)
    limits = SchedulerLimits(
        num_groups=rng.choice([1, 1, 2, 3]),
        slots_per_group=rng.choice([1, 2, 3, 4, 6]),
        num_pages=rng.choice([max(1, least - 1), least, least + 1, 3 * least // 2, 2 * least, 3 * least, 20 * least]),
        page_size=page_size,
        max_length=max_length,
        prefill_chunk_size=rng.choice([1, 3, 7, 16, 64]),
        prefix_caching=rng.random() < 0.8,
        prompts_together=rng.random() < 0.8,
    )
    bits_matter = rng.random() < 0.4 and (limits.prefill_chunk_size > LEAST_CHUNK or not limits.prefix_caching)
    return replace(limits, batch_invariant=bits_matter)


def run_trace(seed: int, make: MakeScheduler = Scheduler) -> Machine:
    """One random trace, checked all the way; every second one has sequences with adapters."""
    machine = Machine(make, random.Random(seed), adapters=seed % 2 == 1)
    machine.run(num_events=machine.random.choice([20, 60, 200]))
    return machine
