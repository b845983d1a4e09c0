"""This machine as a device: the file that is written, the fit of its times, and what the clock makes of them."""

from __future__ import annotations

import dataclasses
import itertools
import os

import pytest

from furiosa_llm.simulate import kernels, this_machine
from furiosa_llm.simulate.cores import CoreSteps, rate_at, steps_on
from furiosa_llm.simulate.device import Rates, parse_device
from furiosa_llm.simulate.errors import DeviceFileError
from furiosa_llm.simulate.placement import Placement
from furiosa_llm.simulate.this_machine import SOFTWARE, device_text
from tests.simulate.conftest import LlamaCosts, small_machine


def steps_of(costs: LlamaCosts, tp: int = 1, pp: int = 1, cores: int = 2) -> CoreSteps:
    device = small_machine(cores)
    place = Placement(tensor_parallel_size=tp, pipeline_parallel_size=pp)
    found = steps_on(costs.at(tp), device, device.software[SOFTWARE], place)
    assert isinstance(found, CoreSteps)
    return found


def test_what_is_written_is_read_again() -> None:
    device = small_machine()
    assert parse_device(device_text(device), "here.toml") == device
    assert {"op_time", "bandwidth", "chunk"} <= device.constants(SOFTWARE).keys()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("op_time", "node_time", "there is no key software.furiosa-llm-onnx.cores.node_time"),
        ("rows = [1.0, 16.0]", "rows = [16.0, 1.0]", r"products\[0\].rows must grow"),
        ("rows = [1.0, 16.0]", "rows = [1.0]", r"products\[0\].rows must grow, and have a value each; there are 2 val"),
        ("rows = [1.0, 16.0]", 'rows = ["1"]', r"products\[0\].rows is \['1'\], expected numbers above 0"),
        ('unit = "FLOP/s"\nnbytes', 'unit = "GFLOP/s"\nnbytes', r"products\[0\].unit is 'GFLOP/s', expected 'FLOP/s'"),
        (
            "nbytes_of_weight = 4.0",
            "nbytes_of_weight = 0",
            r"products\[0\].nbytes_of_weight is \[0\], expected numbers",
        ),
        ("[[software.furiosa-llm-onnx.cores.products]]", "[other]", "there is no key other"),
    ],
)
def test_what_is_no_file_of_a_machine_is_refused(old: str, new: str, message: str) -> None:
    text = device_text(small_machine())
    assert old in text
    with pytest.raises(DeviceFileError, match=message):
        parse_device(text.replace(old, new, 1), "here.toml")


def test_ranks_share_the_machine(costs: LlamaCosts) -> None:
    """Products take as long however many ranks they are cut into, but one rank alone has one core of two."""
    alone, two, eight = (sum(s.products(s.decode(4, 100), 0)) for s in (steps_of(costs, tp) for tp in (1, 2, 8)))
    assert alone == pytest.approx(2 * two)
    assert eight == pytest.approx(two, rel=1e-3)


def test_a_stage_has_its_layers(costs: LlamaCosts) -> None:
    whole, halves = steps_of(costs, tp=8), steps_of(costs, tp=8, pp=2)
    work = whole.prefill(64, 0)
    layers = [steps.products(work, 0)[0] for steps in (whole, halves)]
    assert layers[1] == pytest.approx(layers[0] * 2 * halves.counts[0] / 32)  # its layers on half the machine
    assert halves.causes(work, 0)["head"] == halves.causes(work, 0)["sequences"] == 0
    assert halves.causes(work, 1)["head"] > 0


def test_rates_are_those_of_weights_alike() -> None:
    rates = Rates(nbytes_of_weight=4, nbytes_read=1e6, rows=(1, 4), values=(1e9, 4e9), source="here", mark="measured")
    assert [rate_at(rates, rows) for rows in (0.5, 1, 2, 4, 100)] == pytest.approx([1e9, 1e9, 2e9, 4e9, 4e9])


