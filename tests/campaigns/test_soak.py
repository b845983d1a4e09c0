"""A short soak, and that it notices what it is there for; the long one is a campaign."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from queue import SimpleQueue

import pytest

from furiosa_llm.runtime.artifact.layout import Mesh
from furiosa_llm.runtime.llm import LLM
from furiosa_llm.runtime.llm_engine import LLMEngine
from furiosa_llm.runtime.requests.outputs import CompletionOutput, FinishReason, RequestOutput
from furiosa_llm.runtime.requests.request_table import RequestTable
from furiosa_llm.runtime.tokens.sampling_params import RequestOutputKind, SamplingParams
from tests.campaigns.soak import ZOO, WatchedCore, left_in, soak
from tests.campaigns.soak_cases import Answer, Case, Cases, Expected
from tests.support.runtime.cores import make_core
from tests.support.runtime.models import LlamaSize, llama
from tests.support.runtime.runners import CountingRunner


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return llama(Mesh((2,)), LlamaSize(layers=1, vocab=1024)).write(tmp_path_factory.mktemp("soak"))


@pytest.mark.slow
def test_every_request_is_accounted_for(folder: Path) -> None:
    result = soak(folder, ZOO, requests=120, seed=5)
    assert result.problems == []
    assert result.requests == 120
    assert result.aborts > 5
    assert result.preemptions > 5


def test_an_answer_that_comes_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    deliver = RequestTable.deliver

    def twice(self: RequestTable) -> None:
        touched = [submission for submission in self._touched.values() if submission.request.finished]
        deliver(self)
        for submission in touched:
            submission.request._ended = False
            submission.request.sequences[0].has_news = True
            output = submission.request.output()
            assert output is not None
            submission.sink([(submission.key, output)])

    monkeypatch.setattr(RequestTable, "deliver", twice)
    problems: list[str] = []
    finished: SimpleQueue[RequestOutput] = SimpleQueue()
    core = WatchedCore(make_core(CountingRunner), problems)
    core.submit(
        "a",
        {"prompt_token_ids": [1]},
        SamplingParams(temperature=0.0, max_tokens=2, output_kind=RequestOutputKind.FINAL),
        lambda outputs: finished.put(outputs[0][1]),
    )
    for _ in range(2):
        finished.get(timeout=30)
    core.close()
    assert problems == ["a: an output behind the last one, or for another request"]


def test_what_is_left_in_a_replica(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.campaigns.soak._SETTLING", 0.01)
    with LLMEngine(make_core(CountingRunner)) as engine:
        [replica] = engine.core.replicas
        assert left_in(replica) == []
        replica._scheduler.add(7, [1, 2, 3])
        assert left_in(replica) == ["1 sequences left"]
        replica._scheduler.schedule()
        assert left_in(replica) == ["1 sequences left", "1 pages held left"]


@pytest.fixture(scope="module")
def cases(folder: Path) -> Iterator[Cases]:
    with LLM(folder, tokenizer=ZOO, threads=1) as alone:
        yield Cases(alone, random.Random(0), vocab_size=1024, longest=40)


def test_the_requests_are_of_many_kinds(cases: Cases) -> None:
    drawn = [cases.draw() for _ in range(200)]
    expected = [case.expected for case in drawn if case.expected is not None]
    assert 60 < len(expected) < 140
    assert {one.finish_reason for one in expected} == {"stop", "length"}
    assert any(isinstance(one.stop_reason, str) for one in expected)
    assert any(isinstance(one.stop_reason, int) for one in expected)
    assert any(one.prompt_logprobs is not None for one in expected)
    assert {case.params.n for case in drawn} == {1, 2, 3}
    assert any(case.params.ranks_sequences for case in drawn)


EXPECTED = Expected(
    token_ids=[5, 6], text="ab", finish_reason="length", stop_reason=None, gaps=[0.5, 1e-6], prompt_logprobs=None
)


def problem_of(
    token_ids: list[int], text: str = "ab", reason: FinishReason | None = "length", *, may_be_aborted: bool = False
) -> str | None:
    answer = Answer(Case(prompt=(1,), params=SamplingParams(temperature=0.0, max_tokens=2), expected=EXPECTED))
    one = CompletionOutput(index=0, text=text, token_ids=token_ids, finish_reason=reason)
    answer.add(
        RequestOutput(
            request_id="a",
            prompt=None,
            prompt_token_ids=[1],
            outputs=[one],
            finished=True,
        )
    )
    return answer.problem(may_be_aborted=may_be_aborted)


def test_what_is_wrong_with_an_answer() -> None:
    assert problem_of([5, 6]) is None
    assert problem_of([5, 9], "ac") is None  # the second token was as good as another
    assert problem_of([5], "a", "abort", may_be_aborted=True) is None
    for problem, words in (
        (problem_of([7, 6]), "token 0 is another than alone"),
        (problem_of([5, 6], "xy"), "expected"),
        (problem_of([5, 6], reason=None), "0 of 1 completions have ended"),
        (problem_of([5], "a", "abort"), "it ended for"),
        (problem_of([5, 6, 7]), "3 tokens, expected 1 to 2"),
    ):
        assert problem is not None
        assert words in problem
