"""Makes the sessions of a program, one for each (segment, lane), in several threads."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import replace
from functools import partial
from pathlib import Path
from queue import SimpleQueue

from onnx import ModelProto, TensorProto

from furiosa_llm.runtime.artifact.progress import tell
from furiosa_llm.runtime.artifact.reader import Artifact
from furiosa_llm.runtime.errors import StepTimeoutError
from furiosa_llm.runtime.execution.ort import ORT_ERRORS, Session, SessionSettings, limit_memory, load_error
from furiosa_llm.runtime.execution.weights_files import with_weights
from furiosa_llm.runtime.program.interruption import Allowance
from furiosa_llm.runtime.program.lanes import Lanes, LaneSegment
from furiosa_llm.runtime.program.limits import STEP_NBYTES, folded_nbytes, load_seconds, step_seconds
from furiosa_llm.runtime.program.segments import program_part
from furiosa_llm.runtime.program.stacking import Shards

_INLINE_NBYTES = 1024
"""Tensors up to this size go into the model itself: onnxruntime can then fold them."""

_GRACE_SECONDS = 0.5
_PROBED_TOKENS = 256
"""At most so many are in a run of a session by itself."""

SectionSessions = tuple[Session | None, ...]
"""The sessions of one section, by lane; None where a lane has nothing to compute, or is not this process's."""


def create_sessions(
    artifact: Artifact,
    lanes: Lanes,
    settings: SessionSettings,
    *,
    threads: int,
    step_nbytes: int = STEP_NBYTES,
    own: Collection[int] | None = None,
) -> tuple[SectionSessions, ...]:
    """For each section of the lanes' program the sessions of the lanes `own` (None: all).

    `threads` sessions are made at a time, which in all their runs together may allocate `step_nbytes`. Raises
    ExecutionError, naming segment and ranks, if onnxruntime refuses one or does not make it in time.
    """
    nodes = sum(len(s.nodes) for section in lanes.sections for s in section.segments if s is not None)
    seconds = load_seconds(artifact.manifest, nodes)
    settings = replace(settings, load_seconds=seconds, arena=True)
    loader = SegmentLoader(artifact, lanes, settings)

    def make(folder: Path) -> tuple[SectionSessions, ...]:
        limit_memory(step_nbytes)
        return _make_sessions(partial(loader.load_from, folder), lanes, threads, own, seconds)

    return with_weights(artifact, make, mapped=not settings.prepack)


def _make_sessions(
    load: Callable[[LaneSegment, str], Session],
    lanes: Lanes,
    threads: int,
    own: Collection[int] | None,
    seconds: float,
) -> tuple[SectionSessions, ...]:
    pool = LoadingThreads(threads, load)
    try:
        rows: list[list[Future[Session] | None]] = [
            [
                pool.submit(segment, f"segment {index} of {ranks_text(lanes.ranks[lane])}")
                if segment is not None and (own is None or lane in own)
                else None
                for lane, segment in enumerate(section.segments)
            ]
            for index, section in enumerate(lanes.sections)
        ]
        allowance = Allowance(seconds)
        number, total = itertools.count(1), sum(made is not None for row in rows for made in row)

        def loaded(made: Future[Session]) -> Session:
            session = pool.result(made, allowance)
            tell("loading the weights", next(number), total)
            return session

        return tuple(tuple(None if made is None else loaded(made) for made in row) for row in rows)
    finally:
        pool.close()


class LoadingThreads:
    """Threads that make sessions. One that onnxruntime keeps for ever is left behind: it does not hold the process."""

    def __init__(self, count: int, load: Callable[[LaneSegment, str], Session]) -> None:
        self._load = load
        self._tasks: SimpleQueue[tuple[LaneSegment, str, Future[Session]] | None] = SimpleQueue()
        self._closed = False
        self._threads = [
            threading.Thread(target=self._serve, name=f"furiosa-load-{index}", daemon=True) for index in range(count)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, segment: LaneSegment, what: str) -> Future[Session]:
        """The session of `segment`, once it is made."""
        made: Future[Session] = Future()
        self._tasks.put((segment, what, made))
        return made

    def result(self, made: Future[Session], allowance: Allowance) -> Session:
        """What is made before that is used up, or a little later: onnxruntime itself gives up then."""
        if not allowance.wait(partial(_is_done, made)) and not _is_done(made, _GRACE_SECONDS):
            raise StepTimeoutError(
                "onnxruntime does not come to an end with making the program ready: it computes constants for longer "
                "than any model of this size needs; build it without them"
            )
        return made.result()

    def close(self) -> None:
        """Lets the threads end, whatever they have not begun."""
        self._closed = True
        for _ in self._threads:
            self._tasks.put(None)
        deadline = time.monotonic() + _GRACE_SECONDS
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    def _serve(self) -> None:
        while (task := self._tasks.get()) is not None:
            segment, what, made = task
            if self._closed:
                continue
            try:
                made.set_result(self._load(segment, what))
            except BaseException as error:  # noqa: BLE001 - whoever waits for it raises it
                made.set_exception(error)


