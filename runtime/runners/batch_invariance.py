"""Whether a sequence's bits depend on its batch, or on how its prompt is cut, on this machine: probed, not assumed.

onnxruntime chooses kernels by the processor and by the number of rows, and not all of them add in one order. So each
kind of segment in the program is run as rank 0 has it, for several numbers of rows and of tokens, on the kernels that
will serve, and the bits are compared. Where the bits of a row differ, the segment's nodes are run one by one to find
the ops to blame.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from onnx import NodeProto, TensorProto

from furiosa_llm.runtime.artifact.compute import dequantises
from furiosa_llm.runtime.artifact.dtypes import Array
from furiosa_llm.runtime.artifact.graphs import used_names
from furiosa_llm.runtime.artifact.progress import tell
from furiosa_llm.runtime.artifact.reader import Artifact
from furiosa_llm.runtime.errors import ExecutionError
from furiosa_llm.runtime.execution.ort import ORT_ERRORS, Session, SessionSettings, unwrap, wrap
from furiosa_llm.runtime.execution.sessions import SegmentLoader
from furiosa_llm.runtime.program.lanes import Lanes, LaneSegment
from furiosa_llm.runtime.program.segments import ValueType
from furiosa_llm.runtime.runners.batch import NO_COMPANIONS, Companions
from furiosa_llm.runtime.runners.loaded_model import rank_lanes, serving_of
from furiosa_llm.runtime.runners.probe_feeds import FLOATS, MOST_ROWS, PAST, TOKENS, ProbeFeeds, Span

_ROWS = (1, 2, 3, 5, 16)
"""Numbers of rows whose bits are compared with those of the same rows among `MOST_ROWS`."""
_CUTS = (2, 3, 4, 5, 6, 7, 9, 11, 14, 16, 19)
"""Numbers of tokens after which a prompt of `TOKENS` is cut in two; the bits are compared with the whole prompt's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelDifference:
    """An op whose kernel gives a row other bits in one batch than in another."""

    op: str
    """The op's type, with its domain if that is not ONNX's own; or `fused nodes`, if no node differs by itself."""
    node: str
    """The name of the node that differs most."""
    nodes: int
    """How many of the probed nodes of this type differ; layers that are alike are probed once."""
    rows: tuple[int, ...]
    """Numbers of rows among which a row has other bits than among 64."""
    relative: float
    """The largest difference, relative to the largest element of the result."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchInvariance:
    """What was found of one artifact on this machine."""

    differences: tuple[KernelDifference, ...]
    """The ops to blame, those that differ most first; empty if the bits never differ."""
    companions: Companions | None
    """The companions that give a row the same bits in every batch; None if none do, or if not all could be probed."""
    chunks: bool
    """Whether a prompt has the same bits however it is cut, into pieces of two tokens or more."""
    unprobed: tuple[str, ...]
    """Values that no probe can be made for, because they are neither numbers nor known before a collective; and values
    whose segment onnxruntime could not run on random values, with its error."""

    @property
    def invariant(self) -> bool:
        """Whether a row has the same bits in every batch without companions."""
        return self.companions == NO_COMPANIONS

    def __str__(self) -> str:
        """One sentence for logs and reports."""
        if self.invariant:
            return "a row has the same bits alone and in every batch"
        if self.unprobed:
            return f"not known whether a row has the same bits in every batch: no probe for {self.unprobed[0]!r:.80}"
        blamed = ", ".join(f"{one.op} (by {one.relative:.1e} of its largest element)" for one in self.differences)
        alone = all(one.rows == (1,) for one in self.differences)
        where = "a row alone has other last bits than in a batch" if alone else "a row's last bits depend on its batch"
        return f"{where}: {blamed}"


def probe_batch_invariance(artifact: Artifact, *, mapped: bool = False) -> BatchInvariance:
    """Runs the decode step of `artifact`, a decoder, for several numbers of rows and compares the bits.

    `mapped` is for weights that are left in their file, which other kernels multiply. It costs about as much as loading
    one layer, the embedding and the head of one rank. Raises what `load_model` does.
    """
    tell("probing the kernels of this machine")
    found = _Probe(artifact, mapped).run()
    doubled = tuple(sorted({one.op for one in found.differences if one.rows != (1,)}))
    if found.companions is not None or found.unprobed or not doubled:
        return found
    types = tuple(op.rpartition(".")[2] for op in doubled)
    again = _Probe(artifact, mapped, types).run()
    return replace(found, companions=again.companions, chunks=again.chunks)


_UNPROBED: tuple[type[Exception], ...] = (*ORT_ERRORS, ExecutionError)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Values:
    """The results of a run: arrays by name, with their types."""

    arrays: Mapping[str, Array]
    types: Mapping[str, ValueType]


class _Probe:
    """Probes the program of an artifact with some `doubled` ops; see `Companions`."""

    def __init__(self, artifact: Artifact, mapped: bool, doubled: tuple[str, ...] = ()) -> None:
        serving, _ = serving_of(artifact, doubled)
        self._artifact = artifact
        self._lanes = rank_lanes(artifact, serving.model)
        self._settings = SessionSettings(prepack=not mapped, dequantise=dequantises(artifact))
        self._loader = SegmentLoader(artifact, self._lanes, self._settings)
        self._feeds = ProbeFeeds(artifact, self._lanes.program)
        self._doubled = doubled

    def run(self) -> BatchInvariance:
        """The differences, and the companions that remove them unless more ops have to be doubled."""
        differences: list[KernelDifference] = []
        unprobed: dict[str, None] = {}
        rows: set[int] = set()
        chunks = True
        for segment in self._distinct_segments():
            unknown = [name for name in map(_original, segment.inputs) if not self._feeds.can_feed(name)]
            unprobed.update(dict.fromkeys(unknown))
            if unknown:
                continue
            try:
                session = self._loader.load(segment)
                if found := self._differing_rows(session, segment):
                    rows |= found
                    differences += self._blame(session, segment, found)
                chunks = chunks and self._chunks_are_alike(session, segment)
            except _UNPROBED as error:  # the segment does not take random values
                unprobed[f"{_original(segment.outputs[0])}: {type(error).__name__}: {error}"] = None
        enough = not unprobed and rows <= {1}
        return BatchInvariance(
            differences=tuple(_merged(differences)),
            companions=Companions(lone=bool(rows), doubled=self._doubled) if enough else None,
            chunks=chunks and not unprobed,
            unprobed=tuple(unprobed),
        )

    def _distinct_segments(self) -> Iterator[LaneSegment]:
        """The segments of rank 0; of segments that are alike, the first."""
        seen: set[tuple[bytes, ...]] = set()
        for step in self._lanes.sections:
            segment = step.segments[0]
            if segment is not None and (signature := _signature(segment, self._lanes)) not in seen:
                seen.add(signature)
                yield segment

    def _differing_rows(self, session: Session, segment: LaneSegment) -> set[int]:
        """The numbers in `_ROWS` with which some row has other bits than among `MOST_ROWS`."""
        most = self._run(session, segment, Span(rows=MOST_ROWS))
        return {rows for rows in _ROWS if _difference(self._run(session, segment, Span(rows=rows)), most) is not None}

    def _chunks_are_alike(self, session: Session, segment: LaneSegment) -> bool:
        """Whether a prompt's tokens have the same bits in two parts, the second after the first's caches."""
        whole = self._run(session, segment, Span(rows=1, last=TOKENS))
        states = [one for one in self._artifact.manifest.states if f"0/{one.input}" in segment.inputs]
        # Where other segments cut the caches to a window, the caches after the first part are not known here.
        known = all(f"0/{s.output}" in whole.arrays and s.sequence_dim is not None for s in states)
        known &= not self._feeds.from_caches.intersection(map(_original, segment.inputs))
        for cut in _CUTS:
            head = self._run(session, segment, Span(rows=1, last=cut))
            if _difference(self._without_logits(head), whole) is not None:
                return False
            if not known:
                continue
            inputs = self._inputs(segment, Span(rows=1, first=cut, last=TOKENS))
            for state in states:
                cached = (slice(None),) * state.grown_dim + (slice(PAST + cut),)
                inputs[f"0/{state.input}"] = np.ascontiguousarray(whole.arrays[f"0/{state.output}"][cached])
            if _difference(_run(session, segment, inputs, self._lanes.types), whole, at_end=True) is not None:
                return False
        return True

    def _without_logits(self, found: _Values) -> _Values:
        """The values that do not belong to the last token alone, because a part of a prompt has another last token."""
        shapes = {name: self._lanes.types[name].shape or () for name in found.arrays}
        return replace(found, arrays={name: a for name, a in found.arrays.items() if "wanted" not in shapes[name]})

    def _run(self, session: Session, segment: LaneSegment, span: Span) -> _Values:
        return _run(session, segment, self._inputs(segment, span), self._lanes.types)

    def _inputs(self, segment: LaneSegment, span: Span) -> dict[str, Array]:
        feeds = self._feeds.of(span, [_original(name) for name in segment.inputs])
        return {name: feeds[_original(name)] for name in segment.inputs}

    # -- the op to blame -----------------------------------------------------------------------------------------

    def _blame(self, session: Session, segment: LaneSegment, rows: set[int]) -> list[KernelDifference]:
        """The nodes of `segment` that differ by themselves when their inputs are those among `MOST_ROWS` rows."""
        constants = set(segment.initializers)
        made = [node for node in segment.nodes if not _is_constant(node, constants)]
        whole = replace(segment, outputs=tuple(name for node in made for name in node.output if name))
        inner = self._loader.load(whole)
        known = {count: self._all_values(inner, whole, count) for count in (*rows, MOST_ROWS)}
        found = [one for node in made if (one := self._blame_node(segment, node, known)) is not None]
        if found:
            return found
        most = self._run(session, segment, Span(rows=MOST_ROWS))
        worst = max(_difference(self._run(session, segment, Span(rows=count)), most) or 0.0 for count in rows)
        name = _original(segment.outputs[0])
        return [KernelDifference(op="fused nodes", node=name, nodes=1, rows=tuple(sorted(rows)), relative=worst)]

    def _all_values(self, session: Session, whole: LaneSegment, count: int) -> _Values:
        """The inputs and all other values of a segment with `count` rows."""
        made = self._run(session, whole, Span(rows=count))
        return _Values(
            arrays={**self._inputs(whole, Span(rows=count)), **made.arrays},
            types={**self._lanes.types, **made.types},
        )

    def _blame_node(
        self, segment: LaneSegment, node: NodeProto, known: Mapping[int, _Values]
    ) -> KernelDifference | None:
        """Runs `node` on its inputs among `MOST_ROWS` rows, and on the first rows of these."""
        part, types = _alone(segment, node), known[MOST_ROWS].types
        session = SegmentLoader(self._artifact, replace(self._lanes, types=types), self._settings).load(part)
        whole = {name: known[MOST_ROWS].arrays[name] for name in part.inputs}
        most = _run(session, part, whole, types)
        found: dict[int, float] = {}
        for count in known.keys() - {MOST_ROWS}:
            inputs = {name: known[count].arrays[name] for name in part.inputs}
            firsts = {name: whole[name][tuple(map(slice, array.shape))] for name, array in inputs.items()}
            numbers = {name for name in inputs if types[name].dtype in FLOATS}
            if not all(np.array_equal(firsts[name], inputs[name]) for name in inputs.keys() - numbers):
                continue  # a size, or rows that were sorted by what was computed: not the same rows as among the most
            inputs.update({name: np.ascontiguousarray(firsts[name]) for name in numbers})
            difference = _difference(_run(session, part, inputs, types), most)
            if difference is not None:
                found[count] = difference
        if not found:
            return None
        domain = "" if node.domain in ("", "ai.onnx") else f"{node.domain}."
        name = _original(node.name or node.output[0])
        rows, worst = tuple(sorted(found)), max(found.values())
        op = f"{domain}{node.op_type}".encode("unicode_escape").decode("ascii")  # it is printed
        return KernelDifference(op=op, node=name, nodes=1, rows=rows, relative=worst)


def _run(
    session: Session, segment: LaneSegment, inputs: Mapping[str, Array], types: Mapping[str, ValueType]
) -> _Values:
    tensors = {name: wrap(array, types[name].dtype) for name, array in inputs.items()}
    made = session.run({name: tensor.raw for name, tensor in tensors.items()}, segment.outputs)
    dtypes = {name: TensorProto.DataType.Name(raw.element_type()) for name, raw in made.items()}
    return _Values(
        arrays={name: unwrap(raw, dtypes[name]).array.copy() for name, raw in made.items()},
        types={name: ValueType(dtype=dtype, shape=None) for name, dtype in dtypes.items()},
    )


def _difference(few: _Values, most: _Values, *, at_end: bool = False) -> float | None:
    """How far the rows of `few` differ from the first, or the last, of `most`, relative to the largest element.

    None if every bit is the same. Rows are the outermost indices of whichever dimension they are in. Integers are
    sizes, places and tokens, which are exact; a dimension longer in `few` belongs to the caches, and to no row.
    """
    worst: float | None = None
    for name, ours in few.arrays.items():
        same = tuple(slice(-size, None) if at_end else slice(size) for size in ours.shape)
        theirs = most.arrays[name][same]
        comparable = few.types[name].dtype in FLOATS and ours.size and ours.shape == theirs.shape
        if comparable and ours.tobytes() != theirs.tobytes():
            gap = np.abs(ours.astype(np.float64) - theirs.astype(np.float64)).max()
            scale = np.abs(theirs.astype(np.float64)).max()
            worst = max(worst or 0.0, float(gap / scale) if scale else float(gap))
    return worst


def _merged(differences: Sequence[KernelDifference]) -> list[KernelDifference]:
    """One difference for each op, those that differ most first."""
    by_op: dict[str, list[KernelDifference]] = {}
    for one in differences:
        by_op.setdefault(one.op, []).append(one)
    merged = [
        replace(
            max(same, key=lambda one: one.relative),
            nodes=len(same),
            rows=tuple(sorted({rows for one in same for rows in one.rows})),
        )
        for same in by_op.values()
    ]
    return sorted(merged, key=lambda one: -one.relative)


# -- parts of a segment --------------------------------------------------------------------------------------------


def _original(name: str) -> str:
    """The program's name of a lane's value."""
    return name.partition("/")[2]


def _signature(segment: LaneSegment, lanes: Lanes) -> tuple[bytes, ...]:
    """The segment without its names: segments that are alike have the same signature."""
    stored = {tensor.name: tensor for tensor in lanes.program.model.graph.initializer}
    numbers: dict[str, str] = {}
    parts: list[bytes] = []
    for name in segment.inputs:
        numbers[name] = str(len(numbers))
        parts.append(repr(lanes.types[name]).encode())
    for name, shards in segment.initializers.items():
        tensor = stored[shards.name]
        numbers.setdefault(name, f"{tensor.data_type}{list(tensor.dims)}")
    for node in segment.nodes:
        for name in node.output:
            numbers.setdefault(name, str(len(numbers)))
        bare = NodeProto()
        bare.CopyFrom(node)
        bare.ClearField("name")
        del bare.input[:], bare.output[:]
        parts.append(bare.SerializeToString(deterministic=True))
        parts.append(repr([numbers.get(name, name) for name in (*used_names(node), *node.output)]).encode())
    return tuple(parts)


def _is_constant(node: NodeProto, constants: set[str]) -> bool:
    """Whether `node` reads `constants` alone; if so, its outputs are added to them."""
    if not constants.issuperset(used_names(node)):
        return False
    constants.update(node.output)
    return True


def _alone(segment: LaneSegment, node: NodeProto) -> LaneSegment:
    """`node` as a segment of its own, with the nodes that make constants for it: onnxruntime fuses them with it."""
    producer = {name: other for other in segment.nodes for name in other.output}
    constants = set(segment.initializers)
    constant = [other for other in segment.nodes if _is_constant(other, constants)]
    wanted = set(used_names(node))
    nodes = [node]
    for other in reversed(constant):
        if wanted.intersection(other.output):
            nodes.insert(0, other)
            wanted.update(used_names(other))
    inside = {name for other in nodes for name in other.output}
    read = dict.fromkeys(name for other in nodes for name in used_names(other))
    assert all(name in producer or name in segment.inputs or name in segment.initializers for name in read)
    return LaneSegment(
        nodes=tuple(nodes),
        inputs=tuple(name for name in read if name not in inside and name not in segment.initializers),
        outputs=tuple(name for name in node.output if name),
        initializers={name: segment.initializers[name] for name in read if name in segment.initializers},
    )
