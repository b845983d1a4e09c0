"""Faults through the engine on a model that runs: what breaks ends the requests of its replica, and works again."""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from furiosa_llm.runtime.artifact.layout import Mesh
from furiosa_llm.runtime.engine.engine_args import EngineArgs
from furiosa_llm.runtime.engine.replica import Replica
from furiosa_llm.runtime.errors import ExecutionError, ReplicaError, StepTimeoutError, WorkerError
from furiosa_llm.runtime.execution.driver import Body, Crew, Waits
from furiosa_llm.runtime.llm import LLM
from furiosa_llm.runtime.llm_engine import LLMEngine
from furiosa_llm.runtime.requests.outputs import RequestOutput
from furiosa_llm.runtime.runners.local_runner import LocalRunner
from furiosa_llm.runtime.runners.process_runner import ProcessRunner
from furiosa_llm.runtime.tokens.sampling_params import SamplingParams
from tests.support.runtime.models import LlamaSize, llama

ZOO = Path(__file__).parents[3] / "fixtures" / "zoo" / "tiny-llama-genai-fp32"
SIZE = LlamaSize(vocab=1024)
PROMPTS = ([3, 1, 4], [1, 5, 9, 2, 6])
LONG = SamplingParams(temperature=0.0, max_tokens=200, ignore_eos=True)
DEADLINE = 30.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return llama(Mesh((2, 2)), SIZE).write(tmp_path_factory.mktemp("faults"))


@pytest.fixture(scope="module")
def tokens(folder: Path) -> list[list[int]]:
    """What `LONG` gives behind each of the prompts."""
    with LLM(folder, tokenizer=ZOO, threads=1) as llm:
        outputs = llm.generate([""] * len(PROMPTS), LONG, prompt_token_ids=PROMPTS)
    return [output.outputs[0].token_ids for output in outputs]


Load = Callable[..., LLMEngine]


@pytest.fixture
def load(folder: Path) -> Iterator[Load]:
    """Loads engines, which are closed behind the test."""
    loaded: list[LLMEngine] = []

    def make(**options: Any) -> LLMEngine:
        loaded.append(LLMEngine.from_engine_args(EngineArgs(folder, tokenizer=ZOO, **options)))
        return loaded[-1]

    yield make
    for engine in loaded:
        engine.shutdown()


def begin(engine: LLMEngine, *numbers: int) -> None:
    """Starts the prompts of these numbers, one for each replica in order, and waits until all run."""
    for number in numbers:
        engine.add_request(str(number), {"prompt_token_ids": PROMPTS[number]}, LONG)
    assert [engine._handles[str(number)].replica.index for number in numbers] == list(range(len(numbers)))
    begun: set[str] = set()
    while len(begun) < len(numbers):
        begun.update(output.request_id for output in engine.step())


def ended(engine: LLMEngine) -> dict[int, RequestOutput]:
    """The last outputs of all requests, by number."""
    last: dict[int, RequestOutput] = {}
    while engine.has_unfinished_requests():
        last.update({int(output.request_id): output for output in engine.step() if output.finished})
    return last


def workers_of(replica: Replica) -> tuple[int, ...]:
    assert isinstance(replica._runner, ProcessRunner)
    return replica._runner.process_ids


def wait_for(event: threading.Event) -> None:
    assert event.wait(4 * DEADLINE)  # longer than the test waits for anything


