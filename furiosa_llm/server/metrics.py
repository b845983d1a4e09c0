"""What `/metrics` shows, under the vendor's names: counters and histograms of requests, gauges of the engine."""

from __future__ import annotations

import time
from collections import Counter as Counts
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import get_args

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from furiosa_llm.runtime.requests.outputs import FinishReason, RequestOutput
from furiosa_llm.runtime.tokens.sampling_params import SamplingParams
from furiosa_llm.server.events import client_is_gone
from furiosa_llm.server.machine_metrics import BusyShares, MachineCollector
from furiosa_llm.server.model import Decoder, ServedModel
from furiosa_llm.server.notes import on_one_line
from furiosa_llm.server.recent_load import LoadMeter
from furiosa_llm.server.vllm_metrics import VLLMCollector

_FIRST_TOKEN = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0)
_OUTPUT_TOKEN = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5)
_SEQUENCES = (1, 2, 5, 10, 20)
_WHOLE_REQUEST = (0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0)
_UNLIMITED_LENGTH = 131072


class Metrics:
    """The metrics of one model, in a registry of their own. They have the label `model_name`.

    `names` says whose names are shown: "furiosa", "vllm" or "both".
    """

    def __init__(self, model: ServedModel, names: str = "furiosa") -> None:
        self._registry, self._others = CollectorRegistry(), CollectorRegistry()
        self._others.register(VLLMCollector(self._registry))
        self._names, self._name = names, on_one_line(model.names[0])
        lengths = _one_two_five(model.max_length or _UNLIMITED_LENGTH)
        self.received = self._counter("request_received", "Requests that the engine was given.")
        self.succeeded = self._counter("request_success", "Requests that were completed.")
        self.failed = self._counter("request_failure", "Requests that were refused or failed.")
        self.cancelled = self._counter("request_cancelled", "Requests whose client stopped them, or went.")
        self.prompt_tokens = self._counter("prompt_tokens", "Tokens of prompts.")
        self.generation_tokens = self._counter("generation_tokens", "Tokens that were generated.")
        self.prefix_queries = self._counter("prefix_cache_queries", "Tokens that were looked for in the prefix cache.")
        self.prefix_hits = self._counter("prefix_cache_hits", "Tokens that were found in the prefix cache.")
        self.first_token = self._histogram("time_to_first_token_seconds", "Until the first token.", _FIRST_TOKEN)
        self.inter_token = self._histogram("inter_token_latency_seconds", "Between outputs.", _OUTPUT_TOKEN)
        self.output_token = self._histogram(
            "time_per_output_token_seconds", "Mean of a request, without the first token.", _OUTPUT_TOKEN
        )
        self.whole_request = self._histogram("e2e_request_latency_seconds", "Until the last token.", _WHOLE_REQUEST)
        self.request_prompt = self._histogram("request_prompt_tokens", "Tokens of a prompt.", lengths)
        self.request_generation = self._histogram("request_generation_tokens", "Tokens of all completions.", lengths)
        self.request_max = self._histogram("request_params_max_tokens", "What max_tokens was asked for.", lengths)
        self.longest = self._histogram("request_max_num_generation_tokens", "Of the longest completion.", lengths)
        self.sequences = self._histogram("request_params_n", "What n was asked for.", _SEQUENCES)
        self.queued = self._histogram("request_queue_time_seconds", "Until the first batch.", _WHOLE_REQUEST)
        self.prefilled = self._histogram("request_prefill_time_seconds", "From there to a token.", _WHOLE_REQUEST)
        self.decoded = self._histogram("request_decode_time_seconds", "From there to the last one.", _WHOLE_REQUEST)
        self.ran = self._histogram("request_inference_time_seconds", "From the first batch to the end.", _WHOLE_REQUEST)
        labels = ["model_name", "finished_reason"]
        self.ended = Counter("furiosa_llm_completions_finished", "Why they ended.", labels, registry=self._registry)
        for reason in get_args(FinishReason):  # from the start: what grows is seen from its second value on only
            self.ended.labels(self._name, reason)
        self.load = LoadMeter()
        self.busy = BusyShares()
        self._registry.register(MachineCollector(model.kind.machine, self.busy, self._name))
        if isinstance(model.kind, Decoder):
            self._registry.register(_EngineCollector(model.kind, self._name))

    def render(self) -> bytes:
        """Everything under the names that are wanted, in the text format of Prometheus."""
        own = generate_latest(self._registry) if self._names != "vllm" else b""
        return own + (b"" if self._names == "furiosa" else generate_latest(self._others))

    def count_ends(self, reason: str, count: int = 1) -> None:
        """Counts completions that have ended."""
        self.ended.labels(self._name, reason).inc(count)

    def token_counts(self) -> tuple[float, float]:
        """The tokens of prompts, and the tokens that were generated, so far."""
        return self._read(self.prompt_tokens), self._read(self.generation_tokens)

    def request_counts(self) -> dict[str, int]:
        """The requests so far: `received`, and of them `succeeded`, `cancelled` and `failed`."""
        names = ("received", "succeeded", "cancelled", "failed")
        return {name: int(self._read(getattr(self, name))) for name in names}

    @contextmanager
    def counting(self, requests: int) -> Iterator[None]:
        """Counts so many requests, which succeed if nothing is raised in the block."""
        self.received.inc(requests)
        try:
            yield
        except BaseException:
            self.not_done.inc(requests)
            raise
        self.succeeded.inc(requests)

    @property
    def not_done(self) -> Counter:
        """What counts a request that ends now, and not as it should."""
        return self.cancelled if client_is_gone() else self.failed

    def _read(self, counter: Counter) -> float:
        [value] = [one.value for family in counter.collect() for one in family.samples if one.name.endswith("_total")]
        return value

    def _counter(self, name: str, text: str) -> Counter:
        made = Counter(f"furiosa_llm_{name}", text, ["model_name"], registry=self._registry)
        return made.labels(self._name)

    def _histogram(self, name: str, text: str, buckets: Sequence[float]) -> Histogram:
        made = Histogram(f"furiosa_llm_{name}", text, ["model_name"], registry=self._registry, buckets=buckets)
        return made.labels(self._name)


