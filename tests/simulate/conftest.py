"""A model's costs without its graph: Llama 3.1 8B, as `plan --json` says them for one rank and for eight."""

from __future__ import annotations

import pytest

from furiosa_llm.builder.lower.step_costs import Attention, StepCosts, Traffic, Weights
from furiosa_llm.simulate import this_machine
from furiosa_llm.simulate.device import Device, Rates, load_device
from furiosa_llm.simulate.kernels import NBYTES
from furiosa_llm.simulate.placement import Placement
from furiosa_llm.simulate.question import Report, Setting, answer, front, search


def llama(size: int) -> StepCosts:
    """Llama 3.1 8B on one of `size` ranks."""

    def weights(part: str, nbytes: int, share: float) -> Weights:
        return Weights(part=part, nbytes=nbytes // size, share=share, bits=16, floating=True)

    return StepCosts(
        tensor_parallel_size=size,
        layers=32,
        weights=(
            weights("block", 13_959_176_192, 1.0),
            weights("head", 1_050_673_152, 1.0),
            weights("table", 1_050_673_152, 8e-6),
        ),
        flops_per_token=13.96e9 / size,
        flops_per_row=1.05e9 / size,
        attention=(Attention(flops_per_pair=531_489 / size, window=None),),
        state_nbytes_per_sequence=0.0,
        state_nbytes_per_position=131_072 / size,
        state_bits=16,
        activation_nbytes_per_token=11.67e6 if size == 1 else 5.07e6,
        traffic=()
        if size == 1
        else (
            Traffic(kind="AllGather", parts=size, nbytes=256_512, count=1, head=True),
            Traffic(kind="AllReduce", parts=size, nbytes=8192, count=65, head=False),
        ),
        ops=449,
        residual=0.0,
    )


class LlamaCosts:
    """As `Costs`, without a graph."""

    def at(self, size: int) -> StepCosts:
        """On one of `size` ranks."""
        return llama(min(size, 8))


@pytest.fixture
def costs() -> LlamaCosts:
    """Of Llama 3.1 8B at any size."""
    return LlamaCosts()


@pytest.fixture
def setting() -> Setting:
    """Llama 3.1 8B on RNGD."""
    return llama_on_rngd()


def llama_on_rngd() -> Setting:
    """The same, for fixtures of a longer life."""
    device = load_device("rngd")
    return Setting(
        costs=LlamaCosts(),  # type: ignore[arg-type]
        device=device,
        software_name="furiosa-llm",
        software=device.software,
        weights=None,
        kv=None,
        input_len=857,
        output_len=652,
    )


def report_of(setting: Setting, *, model: str = "llama", searched: bool = False) -> Report:
    """What `simulate --cards 2 -pp 2` finds."""
    place = Placement(tensor_parallel_size=8, pipeline_parallel_size=2)
    load = setting.load("closed", 8)
    tried = list(search(setting, 2, None)) if searched else []
    return Report(
        model=model,
        setting=setting,
        placement=place,
        tried_answers=tried,
        answers=front(tried) if tried else [answer(setting, place, 2, load)],
        limits={},
        last=load,
        cards=2,
        searched=searched,
        fewest=None,
        clocked=[],
        calibrated=False,
    )


def small_machine(cores: int = 2) -> Device:
    """A machine whose times are round numbers, as `simulate --measure-this-machine` would write it."""
    rates = [
        Rates(
            nbytes_of_weight=nbytes,
            nbytes_read=64e6,
            rows=(1.0, 16.0),
            values=(2e10, 1e11),
            source="measured here",
            mark="measured",
        )
        for nbytes in NBYTES.values()
    ]
    seconds = {"step_time": 1e-4, "op_time": 1e-6, "collective_time": 1e-5, "sequence_time": 2e-5, "request_time": 1e-3}
    inverse = {"activation_bandwidth": 2e10, "cache_bandwidth": 1e10, "attention_one": 5e9, "attention_many": 4e10}
    device = this_machine._device(cores, rates, "measured here")
    return this_machine._with(device, seconds | {name: 1 / value for name, value in inverse.items()})
