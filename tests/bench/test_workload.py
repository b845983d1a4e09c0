"""Random prompts, and when requests arrive."""

from __future__ import annotations

import numpy as np
import pytest

from furiosa_llm.bench.workload import Job, arrivals, check_lengths, random_jobs, repeated
from furiosa_llm.runtime.errors import ContextLengthError, InputError


def test_random_jobs_have_the_lengths_that_were_asked_for_and_follow_from_the_seed() -> None:
    jobs = random_jobs(50, input_len=7, output_len=3, vocab_size=100, seed=5)
    assert {(len(job.prompt_token_ids), job.max_tokens) for job in jobs} == {(7, 3)}
    assert jobs == random_jobs(50, input_len=7, output_len=3, vocab_size=100, seed=5)
    assert jobs != random_jobs(50, input_len=7, output_len=3, vocab_size=100, seed=6)


def test_lengths_lie_between_the_ratio_and_the_whole() -> None:
    jobs = random_jobs(400, input_len=10, output_len=5, range_ratio=0.5, vocab_size=9)
    assert {len(job.prompt_token_ids) for job in jobs} == set(range(5, 11))
    assert {job.max_tokens for job in jobs} == {3, 4, 5}


def test_all_tokens_but_the_excluded_ones_are_drawn() -> None:
    jobs = random_jobs(100, input_len=20, output_len=1, vocab_size=10, excluded=frozenset({0, 4}))
    assert {token for job in jobs for token in job.prompt_token_ids} == {1, 2, 3, 5, 6, 7, 8, 9}


def test_a_vocabulary_of_excluded_tokens_alone() -> None:
    with pytest.raises(InputError, match="no token of the 2 of the vocabulary may be used; give a dataset"):
        random_jobs(1, input_len=1, output_len=1, vocab_size=2, excluded=frozenset({0, 1}))


def test_rows_come_again_if_there_are_too_few() -> None:
    first, second = Job(prompt_token_ids=(1,), max_tokens=1), Job(prompt_token_ids=(2,), max_tokens=1)
    assert repeated([first, second], 5) == [first, second, first, second, first]
    assert repeated([first, second], 1) == [first]


def test_the_longest_job_has_to_fit() -> None:
    jobs = [Job(prompt_token_ids=(1,) * 5, max_tokens=3), Job(prompt_token_ids=(1,), max_tokens=4)]
    check_lengths(jobs, 8)
    check_lengths(jobs, None)
    with pytest.raises(ContextLengthError, match="a prompt of 5 tokens and a completion of 3 do not fit the 7 tokens"):
        check_lengths(jobs, 7)


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
def test_arrivals_keep_the_rate_and_are_as_bursty_as_asked(burstiness: float) -> None:
    due = arrivals(40_001, 20.0, burstiness=burstiness, seed=3)
    gaps = np.diff(due)
    assert due[0] == 0.0
    assert gaps.min() >= 0
    assert gaps.mean() == pytest.approx(1 / 20, rel=0.05)
    assert gaps.var() == pytest.approx((1 / 20) ** 2 / burstiness, rel=0.1)  # the gamma distribution's


def test_arrivals_follow_from_the_seed() -> None:
    assert arrivals(9, 1.0, seed=1) == arrivals(9, 1.0, seed=1)
    assert arrivals(9, 1.0, seed=1) != arrivals(9, 1.0, seed=2)
