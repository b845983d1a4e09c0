"""Replicas whose lanes are processes: the same bits as threads, and a typed error at once when a process ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from furiosa_llm.runtime.artifact.dtypes import Array
from furiosa_llm.runtime.artifact.layout import Mesh
from furiosa_llm.runtime.artifact.reader import Artifact, open_artifact
from furiosa_llm.runtime.errors import ExecutionError, InputError, UnsupportedError, WorkerError
from furiosa_llm.runtime.placement.stages import Stage, choose_stages
from furiosa_llm.runtime.runners.batch import Decode, Piece, Prefill, Row, Runner
from furiosa_llm.runtime.runners.local_runner import Host
from furiosa_llm.runtime.runners.process_runner import ProcessHost, ProcessRunner
from tests.support.runtime.models import LlamaSize, llama, mlp
from tests.support.tiers import tiered

SIZE = LlamaSize()
PROMPTS = ((3, 1, 4), (1, 5, 9, 2, 6), (5,))
DEADLINE = 60


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return open_artifact(llama(Mesh((2, 2)), SIZE).write(tmp_path_factory.mktemp("llama")))


def stages_of(artifact: Artifact) -> tuple[Stage, ...]:
    return choose_stages(artifact)


def results(runner: Runner, group: int = 0) -> list[Array]:
    """The logits of three prompts, one of them in two chunks, and of four steps of all three together."""
    found: list[Array] = []
    for slot, prompt in enumerate(PROMPTS):
        for start in range(0, len(prompt), 3):
            piece = Piece(
                sequence_id=slot,
                slot=slot,
                start=start,
                tokens=prompt[start : start + 3],
                logits="all",
            )
            batch = Prefill(group=group, copies=(), pieces=(piece,))
            found.append(runner.submit(batch).result(DEADLINE).copy())
    for step in range(4):
        rows = tuple(Row(sequence_id=s, start=len(p) + step, token=step + s) for s, p in enumerate(PROMPTS))
        found.append(runner.submit(Decode(group=group, copies=(), rows=rows)).result(DEADLINE).copy())
    return found


def step(token: int = 1, start: int = 0) -> Decode:
    return Decode(group=0, copies=(), rows=(Row(sequence_id=0, start=start, token=token),))


@pytest.fixture
def runner(artifact: Artifact) -> Iterator[ProcessRunner]:
    with ProcessHost(artifact, stages_of(artifact), workers=2) as host:
        made = host.runner(slots_per_group=4)
        yield made
        made.close()


@pytest.mark.parametrize("workers", tiered([1, 2, 4], [2]))
def test_processes_give_the_bits_of_threads(workers: int, artifact: Artifact) -> None:
    with Host(artifact, stages_of(artifact), threads=2) as threads:
        local = threads.runner(slots_per_group=4)
        expected = results(local)
        local.close()
    with ProcessHost(artifact, stages_of(artifact), workers=workers) as host:
        runner = host.runner(slots_per_group=4)
        found = results(runner)
        assert len(runner.process_ids) == workers
        runner.close()
    assert len(found) == len(expected)
    assert all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))


def test_a_killed_process_is_noticed_at_once(runner: ProcessRunner) -> None:
    runner.submit(step()).result(DEADLINE)
    failures: list[Exception] = []
    noticed = threading.Event()

    def on_failure(error: Exception) -> None:
        failures.append(error)
        noticed.set()

    runner.watch(on_failure)
    os.kill(runner.process_ids[1], signal.SIGKILL)
    assert noticed.wait(DEADLINE)
    assert isinstance(failures[0], WorkerError)
    runner.watch(on_failure)
    runner.close()
    assert failures == failures[:1] * 2
    with pytest.raises(WorkerError, match=r"worker 1, process \d+, has ended by SIGKILL"):
        runner.submit(step(start=1)).result(DEADLINE)


def test_what_is_under_way_fails_when_a_process_is_killed(runner: ProcessRunner) -> None:
    os.kill(runner.process_ids[0], signal.SIGSTOP)
    future = runner.submit(step())
    time.sleep(0.1)
    assert not future.done()
    assert "ranks 2 to 3 in segment" in runner.progress()
    assert "last collective done: none" in runner.progress()
    os.kill(runner.process_ids[0], signal.SIGKILL)
    with pytest.raises(WorkerError, match=r"worker 0, .* has ended by SIGKILL"):
        future.result(DEADLINE)


def test_progress_tells_a_worker_that_is_through_from_one_that_has_not_begun(runner: ProcessRunner) -> None:
    """The arena's header as workers that stand still would leave it."""
    sections = runner._ready[0].collectives[0]
    last = [name for section in sections[:-1] for name in section][-1]
    here = runner._positions[0, 0]
    here[:] = (-1, len(sections) - 1)
    assert runner.progress() == (
        f"stage 0: ranks 0 to 1 through, ranks 2 to 3 in segment {len(sections) - 1}; last collective done: {last}"
    )
    here[:] = (0, -1)
    assert runner.progress() == "stage 0: ranks 0 to 1 in segment 0, ranks 2 to 3 in none; last collective done: none"
    here[:] = -1
    assert runner.progress() == "nothing is under way"


