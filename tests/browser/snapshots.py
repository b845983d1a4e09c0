"""Answers of `GET /machine` with figures that a test knows."""

from __future__ import annotations

from typing import Any

from tests.server.conftest import NAME

GB = 10**9
PREDICTION = {
    "device": "machines/of-a-long-name/measured-here-on-the-last-day-of-the-year.toml",
    "recent": {
        "requests": 1,
        "concurrency": 3.9,
        "prompt_tokens": 128.0,
        "generated_tokens": 32.0,
        "ttft_ms": {"measured": 80.0, "predicted": 90.0},
        "tpot_ms": {"measured": 20.0, "predicted": None},
        "tokens_per_second": {"measured": 2000.0, "predicted": 500.0},
    },
}
"""As `serve --device` gives it."""


def snapshot(second: float = 0, *, cards: int = 4, replicas: int = 2, stages: int = 2, **others: Any) -> dict[str, Any]:
    """A machine whose every stage takes a card, `second` seconds after it was loaded; other cards are not used.

    Each second it generates 10 tokens from 100 of prompts, a stage is busy for a quarter of it and exchanges for an
    eighth, in 20 calls of 50 kB.
    """
    each = [{"replica": replica, "stage": stage} for replica in range(replicas) for stage in range(stages)]
    return {
        "model": NAME,
        "task": "decoder",
        "version": "1.2.3",
        "verification": "none; run `furiosa-llm verify`",
        "time": 1e9 + second,
        "uptime_seconds": 60 + second,
        "parallelism": {
            "tensor_parallel_size": 8,
            "pipeline_parallel_size": stages,
            "data_parallel_size": replicas,
            "devices": f"npu:0-{cards - 1}",
        },
        "cards": [_card(npu, stages, used=npu < len(each)) for npu in range(cards)],
        "replicas": [
            {
                "replica": replica,
                "alive": True,
                "ready": True,
                "running": 3,
                "waiting": 1,
                "used_pages": 1500,
                "num_pages": 2000,
            }
            for replica in range(replicas)
        ],
        "stages": [
            {
                **one,
                "first_block": 15 * one["stage"],
                "num_blocks": 15,
                "busy_seconds": second / 4,
                "batches": second * 5,
            }
            for one in each
        ],
        "collectives": [
            {**one, "kind": "AllReduce", "calls": 20 * second, "nbytes": 10**6 * second, "seconds": second / 8}
            for one in each
        ],
        "tokens": {"prompt": 100 * second, "generation": 10 * second},
        "requests": {"received": 1234, "succeeded": 1200, "cancelled": 30, "failed": 4},
        **others,
    }


def _card(npu: int, stages: int, *, used: bool) -> dict[str, Any]:
    return {"npu": npu, "pes": [_pe(rank, npu // stages, npu % stages, used=used) for rank in range(8)]}


def _pe(rank: int, replica: int, stage: int, *, used: bool) -> dict[str, Any]:
    if not used:
        unused = dict.fromkeys(("memory_nbytes", "weights_nbytes", "kv_nbytes", "kv_used_nbytes"), 0)
        return {"pe": rank, "replica": None, "stage": None, "rank": None, **unused}
    return {
        "pe": rank,
        "replica": replica,
        "stage": stage,
        "rank": rank,
        "memory_nbytes": 6 * GB,
        "weights_nbytes": GB,
        "kv_nbytes": 2 * GB,
        "kv_used_nbytes": GB // 2,
    }
