"""`EngineArgs`: the vendor's fields and options, and what follows from them."""

from __future__ import annotations

import argparse
from dataclasses import fields
from typing import Any

import pytest

from furiosa_llm.runtime.engine.engine_args import AsyncEngineArgs, EngineArgs, SchedulerConfig
from furiosa_llm.runtime.errors import InputError

VENDOR_FIELDS = [
    "model",
    "pipeline_parallel_size",
    "data_parallel_size",
    "tokenizer",
    "tokenizer_mode",
    "seed",
    "devices",
    "cache_dir",
    "paged_attention_num_blocks",
    "npu_queue_limit",
    "max_processing_samples",
    "spare_blocks_ratio",
    "is_offline",
]


def parse(*arguments: str, cls: type[EngineArgs] = EngineArgs) -> EngineArgs:
    parser = cls.add_cli_args(argparse.ArgumentParser(exit_on_error=False))
    return cls.from_cli_args(parser.parse_args(["--model", "folder", *arguments]))


def test_the_vendors_fields_come_first_and_have_its_defaults() -> None:
    assert [field.name for field in fields(EngineArgs)][: len(VENDOR_FIELDS)] == VENDOR_FIELDS
    args = EngineArgs("folder")
    assert {getattr(args, name) for name in VENDOR_FIELDS} == {"folder", None, "auto"}


def test_nothing_on_the_command_line_is_the_default() -> None:
    assert parse() == EngineArgs("folder")
    assert isinstance(parse(cls=AsyncEngineArgs), AsyncEngineArgs)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("--tokenizer other", {"tokenizer": "other"}),
        ("--tokenizer-mode auto", {"tokenizer_mode": "auto"}),
        ("--seed 0", {"seed": 0}),
        ("--devices npu:0,npu:1", {"devices": "npu:0,npu:1"}),
        ("--pipeline-parallel-size 2", {"pipeline_parallel_size": 2}),
        ("--data-parallel-size 2", {"data_parallel_size": 2}),
        ("--cache-dir there", {"cache_dir": "there"}),
        ("--paged-attention-num-blocks 99", {"paged_attention_num_blocks": 99}),
        ("--npu-queue-limit 3", {"npu_queue_limit": 3}),
        ("--max-processing-samples 7", {"max_processing_samples": 7}),
        ("--spare-blocks-ratio 0.5", {"spare_blocks_ratio": 0.5}),
        ("--is-offline", {"is_offline": True}),
        ("--tensor-parallel-size 4", {"tensor_parallel_size": 4}),
        ("--num-blocks-per-pp-stage 3,4", {"num_blocks_per_pp_stage": (3, 4)}),
        ("--allow-subset", {"allow_subset": True}),
        ("--max-batch-size 8", {"max_batch_size": 8}),
        ("--max-model-len 128", {"max_model_len": 128}),
        ("--max-prompt-len 64", {"max_prompt_len": 64}),
        ("--prefill-chunk-size 32", {"prefill_chunk_size": 32}),
        ("--enable-prefix-caching", {"enable_prefix_caching": True}),
        ("--no-enable-prefix-caching", {"enable_prefix_caching": False}),
        ("--workers 2", {"workers": 2}),
        ("--threads 2", {"threads": 2}),
        ("--mapped", {"mapped": True}),
        ("--separate", {"separate": True}),
        ("--full-verification", {"full_verification": True}),
        ("--step-timeout 1.5", {"step_timeout": 1.5}),
    ],
)
def test_every_option(text: str, expected: dict[str, Any]) -> None:
    assert parse(*text.split()) == EngineArgs("folder", **expected)


def test_every_field_but_those_that_are_objects_has_an_option() -> None:
    parser = EngineArgs.add_cli_args(argparse.ArgumentParser())
    options = {action.dest for action in parser._actions} - {"help"}
    assert {field.name for field in fields(EngineArgs)} - options == {"bucket_config", "scheduler_config"}


def test_scheduler_fields_keep_their_values() -> None:
    """The vendor's own engine makes True of each that is given."""
    args = EngineArgs("folder", npu_queue_limit=3, spare_blocks_ratio=0.25, prefill_chunk_size=64, is_offline=False)
    assert args.scheduler() == SchedulerConfig(
        npu_queue_limit=3, spare_blocks_ratio=0.25, prefill_chunk_size=64, is_offline=False
    )


def test_what_is_given_beside_a_scheduler_config_replaces_it() -> None:
    config = SchedulerConfig(max_processing_samples=9, prefill_chunk_size=64, enable_prefix_caching=False)
    found = EngineArgs("folder", scheduler_config=config, prefill_chunk_size=32).scheduler()
    assert found == SchedulerConfig(max_processing_samples=9, prefill_chunk_size=32, enable_prefix_caching=False)
    assert EngineArgs("folder").scheduler() == SchedulerConfig()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model": None}, "model must be a path, got None"),
        ({"model": 3}, "model must be a path, got 3"),
        ({"tokenizer": 3}, "tokenizer must be a path or a Tokenizer, got 3"),
        ({"cache_dir": 3}, "cache_dir must be a path, got 3"),
        ({"allow_subset": "yes"}, "allow_subset must be True or False, got 'yes'"),
        ({"mapped": 1}, "mapped must be True or False, got 1"),
        ({"full_verification": "no"}, "full_verification must be True or False, got 'no'"),
        ({"is_offline": 5}, "is_offline must be True or False, got 5"),
        ({"enable_prefix_caching": "x"}, "enable_prefix_caching must be True or False, got 'x'"),
        ({"bucket_config": [1]}, r"bucket_config must be a BucketConfig, got \[1\]"),
        ({"scheduler_config": {}}, "scheduler_config must be a SchedulerConfig, got {}"),
        ({"step_timeout": "1"}, "step_timeout must be a positive number, got '1'"),
        ({"step_timeout": float("nan")}, "step_timeout must be a positive number, got nan"),
        ({"step_timeout": 0}, "step_timeout must be a positive number, got 0"),
        ({"seed": 2**64}, r"seed must be an integer of at least 0 and below 2\*\*64, got 18446744073709551616"),
        ({"seed": "1"}, "seed must be an integer of at least 0 and below .*, got '1'"),
        ({"pipeline_parallel_size": "2"}, "pipeline_parallel_size must be an integer of at least 1, got '2'"),
        ({"workers": True}, "workers must be an integer of at least 1, got True"),
    ],
)
def test_values_of_a_wrong_type_or_out_of_range(values: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        EngineArgs(**{"model": "folder", **values})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"spare_blocks_ratio": "x"}, r"spare_blocks_ratio must be a number of at least 0 and below 1, got 'x'"),
        ({"npu_queue_limit": 0}, "npu_queue_limit must be an integer of at least 1, got 0"),
        ({"max_processing_samples": 1.5}, "max_processing_samples must be an integer of at least 1, got 1.5"),
        ({"prefill_chunk_size": -1}, "prefill_chunk_size must be an integer of at least 1, got -1"),
        ({"spare_blocks_ratio": 1.0}, r"spare_blocks_ratio must be a number of at least 0 and below 1, got 1.0"),
        ({"spare_blocks_ratio": -0.1}, r"spare_blocks_ratio must be a number of at least 0 and below 1, got -0.1"),
    ],
)
def test_scheduler_values_out_of_range(values: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        SchedulerConfig(**values)
    with pytest.raises(InputError, match=message):
        EngineArgs("folder", **values)
