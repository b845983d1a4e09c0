"""A replica over the nodes of a Ray cluster on this machine, and every way to lose a stage: prints what happened.

A program of its own: Ray reads the environment as it is imported, and has handlers and threads of its own.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from furiosa_llm.runtime.engine import launch
from furiosa_llm.runtime.engine.engine_args import EngineArgs
from furiosa_llm.runtime.llm_engine import LLMEngine
from furiosa_llm.runtime.placement.topology import Topology
from furiosa_llm.runtime.requests.outputs import RequestOutput
from furiosa_llm.runtime.tokens.sampling_params import SamplingParams
from tests.support.artifacts import artifact_of

PROMPTS = ([3, 1, 4], [1, 5, 9, 2, 6])
SHORT = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
LONG = SamplingParams(temperature=0.0, max_tokens=500, ignore_eos=True)
DEADLINE = 120.0


def outputs(engine: LLMEngine) -> list[RequestOutput]:
    last: dict[str, RequestOutput] = {}
    while engine.has_unfinished_requests():
        last.update({output.request_id: output for output in engine.step() if output.finished})
    return [output for _, output in sorted(last.items())]


def tokens(engine: LLMEngine) -> list[Any]:
    for number, prompt in enumerate(PROMPTS):
        engine.add_request(str(number), {"prompt_token_ids": prompt}, SHORT)
    return [output.error or output.outputs[0].token_ids for output in outputs(engine)]


def lose(engine: LLMEngine, act: Callable[[], None]) -> dict[str, Any]:
    """What a request that runs meets when `act` ends a stage."""
    engine.add_request("0", {"prompt_token_ids": PROMPTS[0]}, LONG)
    engine.step()
    started = time.monotonic()
    act()
    acted = time.monotonic()
    (output,) = outputs(engine)
    found = {"error": repr(output.error), "cause": type(getattr(output.error, "__cause__", None)).__name__}
    return {**found, "seconds": time.monotonic() - started, "act": acted - started}


def until(happened: Callable[[], bool]) -> float:
    started = time.monotonic()
    while not happened():
        if time.monotonic() - started > DEADLINE:
            raise TimeoutError
        time.sleep(0.02)
    return time.monotonic() - started


def main(folder: str) -> dict[str, Any]:
    with LLMEngine.from_engine_args(EngineArgs(folder, pipeline_parallel_size=2, threads=1)) as engine:
        expected = tokens(engine)
    os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32), RAY_worker_niceness="0")
    import ray
    from ray.cluster_utils import Cluster

    opened: list[Any] = []
    open_cluster = launch.open_cluster

    def keep(topology: Topology, args: EngineArgs) -> Any:
        opened.append(open_cluster(topology, args))
        return opened[-1]

    launch.open_cluster = keep
    node: dict[str, Any] = {"num_cpus": 1, "resources": {"npu": 1}, "object_store_memory": 80_000_000}
    cluster: Any = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
    others = [cluster.add_node(**node) for _ in range(2)]
    args = EngineArgs(
        folder,
        devices="npu:0,npu:1",
        pipeline_parallel_size=2,
        max_batch_size=2,
        distributed_executor_backend="ray",
        ray_address=cluster.address,
        placement_timeout=60,
    )
    report: dict[str, Any] = {}
    started = time.monotonic()
    with LLMEngine.from_engine_args(args) as engine:
        report["load"] = time.monotonic() - started
        replica = engine.core.replicas[0]

        def node_ids() -> list[str]:
            return [stage.node.node_id for stage in opened[0]._started[0]]

        def process_ids() -> list[int]:
            calls = [stage.actor.__ray_call__.remote(lambda _: os.getpid()) for stage in opened[0]._started[0]]
            return list(ray.get(calls))

        report["same"] = [tokens(engine) == expected]
        report["nodes"] = [len(set(node_ids()))]

        def recovered() -> None:
            report.setdefault("back", []).append(until(lambda: replica.ready))
            report["same"].append(tokens(engine) == expected)
            report["nodes"].append(len(set(node_ids())))

        pids = process_ids()
        report["actor"] = lose(engine, lambda: os.kill(pids[1], signal.SIGKILL))
        recovered()
        at = {one.node_id: one for one in others}
        report["node"] = lose(engine, lambda: cluster.remove_node(at[node_ids()[1]], allow_graceful=False))
        recovered()
        report["none left"] = lose(engine, lambda: cluster.remove_node(at[node_ids()[1]], allow_graceful=False))
        time.sleep(3.0)
        report["waits"] = [replica.ready, replica.death is None, engine.core.ready]
        cluster.add_node(**node)
        recovered()
        pids = process_ids()
    report["left"] = until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids))
    cluster.shutdown()
    return report


if __name__ == "__main__":
    sys.stdout.write(
        f"{json.dumps(main(sys.argv[1] if sys.argv[1:] else str(artifact_of('tiny-llama-optimum', 8))))}\n"
    )
