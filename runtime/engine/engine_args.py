"""`EngineArgs` and `SchedulerConfig`: how a model is loaded and run, as Python and as command line options."""

from __future__ import annotations

import argparse
import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Annotated, Any, Literal, ParamSpec, Self, TypedDict, TypeVar, get_type_hints

from furiosa_llm.runtime.artifact.options import (
    COMPUTE,
    COUNT,
    COUNT_OR_NONE,
    PATH,
    POSITIVE,
    SEED,
    SHARE,
    SWITCH,
    TEXT,
    Kind,
    Option,
    check_options,
    declared,
    instance,
)
from furiosa_llm.runtime.engine.buckets import BucketConfig
from furiosa_llm.runtime.errors import InputError, UnsupportedError
from furiosa_llm.runtime.placement.workload import DEFAULT_CHUNK_SIZE
from furiosa_llm.runtime.tokens.tokenizer import Tokenizer

P = ParamSpec("P")
T = TypeVar("T")

DEFAULT_BATCH_SIZE = 16

_SPECULATION = "speculative decoding is not supported"
FOREIGN = {
    "trust_remote_code": "an artifact is data, and no code that came with a model is run",
    "speculative_model": _SPECULATION,
    "num_speculative_tokens": _SPECULATION,
    "draft_model_id_or_path": _SPECULATION,
    "revision": "the model is a folder on this machine; download the revision that you want",
    "device_mesh": "give devices and the parallel sizes; `furiosa-llm topology` shows the mesh that they make",
    "backend": "there is one backend, onnxruntime",
    "fxb": "the artifact's folder holds all there is",
    "kv_transfer_config": "prefill and decode run on the same PEs",
    "max_seq_len_to_capture": "nothing is compiled for a length; max_model_len is the limit of a sequence",
    "prefill_buckets": "any size runs; max_prompt_len is the limit",
    "decode_buckets": "any size runs; max_batch_size and max_model_len are the limits",
    "min_batch_size": "any size runs",
    "max_io_memory_mb": "what a step needs is allocated as it is needed",
    "task_type": "the artifact says what its model is for",
}
"""Options of the vendor's that mean nothing here, and why."""


def _block_counts(text: str) -> tuple[int, ...]:
    counts = tuple(int(part) for part in text.split(","))
    if min(counts) < 1:
        raise ValueError
    return counts


TOKENIZER = instance("a path or a Tokenizer", str, os.PathLike, Tokenizer)
DEVICES = Kind("names of devices", lambda _: True)
"""`parse_devices` says what is wrong with them."""
BLOCK_COUNTS = Kind("a list of integers such as 10,20", lambda _: True, _block_counts)
"""`choose_stages` says whether they are the artifact's."""
BACKEND = Kind('"local" or "ray"', lambda value: value in ("local", "ray"))


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerConfig:
    """How requests are scheduled."""

    npu_queue_limit: Annotated[int, Option("No effect: each pipeline stage has one batch under way.", COUNT)] = 2
    max_processing_samples: Annotated[int, Option("A second limit of the sequences that run at once.", COUNT)] = 65536
    spare_blocks_ratio: Annotated[float, Option("Share of the KV cache's pages that is left unused.", SHARE)] = 0.0
    is_offline: Annotated[bool, Option("No effect: all requests are scheduled alike.", SWITCH)] = False
    prefill_chunk_size: Annotated[
        int | None,
        Option(
            "Longer prompts are computed in pieces of so many tokens, shorter ones together up to so many.",
            COUNT,
            f"{DEFAULT_CHUNK_SIZE}",
        ),
    ] = None
    enable_prefix_caching: Annotated[
        bool, Option("A prompt that begins like an earlier one takes its KV over.", SWITCH)
    ] = True

    def __post_init__(self) -> None:
        check_options(self, InputError)


