"""What a replica runs at once: pieces of prompts, or the next token of several sequences, and the slots of their KV.

The KV cache of a replica lies in slots. Slots belong to a group, and one batch of a group is under way at a time; a
pipeline of several stages has as many groups, so that every stage has something to do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Literal, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from furiosa_llm.runtime.adapters.adapter import Adapter
from furiosa_llm.runtime.artifact.dtypes import Array

WantedLogits = Literal["none", "last", "all"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Companions:
    """How the bits of a row are kept from depending on other rows: with a copy of itself that nobody reads, mostly.

    `lone`: a sequence that is alone in a step of one token, through the whole model. `doubled`: every row, through the
    ops of these types alone: in a mixture of experts, an expert then has several rows whenever it has one. `apart`:
    rows of unlike adapters are not computed together.
    """

    lone: bool = False
    doubled: tuple[str, ...] = ()
    apart: bool = False


NO_COMPANIONS = Companions()


@dataclass(frozen=True, slots=True, kw_only=True)
class Copy:
    """The first `length` positions of slot `source` are copied to slot `target`, before the batch runs."""

    source: int
    target: int
    length: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """`tokens` of one sequence, whose first `start` tokens are in its `slot` already.

    `logits`: after which of these tokens they are wanted: none, the last one, or all of them.
    """

    sequence_id: int
    slot: int
    start: int
    tokens: tuple[int, ...]
    logits: WantedLogits
    adapter: Adapter | None = None

    @property
    def end(self) -> int:
        """How many of the sequence's tokens are in its slot once the batch has run."""
        return self.start + len(self.tokens)

    @property
    def wanted(self) -> range:
        """Behind which of `tokens` logits are wanted."""
        count = len(self.tokens)
        return range({"none": count, "last": count - 1, "all": 0}[self.logits], count)


@dataclass(frozen=True, slots=True, kw_only=True)
class Prefill:
    """A piece of one prompt, or several prompts from their beginnings to their ends."""

    group: int
    copies: tuple[Copy, ...]
    pieces: tuple[Piece, ...]

    @property
    def num_tokens(self) -> int:
        """The tokens of all pieces."""
        return sum(len(piece.tokens) for piece in self.pieces)


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One sequence in a decode batch: `token` is stepped after the `start` tokens that are in its slot."""

    sequence_id: int
    start: int
    token: int
    adapter: Adapter | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Decode:
    """One token of each of several sequences: `rows[i]` is in slot i, so that their slots are consecutive in memory."""

    group: int
    copies: tuple[Copy, ...]
    rows: tuple[Row, ...]


Batch = Prefill | Decode


def adapters_of(batch: Batch) -> list[Adapter]:
    """The adapters of a batch."""
    parts: Sequence[Piece | Row] = batch.pieces if isinstance(batch, Prefill) else batch.rows
    return list(dict.fromkeys(one.adapter for one in parts if one.adapter is not None))


def with_adapters(batch: Batch, other: Callable[[Adapter], Adapter]) -> Batch:
    """`batch` with what `other` gives in place of each adapter."""
    if not adapters_of(batch):
        return batch
    if isinstance(batch, Prefill):
        pieces = (p if p.adapter is None else replace(p, adapter=other(p.adapter)) for p in batch.pieces)
        return replace(batch, pieces=tuple(pieces))
    rows = (row if row.adapter is None else replace(row, adapter=other(row.adapter)) for row in batch.rows)
    return replace(batch, rows=tuple(rows))


@dataclass(frozen=True, slots=True, kw_only=True)
class Picked:
    """What a batch gave where of some rows no more is wanted than the likeliest token: those that `rows` marks."""

    rows: tuple[bool, ...]
    tokens: npt.NDArray[np.int32]
    """The likeliest token of each row that is marked."""
    greatest: npt.NDArray[np.float32]
    """Its logit."""
    logits: Array
    """The logits of the other rows, `[rows, vocabulary]`."""

    def place(self, row: int) -> int:
        """Where `row` is in what it is in: `tokens` and `greatest`, or `logits`."""
        return self.rows[:row].count(self.rows[row])


class Runner(Protocol):
    """The stages of one replica with their KV cache.

    Batches of one group are run in the order in which they are submitted. The result is the logits, `[rows,
    vocabulary]` in float32 or the model's own type, in memory that belongs to the group and is overwritten by its next
    batch: a row for every token whose logits a prefill wants, piece after piece, or for every
    row of a decode. A future that fails has a
    FuriosaLLMError; the runner is of no use then, but to be closed.
    """

    @property
    def num_groups(self) -> int:
        """How many batches may be under way at once, each of a group of its own."""
        ...

    def submit(self, batch: Batch) -> Future[Array]:
        """Starts `batch` and returns at once."""
        ...

    def close(self) -> None:
        """Ends the runner's threads or processes; what is under way fails."""
        ...


@runtime_checkable
class ReportsProgress(Protocol):
    """A runner that can say what it is doing, for the message about a batch that does not return."""

    def progress(self) -> str:
        """For instance "rank 3, segment 17, last collective allreduce_12"."""
        ...


@runtime_checkable
class ReportsFailure(Protocol):
    """A runner that can fail while nothing is under way, such as one with processes."""

    def watch(self, on_failure: Callable[[Exception], None]) -> None:
        """Has `on_failure` called with the error when the runner fails, at once if it has failed already."""
        ...


@runtime_checkable
class ReportsCounts(Protocol):
    """A runner that counts what its stages do."""

    def counts(self) -> npt.NDArray[np.int64]:
        """A row of counters for each stage, since the runner was made; see `runtime/execution/counters.py`."""
        ...


@runtime_checkable
class PicksTokens(Protocol):
    """A runner from which logits come a long way."""

    def submit_picking(self, batch: Batch, picks: Sequence[bool]) -> Future[Picked]:
        """As `submit`, with less of the rows that `picks` marks: one for each row of logits that `batch` gives."""
        ...
