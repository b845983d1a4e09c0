"""`EngineArgs` and `SchedulerConfig`: how a model is loaded and run, as Python and as command line options."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, Self

from furiosa_llm.runtime.engine.buckets import BucketConfig
from furiosa_llm.runtime.errors import InputError, UnsupportedError
from furiosa_llm.runtime.placement.capacity import DEFAULT_CHUNK_SIZE
from furiosa_llm.runtime.tokens.tokenizer import Tokenizer

DEFAULT_BATCH_SIZE = 16

_COUNTS = (
    "pipeline_parallel_size",
    "data_parallel_size",
    "tensor_parallel_size",
    "paged_attention_num_blocks",
    "max_batch_size",
    "max_model_len",
    "max_prompt_len",
    "prefill_chunk_size",
    "npu_queue_limit",
    "max_processing_samples",
    "workers",
    "threads",
)

_REFUSED = {
    "trust_remote_code": "an artifact is data, and no code that came with a model is run",
    "speculative_model": "speculative decoding is not supported",
    "num_speculative_tokens": "speculative decoding is not supported",
    "draft_model_id_or_path": "speculative decoding is not supported",
    "revision": "the model is a folder on this machine; download the revision that you want",
    "device_mesh": "give devices and the parallel sizes; `furiosa-llm topology` shows the mesh that they make",
    "backend": "there is one backend, onnxruntime",
    "fxb": "the artifact's folder holds all there is",
    "kv_transfer_config": "prefill and decode run on the same PEs",
    "max_seq_len_to_capture": "nothing is compiled for a length; max_model_len is the limit of a sequence",
    "prefill_buckets": "any size runs; max_prompt_len is the limit, or bucket_config",
    "decode_buckets": "any size runs; max_batch_size and max_model_len are the limits, or bucket_config",
    "min_batch_size": "any size runs",
    "max_io_memory_mb": "what a step needs is allocated as it is needed",
    "task_type": "the artifact says what its model is for",
}
"""Options of the vendor's that mean nothing here, and why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerConfig:
    """How requests are scheduled.

    npu_queue_limit: at least 1. There is one batch under way for each pipeline stage, whatever this is.
    max_processing_samples: the most sequences that run at once; `max_batch_size` is the lower limit as a rule.
    spare_blocks_ratio: share of the KV cache's pages that is left unused, in [0, 1).
    is_offline: has no effect, as requests that wait for nothing and requests that trickle in are scheduled alike.
    prefill_chunk_size: longer prompts are computed in pieces of so many tokens, between which others decode; None: 256.
    enable_prefix_caching: prompts that begin like an earlier one take its KV over.
    """

    npu_queue_limit: int = 2
    max_processing_samples: int = 65536
    spare_blocks_ratio: float = 0.0
    is_offline: bool = False
    prefill_chunk_size: int | None = None
    enable_prefix_caching: bool = True

    def __post_init__(self) -> None:
        _check_counts(self, ("npu_queue_limit", "max_processing_samples", "prefill_chunk_size"))
        _check_types(self, {"is_offline": bool, "enable_prefix_caching": bool})
        if not (_is_number(self.spare_blocks_ratio) and 0.0 <= self.spare_blocks_ratio < 1.0):
            raise InputError(f"spare_blocks_ratio must be in [0, 1), got {self.spare_blocks_ratio!r:.80}")


_TYPES = {
    "model": str | os.PathLike,
    "tokenizer": str | os.PathLike | Tokenizer,
    "cache_dir": str | os.PathLike,
    "is_offline": bool,
    "allow_subset": bool,
    "enable_prefix_caching": bool,
    "batch_invariant": bool,
    "mapped": bool,
    "full_verification": bool,
    "bucket_config": BucketConfig,
    "scheduler_config": SchedulerConfig,
}
"""Of the fields whose values are not counted."""


