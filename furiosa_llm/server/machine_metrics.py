"""The machine's part of `/metrics`: memory of every PE, work of every stage and collective, and the busy shares."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector

from furiosa_llm.runtime.engine.machine_snapshot import MachineSnapshot, PESnapshot

WINDOW = 10.0
"""Seconds over which the busy share of a stage is taken."""

StageKey = tuple[int, int]
"""A replica and one of its stages."""

_MEMORY: Mapping[str, Callable[[PESnapshot], int]] = {
    "capacity": lambda pe: pe.memory_nbytes,
    "weights": lambda pe: pe.weights_nbytes,
    "kv_room": lambda pe: pe.kv_nbytes,
    "kv_used": lambda pe: pe.kv_used_nbytes,
}


class BusyShares:
    """Which share of the last `WINDOW` seconds each stage was running, from what is noted now and again."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._noted: deque[tuple[float, dict[StageKey, float]]] = deque()

    def note(self, snapshot: MachineSnapshot) -> None:
        """Notes how long the stages have been running by now."""
        now = self._clock()
        self._noted.append((now, _busy(snapshot)))
        while len(self._noted) > 1 and self._noted[1][0] <= now - WINDOW:
            self._noted.popleft()

    def read(self, snapshot: MachineSnapshot) -> dict[StageKey, float]:
        """The shares up to now: since the last note that is `WINDOW` seconds old, or the first one there is."""
        now, busy = self._clock(), _busy(snapshot)
        old = [one for one in self._noted if one[0] <= now - WINDOW]
        then, before = old[-1] if old else (self._noted[0] if self._noted else (now, busy))
        return {key: (busy[key] - before[key]) / (now - then) if now > then else 0.0 for key in busy}


async def watch(shares: BusyShares, machine: Callable[[], MachineSnapshot], *, interval: float = 1.0) -> None:
    """Notes every `interval` seconds what the stages have done, until it is cancelled."""
    while True:
        shares.note(machine())
        await asyncio.sleep(interval)


def _busy(snapshot: MachineSnapshot) -> dict[StageKey, float]:
    return {
        (replica.replica, one.stage.index): one.counts.busy_seconds
        for replica in snapshot.replicas
        for one in replica.stages
    }


class MachineCollector(Collector):
    """Asks for the machine when the metrics are asked for."""

    def __init__(self, machine: Callable[[], MachineSnapshot], shares: BusyShares, model_name: str) -> None:
        self._machine = machine
        self._shares = shares
        self._model_name = model_name

    def collect(self) -> Iterable[Metric]:
        """All of it, from one snapshot."""
        snapshot = self._machine()
        yield self._pipeline(snapshot)
        yield self._memory(snapshot)
        yield from self._collectives(snapshot)
        yield from self._stages(snapshot)
        yield from self._replicas(snapshot)

    def _pipeline(self, snapshot: MachineSnapshot) -> Metric:
        made = InfoMetricFamily("furiosa_llm_pipeline", "How the model is parallel, and on which PEs.")
        labels = {name: str(value) for name, value in snapshot.topology.as_dict().items()}
        made.add_metric([], {"model_name": self._model_name, **labels})
        return made

    def _memory(self, snapshot: MachineSnapshot) -> Metric:
        made = self._gauge("pe_memory_bytes", "Memory of a PE that is used, by what it is for.", "npu", "pe", "kind")
        for pe in (pe for card in snapshot.cards for pe in card.pes if pe.replica is not None):
            for kind, nbytes in _MEMORY.items():
                made.add_metric([self._model_name, str(pe.pe.npu), str(pe.pe.index), kind], nbytes(pe))
        return made

    def _collectives(self, snapshot: MachineSnapshot) -> Iterable[Metric]:
        labels = ("replica", "stage", "kind")
        calls = self._counter("collective_calls", "Collectives, and transfers between stages.", *labels)
        nbytes = self._counter("collective_bytes", "What each PE of the stage received by them.", *labels)
        seconds = self._counter("collective_seconds", "What was spent on them, waiting included.", *labels)
        for replica in snapshot.replicas:
            for one in replica.stages:
                for counts in one.counts.transfers:
                    values = [self._model_name, str(replica.replica), str(one.stage.index), counts.kind]
                    calls.add_metric(values, counts.calls)
                    nbytes.add_metric(values, counts.nbytes)
                    seconds.add_metric(values, counts.seconds)
        return calls, nbytes, seconds

    def _stages(self, snapshot: MachineSnapshot) -> Iterable[Metric]:
        batches = self._counter("stage_batches", "How often a stage ran.", "replica", "stage")
        busy = self._counter("stage_busy_seconds", "How long a stage has been running.", "replica", "stage")
        share = self._gauge("stage_busy_share", "Of the last 10 s, how much a stage was running.", "replica", "stage")
        shares = self._shares.read(snapshot)
        for replica in snapshot.replicas:
            for one in replica.stages:
                values = [self._model_name, str(replica.replica), str(one.stage.index)]
                batches.add_metric(values, one.counts.runs)
                busy.add_metric(values, one.counts.busy_seconds)
                share.add_metric(values, shares[replica.replica, one.stage.index])
        return batches, busy, share

    def _replicas(self, snapshot: MachineSnapshot) -> Iterable[Metric]:
        prefilled = self._counter("prefilled_tokens", "Tokens whose KV was computed in prefills.", "replica")
        decoded = self._counter("decoded_tokens", "Tokens that were stepped one by one.", "replica")
        preemptions = self._counter("num_preemptions", "Sequences that lost their pages to others.", "replica")
        copies = self._counter("slot_copies", "Copies of KV from one slot to another.", "replica")
        restarts = self._counter("replica_restarts", "Runners that were replaced after a failure.", "replica")
        for replica in snapshot.replicas:
            values = [self._model_name, str(replica.replica)]
            prefilled.add_metric(values, replica.counts.prefilled_tokens)
            decoded.add_metric(values, replica.counts.decoded_tokens)
            preemptions.add_metric(values, replica.usage.preemptions)
            copies.add_metric(values, replica.counts.copies)
            restarts.add_metric(values, replica.counts.restarts)
        return prefilled, decoded, preemptions, copies, restarts

    def _counter(self, name: str, text: str, *labels: str) -> CounterMetricFamily:
        return CounterMetricFamily(f"furiosa_llm_{name}", text, labels=["model_name", *labels])

    def _gauge(self, name: str, text: str, *labels: str) -> GaugeMetricFamily:
        return GaugeMetricFamily(f"furiosa_llm_{name}", text, labels=["model_name", *labels])
