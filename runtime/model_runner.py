"""Runs batches on the stages of a replica: feeds, slots and sessions, one batch of each group under way at a time.

A `Host` has what replicas share: the stages' graphs and sessions, hence the weights, and the cores. A `LocalRunner` is
one replica: its KV slots and the memory of its steps.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from queue import SimpleQueue
from types import TracebackType
from typing import Self

import numpy as np

from furiosa_llm.runtime.artifact.dimensions import GROWING
from furiosa_llm.runtime.artifact.manifest import InputInfo
from furiosa_llm.runtime.artifact.reader import Artifact
from furiosa_llm.runtime.batch import Batch, Prefill
from furiosa_llm.runtime.binding import BoundProgram
from furiosa_llm.runtime.decoder import check_interface, interface_of
from furiosa_llm.runtime.driver import Crew
from furiosa_llm.runtime.errors import InputError
from furiosa_llm.runtime.feeds import StepFeeds, TokenIds
from furiosa_llm.runtime.lanes import Alike, Lanes, alike_inputs, lanes_of, shard_axes
from furiosa_llm.runtime.ort import Array, SessionSettings
from furiosa_llm.runtime.program import cut_program, size_names
from furiosa_llm.runtime.serving_graph import LAST_POSITIONS, WANTED, rows_are_alone, serving_graph
from furiosa_llm.runtime.sessions import StepSessions, create_sessions
from furiosa_llm.runtime.stage_graph import StageGraph, cut_stages
from furiosa_llm.runtime.stages import Stage
from furiosa_llm.runtime.states import AppendedStates, SlotStates

_LONGEST_CHECKED = 16384
"""Rows of at most this many positions are compared when the masks of rows of unequal lengths are checked."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StageProgram:
    """One stage, loaded: its graph, and its sessions on every lane."""

    graph: StageGraph
    lanes: Lanes
    sessions: tuple[StepSessions, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Traits:
    """What a model's steps may be. `rows`: how rows of unequal lengths are decoded together.

    "ragged" rows are one step; "equal" ones are stepped together where their lengths are equal; of "single" ones each
    is a step. `selects`: logits are computed of wanted positions only.
    """

    rows: str
    selects: bool


class Host:
    """An artifact's stages loaded into this process, for any number of replicas.

    `threads` cores step the lanes (None: all that this process may use). `mapped` leaves the weights in their files.
    Close it, or use it as a context manager, to end its threads.
    """

    def __init__(
        self, artifact: Artifact, stages: Sequence[Stage], *, threads: int | None = None, mapped: bool = False
    ) -> None:
        if threads is not None and threads < 1:
            raise InputError(f"threads must be at least 1, got {threads}")
        manifest = artifact.manifest
        self.artifact = artifact
        self.interface = interface_of(manifest)
        check_interface(self.interface)
        self.stages = tuple(stages)
        self.threads = threads or len(os.sched_getaffinity(0))
        serving = serving_graph(artifact.program, manifest)
        ragged = serving.ragged and rows_are_alone(
            serving, artifact, longest=min(manifest.model.max_sequence_length or _LONGEST_CHECKED, _LONGEST_CHECKED)
        )
        if serving.ragged and not ragged:
            serving = serving_graph(artifact.program, manifest, ragged=False)
        in_place = all(state.mode == "in_place" for state in manifest.states)
        self.traits = Traits(
            rows="ragged" if ragged else "equal" if in_place and manifest.states else "single",
            selects=serving.selects,
        )
        graphs = cut_stages(
            serving.model,
            [_start(artifact, stage) for stage in stages],
            collectives=manifest.collectives,
            states=manifest.states,
            tensors=artifact.tensors,
        )
        count = min(self.threads, manifest.mesh.size)
        settings = SessionSettings(prepack=not mapped)
        self.programs: list[StageProgram] = []
        for graph in graphs:
            lanes = self._lanes(graph, count)
            sessions = create_sessions(artifact, lanes, settings, threads=self.threads)
            self.programs.append(StageProgram(graph=graph, lanes=lanes, sessions=sessions))
        self.crew = Crew(self.threads)

    def runner(self, *, slots_per_group: int) -> LocalRunner:
        """A replica with KV of its own: as many groups as stages, each of `slots_per_group` slots."""
        return LocalRunner(self, slots_per_group)

    def close(self) -> None:
        """Ends the threads; runners cannot run any more."""
        self.crew.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _lanes(self, graph: StageGraph, count: int) -> Lanes:
        """The lanes of a stage; what it receives is alike on the ranks on which its stage had it alike."""
        manifest = self.artifact.manifest
        alike: dict[tuple[int, str], int] = dict(alike_inputs(manifest))
        for rank in range(manifest.mesh.size):
            alike.update({(rank, name): 0 for name in (WANTED, LAST_POSITIONS)})
            for name, stage in graph.received.items():
                known: Alike = self.programs[stage].lanes.alike
                alike[rank, name] = known.get((rank, name), rank)
        program = cut_program(graph.model, graph.collectives, size_names(manifest) | {"wanted"})
        return lanes_of(program, manifest.mesh, count, shard_axes=shard_axes(manifest), inputs=alike)


def _start(artifact: Artifact, stage: Stage) -> str | None:
    """The output of the collective behind which a stage begins."""
    if stage.first_node == 0:
        return None
    return str(artifact.program.graph.node[stage.first_node - 1].output[0])


@dataclass(frozen=True, slots=True, kw_only=True)
class _Step:
    """One run of the model: `token_ids` [rows, sequence] behind `starts`, in `rows` slots from `slot` on."""

    slot: int
    token_ids: TokenIds
    starts: tuple[int, ...]
    wanted: tuple[int, ...]

    @property
    def sizes(self) -> dict[str, int]:
        """The sizes of the step's dynamic dimensions."""
        batch, sequence = self.token_ids.shape
        past = max(self.starts)
        return {
            "batch": batch,
            "sequence": sequence,
            "past": past,
            "total": past + sequence,
            "wanted": len(self.wanted),
        }


class _Use:
    """One form of step (its number of rows, one token or several) on one stage: bindings and the memory of values."""

    def __init__(self, program: StageProgram, inputs: Sequence[InputInfo], crew: Crew) -> None:
        graph = program.graph
        self.states_bound: tuple[int, int, int] | None = None
        external = frozenset(state.output for state in graph.states)
        self.bound = BoundProgram(program.lanes, program.sessions, crew, external=external, growing=GROWING)
        self._read = {value.name for value in graph.model.graph.input}
        self._feeds = StepFeeds([info for info in inputs if info.name in self._read])
        self._received = graph.received
        self._ranks = range(program.lanes.mesh.size)

    def prepare(self, step: _Step, earlier: Sequence[_Use]) -> None:
        """Gives everything but the states its place for `step`."""
        self.bound.resize(step.sizes)
        for name, array in self._feeds.update(step.token_ids, step.starts):
            self.bound.bind_shared(name, array)
        if WANTED in self._read:
            self.bound.bind_shared(WANTED, np.array(step.wanted, dtype=np.int64))
        if LAST_POSITIONS in self._read:
            last = np.array(step.starts, dtype=np.int32) + np.int32(step.token_ids.shape[1] - 1)
            self.bound.bind_shared(LAST_POSITIONS, last)
        for name, stage in self._received.items():
            for rank in self._ranks:
                self.bound.bind_input(rank, name, earlier[stage].bound.tensor(rank, name))


class _StageMemory:
    """What one group has on one stage: its states, and its uses of the stage by the form of the step."""

    def __init__(self, host: Host, program: StageProgram, slots: int) -> None:
        manifest = host.artifact.manifest
        self._program = program
        self._crew = host.crew
        self._inputs = manifest.inputs
        ranks = range(manifest.mesh.size)
        dtypes = {info.name: info.dtype for info in manifest.inputs}
        shapes = host.interface.state_shapes
        kind = SlotStates if all(state.mode == "in_place" for state in program.graph.states) else AppendedStates
        self._states: SlotStates | AppendedStates = kind(program.graph.states, dtypes, shapes, ranks=ranks, slots=slots)
        self._uses: dict[tuple[int, bool], _Use] = {}

    def copy(self, batch: Batch) -> None:
        """Makes the copies between slots that come before `batch`."""
        for one in batch.copies:
            self._states.copy(one.source, one.target, one.length)

    def use(self, step: _Step, earlier: Sequence[_Use]) -> _Use:
        """The bindings for `step`, all bound."""
        rows, sequence = step.token_ids.shape
        key = (rows, sequence == 1)
        if key not in self._uses:
            self._uses[key] = _Use(self._program, self._inputs, self._crew)
        use = self._uses[key]
        use.prepare(step, earlier)
        total = max(step.starts) + sequence
        if isinstance(self._states, SlotStates):
            self._states.reserve(total)
            place = (step.slot, rows, self._states.generation)
            if use.states_bound != place:
                self._states.bind(use.bound, step.slot, rows)
                use.states_bound = place
        else:
            self._states.bind(use.bound, step.slot, step.starts[0], total)
        return use


class LocalRunner:
    """One replica in this process; see `Runner`. Every group has a thread of its own, and every stage a lock."""

    def __init__(self, host: Host, slots_per_group: int) -> None:
        self._host = host
        stages = len(host.programs)
        self._memory = [
            [_StageMemory(host, program, slots_per_group) for program in host.programs] for _ in range(stages)
        ]
        self._locks = [threading.Lock() for _ in range(stages)]
        self._logits = next(info.name for info in host.artifact.manifest.outputs if info.role == "logits")
        self._doing: list[tuple[int, BoundProgram] | None] = [None] * stages
        self.busy_seconds = [0.0] * stages
        """How long each stage has been running."""
        self._queues: list[SimpleQueue[tuple[Batch, Future[Array]] | None]] = [SimpleQueue() for _ in range(stages)]
        self._threads = [
            threading.Thread(target=self._serve, args=(group,), name=f"furiosa-group-{group}", daemon=True)
            for group in range(stages)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def num_groups(self) -> int:
        """How many batches may be under way at once."""
        return len(self._queues)

    def submit(self, batch: Batch) -> Future[Array]:
        """Starts `batch` and returns at once."""
        future: Future[Array] = Future()
        self._queues[batch.group].put((batch, future))
        return future

    def progress(self) -> str:
        """What is being done now, for whoever wonders why nothing comes: stage, ranks, segment, collectives."""
        doing = [entry for entry in list(self._doing) if entry is not None]
        return "; ".join(f"stage {stage}: {bound.progress()}" for stage, bound in doing) or "nothing is under way"

    def close(self) -> None:
        """Ends the threads; a batch that is under way is finished first."""
        for queue in self._queues:
            queue.put(None)
        for thread in self._threads:
            thread.join(timeout=5)

    def _serve(self, group: int) -> None:
        while (entry := self._queues[group].get()) is not None:
            batch, future = entry
            try:
                with self._host.crew.expect():
                    logits = self._run(batch)
            except Exception as error:  # noqa: BLE001 - whoever waits for the batch gets it
                future.set_exception(error)
            else:
                future.set_result(logits)

    def _run(self, batch: Batch) -> Array:
        memory = self._memory[batch.group]
        for one in memory:
            one.copy(batch)
        found: list[Array] = []
        steps = steps_of(batch, self._host.traits)
        for step in steps:
            uses: list[_Use] = []
            for stage, lock in enumerate(self._locks):
                with lock:
                    started = time.perf_counter()
                    use = memory[stage].use(step, uses)
                    self._doing[stage] = (stage, use.bound)
                    use.bound.run()
                    self._doing[stage] = None
                    self.busy_seconds[stage] += time.perf_counter() - started
                uses.append(use)
            logits = uses[-1].bound.array(0, self._logits)
            rows = logits.reshape(-1, logits.shape[-1])
            if not self._host.traits.selects:
                rows = logits[:, list(step.wanted)].reshape(-1, logits.shape[-1])
            found.append(rows if len(steps) == 1 else rows.copy())
        whole = found[0] if len(found) == 1 else np.concatenate(found)
        return whole[:0] if isinstance(batch, Prefill) and batch.logits == "none" else whole


def steps_of(batch: Batch, traits: Traits) -> list[_Step]:
    """The runs of the model that make up `batch`, in the order of its rows."""
    if isinstance(batch, Prefill):
        count = len(batch.tokens)
        wanted = tuple(range(count)) if batch.logits == "all" else (count - 1,)
        return [_step(batch.slot, [batch.tokens], (batch.start,), wanted)]
    starts = [row.start for row in batch.rows]
    if traits.rows == "ragged":
        ends = [len(starts)]
    elif traits.rows == "equal":
        ends = [i for i in range(1, len(starts)) if starts[i] != starts[i - 1]] + [len(starts)]
    else:
        ends = list(range(1, len(starts) + 1))
    return [
        _step(first, [(row.token,) for row in batch.rows[first:end]], tuple(starts[first:end]), (0,))
        for first, end in zip([0, *ends], ends, strict=False)
    ]


def _step(slot: int, tokens: Sequence[Sequence[int]], starts: tuple[int, ...], wanted: tuple[int, ...]) -> _Step:
    return _Step(slot=slot, token_ids=np.array(tokens, dtype=np.int64), starts=starts, wanted=wanted)
