"""Random requests and aborts on little memory, each accounted for: `python -m tests.campaigns.soak --requests 2000`.

Half of the requests go through `LLMEngine`, half through `AsyncLLMEngine`, both on one model of two replicas, whose KV
cache is too small for them. A fifth of them are aborted, by other threads or by cancelled tasks. Each must be answered
exactly once; greedy ones as their prompts are alone; at the end nothing may be left: no sequence, no page, no thread,
and memory may not grow with the number of requests. Ends with status 1 if that was not so.
"""

from __future__ import annotations

import argparse
import asyncio
import faulthandler
import os
import random
import sys
import tempfile
import threading
import time
from collections.abc import Sequence, Sized
from concurrent.futures import Future
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

import numpy as np

from furiosa_llm.runtime.adapters.adapter import LoRARequest
from furiosa_llm.runtime.artifact.layout import Mesh
from furiosa_llm.runtime.async_engine import AsyncLLMEngine
from furiosa_llm.runtime.engine.core import EngineCore, Handle
from furiosa_llm.runtime.engine.replica import Replica
from furiosa_llm.runtime.llm import LLM
from furiosa_llm.runtime.llm_engine import LLMEngine
from furiosa_llm.runtime.requests.outputs import RequestOutput
from furiosa_llm.runtime.requests.prompts import Prompt
from furiosa_llm.runtime.requests.request_table import Sink
from furiosa_llm.runtime.tokens.sampling_params import SamplingParams
from tests.campaigns.soak_cases import Answer, Case, Cases
from tests.support.runtime.models import LlamaSize, llama

ZOO = Path(__file__).parents[2] / "fixtures" / "zoo" / "tiny-llama-genai-fp32"
SLOPE = 4.0
"""MiB by which memory may grow in 1,000 requests, over the second half of them."""
AT_ONCE = 24
"""Requests that each of the two engines has under way."""
SILENCE = 300
"""Seconds without an answer after which all stacks are printed and the soak is given up."""
_LONGEST = 120
_NUM_PAGES = 24
_SETTLING = 30.0


@dataclass(slots=True, kw_only=True)
class Result:
    """What a soak found. `slope` is in MiB per 1,000 requests, None if there were too few of them to tell."""

    problems: list[str]
    requests: int = 0
    aborts: int = 0
    ties: int = 0
    preemptions: int = 0
    slope: float | None = None
    seconds: float = 0.0


class WatchedCore(EngineCore):
    """Counts what goes to each sink: one finished output for a request, and nothing behind it."""

    def __init__(self, core: EngineCore, problems: list[str]) -> None:
        super().__init__(
            replicas=core.replicas, tokenizer=core.tokenizer, limits=core.limits, seed=0, close_model=core.close
        )
        self.problems = problems
        self.unfinished: dict[int, str] = {}
        self._lock = threading.Lock()
        self._watched: dict[Sink, Sink] = {}
        self._num_keys = 0

    def submit(
        self,
        request_id: str,
        prompt: Prompt,
        params: SamplingParams,
        sink: Sink,
        lora_request: LoRARequest | None = None,
    ) -> Handle:
        with self._lock:
            # Outputs may come before the key is known here: keys are given in order, as requests come one by one.
            self.unfinished[self._num_keys] = request_id
            self._num_keys += 1
            watched = self._watched.setdefault(sink, self._watch(sink))
            return super().submit(request_id, prompt, params, watched, lora_request)

    def _watch(self, sink: Sink) -> Sink:
        def watched(outputs: Sequence[tuple[int, RequestOutput]]) -> None:
            for key, output in outputs:
                if self.unfinished.get(key) != output.request_id:
                    self.problems.append(f"{output.request_id}: an output behind the last one, or for another request")
                elif output.finished:
                    del self.unfinished[key]
            sink(outputs)

        return watched


