"""`vllm bench serve`: the file of vLLM's wheel that is the client, on each of its backends for texts.

The rest of vLLM needs torch and a GPU's libraries: what the client imports of it stands below, without them. The
requests are made here instead of by its data sets, which are most of those imports.
"""

# /// script
# requires-python = ">=3.11"
# dependencies = ["aiohttp==3.14.0", "numpy", "pandas", "regex", "tqdm", "transformers"]
# [tool.folders]
# "vllm==0.33.0" = "vllm/benchmarks"
# ///

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import sys
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from tests.clients.client import Server, run

_REQUESTS = 12
_LENGTHS = (
    *("custom_output_len", "hf_output_len", "prefix_repetition_output_len", "random_input_len", "random_output_len"),
    *("sharegpt_output_len", "spec_bench_output_len"),
)


@dataclass
class SampleRequest:
    """vLLM's, without types of its own."""

    prompt: Any
    prompt_len: int
    expected_output_len: int = 0
    multi_modal_data: Any = None
    lora_request: Any = None
    request_id: str | None = None
    timestamp: float | None = None
    chat_messages: Any = None
    request_overrides: Any = None


def samples(args: argparse.Namespace, tokenizer: Any) -> list[SampleRequest]:
    texts = ["How is the weather in Seoul?", "Once upon a time there was", "Name a river."] * (_REQUESTS // 3)
    return [
        SampleRequest(text, len(tokenizer(text).input_ids), 10, request_id=f"{number}")
        for number, text in enumerate(texts)
    ]


def module(name: str, **content: Any) -> None:
    made = types.ModuleType(name)
    vars(made).update(content)
    sys.modules[name] = made


def stand_in() -> None:
    """What `vllm.benchmarks.serve` imports of the rest of vLLM."""

    def add_dataset_parser(parser: argparse.ArgumentParser) -> None:
        parser.set_defaults(seed=0, num_prompts=_REQUESTS, dataset_name="custom", dataset_path=None)
        parser.set_defaults(trust_remote_code=False, **dict.fromkeys(_LENGTHS))

    module("vllm", __path__=[str(Path(sys.prefix) / "folders" / "vllm")])
    module(
        "vllm.benchmarks.datasets",
        SampleRequest=SampleRequest,
        add_dataset_parser=add_dataset_parser,
        get_samples=samples,
    )
    module("vllm.logger", init_logger=logging.getLogger)
    module("vllm.tokenizers", TokenizerLike=Any, get_tokenizer=lambda path, **_: AutoTokenizer.from_pretrained(path))
    module("vllm.utils", __path__=[])
    module("vllm.utils.argparse_utils", FlexibleArgumentParser=argparse.ArgumentParser)
    module("vllm.utils.gc_utils", freeze_gc_heap=lambda: None)
    module("vllm.utils.network_utils", join_host_port=lambda host, port: f"{host}:{port}")


def measured(server: Server, backend: str, endpoint: str, *options: str) -> dict[str, Any]:
    """The figures of a run, of which no request failed."""
    from vllm.benchmarks.serve import add_cli_args, main_async

    parser = argparse.ArgumentParser()
    add_cli_args(parser)
    args = ["--backend", backend, "--base-url", server.root, "--endpoint", endpoint, "--model", server.model]
    args += ["--tokenizer", os.environ["TOKENIZER"], "--max-concurrency", "4", "--ignore-eos", "--save-result"]
    args += ["--save-detailed", "--disable-tqdm", "--result-filename", "result.json", "--percentile-metrics"]
    asyncio.run(main_async(parser.parse_args([*args, "ttft,tpot,itl,e2el", *options])))
    found: dict[str, Any] = json.loads(Path("result.json").read_text())
    assert (found["completed"], found.get("failed", 0)) == (_REQUESTS, 0), found.get("errors")
    assert found["total_output_tokens"] == 10 * _REQUESTS
    assert found["mean_ttft_ms"] > 0
    return found


def completions(server: Server) -> None:
    measured(server, "vllm", "/v1/completions", "--logprobs", "1")


def chats(server: Server) -> None:
    measured(server, "openai-chat", "/v1/chat/completions", "--temperature", "0.5", "--top-k", "5")


def others(server: Server) -> None:
    extra = '{"stream_options": {"include_usage": true, "continuous_usage_stats": true}}'
    measured(server, "openai", "/v1/completions", "--extra-body", extra, "--request-rate", "20")


if __name__ == "__main__":
    stand_in()
    run(completions, chats, others)
