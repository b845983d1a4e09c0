"""What stages, collectives and replicas count, by hand arithmetic, and what a snapshot of the machine says of them."""

from __future__ import annotations

import itertools
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from furiosa_llm.runtime import Executor
from furiosa_llm.runtime.artifact.card import PE_NBYTES
from furiosa_llm.runtime.artifact.layout import Mesh
from furiosa_llm.runtime.artifact.manifest import CollectiveKind
from furiosa_llm.runtime.artifact.reader import Artifact, open_artifact
from furiosa_llm.runtime.engine.core import EngineCore
from furiosa_llm.runtime.engine.engine_args import EngineArgs
from furiosa_llm.runtime.engine.launch import make_plan, start
from furiosa_llm.runtime.engine.machine_snapshot import MachineSnapshot, PESnapshot
from furiosa_llm.runtime.engine.replica_counts import ReplicaMeter
from furiosa_llm.runtime.engine.scheduler import PAGE_SIZE
from furiosa_llm.runtime.errors import UnsupportedError
from furiosa_llm.runtime.execution.counters import (
    WIDTH,
    CollectiveMeter,
    StageCounts,
    TransferCounts,
    count_run,
    count_send,
    merged,
    new_counters,
    rows_of,
    stage_counts,
)
from furiosa_llm.runtime.llm import LLM
from furiosa_llm.runtime.placement.capacity import received_nbytes_per_token
from furiosa_llm.runtime.placement.devices import PE
from furiosa_llm.runtime.placement.stages import choose_stages
from furiosa_llm.runtime.program.stage_graph import received_values
from furiosa_llm.runtime.requests.outputs import RequestOutput
from furiosa_llm.runtime.runners.batch import (
    Copy,
    Decode,
    Piece,
    Prefill,
    ReportsCounts,
    ReportsProgress,
    Row,
    Runner,
    WantedLogits,
)
from furiosa_llm.runtime.runners.local_runner import Host, LocalRunner
from furiosa_llm.runtime.runners.process_runner import ProcessHost, ProcessRunner
from furiosa_llm.runtime.tokens.sampling_params import SamplingParams
from tests.runtime.execution.test_executor import random, unknown_shape
from tests.support.runtime.blocks import llama_blocks
from tests.support.runtime.cores import ZOO, make_core
from tests.support.runtime.models import LlamaSize, mlp
from tests.support.runtime.runners import CountingRunner
from tests.support.tiers import tiered

MESH = Mesh((2, 2))
SIZE = LlamaSize(layers=3, vocab=1024)
PREFILLS = ((3, 1, 4), (1, 5, 9, 2, 6), (5,))
DECODES = 4
DEADLINE = 60.0

RUNS = len(PREFILLS) + DECODES
POSITIONS = sum(map(len, PREFILLS)) + DECODES * len(PREFILLS)
ROWS = 1 + len(PREFILLS[1]) + 1 + DECODES * len(PREFILLS)
"""Rows of logits: of the second prompt all are wanted, of the others the last."""


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return llama_blocks(MESH, SIZE, tmp_path_factory.mktemp("machine"))


@contextmanager
def runner_of(artifact: Artifact, stages: int, *, threads: int = 0, workers: int = 0) -> Iterator[Runner]:
    cut = choose_stages(artifact, num_blocks_per_pp_stage=[1, 2][-stages:] if stages == 2 else [3])
    host: Any = Host(artifact, cut, threads=threads) if threads else ProcessHost(artifact, cut, workers=workers)
    with host:
        runner: Runner = host.runner(slots_per_group=4)
        yield runner
        runner.close()


def serve(runner: Runner, group: int = 0) -> None:
    for slot, prompt in enumerate(PREFILLS):
        wanted: WantedLogits = "all" if slot == 1 else "last"
        piece = Piece(sequence_id=slot, slot=slot, start=0, tokens=prompt, logits=wanted)
        runner.submit(Prefill(group=group, copies=(), pieces=(piece,))).result(DEADLINE)
    for step in range(DECODES):
        rows = tuple(Row(sequence_id=s, start=len(p) + step, token=step + s) for s, p in enumerate(PREFILLS))
        runner.submit(Decode(group=group, copies=(), rows=rows)).result(DEADLINE)


