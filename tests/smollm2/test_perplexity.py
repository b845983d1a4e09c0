"""Perplexity: of known distributions, of a small exported model, and of shapes that do not belong together."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from fixtures.perplexity import NUM_TOKENS, excerpt_tokens, main, perplexity


def test_perplexity_of_known_distributions() -> None:
    tokens = np.array([[0, 1, 2, 3]])
    assert perplexity(np.zeros((1, 4, 8), dtype=np.float32), tokens) == pytest.approx(8)
    certain = np.full((1, 4, 8), -1000.0, dtype=np.float32)
    certain[0, np.arange(3), tokens[0, 1:]] = 1000.0
    assert perplexity(certain, tokens) == pytest.approx(1)
    halved = np.where(np.arange(8) < 4, 5.0, 5.0 - math.log(3)).astype(np.float32)
    assert perplexity(np.broadcast_to(halved, (1, 4, 8)), tokens) == pytest.approx(4 + 4 / 3)


def test_perplexity_refuses_shapes_that_do_not_match() -> None:
    with pytest.raises(ValueError, match=r"logits \[1, 4, 8\] and token ids \[1, 5\] do not match"):
        perplexity(np.zeros((1, 4, 8), dtype=np.float32), np.zeros((1, 5), dtype=np.int64))


def test_command_line_on_an_exported_model(zoo: Path) -> None:
    result = CliRunner().invoke(main, [str(zoo / "tiny-llama-genai-fp32")])
    assert result.exit_code == 0, result.output
    # Random weights know nothing: worse than guessing evenly among the 1024 tokens.
    assert 1024 < float(result.output) < 1e6


def test_excerpt_is_cut_to_length_or_refused(zoo: Path) -> None:
    tokenizer = zoo / "tiny-llama-genai-fp32" / "tokenizer.json"
    assert excerpt_tokens(tokenizer).shape == (1, NUM_TOKENS)
    with pytest.raises(ValueError, match=r"has \d+ tokens under .*, 100000 were asked for; ask for fewer"):
        excerpt_tokens(tokenizer, 100_000)