@dataclass(frozen=True, slots=True)
class EngineArgs:
    """What is loaded, onto which PEs, and within which limits. None stands for the default.

    Fields without a text of their own are `SchedulerConfig`'s: None takes them from `scheduler_config`.
    """

    model: Annotated[str | os.PathLike[str], Option("The artifact's folder.", PATH)]
    pipeline_parallel_size: Annotated[
        int | None, Option("Pipeline stages, each on a later card than the one before.", COUNT, "1")
    ] = None
    data_parallel_size: Annotated[
        int | None, Option("Replicas of the model.", COUNT, "as many as the devices have PEs for")
    ] = None
    tokenizer: Annotated[
        str | os.PathLike[str] | Tokenizer | None,
        Option("Folder of another tokenizer than the artifact's.", TOKENIZER),
    ] = None
    tokenizer_mode: Annotated[
        Literal["auto", "slow"], Option('"auto": there is no slow one.', Kind('"auto"', lambda _: True))
    ] = "auto"
    seed: Annotated[int | None, Option("For requests that have none of their own.", SEED)] = None
    devices: Annotated[
        str | Sequence[str] | None,
        Option('PEs to simulate: "npu:0,npu:1", "npu:0:*", "npu:0:0-3".', DEVICES, "as many as the sizes need"),
    ] = None
    cache_dir: Annotated[
        str | os.PathLike[str] | None, Option("No effect: nothing is compiled, and nothing written.", PATH)
    ] = None
    paged_attention_num_blocks: Annotated[
        int | None,
        Option(
            "Pages of 16 tokens in the KV cache of a replica.", COUNT, "what the longest sequences need, if it fits"
        ),
    ] = None
    npu_queue_limit: int | None = None
    max_processing_samples: int | None = None
    spare_blocks_ratio: float | None = None
    is_offline: bool | None = None
    tensor_parallel_size: Annotated[
        int | None, Option("What the artifact has to be split for; another one is refused.", COUNT, "as it is")
    ] = None
    num_blocks_per_pp_stage: Annotated[
        Sequence[int] | None,
        Option("Blocks of each pipeline stage; without, the stages are balanced.", BLOCK_COUNTS),
    ] = None
    allow_subset: Annotated[bool, Option("Use the first PEs of the devices if the sizes need fewer.", SWITCH)] = False
    max_batch_size: Annotated[
        int | None, Option("Sequences that a replica runs at once.", COUNT, f"{DEFAULT_BATCH_SIZE}")
    ] = None
    max_model_len: Annotated[
        int | None, Option("Tokens of a sequence, prompt and completion.", COUNT, "the model's limit")
    ] = None
    max_prompt_len: Annotated[int | None, Option("Tokens of a prompt.", COUNT, "one less than of a sequence")] = None
    prefill_chunk_size: int | None = None
    enable_prefix_caching: bool | None = None
    bucket_config: Annotated[
        BucketConfig | None,
        Option("The vendor's buckets: the largest ones are the limits.", instance("a BucketConfig", BucketConfig)),
    ] = None
    scheduler_config: Annotated[
        SchedulerConfig | None,
        Option("How requests are scheduled.", instance("a SchedulerConfig", SchedulerConfig)),
    ] = None
    workers: Annotated[int | None, Option("Processes that the PEs are spread over.", COUNT, "this one alone")] = None
    threads: Annotated[int | None, Option("Threads that step the PEs.", COUNT, "the cores")] = None
    spin_us: Annotated[
        int,
        Option(
            "Microseconds for which threads poll for each other within a step before they sleep.",
            COUNT_OR_NONE,
            unit="us",
        ),
    ] = 0
    batch_invariant: Annotated[
        bool,
        Option(
            "Give every request the bits that it has alone, whoever else is served; docs/determinism.md has the price.",
            SWITCH,
        ),
    ] = False
    mapped: Annotated[bool, Option("Leave the weights in their file: starts faster, runs slower.", SWITCH)] = False
    separate: Annotated[
        bool, Option("Keep the nodes of every PE apart, as the artifact has them: runs slower, for studies.", SWITCH)
    ] = False
    compute: Annotated[
        str | None,
        Option(
            "The type to compute in: float32, for models in types that have no kernel here.", COMPUTE, "the model's"
        ),
    ] = None
    full_verification: Annotated[
        bool | None, Option("Compare the weights with their digests as they are loaded.", SWITCH, "below 1 GB")
    ] = None
    step_timeout: Annotated[
        float | None,
        Option("Seconds after which a batch that is not back is ended.", POSITIVE, "by the model's size, 8 to 300 s"),
    ] = None
    distributed_executor_backend: Annotated[
        Literal["local", "ray"] | None,
        Option("Where stages run: local, or as actors of a Ray cluster (docs/cluster.md).", BACKEND, "local"),
    ] = None
    ray_address: Annotated[
        str | None,
        Option("Ray's address, such as auto or 10.0.0.1:6379.", TEXT, "a Ray of its own, here"),
    ] = None
    placement_timeout: Annotated[
        float | None, Option("Seconds to wait for hosts with the cards that the devices name.", POSITIVE, "60")
    ] = None
    artifact_cache: Annotated[
        str | os.PathLike[str] | None,
        Option("Folder on each host for the tensors of its stages.", PATH, "the artifact is on each host"),
    ] = None
    max_step_nbytes: Annotated[
        int | None,
        Option("Bytes that onnxruntime may allocate for the steps of all replicas.", COUNT, "by the model's size"),
    ] = None

    def __post_init__(self) -> None:
        check_options(self, InputError)
        self.scheduler()  # checks what it is given
        if self.tokenizer_mode != "auto":
            raise UnsupportedError(
                f"tokenizer_mode={self.tokenizer_mode!r:.80} is not supported: there is only the tokenizer of "
                f"tokenizer.json; leave it out, or give 'auto'"
            )

    @property
    def remote(self) -> bool:
        """Whether stages run on other hosts."""
        return self.distributed_executor_backend == "ray"

    def scheduler(self) -> SchedulerConfig:
        """`scheduler_config`, with the fields that are given here in place of its own."""
        config = self.scheduler_config or SchedulerConfig()
        given = {name: value for name in declared(SchedulerConfig) if (value := getattr(self, name)) is not None}
        return replace(config, **given)

    @classmethod
    def add_cli_args(cls, parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        """Adds an option for every field that a command line can give; returns `parser`."""
        for name, option in engine_options().items():
            add = partial(parser.add_argument, f"--{name.replace('_', '-')}", default=None, help=option.help_text)
            if option.kind is SWITCH:
                add(action=argparse.BooleanOptionalAction)
            else:
                add(type=option.kind.parse, required=name == "model")
        return parser

    @classmethod
    def from_cli_args(cls, args: argparse.Namespace) -> Self:
        """The arguments that a parser with `add_cli_args` found; what else is in `args` is not looked at."""
        names = [field.name for field in fields(cls)]
        return cls(**{name: value for name in names if (value := getattr(args, name, None)) is not None})


class EngineOptions(TypedDict, total=False):
    """The fields of `EngineArgs` but the model, as keyword arguments."""

    pipeline_parallel_size: int | None
    data_parallel_size: int | None
    tokenizer: str | os.PathLike[str] | Tokenizer | None
    tokenizer_mode: Literal["auto", "slow"]
    seed: int | None
    devices: str | Sequence[str] | None
    cache_dir: str | os.PathLike[str] | None
    paged_attention_num_blocks: int | None
    npu_queue_limit: int | None
    max_processing_samples: int | None
    spare_blocks_ratio: float | None
    is_offline: bool | None
    tensor_parallel_size: int | None
    num_blocks_per_pp_stage: Sequence[int] | None
    allow_subset: bool
    max_batch_size: int | None
    max_model_len: int | None
    max_prompt_len: int | None
    prefill_chunk_size: int | None
    enable_prefix_caching: bool | None
    bucket_config: BucketConfig | None
    scheduler_config: SchedulerConfig | None
    workers: int | None
    threads: int | None
    spin_us: int
    batch_invariant: bool
    mapped: bool
    separate: bool
    compute: str | None
    full_verification: bool | None
    step_timeout: float | None
    distributed_executor_backend: Literal["local", "ray"] | None
    ray_address: str | None
    placement_timeout: float | None
    artifact_cache: str | os.PathLike[str] | None
    max_step_nbytes: int | None


def with_engine_options(method: Callable[P, T]) -> Callable[P, T]:
    """Shows every option of `EngineOptions` in the signature of `method` and its text, in place of `**options`."""
    signature, hints = inspect.signature(method), get_type_hints(EngineArgs)
    own = [one for one in signature.parameters.values() if one.kind is not inspect.Parameter.VAR_KEYWORD]
    fields = list(inspect.signature(EngineArgs).parameters.values())[1:]
    shown = [one.replace(kind=inspect.Parameter.KEYWORD_ONLY, annotation=hints[one.name]) for one in fields]
    declared_options = {**declared(SchedulerConfig), **declared(EngineArgs)}
    lines = [f"    {one.name}: {declared_options[one.name].help_text}" for one in fields]
    method.__doc__ = "\n".join((inspect.cleandoc(method.__doc__ or ""), "", "Options:", *lines))
    method.__signature__ = signature.replace(parameters=[*own, *shown])  # type: ignore[attr-defined]
    return method


@dataclass(frozen=True, slots=True)
class AsyncEngineArgs(EngineArgs):
    """`EngineArgs` under the name that goes with `AsyncLLMEngine`."""


def engine_options() -> dict[str, Option]:
    """The options of an engine that a command line can give, by the names of `EngineArgs`' fields."""
    options = {**declared(EngineArgs), **declared(SchedulerConfig)}
    return {name: option for name, option in options.items() if name not in ("bucket_config", "scheduler_config")}


def refuse_foreign_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """`options` without the vendor's that mean nothing here; raises UnsupportedError if one of these is made use of."""
    for name, reason in FOREIGN.items():
        if options.get(name) not in (None, False, [], ()):
            raise UnsupportedError(f"{name}={options[name]!r:.80} is not supported: {reason}; leave it out")
    return {name: value for name, value in options.items() if name not in FOREIGN}
