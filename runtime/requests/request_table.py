"""The requests that one replica has: what the logits of a batch mean for them, and what goes to those who wait."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from furiosa_llm.runtime.artifact.dtypes import Array
from furiosa_llm.runtime.artifact.errors import FuriosaLLMError
from furiosa_llm.runtime.requests.outputs import FinishReason, RequestOutput
from furiosa_llm.runtime.requests.request import Request, SequenceRequest
from furiosa_llm.runtime.runners.batch import Batch, Picked, Prefill, Row
from furiosa_llm.runtime.tokens.sampler import Sampler, sample_rows, take_likeliest

Sink = Callable[[Sequence[tuple[int, RequestOutput]]], None]
"""Takes the outputs that a step made for it, each with its submission's key, on a replica's thread: it must return at
once, and not raise."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Submission:
    """A request on its way. `key` is its own in the engine, whatever its id is; its outputs go to `sink`."""

    key: int
    request: Request
    sink: Sink


@dataclass(frozen=True, slots=True, kw_only=True)
class Accepted:
    """What a batch gave. The ids are of sequences."""

    tokens: dict[int, int]
    """The token sampled for each sequence that goes on or has just finished."""
    finished: list[int]
    """The sequences of `tokens` that have finished with their token."""
    failed: list[int]
    """The sequences that ended because their request failed."""


_Owned = tuple[Submission, SequenceRequest]
"""A sequence, and the request that it belongs to."""


