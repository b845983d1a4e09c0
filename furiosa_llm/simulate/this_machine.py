"""This machine as a device: what the engine takes for steps of small models, and how fast its kernels are."""

from __future__ import annotations

import datetime
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from furiosa_llm.bench.load import run_load
from furiosa_llm.bench.sweep import machine
from furiosa_llm.bench.workload import random_jobs
from furiosa_llm.builder.artifact_builder import ArtifactBuilder
from furiosa_llm.example.llama.config import LlamaConfig
from furiosa_llm.example.llama.configs import SpecialTokens, write_configs
from furiosa_llm.example.llama.genai import write_genai_graph
from furiosa_llm.example.llama.onnx_writer import MODEL, write_model_files
from furiosa_llm.example.llama.projection import DenseProjection
from furiosa_llm.example.llama.weights import RandomWeights
from furiosa_llm.runtime.artifact.card import PES_PER_CARD
from furiosa_llm.runtime.artifact.progress import tell
from furiosa_llm.runtime.artifact.units import counted
from furiosa_llm.runtime.engine.core import EngineCore
from furiosa_llm.runtime.engine.engine_args import DEFAULT_BATCH_SIZE, EngineArgs
from furiosa_llm.runtime.engine.launch import load_engine
from furiosa_llm.runtime.placement.devices import MAX_CARDS
from furiosa_llm.runtime.placement.workload import DEFAULT_CHUNK_SIZE
from furiosa_llm.runtime.tokens.sampling_params import RequestOutputKind, SamplingParams
from furiosa_llm.simulate.cores import CoreSteps
from furiosa_llm.simulate.device import RATE_UNIT, Constant, Cores, Device, Rates, Software, Unit
from furiosa_llm.simulate.kernels import NBYTES, product_rates
from furiosa_llm.simulate.model import costs_of_model
from furiosa_llm.simulate.placement import Placement
from furiosa_llm.simulate.steps import Work

SOFTWARE = "furiosa-llm-onnx"
_FITTED = (
    *("step_time", "op_time", "collective_time"),
    *("activation_bandwidth", "cache_bandwidth", "attention_one", "attention_many"),
)
_OF_SOFTWARE = ("sequence_time", "request_time")
_ROUNDS = 2
_FEW = 8
"""Steps of decoding from which their median counts."""
_LEAST = 1e-18
"""Seconds that a byte or a FLOP takes at least, where the fit has none."""
_NONE = Unit("s").least
"""Seconds: a fitted time below is rounding, and no device file may have it."""
_LOADS = ((1, 4, 24), (1, 128, 2), (1, 256, 2), (4, 16, 24), (16, 16, 48), (1, 1000, 20))
"""Requests at once, and the tokens of their prompts and completions."""


def _sizes(hidden: int, inner: int, layers: int, heads: int, kv_heads: int, vocabulary: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=64,
        max_position_embeddings=2048,
        rms_norm_eps=1e-5,
        rope_theta=1e4,
        tie_word_embeddings=True,
    )


_DEEP, _FLAT = (_sizes(64, 128, layers, 4, 4, 8000) for layers in (24, 4))
_WIDE = _sizes(512, 1408, 8, 16, 4, 32000)
_MODELS = ((_FLAT, 4), (_DEEP, 4), (_DEEP, 1), (_WIDE, 4))
"""Sizes and tensor parallel sizes that differ in what takes the time: steps, nodes, collectives, values, attention."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Observation:
    """A step of a model, and what it took."""

    steps: CoreSteps
    work: Work
    request: bool
    """Whether the time is of a request's first token."""
    seconds: float

    def amounts(self) -> dict[str, float]:
        """What it has of each thing whose time is fitted."""
        return {**self.steps.amounts(self.work, 0), "request_time": float(self.request)}

    def rest(self) -> float:
        """What products leave of the time."""
        return self.seconds - sum(self.steps.products(self.work, 0))


