"""SmolLM2-135M-Instruct in its three shapes: perplexity, an answer, agreement, tokenizer, and an interrupted build."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
import pytest
from jinja2 import Environment
from rich.console import Console
from tokenizers import Tokenizer

from fixtures.perplexity import TEXT, excerpt_tokens, model_perplexity, prefill_inputs
from furiosa_llm.example.llama import onnx_writer
from furiosa_llm.example.smollm2 import SHAPES, recipe
from furiosa_llm.example.smollm2.recipe import ensure

pytestmark = pytest.mark.real_model

REFERENCE_PERPLEXITY = 16.52
"""transformers in float32 gives 16.523, onnxruntime on two exporters' graphs 16.524."""

QUESTION = "What is the capital of France?"
PROMPT = f"<|im_start|>user\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n"
ANSWER = "The capital of France is Paris."


def _session(folder: Path) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 2
    return ort.InferenceSession(folder / "model.onnx", options, providers=["CPUExecutionProvider"])


def _greedy(folder: Path, prompt: str, max_tokens: int) -> str:
    """The greedy continuation, up to and without the end-of-turn token."""
    session, tokenizer = _session(folder), Tokenizer.from_file(str(folder / "tokenizer.json"))
    end = json.loads((folder / "config.json").read_text())["eos_token_id"]
    names = [output.name for output in session.get_outputs()]
    step = np.array([tokenizer.encode(prompt, add_special_tokens=False).ids])
    inputs = prefill_inputs(folder, session, step)
    generated: list[int] = []
    while len(generated) < max_tokens:
        results = dict(zip(names, session.run(names, inputs), strict=True))
        token = int(results.pop("logits")[0, -1].argmax())
        if token == end:
            break
        generated.append(token)
        inputs = _next_inputs(inputs, token, results)
    return tokenizer.decode(generated)


def _next_inputs(
    inputs: dict[str, npt.NDArray[Any]], token: int, presents: dict[str, npt.NDArray[Any]]
) -> dict[str, npt.NDArray[Any]]:
    length = inputs["attention_mask"].shape[1]
    following: dict[str, npt.NDArray[Any]] = {
        name.replace("present", "past_key_values"): cache for name, cache in presents.items()
    }
    following["input_ids"] = np.array([[token]])
    following["attention_mask"] = np.ones((1, length + 1), dtype=np.int64)
    if "position_ids" in inputs:
        following["position_ids"] = np.array([[length]])
    return following


@pytest.mark.parametrize(
    ("shape", "tolerance"), [("genai-fp32", 0.01), ("optimum-fp32", 0.01), ("int4", 0.3)], ids=SHAPES
)
def test_perplexity_on_the_excerpt(shape: str, tolerance: float) -> None:
    assert model_perplexity(ensure(shape)) == pytest.approx(REFERENCE_PERPLEXITY, abs=tolerance)


@pytest.mark.parametrize("shape", ["genai-fp32", "optimum-fp32"])
def test_greedy_answer(shape: str) -> None:
    assert _greedy(ensure(shape), PROMPT, max_tokens=16) == ANSWER


def test_two_float32_shapes_agree() -> None:
    results = []
    for shape in ("genai-fp32", "optimum-fp32"):
        folder = ensure(shape)
        session, tokens = _session(folder), excerpt_tokens(folder / "tokenizer.json", 64)
        names = ["logits", "present.0.key", "present.29.key", "present.29.value"]
        results.append(session.run(names, prefill_inputs(folder, session, tokens)))
    for genai, optimum in zip(*results, strict=True):
        np.testing.assert_allclose(genai, optimum, rtol=0, atol=1e-4 * float(np.abs(optimum).max()))


@pytest.mark.parametrize(
    "text",
    [
        TEXT.read_text(encoding="utf-8"),
        "1234.5 + x_2 = 2026\t\r\n\n  indented",
        "Grüße, 東京 🙂 — naïve café",
        PROMPT,
    ],
    ids=["novel", "digits", "unicode", "chat"],
)
def test_tokenizer_round_trip(text: str) -> None:
    tokenizer = Tokenizer.from_file(str(ensure("int4") / "tokenizer.json"))
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_tokenizer_splits_digits_and_knows_special_tokens() -> None:
    tokenizer = Tokenizer.from_file(str(ensure("int4") / "tokenizer.json"))
    assert tokenizer.encode("2026").tokens == ["2", "0", "2", "6"]
    assert tokenizer.encode("<|im_start|>user<|im_end|>").ids == [1, 4093, 2]
    assert tokenizer.decode([1, 4093, 2]) == "user"


def test_chat_template_adds_no_system_message() -> None:
    folder = ensure("int4")
    messages = [{"role": "user", "content": QUESTION}]
    shipped, original = (
        Environment(autoescape=False)
        .from_string((folder / name).read_text(encoding="utf-8"))
        .render(messages=messages, add_generation_prompt=True)
        for name in ("chat_template.jinja", "chat_template.original.jinja")
    )
    assert shipped == PROMPT
    assert original.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    assert original.endswith(PROMPT)


def test_interrupted_build_resumes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    ensure("int4")
    (tmp_path / "source").symlink_to(recipe.default_folder() / "source")

    def stop(_folder: Path, _graph: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(recipe, "write_model_files", stop)
    with pytest.raises(KeyboardInterrupt):
        ensure("int4", tmp_path, console=Console(quiet=True))
    assert not (tmp_path / "int4" / onnx_writer.MODEL).exists()

    monkeypatch.undo()
    log = io.StringIO()
    folder = ensure("int4", tmp_path, console=Console(file=log, width=200))
    assert log.getvalue().startswith("int4: graph and weights, ")
    assert "tokenizer" not in log.getvalue()
    assert (folder / onnx_writer.DATA).stat().st_size == (ensure("int4") / onnx_writer.DATA).stat().st_size
