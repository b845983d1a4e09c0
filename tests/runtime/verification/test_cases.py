"""The lengths of comparisons, and the inputs of their steps."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from furiosa_llm.runtime.artifact.errors import ArtifactError
from furiosa_llm.runtime.artifact.manifest import Manifest
from furiosa_llm.runtime.artifact.reader import open_artifact
from furiosa_llm.runtime.errors import ExecutionError, StepTimeoutError
from furiosa_llm.runtime.verification.cases import (
    Inputs,
    Lengths,
    cases_of,
    configured_sizes,
    lengths_of,
    steps_of,
    within_limit,
)
from tests.support.artifacts import artifact_of

Arrays = Mapping[str, np.ndarray[Any, Any]]


@pytest.fixture(scope="module")
def manifest() -> Manifest:
    """A decoder's, of 512 tokens at most."""
    return open_artifact(artifact_of("tiny-llama-genai-fp32")).manifest


def test_every_octave_has_a_step_of_each_kind_and_the_limit_too(manifest: Manifest) -> None:
    lengths = lengths_of(manifest)
    assert lengths == Lengths(limit=512, past=512, new=512)
    seen: dict[str, set[int]] = {}
    for seed in range(50):
        cases = cases_of(manifest, lengths, np.random.default_rng(seed))
        for kind in ("prefill", "decode", "chunk"):
            found = [case.length for case in cases if case.kind == kind]
            octaves = [sum(2**power <= length < 2 ** (power + 1) for length in found) for power in range(4, 9)]
            assert octaves == [1, 1, 1, 1, 1]
            assert found[-1] == 512
            seen.setdefault(kind, set()).update(found)
    assert all(len(found) > 100 for found in seen.values())  # not the same ones each time


def test_long_sequences_cost_no_more_than_they_may(manifest: Manifest) -> None:
    model = dataclasses.replace(manifest.model, max_sequence_length=10**6)
    large = tuple(dataclasses.replace(entry, shape=(10**9,)) for entry in manifest.initializers)
    found = lengths_of(dataclasses.replace(manifest, model=model, initializers=large))
    assert found.new == 64
    assert 512 < found.past < 10**6
    assert lengths_of(dataclasses.replace(manifest, model=model), 10**5).past == 10**5
    assert lengths_of(manifest, 20) == Lengths(limit=512, past=20, new=20)
    unlimited = dataclasses.replace(manifest.model, max_sequence_length=None)
    assert lengths_of(dataclasses.replace(manifest, model=unlimited)).past == 1024


@pytest.mark.parametrize("longest", [1, 2, 3, 7, 8, 15, 16, 17])
def test_short_models(longest: int, manifest: Manifest) -> None:
    lengths = Lengths(limit=longest, past=longest, new=longest)
    cases = cases_of(manifest, lengths, np.random.default_rng(0))
    assert all(case.length <= longest and case.sequence >= 1 for case in cases)
    assert {case.kind for case in cases} == {"prefill", "decode", "chunk"} - (
        {"prefill", "decode", "chunk"}
        if longest < 9
        else {"decode", "chunk"}
        if longest < 10
        else {"chunk"}
        if longest < 12
        else set()
    )


class Echo:
    """A model whose states are their positions' numbers, with positions up to `limit`, `most` of them in a step."""

    def __init__(self, manifest: Manifest, limit: int = 10**9, most: int = 10**9) -> None:
        self._manifest = manifest
        self._limit = limit
        self._most = most

    def run(self, inputs: Arrays) -> dict[str, np.ndarray[Any, Any]]:
        total = inputs["attention_mask"].shape[1]
        if total > self._limit or inputs["input_ids"].shape[1] > self._most:
            raise ExecutionError("past the table")
        batch = inputs["input_ids"].shape[0]
        rows = np.broadcast_to(np.arange(total, dtype=np.float32)[None, None, :, None], (batch, 4, total, 16))
        return {state.output: rows for state in self._manifest.states}


def test_a_long_past_begins_as_a_real_one_and_repeats_no_first_position(manifest: Manifest) -> None:
    inputs = Inputs(Echo(manifest), manifest, {}, np.random.default_rng(0))
    case = next(
        case
        for case in cases_of(manifest, lengths_of(manifest), np.random.default_rng(0))
        if case.kind == "decode" and case.past > 100
    )
    step = inputs.step(case)
    past = step.inputs[manifest.states[0].input]
    assert past.shape[2] == case.past
    assert past[0, 0, :16, 0].tolist() == list(range(16))
    assert 0 not in past[0, 0, 16:, 0]
    assert len(set(past[0, 0, 16:, 0])) == 15


@pytest.mark.parametrize("table", [1, 77, 500, 1024])
def test_a_table_of_positions_is_a_limit(table: int, manifest: Manifest) -> None:
    model = dataclasses.replace(manifest.model, max_sequence_length=None)
    unlimited = dataclasses.replace(manifest, model=model)
    inputs = Inputs(Echo(unlimited, table), unlimited, {}, np.random.default_rng(0))
    found = within_limit(inputs, lengths_of(unlimited))
    assert found.past == table
    assert found.limit == (table if table < 1024 else None)


def test_a_step_takes_as_many_new_tokens_as_the_exporter_left(manifest: Manifest) -> None:
    """One that pads to a chunk of 64 while it traces leaves a graph for no more."""
    model = dataclasses.replace(manifest.model, max_sequence_length=None)
    unlimited = dataclasses.replace(manifest, model=model)
    inputs = Inputs(Echo(unlimited, most=64), unlimited, {}, np.random.default_rng(0))
    assert within_limit(inputs, lengths_of(unlimited)) == Lengths(limit=None, past=1024, new=64)


def test_what_takes_too_long_is_tried_once(manifest: Manifest) -> None:
    """It is no reason to look for a shorter length, or for a batch of one: each would take as long again."""
    asked = 0

    class Slow:
        def run(self, _: Arrays) -> dict[str, np.ndarray[Any, Any]]:
            nonlocal asked
            asked += 1
            raise StepTimeoutError("late")

    model = dataclasses.replace(manifest.model, max_sequence_length=None)
    unlimited = dataclasses.replace(manifest, model=model)
    inputs = Inputs(Slow(), unlimited, {}, np.random.default_rng(0))
    lengths = lengths_of(unlimited)
    with pytest.raises(StepTimeoutError):
        within_limit(inputs, lengths)
    with pytest.raises(StepTimeoutError):
        next(steps_of(inputs, cases_of(unlimited, lengths, np.random.default_rng(0))))
    assert asked == 2


@pytest.mark.parametrize(
    ("size", "found"), [(224, {"height": 224, "width": 224}), (10**9, {}), (-1, {}), (0, {}), ("x", {}), (True, {})]
)
def test_sizes_of_images_are_those_of_images(size: object, found: dict[str, int], tmp_path: Path) -> None:
    """A configuration is no reason to make inputs of a terabyte."""
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"image_size": size}))
    assert configured_sizes(path) == found


def test_a_deep_configuration_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text("[" * 100_000 + "]" * 100_000)
    with pytest.raises(ArtifactError, match=r"config\.json is not JSON"):
        configured_sizes(path)