def counted(runner: Runner) -> tuple[StageCounts, ...]:
    assert isinstance(runner, ReportsCounts)
    assert isinstance(runner, ReportsProgress)
    return stage_counts(runner.counts())


def numbers(stages: Sequence[StageCounts]) -> list[dict[str, tuple[int, int]]]:
    """Calls and bytes of each kind, and runs under the name of none."""
    return [{"": (stage.runs, 0)} | {one.kind: (one.calls, one.nbytes) for one in stage.transfers} for stage in stages]


def expected(stages: int, rounds: int = 1) -> list[dict[str, tuple[int, int]]]:
    """Two sums of the residual stream in each layer, one gathering of logits, two values that cross."""
    stream = POSITIONS * SIZE.hidden * 4
    layers = [1, 2] if stages == 2 else [3]
    found: list[dict[str, tuple[int, int]]] = []
    for stage, count in enumerate(layers):
        last = stage == stages - 1
        one = {
            "": (RUNS, 0),
            "AllReduce": (RUNS * 2 * count, 2 * count * stream),
            "AllGather": (RUNS, ROWS * SIZE.vocab * 4) if last else (0, 0),
        }
        if stage:
            one["Send"] = (RUNS, 2 * stream)
        found.append({kind: (calls * rounds, nbytes * rounds) for kind, (calls, nbytes) in one.items()})
    return found


# -- runners -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stages", "name", "count"),
    tiered(
        itertools.product([1, 2], ["threads", "workers"], [1, 2, 3]),
        [(1, "threads", 1), (1, "threads", 2), (2, "threads", 3), (2, "workers", 2)],
    ),
)
def test_what_runs_is_counted(artifact: Artifact, stages: int, name: str, count: int) -> None:
    how = {name: count}
    with runner_of(artifact, stages, **how) as runner:
        assert numbers(counted(runner)) == [dict.fromkeys(one, (0, 0)) for one in expected(stages)]
        serve(runner)
        found = counted(runner)
        assert numbers(found) == expected(stages)
        for stage in found:
            exchanges = [one for one in stage.transfers if one.kind != "Send"]
            assert sum(one.seconds for one in exchanges) < stage.busy_seconds
            alone = exchanges if count == 1 else ()  # one lane has its collectives in its graph
            assert all((one.seconds > 0) is (one.calls > 0 and one not in alone) for one in stage.transfers)
        serve(runner, group=stages - 1)
        assert numbers(counted(runner)) == expected(stages, rounds=2)
    assert numbers(counted(runner)) == expected(stages, rounds=2)
    assert isinstance(runner, LocalRunner | ProcessRunner)
    assert runner._counters[..., 0].all()  # rows of its own for each group, stage and worker


def test_what_crosses_is_what_the_accounting_says(artifact: Artifact) -> None:
    stages = choose_stages(artifact, pipeline_parallel_size=3)
    received = received_nbytes_per_token(artifact, received_values(artifact, [one.first_node for one in stages]))
    with Host(artifact, stages, threads=2) as host:
        runner = host.runner(slots_per_group=4)
        serve(runner)
        sent = [{one.kind: one.nbytes for one in stage.transfers}.get("Send", 0) for stage in counted(runner)]
        runner.close()
    assert sent == [POSITIONS * nbytes for nbytes in received if nbytes is not None]


def test_a_run_that_fails_is_not_counted(artifact: Artifact) -> None:
    piece = Piece(sequence_id=9, slot=3, start=0, tokens=(SIZE.vocab,), logits="last")
    bad = Prefill(group=0, copies=(), pieces=(piece,))
    with runner_of(artifact, 1, threads=2) as runner:
        assert runner.submit(bad).exception(DEADLINE) is not None
        serve(runner)
        assert numbers(counted(runner)) == expected(1)


