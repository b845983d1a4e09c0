"""Fits the constants of a software on a device to measurements: few rows, so each constant stays near a prior."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np

from benchmarks.simulate.measurements import Measurement, device_of
from benchmarks.simulate.models import costs_of
from furiosa_llm.simulate.closed_form import Estimate, Load, estimate
from furiosa_llm.simulate.device import Software
from furiosa_llm.simulate.errors import PlacementError
from furiosa_llm.simulate.placement import Placement
from furiosa_llm.simulate.steps import Steps

Constants = Mapping[str, float]
SPREAD = {
    "memory_efficiency": 0.1,
    "attention_efficiency": 0.35,
    "compute_efficiency": 0.25,
    "block_time": 0.7,
    "block_time_spanning": 0.7,
    "block_time_batched": 0.4,
    "sequence_time": 1.0,
    "request_time": 0.7,
}
"""The standard deviation of the logarithm of each constant around its prior."""
_NOISE = 0.1
"""Of the logarithm of a measurement."""
_STEP, _ROUNDS = 1e-3, 25
FITTED = ("tpot", "output_tps", "ttft", "e2e", "itl_mean")
"""What is in the closed form; the rest is never fitted."""


_PRIOR = {
    "memory_efficiency": 0.8,
    "attention_efficiency": 0.6,
    "compute_efficiency": 0.6,
    "block_time": 20e-6,
    "block_time_spanning": 40e-6,
    "block_time_batched": 1e-6,
    "sequence_time": 5e-6,
    "request_time": 15e-3,
}
"""What is usual for GPUs and their kin: no measurement of a device is in it."""
_PRIOR_RNGD = {
    "memory_efficiency": 1.0,
    "attention_efficiency": 0.4,
    "compute_efficiency": 0.7,
    "block_time": 150e-6,
    "block_time_spanning": 90e-6,
    "block_time_batched": 50e-6,
    "sequence_time": 5e-6,
    "request_time": 60e-3,
}
"""From times of single layers (swsok/heteropilot), which are none of the rows."""


def prior_of(device: str) -> dict[str, float]:
    """The constants before any row is seen."""
    return dict(_PRIOR_RNGD if device == "rngd" else _PRIOR)


def with_constants(software: Software, constants: Constants) -> Software:
    """`software` with other values."""
    changed = {n: dataclasses.replace(getattr(software, n), value=v) for n, v in constants.items()}
    return dataclasses.replace(software, **changed)


def steps_of(row: Measurement, constants: Constants) -> Steps:
    """The steps of a measured model on its device. Whoever ran a batch of some size had configured that size."""
    device = device_of(row.device)
    software = with_constants(device.software[row.software], constants)
    if row.mode == "static" and row.amount > software.max_sequences.value:
        most = dataclasses.replace(software.max_sequences, value=row.amount)
        software = dataclasses.replace(software, max_sequences=most)
    return Steps(
        costs_of(row.model, row.tp),
        device,
        software,
        Placement(tensor_parallel_size=row.tp, pipeline_parallel_size=row.pp, data_parallel_size=row.dp),
        weights=row.weights,
        kv=row.kv,
    )


def predicted(row: Measurement, constants: Constants) -> float:
    """In the row's unit; NaN where the model says that it does not fit."""
    steps = steps_of(row, constants)
    if row.metric == "kv_tokens":
        replicas = steps.device.units_per_card // row.tp if row.tp < steps.device.units_per_card else 1
        return float(steps.cache_tokens() * replicas)
    load = Load(kind=row.mode, amount=row.amount, input_len=row.input_len, output_len=row.output_len)
    try:
        return _figure(estimate(steps, load), row.metric)
    except PlacementError:
        return math.nan


def _figure(found: Estimate, metric: str) -> float:
    return {
        "tpot": found.tpot * 1e3,
        "itl_mean": found.tpot * 1e3,
        "ttft": found.ttft * 1e3,
        "e2e": found.e2e * 1e3,
        "output_tps": found.output_tps,
    }[metric]


def fit(rows: Sequence[Measurement], prior: Constants) -> dict[str, float]:
    """The constants of the least squares of logarithms, each with its prior, by Levenberg and Marquardt's steps."""
    names = list(SPREAD)
    start = np.log([prior[name] for name in names])
    spread = np.array([SPREAD[name] for name in names])
    at, damping = start.copy(), 1e-2

    def residuals(point: np.ndarray) -> np.ndarray:
        constants = dict(zip(names, np.exp(point).tolist(), strict=True))
        errors = [math.log(predicted(row, constants) / row.value) for row in rows]
        known = [_robust(error / _NOISE) for error in errors if not math.isnan(error)]
        return np.array([*known, *((point - start) / spread)])

    now = residuals(at)
    for _ in range(_ROUNDS):
        slopes = np.array([(residuals(at + _STEP * axis) - now) / _STEP for axis in np.eye(len(names))]).T
        normal = slopes.T @ slopes
        move = np.linalg.solve(normal + damping * np.diag(np.diag(normal)), -slopes.T @ now)
        then = residuals(at + move)
        if then @ then < now @ now:
            done = now @ now - then @ then < 1e-4 * (now @ now)
            at, now, damping = at + move, then, damping / 5
            if done:
                break
        else:
            damping *= 10
    return dict(zip(names, np.exp(at).tolist(), strict=True))


def _robust(error: float) -> float:
    """Beyond three deviations a row pulls as the square root of its error: published figures have outliers."""
    limit = 3.0
    return error if abs(error) <= limit else math.copysign(math.sqrt(2 * limit * abs(error) - limit**2), error)