class RequestMeter:
    """Measures one request of the engine: `see` each output, then `end`, whatever becomes of it."""

    def __init__(self, metrics: Metrics, params: SamplingParams) -> None:
        self._metrics = metrics
        self._started = self._last = time.monotonic()
        self._began: float | None = None
        self._first: float | None = None
        self._tokens: Counts[int] = Counts()
        self._running = params.n
        self._finished = False
        self._uncached = 0
        self._mark = metrics.load.begin(params.n)
        metrics.received.inc()
        metrics.sequences.observe(params.n)
        if params.max_tokens is not None:
            metrics.request_max.observe(params.max_tokens)

    def see(self, output: RequestOutput) -> None:
        """Takes an output of the kind DELTA, as it comes."""
        now = time.monotonic()
        metrics = self._metrics
        for one in output.outputs:
            self._tokens[one.index] += len(one.token_ids)
            metrics.generation_tokens.inc(len(one.token_ids))
            metrics.load.count(len(one.token_ids))
            if one.finish_reason is not None:
                metrics.count_ends(one.finish_reason)
                self._running -= 1
        if self._first is None:
            self._first, self._began = now, output.began
            metrics.first_token.observe(now - self._started)
            metrics.prompt_tokens.inc(len(output.prompt_token_ids))
            metrics.request_prompt.observe(len(output.prompt_token_ids))
            metrics.prefix_queries.inc(len(output.prompt_token_ids))
            metrics.prefix_hits.inc(output.num_cached_tokens or 0)
            self._uncached = len(output.prompt_token_ids) - (output.num_cached_tokens or 0)
        else:
            metrics.inter_token.observe(now - self._last)
        self._last = now
        self._finished = output.finished

    def end(self) -> None:
        """The request has ended, whole or not."""
        metrics = self._metrics
        metrics.load.leave(self._mark)
        if not self._finished or self._first is None:
            metrics.count_ends("abort" if metrics.not_done is metrics.cancelled else "error", self._running)
            metrics.not_done.inc()
            return
        tokens = self._tokens.total()
        metrics.succeeded.inc()
        metrics.whole_request.observe(self._last - self._started)
        metrics.request_generation.observe(tokens)
        metrics.longest.observe(max(self._tokens.values()))
        metrics.decoded.observe(self._last - self._first)
        if self._began is not None:
            metrics.queued.observe(self._began - self._started)
            metrics.prefilled.observe(self._first - self._began)
            metrics.ran.observe(self._last - self._began)
        metrics.load.served(
            self._mark,
            first=self._first,
            last=self._last,
            prompt=self._uncached,
            generated=tokens,
        )
        if tokens > 1:
            metrics.output_token.observe((self._last - self._first) / (tokens - 1))


