"""Stages behind sockets on this machine, for the tests of those on other hosts."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from furiosa_llm.runtime.artifact.reader import Artifact
from furiosa_llm.runtime.distributed.remote_host import Place
from furiosa_llm.runtime.distributed.remote_runner import RemoteRunner
from furiosa_llm.runtime.distributed.stage_server import StageServer
from furiosa_llm.runtime.distributed.wire import Opening, package_version
from furiosa_llm.runtime.placement.stages import choose_stages
from furiosa_llm.runtime.runners.batch import NO_COMPANIONS

TOKEN = "a token of no other test"
ANY_PORT = "tcp://127.0.0.1:0"


@contextmanager
def serving_stages(count: int, *, threads: int = 1) -> Iterator[list[StageServer]]:
    """Servers on threads of this process."""
    servers = [StageServer(ANY_PORT, TOKEN, threads=threads) for _ in range(count)]
    for server in servers:
        threading.Thread(target=server.serve, daemon=True).start()
    try:
        yield servers
    finally:
        for server in servers:
            server.close()


def opening_of(artifact: Artifact, addresses: Sequence[str], **changed: Any) -> Opening:
    """What the stages of `artifact` at `addresses` are to load."""
    fields: dict[str, Any] = {
        "head": 1,
        "folder": str(artifact.folder),
        "source": None,
        "digest": artifact.digest,
        "version": package_version(),
        "stages": choose_stages(artifact, pipeline_parallel_size=len(addresses)),
        "stage": 0,
        "addresses": tuple(addresses),
        "hosts": tuple(f"host{stage}" for stage in range(len(addresses))),
        "slots_per_group": 4,
        "max_length": 64,
        "compute": None,
        "mapped": False,
        "separate": False,
        "verify": False,
        "companions": NO_COMPANIONS,
        "max_step_nbytes": None,
    }
    return Opening(**fields | changed)


@contextmanager
def running(opening: Opening, *, token: str = TOKEN, folders: Sequence[Path] = ()) -> Iterator[RemoteRunner]:
    """A runner of stages that are served; each has a folder of its own, if there are `folders`."""
    openings = [replace(opening, stage=stage) for stage in range(len(opening.addresses))]
    openings = [replace(one, folder=str(folders[one.stage])) if folders else one for one in openings]
    runner = RemoteRunner(openings, token, load_seconds=60)
    try:
        yield runner
    finally:
        runner.close()


class FixedCluster:
    """Stages that were started by hand: `addresses[replica][stage]`."""

    def __init__(self, addresses: Sequence[Sequence[str]]) -> None:
        self.token = TOKEN
        self.addresses = [list(one) for one in addresses]
        self.closed = False
        self.asked = 0
        self.error: Exception | None = None
        self.own_address = "127.0.0.1"
        self.card_hosts = [f"host{card}" for card in range(8)]

    def places(self, replica: int) -> Sequence[Place]:
        self.asked += 1
        if self.error is not None:
            raise self.error
        addresses = enumerate(self.addresses[replica])
        return [Place(address=address, host=f"host{replica}.{stage}") for stage, address in addresses]

    def host_of(self, replica: int, stage: int) -> str | None:
        return f"host{replica}.{stage}"

    def close(self) -> None:
        self.closed = True