def _is_done(made: Future[Session], seconds: float) -> bool:
    """Whether something is made within so many seconds."""
    return bool(wait([made], seconds).done)


def lane_model(lanes: Lanes, segment: LaneSegment, flexible: Mapping[str, int]) -> ModelProto:
    """`segment` as a model of its own, whose initializers are still the program's.

    `flexible` names values of the program whose given dimension is left open, because a buffer longer than the program
    says may be bound to them. A value that crosses no section of the program has no type: onnxruntime infers it.
    """
    model = program_part(lanes.program, segment.nodes)
    inner = {name for node in segment.nodes for name in node.output if name in lanes.types}.difference(segment.outputs)
    of_graph = model.graph
    for names, values in (
        (segment.inputs, of_graph.input),
        (segment.outputs, of_graph.output),
        (sorted(inner), of_graph.value_info),
    ):
        for name in names:
            value = values.add(name=name)
            kind, open_dim = lanes.types.get(name), flexible.get(name.partition("/")[2])
            if kind is None:
                continue
            value.type.tensor_type.elem_type = TensorProto.DataType.Value(kind.dtype)
            if kind.shape is None:
                continue
            shape = value.type.tensor_type.shape
            for position, size in enumerate(kind.shape):
                dim = shape.dim.add()
                if position == open_dim:
                    continue
                if isinstance(size, int):
                    dim.dim_value = size
                else:
                    dim.dim_param = size
    return model


class SegmentLoader:
    """Makes the sessions of one program's segments, or of parts of them."""

    def __init__(self, artifact: Artifact, lanes: Lanes, settings: SessionSettings) -> None:
        self._artifact = artifact
        self._lanes = lanes
        manifest = artifact.manifest
        self._settings = replace(
            settings,
            folded_nbytes=folded_nbytes(manifest) * max(map(len, lanes.ranks)),
            run_seconds=step_seconds(manifest, _PROBED_TOKENS),
        )
        self._flexible = {
            name: state.grown_dim
            for state in artifact.manifest.states
            if state.mode == "in_place"
            for name in (state.input, state.output)
        }
        self._stored = {tensor.name: tensor for tensor in lanes.program.model.graph.initializer}

    def load(self, segment: LaneSegment) -> Session:
        """The session of a part of a segment; raises ExecutionError if onnxruntime refuses it."""
        return with_weights(
            self._artifact,
            lambda folder: self.load_from(folder, segment, "a part of a segment"),
            mapped=not self._settings.prepack,
        )

    def load_from(self, folder: Path, segment: LaneSegment, what: str) -> Session:
        """The session of `segment`, its weights in `folder`; raises ExecutionError, naming it by `what`.

        It is a KernelError if onnxruntime has no kernel for it.
        """
        model = lane_model(self._lanes, segment, self._flexible)
        for name, shards in segment.initializers.items():
            own = model.graph.initializer.add()
            own.CopyFrom(self._stored[shards.name])
            own.name = name
            _point_at_window(own, self._artifact, shards)
        try:
            return Session(model, folder, self._settings)
        except ORT_ERRORS as error:
            where = f"{what} of {self._artifact.folder}"
            raise load_error(where, error, self._lanes.program.model) from error


def ranks_text(ranks: Sequence[int]) -> str:
    """`rank 3` or `ranks 0 to 3`, for messages."""
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"


def _point_at_window(initializer: TensorProto, artifact: Artifact, shards: Shards) -> None:
    """Gives a stored tensor the data of its ranks: inline if it is small, else the place of its window."""
    if shards.name not in artifact.tensors:
        return
    window = artifact.window(shards.name, shards.rank, shards.count)
    if shards.count > 1:
        initializer.dims[0] *= shards.count
    if window.nbytes <= _INLINE_NBYTES:
        initializer.ClearField("external_data")
        initializer.data_location = TensorProto.DEFAULT
        initializer.raw_data = artifact.read_window(window).tobytes()
        return
    for entry in initializer.external_data:
        if entry.key == "offset":
            entry.value = str(window.offset)
        if entry.key == "length":
            entry.value = str(window.nbytes)
