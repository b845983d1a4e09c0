"""Stages on other hosts beside stages in this process, and what crosses between them: `make bench-cluster`.

Each stage is a server in a process of its own on this machine, pinned to one core. Ratios are within a run.
"""

from __future__ import annotations

import os
import re
import resource
import secrets
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
from rich.console import Console

from benchmarks.artifacts import SYNTHETIC
from benchmarks.artifacts import artifact as built
from benchmarks.bars import Bar, show
from benchmarks.hop import hop
from benchmarks.memory import peak_nbytes
from furiosa_llm.runtime.artifact.reader import Artifact, open_artifact
from furiosa_llm.runtime.distributed.artifact_cache import ArtifactSource
from furiosa_llm.runtime.distributed.remote_runner import RemoteRunner
from furiosa_llm.runtime.distributed.wire import Opening, package_version, result_message
from furiosa_llm.runtime.execution.counters import stage_counts
from furiosa_llm.runtime.placement.stages import choose_stages
from furiosa_llm.runtime.runners.batch import NO_COMPANIONS, Decode, Row, Runner
from furiosa_llm.runtime.runners.loaded_model import stage_tensors
from furiosa_llm.runtime.runners.local_runner import Host

TOKEN = secrets.token_hex(16)
_ANY = "tcp://127.0.0.1:0"
_STEPS = 60
_ROUNDS = 5
_IDLE_SECONDS = 10.0
_TIMES_THE_LIMIT = 1.6
_SMALL_STAGES = (2, 4, 2)
"""Blocks of the synthetic model's stages on small nodes: embedding and last matrix take as much as 2.6 blocks each."""
_HIDDEN_SIZE = 576
"""SmolLM2's."""


def bars(name: str, size: int) -> Iterator[Bar]:
    """The figures of an artifact, in the order of the run book."""
    yield hop()
    opened = open_artifact(built(name, size).folder, full=False)
    yield from beside_local(opened)
    yield copied(opened)
    yield from second_node(opened)
    yield from losses(opened)
    yield from small_nodes(open_artifact(built(SYNTHETIC, size).folder, full=False))


def beside_local(artifact: Artifact) -> Iterator[Bar]:
    """Two stages on servers of one thread each, beside two stages in this process on one thread; and what crosses."""
    stages = choose_stages(artifact, pipeline_parallel_size=2)
    with ExitStack() as stack:
        host = stack.enter_context(Host(artifact, stages, threads=1))
        local = host.runner(slots_per_group=1)
        stack.callback(local.close)
        servers = [stack.enter_context(server({0})) for _ in stages]
        runner = stack.enter_context(remote(artifact, [address for _, address in servers]))
        pids = [os.getpid(), *(process.pid for process, _ in servers)]
        steps: dict[str, list[tuple[float, float]]] = {"local": [], "remote": []}
        for _ in range(_ROUNDS):  # in turns: the machine may be busy with something else
            steps["local"].append(_timed(local, pids))
            steps["remote"].append(_timed(runner, pids))
        wall, spent = (min(one[k] for one in steps["remote"]) / min(one[k] for one in steps["local"]) for k in (0, 1))
        seconds = min(one[0] for one in steps["remote"])
        yield Bar(what="pp 2 / local, wall", figure=wall, limit=1.10, unit="x", beside=f"{seconds * 1e3:.1f} ms a step")
        yield Bar(
            what="pp 2 / local, processor time", figure=spent, limit=1.05, unit="x", beside="head and both stages"
        )
        time.sleep(1.5)
        sent = stage_counts(runner.counts())[1].transfers[-1]
        per_row = sent.nbytes / sent.calls
        limit = _HIDDEN_SIZE * 4
        yield Bar(what="bytes that cross for a row", figure=per_row, limit=limit, unit=" B", beside="hidden size x 4")
        before, started = _spent(pids), time.monotonic()
        time.sleep(_IDLE_SECONDS)
        idle = (_spent(pids) - before) / (time.monotonic() - started)
        yield Bar(what="idle: head and two stages, cores", figure=idle, limit=0.15)
    frames = result_message(1, 1, np.zeros((1, 50_000), np.float32), (True,), "FLOAT")
    back = sum(len(frame) + 2 for frame in frames)
    yield Bar(what="bytes back for a greedy row", figure=back, limit=64, unit=" B", beside="with ZeroMQ's own")


