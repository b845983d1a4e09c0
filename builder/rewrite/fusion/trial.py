"""Prove a replacement on numbers: run it and the original on the same random queries, caches and masks."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import onnxruntime as ort
from onnxruntime.capi import onnxruntime_pybind11_state as ort_state

from furiosa_llm.builder.rewrite.fusion.cutting import cut
from furiosa_llm.builder.rewrite.fusion.match import Heads, LeftAloneError, Match
from furiosa_llm.builder.rewrite.fusion.rewriting import Replacement
from furiosa_llm.builder.rewrite.fusion.sizes import Kinds
from furiosa_llm.builder.shapes.interface import SizeSet, concrete, role_of
from furiosa_llm.builder.shapes.interpreter import Facts

Array = npt.NDArray[Any]

TOLERANCES = {ir.DataType.FLOAT: 2e-5, ir.DataType.FLOAT16: 5e-3}
"""Type -> greatest difference, as a fraction of the greatest magnitude in the original's output; other types have no
such op on a CPU."""

_ROOM = 5
"""By how many positions a cache in place is longer than its valid part."""
_HIDDEN = 1e4
"""A score is hidden if at least this much is subtracted from it; float16 has no number above 65504."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One step to compare: sizes, and which positions the attention mask hides."""

    batch: int
    sequence: int
    past: int
    hidden: str = "none"

    @property
    def sizes(self) -> SizeSet:
        """The sizes of the graph's inputs."""
        return SizeSet(batch=self.batch, sequence=self.sequence, past=self.past, encoder=3, others=(3,))


CASES = (
    Case(batch=2, sequence=6, past=0),
    Case(batch=2, sequence=6, past=0, hidden="left"),
    Case(batch=2, sequence=6, past=0, hidden="scattered"),
    Case(batch=2, sequence=1, past=7),
    Case(batch=3, sequence=1, past=7, hidden="left"),
    Case(batch=2, sequence=1, past=9, hidden="scattered"),
    Case(batch=1, sequence=4, past=5),
    Case(batch=1, sequence=5, past=8, hidden="left"),
)
"""Prefill, decode, and a chunk after a past; the op takes a chunk of one sequence only."""


LONG_CASE = Case(batch=1, sequence=24, past=36)
"""A longer case, for effects that begin only far away; models with a small window do not take it."""


def prove(found: Match, replacement: Replacement, graph: ir.Graph, kinds: Kinds, facts: Facts) -> None:
    """Compare `replacement` with what it replaces; raises LeftAloneError with the difference, or why they cannot run.

    Queries, new keys and values, and caches are random. Rows of scores that the mask hides completely have no meaning
    and are not compared, but then no other row may attend to their positions.
    """
    dtype = facts[found.query.value].dtype
    original = _Part(graph, found.results, found.boundary, facts, "the original")
    bias = [] if replacement.bias is None else [replacement.bias]
    fused = _Part(graph, [*replacement.results, *bias], found.boundary, facts, "the fused op")
    for number, case in enumerate((*CASES, LONG_CASE)):
        feeds = _Feeds(found, graph, kinds, facts, case, np.random.default_rng(number)).arrays()
        try:
            expected = original.run(feeds)
        except LeftAloneError:
            if case is not LONG_CASE:
                raise
            continue
        for room in (0, _ROOM) if replacement.in_place else (0,):
            given = _with_room(feeds, found, case.sequence + room) if room else feeds
            _compare(found, case, fused.run(given), expected, TOLERANCES[dtype])


class _Part:
    """A part of the graph, in an onnxruntime session."""

    def __init__(
        self, graph: ir.Graph, outputs: Sequence[ir.Value], boundary: Sequence[ir.Value], facts: Facts, what: str
    ) -> None:
        self._what = what
        self._outputs = [str(value.name) for value in outputs]
        model = cut(graph, outputs, boundary, facts)
        self._inputs = [value.name for value in model.graph.input]
        self._session = self._guarded(lambda: _session(model))

    def run(self, feeds: Mapping[str, Array]) -> list[Array]:
        """The outputs for `feeds`, which may hold more than this part reads."""
        given = {name: feeds[name] for name in self._inputs}
        found: list[Array] = self._guarded(lambda: self._session.run(self._outputs, given))
        return found

    def _guarded(self, call: Any) -> Any:
        try:
            return call()
        except _ORT_ERRORS as error:
            reason = str(error).partition("\n")[0]
            raise LeftAloneError(f"onnxruntime refuses {self._what}: {reason:.160}") from error


_ORT_ERRORS: tuple[type[Exception], ...] = (
    RuntimeError,
    ValueError,
    *(ort_state.EPFail, ort_state.Fail, ort_state.InvalidArgument, ort_state.InvalidGraph, ort_state.InvalidProtobuf),
    *(ort_state.NotImplemented, ort_state.RuntimeException),
)
"""The exceptions that onnxruntime raises: they have no common base of their own."""


