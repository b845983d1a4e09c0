"""Random faults of hosts under load: `python -m tests.campaigns.cluster_campaign --faults 30 --seconds 600`.

Two replicas of two stages on four hosts with one card each, and a spare one. Stages are killed, hosts powered off and
started again, cables cut and plugged in. Each request has to be answered once, with the tokens of one process or an
error that names stage and host; no stage, no open file and no half-copied file may be left. In the end the head
itself is killed. What is wrong is printed, and the campaign ends with status 1.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tests.support.artifacts import artifact_of
from tests.support.runtime.ray_hosts import Hosts, kill_actor, kill_program, open_hosts, parts_of_copies, without_actors

HOSTS = 5
SOON = 10.0
"""Seconds until the stages of a head that was killed are gone, at most."""
_GRACE = 240.0
"""Seconds to answer the last requests, to close and to load once more, at most."""
_SHORT_CUT = 2.0
"""Seconds: after a longer one Ray may have given the host up, which then has to be started again."""


class Faults:
    """Faults by name; each has ended when its function returns."""

    def __init__(self, hosts: Hosts, seed: int) -> None:
        self._hosts = hosts
        self._random = random.Random(seed)
        self.done: list[str] = []

    def one(self, seconds: float) -> None:
        """A fault, over within `seconds`."""
        kinds: list[Callable[[float], str | None]] = [self._actor, self._host, self._two]
        kinds += [self._flap, self._cut] if self._hosts.can_cut else []
        while (what := self._random.choice(kinds)(seconds)) is None:
            continue
        self.done.append(what)

    def _any(self) -> int:
        return self._random.randint(1, HOSTS)

    def _actor(self, _: float) -> str | None:
        host = self._any()
        return f"a stage on host {host} killed" if kill_actor(self._hosts, host) else None

    def _host(self, seconds: float) -> str:
        host = self._any()
        self._hosts.lose(host)
        time.sleep(self._random.uniform(0, seconds / 2))
        self._hosts.add(host)
        return f"host {host} powered off, and back"

    def _two(self, seconds: float) -> str:
        """One spare host for two: a replica waits until one of them is back."""
        both = self._random.sample(range(1, HOSTS + 1), 2)
        for host in both:
            self._hosts.lose(host)
        time.sleep(self._random.uniform(0, seconds / 3))
        for host in both:
            self._hosts.add(host)
        return f"hosts {both} powered off, and back"

    def _flap(self, _: float) -> str:
        host = self._any()
        self._hosts.cut(host)
        time.sleep(self._random.uniform(0.1, _SHORT_CUT))
        self._hosts.heal(host)
        return f"the cable of host {host} out for a moment"

    def _cut(self, seconds: float) -> str:
        host = self._any()
        self._hosts.cut(host)
        time.sleep(self._random.uniform(_SHORT_CUT, seconds / 2))
        self._hosts.add(host)
        return f"the cable of host {host} cut, and the host started again"


def run(hosts: Hosts, artifact: Path, *, faults: int, seconds: float, seed: int) -> dict[str, Any]:
    """What became of a load with so many faults."""
    command = [sys.executable, "-m", "tests.campaigns.cluster_load", str(artifact), "--address", hosts.address]
    command += ["--cache", hosts.cache]
    load = loading(hosts, command)
    hits = Faults(hosts, seed)
    started, share = time.monotonic(), seconds / faults
    for number in range(faults):
        time.sleep(max(0.0, started + number * share - time.monotonic()))
        hits.one(share)
    time.sleep(max(0.0, started + seconds - time.monotonic()))
    try:
        text, _ = load.communicate(timeout=_GRACE)
    except subprocess.TimeoutExpired:
        kill_program(load)
        return {"wrong": ["the load did not end: a request hangs"], "faults": hits.done}
    report: dict[str, Any] = json.loads(text.splitlines()[-1])
    report["faults"] = hits.done
    report["half copied"] = parts_of_copies(hosts, HOSTS)
    report["stages left after"] = without_actors(hosts, HOSTS)
    kill_program(loading(hosts, command))
    report["stages left after the head's end"] = without_actors(hosts, HOSTS)
    return report


def loading(hosts: Hosts, command: Sequence[str]) -> subprocess.Popen[str]:
    """The load, once it runs."""
    load = hosts.start(command)
    assert load.stdout is not None
    for _ in range(2):  # the first is to warm up
        assert load.stdout.readline() == "ready\n"
    return load


def wrong(report: dict[str, Any]) -> list[str]:
    """What is not as it has to be."""
    found: list[str] = list(report["wrong"])
    if not found:
        found += [f"{what}: {report[what]}" for what in ("left open", "half copied") if report[what]]
        if report["stages left after"] is None:
            found.append("stages are left")
        after = report["stages left after the head's end"]
        if after is None or after > SOON:
            found.append(f"stages are left {after} s after the head's end")
        if report["asked"] != report["answered"] + sum(report["errors"].values()):
            found.append("requests without an answer")
    return found


def main() -> None:
    """Prints the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--faults", type=int, default=30)
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    hosts = open_hosts(HOSTS)
    try:
        with tempfile.TemporaryDirectory() as own:  # other runs of the tests may remove theirs
            artifact = shutil.copytree(artifact_of("tiny-llama-optimum", 8), Path(own) / "artifact")
            report = run(hosts, artifact, faults=options.faults, seconds=options.seconds, seed=options.seed)
    finally:
        hosts.close()
    sys.stdout.write(f"over {hosts.kind}\n{json.dumps(report, indent=1)}\n")
    found = wrong(report)
    sys.stdout.write("".join(f"{one}\n" for one in found))
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    main()
