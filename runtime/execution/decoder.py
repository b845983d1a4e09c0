"""Steps a decoder token by token: feeds its inputs by role and keeps its states from step to step.

It runs on anything that can be bound to memory: an artifact's executor, or the unsplit model as reference.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Protocol

from furiosa_llm.runtime.artifact.dimensions import GROWING, Shape, bind_sizes, parse_dimension, shape_of
from furiosa_llm.runtime.artifact.dtypes import Array
from furiosa_llm.runtime.artifact.layout import local_size
from furiosa_llm.runtime.artifact.manifest import InputInfo, Manifest, OutputInfo, State, StateMode
from furiosa_llm.runtime.errors import InputError, UnsupportedError
from furiosa_llm.runtime.execution.feeds import StepFeeds, TokenIds
from furiosa_llm.runtime.execution.ort import Tensor
from furiosa_llm.runtime.execution.scores import by_position, scores_output
from furiosa_llm.runtime.execution.states import StateBuffers, grown_capacity
from furiosa_llm.runtime.program.interruption import Interruption


class Bound(Protocol):
    """A model bound to memory; see `BoundProgram`, whose methods these are."""

    interruption: Interruption

    def bind_shared(self, name: str, array: Array) -> None: ...  # noqa: D102

    def bind_input(self, rank: int, name: str, tensor: Tensor) -> None: ...  # noqa: D102

    def bind_output(self, rank: int, name: str, tensor: Tensor) -> None: ...  # noqa: D102

    def resize(self, sizes: dict[str, int]) -> None: ...  # noqa: D102

    def array(self, rank: int, name: str) -> Array: ...  # noqa: D102

    def run(self) -> None: ...  # noqa: D102


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderInterface:
    """What a decoder takes and gives. `ranks` is 1 for an unsplit model; `state_shapes` are by input name and local."""

    inputs: tuple[InputInfo, ...]
    outputs: tuple[OutputInfo, ...]
    states: tuple[State, ...]
    state_shapes: dict[str, Shape]
    ranks: int


def interface_of(manifest: Manifest) -> DecoderInterface:
    """What a decoder on the artifact's program takes and gives."""
    return DecoderInterface(
        inputs=manifest.inputs,
        outputs=manifest.outputs,
        states=manifest.states,
        state_shapes={
            info.name: tuple(
                size if layout is None else local_size(layout, manifest.mesh)
                for size, layout in zip(info.shape, info.layout, strict=True)
            )
            for info in manifest.inputs
            if info.role == "state"
        },
        ranks=manifest.mesh.size,
    )


class DecoderModel(Protocol):
    """A decoder that sessions can be made on."""

    @property
    def decoder_interface(self) -> DecoderInterface:
        """The model's inputs, outputs and states."""
        ...

    def bind_steps(self, external: frozenset[str]) -> Bound:
        """The model bound to memory of its own, but for the outputs `external`, for steps of growing past."""
        ...

    def step(self, bound: Bound) -> None:
        """Runs `bound` once."""
        ...


@dataclass(slots=True)
class _Lane:
    """The bindings for one kind of step; `generation` says which state buffers are bound."""

    bound: Bound
    feeds: StepFeeds
    generation: int = -1


