"""Memory per stage and card, by hand arithmetic on small decoders."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from furiosa_llm.runtime.artifact.layout import Mesh
from furiosa_llm.runtime.artifact.reader import Artifact, open_artifact
from furiosa_llm.runtime.artifact.units import nbytes
from furiosa_llm.runtime.errors import CapacityError
from furiosa_llm.runtime.placement.capacity import (
    CardMemory,
    StageMemory,
    card_memory,
    check_weights,
    kv_pages,
    received_nbytes_per_token,
    stage_memory,
)
from furiosa_llm.runtime.placement.stages import Stage, choose_stages
from furiosa_llm.runtime.placement.topology import make_topology
from furiosa_llm.runtime.placement.workload import Workload
from furiosa_llm.runtime.program.stage_graph import received_values
from tests.support.runtime.blocks import llama_blocks
from tests.support.runtime.models import LlamaSize, mlp

MESH = Mesh((2, 2))
SIZE = LlamaSize(layers=3)
KV = 2 * SIZE.kv_heads // 4 * SIZE.head * 4
"""Keys and values of one layer and position on one of four ranks."""


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return llama_blocks(MESH, SIZE, tmp_path_factory.mktemp("llama"))


def memory(weights: int, kv: int = 0, activations: int | None = 0) -> StageMemory:
    return StageMemory(weight_nbytes=weights, kv_nbytes_per_token=kv, activation_nbytes=activations)


def received(artifact: Artifact, stages: Sequence[Stage]) -> tuple[int | None, ...]:
    crossing = received_values(artifact, [stage.first_node for stage in stages])
    return received_nbytes_per_token(artifact, crossing)


# -- stages --------------------------------------------------------------------------------------------------------


def test_states_belong_to_the_stage_that_writes_them(artifact: Artifact) -> None:
    stages = choose_stages(artifact, num_blocks_per_pp_stage=[1, 2])
    found = stage_memory(artifact, stages, Workload())
    assert [one.kv_nbytes_per_token for one in found] == [KV, 2 * KV]
    assert [one.weight_nbytes for one in found] == [stage.weight_nbytes for stage in stages]


def test_what_crosses_is_the_residual_stream(artifact: Artifact) -> None:
    stages = choose_stages(artifact, pipeline_parallel_size=3)
    assert received(artifact, stages) == (0, 2 * SIZE.hidden * 4, 2 * SIZE.hidden * 4)


def test_undeclared_crossings_are_unknown(artifact: Artifact) -> None:
    for value in artifact.program.graph.value_info:
        if value.name == "a0.sum":
            value.type.tensor_type.shape.dim[2].dim_param = "?!"
    try:
        stages = choose_stages(artifact, pipeline_parallel_size=3)
        activations = stage_memory(artifact, stages, Workload())[1].activation_nbytes
        found = received(artifact, stages)
    finally:
        for value in artifact.program.graph.value_info:
            if value.name == "a0.sum":
                value.type.tensor_type.shape.dim[2].dim_value = SIZE.hidden
    assert found[1:] == (None, 2 * SIZE.hidden * 4)
    assert activations is None


def padded(nbytes: int) -> int:
    return -(-nbytes // 64) * 64


@pytest.mark.parametrize(
    ("workload", "rows"),
    [
        (Workload(max_batch_size=3, max_model_len=100, prefill_chunk_size=2), 3),
        (Workload(max_batch_size=3, max_model_len=100, prefill_chunk_size=20), None),
    ],
)
def test_activations_of_the_larger_step(tmp_path: Path, workload: Workload, rows: int | None) -> None:
    """An MLP's batch is the decoded sequences, or one in prefill; its partial and whole sums cross, and its output."""
    artifact = open_artifact(mlp(MESH).write(tmp_path / "mlp"))
    (found,) = stage_memory(artifact, choose_stages(artifact), workload)
    assert found.activation_nbytes == 3 * padded((rows or 3) * 8 * 4)


def test_activations_grow_with_batch_and_chunk(artifact: Artifact) -> None:
    stages = choose_stages(artifact, pipeline_parallel_size=3)

    def last(**sizes: int) -> int:
        nbytes = stage_memory(artifact, stages, Workload(max_model_len=256, **sizes))[-1].activation_nbytes
        assert nbytes is not None
        return nbytes

    logits = SIZE.vocab * 4
    assert last(max_batch_size=1, prefill_chunk_size=64) - last(max_batch_size=1, prefill_chunk_size=32) > 32 * logits
    assert last(max_batch_size=64, prefill_chunk_size=1) > 64 * logits
    assert last(max_batch_size=1, prefill_chunk_size=256) == last(max_batch_size=1, prefill_chunk_size=512)


@pytest.mark.parametrize("name", ["max_batch_size", "max_model_len", "prefill_chunk_size"])
def test_a_workload_is_something(name: str) -> None:
    with pytest.raises(CapacityError, match=f"{name} must be at least 1, got 0"):
        Workload(**{name: 0})


# -- cards ---------------------------------------------------------------------------------------------------------


def test_replicas_on_one_card_keep_weights_once() -> None:
    topology = make_topology(4, data_parallel_size=2, devices="npu:0")
    (card,) = card_memory(topology, [memory(100, 7, 10)], Workload(max_batch_size=2, max_model_len=5), pe_nbytes=1000)
    expected = {"weight_nbytes": 4 * 100, "kv_nbytes": 2 * 4 * 7 * 10, "activation_nbytes": 2 * 4 * 10}
    assert card == CardMemory(npu=0, num_pes=8, capacity_nbytes=8000, **expected)
    assert card.free_nbytes == 8000 - 400 - 560 - 80