def measure_this_machine(*, processor_time: bool = False) -> Device:
    """The device, within about a minute. With `processor_time` it is one core, as if nothing else ran here."""
    count = 1 if processor_time else len(os.sched_getaffinity(0))
    source = f"measured here, {datetime.date.today().isoformat()}"
    clocks = (time.thread_time, time.process_time) if processor_time else (time.perf_counter, time.perf_counter)
    products = [one for kind in NBYTES for one in product_rates(kind, count, source=source, clock=clocks[0])]
    device = _device(count, products, source)
    observations = []
    for number, (config, size) in enumerate(_MODELS):
        tell("measuring steps", number, len(_MODELS))
        observations += list(_observe(config, size, device, clocks[1]))
    return _with(device, _fit(observations))


def _observe(config: LlamaConfig, size: int, device: Device, clock: Callable[[], float]) -> Iterator[Observation]:
    """The steps of one model."""
    software = device.software[SOFTWARE]
    assert software.cores is not None
    with TemporaryDirectory() as scratch:
        model, folder = Path(scratch) / "model", Path(scratch) / "artifact"
        model.mkdir()
        weights = RandomWeights(config, 0)
        write_model_files(model, lambda writer: write_genai_graph(writer, weights, DenseProjection(weights)))
        write_configs(model, config, SpecialTokens(bos=1, eos=2, unknown=0, padding=0), genai=True)
        ArtifactBuilder(model / MODEL, tensor_parallel_size=size, experimental_tp=True).build(folder)
        place = Placement(tensor_parallel_size=size)
        steps = CoreSteps(costs_of_model(model / MODEL).at(size), device, software, place)
        args = EngineArgs(
            folder, data_parallel_size=1, threads=round(software.cores.count.value), enable_prefix_caching=False
        )
        core = load_engine(args)
        try:
            for load in _LOADS:
                yield from _timed(core, steps, load, clock)
        finally:
            core.close()


def _timed(
    core: EngineCore, steps: CoreSteps, load: tuple[int, int, int], clock: Callable[[], float]
) -> Iterator[Observation]:
    """The least of several times of a prompt's step, and of the steps in which all requests decode."""
    users, input_len, output_len = load
    params = SamplingParams(temperature=0.0, ignore_eos=True, output_kind=RequestOutputKind.DELTA)
    jobs = random_jobs(users, input_len=input_len, output_len=output_len, vocab_size=core.limits.vocab_size or 2)
    firsts, gaps = [], []
    for _ in range(_ROUNDS):
        records = run_load(core, jobs, params, due=None, concurrency=None, clock=clock).records
        firsts.append(records[0].token_times[0] - records[0].due)
        times = records[-1].token_times
        gaps.append(float(np.median(np.diff(times)[: max(output_len - 2 * users, 1)])))
    if users == 1 and input_len <= DEFAULT_CHUNK_SIZE:
        yield Observation(steps=steps, work=steps.prefill(input_len, 0), request=True, seconds=min(firsts))
    if output_len > 2 * users + _FEW:
        work = steps.decode(users, input_len + output_len / 2)
        yield Observation(steps=steps, work=work, request=False, seconds=min(gaps))


def _fit(observations: Sequence[Observation]) -> dict[str, float]:
    """The time of each amount, none below 0, of the least squares of relative errors."""
    names = [*_FITTED, *_OF_SOFTWARE]
    amounts = [one.amounts() for one in observations]
    terms = np.array([[a[n] / o.seconds for n in names] for a, o in zip(amounts, observations, strict=True)])
    wanted = np.array([max(one.rest(), 0.0) / one.seconds for one in observations])
    used = list(range(len(names)))
    while True:
        scale = np.linalg.norm(terms[:, used], axis=0)
        found = np.linalg.lstsq(terms[:, used] / scale, wanted, rcond=None)[0] / scale
        if found.min() >= 0:
            break
        del used[int(np.argmin(found * scale))]
    return dict.fromkeys(names, 0.0) | {names[i]: value for i, value in zip(used, found.tolist(), strict=True)}


