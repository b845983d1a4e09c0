"""`AsyncLLMEngine`: many tasks at once, and a generator that is given up aborts its request."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from furiosa_llm.runtime.async_engine import AsyncLLMEngine, _Mailbox
from furiosa_llm.runtime.errors import ContextLengthError, ExecutionError, InputError, ReplicaError
from furiosa_llm.runtime.tokens.sampling_params import SamplingParams
from tests.runtime.engine.test_replica import TIMEOUT, Gate, failing
from tests.support.runtime.cores import make_core
from tests.support.runtime.runners import CountingRunner

GREEDY = SamplingParams(temperature=0.0, max_tokens=4)
LONG = SamplingParams(temperature=0.0, max_tokens=60)


@pytest.fixture
def engine() -> Iterator[AsyncLLMEngine]:
    made = AsyncLLMEngine(make_core(CountingRunner))
    yield made
    made.shutdown()


async def complete(engine: AsyncLLMEngine, token: int, request_id: str) -> list[int]:
    tokens: list[int] = []
    async for output in engine.generate({"prompt_token_ids": [token]}, GREEDY, request_id):
        tokens = output.outputs[0].token_ids
    return tokens


async def until_idle(engine: AsyncLLMEngine) -> None:
    async with asyncio.timeout(TIMEOUT):
        while engine.core.replicas[0].num_requests:
            await asyncio.sleep(0.001)


def test_many_tasks_at_once(engine: AsyncLLMEngine) -> None:
    async def main() -> list[list[int]]:
        return await asyncio.gather(*(complete(engine, token, str(token)) for token in range(12)))

    assert asyncio.run(main()) == [[t + 1, t + 2, t + 3, t + 4] for t in range(12)]
    assert asyncio.run(main()) == [[t + 1, t + 2, t + 3, t + 4] for t in range(12)]  # in another loop
    assert not engine._mailboxes


def test_outputs_come_one_by_one(engine: AsyncLLMEngine) -> None:
    async def main() -> list[list[int]]:
        outputs = engine.generate({"prompt_token_ids": [5]}, GREEDY, "a")
        return [output.outputs[0].token_ids async for output in outputs]

    assert asyncio.run(main()) == [[6], [6, 7], [6, 7, 8], [6, 7, 8, 9]]


def test_an_aborted_request_ends_its_generator() -> None:
    gate = Gate()
    engine = AsyncLLMEngine(make_core(lambda: CountingRunner(fault=gate)))

    async def main() -> str | None:
        outputs = engine.generate({"prompt_token_ids": [5]}, GREEDY, "a")
        first = asyncio.ensure_future(anext(outputs))
        await asyncio.sleep(0)
        await engine.abort("a")
        await engine.abort("unknown")
        gate.opened.set()
        reason = (await first).outputs[0].finish_reason
        assert [output async for output in outputs] == []
        return reason

    assert asyncio.run(main()) == "abort"
    engine.shutdown()


def test_a_closed_generator_aborts_its_request_and_frees_the_id(engine: AsyncLLMEngine) -> None:
    async def main() -> list[int]:
        outputs = engine.generate({"prompt_token_ids": [5]}, LONG, "a")
        await anext(outputs)
        await outputs.aclose()
        tokens = await complete(engine, 9, "a")
        await until_idle(engine)
        return tokens

    assert asyncio.run(main()) == [10, 11, 12, 13]


def test_a_cancelled_task_aborts_its_request() -> None:
    gate = Gate()
    runner = CountingRunner(fault=gate)
    engine = AsyncLLMEngine(make_core(lambda: runner))

    async def main() -> None:
        task = asyncio.ensure_future(complete(engine, 5, "a"))
        await asyncio.to_thread(gate.reached.wait, TIMEOUT)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        gate.opened.set()
        await until_idle(engine)

    asyncio.run(main())
    assert len(runner.batches) == 1
    engine.shutdown()


def test_refusals_come_with_the_first_output(engine: AsyncLLMEngine) -> None:
    async def main() -> None:
        with pytest.raises(ContextLengthError):
            await anext(engine.generate({"prompt_token_ids": [1] * 64}, GREEDY, "a"))
        assert not engine._mailboxes
        with pytest.raises(InputError, match="request_id: found a int, expected a str"):
            await anext(engine.generate([5], GREEDY, 3))  # type: ignore[arg-type]
        running = engine.generate({"prompt_token_ids": [5]}, LONG, "a")
        await anext(running)
        with pytest.raises(InputError, match="request_id 'a' belongs to a request that has not ended"):
            await anext(engine.generate({"prompt_token_ids": [5]}, GREEDY, "a"))
        await running.aclose()

    asyncio.run(main())
    assert not engine._mailboxes


def test_a_failure_is_raised_in_the_generators_it_hit() -> None:
    runners = [CountingRunner(fault=failing(at=1, error=ExecutionError("broke"))), CountingRunner()]
    engine = AsyncLLMEngine(make_core(lambda: runners.pop(0)))

    async def main() -> list[int]:
        with pytest.raises(ReplicaError, match="broke"):
            await complete(engine, 5, "a")
        return await complete(engine, 5, "a")

    assert asyncio.run(main()) == [6, 7, 8, 9]
    engine.shutdown()


def test_outputs_for_a_loop_that_is_gone_are_dropped() -> None:
    loop = asyncio.new_event_loop()
    mailbox = _Mailbox(loop)
    loop.close()
    mailbox([])
    assert not mailbox.queues
