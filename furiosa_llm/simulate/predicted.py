"""What a measured machine should do under a benchmark's loads: the same requests, by the clock."""

from __future__ import annotations

import dataclasses
import math
import os
from pathlib import Path

from furiosa_llm.bench.metrics import Figures, figures_of
from furiosa_llm.bench.sweep import Load, Workload
from furiosa_llm.bench.workload import arrivals
from furiosa_llm.runtime.engine.engine_args import EngineArgs
from furiosa_llm.runtime.engine.launch import Plan
from furiosa_llm.simulate.clock import run
from furiosa_llm.simulate.closed_form import Estimate, estimate
from furiosa_llm.simulate.closed_form import Load as SteadyLoad
from furiosa_llm.simulate.cores import steps_on
from furiosa_llm.simulate.device import Device
from furiosa_llm.simulate.errors import DeviceFileError
from furiosa_llm.simulate.model import Costs, costs_of_model
from furiosa_llm.simulate.placement import Placement
from furiosa_llm.simulate.requests import Request
from furiosa_llm.simulate.steps import Steps


class Prediction:
    """The figures of an artifact's loads on a machine that was measured."""

    def __init__(self, device: Device, args: EngineArgs) -> None:
        """Raises DeviceFileError for cards, and for a machine of other cores than this run has."""
        software = next(iter(device.software.values()))
        count = args.threads or args.workers or len(os.sched_getaffinity(0))
        if software.cores is None:
            raise DeviceFileError(
                f"{device.name} is a card, and this runs on cores: write a file of this machine with "
                "`furiosa-llm simulate --measure-this-machine --output FILE`"
            )
        if software.cores.count.value != count:
            raise DeviceFileError(
                f"{device.name} was measured on {software.cores.count.value:g} cores, and this runs on {count}: "
                "measure it again with `furiosa-llm simulate --measure-this-machine`"
            )
        self._device, self._software = device, software
        self._costs: Costs = costs_of_model(Path(args.model))

    def figures(self, plan: Plan, load: Load, workload: Workload) -> Figures | None:
        """By the clock; None for requests that arrive by chance and wait for others, too."""
        open_loop = math.isfinite(load.request_rate)
        if open_loop and load.concurrency is not None:
            return None
        count = len(workload.jobs)
        times = [0.0] * count
        if open_loop:
            times = arrivals(count, load.request_rate, burstiness=workload.burstiness, seed=workload.seed)
        requests = [
            Request(arrival=at, input_len=len(job.prompt_token_ids), output_len=job.max_tokens)
            for at, job in zip(times, workload.jobs, strict=True)
        ]
        users = None if open_loop else min(load.concurrency or count, count)
        return figures_of(run(self._steps(plan), requests, concurrency=users).observed, workload.objectives)

    def steady(self, plan: Plan, users: float, input_len: float, output_len: float) -> Estimate:
        """In closed form, of so many users with one request after the other. Raises PlacementError without room."""
        load = SteadyLoad(kind="closed", amount=users, input_len=input_len, output_len=output_len)
        return estimate(self._steps(plan), load)

    def _steps(self, plan: Plan) -> Steps:
        placed, limits = plan.topology, plan.scheduling
        place = Placement(
            tensor_parallel_size=placed.tensor_parallel_size,
            pipeline_parallel_size=placed.pipeline_parallel_size,
            data_parallel_size=placed.data_parallel_size,
        )
        most = dataclasses.replace(self._software.max_sequences, value=limits.slots_per_group * limits.num_groups)
        chunk = dataclasses.replace(self._software.chunk, value=limits.prefill_chunk_size)
        software = dataclasses.replace(self._software, max_sequences=most, chunk=chunk)
        return steps_on(self._costs.at(place.tensor_parallel_size), self._device, software, place)
