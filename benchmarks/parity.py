"""Tokens and perplexity of SmolLM2 against the unsplit model."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from benchmarks.artifacts import artifact
from benchmarks.bars import Bar
from fixtures.perplexity import excerpt_tokens, perplexity
from furiosa_llm.parity_options import TOLERANCE
from furiosa_llm.runtime.artifact.dtypes import DTYPES
from furiosa_llm.runtime.artifact.reader import Artifact, open_artifact
from furiosa_llm.runtime.execution.executor import Executor
from furiosa_llm.runtime.verification.parity import verify_against

REFERENCE_PERPLEXITY = 16.52
PROMPTS = (
    "The capital of France is",
    "Once upon a time there was a",
    "def fibonacci(n):",
    "The three laws of motion are",
    "Water boils at",
    "In the beginning of the year 1815,",
    "The recipe for pancakes needs",
    "Dear Sir or Madam,",
    "import numpy as np\n",
    "The largest planet of the solar system",
    "1, 1, 2, 3, 5, 8,",
    "She opened the door and",
    "The stock market fell because",
    "Roses are red,",
    "To install the package, run",
    "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n",
)
_TOKENS = 64


def bars() -> Iterator[Bar]:
    """Prompts with different tokens, and the distance of the perplexity."""
    for shape in ("genai-fp32", "optimum-fp32"):
        for size in (4, 8):
            built = artifact(shape, size)
            report = verify_against(built.folder, built.model, prompts=PROMPTS, max_tokens=_TOKENS)
            differing = [c for c in report.tokens if not c.within(TOLERANCE)]
            ties = sum(c.first_difference is not None and c.within(TOLERANCE) for c in report.tokens)
            error = max(c.logit_error for c in report.tokens)
            beside = f"{len(report.tokens)} prompts x {_TOKENS} tokens, {ties} ties, greatest logit error {error:.1e}"
            what = f"{shape} tp {size}: prompts whose greedy tokens differ"
            yield Bar(what=what, figure=len(differing), limit=0, beside=beside)
            worst = max((*report.outputs, *report.engine), key=lambda e: e.mean)
            beside = f"{worst.output} in {worst.case}"
            what = f"{shape} tp {size}: greatest mean error of an output, relative"
            yield Bar(what=what, figure=worst.mean, limit=TOLERANCE, beside=beside)
            found = artifact_perplexity(open_artifact(built.folder, full=False))
            what = f"{shape} tp {size}: perplexity, distance from {REFERENCE_PERPLEXITY}"
            yield Bar(what=what, figure=abs(found - REFERENCE_PERPLEXITY), limit=0.01, beside=f"{found:.4f}")


def artifact_perplexity(artifact_: Artifact) -> float:
    """Perplexity on the shipped excerpt, in one prefill."""
    tokens = excerpt_tokens(artifact_.folder / "tokenizer.json")
    length = tokens.shape[1]
    sizes = {"batch": 1, "sequence": length, "past": 0, "total": length}
    inputs = {}
    for info in artifact_.manifest.inputs:
        shape = tuple(sizes[d] if isinstance(d, str) else d for d in info.shape)
        dtype = DTYPES[info.dtype].numpy
        if info.role == "token_ids":
            inputs[info.name] = tokens
        elif info.role == "position_ids":
            inputs[info.name] = np.arange(length, dtype=np.int64)[None, :]
        elif info.role == "attention_mask":
            inputs[info.name] = np.ones(shape, dtype=dtype)
        else:
            inputs[info.name] = np.zeros(shape, dtype=dtype)
    logits = next(info.name for info in artifact_.manifest.outputs if info.role == "logits")
    with Executor(artifact_) as executor:
        return perplexity(executor.run(inputs)[logits], tokens)
