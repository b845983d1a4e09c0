"""The steps that an artifact and its model are compared on: their lengths, and random inputs for them.

A fault may show at some lengths only. So in addition to a few short steps there is a step of each kind in every octave
up to the longest sequence, at a length drawn from the octave, and one that ends at the longest length itself.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np

from furiosa_llm.runtime.artifact.adapters.graph import RANK
from furiosa_llm.runtime.artifact.dimensions import known_sizes, parse_dimension, shape_of
from furiosa_llm.runtime.artifact.dtypes import DTYPES, Array
from furiosa_llm.runtime.artifact.errors import ArtifactError
from furiosa_llm.runtime.artifact.json_reader import REBUILD
from furiosa_llm.runtime.artifact.manifest import LENGTH_ROLES, InputInfo, Manifest, OutputInfo
from furiosa_llm.runtime.artifact.reader import Companion
from furiosa_llm.runtime.errors import ExecutionError, StepTimeoutError, UnsupportedError
from furiosa_llm.runtime.execution.memory import array_nbytes

_CONFIGURED_SIZES = {"num_channels": "num_channels", "height": "image_size", "width": "image_size"}
_LARGEST_IMAGE = 4096
"""The largest size that is taken from a configuration; a greater one has to be given."""
_ENCODER = "encoder"
_OTHER_SIZES = {_ENCODER: 7, RANK: 5}

_UNLIMITED = 1024
"""The longest sequence for a model without a limit."""
_FIRST_OCTAVE = 16
_LONGEST_CHUNK = 64
_STEP_OPERATIONS = 4e10
"""Multiplications and additions with weights that one step may take: a second on two cores."""
_STEP_NBYTES = 2**26
"""Bytes that the states, or the outputs for the new tokens, of one step may take."""
_LEAST = 64
"""At least this many tokens are compared, whatever they cost."""


class Model(Protocol):
    """Anything that runs on tensors: an executor, or the unsplit model."""

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """The outputs by name, for global inputs by name."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """The sizes of a step."""

    kind: str
    batch: int
    sequence: int
    past: int
    drawn: bool = False
    """Whether its past is a short prefill's, extended by random rows of it; else it is a prefill's."""

    @property
    def length(self) -> int:
        """The tokens of a sequence at the step's end."""
        return self.past + self.sequence

    def __str__(self) -> str:
        behind = f" behind {self.past}" if self.past else ""
        return f"{self.kind} {self.batch}x{self.sequence}{behind}"


@dataclass(frozen=True, slots=True, kw_only=True)
class ComparedStep:
    """A step with its inputs and the outputs that are expected for them."""

    case: Case
    sizes: Mapping[str, int]
    """The size of each dimension, by its name."""
    inputs: Mapping[str, Array]
    """The global inputs, by name."""
    expected: Mapping[str, Array]
    """The unsplit model's outputs, by name."""


