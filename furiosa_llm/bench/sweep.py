"""Runs a workload once for each combination of parallel sizes and load, and gathers the figures."""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from furiosa_llm.bench.load import Observed, run_load
from furiosa_llm.bench.metrics import Figures, beside, figures_of, latencies
from furiosa_llm.bench.workload import Job, arrivals
from furiosa_llm.runtime.artifact.composite import is_composite
from furiosa_llm.runtime.engine.core import EngineCore
from furiosa_llm.runtime.engine.engine_args import EngineArgs
from furiosa_llm.runtime.engine.launch import Plan, make_plan, open_model, start
from furiosa_llm.runtime.errors import UnsupportedError
from furiosa_llm.runtime.placement.topology import Topology
from furiosa_llm.runtime.tokens.sampling_params import RequestOutputKind, SamplingParams


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """How requests are sent."""

    request_rate: float = math.inf
    """Requests a second, on average; infinite: all at once."""
    concurrency: int | None = None
    """The most requests that may be under way; None: any number."""

    def __str__(self) -> str:
        rate = "" if math.isinf(self.request_rate) else f"{self.request_rate:g}/s"
        limit = "" if self.concurrency is None else f"{self.concurrency} at once"
        return ", ".join(part for part in (rate, limit) if part) or "all at once"


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What is asked in each run."""

    jobs: Sequence[Job]
    """The requests, in order."""
    params: SamplingParams
    """The parameters of all requests; `max_tokens` is each job's own."""
    burstiness: float
    """How bursty the arrivals are; see `arrivals`."""
    seed: int
    """The seed of the arrivals."""
    warmups: int
    """How many of the first jobs run, with other prompts, before what is measured."""
    objectives: Mapping[str, float]
    """Limits in milliseconds for goodput."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One run: where the model was, its load, and what was measured."""

    topology: Topology
    load: Load
    figures: Figures
    latencies: Mapping[str, Sequence[float]]
    predicted: Figures | None = None
    """What `furiosa-llm simulate` says of this load, if it was asked."""

    @property
    def label(self) -> str:
        """Its name among the runs."""
        placed = self.topology
        sizes = f"tp {placed.tensor_parallel_size} pp {placed.pipeline_parallel_size} dp {placed.data_parallel_size}"
        return f"{sizes}, {self.load}"

    def as_dict(self) -> dict[str, Any]:
        """For JSON, which has no infinite numbers: such a rate is "inf"."""
        rate = self.load.request_rate
        return {
            **self.topology.as_dict(),
            "request_rate": "inf" if math.isinf(rate) else rate,
            "concurrency": self.load.concurrency,
            **self.figures.as_dict(),
            **({} if self.predicted is None else {"predicted": beside(self.predicted, self.figures)}),
        }


def plans_of(args: EngineArgs, sizes: Sequence[tuple[int | None, int | None]]) -> list[tuple[EngineArgs, Plan]]:
    """A plan for each pair of pipeline and data parallel `sizes`; raises what `make_plan` does."""
    if is_composite(args.model):
        raise UnsupportedError(
            f"{args.model} is an encoder-decoder, which runs without an engine: it is not measured here"
        )
    artifact = open_model(args)
    if artifact.manifest.model.task != "decoder":
        raise UnsupportedError(
            f"{args.model} does not generate, which is what bench measures; `furiosa-mlperf bert-offline` measures "
            f"encoders"
        )
    plans = []
    for pp, dp in sizes:
        one = dataclasses.replace(args, pipeline_parallel_size=pp, data_parallel_size=dp)
        plans.append((one, make_plan(one, artifact)))
    return plans


def sweep(plans: Sequence[tuple[EngineArgs, Plan]], loads: Sequence[Load], workload: Workload) -> Iterator[Run]:
    """The runs as they end: for each of `plans`, whose model is loaded once, each of `loads`."""
    for args, plan in plans:
        core = start(plan, args)
        try:
            _warm_up(core, workload)
            for load in loads:
                observed = _observe(core, workload, load)
                yield Run(
                    topology=plan.topology,
                    load=load,
                    figures=figures_of(observed, workload.objectives),
                    latencies=latencies(observed),
                )
        finally:
            core.close()


def loads_of(rates: Sequence[float], limits: Sequence[int]) -> list[Load]:
    """Every rate with every limit; one load of all requests at once if there is neither."""
    every_limit: Sequence[int | None] = limits or [None]
    pairs = itertools.product(rates or [math.inf], every_limit)
    return [Load(request_rate=rate, concurrency=limit) for rate, limit in pairs]


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    return {
        "cores": len(os.sched_getaffinity(0)),
        "processor": _processor(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "python": platform.python_version(),
        "onnxruntime": version("onnxruntime"),
        "furiosa_llm": version("furiosa-llm-onnx"),
    }


def _warm_up(core: EngineCore, workload: Workload) -> None:
    jobs = workload.jobs[: workload.warmups]
    if jobs:
        # Not the prompts that are measured: the prefix cache would give them away.
        backwards = [dataclasses.replace(job, prompt_token_ids=job.prompt_token_ids[::-1]) for job in jobs]
        run_load(core, backwards, _params(workload), due=None, concurrency=None)


def _observe(core: EngineCore, workload: Workload, load: Load) -> Observed:
    due = None
    if not math.isinf(load.request_rate):
        due = arrivals(len(workload.jobs), load.request_rate, burstiness=workload.burstiness, seed=workload.seed)
    return run_load(core, workload.jobs, _params(workload), due=due, concurrency=load.concurrency)


def _params(workload: Workload) -> SamplingParams:
    return dataclasses.replace(workload.params, output_kind=RequestOutputKind.DELTA)


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()