def test_an_executor_counts_its_runs(tmp_path: Path) -> None:
    artifact = open_artifact(mlp(MESH).write(tmp_path))
    with Executor(artifact, threads=2) as executor:
        for batch in (1, 5):
            executor.run({"x": np.ones((batch, 8), dtype=np.float32)})
        [found] = executor.counts
    assert numbers([found]) == [{"": (2, 0), "AllReduce": (2, 6 * 8 * 4), "AllGather": (0, 0)}]


@pytest.mark.parametrize("threads", [1, 2])
def test_shapes_that_only_the_data_tells(threads: int, tmp_path: Path) -> None:
    artifact = open_artifact(unknown_shape(Mesh((2,)), None).write(tmp_path))
    chosen = 0
    with Executor(artifact, threads=threads) as executor:
        for seed in (1, 2):
            x = random(7, 8, seed=seed)
            executor.run({"x": x})
            chosen += int((x[:, 0] > 0).sum())
        [found] = executor.counts
    assert 0 < chosen < 14
    assert numbers([found]) == [{"": (2, 0), "AllReduce": (2, chosen * 32), "AllGather": (2, 2 * chosen * 32)}]


# -- counters ------------------------------------------------------------------------------------------------------


def test_times_are_means_of_threads_and_go_to_the_kind_that_a_step_has_more_of() -> None:
    kinds: list[list[CollectiveKind]] = [["AllReduce"], [], ["AllGather", "AllReduce", "AllGather"]]
    meter = CollectiveMeter([kind for section in kinds for kind in section], kinds)
    assert meter.kinds == [0, None, 1]
    [row] = rows_of(new_counters(1))
    for one, other in ((10, 3), (20, 4)):
        spent = meter.begin()
        spent[0] += one
        spent[1] += other
    meter.count(row, [100, 200])
    assert row.tolist() == [0, 0, 2, 100, 15, 2, 200, 3, 0, 0, 0]
    meter.begin()[0] = 10**9
    meter.reset()
    meter.begin()[0] = 8
    meter.count(row, [1, 2])
    assert row.tolist() == [0, 0, 4, 101, 23, 4, 202, 3, 0, 0, 0]


def test_groups_add_up_and_workers_count_alike() -> None:
    counters = new_counters(2, 1, 2)
    counters[0, 0] = [[1, 10, 2, 100, 30, 0, 0, 0, 1, 5, 8], [1, 20, 2, 100, 50, 0, 0, 0, 1, 5, 4]]
    counters[1, 0] = [[3, 100, 4, 200, 300, 1, 7, 9, 0, 0, 0], [3, 300, 4, 200, 500, 1, 7, 1, 0, 0, 0]]
    assert counters.shape[-1] == WIDTH
    assert merged(counters).tolist() == [[4, 215, 6, 300, 440, 1, 7, 5, 1, 5, 6]]


def test_a_row_says_what_it_counts() -> None:
    counters = new_counters(2)
    row = rows_of(counters)[1]
    for _ in range(2):
        count_run(row, time.perf_counter_ns() - 10**9)
        count_send(row, 8, 10**9)
    counters[1, 2:8] = [2, 4, 6 * 10**9, 8, 10, 12]
    first, second = stage_counts(counters)
    assert first.transfers == tuple(
        TransferCounts(kind=kind, calls=0, nbytes=0, seconds=0.0) for kind in ("AllReduce", "AllGather")
    )
    assert second.runs == 2
    assert second.busy_seconds >= 2.0
    assert [(one.kind, one.calls, one.nbytes, one.seconds) for one in second.transfers] == [
        ("AllReduce", 2, 4, 6.0),
        ("AllGather", 8, 10, 12e-9),
        ("Send", 2, 16, 2.0),
    ]


class Counted:
    """A runner that has counted `runs` of its one stage."""

    def __init__(self, runs: int) -> None:
        self.runs = runs

    def counts(self) -> Any:
        found = new_counters(1)
        found[0, 0] = self.runs
        return found