def test_products_are_those_of_the_weights_type(costs: LlamaCosts) -> None:
    steps = steps_of(costs)
    assert steps._rates("block", steps.costs.flops_per_token).nbytes_of_weight == 4.0  # 16 bits have no kernel here
    narrow = tuple(dataclasses.replace(w, floating=False, bits=8, nbytes=w.nbytes // 4) for w in steps.costs.weights)
    steps.costs = dataclasses.replace(steps.costs, weights=narrow)
    assert steps._rates("block", steps.costs.flops_per_token).nbytes_of_weight == 0.625
    assert steps._rates("head", steps.costs.flops_per_row / 2).nbytes_of_weight == 1.125


def test_the_fit_finds_the_times_that_steps_were_made_of(costs: LlamaCosts) -> None:
    machine = small_machine()
    found = []
    for (tp, ops), users in itertools.product(((1, 100), (1, 400), (8, 200)), (1, 4, 16)):
        steps = steps_of(costs, tp)
        steps.costs = dataclasses.replace(steps.costs, ops=ops)
        steps.kv_nbytes *= ops  # more key heads for the same query heads
        for work, request in ((steps.decode(users, 200 * users), False), (steps.prefill(16 * users, 0), True)):
            seconds = steps.seconds(work, 0) + request * machine.software[SOFTWARE].request_time.value
            found.append(this_machine.Observation(steps=steps, work=work, request=request, seconds=seconds))
    fitted = this_machine._with(machine, this_machine._fit(found)).constants(SOFTWARE)
    known = {name: one.value for name, one in machine.constants(SOFTWARE).items()}
    assert {name: one.value for name, one in fitted.items()} == pytest.approx(known, rel=1e-3)
    faster = [dataclasses.replace(one, seconds=one.seconds / 2) for one in found]
    assert min(this_machine._fit(faster).values()) == 0  # products alone take longer: nothing is left for some


@pytest.mark.parametrize("kind", ["float32", "int8", "int4"])
def test_products_are_timed(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"_ROWS": (1, 64), "_SETS": (1e5, 2e5), "_WIDTH": 64, "_SECONDS": 0.0, "_RUNS": 1}.items():
        monkeypatch.setattr(kernels, name, value)
    few, many = kernels.product_rates(kind, 2, source="here")
    assert min(few.values) > 0
    assert few.values[1] == many.values[1]  # of many rows the weights' way is not what takes the time
    assert (few.nbytes_read, many.nbytes_read) == (1e5, 2e5)


@pytest.mark.slow
def test_a_fitted_time_that_is_rounding_is_none() -> None:
    seconds = dict.fromkeys((*this_machine._FITTED, *this_machine._OF_SOFTWARE), 1e-9) | {"sequence_time": 1e-20}
    device = this_machine._with(small_machine(), seconds)
    assert device.software[SOFTWARE].sequence_time.value == 0
    assert device.software[SOFTWARE].request_time.value == 1e-9
    assert parse_device(device_text(device), "here.toml") == device


def test_a_machine_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two small models and few loads, on this machine: every time is one, and the file is read."""
    for name, value in {"_ROWS": (1, 64), "_SETS": (1e5,), "_SECONDS": 0.0, "_RUNS": 1}.items():
        monkeypatch.setattr(kernels, name, value)
    sizes = [this_machine._sizes(64, 64, layers, 4, 4, 500) for layers in (1, 2)]
    monkeypatch.setattr(this_machine, "_MODELS", [(one, 4) for one in sizes])
    monkeypatch.setattr(this_machine, "_LOADS", ((1, 4, 24), (2, 4, 24)))
    device = this_machine.measure_this_machine()
    assert parse_device(device_text(device), "here.toml") == device
    found = {name: one.value for name, one in device.constants(SOFTWARE).items()}
    assert found["bandwidth"] > 1e6
    assert found["count"] == len(os.sched_getaffinity(0))
    times = [found[name] for name in ("step_time", "op_time", "collective_time", "sequence_time", "request_time")]
    assert all(0 <= one < 1 for one in times)