_SHORT = (
    Case(kind="prefill", batch=2, sequence=9, past=0),
    Case(kind="decode", batch=2, sequence=1, past=9),
    Case(kind="chunk", batch=3, sequence=5, past=7),
)
_FORWARD = Case(kind="forward", batch=2, sequence=9, past=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Lengths:
    """How long the sequences and steps are that a model is compared on."""

    limit: int | None
    """The model's own limit; None if it has none."""
    past: int
    """The tokens of a sequence in all."""
    new: int
    """The new tokens of one step."""


def lengths_of(manifest: Manifest, most: int | None = None) -> Lengths:
    """The lengths that are affordable, or `most` tokens in all: new tokens cost products, past tokens cost memory."""
    limit = manifest.model.max_sequence_length
    longest = min(limit or _UNLIMITED, most or sys.maxsize)
    weights = sum(math.prod(entry.shape) for entry in manifest.initializers if entry.stored)
    states = sum(_token_nbytes(info) for info in manifest.inputs if info.role == "state")
    outputs = sum(_token_nbytes(info) for info in manifest.outputs if info.role != "state")
    new = min(_STEP_OPERATIONS / (2 * weights or 1), _STEP_NBYTES / (outputs or 1))
    return Lengths(
        limit=limit,
        past=min(longest, most or max(_LEAST, _STEP_NBYTES // (states or 1))),
        new=min(longest, max(_LEAST, int(new))),
    )


def _token_nbytes(info: InputInfo | OutputInfo) -> int:
    """The bytes of one token of one sequence."""
    return array_nbytes(info.dtype, tuple(size if isinstance(size, int) else 1 for size in info.shape))


def cases_of(manifest: Manifest, lengths: Lengths, random: np.random.Generator) -> list[Case]:
    """The steps that the model of `manifest` is compared on.

    For a decoder they are prefills, decode steps and chunks after a past; for another model they are whole runs.
    """
    if not manifest.states:
        whole = [length for length in _drawn(lengths.new, random) if _has_sequence(manifest)]
        return [_FORWARD, *(Case(kind="forward", batch=1, sequence=length, past=0) for length in whole)]
    cases = [case for case in _SHORT if case.length <= lengths.past]
    for length in _drawn(lengths.new, random):
        cases.append(Case(kind="prefill", batch=1, sequence=length, past=0))
    for length in _drawn(lengths.past, random):
        batch = 2 if 2 * length <= lengths.past else 1
        cases.append(Case(kind="decode", batch=batch, sequence=1, past=length - 1, drawn=True))
        chunk = int(random.integers(2, min(_LONGEST_CHUNK, lengths.new, length - 1) + 1))
        cases.append(Case(kind="chunk", batch=1, sequence=chunk, past=length - chunk, drawn=True))
    return cases


def _drawn(longest: int, random: np.random.Generator) -> Iterator[int]:
    """A length of every octave below `longest`, which comes last."""
    start = _FIRST_OCTAVE
    while start < longest:
        yield int(random.integers(start, min(2 * start, longest)))
        start *= 2
    if longest >= _FIRST_OCTAVE:
        yield longest


def _has_sequence(manifest: Manifest) -> bool:
    dims = (dim for info in manifest.inputs for dim in info.shape if isinstance(dim, str))
    return any("sequence" in parse_dimension(dim).names for dim in dims)


def steps_of(inputs: Inputs, cases: list[Case]) -> Iterator[ComparedStep]:
    """Each of `cases` with inputs, run on the reference; a step is made when the caller asks for it.

    Raises UnsupportedError for a dimension without a size, and ExecutionError if the reference fails.
    """
    for case in cases:
        try:
            step = inputs.step(case)
        except StepTimeoutError:
            raise
        except ExecutionError:
            if case.batch == 1:
                raise
            # GroupQueryAttention takes several tokens after a past only in a batch of one.
            step = inputs.step(replace(case, batch=1))
        yield step


def within_limit(inputs: Inputs, lengths: Lengths) -> Lengths:
    """`lengths`, shortened to what the reference runs, if it declares no limit.

    A model may have a table of positions, or an exporter may have fixed how many new tokens a step has at most.
    """
    if lengths.limit is not None:
        return lengths
    past = _most(inputs.runs, lengths.past)
    limit = past if past < lengths.past else None
    return Lengths(limit=limit, past=past, new=_most(inputs.prefills, min(lengths.new, past)))


def _most(runs: Callable[[int], bool], longest: int) -> int:
    """The longest length up to `longest` that runs."""
    if runs(longest):
        return longest
    good, bad = 1, longest
    while bad - good > 1:
        middle = (good + bad) // 2
        good, bad = (middle, bad) if runs(middle) else (good, middle)
    return good


def configured_sizes(path: Companion | Path | None) -> dict[str, int]:
    """Sizes of dimensions other than batch and sequence: an image's sizes are in the config.json at `path`, if any."""
    if path is None:
        return {}
    try:
        config = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{path} is not JSON: {error}; {REBUILD}") from error
    found = {dim: config.get(key) for dim, key in _CONFIGURED_SIZES.items()} if isinstance(config, dict) else {}
    return {dim: size for dim, size in found.items() if type(size) is int and 0 < size <= _LARGEST_IMAGE}


class Inputs:
    """Makes steps, with random inputs that `random` draws, and runs them on the reference.

    `sizes` are the sizes of dynamic dimensions other than batch, sequence and past.
    """

    def __init__(
        self, reference: Model, manifest: Manifest, sizes: Mapping[str, int], random: np.random.Generator
    ) -> None:
        self._reference = reference
        self._manifest = manifest
        self._sizes = {**_OTHER_SIZES, **sizes}
        self._varies = _ENCODER not in sizes
        self._random = random
        self._presents: dict[str, Array] = {}
        self._made = {state.input for state in manifest.states}

    def step(self, case: Case) -> ComparedStep:
        """The step of a case; raises ExecutionError if the reference cannot run it."""
        sizes = {**self._sizes, "batch": case.batch, "sequence": case.sequence, "past": case.past}
        if self._varies and case.length >= _FIRST_OCTAVE:
            sizes[_ENCODER] = int(self._random.integers(2, case.length))
        inputs = self._random_inputs(sizes)
        if case.drawn:
            inputs |= {name: self._extended(rows, inputs[name].shape) for name, rows in self._short().items()}
        elif case.past:
            inputs |= self._after({**sizes, "past": 0, "sequence": case.past})
        return ComparedStep(case=case, sizes=sizes, inputs=inputs, expected=self._reference.run(inputs))

    def runs(self, length: int) -> bool:
        """Whether the reference runs at a length: a decoder in a step of one token."""
        decode = Case(kind="decode", batch=1, sequence=1, past=length - 1, drawn=True)
        return self._runs(decode) if self._manifest.states else self.prefills(length)

    def prefills(self, length: int) -> bool:
        """Whether the reference takes so many new tokens at once."""
        return self._runs(Case(kind="prefill", batch=1, sequence=length, past=0))

    def _runs(self, case: Case) -> bool:
        try:
            self.step(case)
        except StepTimeoutError:
            raise
        except ExecutionError:
            return False
        return True

    def _short(self) -> Mapping[str, Array]:
        """The states after a short prefill, made once."""
        if not self._presents:
            self._presents = self._after({**self._sizes, "batch": 2, "past": 0, "sequence": _FIRST_OCTAVE})
        return self._presents

    def _after(self, sizes: Mapping[str, int]) -> dict[str, Array]:
        presents = self._reference.run(self._random_inputs(sizes))
        return {state.input: presents[state.output] for state in self._manifest.states}

    def _extended(self, rows: Array, shape: tuple[int, ...]) -> Array:
        """An array of `shape` that begins with `rows` and continues with random rows of these, along every dimension.

        The first row is never drawn again: models attend to it from every position when nothing else fits.
        """
        for dim, size in enumerate(shape):
            known = rows.shape[dim]
            if known != size:
                more = self._random.integers(min(1, known - 1), known, max(0, size - known))
                rows = rows.take(np.concatenate([np.arange(min(known, size)), more]), axis=dim)
        return rows

    def _random_inputs(self, sizes: Mapping[str, int]) -> dict[str, Array]:
        complete = known_sizes(sizes)
        return {info.name: self._random_input(info, complete) for info in self._manifest.inputs}

    def _random_input(self, info: InputInfo, sizes: Mapping[str, int]) -> Array:
        names = {name for dim in info.shape if isinstance(dim, str) for name in parse_dimension(dim).names}
        missing = sorted(names - sizes.keys())
        if missing:
            raise UnsupportedError(
                f"input {info.name!r:.80} has the dynamic dimensions {missing}; give their sizes, with "
                f"--dim {missing[0]}=SIZE (sizes=)"
            )
        shape = shape_of(info.shape, sizes)
        dtype = np.dtype(DTYPES[info.dtype].numpy)
        if info.name in self._made:
            return np.zeros(shape, dtype=dtype)
        if info.role == "token_ids":
            return self._random.integers(0, self._manifest.model.vocab_size or 2, shape).astype(dtype)
        if info.role == "attention_mask":
            return np.ones(shape, dtype=dtype)
        if info.role == "position_ids":
            axis = info.shape.index("sequence") if "sequence" in info.shape else len(shape) - 1
            positions = sizes["past"] + np.arange(shape[axis] if shape else 1)
            behind = [1] * (len(shape) - 1 - axis)
            return np.broadcast_to(positions.reshape(-1, *behind) if shape else positions[0], shape).astype(dtype)
        if info.role in LENGTH_ROLES:
            return np.full(shape, sizes[LENGTH_ROLES[info.role]], dtype=dtype)
        if dtype.kind in "iub":
            return self._random.integers(0, 2, shape).astype(dtype)
        return self._random.standard_normal(shape).astype(dtype)
