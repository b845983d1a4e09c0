"""Hosts of a Ray cluster on this machine, which can be lost: network namespaces for root, else Ray's own test cluster.

The first host is the head's, without cards; of the others each has one.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from tests.support.artifacts import ROOT

_SCRIPT = ROOT / "scripts" / "netns_cluster.sh"
_ACTOR = b"ray::StageActor"
_SECONDS = 120.0
_TRIES = 3
ENVIRONMENT = {"RAY_AUTH_MODE": "token", "RAY_worker_niceness": "0"}
_HEALTH = {
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "3",
}
"""So that Ray, too, notices a cut cable soon; on a busy machine it may give a host up for it."""


class Hosts(Protocol):
    """Hosts 1 to `count`, beside the head's."""

    kind: str
    can_cut: bool
    address: str
    cache: str
    """A folder for what stages copy, on each host."""

    def start(self, command: Sequence[str]) -> subprocess.Popen[str]:
        """Starts a program on the head's host."""
        ...

    def actors(self, host: int) -> list[int]:
        """The processes of stages there."""
        ...

    def lose(self, host: int) -> None:
        """Powers it off."""
        ...

    def add(self, host: int) -> None:
        """Starts it again."""
        ...

    def folder(self, host: int) -> Path:
        """Its cache, as this process sees it."""
        ...

    def cut(self, host: int) -> None:
        """Pulls its cable, if `can_cut`."""
        ...

    def heal(self, host: int) -> None:
        """Plugs it in again."""
        ...

    def close(self) -> None:
        """Ends all."""
        ...


def open_hosts(count: int, *, namespaces: bool = True) -> Hosts:
    """Namespaces if this process may make them, and they are wanted."""
    os.environ.update(ENVIRONMENT, RAY_AUTH_TOKEN=secrets.token_hex(32))
    may = namespaces and os.geteuid() == 0 and shutil.which("ip") is not None
    may = may and subprocess.run(["unshare", "--net", "true"], capture_output=True).returncode == 0
    return Namespaces(count) if may else Nodes(count)


def _stages_below(parents: set[int]) -> list[int]:
    """The stages' processes that these have started."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                named = (entry / "cmdline").read_bytes().startswith(_ACTOR)
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:  # it has ended
                continue
            if named and parent in parents:
                found.append(int(entry.name))
    return found


class Namespaces:
    """Each host is a network namespace; see scripts/netns_cluster.sh."""

    kind = "network namespaces"
    can_cut = True

    def __init__(self, count: int) -> None:
        self._base = Path(tempfile.mkdtemp(prefix="rn", dir="/tmp"))  # short: paths of unix sockets are
        ray = str(Path(sys.executable).parent / "ray")
        self._environment = dict(
            os.environ | _HEALTH, BASE=str(self._base), RAY=ray, NPUS="1", HEAD_NPUS="0", TTL="1800"
        )
        self.address = "10.77.0.1:6379"
        self.cache = str(self._base / "tmp" / "cache")
        self._do("up", str(count + 1))

    def start(self, command: Sequence[str]) -> subprocess.Popen[str]:
        environment = {**self._environment, "RAY_TMPDIR": str(self._base / "tmp"), "PYTHONPATH": str(ROOT)}
        return subprocess.Popen(
            [str(_SCRIPT), "exec", "0", *command],
            env=environment,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def actors(self, host: int) -> list[int]:
        try:
            namespace = Path(f"/proc/{self._pid(host)}/ns/pid").readlink()
        except OSError:  # it is lost
            return []
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    inside = (entry / "ns" / "pid").readlink() == namespace
                    if inside and (entry / "cmdline").read_bytes().startswith(_ACTOR):
                        found.append(int(entry.name))
                except OSError:  # it has ended
                    continue
        return found

    def lose(self, host: int) -> None:
        self._do("kill", str(host))

    def add(self, host: int) -> None:
        for _ in range(_TRIES):
            try:
                return self._do("add", str(host))
            except subprocess.CalledProcessError as error:  # on a busy machine `ray start` gives itself up
                failure = error
        raise failure

    def folder(self, host: int) -> Path:
        return Path(f"/proc/{self._pid(host)}/root{self.cache}")

    def cut(self, host: int) -> None:
        self._do("cut", str(host))

    def heal(self, host: int) -> None:
        self._do("heal", str(host))

    def close(self) -> None:
        self._do("down")

    def _pid(self, host: int) -> int:
        return int((self._base / f"{host}.pid").read_text())

    def _do(self, *arguments: str) -> None:
        subprocess.run([str(_SCRIPT), *arguments], env=self._environment, check=True, timeout=600)


class Nodes:
    """Each host is a node of `ray.cluster_utils.Cluster`: no cable to cut."""

    kind = "nodes of ray.cluster_utils.Cluster"
    can_cut = False

    def __init__(self, count: int) -> None:
        from ray.cluster_utils import Cluster

        self._folder = tempfile.TemporaryDirectory()
        self.cache = str(Path(self._folder.name) / "cache")
        options = {"num_cpus": 1, "object_store_memory": 80_000_000}
        self._options: dict[str, Any] = {**options, "resources": {"npu": 1}}
        self._cluster: Any = Cluster(initialize_head=True, head_node_args={**options, "include_dashboard": False})
        self.address = str(self._cluster.address)
        self._nodes = {host: self._cluster.add_node(**self._options) for host in range(1, count + 1)}

    def start(self, command: Sequence[str]) -> subprocess.Popen[str]:
        return subprocess.Popen(command, cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def actors(self, host: int) -> list[int]:
        processes = [info for kind in self._nodes[host].all_processes.values() for info in kind]
        return _stages_below({info.process.pid for info in processes})

    def lose(self, host: int) -> None:
        self._cluster.remove_node(self._nodes[host], allow_graceful=False)

    def add(self, host: int) -> None:
        self._nodes[host] = self._cluster.add_node(**self._options)

    def folder(self, host: int) -> Path:
        return Path(self.cache)

    def cut(self, host: int) -> None:
        raise NotImplementedError

    def heal(self, host: int) -> None:
        raise NotImplementedError

    def close(self) -> None:
        self._cluster.shutdown()
        self._folder.cleanup()


def kill_actor(hosts: Hosts, host: int) -> bool:
    """Kills a stage on that host; whether there was one."""
    pids = hosts.actors(host)
    for pid in pids[:1]:
        os.kill(pid, signal.SIGKILL)
    return bool(pids)


def kill_program(program: subprocess.Popen[str]) -> None:
    """Kills what `Hosts.start` has started, which may be below processes that only enter a namespace."""
    pid = program.pid
    while children := Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        pid = int(children[0])
    os.kill(pid, signal.SIGKILL)
    program.wait(_SECONDS)


def parts_of_copies(hosts: Hosts, count: int) -> list[str]:
    """Files that a copy which did not end has left on any host."""
    found = []
    for host in range(1, count + 1):
        found += [str(path) for path in hosts.folder(host).rglob("*.part")]
    return found


def without_actors(hosts: Hosts, count: int, seconds: float = _SECONDS) -> float | None:
    """How long it takes until no stage is left on any host; None if that is too long."""
    started = time.monotonic()
    while time.monotonic() - started < seconds:
        if not any(hosts.actors(host) for host in range(1, count + 1)):
            return time.monotonic() - started
        time.sleep(0.05)
    return None
