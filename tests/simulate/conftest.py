"""A model's costs without its graph: Llama 3.1 8B, as `plan --json` says them for one rank and for eight."""

from __future__ import annotations

import pytest

from furiosa_llm.builder.lower.step_costs import Attention, StepCosts, Traffic, Weights


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