def test_a_replica_adds_up_its_runners() -> None:
    meter = ReplicaMeter()
    meter.follow(object())
    assert (meter.read().stages, meter.read().restarts) == ((), 0)
    first = Counted(3)
    meter.follow(first)
    assert meter.read().stages[0].runs == 3
    meter.settle()
    first.runs = 100  # one that was left behind
    assert meter.read().stages[0].runs == 3
    meter.follow(Counted(4))
    assert meter.read().stages[0].runs == 7
    assert meter.read().restarts == 2


def test_what_batches_were() -> None:
    meter = ReplicaMeter()
    copies = tuple(Copy(source=0, target=target, length=4) for target in (1, 2))
    rows = tuple(Row(sequence_id=s, start=4, token=1) for s in range(3))
    pieces = tuple(Piece(sequence_id=s, slot=s, start=0, tokens=(1, 2), logits="last") for s in range(2))
    meter.note(Prefill(group=0, copies=copies, pieces=pieces))
    meter.note(Decode(group=0, copies=copies[:1], rows=rows))
    found = meter.read()
    assert (found.prefilled_tokens, found.decoded_tokens, found.copies) == (4, 3, 3)


# -- the machine ---------------------------------------------------------------------------------------------------


@pytest.fixture
def load(artifact: Artifact) -> Iterator[Callable[..., EngineCore]]:
    loaded: list[EngineCore] = []

    def make(**options: Any) -> EngineCore:
        args = EngineArgs(artifact.folder, tokenizer=ZOO, **options)
        loaded.append(start(make_plan(args, artifact), args))
        return loaded[-1]

    yield make
    for core in loaded:
        core.close()


def generate(core: EngineCore, count: int = 1, max_tokens: int = 5) -> None:
    """Completes a prompt of 20 tokens on each of `count` replicas."""
    outputs: list[RequestOutput] = []
    params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
    for number in range(count):
        prompt = {"prompt_token_ids": [number + 1] * 20}
        core.submit(str(number), prompt, params, lambda found: outputs.extend(one for _, one in found))
    until(lambda: sum(one.finished for one in outputs) == count)
    assert [one.error for one in outputs if one.error is not None] == []
    until(lambda: not any(replica.usage.running for replica in core.replicas))


