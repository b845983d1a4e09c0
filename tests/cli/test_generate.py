"""`furiosa-llm generate`: any parallelism at load, and the same text."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from furiosa_llm import LLM, SamplingParams
from tests.cli.conftest import Cli


def test_the_text_is_that_of_the_engine(built: Path, cli: Cli) -> None:
    result = cli("generate", built, "--prompt", "hello", "--max-tokens", 8)
    with LLM.load_artifact(built) as llm:
        expected = llm.generate("hello", SamplingParams(temperature=0.0, max_tokens=8))
    text = expected.outputs[0].text.replace("\x18", "\\u0018")  # what could steer a terminal is written out
    assert result.out == f"{text}\n"


@pytest.mark.slow
def test_the_same_text_for_every_parallelism(built: Path, cli: Cli) -> None:
    texts = set()
    for options in (
        (),
        ("--devices", "npu:0", "-dp", 2),
        ("-pp", 2),
        ("-pp", 2, "-dp", 2, "--devices", "npu:0,npu:1"),
        ("--num-blocks-per-pp-stage", "1,1", "--threads", 1, "--mapped"),
        ("--workers", 2),
        ("--devices", "npu:0,npu:1,npu:2", "-pp", 2, "-dp", 2, "--allow-subset"),
    ):
        result = cli("generate", built, "--prompt", "hello", "--max-tokens", 8, *options)
        assert result.code == 0, result.err
        assert "8 tokens" in result.err
        texts.add(result.out)
    assert len(texts) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--devices", "npu:0", "-dp", 4), "4 x 1 x 4 = 16, but npu:0 has 8 PEs"),
        (("--devices", "npu1"), "Invalid device string"),
        (("--devices", "npu:0,npu:0:1"), "npu:0:1 is given twice, by 'npu:0' and 'npu:0:1'"),
        (("--num-blocks-per-pp-stage", "1,2"), "has 3 blocks in all, but the artifact has 2"),
        (("-tp", 8), "is split for tp=4; leave it out, or make the other artifact: furiosa-llm reshard -tp 8"),
        (("--workers", 5), "workers must be between 1 and the 4 PEs of a stage, got 5"),
        (("-pp", 40), "pp=40, but the artifact has"),
        (("-pp", 2, "--num-blocks-per-pp-stage", "1,1"), "Only one of `pipeline_parallel_size` or"),
        (("--workers", 2, "--threads", 1), "workers=2 and threads=1 exclude each other"),
    ],
)
def test_what_does_not_go_together(
    built: Path, refused: Callable[..., str], options: tuple[object, ...], message: str
) -> None:
    assert message in refused("generate", built, "--prompt", "hello", *options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--prompt", ""), "the prompt has no tokens; give a prompt that is not empty"),
        (("--prompt", "\udcff"), "expected text of Unicode characters only"),
        (("--prompt", "a " * 600), "This model's maximum input context length is 511 tokens"),
        (("--max-tokens", 512), "This model's maximum context length is 512 tokens"),
        (("--max-tokens", 0), "max_tokens must be at least 1, got 0"),
        (("--temperature", "nan"), "temperature must be non-negative, got nan"),
        (("--temperature", -1), "temperature must be non-negative, got -1.0"),
        (("--top-p", 2), "top_p must be in [0, 1], got 2.0"),
        (("--top-k", -2), "top_k must be -1 or 0 (disable), or at least 1, got -2"),
        (("--seed", -1), "seed must be non-negative, got -1"),
    ],
)
def test_what_cannot_be_generated(
    built: Path, refused: Callable[..., str], options: tuple[object, ...], message: str
) -> None:
    error = refused("generate", built, "--prompt", "hello", *options)
    assert message in error
    assert len(error) < 400