class DecoderSession:
    """One batch of sequences of equal length in a decoder, with its states.

    `max_length` is the model's limit in tokens, None for none. `others` are inputs that tokens do not make, the same in
    every step. `length` is the number of tokens stepped so far.
    Steps of one token and of several have bindings of their own, so that going from prefill to decode rebinds nothing.
    """

    def __init__(
        self,
        model: DecoderModel,
        *,
        max_length: int | None = None,
        others: Mapping[str, Array] = MappingProxyType({}),
    ) -> None:
        interface = model.decoder_interface
        check_interface(interface)
        self.length = 0
        self.max_length = max_length
        self._model = model
        self._interface = interface
        self._others = others
        given = [info for info in interface.inputs if info.name in others]
        self._other_sizes = bind_sizes((info.name, info.shape, others[info.name].shape) for info in given)
        self._logits = scores_output(interface.outputs)
        self._singly = takes_one_position(interface.inputs)
        self._batch = 0
        self._capacity = 0
        self._wanted_capacity = 0
        self._generation = 0
        self._buffers: list[list[StateBuffers]] = []
        self._lanes: dict[bool, _Lane] = {}

    def reset(self) -> None:
        """Forgets all tokens and keeps the memory."""
        self.length = 0
        for buffers in itertools.chain.from_iterable(self._buffers):
            buffers.rewind()

    def reserve(self, length: int) -> None:
        """Makes room for `length` tokens at once, instead of growing step by step."""
        self._wanted_capacity = length

    def step(self, token_ids: TokenIds) -> Array:
        """Appends `token_ids` [batch, sequence] to the sequences and returns the logits after the last ones.

        These are `[batch, vocabulary]` in memory that the next step overwrites. Raises InputError if the ids are not
        such an array, if the batch changes without `reset`, or if the model's limit is passed.
        """
        total = self._checked_length(token_ids)
        batch, sequence = token_ids.shape
        if sequence > 1 and self._singly:
            for position in range(sequence):
                logits = self.step(token_ids[:, position : position + 1])
            return logits
        if batch != self._batch:
            self._allocate(batch)
        if max(total, self._wanted_capacity) > self._capacity:
            self._grow(max(total, self._wanted_capacity))
        lane = self._lane(single=sequence == 1)
        sizes = {"batch": batch, "sequence": sequence, "past": self.length, "total": total}
        lane.bound.resize(self._other_sizes | sizes)
        for name, array in lane.feeds.update(token_ids, self.length):
            lane.bound.bind_shared(name, array)
        self._bind_states(lane, total)
        self._model.step(lane.bound)
        self.length = total
        return by_position(self._logits, lane.bound.array(0, self._logits.name), batch)[:, -1]

    def _checked_length(self, token_ids: TokenIds) -> int:
        if token_ids.ndim != 2 or token_ids.size == 0 or token_ids.dtype.kind not in "iu":
            found = f"{token_ids.dtype} {list(token_ids.shape)}"
            raise InputError(f"token ids: found {found}, expected integers [batch, sequence], not empty")
        if self.length and token_ids.shape[0] != self._batch:
            raise InputError(f"found {token_ids.shape[0]} sequences in a batch of {self._batch}; reset before changing")
        total = self.length + int(token_ids.shape[1])
        if self.max_length is not None and total > self.max_length:
            raise InputError(f"{total} tokens pass the model's limit of {self.max_length}; reset, or use fewer tokens")
        return total

    def _lane(self, *, single: bool) -> _Lane:
        """The bindings for steps of one token, or of several."""
        if single not in self._lanes:
            outputs = frozenset(state.output for state in self._interface.states)
            feeds = StepFeeds([info for info in self._interface.inputs if info.name not in self._others])
            self._lanes[single] = lane = _Lane(self._model.bind_steps(outputs), feeds)
            for name, array in self._others.items():
                lane.bound.bind_shared(name, array)
        return self._lanes[single]

    def _bind_states(self, lane: _Lane, total: int) -> None:
        """Binds the states for a step that ends at `total` tokens: those in place only when their memory is new."""
        for rank, buffers in (*self._each("append"), *self._each("replace")):
            buffers.extend(self.length, total)
            lane.bound.bind_input(rank, buffers.state.input, buffers.past)
            lane.bound.bind_output(rank, buffers.state.output, buffers.present)
        if lane.generation != self._generation:
            lane.generation = self._generation
            for rank, buffers in self._each("in_place"):
                lane.bound.bind_input(rank, buffers.state.input, buffers.past)
                lane.bound.bind_output(rank, buffers.state.output, buffers.present)

    def _each(self, mode: StateMode) -> Iterator[tuple[int, StateBuffers]]:
        for rank, row in enumerate(self._buffers):
            yield from ((rank, buffers) for buffers in row if buffers.state.mode == mode)

    def _allocate(self, batch: int) -> None:
        """Makes empty state buffers for `batch` sequences."""
        dtypes = {info.name: info.dtype for info in self._interface.inputs}
        sizes = {"batch": batch, "past": 0, "total": 0}
        shapes = {name: shape_of(shape, sizes) for name, shape in self._interface.state_shapes.items()}
        self._buffers = [
            [StateBuffers(state, dtypes[state.input], shapes[state.input]) for state in self._interface.states]
            for _ in range(self._interface.ranks)
        ]
        self._batch, self._capacity = batch, 0

    def _grow(self, length: int) -> None:
        self._capacity = grown_capacity(length, self._capacity)
        self._generation += 1
        for buffers in itertools.chain.from_iterable(self._buffers):
            buffers.reserve(self._capacity, self.length)


def takes_one_position(inputs: Sequence[InputInfo]) -> bool:
    """Whether a step has one new position, no more."""
    return any(info.role == "token_ids" and info.shape[-1] == 1 for info in inputs)


def fixed_batch(inputs: Sequence[InputInfo]) -> int | None:
    """How many sequences every step has, if that is fixed."""
    sizes = [info.shape[0] for info in inputs if info.role == "token_ids"]
    return next((size for size in sizes if isinstance(size, int)), None)


def check_interface(interface: DecoderInterface) -> None:
    """Raises UnsupportedError if the model is no decoder, or has states that cannot be stepped."""
    has_ids = any(info.role == "token_ids" for info in interface.inputs)
    if not has_ids or not any(info.role == "logits" for info in interface.outputs):
        raise UnsupportedError(
            "the model is not a decoder: it has no input for token ids or no output for logits; use `furiosa-llm run`"
        )
    batch = fixed_batch(interface.inputs)
    if batch is not None and batch > 1 and all(state.mode == "in_place" for state in interface.states):
        raise UnsupportedError(f"a batch of {batch} whose caches are written in place; use `furiosa-llm run`")
    paired = {state.input for state in interface.states}
    for state in interface.states:
        places = interface.state_shapes[state.input].count(batch or "batch")
        if not places or (places > 1 and state.batch_dim is None and batch != 1):
            raise UnsupportedError(f"state {state.input!r:.80} is not of a batch of sequences; use `furiosa-llm run`")
    for name, shape in interface.state_shapes.items():
        if name not in paired:
            raise UnsupportedError(f"state {name!r:.80} is not made by the model itself; use `furiosa-llm run`")
        names = {part for dim in shape if isinstance(dim, str) for part in parse_dimension(dim).names}
        if not names <= {"batch", *GROWING}:
            raise UnsupportedError(
                f"state {name!r:.80} has the shape {list(shape)}, which batch, past and total do not give; "
                f"use `furiosa-llm run`"
            )
