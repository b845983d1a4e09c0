"""Runs an artifact on tensors: global arrays in, laid out on the ranks, stepped, and put together again."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping

import numpy as np

from furiosa_llm.runtime.artifact.compute import dequantises
from furiosa_llm.runtime.artifact.dimensions import GROWING, bind_sizes, known_sizes
from furiosa_llm.runtime.artifact.dtypes import DTYPES, Array
from furiosa_llm.runtime.artifact.errors import ArtifactError
from furiosa_llm.runtime.artifact.layout import Mesh, axes_of, index_map, local_size
from furiosa_llm.runtime.artifact.manifest import LENGTH_ROLES, InputInfo, OutputInfo
from furiosa_llm.runtime.artifact.reader import Artifact
from furiosa_llm.runtime.artifact.tools.originals import default_inputs
from furiosa_llm.runtime.closing import Closing
from furiosa_llm.runtime.errors import ExecutionError, InputError, StepTimeoutError
from furiosa_llm.runtime.execution.binding import BoundProgram
from furiosa_llm.runtime.execution.counters import StageCounts, count_run, new_counters, rows_of, stage_counts
from furiosa_llm.runtime.execution.decoder import Bound, DecoderInterface, interface_of
from furiosa_llm.runtime.execution.driver import Crew, cores_for
from furiosa_llm.runtime.execution.one_by_one import is_chunk_of_many, run_singly, takes_chunks_singly
from furiosa_llm.runtime.execution.ort import SessionSettings, wrap
from furiosa_llm.runtime.execution.sessions import create_sessions
from furiosa_llm.runtime.execution.weights_files import mapped_check
from furiosa_llm.runtime.program.interruption import Interruption
from furiosa_llm.runtime.program.lanes import alike_inputs, lanes_of, shard_axes
from furiosa_llm.runtime.program.limits import step_nbytes, step_seconds
from furiosa_llm.runtime.program.segments import Program, cut_program, growing_values, size_names


class Executor(Closing):
    """An artifact loaded and ready to run.

    `threads` threads step the ranks (None: one for each core this process may use; never more than ranks).
    `mapped` leaves the weights in their file instead of packing them: it starts at once and decodes slower.
    `exact` is for comparisons: no kernel rounds activations of fused quantised weights to 8 bits.
    A run ends with StepTimeoutError after `step_timeout` seconds, and is refused more than `max_step_nbytes` of memory;
    None: what docs/limits.md says. Of an artifact that computes in another type than its own (`computing`), `run` takes
    and gives the model's own types.
    Close it, or use it as a context manager, to end its threads.
    """

    def __init__(
        self,
        artifact: Artifact,
        *,
        threads: int | None = None,
        mapped: bool = False,
        exact: bool = False,
        step_timeout: float | None = None,
        max_step_nbytes: int | None = None,
    ) -> None:
        cores = cores_for(threads)
        self.artifact = artifact
        self.mesh = artifact.manifest.mesh
        self.threads = min(cores, self.mesh.size)
        manifest = artifact.manifest
        program = cut_program(artifact.program, manifest.collectives, size_names(manifest))
        self.lanes = lanes_of(
            program, self.mesh, self.threads, shard_axes=shard_axes(manifest), inputs=alike_inputs(manifest)
        )
        self._chunks_singly = takes_chunks_singly(artifact.program)
        self._step_timeout = step_timeout
        self._check = mapped_check(artifact) if mapped else None
        settings = SessionSettings(prepack=not mapped, exact=exact, dequantise=dequantises(artifact))
        memory = max_step_nbytes or step_nbytes(manifest)
        self._sessions = create_sessions(artifact, self.lanes, settings, threads=cores, step_nbytes=memory)
        self._crew = Crew(self.threads)
        self._lock = threading.Lock()
        self._interruption = Interruption()
        self._counters = new_counters(1)
        [self._row] = rows_of(self._counters)
        self._bound = self.bind(unbound=_of_unknown_shape(artifact, program))
        self._defaults = default_inputs(artifact)

    @property
    def decoder_interface(self) -> DecoderInterface:
        """What `DecoderSession` needs to know of the program."""
        return interface_of(self.artifact.manifest)

    def bind(
        self,
        *,
        external: frozenset[str] = frozenset(),
        unbound: frozenset[str] = frozenset(),
        growing: frozenset[str] = frozenset(),
    ) -> BoundProgram:
        """Bindings and memory of their own on this executor's sessions; `BoundProgram` documents the arguments."""
        return BoundProgram(
            self.lanes,
            self._sessions,
            self._crew,
            external=external,
            unbound=unbound,
            growing=growing,
            check=self._check,
        )

    def bind_steps(self, external: frozenset[str]) -> Bound:
        """Bindings for a decoder's steps, whose past grows; the caller binds the outputs `external`."""
        return self.bind(external=external, growing=GROWING)

    def step(self, bound: Bound) -> None:
        """Runs `bound` once; calls from several threads take turns."""
        with self._lock:
            self._run_within(bound, _TOKENS)

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """The program's outputs by name, for `inputs` by name: all tensors global, as the unsplit model has them.

        State inputs are cut for the ranks by their layouts, and split outputs are put together again. Several tokens
        after a past are run sequence by sequence where a kernel wants it. Raises InputError for a missing or unknown
        name, a wrong type or shape, and ExecutionError if a segment fails.
        """
        manifest = self.artifact.manifest
        inputs = {**{name: array for name, array in self._defaults.items() if name not in inputs}, **inputs}
        sizes = known_sizes(self._check_inputs(inputs))
        with self._lock:
            if not (self._chunks_singly and is_chunk_of_many(sizes)):
                return self._run(inputs, sizes)
            single = {**sizes, "batch": 1}
            return run_singly(
                lambda one: self._run(one, single),
                inputs,
                infos=manifest.inputs,
                outputs=manifest.outputs,
                batch=sizes["batch"],
            )

    @property
    def counts(self) -> tuple[StageCounts, ...]:
        """What its one stage has done in calls of `run`."""
        return stage_counts(self._counters)

    def close(self) -> None:
        """Ends what runs, at its next node, and the threads; the executor cannot run any more."""
        self._interruption.interrupt(ExecutionError("the executor was closed before the run was done"))
        self._crew.close()

    def _run(self, inputs: Mapping[str, Array], sizes: Mapping[str, int]) -> dict[str, Array]:
        self._bound.resize(sizes)
        for info in self.artifact.manifest.inputs:
            self._bind(info, np.asarray(inputs[info.name], dtype=DTYPES[info.dtype].numpy, order="C"))
        started = time.perf_counter_ns()
        self._run_within(self._bound, max(array.size for array in inputs.values()))
        count_run(self._row, started)
        self._bound.count(self._row)
        found = {info.name: self._assemble(info) for info in self.artifact.manifest.outputs}
        for name in self.artifact.declared.keys() & found.keys():
            found[name] = found[name].astype(DTYPES[self.artifact.declared[name]].numpy)
        return found

    def _run_within(self, bound: Bound, tokens: int) -> None:
        """Runs `bound`, unless it takes longer than a step of so many tokens may."""
        seconds = self._step_timeout or step_seconds(self.artifact.manifest, tokens)
        late = StepTimeoutError(
            f"a run of {self.artifact.folder} was not done within {seconds:g} s; give a greater step_timeout if the "
            f"model is that slow"
        )
        self._interruption = bound.interruption = Interruption()
        with self._interruption.after(seconds, late):
            bound.run()

    def _check_inputs(self, inputs: Mapping[str, Array]) -> dict[str, int]:
        infos = self.artifact.manifest.inputs
        expected = [info.name for info in infos]
        missing = [name for name in expected if name not in inputs]
        unknown = [name for name in inputs if name not in expected]
        if missing or unknown:
            raise InputError(f"inputs: missing {missing}, unknown {unknown}; the model takes {expected}")
        for info in infos:
            declared = self.artifact.declared.get(info.name, info.dtype)
            found, wanted = inputs[info.name].dtype, np.dtype(DTYPES[declared].numpy)
            if found != wanted:
                raise InputError(f"input {info.name!r:.80}: found {found}, expected {wanted}")
        try:
            sizes = bind_sizes((f"input {info.name!r:.80}", info.shape, inputs[info.name].shape) for info in infos)
        except ArtifactError as error:
            raise InputError(str(error)) from error
        for info in infos:
            counted = LENGTH_ROLES.get(info.role, "")
            if counted and counted not in sizes:  # a cache of a fixed size does not show how much of it is valid
                sizes[counted] = int(inputs[info.name].max(initial=0))
        return sizes

    def _bind(self, info: InputInfo, array: Array) -> None:
        if is_split(info):
            for rank in range(self.mesh.size):
                self._bound.bind_input(rank, info.name, wrap(local_part(array, info, self.mesh, rank), info.dtype))
        else:
            self._bound.bind_shared(info.name, array)

    def _assemble(self, info: OutputInfo) -> Array:
        split = [(dim, layout) for dim, layout in enumerate(info.layout) if layout is not None and axes_of(layout)]
        first = self._bound.array(0, info.name)
        if not split:
            return first.copy()
        shape = [
            size if layout is None or isinstance(declared, str) else declared
            for size, layout, declared in zip(first.shape, info.layout, info.shape, strict=True)
        ]
        whole = np.zeros(shape, dtype=first.dtype)
        for rank in range(self.mesh.size):
            local = self._bound.array(rank, info.name)
            target: list[Array] = [np.arange(size) for size in shape]
            source: list[Array] = [np.arange(size) for size in local.shape]
            for dim, layout in split:
                indices = index_map(layout, self.mesh, rank)
                source[dim] = np.flatnonzero(indices >= 0)
                target[dim] = indices[source[dim]]
                if local.shape[dim] != local_size(layout, self.mesh):
                    raise ArtifactError(f"output {info.name!r:.80} has the local shape {list(local.shape)}")
            whole[np.ix_(*target)] = local[np.ix_(*source)]
        return whole


_TOKENS = 1024
"""A step of a decoder is taken to have at most so many."""


def _of_unknown_shape(artifact: Artifact, program: Program) -> frozenset[str]:
    """Presents, and what grows with a past that is appended to: a window may cut it, from some length on."""
    states = artifact.manifest.states
    appended = any(state.mode == "append" for state in states)
    return frozenset(state.output for state in states) | (growing_values(program, GROWING) if appended else frozenset())


def is_split(info: InputInfo) -> bool:
    """Whether ranks see different parts of an input."""
    return any(layout is not None and axes_of(layout) for layout in info.layout)


def local_part(array: Array, info: InputInfo, mesh: Mesh, rank: int) -> Array:
    """What `rank` sees of the input `info` whose global value is `array`: padding is zero, memory is contiguous."""
    local = array
    for dim, layout in enumerate(info.layout):
        if layout is None or not axes_of(layout):
            continue
        indices = index_map(layout, mesh, rank)
        local = np.take(local, np.maximum(indices, 0), axis=dim)
        local[(slice(None),) * dim + (indices < 0,)] = 0
    return np.asarray(local, order="C")