def copied(artifact: Artifact) -> Bar:
    """What the second of two stages copies of an artifact, beside what it reads of the weights."""
    stages = choose_stages(artifact, pipeline_parallel_size=2)
    with tempfile.TemporaryDirectory() as cache, ArtifactSource(artifact, _ANY, TOKEN) as source, ExitStack() as stack:
        addresses = [stack.enter_context(server({0}))[1] for _ in stages]
        sent = []
        for stage in range(2):
            opening = replace(_opening(artifact, addresses), source=source.address, folder=cache)
            alone = replace(opening, stage=stage)
            before = source.sent_nbytes
            RemoteRunner([alone], TOKEN, load_seconds=600).close()
            sent.append(source.sent_nbytes - before)
    whole = artifact.manifest.stored_nbytes
    names = [stage_tensors(artifact, stages, stage) for stage in range(2)]
    own = [sum(whole(artifact.tensors[name]) for name in one) for one in names]
    beside = ", ".join(f"{s / 1e6:.0f} MB of {o / 1e6:.0f} MB" for s, o in zip(sent, own, strict=True))
    largest = max(s / o for s, o in zip(sent, own, strict=True))
    return Bar(what="bytes copied by a stage / its own", figure=largest, limit=1.05, unit="x", beside=beside)


def second_node(artifact: Artifact) -> Iterator[Bar]:
    """Two replicas on a core each beside one on one core: how many times longer one takes for the same tokens.

    By the clock, and by processor time, which other work on the machine spends less of: a node is busy for what its
    stage spends on a step, and the head for what it spends on the steps of all.
    """
    clock: dict[int, list[float]] = {1: [], 2: []}
    spent: dict[int, list[float]] = {1: [], 2: []}
    heads: list[float] = []
    with ExitStack() as stack:
        servers = [stack.enter_context(server({core})) for core in (0, 1)]
        runners = [stack.enter_context(remote(artifact, [address])) for _, address in servers]
        pids = [process.pid for process, _ in servers]
        for _ in range(_ROUNDS):
            for count in (1, 2):
                before, head, started = _spent(pids), _spent([os.getpid()]), time.monotonic()
                threads = [threading.Thread(target=_steps, args=(runner,)) for runner in runners[:count]]
                for thread in threads:
                    thread.start()
                for thread in threads:
                    thread.join()
                clock[count].append((time.monotonic() - started) / count / _STEPS)
                spent[count].append((_spent(pids) - before) / count / _STEPS)
                heads.append((_spent([os.getpid()]) - head) / count / _STEPS)
    one, two = (min(clock[count]) for count in (1, 2))
    limit = 1 / 1.8
    beside = f"{one / two:.2f} times the tokens of one; the bar is 1.8"
    yield Bar(what="dp 1 / dp 2 on two nodes, by the clock", figure=two / one, limit=limit, beside=beside)
    one, two = (min(spent[count]) for count in (1, 2))
    head_seconds = min(heads)
    longest = max(two / 2, head_seconds)
    beside = (
        f"{one / longest:.2f} times: {one * 1e3:.1f} ms a step of one, {two * 1e3:.1f} ms of two, "
        f"{head_seconds * 1e3:.2f} ms of the head"
    )
    yield Bar(what="dp 1 / dp 2 on two nodes, by processor time", figure=longest / one, limit=limit, beside=beside)


def losses(artifact: Artifact) -> Iterator[Bar]:
    """The seconds until a batch under way fails, by the death of a stage's process and by one that answers no more."""
    for what, number, limit in (("a stage's death", signal.SIGKILL, 1.0), ("a cut cable", signal.SIGSTOP, 3.0)):
        with ExitStack() as stack:
            servers = [stack.enter_context(server({0})) for _ in range(2)]
            runner = stack.enter_context(remote(artifact, [address for _, address in servers]))
            _steps(runner)
            servers[1][0].send_signal(number)
            started = time.monotonic()
            error = runner.submit(Decode(group=0, copies=(), rows=(Row(sequence_id=0, start=0, token=5),))).exception()
            yield Bar(
                what=f"error after {what}", figure=time.monotonic() - started, limit=limit, unit=" s", beside=str(error)
            )


def small_nodes(artifact: Artifact) -> Iterator[Bar]:
    """Three stages of a model whose weights are 1.6 times what each node may have of memory, and what the head reads.

    The limit is the kernel's, on private memory (`ulimit -d`): who wants more gets an error.
    """
    nbytes = sum(map(artifact.manifest.stored_nbytes, artifact.manifest.tensors))
    limit = int(nbytes / _TIMES_THE_LIMIT)
    command = [sys.executable, "-m", "benchmarks.cluster", "head", str(artifact.folder), TOKEN]
    with ExitStack() as stack:
        servers = [stack.enter_context(server({0}, limit=limit)) for _ in _SMALL_STAGES]
        addresses = [address for _, address in servers]
        run = subprocess.run([*command, *addresses], stdout=subprocess.PIPE, text=True, check=True)
        peaks = [peak_nbytes(process.pid) for process, _ in servers]
    with server({0}, limit=limit) as (_, address):
        alone = subprocess.run([*command, address], capture_output=True, text=True)
    beside = (
        f"peaks of {', '.join(f'{peak / 1e6:.0f}' for peak in peaks)} MB; {nbytes / 1e6:.0f} MB of weights are "
        f"{_TIMES_THE_LIMIT} times {limit / 1e6:.0f} MB; on one such node: {' '.join(alone.stderr.splitlines()[-1:])}"
    )
    yield Bar(what="pp 3 on small nodes: peak / limit", figure=max(peaks) / limit, limit=1.0, unit="x", beside=beside)
    others = sum(one.nbytes for one in artifact.manifest.files if not one.path.endswith(".safetensors"))
    read, mapped = map(int, run.stdout.split())
    beside = f"{read / 1e6:.1f} MB in all, the other files have {others / 1e6:.1f} MB; {mapped} B of weights mapped"
    weights = max(0, read - others) + mapped
    yield Bar(what="weights read by the head", figure=weights / 1e6, limit=1.0, unit=" MB", beside=beside)


