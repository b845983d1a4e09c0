"""The scores of accuracy logs that are written by hand."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from furiosa_llm.dataset import Sample
from furiosa_llm.mlperf.errors import RunError
from furiosa_llm.mlperf.scoring import read_answers, score_completions, score_vectors
from furiosa_llm.runtime.tokens.tokenizer import Tokenizer


@pytest.fixture
def tokenizer(zoo: Path) -> Tokenizer:
    return Tokenizer.from_folder(zoo / "tiny-llama-optimum")


def sample(reference: str | None = None, label: str | None = None) -> Sample:
    return Sample(where="here", prompt="a", messages=None, max_tokens=None, reference=reference, label=label)


def tokens(tokenizer: Tokenizer, text: str) -> bytes:
    return np.array(tokenizer.encode(text), np.int64).tobytes()


def vector(*numbers: float) -> bytes:
    return np.array(numbers, np.float32).tobytes()


def test_rouge_is_of_the_text_against_its_reference(tokenizer: Tokenizer) -> None:
    answers = {0: tokens(tokenizer, "the cat sat"), 1: tokens(tokenizer, "one two"), 2: tokens(tokenizer, "ignored")}
    found = score_completions(answers, [sample("the cat sat"), sample("three four"), sample()], tokenizer)
    assert found["rouge1"] == found["rouge2"] == found["rougeL"] == 50.0  # all of the first, none of the second
    assert found["gen_num"] == 3
    assert found["gen_len"] == sum(len(data) // 8 for data in answers.values())


def test_without_references_only_counts_are_given(tokenizer: Tokenizer) -> None:
    assert score_completions({0: tokens(tokenizer, "the")}, [sample()], tokenizer).keys() == {"gen_len", "gen_num"}


def test_a_vector_is_right_if_the_nearest_other_one_has_its_label() -> None:
    answers = {0: vector(1, 0), 1: vector(10, 1), 2: vector(0, 1), 3: vector(-1, 0.1)}
    labels = [sample(label=label) for label in ("a", "a", "b", "b")]
    # 0 and 1 find each other, whatever their lengths; 2 finds 1 or 3, which is nearer by the cosine: 3 is at 0.0995,
    # and 1 is at 0.0995 too but for the last digits; so 3 is moved closer.
    answers[3] = vector(-1, 0.5)
    assert score_vectors(answers, labels)["exact_match"] == 100.0
    assert score_vectors(answers, [sample(label=label) for label in ("a", "b", "a", "b")])["exact_match"] == 0.0


def test_vectors_without_labels_are_only_counted() -> None:
    assert score_vectors({0: vector(1), 1: vector(1)}, [sample(), sample(label="a")]) == {"gen_num": 2.0}


@pytest.mark.parametrize("text", ["[", "{}x", json.dumps([{"qsl_idx": 0}]), json.dumps([{"qsl_idx": 0, "data": "0"}])])
def test_a_log_that_is_none_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "mlperf_log_accuracy.json").write_text(text)
    with pytest.raises(RunError, match=r"mlperf_log_accuracy.json is no accuracy log"):
        read_answers(tmp_path)
