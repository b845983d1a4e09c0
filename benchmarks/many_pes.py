"""32 simulated PEs in one process: `python -m benchmarks.many_pes ARTIFACT PP DP` loads them and answers prompts."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.artifacts import artifact, run_measured
from benchmarks.bars import Bar
from benchmarks.memory import peak_nbytes
from benchmarks.parity import PROMPTS
from furiosa_llm import LLM, LLMEngine, SamplingParams

_PROMPTS = PROMPTS[:8]
_TOKENS = 32
_MESHES = ((8, 4, 1), (4, 2, 4))
"""Tensor, pipeline and data parallel size."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answers:
    """What one process did: seconds to load, its peak memory, requests of the replica that had the fewest, and tokens.

    `peak_rss_nbytes` is the process's own count: the one that its parent gets begins with the parent's memory.
    """

    load_seconds: float
    peak_rss_nbytes: int
    fewest_requests: int
    token_ids: list[list[int]]


def bars(name: str) -> Iterator[Bar]:
    """Load time, memory when all replicas have answered, and tokens that are not those of one replica of one stage."""
    for tensor, pipeline, data in _MESHES:
        folder = artifact(name, tensor).folder
        what = f"{name} tp {tensor} x pp {pipeline} x dp {data}, {tensor * pipeline * data} PEs"
        expected = _run(folder, 1, 1)
        found = _run(folder, pipeline, data)
        yield Bar(what=f"{what}: load", figure=found.load_seconds, limit=10, unit=" s")
        beside = f"{len(_PROMPTS)} requests, at least {found.fewest_requests} in each replica"
        yield Bar(what=f"{what}: peak memory", figure=found.peak_rss_nbytes / 1e9, limit=3, unit=" GB", beside=beside)
        yield Bar(what=f"{what}: replicas without a request", figure=int(not found.fewest_requests), limit=0)
        differing = sum(a != b for a, b in zip(expected.token_ids, found.token_ids, strict=True))
        beside = f"of {len(_PROMPTS)} x {_TOKENS} tokens, greedy"
        yield Bar(what=f"{what}: prompts whose tokens differ from pp=1, dp=1", figure=differing, limit=0, beside=beside)


def _run(folder: Path, pipeline: int, data: int) -> Answers:
    """What a process of its own found."""
    command = [sys.executable, "-m", "benchmarks.many_pes", str(folder), str(pipeline), str(data)]
    return Answers(**json.loads(run_measured(command).output))


def measure(folder: Path, pipeline: int, data: int) -> Answers:
    """Loads the artifact and completes all prompts at once."""
    started = time.perf_counter()
    llm = LLM.load_artifact(folder, pipeline_parallel_size=pipeline, data_parallel_size=data)
    load_seconds = time.perf_counter() - started
    params = SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=_TOKENS)
    with LLMEngine.from_llm(llm) as engine:
        for number, prompt in enumerate(_PROMPTS):
            engine.add_request(str(number), prompt, params)
        fewest = min(replica.num_requests for replica in llm.core.replicas)
        token_ids: dict[int, list[int]] = {}
        while engine.has_unfinished_requests():
            for output in engine.step():
                token_ids[int(output.request_id)] = list(output.outputs[0].token_ids)
    return Answers(
        load_seconds=load_seconds,
        peak_rss_nbytes=peak_nbytes(os.getpid()),
        fewest_requests=fewest,
        token_ids=[token_ids[number] for number in range(len(_PROMPTS))],
    )


if __name__ == "__main__":
    sys.stdout.write(json.dumps(asdict(measure(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])))))
