"""What a segment is fed when it is probed: a step's own inputs, what follows from them, and random numbers.

A row and a token have the same values however many there are. What a collective has added up or gathered is random.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from furiosa_llm.runtime.artifact.adapters.inputs import adapter_inputs
from furiosa_llm.runtime.artifact.dimensions import Shape, parse_dimension, shape_of
from furiosa_llm.runtime.artifact.dtypes import DTYPES, Array
from furiosa_llm.runtime.artifact.graphs import following
from furiosa_llm.runtime.artifact.reader import Artifact
from furiosa_llm.runtime.artifact.tools.originals import default_inputs
from furiosa_llm.runtime.execution.decoder import interface_of
from furiosa_llm.runtime.execution.feeds import StepFeeds
from furiosa_llm.runtime.execution.graph_parts import part_of_graph
from furiosa_llm.runtime.program.segments import Program
from furiosa_llm.runtime.program.serving_graph import LAST_POSITIONS, WANTED

MOST_ROWS = 64
"""The most rows of a probe."""
TOKENS = 21
"""The most tokens of a probe."""
PAST = 7
"""Positions that are in the cache before the step that is probed."""
_RANK = 8
"""The rank of the adapter of probes."""
FLOATS = frozenset({"FLOAT", "FLOAT16", "BFLOAT16", "DOUBLE"})
_MOST_TOKENS = 1000
"""Token ids of probes are below this number, and below the size of the vocabulary."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """A step: tokens `first` to `last` - 1 of each of `rows` sequences, behind `PAST` + `first` others."""

    rows: int
    first: int = 0
    last: int = 1

    @property
    def sizes(self) -> dict[str, int]:
        """The sizes of the dynamic dimensions."""
        sequence, past = self.last - self.first, PAST + self.first
        return {"batch": self.rows, "sequence": sequence, "past": past, "total": past + sequence, "wanted": self.rows}


class ProbeFeeds:
    """The inputs of a program's segments in a step."""

    def __init__(self, artifact: Artifact, program: Program) -> None:
        self._artifact = artifact
        self._program = program
        adapters = adapter_inputs(artifact.manifest, artifact.program.graph, default_inputs(artifact))
        random_numbers = np.random.default_rng(0)
        self._adapter = {info.name: adapters.drawn(info, random_numbers, rank=_RANK) for info in adapters.infos}
        self._adapter_sizes = adapters.sizes(self._adapter)
        self._rows = adapters.rows
        others = {*self._adapter, *([] if self._rows is None else [self._rows.name])}
        self._inputs = [
            info for info in artifact.manifest.inputs if info.name in program.inputs and info.name not in others
        ]
        shapes: dict[str, Shape] = dict(interface_of(artifact.manifest).state_shapes)
        waiting = following(program.model.graph.node, sizes=False)
        crossing = {name for step in program.sections if step.segment for name in step.segment.inputs} - {
            *program.inputs
        }
        random = filter(self._is_number, crossing & waiting)
        shapes.update({name: program.types[name].shape or () for name in random})
        self._random = shapes
        derived = sorted(crossing - waiting)
        self._derived = part_of_graph(program.model, artifact, derived) if derived else None
        self._known = {*program.inputs, *shapes, *derived}
        self._steps: dict[Span, dict[str, Array]] = {}
        self._made: dict[tuple[str, int, tuple[int, ...]], Array] = {}
        caches = {state.input for state in artifact.manifest.states}
        self.from_caches = following(program.model.graph.node, caches, sizes=False) - waiting
        """Values that follow from what is in the caches, before any collective."""

    def can_feed(self, name: str) -> bool:
        """Whether the value can be made."""
        return name in self._known

    def of(self, span: Span, names: Sequence[str]) -> dict[str, Array]:
        """The values `names` of the program in a step."""
        if span not in self._steps:
            self._steps[span] = self._step(span)
        step = self._steps[span]
        return {name: step[name] if name in step else self._numbers(name, span) for name in names}

    def _is_number(self, name: str) -> bool:
        kind = self._program.types[name]
        dims = [dim for dim in kind.shape or () if isinstance(dim, str)]
        known = all(self._sizes(Span(rows=1)).keys() >= set(parse_dimension(dim).names) for dim in dims)
        return kind.dtype in FLOATS and kind.shape is not None and known

    def _sizes(self, span: Span) -> dict[str, int]:
        return span.sizes | self._adapter_sizes

    def _step(self, span: Span) -> dict[str, Array]:
        """The program's own inputs but for caches, and what follows from them."""
        vocabulary = self._artifact.manifest.model.vocab_size or 2
        tokens = np.random.default_rng(0).integers(0, min(vocabulary, _MOST_TOKENS), (TOKENS, MOST_ROWS)).T
        token_ids = tokens[: span.rows, span.first : span.last]
        values = dict(StepFeeds(self._inputs).update(token_ids, [PAST + span.first] * span.rows))
        values.update(self._adapter)
        if self._rows is not None:
            shape = shape_of(self._rows.shape, self._sizes(span))
            values[self._rows.name] = np.ones(shape, dtype=DTYPES[self._rows.dtype].numpy)
        positions = span.last - span.first
        values[WANTED] = np.arange(span.rows) * positions + positions - 1
        values[LAST_POSITIONS] = np.full(span.rows, PAST + span.last - 1, dtype=np.int32)
        if self._derived is not None:
            caches = {name: self._numbers(name, span) for name in self._derived.inputs if name not in values}
            values.update(self._derived.run(values | caches))
        return values

    def _numbers(self, name: str, span: Span) -> Array:
        """Random numbers of the value's shape, in which each row and each token has its own."""
        shape = self._random[name]
        one, two = (shape_of(shape, self._sizes(replace(span, rows=count))) for count in (1, 2))
        dim = next((dim for dim, (a, b) in enumerate(zip(one, two, strict=True)) if a != b), None)
        if dim is None and span.rows > 1:
            span = replace(span, rows=1)
        most = shape_of(shape, self._sizes(Span(rows=1, last=TOKENS)))
        if span.last == 1:
            rows = self._whole(name, MOST_ROWS, one)[: span.rows]
            return np.ascontiguousarray(np.concatenate(list(rows), axis=dim or 0))
        # Tokens are along the dimension that is longer in the longest step; caches, which are not, begin at 0.
        whole = self._whole(name, 1, tuple(map(max, one, most)))[0]
        places = [slice(span.first, span.first + n) if n < m else slice(n) for n, m in zip(one, most, strict=True)]
        return np.ascontiguousarray(whole[tuple(places)])

    def _whole(self, name: str, rows: int, shape: tuple[int, ...]) -> Array:
        """Random numbers for so many rows of `shape`, always the same."""
        key = (name, rows, shape)
        if key not in self._made:
            dtype = np.dtype(DTYPES[self._program.types[name].dtype].numpy)
            random, size = np.random.default_rng([*name.encode()]), (rows, *shape)
            numbers = random.integers(0, 4, size) if dtype.kind in "iu" else random.standard_normal(size, np.float32)
            self._made[key] = numbers.astype(dtype)
        made: Array = self._made[key]
        return made
