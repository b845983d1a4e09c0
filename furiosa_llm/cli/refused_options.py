"""Options of the vendor's `serve` that mean nothing here, so that they can be refused with the reason."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import click

from furiosa_llm.runtime.engine.engine_args import FOREIGN
from furiosa_llm.runtime.errors import UnsupportedError

_SPECULATION = FOREIGN["speculative_model"]
_ROUTING = "requests go to the replica with the least load and the longest cached prefix"
_SCHEDULING = "the scheduler has one policy, which docs/scheduling.md describes"

REFUSED: Mapping[tuple[str, ...], str] = {
    ("--speculative-model",): _SPECULATION,
    ("--num-speculative-tokens",): _SPECULATION,
    ("-draft-tp", "--speculative-draft-tensor-parallel-size"): _SPECULATION,
    ("-draft-pp", "--speculative-draft-pipeline-parallel-size"): _SPECULATION,
    ("-draft-dp", "--speculative-draft-data-parallel-size"): _SPECULATION,
    ("--speculative-config",): _SPECULATION,
    ("-pb", "--prefill-buckets"): FOREIGN["prefill_buckets"],
    ("-db", "--decode-buckets"): FOREIGN["decode_buckets"],
    ("--min-batch-size",): FOREIGN["min_batch_size"],
    ("--device-mesh",): FOREIGN["device_mesh"],
    ("--revision",): FOREIGN["revision"],
    ("--fxb",): FOREIGN["fxb"],
    ("--data-parallel-routing-policy",): _ROUTING,
    ("--data-parallel-scoring-profile",): _ROUTING,
    ("--scheduler-kind",): _SCHEDULING,
    ("--estimation-time-limit-ms",): _SCHEDULING,
    ("--max-num-batched-tokens",): f"{_SCHEDULING}; --prefill-chunk-size bounds a batch",
    ("--prefix-cache-lookahead-requests",): _SCHEDULING,
    ("--max-io-memory-mb",): FOREIGN["max_io_memory_mb"],
    ("--default-chat-template-kwargs",): "send chat_template_kwargs with the request",
}
"""The spellings of each option, which takes a value, and why it is refused."""

REFUSED_FLAGS: Mapping[tuple[str, ...], str] = {
    ("--enable-reasoning",): "give --reasoning-parser alone",
    ("--trust-remote-code",): FOREIGN["trust_remote_code"],
    ("--use-mock-backend",): "the model is really run; a tiny artifact is as good as a mock",
    ("--enable-jit-wiring",): "there is nothing to wire",
    ("--enable-overlap-scheduling",): "outputs are handed out while the next batch runs, always",
}
"""The same of switches."""


def refused_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the options, hidden: whoever gives one reads why it is refused."""
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
