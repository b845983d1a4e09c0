"""A process that generates and ends at a moment: `python -m tests.campaigns.ended_process ARTIFACT RUN END SECONDS`.

RUN says how it generates, END how it ends, so many seconds after the first tokens have come; both are names of the
functions below. A line `ready` on standard output says that they have. Used by `process_ends`.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import threading
from collections.abc import Callable, Mapping
from types import FrameType
from typing import NoReturn

from furiosa_llm import LLM, AsyncEngineArgs, AsyncLLMEngine, SamplingParams
from furiosa_llm.runtime.errors import EngineDeadError

PARAMS = SamplingParams(temperature=0.8, max_tokens=200, ignore_eos=True)
PROMPTS = ("x", "Once upon a time", "The sea is")
WORKERS: Mapping[str, int] = {"processes": 2, "processes_thread": 2}
"""The ways of generating that spread the PEs over processes, and over how many."""


# -- how it generates -----------------------------------------------------------------------------------------------


def generate(llm: LLM, begin: Callable[[], None]) -> None:
    """Whole completions, on the main thread."""
    llm.generate(PROMPTS[0], SamplingParams(max_tokens=1))
    begin()
    while True:
        llm.generate(list(PROMPTS), PARAMS)


def stream(llm: LLM, begin: Callable[[], None]) -> None:
    """Pieces of text, on the main thread, in a loop of asyncio."""

    async def read() -> None:
        first = True
        while True:
            async for _ in llm.stream_generate(PROMPTS[1], PARAMS):
                if first:
                    begin()
                first = False

    asyncio.run(read())


def steps(llm: LLM, begin: Callable[[], None]) -> None:
    """Steps of an `LLMEngine`, on the main thread."""
    engine, number = llm.engine, 0
    while True:
        for prompt in PROMPTS:
            engine.add_request(str(number), prompt, PARAMS)
            number += 1
        while engine.has_unfinished_requests():
            engine.step()
            if number == len(PROMPTS):
                begin()
                number += 1


def tasks(llm: LLM, begin: Callable[[], None]) -> None:
    """Requests of several tasks of an `AsyncLLMEngine`; `llm` tells where its artifact is."""
    engine = AsyncLLMEngine.from_engine_args(AsyncEngineArgs(sys.argv[1]))

    async def one(number: int) -> None:
        for turn in range(1_000_000):
            async for _ in engine.generate(PROMPTS[number], PARAMS, f"{number}-{turn}"):
                pass
            if number == turn == 0:
                begin()

    async def all_of_them() -> None:
        await asyncio.gather(*(one(number) for number in range(len(PROMPTS))))

    asyncio.run(all_of_them())


def thread(llm: LLM, begin: Callable[[], None]) -> None:
    """Whole completions on a thread that does not keep the process alive; the main thread waits for the end."""
    llm.generate(PROMPTS[0], SamplingParams(max_tokens=1))
    threading.Thread(target=generate_for_ever, args=(llm,), daemon=True).start()
    begin()
    while not _OVER.wait(0.01):
        pass


def generate_for_ever(llm: LLM) -> None:
    while True:
        llm.generate(list(PROMPTS), PARAMS)


RUNS: Mapping[str, Callable[[LLM, Callable[[], None]], None]] = {
    **{one.__name__: one for one in (generate, stream, steps, tasks, thread)},
    "processes": generate,
    "processes_thread": thread,
}
_OVER = threading.Event()
"""The main thread is to fall off its end."""


# -- how it ends ----------------------------------------------------------------------------------------------------


def exception() -> NoReturn:
    """An error that nobody catches."""
    raise SystemError("mine")


def leave() -> NoReturn:
    """`sys.exit`."""
    sys.exit(7)


def at_once() -> NoReturn:
    """`os._exit`, which runs nothing of the interpreter's end."""
    os._exit(9)


def fall_off() -> None:
    """The end of the program while a thread generates."""
    _OVER.set()


def fork_and_leave() -> NoReturn:
    """A child that uses the model of its parent, is told, and ends as a process does; then the parent."""
    child = os.fork()
    if child == 0:
        try:
            MODELS[0].generate(PROMPTS[0], PARAMS)
        except EngineDeadError:
            sys.exit(3)
        sys.exit(4)
    sys.exit(0 if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3 else 5)


MODELS: list[LLM] = []
"""What was loaded, for a fork to use."""
ENDS: Mapping[str, Callable[[], None]] = {
    one.__name__: one for one in (exception, leave, at_once, fall_off, fork_and_leave)
}
"""What the process does itself; signals come from outside."""


def begin_of(end: str, seconds: float) -> Callable[[], None]:
    """What is to be called when tokens come: so much later the process ends itself, if that is how it ends."""

    def now(number: int, frame: FrameType | None) -> None:
        ENDS[end]()

    def begin() -> None:
        if end in ENDS:
            signal.signal(signal.SIGALRM, now)
            signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-6))
        sys.stdout.write("ready\n")
        sys.stdout.flush()

    return begin


def main() -> None:
    """See the module."""
    artifact, run, end, seconds = sys.argv[1:]
    signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell starts in the background ignores it
    llm = LLM.load_artifact(artifact, workers=WORKERS.get(run))
    MODELS.append(llm)
    try:
        RUNS[run](llm, begin_of(end, float(seconds)))
    except KeyboardInterrupt:
        if end != "caught":
            raise
        assert llm.generate(PROMPTS[0], SamplingParams(max_tokens=2, ignore_eos=True)).outputs[0].finish_reason


if __name__ == "__main__":
    main()
