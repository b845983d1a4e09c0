"""The line of figures that a busy server logs every ten seconds, in the vendor's words."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping

from furiosa_llm.server.machine_metrics import StageKey
from furiosa_llm.server.metrics import EngineGauges, Metrics
from furiosa_llm.server.model import Decoder

logger = logging.getLogger(__name__)

_GIB = 2**30


async def log_stats(metrics: Metrics, decoder: Decoder, *, interval: float = 10.0) -> None:
    """Logs every `interval` seconds, until it is cancelled; an idle server is silent."""
    before, at = metrics.token_counts(), time.monotonic()
    while True:
        await asyncio.sleep(interval)
        now, counts = time.monotonic(), metrics.token_counts()
        gauges = EngineGauges(decoder)
        if counts != before or gauges.running or gauges.waiting:
            prompt, generation = ((new - old) / (now - at) for new, old in zip(counts, before, strict=True))
            shares = metrics.busy.read(decoder.machine())
            logger.info("%s", _line(prompt, generation, gauges, shares))
        before, at = counts, now


def _line(prompt: float, generation: float, gauges: EngineGauges, shares: Mapping[StageKey, float]) -> str:
    cards = "".join(
        f", RNGD KV cache usage (device {npu}): {100 * used / total if total else 0:.1f}% "
        f"({used / _GIB:.2f} GiB / {total / _GIB:.2f} GiB)"
        for npu, (used, total) in gauges.kv_nbytes.items()
    )
    busy = "".join(
        f", Busy (replica {replica}, stage {stage}): {100 * share:.0f}%" for (replica, stage), share in shares.items()
    )
    return (
        f"Avg prompt throughput: {prompt:.1f} tokens/s, Avg generation throughput: {generation:.1f} tokens/s, "
        f"Running: {gauges.running} reqs, Waiting: {gauges.waiting} reqs{cards}{busy}"
    )
