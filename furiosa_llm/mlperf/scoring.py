"""Scores an accuracy run: ROUGE of completions against references, and labels of encoders' nearest texts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from rouge_score.rouge_scorer import RougeScorer

from furiosa_llm.dataset import Sample
from furiosa_llm.mlperf.errors import RunError
from furiosa_llm.runtime.tokens.tokenizer import Tokenizer

ACCURACY_LOG = "mlperf_log_accuracy.json"
_ROUGE = ("rouge1", "rouge2", "rougeL")

Scores = dict[str, float]


def read_answers(folder: Path) -> dict[int, bytes]:
    """The bytes that each sample was answered with; raises RunError if the log in `folder` is no log."""
    path = folder / ACCURACY_LOG
    try:
        entries = json.loads(path.read_text("utf-8"))
        return {int(entry["qsl_idx"]): bytes.fromhex(entry["data"]) for entry in entries}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(f"{path} is no accuracy log of LoadGen's: {error}; run the accuracy mode again") from error


def score_completions(answers: dict[int, bytes], samples: Sequence[Sample], tokenizer: Tokenizer | None) -> Scores:
    """Mean F-measures of ROUGE in percent, over the samples with a reference, and what was generated."""
    tokens = {index: np.frombuffer(data, np.int64).tolist() for index, data in answers.items()}
    counts: Scores = {"gen_len": float(sum(map(len, tokens.values()))), "gen_num": float(len(tokens))}
    compared = [(index, text) for index, sample in enumerate(samples) if (text := sample.reference) and index in tokens]
    if not compared or tokenizer is None:
        return counts
    scorer = RougeScorer(list(_ROUGE), use_stemmer=True)
    scores = [scorer.score(text, tokenizer.decode(tokens[index])) for index, text in compared]
    means = {name: 100.0 * float(np.mean([score[name].fmeasure for score in scores])) for name in _ROUGE}
    return {**means, **counts}


def score_vectors(answers: dict[int, bytes], samples: Sequence[Sample]) -> Scores:
    """In percent, how many of the labelled texts have the label of the nearest other one (by cosine)."""
    labelled = [(index, label) for index, sample in enumerate(samples) if (label := sample.label) and index in answers]
    counts: Scores = {"gen_num": float(len(answers))}
    if len(labelled) < 2:
        return counts
    vectors: npt.NDArray[np.float32] = np.stack([np.frombuffer(answers[index], np.float32) for index, _ in labelled])
    vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), np.finfo(np.float32).tiny)
    closeness = vectors @ vectors.T
    np.fill_diagonal(closeness, -np.inf)
    labels = [label for _, label in labelled]
    same = [labels[nearest] == label for nearest, label in zip(closeness.argmax(axis=1), labels, strict=True)]
    return {"exact_match": 100.0 * float(np.mean(same)), **counts}