class Soak:
    """One run of it on a loaded model."""

    def __init__(self, llm: LLM, cases: Cases, *, requests: int, seed: int) -> None:
        self.result = Result(problems=[])
        self.core = WatchedCore(llm.core, self.result.problems)
        self._cases = cases
        self._requests = requests
        self._rng = random.Random(seed)
        self._lock = threading.Lock()
        self._memory: list[tuple[int, float]] = []
        self._aborting: SimpleQueue[tuple[float, str] | None] = SimpleQueue()
        self._aborted: set[str] = set()
        self._engine = LLMEngine(self.core)
        self._async_engine = AsyncLLMEngine(self.core)
        self._loop: asyncio.AbstractEventLoop | None = None

    def run(self) -> Result:
        """Runs all requests and looks at what is left."""
        started = time.monotonic()
        failed: Future[None] = Future()
        tasks = threading.Thread(target=self._run_tasks, args=(failed,))
        aborter = threading.Thread(target=self._abort)
        for thread in (tasks, aborter):
            thread.start()
        self._run_steps()
        tasks.join()
        self._aborting.put(None)
        aborter.join()
        failed.result(timeout=0)
        self._check_the_end()
        self.result.seconds = time.monotonic() - started
        return self.result

    # -- the two ways in ---------------------------------------------------------------------------------------

    def _run_steps(self) -> None:
        """Half of the requests, through `LLMEngine`."""
        engine, answers = self._engine, dict[str, Answer]()
        waiting = [f"step-{number}" for number in range(self._requests // 2)]
        while waiting or engine.has_unfinished_requests():
            while waiting and len(answers) < AT_ONCE:
                name, case = waiting.pop(), self._draw()
                answers[name] = Answer(case)
                engine.add_request(name, {"prompt_token_ids": list(case.prompt)}, case.params)
                self._abort_some(name)
            for output in engine.step():
                answers[output.request_id].add(output)
                if output.finished:
                    self._finish(output, answers.pop(output.request_id))

    def _run_tasks(self, failed: Future[None]) -> None:
        """The other half, through `AsyncLLMEngine`."""
        try:
            asyncio.run(self._tasks())
        except BaseException as error:  # noqa: BLE001 - the main thread raises it
            failed.set_exception(error)
        else:
            failed.set_result(None)

    async def _tasks(self) -> None:
        self._loop = asyncio.get_running_loop()
        room = asyncio.Semaphore(AT_ONCE)
        async with asyncio.TaskGroup() as group:
            for number in range(self._requests - self._requests // 2):
                await room.acquire()
                task = group.create_task(self._one_task(f"task-{number}"))
                task.add_done_callback(lambda _: room.release())
                if self._chance(0.1):
                    self._loop.call_later(self._delay(), task.cancel)

    async def _one_task(self, name: str) -> None:
        case = self._draw()
        answer = Answer(case)
        self._abort_some(name)
        prompt = {"prompt_token_ids": list(case.prompt)}
        try:
            async with aclosing(self._async_engine.generate(prompt, case.params, name)) as outputs:
                async for output in outputs:
                    answer.add(output)
        except asyncio.CancelledError:
            self._count(aborts=1)
            raise
        self._finish(output, answer)

    def _abort(self) -> None:
        while (entry := self._aborting.get()) is not None:
            delay, name = entry
            time.sleep(delay)
            if name.startswith("step"):
                self._engine.abort_request(name)
            elif self._loop is not None and not self._loop.is_closed():
                asyncio.run_coroutine_threadsafe(self._async_engine.abort(name), self._loop)

    # -- one request -------------------------------------------------------------------------------------------

    def _draw(self) -> Case:
        with self._lock:
            return self._cases.draw()

    def _chance(self, share: float) -> bool:
        with self._lock:
            return self._rng.random() < share

    def _delay(self) -> float:
        with self._lock:
            return self._rng.random() * 0.1

    def _abort_some(self, name: str) -> None:
        if self._chance(0.15):
            self._aborted.add(name)
            self._aborting.put((self._delay(), name))

    def _finish(self, output: RequestOutput, answer: Answer) -> None:
        if output.error is not None:
            problem: str | None = f"{type(output.error).__name__}: {output.error}"
        else:
            problem = answer.problem(may_be_aborted=output.request_id in self._aborted)
        aborted = any(one.finish_reason == "abort" for one in output.outputs)
        if problem is not None:
            self.result.problems.append(f"{output.request_id} {answer.case.params}: {problem}")
        self._count(aborts=aborted, ties=answer.is_tie)

    def _count(self, *, aborts: int, ties: int = 0) -> None:
        faulthandler.dump_traceback_later(SILENCE, exit=True)
        with self._lock:
            self.result.requests += 1
            self.result.aborts += aborts
            self.result.ties += ties
            if self.result.requests % 20 == 0:
                self._memory.append((self.result.requests, resident_mib()))

    # -- the end -----------------------------------------------------------------------------------------------

    def _check_the_end(self) -> None:
        """Nothing is left of the requests, and memory did not grow."""
        faulthandler.cancel_dump_traceback_later()
        result, problems = self.result, self.result.problems
        if self.core.unfinished:
            problems.append(f"{len(self.core.unfinished)} requests without a last output: {self.core.unfinished}")
        if self._engine._handles or self._async_engine._handles or self._async_engine._mailboxes:
            problems.append("an engine keeps requests that have ended")
        for replica in self.core.replicas:
            problems += [f"replica {replica.index}: {problem}" for problem in left_in(replica)]
        result.preemptions = sum(replica._scheduler.num_preemptions for replica in self.core.replicas)
        if not result.preemptions:
            problems.append("no sequence was preempted: there was too much memory for this to show anything")
        half = self._memory[len(self._memory) // 2 :]
        if len(half) >= 20:
            counts, sizes = np.array(half).T
            result.slope = 1000.0 * float(np.polyfit(counts, sizes, 1)[0])
            if result.slope > SLOPE:
                problems.append(f"memory grows by {result.slope:.1f} MiB in 1,000 requests, expected at most {SLOPE}")


def left_in(replica: Replica) -> list[str]:
    """What an idle replica still has, and should not; a batch with what was aborted may be under way for a moment."""
    scheduler, table = replica._scheduler, replica._table
    deadline = time.monotonic() + _SETTLING
    while (scheduler.has_unfinished or replica._under_way) and time.monotonic() < deadline:
        time.sleep(0.01)
    kept: tuple[Sized, ...] = (
        table._submissions,
        table._running,
        table._begun,
        table._touched,
        table._errors,
        table._loads,
    )
    found = {
        "sequences": scheduler.num_running + scheduler.num_waiting,
        "batches under way": len(replica._under_way),
        "pages held": scheduler.used_pages - scheduler.cached_pages,
        "requests": replica.num_requests,
        "tokens of load": replica.load,
        "entries in its table": sum(len(one) for one in kept),
    }
    problems = [f"{count} {what} left" for what, count in found.items() if count]
    if not 0 <= scheduler.cached_pages <= scheduler.limits.num_pages:
        problems.append(f"{scheduler.cached_pages} of {scheduler.limits.num_pages} pages cached")
    return problems


def resident_mib() -> float:
    """The resident memory of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def soak(folder: Path, tokenizer: Path | None, *, requests: int, seed: int, workers: int | None = None) -> Result:
    """Loads the artifact in `folder`, runs the soak on it and closes it."""
    before = set(threading.enumerate())
    rng = random.Random(seed)
    with LLM(folder, tokenizer=tokenizer, threads=2) as alone:
        vocab_size = alone.core.limits.vocab_size
        assert vocab_size is not None
        cases = Cases(alone, rng, vocab_size=vocab_size, longest=_LONGEST)
    llm = LLM(
        folder,
        tokenizer=tokenizer,
        data_parallel_size=2,
        workers=workers,
        threads=2 if workers is None else None,
        max_batch_size=8,
        paged_attention_num_blocks=_NUM_PAGES,
        prefill_chunk_size=16,
    )
    with llm:
        result = Soak(llm, cases, requests=requests, seed=seed).run()
    left = set(threading.enumerate()) - before
    if left:
        result.problems.append(f"threads left: {sorted(thread.name for thread in left)}")
    return result


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description="Random requests and aborts on little memory, each accounted for.")
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=None, help="processes of each replica, instead of threads")
    parser.add_argument(
        "--artifact", type=Path, default=None, help="with its tokenizer; by default a small one is made"
    )
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if arguments.artifact is None:
            artifact, tokenizer = llama(Mesh((2, 2)), LlamaSize(vocab=1024)).write(Path(folder) / "artifact"), ZOO
        else:
            artifact, tokenizer = arguments.artifact, None
        result = soak(artifact, tokenizer, requests=arguments.requests, seed=arguments.seed, workers=arguments.workers)
    slope = "too few to tell" if result.slope is None else f"{result.slope:+.2f} MiB per 1,000 requests"
    sys.stdout.write(
        f"{result.requests} requests, {result.aborts} aborted, {result.ties} ties, {result.preemptions} preemptions, "
        f"{result.seconds:.0f} s, memory {slope}: {len(result.problems)} problems\n"
    )
    for problem in result.problems[:20]:
        sys.stdout.write(f"  {problem:.400}\n")
    return 1 if result.problems else 0


if __name__ == "__main__":
    sys.exit(main())
