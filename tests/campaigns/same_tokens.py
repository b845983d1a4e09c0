"""Greedy tokens against the unsplit model's, however the model is run: `python -m tests.campaigns.same_tokens --all`.

Tensor, pipeline and data parallel sizes, batches, chunked prefill, preemption, the prefix cache and worker processes,
on SmolLM2 in float32. Without --all it runs the table `PAIRWISE`, in which every pair of two factors' values is. A
token may differ from the unsplit model's only where the distance of the two best logits is within the error of two
logits, as it was measured on the tokens before.
Ends with status 1 if one differs otherwise.
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

from benchmarks.artifacts import artifact
from benchmarks.parity import PROMPTS
from furiosa_llm.example.smollm2.recipe import ensure
from furiosa_llm.runtime.artifact.reader import open_artifact
from furiosa_llm.runtime.engine.engine_args import SchedulerConfig
from furiosa_llm.runtime.engine.scheduler import PAGE_SIZE
from furiosa_llm.runtime.execution.decoder import DecoderSession
from furiosa_llm.runtime.llm import LLM
from furiosa_llm.runtime.requests.outputs import RequestOutput
from furiosa_llm.runtime.tokens.sampling_params import SamplingParams
from furiosa_llm.runtime.tokens.tokenizer import Tokenizer
from furiosa_llm.runtime.verification.reference import ReferenceModel

SHAPE = "genai-fp32"
NUM_TOKENS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """One way to run a model. `chunk` is the prefill chunk size; `preempted`: with too little memory for the batch."""

    tp: int
    pp: int
    dp: int
    batch: int
    chunk: int | None
    preempted: bool
    caching: bool
    workers: int | None

    @property
    def is_possible(self) -> bool:
        """Whether two sequences run at once where one is to be preempted."""
        return not self.preempted or self.batch > 1 or self.pp > 1

    def __str__(self) -> str:
        return " ".join(f"{field.name}={getattr(self, field.name)}" for field in fields(self))


FACTORS: Mapping[str, tuple[int | bool | None, ...]] = {
    "tp": (4, 8),
    "pp": (1, 2, 4),
    "dp": (1, 2),
    "batch": (1, 16),
    "chunk": (None, 7),
    "preempted": (False, True),
    "caching": (True, False),
    "workers": (None, 2),
}


def _table(*rows: tuple[int, int, int, int, int | None, bool, bool, int | None]) -> tuple[Setting, ...]:
    return tuple(Setting(**dict(zip(FACTORS, row, strict=True))) for row in rows)  # type: ignore[arg-type]


PAIRWISE = _table(
    # tp, pp, dp, batch, chunk, preempted, caching, workers
    (8, 2, 1, 1, 7, True, True, 2),
    (4, 4, 2, 16, None, False, False, None),
    (4, 1, 2, 1, 7, False, True, None),
    (8, 1, 1, 16, None, True, False, 2),
    (4, 2, 2, 1, None, True, False, 2),
    (8, 4, 1, 16, 7, True, True, None),
    (4, 2, 1, 16, None, False, True, None),
    (8, 4, 2, 1, 7, False, False, 2),
)


def every_setting() -> Iterator[Setting]:
    """The whole product, without what cannot be."""
    for values in itertools.product(*FACTORS.values()):
        setting = Setting(**dict(zip(FACTORS, values, strict=True)))  # type: ignore[arg-type]
        if setting.is_possible:
            yield setting


@dataclass(frozen=True, slots=True, kw_only=True)
class Answered:
    """What the unsplit model answers: for each token its log probability, and the distance to the next likely one."""

    prompt: tuple[int, ...]
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    gaps: tuple[float, ...]

    def shortened(self, count: int) -> Answered:
        """The same answer with its first `count` tokens as part of the prompt."""
        return Answered(
            prompt=self.prompt + self.token_ids[:count],
            token_ids=self.token_ids[count:],
            logprobs=self.logprobs[count:],
            gaps=self.gaps[count:],
        )


def unsplit_answers(folder: Path, model: Path, prompts: Sequence[Sequence[int]], count: int) -> list[Answered]:
    """What the model in the file `model` answers alone, on plain onnxruntime; `folder` has an artifact of it."""
    manifest = open_artifact(folder, full=False).manifest
    reference = ReferenceModel(
        model, inputs=manifest.inputs, outputs=manifest.outputs, states=manifest.states, threads=2
    )
    session = DecoderSession(reference)
    return [_answered(session, prompt, count) for prompt in prompts]


def _answered(session: DecoderSession, prompt: Sequence[int], count: int) -> Answered:
    session.reset()
    tokens: list[int] = []
    logprobs: list[float] = []
    gaps: list[float] = []
    step = np.array([prompt], dtype=np.int64)
    while len(tokens) < count:
        logits = session.step(step)[0].astype(np.float64)
        second, best = np.partition(logits, -2)[-2:]
        tokens.append(int(logits.argmax()))
        logprobs.append(-math.log(np.exp(logits - best).sum()))
        gaps.append(float(best - second))
        step = np.array([tokens[-1:]], dtype=np.int64)
    return Answered(prompt=tuple(prompt), token_ids=tuple(tokens), logprobs=tuple(logprobs), gaps=tuple(gaps))


@dataclass(slots=True, kw_only=True)
class Comparison:
    """What came of one setting. `problems` are in words; `error` is the greatest of a log probability."""

    problems: list[str]
    ties: int = 0
    error: float = 0.0
    preemptions: int = 0
    cached: int = 0


def compare(
    folder: Path, setting: Setting, expected: Sequence[Answered], *, tokenizer: Path | Tokenizer | None = None
) -> Comparison:
    """Runs the prompts in `setting`, and, if there is a cache, twice one that has the first tokens of its answer."""
    found = Comparison(problems=[])
    with LLM(
        folder,
        tokenizer=tokenizer,
        pipeline_parallel_size=setting.pp,
        data_parallel_size=setting.dp,
        max_batch_size=setting.batch,
        scheduler_config=SchedulerConfig(
            prefill_chunk_size=setting.chunk, enable_prefix_caching=setting.caching, is_offline=True
        ),
        workers=setting.workers,
        paged_attention_num_blocks=_num_pages(setting, expected),
    ) as llm:
        _take_all(llm, expected, found)
        schedulers = [replica._scheduler for replica in llm.core.replicas]
        found.preemptions = sum(scheduler.num_preemptions for scheduler in schedulers)
        if setting.caching:
            again = [expected[-1].shortened(24)]
            for _ in range(2):
                _take_all(llm, again, found)
            if not found.cached:
                found.problems.append("nothing was found in the cache")
    if setting.preempted != bool(found.preemptions):
        found.problems.append(f"{found.preemptions} preemptions, expected {'some' if setting.preempted else 'none'}")
    return found


def _num_pages(setting: Setting, expected: Sequence[Answered]) -> int:
    """Enough for each replica's sequences, or for half of them, and for the longest of all."""
    longest = max(-(-(len(one.prompt) + len(one.token_ids)) // PAGE_SIZE) for one in expected)
    at_once = min(-(-len(expected) // setting.dp), setting.pp * -(-setting.batch // setting.pp))
    return max(longest, at_once * longest // 2) if setting.preempted else 2 * at_once * longest


def _take_all(llm: LLM, expected: Sequence[Answered], found: Comparison) -> None:
    params = [
        SamplingParams(temperature=0.0, max_tokens=len(one.token_ids), ignore_eos=True, logprobs=0, detokenize=False)
        for one in expected
    ]
    prompts = [one.prompt for one in expected]
    for output, one in zip(llm.generate([""] * len(prompts), params, prompts), expected, strict=True):
        found.cached += output.num_cached_tokens or 0
        _take(output, one, found)


def _take(output: RequestOutput, expected: Answered, found: Comparison) -> None:
    """Compares up to the first token that differs: behind it the two go on from different texts."""
    [completion] = output.outputs
    assert completion.logprobs is not None
    if len(completion.token_ids) != len(expected.token_ids):
        found.problems.append(f"{len(completion.token_ids)} tokens, expected {len(expected.token_ids)}")
        return
    error = 0.0
    for position, (token, wanted) in enumerate(zip(completion.token_ids, expected.token_ids, strict=True)):
        if token != wanted:
            if expected.gaps[position] >= 2 * error:
                found.problems.append(
                    f"token {position} behind {list(expected.prompt)} is {token}, expected {wanted}, whose logit is "
                    f"{expected.gaps[position]:.1e} greater than the next, and logits differ by {error:.1e}"
                )
            else:
                found.ties += 1
            break
        error = max(error, abs(completion.logprobs[position][token].logprob - expected.logprobs[position]))
    found.error = max(found.error, error)


def smollm2_answers(
    folder: Path, shape: str, num_prompts: int = len(PROMPTS), num_tokens: int = NUM_TOKENS
) -> list[Answered]:
    """What SmolLM2 in `shape`, whose artifact is in `folder`, answers to the last prompts of the parity benchmark."""
    tokenizer = Tokenizer.from_folder(folder)
    prompts = [tokenizer.encode(prompt) for prompt in PROMPTS[-num_prompts:]]
    return unsplit_answers(folder, ensure(shape) / "model.onnx", prompts, num_tokens)


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description="Greedy tokens of SmolLM2 against the unsplit model's.")
    parser.add_argument("--all", action="store_true", help="the whole product of the factors")
    parser.add_argument("--shape", default=SHAPE, choices=("genai-fp32", "optimum-fp32"))
    arguments = parser.parse_args()
    expected = smollm2_answers(artifact(arguments.shape, 4).folder, arguments.shape)
    failures = 0
    for setting in every_setting() if arguments.all else PAIRWISE:
        started = time.monotonic()
        found = compare(artifact(arguments.shape, setting.tp).folder, setting, expected)
        failures += bool(found.problems)
        sys.stdout.write(
            f"{setting}: {'wrong' if found.problems else 'same'}, {found.ties} ties, error {found.error:.1e}, "
            f"{found.preemptions} preemptions, {found.cached} tokens cached, {time.monotonic() - started:.0f} s\n"
        )
        for problem in found.problems:
            sys.stdout.write(f"  {problem:.400}\n")
        sys.stdout.flush()
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
