"""Checks a user.conf before LoadGen reads it, which ignores what it does not know and only logs what it cannot read."""

from __future__ import annotations

import math
from pathlib import Path

from furiosa_llm.runtime.errors import InputError

_SCENARIOS = frozenset({"*", "SingleStream", "MultiStream", "Server", "Offline"})
_POSITIVE = frozenset({"target_qps"})
_PERCENT = frozenset({"target_latency_percentile", "accuracy_log_probability"})
_COUNTS = frozenset(
    {
        *("min_duration", "max_duration", "min_query_count", "max_query_count", "target_latency"),
        *("performance_sample_count_override", "accuracy_sample_count_override", "accuracy_log_sampling_target"),
        *("qsl_rng_seed", "sample_index_rng_seed", "schedule_rng_seed", "accuracy_log_rng_seed"),
        *("performance_issue_unique", "performance_issue_same", "performance_issue_same_index", "print_timestamps"),
        *("sample_concatenate_permutation", "use_token_latencies", "coalesce_queries", "max_async_queries"),
        *("samples_per_query", "infer_token_latencies", "token_latency_scaling_factor"),
    }
)
_KNOWN = _POSITIVE | _PERCENT | _COUNTS
_ELSEWHERE = {
    "ttft_latency": "LoadGen takes it from its own mlperf.conf alone",
    "tpot_latency": "LoadGen takes it from its own mlperf.conf alone",
    "mode": "--test-mode chooses the mode",
}
_MODELS = frozenset(
    {
        *("*", "resnet50", "ssd-mobilenet", "retinanet", "bert", "dlrm", "dlrm-v2", "dlrm-v3", "rnnt", "gptj"),
        *("mixtral-8x7b", "llama2-70b", "llama2-70b-interactive", "llama3_1-405b", "llama3_1-405b-interactive"),
        *("llama3_1-8b", "llama3_1-8b-edge", "llama3_1-8b-interactive", "stable-diffusion-xl", "wan-2.2-t2v-a14b"),
        *("rgat", "pointpainting", "deepseek-r1", "deepseek-r1-interactive", "whisper", "qwen3-vl-235b-a22b", "yolo"),
        *("3d-unet", "gpt-oss-120b", "gpt-oss-120b-interactive"),
    }
)
"""The model keys of LoadGen 6.0's mlperf.conf."""


def check_user_conf(path: Path) -> None:
    """Raises InputError, naming the line, unless each one is `MODEL.SCENARIO.KEY = VALUE` with names LoadGen knows."""
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise InputError(f"--user-conf: {path} cannot be read: {error}") from error
    for number, line in enumerate(lines, start=1):
        words = line.partition("#")[0].split()
        if words:
            try:
                _check_line(words)
            except InputError as error:
                raise InputError(f"--user-conf: {path}, line {number}: {error}") from None


def _check_line(words: list[str]) -> None:
    if len(words) != 3 or words[1] != "=":
        raise InputError(
            f"found {' '.join(words)!r:.80}, expected MODEL.SCENARIO.KEY = VALUE with spaces around the equals sign, "
            f"for instance *.Server.target_qps = 4"
        )
    name, _, value = words
    parts = name.rsplit(".", 2)
    if len(parts) != 3:
        raise InputError(f"found {name!r:.80}, expected MODEL.SCENARIO.KEY, for instance *.Server.target_qps")
    model, scenario, key = parts
    if model not in _MODELS:
        raise InputError(f"LoadGen knows no model {model!r:.80}; docs/mlperf.md has the keys, * is every model")
    if scenario not in _SCENARIOS:
        raise InputError(f"LoadGen knows no scenario {scenario!r:.80}; give Offline, Server, or * for all")
    if key in _ELSEWHERE:
        raise InputError(f"{key} cannot be set here: {_ELSEWHERE[key]}; leave the line out")
    if key not in _KNOWN:
        raise InputError(f"LoadGen knows no setting {key!r:.80}, expected one of {', '.join(sorted(_KNOWN))}")
    _check_value(key, value)


def _check_value(key: str, text: str) -> None:
    if key in _COUNTS:
        if not (text.isascii() and text.isdecimal()):
            raise InputError(f"{key} is {text!r:.80}, expected an integer of at least 0")
        return
    try:
        value = float(text)
    except ValueError:
        raise InputError(f"{key} is {text!r:.80}, expected a number") from None
    limit = 100.0 if key in _PERCENT else math.inf
    if not (0.0 < value <= limit) or math.isinf(value):
        expected = "a percentage above 0 and up to 100" if key in _PERCENT else "a number above 0"
        raise InputError(f"{key} is {text}, expected {expected}")
