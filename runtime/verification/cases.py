"""The steps that an artifact and its model are compared on: their sizes, and random inputs for them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from furiosa_llm.runtime.artifact.dimensions import known_sizes, parse_dimension, shape_of
from furiosa_llm.runtime.artifact.dtypes import DTYPES, Array
from furiosa_llm.runtime.artifact.errors import ArtifactError
from furiosa_llm.runtime.artifact.json_reader import REBUILD
from furiosa_llm.runtime.artifact.manifest import LENGTH_ROLES, InputInfo, Manifest
from furiosa_llm.runtime.errors import ExecutionError, UnsupportedError

_CASES = (("prefill", 2, 9, 0), ("decode", 2, 1, 9), ("chunk", 3, 5, 7))
"""Name, batch, sequence and past of the steps that a decoder is compared on."""

_CONFIGURED_SIZES = {"num_channels": "num_channels", "height": "image_size", "width": "image_size"}

_OTHER_SIZES = {"encoder": 7}

_OTHER_CASE = ("forward", 2, 9, 0)


class Model(Protocol):
    """What can be run on tensors: an executor, or the unsplit model."""

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """The outputs by name, for global inputs by name."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One step: its name, its sizes by dimension, global inputs by name, and the unsplit model's outputs for them."""

    name: str
    sizes: Mapping[str, int]
    inputs: Mapping[str, Array]
    expected: Mapping[str, Array]


def steps_of(
    reference: Model, manifest: Manifest, sizes: Mapping[str, int], random: np.random.Generator
) -> Iterator[Step]:
    """The steps that the model of `manifest` is compared on, run on `reference`.

    A decoder's are a prefill, a decode step and a chunk behind a past; another model has one. `sizes` are those of
    dynamic dimensions besides batch, sequence and past; raises UnsupportedError for a dimension without one, and
    ExecutionError if `reference` fails.
    """
    for name, batch, sequence, past in _CASES if manifest.states else (_OTHER_CASE,):
        known = {**sizes, "batch": batch, "sequence": sequence, "past": past}
        inputs = _case_inputs(reference, manifest, known, random)
        try:
            expected = reference.run(inputs)
        except ExecutionError:
            # GroupQueryAttention takes several tokens behind a past in a batch of one only.
            known["batch"] = 1
            inputs = _case_inputs(reference, manifest, known, random)
            expected = reference.run(inputs)
        yield Step(name=name, sizes=known, inputs=inputs, expected=expected)


def configured_sizes(path: Path | None) -> dict[str, int]:
    """Sizes of dimensions besides batch and sequence: those of an image are in the config.json at `path`, if any."""
    if path is None:
        return dict(_OTHER_SIZES)
    try:
        config = json.loads(path.read_bytes())
    except ValueError as error:
        raise ArtifactError(f"{path} is not JSON: {error}; {REBUILD}") from error
    found = {dim: config.get(key) for dim, key in _CONFIGURED_SIZES.items()} if isinstance(config, dict) else {}
    return _OTHER_SIZES | {dim: size for dim, size in found.items() if isinstance(size, int)}


def _case_inputs(
    reference: Model, manifest: Manifest, sizes: Mapping[str, int], random: np.random.Generator
) -> dict[str, Array]:
    """The inputs of a step; the states are those that the reference has after a prefill of the step's past."""
    inputs = _random_inputs(manifest, {**sizes, "past": 0, "sequence": sizes["past"] or sizes["sequence"]}, random)
    if not sizes["past"]:
        return inputs
    presents = reference.run(inputs)
    step = _random_inputs(manifest, sizes, random)
    return step | {state.input: presents[state.output] for state in manifest.states}


def _random_inputs(manifest: Manifest, sizes: Mapping[str, int], random: np.random.Generator) -> dict[str, Array]:
    complete = known_sizes(sizes)
    return {info.name: _random_input(info, manifest, complete, random) for info in manifest.inputs}


def _random_input(info: InputInfo, manifest: Manifest, sizes: Mapping[str, int], random: np.random.Generator) -> Array:
    names = {name for dim in info.shape if isinstance(dim, str) for name in parse_dimension(dim).names}
    missing = sorted(names - sizes.keys())
    if missing:
        raise UnsupportedError(f"input {info.name!r:.80} has the dynamic dimensions {missing}; give their sizes")
    shape = shape_of(info.shape, sizes)
    dtype = np.dtype(DTYPES[info.dtype].numpy)
    if info.role == "state":
        return np.zeros(shape, dtype=dtype)
    if info.role == "token_ids":
        return random.integers(0, manifest.model.vocab_size or 2, shape).astype(dtype)
    if info.role == "attention_mask":
        return np.ones(shape, dtype=dtype)
    if info.role == "position_ids":
        positions = np.arange(sizes["past"], sizes["past"] + sizes["sequence"])
        return np.broadcast_to(positions, shape).astype(dtype)
    if info.role in LENGTH_ROLES:
        return np.full(shape, sizes[LENGTH_ROLES[info.role]], dtype=dtype)
    if dtype.kind in "iub":
        return random.integers(0, 2, shape).astype(dtype)
    return random.standard_normal(shape).astype(dtype)
