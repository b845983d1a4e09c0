"""The benchmarks: what each subcommand of `furiosa-mlperf` runs, and under which of LoadGen's model keys."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Literal

Scenario = Literal["Offline", "Server"]
Task = Literal["decoder", "encoder"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Benchmark:
    """One subcommand."""

    command: str
    """Its name."""
    sut_name: str
    """What LoadGen calls the system under test in its summary."""
    key: str
    """The model's key in LoadGen's mlperf.conf, and in the lines of a user.conf."""
    scenario: Scenario
    """All samples at once, or arrivals at random moments."""
    task: Task
    """The task of the artifacts that it runs."""
    max_output_tokens: int | None
    """The most tokens of a completion, as MLPerf's reference implementation has it; None for encoders."""


def _both(command: str, sut_name: str, key: str, task: Task, max_output_tokens: int | None) -> tuple[Benchmark, ...]:
    scenarios: tuple[Scenario, ...] = ("Offline", "Server")
    return tuple(
        Benchmark(
            command=f"{command}-{scenario.lower()}",
            sut_name=f"{sut_name} SUT",
            key=key,
            scenario=scenario,
            task=task,
            max_output_tokens=max_output_tokens,
        )
        for scenario in scenarios
    )


BENCHMARKS = (
    *_both("bert", "BERT", "bert", "encoder", None),
    *_both("gpt-j", "GPT-J", "gptj", "decoder", 128),
    *_both("llama-2", "Llama 2", "llama2-70b", "decoder", 1024),
    *_both("llama-3.1", "Llama 3.1", "llama3_1-8b", "decoder", 128),
)


def default_dataset(task: Task) -> Path:
    """The dataset of public domain text that comes with the package."""
    return Path(str(files("furiosa_llm.mlperf") / "data" / f"{task}.jsonl"))
