"""A tiny random model: it runs, twice alike, tied or not."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
from click.testing import CliRunner
from rich.console import Console

from fixtures.perplexity import prefill_inputs
from fixtures.synthetic import ensure_synthetic, main
from furiosa_llm.example.llama.config import LlamaConfig
from furiosa_llm.example.llama.onnx_writer import DATA, MODEL

QUIET = Console(quiet=True)
CONFIG = LlamaConfig(
    vocab_size=96,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=64,
    rms_norm_eps=1e-5,
    rope_theta=10000.0,
    tie_word_embeddings=False,
)
_MATRIX_ELEMENTS = 96 * 32


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_tiny_model_runs(tied: bool, tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, tie_word_embeddings=tied)
    folder = ensure_synthetic(config, folder=tmp_path / "model", console=QUIET)
    session = ort.InferenceSession(folder / MODEL, providers=["CPUExecutionProvider"])
    tokens = np.arange(7, dtype=np.int64)[None] % config.vocab_size
    logits, key = session.run(["logits", "present.1.key"], prefill_inputs(folder, session, tokens))
    assert logits.shape == (1, 7, config.vocab_size)
    assert key.shape == (1, 2, 7, 16)
    assert np.isfinite(logits).all()
    assert 0.1 < float(logits.std()) < 10


def test_tied_matrix_is_stored_once(tmp_path: Path) -> None:
    sizes = {}
    for tied in (False, True):
        config = dataclasses.replace(CONFIG, tie_word_embeddings=tied)
        folder = ensure_synthetic(config, folder=tmp_path / str(tied), console=QUIET)
        sizes[tied] = (folder / DATA).stat().st_size
    assert sizes[False] - sizes[True] == _MATRIX_ELEMENTS * 4


def test_seed_decides_the_weights(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    cached = ensure_synthetic(CONFIG, console=QUIET)
    again = ensure_synthetic(CONFIG, folder=tmp_path / "again", console=QUIET)
    other = ensure_synthetic(CONFIG, seed=1, console=QUIET)
    assert cached.is_relative_to(tmp_path / "cache")
    assert other != cached
    assert (again / DATA).read_bytes() == (cached / DATA).read_bytes()
    assert (other / DATA).read_bytes() != (cached / DATA).read_bytes()


def test_command_line_prints_the_folder(tmp_path: Path) -> None:
    sizes = {"hidden": 32, "heads": 2, "kv-heads": 1, "layers": 1, "ffn": 48, "vocab": 96, "max-positions": 64}
    options = [f"--{name}={size}" for name, size in sizes.items()]
    result = CliRunner().invoke(main, [*options, "--out", str(tmp_path / "model")])
    assert result.exit_code == 0, result.output
    assert result.stdout.strip() == str(tmp_path / "model")
    assert (tmp_path / "model" / "genai_config.json").is_file()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--heads=16", "--kv-heads=3"], "16 query heads cannot share 3 key/value heads evenly"),
        (["--head-dim=24"], "head_dim 24: onnxruntime's GroupQueryAttention takes multiples of 16 only"),
        (["--head-dim=15"], "head_dim 15 is odd"),
    ],
    ids=["uneven", "head-of-24", "odd-head"],
)
def test_command_line_refuses_sizes_that_cannot_run(options: list[str], message: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(main, [*options, "--out", str(tmp_path / "model")])
    assert result.exit_code == 1
    assert message in result.output
    assert not (tmp_path / "model").exists()