def test_replicas_on_other_cards_keep_their_own() -> None:
    topology = make_topology(8, data_parallel_size=2, devices="npu:0,npu:1")
    cards = card_memory(topology, [memory(100)], Workload())
    assert [(card.npu, card.weight_nbytes) for card in cards] == [(0, 800), (1, 800)]


def test_every_stage_lies_on_its_card() -> None:
    topology = make_topology(4, pipeline_parallel_size=2, data_parallel_size=2, devices="npu:3,npu:5")
    cards = card_memory(topology, [memory(100, 1), memory(30, 2, None)], Workload(max_model_len=1))
    assert [(c.npu, c.weight_nbytes, c.kv_nbytes, c.activation_nbytes) for c in cards] == [
        (3, 400, 8, 0),
        (5, 120, 16, 0),
    ]


def test_two_stages_of_two_replicas_on_one_card() -> None:
    """Cards of half the PEs: card 1 has stage 1 of the first replica and stage 0 of the second."""
    topology = make_topology(
        4, pipeline_parallel_size=2, data_parallel_size=2, devices="npu:0:0-3,npu:1:0-3,npu:1:4-7,npu:2:0-3"
    )
    cards = card_memory(topology, [memory(100, 1), memory(30, 2)], Workload(max_model_len=1))
    assert [(card.npu, card.num_pes, card.weight_nbytes, card.kv_nbytes) for card in cards] == [
        (0, 4, 400, 4),
        (1, 8, 520, 12),
        (2, 4, 120, 8),
    ]


# -- pages ---------------------------------------------------------------------------------------------------------


def test_pages_of_the_tightest_stage() -> None:
    topology = make_topology(4, pipeline_parallel_size=2, data_parallel_size=1)
    stages = [memory(100, 3, 50), memory(700, 5, 50)]
    # Stage 0: 850 / (3 x 16) = 17; stage 1: 250 / (5 x 16) = 3 pages.
    assert kv_pages(topology, stages, page_size=16, pe_nbytes=1000) == 3
    assert kv_pages(topology, stages, page_size=1, pe_nbytes=1000) == 50


def test_replicas_on_one_card_share_its_pages() -> None:
    stages = [memory(200, 5)]
    one = make_topology(4, data_parallel_size=1)
    two = make_topology(4, data_parallel_size=2)
    assert kv_pages(one, stages, page_size=1, pe_nbytes=1000) == (4000 - 800) // 20
    assert kv_pages(two, stages, page_size=1, pe_nbytes=1000) == (8000 - 800) // 40


def test_no_pages_without_a_cache() -> None:
    assert kv_pages(make_topology(4), [memory(100)], page_size=16) is None


def test_the_card_s_memory_is_the_default() -> None:
    assert kv_pages(make_topology(8), [memory(10**9, 1000)], page_size=1) == (48 * 10**9 - 8 * 10**9) // 8000


@pytest.mark.parametrize(
    ("stage", "page_size", "message"),
    [
        (
            memory(2 * 10**9, 1, 5 * 10**8),
            16,
            r"npu:0 is to hold 8.0 GB of weights and 2.0 GB of activations on 4 PEs",
        ),
        (memory(2 * 10**9, 1, 5 * 10**8), 16, r"which is 6.0 GB more than their 4.0 GB"),
        (
            memory(10**9 - 10, 1),
            16,
            r"npu:0 has 40 B left beside weights and activations, but a page of 16 tokens takes 64 B",
        ),
        (memory(0, 1), 0, r"page_size must be at least 1 token, got 0"),
    ],
)
def test_no_room_for_a_page(stage: StageMemory, page_size: int, message: str) -> None:
    with pytest.raises(CapacityError, match=message):
        kv_pages(make_topology(4), [stage], page_size=page_size, pe_nbytes=10**9)


# -- weights -------------------------------------------------------------------------------------------------------


def test_weights_that_do_not_fit_name_the_stages_that_would_do(artifact: Artifact) -> None:
    sizes = {n: max(s.weight_nbytes for s in choose_stages(artifact, pipeline_parallel_size=n)) for n in (1, 2, 3)}
    assert sizes[1] > sizes[2] > sizes[3]
    topology, stages = make_topology(4), choose_stages(artifact)
    check_weights(artifact, topology, stages, pe_nbytes=sizes[1])
    for room, remedy in (
        (sizes[2], "use pp=2, which fits"),
        (sizes[2] - 1, "use pp=3, which fits"),
        (sizes[3] - 1, "no number of stages fits; build for a larger tensor parallel size"),
    ):
        with pytest.raises(CapacityError, match=remedy) as refused:
            check_weights(artifact, topology, stages, pe_nbytes=room)
        over = nbytes(4 * (sizes[1] - room))
        assert f"on 4 PEs, which is {over} more than their {nbytes(4 * room)}" in str(refused.value)


def test_cards_share_what_their_replicas_keep(artifact: Artifact) -> None:
    """Two replicas on one card need half as much for each PE, and none of that helps on two cards."""
    stages = choose_stages(artifact)
    half = -(-stages[0].weight_nbytes // 2)
    check_weights(artifact, make_topology(4, data_parallel_size=2), stages, pe_nbytes=half)
    two_cards = make_topology(4, data_parallel_size=2, devices="npu:0:0-3,npu:1:0-3")
    with pytest.raises(CapacityError):
        check_weights(artifact, two_cards, stages, pe_nbytes=half)
