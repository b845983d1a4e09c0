"""A replica over the hosts of a Ray cluster on this machine, and every way to lose a stage: prints what happened.

The hosts are network namespaces for root, else (or with --nodes) those of `ray.cluster_utils.Cluster`. The engine is a
program of its own on the first host, which takes commands on its standard input and answers in lines of JSON.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

from furiosa_llm.runtime.engine import launch
from furiosa_llm.runtime.engine.engine_args import EngineArgs
from furiosa_llm.runtime.llm_engine import LLMEngine
from furiosa_llm.runtime.placement.topology import Topology
from furiosa_llm.runtime.requests.outputs import RequestOutput
from furiosa_llm.runtime.tokens.sampling_params import SamplingParams
from tests.support.artifacts import artifact_of
from tests.support.runtime.ray_hosts import Hosts, kill_actor, open_hosts, without_actors

HOSTS = 3
PROMPTS = ([3, 1, 4], [1, 5, 9, 2, 6])
SHORT = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
LONG = SamplingParams(temperature=0.0, max_tokens=500, ignore_eos=True)
DEADLINE = 120.0
Report = dict[str, Any]


# -- the engine, on the first host ---------------------------------------------------------------------------------


def outputs(engine: LLMEngine) -> list[RequestOutput]:
    last: dict[str, RequestOutput] = {}
    while engine.has_unfinished_requests():
        last.update({output.request_id: output for output in engine.step() if output.finished})
    return [output for _, output in sorted(last.items())]


def tokens(engine: LLMEngine) -> list[Any]:
    for number, prompt in enumerate(PROMPTS):
        engine.add_request(str(number), {"prompt_token_ids": prompt}, SHORT)
    return [output.error or output.outputs[0].token_ids for output in outputs(engine)]


def say(**report: Any) -> None:
    sys.stdout.write(f"{json.dumps(report)}\n")
    sys.stdout.flush()


def until(happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE
    while not happened():
        if time.monotonic() > deadline:
            raise TimeoutError
        time.sleep(0.02)


def head(folder: str, address: str) -> None:
    """Loads, then does as it is told: `lose` until a request has failed, `back` until there are tokens again."""
    with LLMEngine.from_engine_args(EngineArgs(folder, pipeline_parallel_size=2, threads=1)) as engine:
        expected = tokens(engine)
    opened: list[Any] = []
    open_cluster = launch.open_cluster

    def keep(topology: Topology, args: EngineArgs) -> Any:
        opened.append(open_cluster(topology, args))
        return opened[-1]

    launch.open_cluster = keep
    started = time.monotonic()
    args = EngineArgs(
        folder,
        devices="npu:0,npu:1",
        pipeline_parallel_size=2,
        max_batch_size=2,
        distributed_executor_backend="ray",
        ray_address=address,
        placement_timeout=60,
    )
    with LLMEngine.from_engine_args(args) as engine:
        (replica,) = engine.core.replicas

        def state() -> Report:
            hosts = {stage.node.node_id for stage in opened[0]._started[0]}
            return {"seconds": time.monotonic() - started, "same": tokens(engine) == expected, "hosts": len(hosts)}

        say(**state())
        for line in sys.stdin:
            match line.strip():
                case "lose":
                    engine.add_request("0", {"prompt_token_ids": PROMPTS[0]}, LONG)
                    engine.step()
                    say(runs=True)
                    started = time.monotonic()
                    (output,) = outputs(engine)
                    cause = type(getattr(output.error, "__cause__", None)).__name__
                    say(error=repr(output.error), cause=cause, seconds=time.monotonic() - started)
                case "back":
                    until(lambda: replica.ready)
                    say(**state())
                case _:
                    say(ready=replica.ready, dead=replica.death is not None, engine=engine.core.ready)


# -- who loses its hosts -------------------------------------------------------------------------------------------


class Engine:
    """The program `head` on the first of the hosts."""

    def __init__(self, hosts: Hosts, folder: str) -> None:
        module = [sys.executable, "-m", "tests.support.runtime.ray_scenario"]
        self._program: subprocess.Popen[str] = hosts.start([*module, "head", folder, hosts.address])
        self.loaded = self._answer()

    def ask(self, command: str) -> Report:
        assert self._program.stdin is not None
        self._program.stdin.write(f"{command}\n")
        self._program.stdin.flush()
        return self._answer()

    def lose(self, act: Callable[[], object]) -> Report:
        """What a request that runs meets when `act` loses a stage."""
        self.ask("lose")
        started = time.monotonic()
        act()
        return {**self._answer(), "act": time.monotonic() - started}

    def end(self) -> None:
        assert self._program.stdin is not None
        self._program.stdin.close()
        self._program.wait(DEADLINE)

    def _answer(self) -> Report:
        assert self._program.stdout is not None
        line = next(line for line in self._program.stdout if line.startswith("{"))  # others are Ray's
        found: Report = json.loads(line)
        return found


def scenario(hosts: Hosts, folder: str) -> Report:
    engine = Engine(hosts, folder)
    report: Report = {"hosts are": hosts.kind, "loaded": engine.loaded}

    def last() -> int:
        return max(host for host in range(1, HOSTS + 1) if hosts.actors(host))

    report["a stage killed"] = [engine.lose(lambda: kill_actor(hosts, last())), engine.ask("back")]
    cut = last()
    if hosts.can_cut:
        report["a cable cut"] = [engine.lose(lambda: hosts.cut(cut)), engine.ask("back")]
        hosts.add(cut)
    report["a host powered off"] = [engine.lose(lambda: hosts.lose(last())), engine.ask("back")]
    gone = last()
    lost = engine.lose(lambda: hosts.lose(gone))
    time.sleep(3.0)
    waits = engine.ask("state")
    hosts.add(gone)
    report["no host left, and one back"] = [lost, waits, engine.ask("back")]
    engine.end()
    report["stages left after"] = without_actors(hosts, HOSTS)
    return report


def main() -> None:
    hosts = open_hosts(HOSTS, namespaces="--nodes" not in sys.argv)
    try:
        report = scenario(hosts, str(artifact_of("tiny-llama-optimum", 8)))
    finally:
        hosts.close()
    sys.stdout.write(f"{json.dumps(report)}\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["head"]:
        head(*sys.argv[2:])
    else:
        main()
