"""What a benchmark asks of a model: prompts of a length, or of a dataset, and when each is due."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from furiosa_llm.runtime.errors import ContextLengthError, InputError


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One request. `prompt_token_ids` is its prompt, `max_tokens` what is generated at most."""

    prompt_token_ids: tuple[int, ...]
    max_tokens: int


def random_jobs(
    count: int,
    *,
    input_len: int,
    output_len: int,
    range_ratio: float = 0.0,
    vocab_size: int,
    excluded: frozenset[int] = frozenset(),
    seed: int = 0,
) -> list[Job]:
    """`count` jobs of random tokens, all of these lengths, or each between (1 - range_ratio) and 1 times of them.

    Tokens are drawn evenly from those below `vocab_size` that are not `excluded`. The same seed gives the same jobs.
    """
    usable = np.setdiff1d(np.arange(vocab_size), np.fromiter(excluded, dtype=np.int64, count=len(excluded)))
    if not usable.size:
        raise InputError(f"no token of the {vocab_size} of the vocabulary may be used; give a dataset")
    source = np.random.default_rng(seed)
    jobs = []
    for _ in range(count):
        lengths = [_between(source, length, range_ratio) for length in (input_len, output_len)]
        tokens = tuple(source.choice(usable, lengths[0]).tolist())
        jobs.append(Job(prompt_token_ids=tokens, max_tokens=lengths[1]))
    return jobs


def repeated(jobs: Sequence[Job], count: int) -> list[Job]:
    """The first `count` of `jobs`, from the beginning again if there are fewer."""
    return [jobs[index % len(jobs)] for index in range(count)]


def check_lengths(jobs: Sequence[Job], max_length: int | None) -> None:
    """Raises ContextLengthError, naming the longest job, if one does not fit `max_length` tokens."""
    longest = max(jobs, key=lambda job: len(job.prompt_token_ids) + job.max_tokens)
    prompt, completion = len(longest.prompt_token_ids), longest.max_tokens
    if max_length is not None and prompt + completion > max_length:
        raise ContextLengthError(
            f"a prompt of {prompt} tokens and a completion of {completion} do not fit the {max_length} tokens that the "
            f"model takes; give a smaller --input-len or --output-len"
        )


def arrivals(count: int, request_rate: float, *, burstiness: float = 1.0, seed: int = 0) -> list[float]:
    """When each of `count` requests is due, in seconds from the start: `request_rate` a second, the first one at once.

    The gaps have a gamma distribution of that shape: 1 makes it a Poisson process, less is more bursty, more is more
    regular.
    """
    gaps = np.random.default_rng(seed).gamma(burstiness, 1 / (request_rate * burstiness), count)
    gaps[0] = 0.0
    due: list[float] = np.cumsum(gaps).tolist()
    return due


def _between(source: np.random.Generator, length: int, ratio: float) -> int:
    return int(source.integers(max(1, math.ceil(length * (1 - ratio))), length + 1))