def until(happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def rebuilt(engine: LLMEngine, old: Sequence[int]) -> Callable[[], bool]:
    """Whether the first replica has other processes than the `old` ones."""
    replica = engine.core.replicas[0]
    return lambda: replica._runner is not None and replica.ready and not set(workers_of(replica)) & set(old)


def answers(engine: LLMEngine, count: int) -> list[list[int]]:
    """The tokens behind the first `count` prompts, one for each replica; no request may fail."""
    begin(engine, *range(count))
    outputs = ended(engine)
    assert [outputs[number].error for number in range(count)] == [None] * count
    return [outputs[number].outputs[0].token_ids for number in range(count)]


@pytest.mark.slow
@pytest.mark.parametrize("replicas", [1, 2])
def test_a_worker_that_is_killed(replicas: int, load: Load, tokens: list[list[int]]) -> None:
    """While requests run, then while none does."""
    engine = load(workers=2, data_parallel_size=replicas)
    begin(engine, *range(replicas))
    first = workers_of(engine.core.replicas[0])
    os.kill(first[1], signal.SIGKILL)
    outputs = ended(engine)
    error = outputs[0].error
    assert isinstance(error, ReplicaError)
    assert isinstance(error.__cause__, WorkerError)
    assert f"worker 1, process {first[1]}, has ended by SIGKILL" in str(error)
    got = outputs[0].outputs[0].token_ids
    assert got == tokens[0][: len(got)]
    assert len(got) < len(tokens[0])
    assert [outputs[other].outputs[0].token_ids for other in range(1, replicas)] == tokens[1:replicas]
    until(rebuilt(engine, first))
    assert answers(engine, replicas) == tokens[:replicas]

    second = workers_of(engine.core.replicas[0])
    os.kill(second[0], signal.SIGKILL)
    until(rebuilt(engine, second))
    assert not any(Path(f"/proc/{pid}").exists() for pid in (*first, *second))
    assert answers(engine, replicas) == tokens[:replicas]


@pytest.mark.slow
def test_a_worker_that_hangs(load: Load, tokens: list[list[int]]) -> None:
    engine = load(workers=2, step_timeout=3.0)
    begin(engine, 0)
    old = workers_of(engine.core.replicas[0])
    os.kill(old[1], signal.SIGSTOP)
    error = ended(engine)[0].error
    assert isinstance(error, ReplicaError)
    assert isinstance(error.__cause__, StepTimeoutError)
    # the worker may have been stopped anywhere in a step, even behind all that the other waits for
    where = r"(in segment \d+|in none|through)"
    doing = rf"stage 0: ranks 0 to 1 {where}, ranks 2 to 3 {where}; last collective done: "
    assert "decode of 1 sequences: not back within 3 s" in str(error)
    assert re.search(doing, str(error)), error
    until(rebuilt(engine, old))
    assert not any(Path(f"/proc/{pid}").exists() for pid in old)
    assert answers(engine, 1) == tokens[:1]


def test_a_segment_that_fails(load: Load, tokens: list[list[int]]) -> None:
    engine = load(data_parallel_size=2, threads=2)
    core = engine.core
    core.limits = replace(core.limits, vocab_size=10**6)  # so that a token comes through that the table has no row of
    engine.add_request("0", {"prompt_token_ids": [10**5]}, LONG)
    engine.add_request("1", {"prompt_token_ids": PROMPTS[1]}, LONG)
    assert [engine._handles[name].replica.index for name in "01"] == [0, 1]
    outputs = ended(engine)
    error = outputs[0].error
    assert isinstance(error, ReplicaError)
    assert isinstance(error.__cause__, ExecutionError)
    assert "replica 0 failed while it had the request: ExecutionError: segment 0 failed on ranks " in str(error)
    assert outputs[1].outputs[0].token_ids == tokens[1]
    until(lambda: core.replicas[0].ready)
    assert answers(engine, 2) == tokens[:2]


def on_the_second_core(crew: Crew, fault: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Has `fault` called on the second core of the first run that has two."""
    run = crew.run
    faults = [fault]

    def with_fault(body: Body, lanes: int) -> None:
        def faulty(shares: Sequence[int], member: int, barrier: Waits) -> None:
            if member == 1 and faults:
                faults.pop()()
            body(shares, member, barrier)

        run(faulty, lanes)

    monkeypatch.setattr(crew, "run", with_fault)


def test_a_thread_that_hangs(load: Load, tokens: list[list[int]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Its core is replaced: the new runner has as many, and so has the other replica."""
    monkeypatch.setattr("furiosa_llm.runtime.runners.local_runner._CLOSE_TIMEOUT", 0.1)
    engine = load(data_parallel_size=2, threads=2, step_timeout=2.0)
    released = threading.Event()
    hung = engine.core.replicas[0]._runner
    assert isinstance(hung, LocalRunner)
    on_the_second_core(hung._crew, lambda: wait_for(released), monkeypatch)
    engine.add_request("0", {"prompt_token_ids": PROMPTS[0]}, LONG)
    error = ended(engine)[0].error
    assert isinstance(error, ReplicaError)
    assert isinstance(error.__cause__, StepTimeoutError)
    assert "stage 0: ranks 0 to 1 in segment" in str(error)
    assert "last collective done: none" in str(error)
    until(lambda: engine.core.replicas[0].ready and hung._crew._idle == 2)
    assert not hung._crew._expecting  # else the next runs would leave a core to it
    assert answers(engine, 2) == tokens[:2]
    released.set()
    until(lambda: not any(thread.is_alive() for thread in hung._threads))
    assert (hung._crew._idle, hung._crew._taken, hung._crew._expecting) == (2, {}, set())
    assert answers(engine, 2) == tokens[:2]


@pytest.mark.parametrize(
    "error",
    [
        SystemExit("out"),
        *(pytest.param(one, marks=pytest.mark.slow) for one in (MemoryError("no more"), ZeroDivisionError("ours"))),
    ],
    ids=repr,
)
@pytest.mark.parametrize("where", ["runner", "core"])
def test_a_thread_that_is_ended(
    where: str, error: BaseException, load: Load, tokens: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = load(data_parallel_size=2, threads=2)
    runner = engine.core.replicas[0]._runner
    assert isinstance(runner, LocalRunner)
    if where == "runner":

        def broken(*_: Any) -> Any:
            raise error

        monkeypatch.setattr(runner._groups[0], "run", broken)
    else:

        def fail() -> None:
            raise error

        on_the_second_core(runner._crew, fail, monkeypatch)
    for number in (0, 1):
        engine.add_request(str(number), {"prompt_token_ids": PROMPTS[number]}, LONG)
    outputs = ended(engine)
    failed = [number for number, output in outputs.items() if output.error is not None]
    assert len(failed) == 1
    found = outputs[failed[0]].error
    assert isinstance(found, ReplicaError)
    assert str(error) in str(found)
    [other] = {0, 1} - set(failed)
    assert outputs[other].outputs[0].token_ids == tokens[other]
    until(lambda: all(replica.ready for replica in engine.core.replicas))
    assert answers(engine, 2) == tokens[:2]
