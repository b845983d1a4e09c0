"""`furiosa-llm generate`: any parallelism at load, and the same text."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.conftest import Cli


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
        (("-pp", 40), "pp=40, but the artifact has"),
        (("-pp", 2, "--num-blocks-per-pp-stage", "1,1"), "Only one of `pipeline_parallel_size` or"),
        (("--workers", 2, "--threads", 1), "workers=2 and threads=1 exclude each other"),
    ],
)
def test_what_does_not_go_together(
    built: Path, refused: Callable[..., str], options: tuple[object, ...], message: str
) -> None:
    assert message in refused("generate", built, "--prompt", "hello", *options)
