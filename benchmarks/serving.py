"""What an engine does with many requests at once, and what it costs beside the model."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from queue import SimpleQueue

import numpy as np

from benchmarks.artifacts import artifact, model
from benchmarks.bars import Bar
from benchmarks.parity import PROMPTS
from benchmarks.stepping import THREADS, alternate
from furiosa_llm import LLM, SamplingParams
from furiosa_llm.runtime.artifact.dtypes import Array
from furiosa_llm.runtime.engine.core import EngineCore, ModelLimits
from furiosa_llm.runtime.engine.replica import Replica
from furiosa_llm.runtime.engine.scheduler import PAGE_SIZE, SchedulerLimits
from furiosa_llm.runtime.requests.outputs import RequestOutput
from furiosa_llm.runtime.runners.batch import Batch, Decode
from furiosa_llm.runtime.tokens.sampling_params import RequestOutputKind
from furiosa_llm.runtime.tokens.tokenizer import Tokenizer

_TOKENS = 64
_ROUNDS = 3
_BATCH = len(PROMPTS)
_VOCABULARY = 49152
_STEPS = 500
_MAX_LENGTH = 2048
_CANNED = 4
"""Different logits that an instant runner takes turns with, so that texts are no endless repetition of a token."""


def bars() -> Iterator[Bar]:
    """Requests at once against one after another, then the time of a step that is not the model's."""
    yield _at_once("int4", 4)
    tokenizer = Tokenizer.from_folder(model("genai-fp32").parent)
    greedy = SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=_STEPS, output_kind=RequestOutputKind.DELTA)
    yield _overhead("greedy", tokenizer, greedy, limit=1.0)
    random = SamplingParams(
        temperature=1.0,
        top_k=50,
        top_p=0.95,
        seed=1,
        ignore_eos=True,
        max_tokens=_STEPS,
        output_kind=RequestOutputKind.DELTA,
    )
    yield _overhead("top_k 50, top_p 0.95", tokenizer, random, limit=None)


# -- requests at once ----------------------------------------------------------------------------------------------


def _at_once(name: str, size: int) -> Bar:
    """The time of prompts given together as a share of their time one by one; no prompt is taken from a cache."""
    params = SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=_TOKENS)
    texts: dict[str, list[str]] = {}

    def together() -> float:
        started = time.perf_counter()
        texts["at once"] = [output.outputs[0].text for output in llm.generate(list(PROMPTS), params)]
        return (time.perf_counter() - started) * 1e3

    def one_by_one() -> float:
        started = time.perf_counter()
        texts["in sequence"] = [llm.generate(prompt, params).outputs[0].text for prompt in PROMPTS]
        return (time.perf_counter() - started) * 1e3

    folder = artifact(name, size).folder
    with LLM.load_artifact(folder, threads=THREADS, max_batch_size=_BATCH, enable_prefix_caching=False) as llm:
        times = alternate({"at once": together, "in sequence": one_by_one}, _ROUNDS)
    ours, theirs = (statistics.median(times[side]) for side in ("at once", "in sequence"))
    figure = statistics.median(a / b for a, b in zip(times["at once"], times["in sequence"], strict=True))
    tokens = _BATCH * _TOKENS * 1e3
    differing = sum(a != b for a, b in zip(texts["at once"], texts["in sequence"], strict=True))
    beside = (
        f"{1 / figure:.2f} times the tokens per second: {tokens / ours:.0f} / {tokens / theirs:.0f}; "
        f"{differing} of {_BATCH} texts differ"
    )
    what = f"{name} tp {size}: {_BATCH} requests x {_TOKENS} tokens, time at once / in sequence"
    return Bar(what=what, figure=figure, limit=1 / 3, beside=beside)


# -- what a step costs beside the model ----------------------------------------------------------------------------


class InstantRunner:
    """Takes no time for a batch: its logits were drawn before; it has none for every token of a prompt.

    `between` are the seconds from the end of each full decode to the next one, if no other batch comes between them.
    """

    num_groups = 1

    def __init__(self, *, rows: int, vocabulary: int) -> None:
        random = np.random.default_rng(0)
        self._canned = [4 * random.standard_normal((rows, vocabulary), dtype=np.float32) for _ in range(_CANNED)]
        self._rows = rows
        self._count = 0
        self._ended: float | None = None
        self.between: list[float] = []

    def submit(self, batch: Batch) -> Future[Array]:
        """The logits are there when this returns."""
        started = time.perf_counter()
        full = isinstance(batch, Decode) and len(batch.rows) == self._rows
        if full and self._ended is not None:
            self.between.append(started - self._ended)
        wanted = batch.rows if isinstance(batch, Decode) else [i for piece in batch.pieces for i in piece.wanted]
        future: Future[Array] = Future()
        future.set_result(self._canned[self._count % _CANNED][: len(wanted)])
        self._count += 1
        self._ended = time.perf_counter() if full else None
        return future

    def close(self) -> None:
        """There is nothing to end."""


def _overhead(how: str, tokenizer: Tokenizer, params: SamplingParams, *, limit: float | None) -> Bar:
    """Milliseconds between the logits of a full batch and the next batch: all that is not the model's."""
    runner = InstantRunner(rows=_BATCH, vocabulary=_VOCABULARY)
    _serve_all(runner, tokenizer, params)
    milliseconds = [seconds * 1e3 for seconds in runner.between]
    low, middle, high = statistics.quantiles(milliseconds, n=4)
    beside = f"{len(milliseconds)} steps, quartiles {low:.2f} to {high:.2f}, {middle / _BATCH * 1e3:.0f} us a request"
    what = f"engine overhead of a step at batch {_BATCH}, {how}"
    return Bar(what=what, figure=middle, limit=limit, unit=" ms", beside=beside)


def _serve_all(runner: InstantRunner, tokenizer: Tokenizer, params: SamplingParams) -> None:
    """Runs a request for each prompt on an engine with that runner, and takes all outputs."""
    scheduling = SchedulerLimits(
        num_groups=1,
        slots_per_group=_BATCH,
        num_pages=_BATCH * _MAX_LENGTH // PAGE_SIZE,
        page_size=PAGE_SIZE,
        max_length=_MAX_LENGTH,
        prefill_chunk_size=512,
    )
    limits = ModelLimits(
        max_length=_MAX_LENGTH,
        max_prompt_length=None,
        capacity=_BATCH * _MAX_LENGTH,
        vocab_size=_VOCABULARY,
        eos_token_ids=frozenset(),
    )
    core = EngineCore(replicas=[Replica(0, lambda: runner, scheduling)], tokenizer=tokenizer, limits=limits)
    ready: SimpleQueue[Sequence[tuple[int, RequestOutput]]] = SimpleQueue()
    for number, prompt in enumerate(PROMPTS):
        core.submit(str(number), prompt, params, ready.put)
    unfinished = _BATCH
    while unfinished:
        unfinished -= sum(output.finished for _, output in ready.get())
    core.close()