def until(happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def pes_of(machine: MachineSnapshot) -> list[PESnapshot]:
    return [pe for card in machine.cards for pe in card.pes]


def test_replicas_and_stages_of_an_engine(load: Callable[..., EngineCore]) -> None:
    core = load(data_parallel_size=2, num_blocks_per_pp_stage=[1, 2])
    generate(core, 2)
    machine = core.machine()
    for index, replica in enumerate(machine.replicas):
        assert (replica.replica, replica.alive, replica.ready) == (index, True, True)
        assert (replica.counts.prefilled_tokens, replica.counts.decoded_tokens) == (20, 4)
        assert (replica.counts.restarts, replica.usage.preemptions, replica.usage.running) == (0, 0, 0)
        assert replica.usage.used_pages == 2
        assert [(one.stage.first_block, one.stage.num_blocks) for one in replica.stages] == [(0, 1), (1, 2)]
        assert [one.counts for one in replica.stages] == list(replica.counts.stages)
        assert [one.counts.runs for one in replica.stages] == [5, 5]
        sums = [{t.kind: (t.calls, t.nbytes) for t in one.counts.transfers} for one in replica.stages]
        stream = 24 * SIZE.hidden * 4
        assert sums[0] == {"AllReduce": (10, 2 * stream), "AllGather": (0, 0)}
        # A prefill and four decodes want a row of logits each.
        assert sums[1] == {"AllReduce": (20, 4 * stream), "AllGather": (5, 5 * 1024 * 4), "Send": (5, 2 * stream)}


def test_what_lies_on_the_pes(load: Callable[..., EngineCore], artifact: Artifact) -> None:
    core = load(data_parallel_size=2, max_batch_size=2, devices="npu:1,npu:3", num_blocks_per_pp_stage=[1, 2])
    generate(core)
    machine = core.machine()
    assert [card.npu for card in machine.cards] == [1, 3]
    stages = choose_stages(artifact, num_blocks_per_pp_stage=[1, 2])
    kv = 2 * SIZE.kv_heads // 4 * SIZE.head * 4 * PAGE_SIZE
    pages = core.replicas[0].usage.num_pages
    for stage, card in enumerate(machine.cards):
        assert [(one.replica, one.stage, one.rank) for one in card.pes] == [
            (replica, stage, rank) for replica in range(2) for rank in range(4)
        ]
        assert [one.pe for one in card.pes] == [PE(npu=card.npu, index=index) for index in range(8)]
        assert sum(one.weights_nbytes for one in card.pes) == 4 * stages[stage].weight_nbytes
        assert max(one.weights_nbytes for one in card.pes) - min(one.weights_nbytes for one in card.pes) <= 1
        assert {one.memory_nbytes for one in card.pes} == {PE_NBYTES}
        assert {one.kv_nbytes for one in card.pes} == {kv * (stage + 1) * pages}
        assert [one.kv_used_nbytes for one in card.pes] == [2 * kv * (stage + 1)] * 4 + [0] * 4


def test_pes_that_are_not_used(load: Callable[..., EngineCore], artifact: Artifact) -> None:
    pes = pes_of(load(devices="npu:2:4-7").machine())
    assert [pe.pe for pe in pes] == [PE(npu=2, index=index) for index in range(8)]
    assert pes[:4] == [PESnapshot(pe=PE(npu=2, index=index)) for index in range(4)]
    assert [(pe.replica, pe.stage, pe.rank) for pe in pes[3:]] == [(None,) * 3, *((0, 0, rank) for rank in range(4))]
    assert {pe.weights_nbytes for pe in pes[4:]} == {choose_stages(artifact)[0].weight_nbytes}


@pytest.mark.slow
def test_counters_survive_a_worker_that_is_killed(load: Callable[..., EngineCore]) -> None:
    core = load(workers=2)
    generate(core)
    replica = core.replicas[0]
    [before] = core.machine().replicas[0].stages
    runner = replica._runner
    assert isinstance(runner, ProcessRunner)
    os.kill(runner.process_ids[0], signal.SIGKILL)
    until(lambda: replica.ready and replica.counts.restarts == 1)
    assert core.machine().replicas[0].stages == (before,)
    generate(core)
    found = core.machine().replicas[0]
    twice = {kind: (2 * calls, 2 * nbytes) for kind, (calls, nbytes) in numbers([before.counts])[0].items()}
    assert numbers([found.stages[0].counts]) == [twice]
    for old, new in zip(before.counts.transfers, found.stages[0].counts.transfers, strict=True):
        assert new.seconds >= old.seconds
    assert (found.counts.prefilled_tokens, found.counts.decoded_tokens) == (40, 8)


def test_preemptions_are_told(load: Callable[..., EngineCore]) -> None:
    core = load(paged_attention_num_blocks=5, max_batch_size=2, max_model_len=80)
    generate(core, 2, max_tokens=30)
    [found] = core.machine().replicas
    assert found.usage.preemptions == core.replicas[0]._scheduler.num_preemptions > 0
    assert found.counts.decoded_tokens + found.counts.prefilled_tokens > 2 * (20 + 29)


def test_a_model_without_an_engine_or_a_layout(artifact: Artifact) -> None:
    core = make_core(CountingRunner)
    with pytest.raises(UnsupportedError, match="made without a layout of its PEs; make it with load_engine"):
        core.machine()
    assert core.replicas[0].counts.stages == ()
    core.close()
    with LLM(artifact.folder, tokenizer=ZOO, threads=2) as llm:
        llm.generate([""], SamplingParams(temperature=0.0, max_tokens=3), prompt_token_ids=[[1, 2, 3]])
        assert llm.machine().replicas[0].counts.prefilled_tokens == 3
        assert [card.npu for card in llm.machine().cards] == [0]
