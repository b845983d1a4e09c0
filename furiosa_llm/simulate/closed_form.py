"""The steady state of a server in closed form: what `--search` asks of hundreds of placements.

Every sequence decodes once a round; in between, prompts of others are computed. The clock (`clock.py`) does the same
step by step with the product's scheduler, and sees queues and the spread over requests, which this does not.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from furiosa_llm.simulate.errors import LoadError, PlacementError
from furiosa_llm.simulate.steps import CAUSES, Steps, Work

_ROUNDS = 60
_BUBBLE = 0.8
"""How much of the time by which a prompt takes longer than a decode is lost on stages that wait for it, times the share
of the other stages: found by comparison with the clock (`tests/simulate/test_clock.py`)."""
Kind = Literal["closed", "open", "static", "max"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What is asked of all replicas together."""

    kind: Kind
    """`closed`: so many users, each with one request after the other. `open`: so many requests a second. `static`: so
    many prompts at once, and nothing more until all have ended. `max`: as many as there is room for."""
    amount: float
    """Users, requests a second, or prompts; of no meaning for `max`."""
    input_len: float
    output_len: float

    def __post_init__(self) -> None:
        for name, least in (("input_len", 1), ("output_len", 1)):
            if getattr(self, name) < least:
                raise LoadError(f"{name} is {getattr(self, name):g}, expected at least {least}")
        if self.kind != "max" and not 0 < self.amount < float("inf"):
            raise LoadError(f"the {self.kind} load is {self.amount:g}, expected a number above 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """Times in seconds."""

    ttft: float
    tpot: float
    e2e: float
    output_tps: float
    """Tokens a second of all replicas, counting completions alone."""
    concurrency: float
    """Requests under way at once, in all replicas."""
    most_concurrency: float
    """As many as there is room for."""
    saturated: bool
    """More is asked for than is done: an open load has a queue that grows."""
    causes: dict[str, float]
    """The seconds of `tpot` by cause; `prefill` is what prompts of others take."""


def estimate(steps: Steps, load: Load) -> Estimate:
    """The steady state. Raises PlacementError if not even one sequence fits."""
    replicas = steps.placement.data_parallel_size
    most = most_sequences(steps, load.input_len + load.output_len)
    if load.kind == "static":
        return _static(steps, load, most)
    if load.kind == "open":
        return _open(steps, load, most)
    asked = most if load.kind == "max" else load.amount / replicas
    return _closed(steps, load, min(asked, most), most, saturated=asked > most)


def most_sequences(steps: Steps, length: float) -> float:
    """How many sequences of `length` one replica runs at once. Raises PlacementError if not even one fits."""
    check_room(steps, length)
    return min(steps.cache_tokens() / length, steps.software.max_sequences.value)


def check_room(steps: Steps, length: float) -> None:
    """Raise PlacementError unless a sequence of `length` fits, which says what is missing."""
    if (short := shortage(steps, length)) is not None:
        raise PlacementError(short)


def shortage(steps: Steps, length: float) -> str | None:
    """What a sequence of `length` lacks, in words; None if it fits."""
    room = steps.cache_tokens()
    if room >= length:
        return None
    short = (
        f"the weights need {steps.missing_nbytes() / 1e9:.2f} GB more on a PE"
        if room < 0
        else f"there is room for {room:,} tokens of cache, and one sequence has {length:,.0f}"
    )
    return f"the model does not fit at {steps.placement}: {short}"


def _round(steps: Steps, rows: float, length: float) -> dict[str, float]:
    """The seconds by cause until every one of `rows` sequences has a token more, stages overlapped."""
    stages = len(steps.counts)
    work = steps.decode(max(rows / stages, 1.0), length)
    path, slowest = (dict.fromkeys(CAUSES, 0.0) for _ in range(2))
    for stage, count in steps.stages.items():
        one = steps.causes(work, stage)
        path = {cause: path[cause] + count * one[cause] for cause in CAUSES}
        slowest = max(slowest, one, key=lambda causes: sum(causes.values()))
    path["links"] = steps.longest_way.all(work.tokens)
    full = {cause: min(stages, rows) * seconds for cause, seconds in slowest.items()}
    return max(path, full, key=lambda causes: sum(causes.values()))


def _prefill(steps: Steps, input_len: float, rows: float, length: float, at_once: float) -> float:
    """The seconds that one prompt takes of the slowest stage, beside `rows` that decode; `at_once` prompts a step."""
    chunk = steps.software.chunk.value
    together = max(1.0, min(at_once, chunk / input_len))
    seconds, past = 0.0, 0.0
    size = min(chunk, input_len)
    while past < input_len:
        new = min(size, input_len - past)
        seconds += _prompt_seconds(steps, new * together, past, together, rows, length)
        past += new
    return seconds / together


def _hops(steps: Steps, input_len: float) -> float:
    """Of a prompt's last chunk from host to host; those before it are on their way while stages compute."""
    return steps.longest_way.all(min(steps.software.chunk.value, input_len))


def _prompt_seconds(steps: Steps, new: float, past: float, prompts: float, rows: float, length: float) -> float:
    one = steps.prefill(new / prompts, past)
    work = Work(
        tokens=new,
        rows=prompts,
        positions=one.positions * prompts,
        pairs=one.pairs * prompts,
        length=one.length,
    )
    stages = steps.stages
    if not steps.software.mixed.value or rows < 1:
        return max(steps.seconds(work, stage) for stage in stages)
    decode = steps.decode(rows / len(steps.counts), length)
    both = work + decode
    return max(steps.seconds(both, stage) - steps.seconds(decode, stage) for stage in stages)


def _closed(steps: Steps, load: Load, users: float, most: float, *, saturated: bool) -> Estimate:
    """`users` of one replica; while one decodes, each of the others has a prompt computed once."""
    replicas, rounds = steps.placement.data_parallel_size, max(load.output_len - 1, 0.0)
    length = load.input_len + load.output_len / 2
    asked = load.amount / replicas if load.kind == "closed" else users
    per_round = users / max(load.output_len, 1.0)
    causes = _round(steps, users, length)
    decode = sum(causes.values())
    stages = len(steps.counts)
    one = _prefill(steps, load.input_len, 0.0, length, 1.0)
    hops = _hops(steps, load.input_len)
    alone = one * stages + hops  # through all, each as slow as the slowest
    beside = one * stages
    if users > 1:
        beside = _prefill(steps, load.input_len, users - 1, length, per_round)
        beside += _BUBBLE * (1 - 1 / stages) * max(beside - (decode - causes["links"]) / stages, 0.0)
    own = beside + hops + (decode if users > 1 and steps.software.mixed.value else 0.0)
    others = max(users - 1, 0.0) * beside
    waiting = min(others, others * beside / max(rounds * decode + others + own, 1e-12))
    half = decode / 2 if users > 1 else 0.0
    ttft = steps.software.request_time.value + max(alone, own) + half + waiting
    tpot = decode + (others / rounds if rounds else 0.0)
    e2e = ttft + rounds * tpot
    queue = max(asked / users - 1, 0.0) * e2e
    return Estimate(
        ttft=ttft + queue,
        tpot=tpot,
        e2e=e2e + queue,
        output_tps=replicas * users * load.output_len / e2e,
        concurrency=users * replicas,
        most_concurrency=most * replicas,
        saturated=saturated,
        causes={**causes, "prefill": tpot - decode},
    )


def _open(steps: Steps, load: Load, most: float) -> Estimate:
    """As many users as are under way at the rate, by Little's law."""
    replicas = steps.placement.data_parallel_size
    rate, low, high = load.amount / replicas, 0.0, most

    def at(users: float) -> Estimate:
        return _closed(steps, replace(load, kind="closed", amount=users * replicas), users, most, saturated=False)

    full = at(most)
    if full.output_tps / replicas / load.output_len < rate:
        return replace(full, saturated=True)
    for _ in range(_ROUNDS):
        middle = (low + high) / 2
        low, high = (middle, high) if rate * at(middle).e2e > middle else (low, middle)
    found = at(max(high, 1e-6))
    return replace(found, output_tps=load.amount * load.output_len)


def _static(steps: Steps, load: Load, most: float) -> Estimate:
    """All prompts are computed, then all sequences decode until they end; waves where they do not fit at once."""
    replicas = steps.placement.data_parallel_size
    asked = load.amount / replicas
    waves = max(1.0, asked / most)
    users = asked / waves
    length = load.input_len + load.output_len / 2
    causes = _round(steps, users, length)
    decode, rounds = sum(causes.values()), max(load.output_len - 1, 0.0)
    prompts = users * _prefill(steps, load.input_len, 0.0, length, users) + (len(steps.counts) - 1) * _prefill(
        steps, load.input_len, 0.0, length, 1.0
    )
    prompts += _hops(steps, load.input_len)
    ttft = steps.software.request_time.value + prompts
    e2e = ttft + rounds * decode
    return Estimate(
        ttft=ttft,
        tpot=decode,
        e2e=e2e * waves,
        output_tps=replicas * users * load.output_len / e2e,
        concurrency=users * replicas,
        most_concurrency=most * replicas,
        saturated=waves > 1,
        causes={**causes, "prefill": 0.0},
    )
