"""Greedy tokens of exporters' small models, however they are run, against the unsplit ones; the rest is a campaign."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from furiosa_llm.runtime.artifact.reader import open_artifact
from tests.campaigns.same_tokens import (
    FACTORS,
    PAIRWISE,
    Answered,
    Setting,
    _table,
    compare,
    every_setting,
    unsplit_answers,
)
from tests.support.artifacts import artifact_of
from tests.support.tiers import tiered

TOKENIZER = "tiny-llama-genai-fp32"
SETTINGS = _table(
    # tp, pp, dp, batch, chunk, preempted, caching, workers
    (4, 1, 1, 16, None, False, True, None),
    (4, 2, 2, 16, 7, True, False, None),
    (4, 2, 1, 1, 7, True, True, None),
    (4, 1, 2, 1, None, False, False, None),
    (4, 1, 1, 16, 7, True, True, None),
)
VOCAB = 1000


@pytest.fixture(
    scope="module",
    params=tiered(
        ["tiny-llama-genai-fp32", "tiny-gemma-optimum", "tiny-mistral-dynamo-tf5"],
        ["tiny-llama-genai-fp32", "tiny-mistral-dynamo-tf5"],
    ),
)
def model(request: pytest.FixtureRequest, zoo: Path) -> tuple[Path, list[Answered]]:
    """An artifact, and what the model it was made of answers."""
    source = zoo / request.param / "model.onnx"
    folder = artifact_of(request.param)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(3, VOCAB, length).tolist() for length in (3, 22, 8, 17, 5, 20)]
    return folder, unsplit_answers(
        folder, source, prompts, 34
    )  # the decoder that the answers come from is not told of windows: one is of 64


@pytest.mark.parametrize("setting", tiered(SETTINGS, SETTINGS[1:3]))
def test_tokens_are_the_unsplit_models(setting: Setting, model: tuple[Path, list[Answered]], zoo: Path) -> None:
    folder, expected = model
    if any(state.mode == "append" for state in open_artifact(folder).manifest.states):
        setting = replace(setting, caching=False)  # a cache that is cut to a window is not used again
    found = compare(folder, setting, expected, tokenizer=zoo / TOKENIZER)
    assert found.problems == []
    assert found.error < 1e-4


def test_a_wrong_token_is_found(model: tuple[Path, list[Answered]], zoo: Path) -> None:
    folder, expected = model
    first = expected[0]
    wrong = Answered(
        prompt=first.prompt,
        token_ids=(*first.token_ids[:9], first.token_ids[9] ^ 1, *first.token_ids[10:]),
        logprobs=first.logprobs,
        gaps=first.gaps,
    )
    found = compare(folder, SETTINGS[3], [wrong], tokenizer=zoo / TOKENIZER)
    assert len(found.problems) == 1
    assert "token 9 behind" in found.problems[0]


def test_the_table_has_every_pair() -> None:
    def pairs(setting: Setting) -> set[tuple[str, object, str, object]]:
        values = [(name, getattr(setting, name)) for name in FACTORS]
        return {(*one, *other) for one, other in itertools.combinations(values, 2)}

    wanted = set().union(*map(pairs, every_setting()))
    assert set().union(*map(pairs, PAIRWISE)) == wanted
    assert all(setting.is_possible for setting in PAIRWISE)
    assert len(list(every_setting())) == 352
