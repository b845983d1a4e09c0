"""Steps the decoder of an encoder-decoder: with a past that its parts hand on, or reading the completion again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np

from furiosa_llm.runtime.artifact.composite_manifest import CompositeManifest, StateLink
from furiosa_llm.runtime.artifact.dimensions import GROWING, shape_of
from furiosa_llm.runtime.artifact.dtypes import DTYPES, Array
from furiosa_llm.runtime.artifact.manifest import InputInfo
from furiosa_llm.runtime.execution.executor import Executor, local_part
from furiosa_llm.runtime.execution.memory import Block, array_nbytes
from furiosa_llm.runtime.execution.ort import Tensor, wrap
from furiosa_llm.runtime.execution.scores import by_position, scores_output


class Steps(Protocol):
    """One completion at a time: `start`, then `step` for each token."""

    def start(self, hidden: Array) -> None:
        """Forgets the last completion; `hidden` [1, encoder, width] is what the encoder gives for the next prompt."""
        ...

    def step(self, token: int) -> Array:
        """The logits `[vocabulary]` after the tokens so far and `token`; the next step may overwrite them."""
        ...


class WholeSteps:
    """A decoder without a past: every step reads all tokens again."""

    def __init__(self, decoder: Executor, composite: CompositeManifest) -> None:
        self._decoder = decoder
        self._hidden_input = composite.hidden.input
        self._tokens: list[int] = []
        self._hidden: Array = np.zeros(0)

    def start(self, hidden: Array) -> None:  # noqa: D102 - see Steps
        self._tokens, self._hidden = [], hidden

    def step(self, token: int) -> Array:  # noqa: D102 - see Steps
        self._tokens.append(token)
        feeds = step_feeds(self._decoder, self._tokens, past=0, hidden=self._hidden, hidden_input=self._hidden_input)
        return last_logits(self._decoder, self._decoder.run(feeds))


class CachedSteps:
    """A decoder with a past. The first step is another program's, whose states this one begins with.

    Every rank keeps its own part of the states. States that grow are copied into new memory by each step, as the
    program is written; states that stay are bound once for a completion.
    """

    def __init__(self, first: Executor, decoder: Executor, composite: CompositeManifest) -> None:
        self._first = first
        self._decoder = decoder
        self._hidden_input = composite.hidden.input
        self._links = composite.states
        self._infos = {info.name: info for info in decoder.artifact.manifest.inputs}
        self._local_shapes = decoder.decoder_interface.state_shapes
        self._grown = {link.output: link for link in self._links if link.output is not None}
        self._bound = decoder.bind(external=frozenset(self._grown), growing=GROWING)
        self._hidden: Array = np.zeros(0)
        self._past = 0

    def start(self, hidden: Array) -> None:  # noqa: D102 - see Steps
        self._hidden, self._past = hidden, 0

    def step(self, token: int) -> Array:  # noqa: D102 - see Steps
        logits = self._later(token) if self._past else self._begin(token)
        self._past += 1
        return logits

    def _begin(self, token: int) -> Array:
        feeds = step_feeds(self._first, [token], past=0, hidden=self._hidden, hidden_input=self._hidden_input)
        found = self._first.run(feeds)
        mesh = self._decoder.mesh
        for link in self._links:
            info, whole = self._infos[link.input], found[link.first]
            for rank in range(mesh.size):
                self._bound.bind_input(rank, link.input, wrap(local_part(whole, info, mesh, rank), info.dtype))
        return last_logits(self._first, found)

    def _later(self, token: int) -> Array:
        sizes = {"batch": 1, "sequence": 1, "past": self._past, "total": self._past + 1}
        sizes["encoder"] = self._hidden.shape[1]
        self._bound.resize(sizes)
        feeds = step_feeds(
            self._decoder, [token], past=self._past, hidden=self._hidden, hidden_input=self._hidden_input
        )
        for name, array in feeds.items():
            self._bound.bind_shared(name, array)
        grown = self._make_room(sizes)
        self._decoder.step(self._bound)
        for (rank, link), tensor in grown.items():
            self._bound.bind_input(rank, link.input, tensor)
        name = scores_output(self._decoder.artifact.manifest.outputs).name
        logits: Array = self._bound.array(0, name).reshape(-1)
        return logits

    def _make_room(self, sizes: Mapping[str, int]) -> dict[tuple[int, StateLink], Tensor]:
        """Memory for the states that a step makes, by rank, bound as its outputs."""
        grown = {}
        behind = {**sizes, "past": sizes["total"]}
        for rank in range(self._decoder.mesh.size):
            for output, link in self._grown.items():
                dtype = self._infos[link.input].dtype
                shape = shape_of(self._local_shapes[link.input], behind)
                tensor = wrap(Block(array_nbytes(dtype, shape)).array(dtype, shape), dtype)
                self._bound.bind_output(rank, output, tensor)
                grown[rank, link] = tensor
        return grown


def step_feeds(
    decoder: Executor, tokens: Sequence[int], *, past: int, hidden: Array, hidden_input: str
) -> dict[str, Array]:
    """The inputs of a decoder other than states, for `tokens` after `past` ones and the encoder's `hidden`."""
    sizes = {"batch": 1, "sequence": len(tokens), "total": past + len(tokens), "encoder": hidden.shape[1]}
    feeds: dict[str, Array] = {}
    for info in decoder.artifact.manifest.inputs:
        if info.name == hidden_input:
            feeds[info.name] = hidden
        elif info.role != "state":
            feeds[info.name] = _step_feed(info, tokens, past, shape_of(info.shape, sizes))
    return feeds


def _step_feed(info: InputInfo, tokens: Sequence[int], past: int, shape: tuple[int, ...]) -> Array:
    values: Array
    if info.role == "attention_mask":
        values = np.ones(shape)
    elif info.role == "position_ids":
        values = np.arange(past, past + len(tokens)).reshape(shape)
    else:
        values = np.array(tokens).reshape(shape)
    return values.astype(DTYPES[info.dtype].numpy)


def last_logits(decoder: Executor, found: Mapping[str, Array]) -> Array:
    """The logits `[vocabulary]` after the last token, of a decoder's outputs for one sequence."""
    info = scores_output(decoder.artifact.manifest.outputs)
    return np.asarray(by_position(info, found[info.name], 1)[0, -1])
