"""A message between two processes over ZeroMQ, as stages use it, beside raw TCP: a part of `make bench-cluster`."""

from __future__ import annotations

import os
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import zmq

from benchmarks.bars import Bar
from furiosa_llm.runtime.distributed.link import Context, Doorkeeper, Link, listen, receive

TOKEN = secrets.token_hex(16)
_NBYTES = 36 * 1024
_HOPS = 2000
_ROUNDS = 5


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


def _tcp_hop() -> float:
    with _echo("tcp") as address, socket.create_connection(address) as peer:
        peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        data, view = bytes(_NBYTES), memoryview(bytearray(_NBYTES))

        def there_and_back() -> None:
            peer.sendall(data)
            _receive_all(peer, view)

        return _tenth(there_and_back)


def _link_hop() -> float:
    with _echo("link") as (host, port):
        context: Context = zmq.Context()
        link = Link(context, f"tcp://{host}:{port}", TOKEN, "the echo")
        link.socket.rcvtimeo = 10_000
        data = bytes(_NBYTES)

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
    command = [sys.executable, "-m", "benchmarks.hop", kind, TOKEN]
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
            view = memoryview(bytearray(_NBYTES))
            while True:
                _receive_all(peer, view)
                peer.sendall(view)
    context: Context = zmq.Context()
    _keeper = Doorkeeper(context, token)  # as long as this runs
    router = listen(context, "tcp://127.0.0.1:0")
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
    echo(*sys.argv[1:])