class EngineGauges:
    """What the replicas have at the moment.

    running, waiting: sequences.
    used_share: of the pages of the KV cache.
    kv_nbytes: for each card by its number, the bytes of KV in use, and the bytes that there is room for.
    """

    def __init__(self, decoder: Decoder) -> None:
        machine = decoder.machine()
        usages = [replica.usage for replica in machine.replicas]
        self.running = sum(usage.running for usage in usages)
        self.waiting = sum(usage.waiting for usage in usages)
        self.used_share = sum(usage.used_pages for usage in usages) / sum(usage.num_pages for usage in usages)
        self.kv_nbytes: dict[int, tuple[int, int]] = {}
        for card in machine.cards:
            used, total = (sum(getattr(pe, name) for pe in card.pes) for name in ("kv_used_nbytes", "kv_nbytes"))
            self.kv_nbytes[card.npu] = (used, total)


class _EngineCollector(Collector):
    """Asks for the gauges when the metrics are asked for."""

    def __init__(self, decoder: Decoder, model_name: str) -> None:
        self._decoder = decoder
        self._model_name = model_name

    def collect(self) -> Iterable[Metric]:
        """The gauges."""
        gauges = EngineGauges(self._decoder)
        yield self._gauge("num_requests_running", "Sequences that run.", gauges.running)
        yield self._gauge("num_requests_waiting", "Sequences that wait.", gauges.waiting)
        yield self._gauge("kv_cache_usage_percent", "Share of the pages in use.", 100 * gauges.used_share)
        kv = gauges.kv_nbytes
        yield self._by_card(
            "kv_cache_total_bytes", "Room for KV on a card.", {n: total for n, (_, total) in kv.items()}
        )
        yield self._by_card("kv_cache_used_bytes", "KV on a card.", {n: used for n, (used, _) in kv.items()})
        shares = {npu: used / total if total else 0.0 for npu, (used, total) in kv.items()}
        yield self._by_card("kv_cache_usage_perc", "Share of that room in use, at most 1.", shares)

    def _gauge(self, name: str, text: str, value: float) -> GaugeMetricFamily:
        made = GaugeMetricFamily(f"furiosa_llm_{name}", text, labels=["model_name"])
        made.add_metric([self._model_name], value)
        return made

    def _by_card(self, name: str, text: str, values: Mapping[int, float]) -> GaugeMetricFamily:
        made = GaugeMetricFamily(f"furiosa_llm_{name}", text, labels=["model_name", "device_index"])
        for npu, value in values.items():
            made.add_metric([self._model_name, str(npu)], value)
        return made


def _one_two_five(limit: int) -> list[float]:
    """1, 2, 5, 10, 20, ... up to `limit`."""

    def all_of_them() -> Iterator[float]:
        decade = 1
        while True:
            yield from (decade, 2 * decade, 5 * decade)
            decade *= 10

    found: list[float] = []
    for bound in all_of_them():
        if bound > limit:
            return found
        found.append(bound)
    raise AssertionError