def _device(count: int, products: Sequence[Rates], source: str) -> Device:
    """The machine, before its steps are measured."""

    def constant(value: float, unit: str, mark: str = "measured", by: str = source) -> Constant:
        return Constant(value=value, unit=unit, source=by, mark=mark)

    def unused(unit: str) -> Constant:
        return constant(1.0, unit, "assumed", "not used: simulated PEs share the cores")

    engine = "the engine's own"
    float32, int8 = ([one for one in products if one.nbytes_of_weight == NBYTES[n]][-1] for n in ("float32", "int8"))
    bandwidth = constant(float32.values[0] / 2 * float32.nbytes_of_weight, "B/s")
    zero = constant(0.0, "s")
    cores = Cores(
        count=constant(count, "1"),
        step_time=zero,
        op_time=zero,
        collective_time=zero,
        activation_bandwidth=constant(1.0, "B/s"),
        cache_bandwidth=constant(1.0, "B/s"),
        attention_one=constant(1.0, "FLOP/s"),
        attention_many=constant(1.0, "FLOP/s"),
        products=tuple(products),
    )
    software = Software(
        memory_efficiency=unused("1"),
        attention_efficiency=unused("1"),
        compute_efficiency=unused("1"),
        block_time=unused("s"),
        block_time_spanning=unused("s"),
        block_time_batched=unused("s"),
        sequence_time=zero,
        request_time=zero,
        memory_share=constant(1.0, "1", "assumed", "no share is kept back"),
        memory_reserved=constant(0.0, "B", "assumed", "nothing is kept back"),
        max_sequences=constant(DEFAULT_BATCH_SIZE, "1", "published", engine),
        chunk=constant(DEFAULT_CHUNK_SIZE, "tokens", "published", engine),
        mixed=constant(0.0, "1", "published", engine),
        bucket=constant(1.0, "tokens", "published", engine),
        cores=cores,
    )
    found = machine()
    return Device(
        name="this-machine",
        title=f"{found['processor']}, {counted(count, 'core')}",
        units_per_card=PES_PER_CARD,
        cards_per_host=MAX_CARDS,
        memory=constant(float(found["memory_bytes"]), "B"),
        bandwidth=bandwidth,
        on_chip=unused("B"),
        flops_16=constant(max(float32.values), "FLOP/s", by=f"float32, no 16-bit kernel: {source}"),
        flops_8=constant(max(int8.values), "FLOP/s"),
        link_in_card=unused("B/s"),
        link_in_host=unused("B/s"),
        link_of_hosts=unused("B/s"),
        latency_of_hosts=unused("s"),
        power_idle=constant(0.0, "W", "assumed", "not known"),
        power_busy=constant(0.0, "W", "assumed", "not known"),
        software={SOFTWARE: software},
    )


def _with(device: Device, seconds: Mapping[str, float]) -> Device:
    """The device with the times that were fitted; what is a rate is the inverse of one."""
    software = device.software[SOFTWARE]
    assert software.cores is not None

    def measured(old: Constant, name: str) -> Constant:
        value = 1 / max(seconds[name], _LEAST)
        if old.unit == "s":
            value = seconds[name] if seconds[name] >= _NONE else 0.0
        return replace(old, value=value)

    times: dict[str, Any] = {n: measured(getattr(software.cores, n), n) for n in _FITTED}
    cores = replace(software.cores, **times)
    own = {n: measured(getattr(software, n), n) for n in _OF_SOFTWARE}
    return replace(device, software={SOFTWARE: replace(software, cores=cores, **own)})


def device_text(device: Device) -> str:
    """The device as a file; `parse_device` reads it."""
    lines = [
        f"{name} = {json.dumps(getattr(device, name))}"
        for name in ("name", "title", "units_per_card", "cards_per_host")
    ]
    lines += _lines(device)
    for name, software in device.software.items():
        lines += ["", f"[software.{name}]", *_lines(software)]
        if software.cores is not None:
            lines += ["", f"[software.{name}.cores]", *_lines(software.cores)]
            for rates in software.cores.products:
                lines += ["", f"[[software.{name}.cores.products]]", f'unit = "{RATE_UNIT}"']
                lines += [f"{f.name} = {json.dumps(getattr(rates, f.name))}" for f in fields(Rates)]
    return "\n".join(lines) + "\n"


def _lines(table: Device | Software | Cores) -> list[str]:
    found = {f.name: getattr(table, f.name) for f in fields(table)}
    return [
        f"{name} = {{ " + ", ".join(f"{f.name} = {json.dumps(getattr(one, f.name))}" for f in fields(Constant)) + " }"
        for name, one in found.items()
        if isinstance(one, Constant)
    ]