def _session(model: onnx.ModelProto) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


class _Feeds:
    """Inputs of both sides for one case."""

    def __init__(
        self, found: Match, graph: ir.Graph, kinds: Kinds, facts: Facts, case: Case, random: np.random.Generator
    ) -> None:
        self._found = found
        self._graph = graph
        self._shapes = concrete(kinds, case.sizes)
        self._facts = facts
        self._case = case
        self._random = random

    def arrays(self) -> dict[str, Array]:
        """The arrays for the graph's inputs and the attention's boundary, by name."""
        feeds = {str(value.name): self._input(value) for value in self._graph.inputs}
        case, found = self._case, self._found
        for heads, strength in ((found.query, 3), (found.key.new, 1), (found.value.new, 1)):
            # Strong queries, so that the effect of a soft cap or a scale on the scores shows.
            feeds[str(heads.value.name)] = self._normal(heads.value, self._shape(heads), strength)
        for cache in (found.key, found.value):
            shape = (case.batch, cache.new.num_heads, case.past, cache.new.size)
            feeds[str(cache.past.name)] = self._normal(cache.past, shape)
        return feeds

    def _shape(self, heads: Heads) -> tuple[int, ...]:
        batch, sequence, count, size = self._case.batch, self._case.sequence, heads.num_heads, heads.size
        if heads.form == "packed":
            return batch, sequence, count * size
        return (batch, count, sequence, size) if heads.form == "heads first" else (batch, sequence, count, size)

    def _normal(self, value: ir.Value, shape: tuple[int, ...], strength: float = 1.0) -> Array:
        return (strength * self._random.standard_normal(shape)).astype(self._facts[value].dtype.numpy())

    def _input(self, value: ir.Value) -> Array:
        shape, dtype = self._shapes[str(value.name)], self._facts[value].dtype.numpy()
        role = role_of(value)
        if role == "attention_mask":
            return self._mask(shape).astype(dtype)
        if role == "position_ids":
            return np.broadcast_to(np.arange(self._case.past, self._case.past + shape[-1]), shape).astype(dtype)
        if dtype.kind in "iub":
            return self._random.integers(0, 2, shape).astype(dtype)
        return self._random.standard_normal(shape).astype(dtype)

    def _mask(self, shape: tuple[int, ...]) -> Array:
        mask = np.ones(shape)
        if self._case.hidden == "left":
            for row in range(len(mask)):
                mask[row, : 1 + 2 * row] = 0
        elif self._case.hidden == "scattered":
            mask[...] = self._random.integers(0, 2, shape)
            mask[:, -1] = 1
        return mask


def _with_room(feeds: Mapping[str, Array], found: Match, room: int) -> dict[str, Array]:
    """`feeds` with caches that have room for `room` positions after their past."""
    given = dict(feeds)
    for cache in (found.key, found.value):
        past = given[str(cache.past.name)]
        behind = np.full((*past.shape[:2], room, past.shape[3]), 3, dtype=past.dtype)
        given[str(cache.past.name)] = np.concatenate([past, behind], axis=2)
    return given


def _compare(found: Match, case: Case, fused: Sequence[Array], original: Sequence[Array], tolerance: float) -> None:
    what = f"batch {case.batch}, {case.sequence} positions behind {case.past}, hidden: {case.hidden}"
    total = case.past + case.sequence
    for ours, theirs in zip(fused[1:3], original[1:3], strict=True):
        if not np.array_equal(ours[:, :, :total], theirs):
            raise LeftAloneError(f"the fused op gives another cache ({what})")
    ours, theirs = (_heads_first(values[0], found) for values in (fused, original))
    shape = (case.batch, found.query.num_heads, case.sequence, total)
    shown: Array = np.broadcast_to(np.asarray(fused[3] > -_HIDDEN if len(fused) > 3 else True), shape)
    rows: Array = np.asarray(shown.any(axis=-1))
    if not rows.any() or not np.isfinite(ours).all():
        raise LeftAloneError(f"the fused op's output is not finite, or nothing can be compared ({what})")
    blind = np.broadcast_to(~rows[:, :, None], (*rows.shape[:2], case.sequence, case.sequence))
    if (shown[..., case.past :] & blind & rows[..., None]).any():
        raise LeftAloneError(f"its mask shows positions that see nothing themselves ({what})")
    error = float(np.abs(ours - theirs)[rows].max()) / float(np.abs(theirs[rows]).max())
    if not error <= tolerance:
        raise LeftAloneError(f"the fused op differs by {error:.1e} of the greatest value ({what})")


def _heads_first(output: Array, found: Match) -> Array:
    output = output.astype(np.float64)
    if found.output.form == "heads first":
        return output
    heads, size = found.output.num_heads, found.output.size
    return output.reshape(*output.shape[:2], heads, size).transpose(0, 2, 1, 3)
