"""`LLMEngine`: requests in, outputs out, and failures that stay with the requests they hit."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from typing import Any

import pytest

from furiosa_llm.runtime.errors import ContextLengthError, EngineDeadError, ExecutionError, InputError, ReplicaError
from furiosa_llm.runtime.llm_engine import LLMEngine
from furiosa_llm.runtime.requests.outputs import RequestOutput
from furiosa_llm.runtime.runners.batch import Batch
from furiosa_llm.runtime.tokens.sampling_params import RequestOutputKind, SamplingParams
from tests.runtime.engine.test_replica import Gate, failing
from tests.support.runtime.cores import make_core
from tests.support.runtime.runners import VOCAB, CountingRunner

GREEDY = SamplingParams(temperature=0.0, max_tokens=4)


@pytest.fixture
def engine() -> Iterator[LLMEngine]:
    with LLMEngine(make_core(CountingRunner)) as made:
        yield made


def run(engine: LLMEngine) -> dict[str, list[RequestOutput]]:
    """All outputs by request."""
    outputs: dict[str, list[RequestOutput]] = {}
    while engine.has_unfinished_requests():
        for output in engine.step():
            outputs.setdefault(output.request_id, []).append(output)
    return outputs


def test_the_loop_of_the_vendors_examples(engine: LLMEngine) -> None:
    waiting = [(str(number), {"prompt_token_ids": [number]}) for number in range(9)]
    last: dict[str, list[int]] = {}
    while waiting or engine.has_unfinished_requests():
        if waiting:
            request_id, prompt = waiting.pop(0)
            engine.add_request(request_id, prompt, GREEDY)
        for output in engine.step():
            if output.finished:
                last[output.request_id] = output.outputs[0].token_ids
    assert last == {str(number): [number + 1, number + 2, number + 3, number + 4] for number in range(9)}
    assert engine.step() == []


@pytest.mark.parametrize("kind", list(RequestOutputKind))
def test_outputs_come_as_they_were_asked_for(engine: LLMEngine, kind: RequestOutputKind) -> None:
    engine.add_request("a", {"prompt_token_ids": [5]}, SamplingParams(temperature=0.0, max_tokens=4, output_kind=kind))
    found = [output.outputs[0].token_ids for output in run(engine)["a"]]
    expected = {
        RequestOutputKind.CUMULATIVE: [[6], [6, 7], [6, 7, 8], [6, 7, 8, 9]],
        RequestOutputKind.DELTA: [[6], [7], [8], [9]],
        RequestOutputKind.FINAL: [[6, 7, 8, 9]],
    }
    assert found == expected[kind]


def test_text_and_default_params() -> None:
    gate = Gate()
    with LLMEngine(make_core(lambda: CountingRunner(fault=gate))) as engine:
        with pytest.raises(InputError, match="260"):
            engine.add_request("a", "hello")  # 260 is its first token, and the vocabulary has 32
        engine.add_request("a", {"prompt": "hello", "prompt_token_ids": [5]})
        gate.opened.set()
        [*_, output] = run(engine)["a"]
    assert output.prompt == "hello"
    assert len(output.outputs[0].token_ids) == 16


def test_request_ids_are_unique_among_those_that_run() -> None:
    gate = Gate()
    with LLMEngine(make_core(lambda: CountingRunner(fault=gate))) as engine:
        engine.add_request("a", {"prompt_token_ids": [1]}, GREEDY)
        with pytest.raises(InputError, match="request_id 'a' belongs to a request that has not ended; give another"):
            engine.add_request("a", {"prompt_token_ids": [1]}, GREEDY)
        other = LLMEngine(engine.core)
        other.add_request("a", {"prompt_token_ids": [9]}, GREEDY)
        gate.opened.set()
        assert run(engine)["a"][-1].prompt_token_ids == [1]
        assert run(other)["a"][-1].prompt_token_ids == [9]
        engine.add_request("a", {"prompt_token_ids": [2]}, GREEDY)
        assert run(engine)["a"][-1].prompt_token_ids == [2]
    with pytest.raises(InputError, match="request_id: found a int, expected a str"):
        engine.add_request(3, {"prompt_token_ids": [1]}, GREEDY)  # type: ignore[arg-type]


def test_a_request_that_was_refused_leaves_nothing(engine: LLMEngine) -> None:
    with pytest.raises(ContextLengthError):
        engine.add_request("a", {"prompt_token_ids": [1] * 64}, GREEDY)
    with pytest.raises(InputError):
        engine.add_request("a", {"prompt_token_ids": [VOCAB]}, GREEDY)
    assert not engine.has_unfinished_requests()


def test_aborts() -> None:
    gate = Gate()
    with LLMEngine(make_core(lambda: CountingRunner(fault=gate))) as engine:
        for name in "abcd":
            engine.add_request(name, {"prompt_token_ids": [1]}, GREEDY)
        engine.abort_request("a")
        engine.abort_request(["b", "c", "unknown"])
        gate.opened.set()
        outputs = run(engine)
    reasons = {name: found[-1].outputs[0].finish_reason for name, found in outputs.items()}
    assert reasons == {"a": "abort", "b": "abort", "c": "abort", "d": "length"}


def test_a_failure_ends_the_requests_of_its_replica_only() -> None:
    gate = Gate()
    broken = [CountingRunner(fault=failing(at=2, error=ExecutionError("broke"))), CountingRunner()]
    with LLMEngine(make_core(lambda: broken.pop(0), lambda: CountingRunner(fault=gate))) as engine:
        engine.add_request("elsewhere", {"prompt_token_ids": [1] * 30}, GREEDY)
        assert [replica.num_requests for replica in engine.core.replicas] == [1, 0]
        engine.add_request("kept", {"prompt_token_ids": [2]}, GREEDY)
        [*_, lost] = outputs_until_finished(engine)
        assert lost.request_id == "elsewhere"
        assert isinstance(lost.error, ReplicaError)
        assert lost.outputs[0].finish_reason == "error"
        gate.opened.set()
        assert run(engine)["kept"][-1].outputs[0].token_ids == [3, 4, 5, 6]
        engine.add_request("elsewhere", {"prompt_token_ids": [1] * 30}, GREEDY)
        assert run(engine)["elsewhere"][-1].outputs[0].token_ids == [2, 3, 4, 5]


def outputs_until_finished(engine: LLMEngine) -> list[RequestOutput]:
    outputs: list[RequestOutput] = []
    while not any(output.finished for output in outputs):
        outputs += engine.step()
    return outputs


def test_an_engine_without_replicas_is_dead() -> None:
    def once() -> CountingRunner:
        if made:
            raise OSError("no more")
        made.append(CountingRunner(fault=failing(at=1, error=ExecutionError("broke"))))
        return made[0]

    made: list[CountingRunner] = []
    with LLMEngine(make_core(once, max_failures=0)) as engine:
        engine.add_request("a", {"prompt_token_ids": [1]}, GREEDY)
        assert isinstance(run(engine)["a"][-1].error, ReplicaError)
        while engine.core.replicas[0].death is None:
            engine.add_request("b", {"prompt_token_ids": [1]}, GREEDY)
            assert isinstance(run(engine)["b"][-1].error, ReplicaError)
        with pytest.raises(EngineDeadError, match=r"all 1 replicas failed and could not be rebuilt, .*: broke"):
            engine.add_request("c", {"prompt_token_ids": [1]}, GREEDY)
        assert not engine.has_unfinished_requests()


def test_requests_without_a_seed_get_one_of_the_engines() -> None:
    def random_tokens(seed: int | None) -> list[Any]:
        params = SamplingParams(temperature=30.0, max_tokens=8)
        with LLMEngine(make_core(CountingRunner, seed=seed)) as engine:
            for name in "ab":
                engine.add_request(name, {"prompt_token_ids": [1]}, params)
            outputs = run(engine)
        return [outputs[name][-1].outputs[0].token_ids for name in "ab"]

    first = random_tokens(1)
    assert first == random_tokens(1)
    assert first[0] != first[1]
    assert first != random_tokens(2)
    assert random_tokens(None) != random_tokens(None)


def test_a_closed_engine_takes_nothing() -> None:
    closed: list[str] = []
    core = make_core(CountingRunner, close_model=lambda: closed.append("model"))
    engine = LLMEngine(core)
    engine.shutdown()
    engine.shutdown()
    assert closed == ["model"]
    with pytest.raises(EngineDeadError, match="the engine is closed"):
        engine.add_request("a", {"prompt_token_ids": [1]}, GREEDY)


def test_a_storm_of_requests_aborts_and_failures() -> None:
    """Each request ends exactly once, and those that nothing hit have the tokens they would have alone."""
    rng = random.Random(0)
    numbers = itertools.count()

    def fault(batch: Batch, runner: CountingRunner) -> None:
        if next(numbers) % 97 == 96:
            raise ExecutionError("broke")

    with LLMEngine(make_core(*[lambda: CountingRunner(fault=fault)] * 3)) as engine:
        wanted: dict[str, list[int]] = {}
        ended: dict[str, RequestOutput] = {}
        while len(wanted) < 300 or engine.has_unfinished_requests():
            for _ in range(rng.randrange(8) if len(wanted) < 300 else 0):
                name, length, prompt = (
                    str(len(wanted)),
                    rng.randrange(1, 30),
                    [rng.randrange(VOCAB)] * rng.randrange(1, 30),
                )
                engine.add_request(
                    name, {"prompt_token_ids": prompt}, SamplingParams(temperature=0.0, max_tokens=length)
                )
                wanted[name] = [(prompt[-1] + 1 + step) % VOCAB for step in range(length)]
            engine.abort_request(str(rng.randrange(len(wanted) + 1)))
            for output in engine.step():
                assert output.request_id not in ended
                if output.finished:
                    ended[output.request_id] = output
        reasons: dict[str | None, int] = {}
        for name, tokens in wanted.items():
            [completion] = ended[name].outputs
            reasons[completion.finish_reason] = reasons.get(completion.finish_reason, 0) + 1
            if completion.finish_reason == "length":
                assert completion.token_ids == tokens
            else:
                assert completion.token_ids == tokens[: len(completion.token_ids)]
        assert all(reasons[reason] > 5 for reason in ("length", "abort", "error"))
        assert [(replica.load, replica.num_requests) for replica in engine.core.replicas] == [(0, 0)] * 3
