"""Have engines take turns: only one computes at a time, who goes first changes, and who fails is left out by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

from benchmarks.peers.contenders import FLOAT32, Contender
from benchmarks.peers.protocol import Generation, Loaded, Tokens
from benchmarks.peers.worker import WorkerError

DECODED = 64
"""Tokens of a completion that are timed, behind the first one."""
AT_ONCE_TOKENS = 33
"""Of each completion, where several prompts are completed at once."""
EIGHT, FOUR = 8, 4
"""Prompts whose first tokens and whose steps behind these are timed, and prompts that are completed at once beside all
of them."""
_LEAST_AGREEING = 0.5


class Asked(Protocol):
    """An engine's process; see `Worker`, whose methods these are."""

    def load(self, prompt: Sequence[int]) -> Loaded:
        """Loads the model, up to the first token behind `prompt`."""
        ...

    def generate(self, prompts: Tokens, count: int) -> Generation:
        """Completes each of `prompts` with `count` tokens."""
        ...

    def peak_nbytes(self) -> int:
        """The most memory that it has had so far."""
        ...

    def close(self) -> None:
        """May be called more than once."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompts:
    """What is asked, in token ids: equally long prompts for `at_once`, and some of any length to compare tokens on."""

    decode: list[int]
    prefill: list[int]
    at_once: Tokens
    compared: Tokens
    compared_count: int
    decoded: int = DECODED
    at_once_tokens: int = AT_ONCE_TOKENS


@dataclass(slots=True, kw_only=True)
class Measured:
    """What was found out about one contender; a figure of tokens per second for each round."""

    contender: Contender
    loaded: Loaded
    decode: list[float] = field(default_factory=list)
    prefill: list[float] = field(default_factory=list)
    first: list[float] = field(default_factory=list)
    eight: list[float] = field(default_factory=list)
    four: list[float] = field(default_factory=list)
    at_once: list[float] = field(default_factory=list)
    agreeing: int = 0
    """Of the compared tokens, how many come before a prompt's first difference from those of the class's first."""
    peak_nbytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Results:
    """Who was measured, and why the others were not, by name."""

    measured: list[Measured]
    skipped: dict[str, str]
    compared: int
    """Tokens that each was compared on."""


@dataclass(slots=True, kw_only=True)
class _Running:
    asked: Asked
    measured: Measured


class Comparison:
    """One numeric class under way.

    Args:
        start: makes the process of a contender.
        prompts: what is asked.
        say: is told what is being done.
    """

    def __init__(
        self, start: Callable[[Contender], Asked], prompts: Prompts, *, say: Callable[[str], None] = lambda _: None
    ) -> None:
        self._start = start
        self._prompts = prompts
        self._say = say
        self._running: dict[str, _Running] = {}
        self._skipped: dict[str, str] = {}
        self._stack = ExitStack()

    def run(self, contenders: Sequence[Contender], rounds: int) -> Results:
        """Loads everyone, compares tokens, measures for so many rounds after one that does not count, and ends all."""
        with self._stack:
            for contender in contenders:
                self._load(contender)
            self._compare()
            for number in range(rounds + 1):
                self._say(f"round {number} of {rounds}" if number else "a round that does not count")
                self._round(number)
            self._each(list(self._running), self._remember_peak)
        return Results(
            measured=[one.measured for one in self._running.values()],
            skipped=self._skipped,
            compared=self._prompts.compared_count * len(self._prompts.compared),
        )

    def _load(self, contender: Contender) -> None:
        self._say(f"load {contender.name}")
        try:
            asked = self._start(contender)
        except OSError as error:
            self._skip(contender.name, f"not installed ({error})")
            return
        self._stack.callback(asked.close)
        try:
            loaded = asked.load(self._prompts.compared[0])
        except WorkerError as error:
            self._skip(contender.name, str(error))
            return
        self._running[contender.name] = _Running(asked=asked, measured=Measured(contender=contender, loaded=loaded))

    def _compare(self) -> None:
        """Counts the tokens that are like those of the first; who differs in float32 does not run this model."""
        found: dict[str, list[int]] = {}

        def ask(one: _Running) -> None:
            self._say(f"compare tokens of {one.measured.contender.name}")
            count = self._prompts.compared_count
            answers = [one.asked.generate([prompt], count).tokens[0] for prompt in self._prompts.compared]
            reference = found.setdefault("", [token for tokens in answers for token in tokens])
            references = [reference[start : start + count] for start in range(0, len(reference), count)]
            one.measured.agreeing = sum(map(agreeing, answers, references))
            if one.measured.contender.numbers == FLOAT32 and one.measured.agreeing < _LEAST_AGREEING * len(reference):
                told = f"{one.measured.agreeing} of {len(reference)} tokens are like those of the first, in float32"
                raise WorkerError(f"does not give the model's text: only {told}")

        self._each(list(self._running), ask)

    def _round(self, number: int) -> None:
        order = list(self._running)[:: 1 if number % 2 else -1]
        for measure in (self._decode, self._prefill, self._eight, self._four, self._at_once):
            self._each(order, partial(measure, number=number))

    def _decode(self, one: _Running, number: int) -> None:
        decoded = self._prompts.decoded
        found = one.asked.generate([self._prompts.decode], decoded + 1)
        _note(one.measured.decode, decoded / (found.seconds - found.first_seconds), number)

    def _prefill(self, one: _Running, number: int) -> None:
        found = one.asked.generate([self._prompts.prefill], 1)
        _note(one.measured.prefill, len(self._prompts.prefill) / found.first_seconds, number)

    def _eight(self, one: _Running, number: int) -> None:
        prompts, count = self._prompts.at_once[:EIGHT], self._prompts.at_once_tokens
        found = one.asked.generate(prompts, count)
        _note(one.measured.first, sum(map(len, prompts)) / found.first_seconds, number)
        behind = len(prompts) * (count - 1)
        _note(one.measured.eight, behind / (found.seconds - found.first_seconds), number)

    def _four(self, one: _Running, number: int) -> None:
        _note(one.measured.four, self._completed(one, self._prompts.at_once[:FOUR]), number)

    def _at_once(self, one: _Running, number: int) -> None:
        _note(one.measured.at_once, self._completed(one, self._prompts.at_once), number)

    def _completed(self, one: _Running, prompts: Tokens) -> float:
        """Tokens per second where all prompts are completed at once."""
        count = self._prompts.at_once_tokens
        return len(prompts) * count / one.asked.generate(prompts, count).seconds

    def _remember_peak(self, one: _Running) -> None:
        one.measured.peak_nbytes = one.asked.peak_nbytes()

    def _each(self, names: Sequence[str], ask: Callable[[_Running], None]) -> None:
        for name in names:
            if name in self._running:
                try:
                    ask(self._running[name])
                except WorkerError as error:
                    self._skip(name, str(error))

    def _skip(self, name: str, reason: str) -> None:
        self._say(f"{name} is left out: {reason}")
        self._skipped[name] = reason
        left = self._running.pop(name, None)
        if left is not None:
            left.asked.close()  # at once: what hangs may be computing


def agreeing(tokens: Sequence[int], reference: Sequence[int]) -> int:
    """How many tokens come before the first difference."""
    for index, (one, other) in enumerate(zip(tokens, reference, strict=True)):
        if one != other:
            return index
    return len(tokens)


def _note(figures: list[float], figure: float, number: int) -> None:
    if number:
        figures.append(figure)


def merged(results: Mapping[str, Results]) -> set[str]:
    """The peers that were measured in any class."""
    return {one.contender.peer for found in results.values() for one in found.measured}
