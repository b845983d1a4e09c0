"""Which deployments fit: the largest counts that do, to the one, against the arithmetic of `capacity`."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from furiosa_llm.runtime.artifact.reader import open_artifact
from furiosa_llm.runtime.placement import deployments as module
from furiosa_llm.runtime.placement.capacity import StageMemory, card_memory, stage_memory
from furiosa_llm.runtime.placement.deployments import Deployment, Deployments, _largest
from furiosa_llm.runtime.placement.stages import choose_stages
from furiosa_llm.runtime.placement.topology import make_topology
from furiosa_llm.runtime.placement.workload import Workload
from tests.support.artifacts import BuiltModel, built_model

SMALL_PE = 600_000
"""Bytes that a PE of these tests has: a model of two layers needs several cards."""


@pytest.fixture
def built() -> BuiltModel:
    return built_model("tiny-llama-optimum", 4)


@pytest.fixture
def small_pes(monkeypatch: pytest.MonkeyPatch) -> None:
    """PEs with little memory."""
    real = card_memory
    monkeypatch.setattr(module, "card_memory", lambda *args: real(*args, pe_nbytes=SMALL_PE))
    monkeypatch.setattr(module, "kv_pages", lambda *args, **kwargs: None)


def fits(built: BuiltModel, deployment: Deployment, workload: Workload) -> bool:
    model = open_artifact(built.folder)
    stages = choose_stages(model, pipeline_parallel_size=deployment.pipeline_parallel_size)
    topology = make_topology(
        model.manifest.mesh.size,
        pipeline_parallel_size=deployment.pipeline_parallel_size,
        devices=[f"npu:{n}" for n in range(deployment.cards)],
    )
    memory: tuple[StageMemory, ...] = stage_memory(model, stages, workload)
    return all(card.free_nbytes >= 0 for card in card_memory(topology, memory, workload, pe_nbytes=SMALL_PE))


@pytest.mark.usefixtures("small_pes")
@pytest.mark.parametrize("cards", [1, 2, 3])
def test_the_most_that_fits_is_the_most(built: BuiltModel, cards: int) -> None:
    found = Deployments(open_artifact(built.folder))
    work = Workload(max_model_len=64, prefill_chunk_size=16)
    fitting = list(found.all_on(cards, work))
    assert fitting
    for deployment in fitting:
        most, rest = divmod(found.most_sequences(deployment, work), deployment.data_parallel_size)
        assert rest == 0
        assert most > 1
        assert fits(built, deployment, replace(work, max_batch_size=most))
        assert not fits(built, deployment, replace(work, max_batch_size=most + 1))
        longest = found.longest(deployment, replace(work, max_batch_size=3))
        assert fits(built, deployment, replace(work, max_batch_size=3, max_model_len=longest))
        assert not fits(built, deployment, replace(work, max_batch_size=3, max_model_len=longest + 1))


@pytest.mark.usefixtures("small_pes")
def test_the_fewest_cards(built: BuiltModel) -> None:
    """Two replicas share a card at tp 4, so that two cards hold more for each where there are stages."""
    found = Deployments(open_artifact(built.folder))
    work = Workload(max_model_len=64, prefill_chunk_size=16)
    one = next(found.all_on(1, work))
    beyond = replace(work, max_batch_size=found.most_sequences(one, work) // one.data_parallel_size + 1)
    needed = found.fewest(beyond)
    assert needed is not None
    assert (needed.cards, needed.pipeline_parallel_size) == (2, 2)
    assert found.least_cards(beyond, range(1, 3)) in (1, 2)
    assert found.fewest(beyond, (1,)) is None
    refused = found.on(1, beyond)
    assert refused is not None
    assert not refused.fits


def test_cards_that_no_topology_takes(built: BuiltModel) -> None:
    """Three cards and two stages of 4 PEs would leave PEs over."""
    found = Deployments(open_artifact(built.folder))
    assert [d.pipeline_parallel_size for d in found.all_on(3, Workload(max_model_len=16))] == [1]
    assert [d.pipeline_parallel_size for d in found.all_on(2, Workload(max_model_len=16))] == [1, 2]


@pytest.mark.parametrize("seed", range(200))
def test_the_largest_count_of_what_falls(seed: int) -> None:
    choose = random.Random(seed)
    room, each = choose.randint(-10, 10**6), choose.randint(1, 10**4)
    step, every = choose.randint(0, 10**4), choose.randint(1, 50)

    def free(count: int) -> int:
        return room - each * count - step * (count // every)

    found = _largest(free)
    assert found == 0 if free(1) < 0 else free(found) >= 0 > free(found + 1)


def test_what_never_falls_ends() -> None:
    calls: list[int] = []

    def free(count: int) -> int:
        calls.append(count)
        return 5

    assert _largest(free) == module._ENDLESS - 1
    assert len(calls) < 50
