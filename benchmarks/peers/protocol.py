"""What the measuring process and an engine's process say to each other: a line of JSON for each request and answer.

It runs in the engines' own environments, and imports nothing but the standard library.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol, TextIO

Tokens = list[list[int]]
"""For each prompt its tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """What an engine made of some prompts that it was given together."""

    tokens: Tokens
    """The likeliest next tokens of each prompt, as many as were asked for."""
    first_seconds: float
    """From the start until each prompt had its first token."""
    seconds: float
    """From the start to the end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """What an engine says once it is ready."""

    version: str
    """Of the engine's package."""
    how: str
    """For people: threads, and the types of numbers."""
    seconds: float
    """From the start of loading to the first token of a short prompt; imports left out."""


class Engine(Protocol):
    """An engine that generates greedily. It is made before the clock of `load` starts."""

    @property
    def version(self) -> str:
        """Of the engine's package."""
        ...

    def load(self) -> str:
        """Loads the model, and says how it will run; see `Loaded.how`."""
        ...

    def generate(self, prompts: Tokens, count: int) -> Generation:
        """`count` tokens behind each of `prompts`, which are equally long; no token ends a completion."""
        ...


def timed_generation(prompts: Tokens, count: int, step: Callable[[Tokens], Sequence[int]]) -> Generation:
    """A loop of steps: each is given what is new of every sequence, and gives the next token of each."""
    started = time.perf_counter()
    new = [[int(token)] for token in step(prompts)]
    first = time.perf_counter()
    tokens = [list(one) for one in new]
    for _ in range(count - 1):
        new = [[int(token)] for token in step(new)]
        for sequence, one in zip(tokens, new, strict=True):
            sequence.extend(one)
    return Generation(tokens=tokens, first_seconds=first - started, seconds=time.perf_counter() - started)


class Requests(Protocol):
    """An engine of requests, with the methods of vLLM's and of this project's."""

    def add_request(self, request_id: str, prompt: Any, params: Any, /) -> Any:
        """Starts a request."""
        ...

    def has_unfinished_requests(self) -> bool:
        """Whether some are left."""
        ...

    def step(self) -> Any:
        """Runs a batch, and gives the requests that have new tokens."""
        ...


def timed_requests(
    engine: Requests, prompts: Tokens, params: object, ids: Iterator[str], collect: Callable[[Any, list[int]], None]
) -> Generation:
    """A request for each of `prompts`, given together; `collect` puts what an output has into its request's tokens."""
    started = time.perf_counter()
    tokens: dict[str, list[int]] = {}
    for prompt in prompts:
        request_id = next(ids)
        tokens[request_id] = []
        engine.add_request(request_id, {"prompt_token_ids": prompt}, params)
    first = None
    while engine.has_unfinished_requests():
        for output in engine.step():
            collect(output, tokens[output.request_id])
        if first is None and all(tokens.values()):
            first = time.perf_counter()
    assert first is not None
    return Generation(
        tokens=list(tokens.values()), first_seconds=first - started, seconds=time.perf_counter() - started
    )


def serve(engine: Engine) -> None:
    """Answers the requests on standard input until it ends. What libraries print goes to standard error."""
    with os.fdopen(os.dup(1), "w") as answers:
        os.dup2(2, 1)
        for line in sys.stdin:
            write_line(answers, answer(engine, json.loads(line)))


def answer(engine: Engine, request: dict[str, Any]) -> dict[str, Any]:
    """The answer to one request. What an engine raises ends its process, and is the last that its log says."""
    if request["do"] == "generate":
        return asdict(engine.generate(request["prompts"], request["count"]))
    started = time.perf_counter()
    how = engine.load()
    engine.generate([request["prompt"]], 1)
    return asdict(Loaded(version=engine.version, how=how, seconds=time.perf_counter() - started))


def write_line(stream: TextIO, message: dict[str, Any]) -> None:
    """Sends a message at once."""
    stream.write(json.dumps(message) + "\n")
    stream.flush()