class RequestTable:
    """The requests of one replica, from `announce` until their last output is delivered.

    `announce`, `load` and `count` may be used from any thread, the rest by the replica's own only.
    """

    def __init__(self) -> None:
        self._submissions: dict[int, Submission] = {}
        self._running: dict[int, _Owned] = {}
        self._begun: set[int] = set()
        self._touched: dict[int, Submission] = {}
        self._errors: dict[int, FuriosaLLMError] = {}
        self._lock = threading.Lock()
        self._loads: dict[int, int] = {}
        self._load = 0

    @property
    def load(self) -> int:
        """The tokens of all requests: of their prompts, once for each sequence, and of their completions so far."""
        return self._load

    @property
    def count(self) -> int:
        """The requests that have not ended."""
        return len(self._loads)

    def announce(self, submission: Submission) -> None:
        """Counts a request that is on its way to the replica."""
        request = submission.request
        tokens = len(request.prompt_token_ids) * len(request.sequences)
        with self._lock:
            self._loads[submission.key] = tokens
            self._load += tokens

    def admit(self, submission: Submission) -> None:
        """Takes a request in; its sequences are known from now on."""
        self._submissions[submission.key] = submission
        for sequence in submission.request.sequences:
            self._running[sequence.sequence_id] = (submission, sequence)

    def unfinished(self) -> list[int]:
        """The keys of the requests that were admitted and have not ended."""
        return list(self._submissions)

    def begun(self) -> list[int]:
        """The keys of the requests of which a sequence has been in a batch."""
        return [key for key in self._submissions if key in self._begun]

    def waiting(self) -> list[Submission]:
        """The requests of which none has been in a batch, in the order in which they came."""
        return [submission for key, submission in self._submissions.items() if key not in self._begun]

    def begin(self, sequence_id: int, cached: int) -> None:
        """Notes that a sequence is in a batch, and for the outputs how many of its tokens were not computed again."""
        if sequence_id not in self._running:
            return
        submission, sequence = self._running[sequence_id]
        if submission.request.began is None:
            submission.request.began = time.monotonic()
        self._begun.add(submission.key)
        if sequence is submission.request.sequences[0]:
            submission.request.num_cached_tokens = cached

    def picks(self, batch: Batch) -> tuple[bool, ...]:
        """For each row of logits that `batch` gives, whether its likeliest token is all that is wanted of it."""
        if not isinstance(batch, Prefill):
            return tuple(self._takes_likeliest(row.sequence_id) for row in batch.rows)
        return tuple(
            piece.logits == "last" and self._takes_likeliest(piece.sequence_id)
            for piece in batch.pieces
            for _ in piece.wanted
        )

    def _takes_likeliest(self, sequence_id: int) -> bool:
        """Of a sequence that has ended nobody reads anything."""
        owned = self._running.get(sequence_id)
        return owned is None or (owned[1].sampler.takes_likeliest and not owned[1].wants_logits)

    def accept(self, batch: Batch, found: Array | Picked) -> Accepted:
        """Samples what `batch` was run for, and shows the tokens to their sequences.

        Sequences that ended meanwhile get no token. One whose logits cannot be sampled ends its own request alone.
        """
        logits = found.logits if isinstance(found, Picked) else found
        rows = self._prefilled(batch, found) if isinstance(batch, Prefill) else self._decoded(batch.rows)
        picked: list[tuple[int, _Owned]] = []
        if isinstance(found, Picked) and any(found.rows):
            picked = [(found.place(index), owned) for index, owned in rows if found.rows[index]]
            rows = [(found.place(index), owned) for index, owned in rows if not found.rows[index]]
        sampled, failed = self._sample(rows, logits)
        likeliest, failed_too = self._take_likeliest(picked, found) if isinstance(found, Picked) else ((), [])
        tokens: dict[int, int] = {}
        finished: list[int] = []
        with_logits = [*(logits[place] for place, _ in rows), *(None for _ in picked)]
        for (_, owned), token, row in zip([*rows, *picked], [*sampled, *likeliest], with_logits, strict=True):
            submission, sequence = owned
            sequence_id = sequence.sequence_id
            if token is None or sequence_id not in self._running:
                continue
            sequence.accept(token, row)
            tokens[sequence_id] = token
            self._touched[submission.key] = submission
            if sequence.finished:
                finished.append(sequence_id)
                del self._running[sequence_id]
        with self._lock:
            for _, (submission, sequence) in (*rows, *picked):
                if sequence.sequence_id in tokens:
                    self._loads[submission.key] += 1
                    self._load += 1
        return Accepted(tokens=tokens, finished=finished, failed=[*failed, *failed_too])

    def end(self, key: int, reason: FinishReason, error: FuriosaLLMError | None = None) -> list[int]:
        """Ends a request before its time; the ids of its sequences that ran, none if it has ended already."""
        submission = self._submissions.get(key)
        if submission is None:
            return []
        submission.request.abort(reason)
        self._touched[key] = submission
        if error is not None:
            self._errors[key] = error
        sequence_ids = [sequence.sequence_id for sequence in submission.request.sequences]
        return [sequence_id for sequence_id in sequence_ids if self._running.pop(sequence_id, None) is not None]

    def deliver(self) -> None:
        """Hands out what is new, all outputs for one sink at once, and forgets the requests that have ended."""
        outputs: dict[Sink, list[tuple[int, RequestOutput]]] = {}
        touched, self._touched = self._touched, {}
        for key, submission in touched.items():
            output = submission.request.output()
            error = self._errors.pop(key, None)
            if output is not None:
                shown = output if error is None else replace(output, error=error)
                outputs.setdefault(submission.sink, []).append((key, shown))
            if submission.request.finished:
                del self._submissions[key]
                self._begun.discard(key)
                with self._lock:
                    self._load -= self._loads.pop(key)
        for sink, several in outputs.items():
            sink(several)

    def _prefilled(self, batch: Prefill, given: Array | Picked) -> list[tuple[int, _Owned]]:
        """The rows to sample from."""
        found: list[tuple[int, _Owned]] = []
        end = 0
        for piece in batch.pieces:
            first, end = end, end + len(piece.wanted)
            owned = self._running.get(piece.sequence_id)
            if owned is None or piece.logits == "none":
                continue
            submission, sequence = owned
            if piece.logits == "all":
                logits, place = (given.logits, given.place(first)) if isinstance(given, Picked) else (given, first)
                sequence.accept_prompt_logits(piece.start, logits[place : place + end - first])
                if piece.end < len(submission.request.prompt_token_ids) + len(sequence.token_ids):
                    continue
            found.append((end - 1, owned))
        return found

    def _decoded(self, rows: Iterable[Row]) -> list[tuple[int, _Owned]]:
        pairs = ((index, self._running.get(row.sequence_id)) for index, row in enumerate(rows))
        return [(index, owned) for index, owned in pairs if owned is not None]

    def _sample(self, rows: Sequence[tuple[int, _Owned]], logits: Array) -> tuple[Sequence[int | None], list[int]]:
        """A token for each row, None for a row without one, and the sequences that failed by it."""
        if not rows:
            return (), []
        indices = [index for index, _ in rows]
        chosen = logits if len(indices) == len(logits) else logits[indices]
        try:
            return sample_rows([sequence.sampler for _, (_, sequence) in rows], chosen), []
        except FuriosaLLMError:
            return self._one_by_one(rows, lambda at, sampler: sample_rows([sampler], logits[at : at + 1])[0])

    def _take_likeliest(
        self, rows: Sequence[tuple[int, _Owned]], found: Picked
    ) -> tuple[Sequence[int | None], list[int]]:
        """As `_sample`, of rows whose likeliest token is known."""
        return self._one_by_one(
            rows,
            lambda place, sampler: take_likeliest(sampler, int(found.tokens[place]), float(found.greatest[place])),
        )

    def _one_by_one(
        self, rows: Sequence[tuple[int, _Owned]], draw: Callable[[int, Sampler], int | None]
    ) -> tuple[Sequence[int | None], list[int]]:
        """As `_sample`, each row by itself, by `draw` of its place and its sequence's sampler."""
        tokens: list[int | None] = []
        failed: list[int] = []
        for place, (submission, sequence) in rows:
            try:
                tokens.append(draw(place, sequence.sampler))
            except FuriosaLLMError as error:
                tokens.append(None)
                failed += self.end(submission.key, "error", error)
        return tokens, failed