@dataclass(frozen=True, slots=True)
class EngineArgs:
    """What is loaded, onto which PEs, and within which limits. None stands for the default.

    model: the artifact's folder.
    pipeline_parallel_size: stages that a replica is cut into; None: 1.
    data_parallel_size: replicas; None: as many as the devices are enough for.
    tokenizer: another tokenizer than the artifact's: its folder, or one that is loaded.
    tokenizer_mode: "auto"; there is no slow one.
    seed: for requests that have none of their own.
    devices: the cards or PEs to use, such as "npu:0,npu:1:0-3"; None: those of the smallest machine that is enough.
    cache_dir: where the vendor's engine keeps what it compiles; nothing is compiled here, and nothing written there.
    paged_attention_num_blocks: pages of 16 tokens in each replica's KV cache; None: what the batch needs, if it fits.
    npu_queue_limit, max_processing_samples, spare_blocks_ratio, is_offline, prefill_chunk_size,
        enable_prefix_caching: see `SchedulerConfig`; None takes them from `scheduler_config`.
    tensor_parallel_size: what the artifact has to be split for; it cannot be chosen here.
    num_blocks_per_pp_stage: the blocks of each stage, instead of `pipeline_parallel_size`.
    allow_subset: leave PEs of the devices unused instead of refusing them.
    max_batch_size: sequences that a replica runs at once; None: 16.
    max_model_len: tokens of a sequence, prompt and completion; None: the model's limit.
    max_prompt_len: tokens of a prompt; None: one less than that.
    bucket_config: gives the three before where they are None.
    scheduler_config: see there.
    workers: processes that the PEs are spread over; None: all run in this one.
    threads: that step the PEs; None: one for each core that this process may use.
    batch_invariant: give every request the bits that it has alone, whoever else is served, at the price of slower
        steps where this machine's kernels make them depend on the batch; refused where that is not possible.
    mapped: leave the weights in their file: starts faster, runs slower.
    full_verification: compare the weights with their digests; None: if they are below a gigabyte.
    step_timeout: seconds after which a batch that is not back counts as hung.
    """

    model: str | os.PathLike[str]
    pipeline_parallel_size: int | None = None
    data_parallel_size: int | None = None
    tokenizer: str | os.PathLike[str] | Tokenizer | None = None
    tokenizer_mode: Literal["auto", "slow"] = "auto"
    seed: int | None = None
    devices: str | Sequence[str] | None = None
    cache_dir: str | os.PathLike[str] | None = None
    paged_attention_num_blocks: int | None = None
    npu_queue_limit: int | None = None
    max_processing_samples: int | None = None
    spare_blocks_ratio: float | None = None
    is_offline: bool | None = None
    tensor_parallel_size: int | None = None
    num_blocks_per_pp_stage: Sequence[int] | None = None
    allow_subset: bool = False
    max_batch_size: int | None = None
    max_model_len: int | None = None
    max_prompt_len: int | None = None
    prefill_chunk_size: int | None = None
    enable_prefix_caching: bool | None = None
    bucket_config: BucketConfig | None = None
    scheduler_config: SchedulerConfig | None = None
    workers: int | None = None
    threads: int | None = None
    batch_invariant: bool = False
    mapped: bool = False
    full_verification: bool | None = None
    step_timeout: float = 300.0

    def __post_init__(self) -> None:
        _check_counts(self, _COUNTS)
        _check_types(self, _TYPES)
        if self.model is None:
            raise InputError("model: found None, expected the folder of an artifact")
        if self.tokenizer_mode != "auto":
            raise UnsupportedError(
                f"tokenizer_mode={self.tokenizer_mode!r:.80} is not supported: there is only the tokenizer of "
                f"tokenizer.json; leave it out, or give 'auto'"
            )
        if self.seed is not None and (not _is_int(self.seed) or not 0 <= self.seed < 2**64):
            raise InputError(f"seed must be an integer of at least 0 and below 2**64, got {self.seed!r:.80}")
        if not (_is_number(self.step_timeout) and self.step_timeout > 0):
            raise InputError(f"step_timeout must be positive, got {self.step_timeout!r:.80}")
        if self.pipeline_parallel_size is not None and self.num_blocks_per_pp_stage is not None:
            raise InputError(
                "Only one of `pipeline_parallel_size` or `num_blocks_per_pp_stage` should be given as input, not both."
            )

    def scheduler(self) -> SchedulerConfig:
        """`scheduler_config`, with what is given beside it in its place."""
        config = self.scheduler_config or SchedulerConfig()
        names = [field.name for field in fields(SchedulerConfig)]
        given = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        return replace(config, **given)

    @classmethod
    def add_cli_args(cls, parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        """Adds an option for every field that a command line can give; returns `parser`."""
        parser.add_argument("--model", required=True, help="The artifact's folder.")
        for name, kind, text in _OPTIONS:
            parser.add_argument(f"--{name.replace('_', '-')}", type=kind, default=None, help=text)
        for name, text in _SWITCHES:
            parser.add_argument(f"--{name.replace('_', '-')}", action="store_true", default=None, help=text)
        parser.add_argument(
            "--enable-prefix-caching",
            action=argparse.BooleanOptionalAction,
            default=None,
            help="Prompts that begin like an earlier one take its KV over.",
        )
        return parser

    @classmethod
    def from_cli_args(cls, args: argparse.Namespace) -> Self:
        """The arguments that a parser with `add_cli_args` found; what else is in `args` is not looked at."""
        names = [field.name for field in fields(cls)]
        return cls(**{name: value for name in names if (value := getattr(args, name, None)) is not None})


@dataclass(frozen=True, slots=True)
class AsyncEngineArgs(EngineArgs):
    """`EngineArgs` under the name that goes with `AsyncLLMEngine`."""


def refuse_foreign_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """`options` without those of the vendor's that mean nothing here; raises UnsupportedError if one is made use of."""
    for name, reason in _REFUSED.items():
        if options.get(name) not in (None, False, [], ()):
            raise UnsupportedError(f"{name}={options[name]!r:.80} is not supported: {reason}; leave it out")
    return {name: value for name, value in options.items() if name not in _REFUSED}


def _check_counts(config: object, names: Iterable[str]) -> None:
    for name in names:
        value = getattr(config, name)
        if value is not None and (not _is_int(value) or value < 1):
            raise InputError(f"{name} must be an integer of at least 1, got {value!r:.80}")


def _check_types(config: object, types: Mapping[str, Any]) -> None:
    for name, expected in types.items():
        value = getattr(config, name)
        if value is not None and not isinstance(value, expected):
            words = " or ".join(kind.__name__ for kind in getattr(expected, "__args__", (expected,)))
            raise InputError(f"{name}: found {value!r:.80} of type {type(value).__name__}, expected {words}")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _blocks(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


_OPTIONS = (
    ("pipeline_parallel_size", int, "Stages that a replica is cut into."),
    ("data_parallel_size", int, "Replicas; by default as many as the devices are enough for."),
    ("tokenizer", str, "The folder of another tokenizer than the artifact's."),
    ("tokenizer_mode", str, "auto: there is no slow one."),
    ("seed", int, "For requests that have none of their own."),
    ("devices", str, 'The cards or PEs to use, such as "npu:0,npu:1:0-3".'),
    ("cache_dir", Path, "Nothing is written there."),
    ("paged_attention_num_blocks", int, "Pages of 16 tokens in each replica's KV cache."),
    ("npu_queue_limit", int, "No effect: one batch of each stage is under way."),
    ("max_processing_samples", int, "The most sequences that run at once."),
    ("spare_blocks_ratio", float, "Share of the KV cache's pages that is left unused."),
    ("tensor_parallel_size", int, "What the artifact has to be split for."),
    ("num_blocks_per_pp_stage", _blocks, "The blocks of each stage, such as 10,20."),
    ("max_batch_size", int, f"Sequences that a replica runs at once ({DEFAULT_BATCH_SIZE})."),
    ("max_model_len", int, "Tokens of a sequence, prompt and completion."),
    ("max_prompt_len", int, "Tokens of a prompt."),
    ("prefill_chunk_size", int, f"Longer prompts are computed in pieces of so many tokens ({DEFAULT_CHUNK_SIZE})."),
    ("workers", int, "Processes that the PEs are spread over."),
    ("threads", int, "Threads that step the PEs; by default one for each core."),
    ("step_timeout", float, "Seconds after which a batch that is not back counts as hung."),
)
_SWITCHES = (
    ("is_offline", "No effect: all requests are scheduled alike."),
    ("allow_subset", "Leave PEs of the devices unused instead of refusing them."),
    ("batch_invariant", "Give every request the bits that it has alone, whoever else is served."),
    ("mapped", "Leave the weights in their file: starts faster, runs slower."),
    ("full_verification", "Compare the weights with their digests, however large they are."),
)
