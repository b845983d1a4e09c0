"""SmolLM2 served in batches and stages: the bits of each sequence alone, whatever the stages, threads and chunks."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from furiosa_llm.runtime.artifact.reader import Artifact, open_artifact
from furiosa_llm.runtime.runners.batch_invariance import BatchInvariance, probe_batch_invariance
from tests.runtime.runners.test_local_runner import (
    Array,
    Stepped,
    alone,
    prefill,
    random_prompts,
    runner_of,
    same_bits,
    serve,
)
from tests.support.artifacts import smollm2_artifact

pytestmark = pytest.mark.real_model

SHAPES = ["genai-fp32", "int4", "optimum-fp32"]
PROMPTS = random_prompts([5, 29, 13, 67], vocabulary=40000)
STEPS = 5
IN_EVERY_RUN = {(1, 1), (1, 3), (2, 2), (4, 1), (4, 3)}
"""Stages and threads: each number of both; the other pairs are left to `make test-release`."""


@pytest.fixture(scope="module", params=SHAPES)
def artifact(request: pytest.FixtureRequest) -> Artifact:
    return open_artifact(smollm2_artifact(request.param))


@pytest.fixture(scope="module")
def probed(artifact: Artifact) -> BatchInvariance:
    return probe_batch_invariance(artifact)


@pytest.fixture(scope="module")
def expected(artifact: Artifact, probed: BatchInvariance) -> list[list[Array]]:
    """Each sequence alone: by the whole program, or with the companions that this machine's kernels ask for."""
    if probed.invariant:
        return alone(artifact, PROMPTS, STEPS)
    assert probed.companions is not None, str(probed)
    found: list[list[Array]] = []
    for prompt in PROMPTS:
        with runner_of(artifact, companions=probed.companions) as (_, runner):
            found += serve(runner, [prompt], STEPS)
    return found


@pytest.mark.parametrize(
    ("stages", "threads"),
    [
        pytest.param(*row, marks=() if row in IN_EVERY_RUN else pytest.mark.release)
        for row in itertools.product((1, 2, 4), (1, 2, 3))
    ],
)
def test_stages_threads_batches_and_chunks_do_not_change_a_bit(
    stages: int, threads: int, artifact: Artifact, probed: BatchInvariance, expected: list[list[Array]]
) -> None:
    companions = probed.companions
    assert companions is not None, str(probed)
    with runner_of(artifact, stages=stages, threads=threads, companions=companions) as (host, runner):
        assert host.model.traits.rows == "ragged"
        assert same_bits(serve(runner, PROMPTS, STEPS), expected)
        if probed.chunks:
            assert same_bits(serve(runner, PROMPTS, STEPS, chunk=16, group=stages - 1), expected)


def test_one_token_behind_a_past_is_added_up_in_another_order(artifact: Artifact) -> None:
    """docs/determinism.md: by rounding in fp32; activations that are rounded to 8 bits make more of it."""
    prompt = PROMPTS[1]
    with runner_of(artifact) as (_, runner):
        whole = prefill(runner, Stepped(0, list(prompt)))
        one = Stepped(1, prompt[:-1])
        prefill(runner, one, wanted="none")
        one.tokens.append(prompt[-1])
        found = prefill(runner, one)
    is_int4 = any(node.op_type == "MatMulNBits" for node in artifact.program.graph.node)
    np.testing.assert_allclose(found, whole, rtol=0, atol=3 if is_int4 else 2e-4)
    assert found.argmax() == whole.argmax()
