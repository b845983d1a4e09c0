"""The metrics under vLLM's names, as far as they mean the same here, so that its dashboards show this server."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from prometheus_client import CollectorRegistry
from prometheus_client.core import Metric, Sample
from prometheus_client.registry import Collector

_OWN = "furiosa_llm_"
_LABELS = ("model_name", "finished_reason", "le")
"""Those that vLLM's metrics have, too; what differs in others only is added up."""

NAMES: Mapping[str, tuple[str, ...]] = {
    "num_requests_running": ("num_requests_running",),
    "num_requests_waiting": ("num_requests_waiting",),
    "kv_cache_usage_percent": ("kv_cache_usage_perc", "gpu_cache_usage_perc"),
    "num_preemptions": ("num_preemptions",),
    "prompt_tokens": ("prompt_tokens",),
    "generation_tokens": ("generation_tokens",),
    "prefix_cache_queries": ("prefix_cache_queries", "gpu_prefix_cache_queries"),
    "prefix_cache_hits": ("prefix_cache_hits", "gpu_prefix_cache_hits"),
    "completions_finished": ("request_success",),
    "time_to_first_token_seconds": ("time_to_first_token_seconds",),
    "inter_token_latency_seconds": ("inter_token_latency_seconds", "time_per_output_token_seconds"),
    "time_per_output_token_seconds": ("request_time_per_output_token_seconds",),
    "e2e_request_latency_seconds": ("e2e_request_latency_seconds",),
    "request_queue_time_seconds": ("request_queue_time_seconds",),
    "request_prefill_time_seconds": ("request_prefill_time_seconds",),
    "request_decode_time_seconds": ("request_decode_time_seconds",),
    "request_inference_time_seconds": ("request_inference_time_seconds",),
    "request_prompt_tokens": ("request_prompt_tokens",),
    "request_generation_tokens": ("request_generation_tokens",),
    "request_max_num_generation_tokens": ("request_max_num_generation_tokens",),
    "request_params_n": ("request_params_n",),
    "request_params_max_tokens": ("request_params_max_tokens",),
}
"""What ours are called there; several where releases of vLLM differ."""
_SHARES = {"kv_cache_usage_percent": 0.01}
"""What is a part of 1 there."""


class VLLMCollector(Collector):
    """What `registry` has, under vLLM's names."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry

    def collect(self) -> Iterable[Metric]:
        """The metrics."""
        for metric in self._registry.collect():
            name = metric.name.removeprefix(_OWN)
            for other in NAMES.get(name, ()):
                yield _renamed(metric, f"vllm:{other}", _SHARES.get(name, 1.0))

    def describe(self) -> Iterable[Metric]:
        """Nothing, so that a registry does not ask for all of it."""
        return ()


def _renamed(metric: Metric, name: str, scale: float) -> Metric:
    made = Metric(name, metric.documentation, metric.type)
    values: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}
    for sample in metric.samples:
        labels = tuple((label, sample.labels[label]) for label in _LABELS if label in sample.labels)
        key = (name + sample.name.removeprefix(metric.name), labels)
        values[key] = values.get(key, 0.0) + scale * sample.value
    # vLLM numbers its engines; here one engine has all replicas.
    made.samples = [Sample(key, {**dict(labels), "engine": "0"}, value) for (key, labels), value in values.items()]
    return made
