"""A stand-in for `GET /machine`, made of what the server knows already."""

from __future__ import annotations

import time
from typing import Any

from fastapi import FastAPI

import furiosa_llm
from furiosa_llm.runtime.devices import PE, PE_NBYTES, PES_PER_CARD, parse_devices
from furiosa_llm.server.metrics import EngineGauges
from furiosa_llm.server.model import Decoder
from furiosa_llm.server.state import ServerState

BLOCKS = 15


def add_machine(app: FastAPI) -> None:
    """Adds the route."""
    started = time.time()

    @app.get("/machine")
    async def machine() -> dict[str, Any]:
        state: ServerState = app.state.server
        return {
            "model": state.model.names[0],
            "task": "decoder" if isinstance(state.model.kind, Decoder) else "encoder",
            "version": furiosa_llm.__version__,
            "time": time.time(),
            "uptime_seconds": time.time() - started,
            "parallelism": dict(state.model.parallelism),
            **_figures(state),
        }


def _figures(state: ServerState) -> dict[str, Any]:
    metrics = _metrics(state)
    tp, pp, dp = (
        int(state.model.parallelism.get(f"{kind}_parallel_size", 1)) for kind in ("tensor", "pipeline", "data")
    )
    pes = parse_devices(str(state.model.parallelism.get("devices", f"npu:0:0-{tp - 1}")))
    places = {pe: (at // (tp * pp), at // tp % pp, at % tp) for at, pe in enumerate(pes[: tp * pp * dp])}
    kind = state.model.kind
    gauges = EngineGauges(kind) if isinstance(kind, Decoder) else None
    usages = [replica.usage for replica in kind.engine.core.replicas] if isinstance(kind, Decoder) else []
    steps = int(metrics["generation_tokens_total"] + metrics["prompt_tokens_total"])
    each = [{"replica": replica, "stage": stage} for replica in range(dp) for stage in range(pp)]
    return {
        "cards": [
            {"npu": npu, "pes": [_pe(PE(npu=npu, index=index), places, gauges, tp) for index in range(PES_PER_CARD)]}
            for npu in sorted({pe.npu for pe in pes})
        ],
        "replicas": [
            {
                "replica": number,
                "alive": True,
                "ready": True,
                **{name: getattr(usage, name) for name in ("running", "waiting", "used_pages", "num_pages")},
            }
            for number, usage in enumerate(usages)
        ],
        "stages": [
            {
                **one,
                "first_block": BLOCKS * one["stage"],
                "num_blocks": BLOCKS,
                "busy_seconds": 0.02 * steps / len(each),
                "batches": steps // dp,
            }
            for one in each
        ],
        "collectives": [
            {**one, "kind": kind, "calls": calls * steps, "nbytes": calls * steps * 3456, "seconds": 0.004 * steps}
            for one in each
            for kind, calls in (("AllReduce", 31), ("AllGather", 1), ("Send", 1))
        ],
        "tokens": {name: int(metrics[f"{name}_tokens_total"]) for name in ("prompt", "generation")},
        "requests": {
            "received": int(metrics["request_received_total"]),
            "succeeded": int(metrics["request_success_total"]),
            "failed": int(metrics["request_failure_total"]),
        },
    }


def _pe(pe: PE, places: dict[PE, tuple[int, int, int]], gauges: EngineGauges | None, tp: int) -> dict[str, Any]:
    replica, stage, rank = places.get(pe, (None, None, None))
    used, room = gauges.kv_nbytes.get(pe.npu, (0, 0)) if gauges is not None and replica is not None else (0, 0)
    here = sum(other.npu == pe.npu for other in places)
    return {
        "pe": pe.index,
        "replica": replica,
        "stage": stage,
        "rank": rank,
        "memory_nbytes": 0 if replica is None else PE_NBYTES,
        "weights_nbytes": 0 if replica is None else 538_000_000 // tp,
        "kv_nbytes": room // here if here else 0,
        "kv_used_nbytes": used // here if here else 0,
    }


def _metrics(state: ServerState) -> dict[str, float]:
    lines = [line for line in state.metrics.render().decode().splitlines() if line.startswith("furiosa_llm_")]
    values = {line.partition("{")[0].removeprefix("furiosa_llm_"): float(line.rpartition(" ")[2]) for line in lines}
    return {"prompt_tokens_total": 0, "generation_tokens_total": 0, **values}