def head(folder: str, token: str, *addresses: str) -> None:
    """Steps on stages at these addresses; prints what this process has read to do so, and has of weights in memory."""
    before = _read(os.getpid())
    artifact = open_artifact(Path(folder), full=False)
    blocks = _SMALL_STAGES if len(addresses) == len(_SMALL_STAGES) else None
    with remote(artifact, addresses, token, blocks) as runner:
        _steps(runner)
    print(_read(os.getpid()) - before, _mapped_weights())


def _mapped_weights() -> int:
    """The bytes of weights files that this process has in memory."""
    found, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            inside = line.endswith(".safetensors")
        elif inside and line.startswith("Rss:"):
            found += int(line.split()[1]) * 1024
    return found


def _read(pid: int) -> int:
    """The bytes that a process has read so far, of whatever."""
    fields = dict(line.split(": ") for line in Path(f"/proc/{pid}/io").read_text().splitlines())
    return int(fields["rchar"])


# -- servers and steps ---------------------------------------------------------------------------------------------


@contextmanager
def server(
    cores: set[int], token: str = TOKEN, *, limit: int | None = None
) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A stage server on these cores, and its address; it gets so many bytes of private memory at most."""
    program = "from furiosa_llm.runtime.distributed.stage_server import main; main()"
    command = [sys.executable, "-P", "-c", program, _ANY, "1"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        os.sched_setaffinity(process.pid, cores)
        if limit is not None:
            resource.prlimit(process.pid, resource.RLIMIT_DATA, (limit, limit))
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(f"{token}\n")
        process.stdin.flush()
        try:
            yield process, process.stdout.readline().strip()
        finally:
            process.kill()


@contextmanager
def remote(
    artifact: Artifact, addresses: Sequence[str], token: str = TOKEN, blocks: Sequence[int] | None = None
) -> Iterator[RemoteRunner]:
    """A runner of stages at `addresses`, with so many blocks each."""
    opening = _opening(artifact, addresses)
    if blocks is not None:
        stages = choose_stages(artifact, num_blocks_per_pp_stage=blocks)
        opening = replace(opening, stages=stages)
    openings = [replace(opening, stage=stage) for stage in range(len(addresses))]
    runner = RemoteRunner(openings, token, load_seconds=600)
    try:
        yield runner
    finally:
        runner.close()


def _opening(artifact: Artifact, addresses: Sequence[str]) -> Opening:
    return Opening(
        head=secrets.randbits(62),
        folder=str(artifact.folder.absolute()),
        source=None,
        digest=artifact.digest,
        version=package_version(),
        stages=choose_stages(artifact, pipeline_parallel_size=len(addresses)),
        stage=0,
        addresses=tuple(addresses),
        hosts=tuple(f"process {stage}" for stage in range(len(addresses))),
        slots_per_group=1,
        max_length=512,
        compute=None,
        mapped=False,
        separate=False,
        verify=False,
        companions=NO_COMPANIONS,
        max_step_nbytes=None,
    )


def _steps(runner: Runner) -> None:
    for start in range(_STEPS):
        batch = Decode(group=0, copies=(), rows=(Row(sequence_id=0, start=start, token=start + 5),))
        if isinstance(runner, RemoteRunner):
            runner.submit_picking(batch, (True,)).result()
        else:
            runner.submit(batch).result().argmax()


def _timed(runner: Runner, pids: Sequence[int]) -> tuple[float, float]:
    """Wall and processor seconds of a step."""
    before, started = _spent(pids), time.monotonic()
    _steps(runner)
    return (time.monotonic() - started) / _STEPS, (_spent(pids) - before) / _STEPS


def _spent(pids: Sequence[int]) -> float:
    """The processor seconds of all threads of processes so far."""
    tick = os.sysconf("SC_CLK_TCK")
    fields = [Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split() for pid in pids]
    return sum(int(one[11]) + int(one[12]) for one in fields) / tick


if __name__ == "__main__":
    if sys.argv[1:2] == ["head"]:
        head(*sys.argv[2:])
        sys.exit()
    sys.exit(0 if show(bars("optimum-fp32", 4), Console()) else 1)
