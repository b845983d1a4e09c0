"""Stages on other hosts beside stages in this process, and what crosses between them: `make bench-cluster`.

Each stage is a server in a process of its own on this machine, pinned to one core. Ratios are within a run.
"""

from __future__ import annotations

import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import zmq
from rich.console import Console

from benchmarks.artifacts import artifact as built
from benchmarks.bars import Bar, show
from furiosa_llm.runtime.artifact.reader import Artifact, open_artifact
from furiosa_llm.runtime.distributed.artifact_cache import ArtifactSource
from furiosa_llm.runtime.distributed.link import Context, Doorkeeper, Link, listen, receive
from furiosa_llm.runtime.distributed.remote_runner import RemoteRunner
from furiosa_llm.runtime.distributed.wire import Opening, package_version, result_message
from furiosa_llm.runtime.execution.counters import stage_counts
from furiosa_llm.runtime.placement.stages import choose_stages
from furiosa_llm.runtime.runners.batch import NO_COMPANIONS, Decode, Row, Runner
from furiosa_llm.runtime.runners.loaded_model import stage_tensors
from furiosa_llm.runtime.runners.local_runner import Host

TOKEN = secrets.token_hex(16)
_ANY = "tcp://127.0.0.1:0"
_HOP_NBYTES = 36 * 1024
_HOPS = 2000
_STEPS = 60
_ROUNDS = 5
_IDLE_SECONDS = 10.0
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


def hop() -> Bar:
    """A message of 36 KiB there and back between two processes, over ZeroMQ as stages use it, beside TCP.

    Each process has a core of its own: where the system puts both ends of a connection on one, TCP does without the
    wake-up of another core, which two hosts cannot.
    """
    both = [(_tcp_hop(), _link_hop()) for _ in range(_ROUNDS)]
    tcp, ours = sorted(both, key=lambda pair: pair[1] / pair[0])[_ROUNDS // 2]
    ratios = sorted(own / other for other, own in both)
    beside = (
        f"{ours * 1e6:.0f} us beside {tcp * 1e6:.0f} us, half a round trip, tenth percentile; the median of {_ROUNDS} "
        f"runs, which gave {ratios[0]:.2f} to {ratios[-1]:.2f}"
    )
    return Bar(what="hop of 36 KiB / TCP", figure=ours / tcp, limit=4.0, unit="x", beside=beside)


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
    own = [sum(_whole(artifact, name) for name in stage_tensors(artifact, stages, stage)) for stage in range(2)]
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


# -- servers and steps ---------------------------------------------------------------------------------------------


@contextmanager
def server(cores: set[int], token: str = TOKEN) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A stage server on these cores, and its address."""
    program = "from furiosa_llm.runtime.distributed.stage_server import main; main()"
    command = [sys.executable, "-P", "-c", program, _ANY, "1"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        os.sched_setaffinity(process.pid, cores)
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(f"{token}\n")
        process.stdin.flush()
        try:
            yield process, process.stdout.readline().strip()
        finally:
            process.kill()


@contextmanager
def remote(artifact: Artifact, addresses: Sequence[str]) -> Iterator[RemoteRunner]:
    """A runner of stages at `addresses`."""
    opening = _opening(artifact, addresses)
    openings = [replace(opening, stage=stage) for stage in range(len(addresses))]
    runner = RemoteRunner(openings, TOKEN, load_seconds=600)
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


def _whole(artifact: Artifact, name: str) -> int:
    tensor = artifact.tensors[name]
    return tensor.local_nbytes * artifact.manifest.mesh.parts(tensor.shard_axes)


# -- a hop ---------------------------------------------------------------------------------------------------------


def _tcp_hop() -> float:
    with _echo("tcp") as address, socket.create_connection(address) as peer:
        peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        data, view = bytes(_HOP_NBYTES), memoryview(bytearray(_HOP_NBYTES))

        def there_and_back() -> None:
            peer.sendall(data)
            _receive_all(peer, view)

        return _tenth(there_and_back)


def _link_hop() -> float:
    with _echo("link") as (host, port):
        context: Context = zmq.Context()
        link = Link(context, f"tcp://{host}:{port}", TOKEN, "the echo")
        link.socket.rcvtimeo = 10_000
        data = bytes(_HOP_NBYTES)

        def there_and_back() -> None:
            link.send([data])
            receive(link.socket)

        try:
            return _tenth(there_and_back)
        finally:
            link.close()
            context.term()


def _tenth(there_and_back: Callable[[], None]) -> float:
    """The tenth percentile of half a round trip, in seconds."""
    taken = []
    for _ in range(_HOPS):
        started = time.perf_counter()
        there_and_back()
        taken.append((time.perf_counter() - started) / 2)
    return sorted(taken)[_HOPS // 10]


@contextmanager
def _echo(kind: str) -> Iterator[tuple[str, int]]:
    """An echo on the last core, while this thread and those that it starts are on the first."""
    cores = sorted(os.sched_getaffinity(0))
    command = [sys.executable, "-m", "benchmarks.cluster", "echo", kind, TOKEN]
    os.sched_setaffinity(0, cores[-1:])  # which the child takes over
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        os.sched_setaffinity(0, cores[:1])
        assert process.stdout is not None
        host, port = process.stdout.readline().split()
        try:
            yield host, int(port)
        finally:
            os.sched_setaffinity(0, cores)
            process.kill()


def echo(kind: str, token: str) -> None:
    """Sends back what comes, until it is killed."""
    if kind == "tcp":
        with socket.create_server(("127.0.0.1", 0)) as server:
            print(*server.getsockname(), flush=True)
            peer, _ = server.accept()
            peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            view = memoryview(bytearray(_HOP_NBYTES))
            while True:
                _receive_all(peer, view)
                peer.sendall(view)
    context: Context = zmq.Context()
    _keeper = Doorkeeper(context, token)  # as long as this runs
    router = listen(context, _ANY)
    print(*router.getsockopt_string(zmq.LAST_ENDPOINT).removeprefix("tcp://").split(":"), flush=True)
    while True:
        router.send_multipart(receive(router))


def _receive_all(peer: socket.socket, view: memoryview) -> None:
    done = 0
    while done < view.nbytes:
        count = peer.recv_into(view[done:])
        if not count:
            sys.exit()
        done += count


if __name__ == "__main__":
    if sys.argv[1:2] == ["echo"]:
        echo(*sys.argv[2:])
    sys.exit(0 if show(bars("optimum-fp32", 4), Console()) else 1)
