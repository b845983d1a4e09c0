"""Options of the vendor's `serve` that mean nothing here: known, so that they are refused with the reason."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import click

from furiosa_llm.runtime.errors import UnsupportedError

_SPECULATION = "speculative decoding is not supported"
_BUCKETS = "graphs take any batch and length, so there are no buckets to choose; use --max-batch-size, --max-model-len"
_MESH = "give --devices, -pp and -dp; `furiosa-llm topology` shows the mesh that they make"
_ROUTING = "requests go to the replica with the least load and the longest cached prefix"
_SCHEDULING = "the scheduler has one policy, which docs/scheduling.md describes"

REFUSED: Mapping[tuple[str, ...], str] = {
    ("--speculative-model",): _SPECULATION,
    ("--num-speculative-tokens",): _SPECULATION,
    ("-draft-tp", "--speculative-draft-tensor-parallel-size"): _SPECULATION,
    ("-draft-pp", "--speculative-draft-pipeline-parallel-size"): _SPECULATION,
    ("-draft-dp", "--speculative-draft-data-parallel-size"): _SPECULATION,
    ("--speculative-config",): _SPECULATION,
    ("-pb", "--prefill-buckets"): _BUCKETS,
    ("-db", "--decode-buckets"): _BUCKETS,
    ("--min-batch-size",): _BUCKETS,
    ("--device-mesh",): _MESH,
    ("--revision",): "the model is a folder on this machine; download the revision that you want",
    ("--fxb",): "the artifact's folder holds all there is",
    ("--reasoning-parser",): "answers are given as the model writes them",
    ("--data-parallel-routing-policy",): _ROUTING,
    ("--data-parallel-scoring-profile",): _ROUTING,
    ("--scheduler-kind",): _SCHEDULING,
    ("--estimation-time-limit-ms",): _SCHEDULING,
    ("--max-num-batched-tokens",): f"{_SCHEDULING}; --prefill-chunk-size bounds a batch",
    ("--prefix-cache-lookahead-requests",): _SCHEDULING,
    ("--max-io-memory-mb",): "nothing is sent between host and device",
    ("--default-chat-template-kwargs",): "send chat_template_kwargs with the request",
}
"""The spellings of each option, which takes a value, and why it is refused."""

REFUSED_FLAGS: Mapping[tuple[str, ...], str] = {
    ("--enable-reasoning",): "answers are given as the model writes them",
    ("--trust-remote-code",): "an artifact is data, and no code that came with a model is run",
    ("--use-mock-backend",): "the model is really run; a tiny artifact is as good as a mock",
    ("--enable-jit-wiring",): "there is nothing to wire",
    ("--enable-overlap-scheduling",): "outputs are handed out while the next batch runs, always",
}
"""The same of switches."""


def refused_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the options, hidden: whoever gives one is told why it is none."""
    for flag, table in ((False, REFUSED), (True, REFUSED_FLAGS)):
        for names, reason in table.items():
            add = click.option(
                *names, hidden=True, is_flag=flag, expose_value=False, default=None, callback=_refuser(names, reason)
            )
            command = add(command)
    return command


def _refuser(names: tuple[str, ...], reason: str) -> Callable[[click.Context, click.Parameter, Any], None]:
    def refuse(_: click.Context, __: click.Parameter, value: Any) -> None:
        if value is not None:
            raise UnsupportedError(f"{' / '.join(names)} is not supported: {reason}; leave it out")

    return refuse