def test_no_process_is_left_behind(artifact: Artifact) -> None:
    with ProcessHost(artifact, stages_of(artifact), workers=2) as host:
        runner = host.runner(slots_per_group=1)
        ids = runner.process_ids
        assert all(Path(f"/proc/{pid}").exists() for pid in ids)
        assert runner.progress() == "nothing is under way"
        runner.close()
    assert not any(Path(f"/proc/{pid}").exists() for pid in ids)
    with pytest.raises(WorkerError, match="the runner is closed"):
        runner.submit(step()).result(DEADLINE)


def test_workers_end_with_their_parent(artifact: Artifact) -> None:
    program = (
        "import sys, time\n"
        "from furiosa_llm.runtime.artifact.reader import open_artifact\n"
        "from furiosa_llm.runtime.runners.process_runner import ProcessHost\n"
        "from furiosa_llm.runtime.placement.stages import choose_stages\n"
        "artifact = open_artifact(sys.argv[1])\n"
        "runner = ProcessHost(artifact, choose_stages(artifact), workers=2).runner(slots_per_group=1)\n"
        "print(*runner.process_ids, flush=True)\n"
        "time.sleep(600)\n"
    )
    command = [sys.executable, "-P", "-c", program, str(artifact.folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        ids = [int(word) for word in parent.stdout.readline().split()]
        parent.kill()
    assert len(ids) == 2
    deadline = time.monotonic() + DEADLINE
    while any(Path(f"/proc/{pid}/exe").exists() for pid in ids) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(Path(f"/proc/{pid}/exe").exists() for pid in ids)


def test_a_segment_that_fails_is_named(runner: ProcessRunner) -> None:
    with pytest.raises(ExecutionError, match=r"segment \d+ failed on ranks \d to \d: "):
        runner.submit(step(token=10**6)).result(DEADLINE)
    with pytest.raises(ExecutionError):
        runner.submit(step()).result(DEADLINE)


@pytest.mark.parametrize("workers", [0, 5])
def test_as_many_workers_as_a_stage_has_pes(workers: int, artifact: Artifact) -> None:
    with pytest.raises(InputError, match=f"workers must be between 1 and the 4 PEs of a stage, got {workers}"):
        ProcessHost(artifact, stages_of(artifact), workers=workers)


def test_what_a_worker_cannot_load_is_raised_here(tmp_path: Path) -> None:
    artifact = open_artifact(mlp(Mesh((2,))).write(tmp_path))
    with pytest.raises(UnsupportedError, match="the model is not a decoder"):
        ProcessHost(artifact, stages_of(artifact), workers=1).runner(slots_per_group=1)
