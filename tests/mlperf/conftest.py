"""Tiny artifacts, and runs of a few samples under the real LoadGen."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import mlperf_loadgen
import pytest

from furiosa_llm import EngineArgs
from furiosa_llm.dataset import Sample
from furiosa_llm.mlperf.benchmarks import BENCHMARKS, Benchmark
from furiosa_llm.mlperf.model import Model, load_model
from tests.support.artifacts import artifact_of

NAME = "tiny-llama-optimum"
MAX_OUTPUT_TOKENS = 5
PROMPTS = ([5, 6, 7], [8, 9], [10, 11, 12, 13], [14], [15, 16, 17, 18, 19, 20], [21, 22, 23])


def benchmark(command: str) -> Benchmark:
    return next(one for one in BENCHMARKS if one.command == command)


def samples() -> list[Sample]:
    return [
        Sample(
            where=f"sample {index}",
            prompt=ids,
            messages=None,
            max_tokens=None,
            reference="a b c",
            label=str(index // 2),
        )
        for index, ids in enumerate(PROMPTS)
    ]


@pytest.fixture(scope="session")
def artifact() -> Path:
    return artifact_of(NAME)


@pytest.fixture
def model(artifact: Path) -> Iterator[Model]:
    args = EngineArgs(artifact, enable_prefix_caching=False)
    chosen = benchmark("llama-3.1-server")
    with load_model(args, chosen, samples(), max_output_tokens=MAX_OUTPUT_TOKENS) as loaded:
        yield loaded


@pytest.fixture
def encoder(encoder_artifact: Path) -> Iterator[Model]:
    chosen = benchmark("bert-server")
    with load_model(EngineArgs(encoder_artifact), chosen, samples(), max_output_tokens=None) as loaded:
        yield loaded


@pytest.fixture
def settings() -> Callable[..., mlperf_loadgen.TestSettings]:
    """Settings made by hand: LoadGen reads its mlperf.conf once in a process, and these tests share one."""

    def make(
        scenario: str, *, token_latencies: bool = False, min_duration_ms: int = 200
    ) -> mlperf_loadgen.TestSettings:
        made = mlperf_loadgen.TestSettings()
        made.scenario = getattr(mlperf_loadgen.TestScenario, scenario)
        made.min_duration_ms = min_duration_ms
        made.min_query_count = 12
        made.server_target_qps = made.offline_expected_qps = 60.0
        made.server_target_latency_ns = made.ttft_latency = made.tpot_latency = 10**10
        made.use_token_latencies = token_latencies
        return made

    return make
