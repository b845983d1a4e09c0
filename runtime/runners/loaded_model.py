"""Loads an artifact's stages as an engine runs them: graphs, lanes and sessions, for as many replicas as wanted."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from onnx import ModelProto

from furiosa_llm.runtime.adapters.bank import AdapterBank
from furiosa_llm.runtime.artifact.adapters.inputs import AdapterInputs, adapter_inputs
from furiosa_llm.runtime.artifact.compute import dequantises
from furiosa_llm.runtime.artifact.dtypes import DTYPES, Array
from furiosa_llm.runtime.artifact.graphs import used_names
from furiosa_llm.runtime.artifact.layout import Mesh
from furiosa_llm.runtime.artifact.manifest import InputInfo, OutputInfo
from furiosa_llm.runtime.artifact.reader import Artifact
from furiosa_llm.runtime.artifact.tools.originals import default_inputs
from furiosa_llm.runtime.execution.decoder import (
    DecoderInterface,
    check_interface,
    fixed_batch,
    interface_of,
    takes_one_position,
)
from furiosa_llm.runtime.execution.feeds import StepFeeds, is_of_each_row
from furiosa_llm.runtime.execution.graph_parts import rows_are_alone
from furiosa_llm.runtime.execution.ort import SessionSettings
from furiosa_llm.runtime.execution.scores import scores_output
from furiosa_llm.runtime.execution.sessions import SectionSessions, create_sessions
from furiosa_llm.runtime.execution.weights_files import mapped_check
from furiosa_llm.runtime.placement.stages import Stage
from furiosa_llm.runtime.program.idle_ranks import padded_shards
from furiosa_llm.runtime.program.joined import joined
from furiosa_llm.runtime.program.lanes import Alike, Lanes, alike_inputs, lanes_of, shard_axes
from furiosa_llm.runtime.program.limits import step_nbytes
from furiosa_llm.runtime.program.segments import cut_program, size_names
from furiosa_llm.runtime.program.serving_graph import (
    LAST_POSITIONS,
    WANTED,
    ServingGraph,
    serving_graph,
)
from furiosa_llm.runtime.program.stage_graph import StageGraph, cut_stages
from furiosa_llm.runtime.runners.batch import NO_COMPANIONS, Companions

_LONGEST_CHECKED = 16384
"""Rows of at most this many positions are compared when the masks of rows of unequal lengths are checked."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StageProgram:
    """One stage, loaded: its graph, and its sessions on every lane."""

    graph: StageGraph
    lanes: Lanes
    sessions: tuple[SectionSessions, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Traits:
    """What a model's steps may be. `rows`: how rows of unequal lengths are decoded together.

    "ragged" rows are one step; "equal" ones are stepped together where their lengths are equal. `in_place`: states are
    written where they are read. `selects`: logits are computed of wanted positions only. `singly`: a step has one
    position. `mixes`: rows of a step may have adapters of their own. `pads`: shorter prompts may be padded beside
    longer ones. `batch`: every step has so many rows.
    """

    rows: Literal["ragged", "equal"]
    in_place: bool
    selects: bool
    singly: bool = False
    mixes: bool = True
    pads: bool = False
    batch: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedModel:
    """A decoder's stages, loaded; `own` are the lanes whose sessions there are, `companions` the rows that get one."""

    artifact: Artifact
    interface: DecoderInterface
    graphs: tuple[StageGraph, ...]
    """Those of all stages."""
    programs: tuple[StageProgram, ...]
    """The stages that are loaded: all, or the one that was asked for."""
    traits: Traits
    own: tuple[int, ...]
    companions: Companions = NO_COMPANIONS
    defaults: Mapping[str, Array] = field(default_factory=dict)
    """Inputs that are the same in every step."""
    check: Callable[[], None] | None = None
    """Called before every step; raises what speaks against it."""
    bank: AdapterBank
    """What steps are given of adapters."""

    @property
    def step_inputs(self) -> list[InputInfo]:
        """The inputs that are made anew for every step, but for the mask of adapters' ranks."""
        return step_inputs(self.interface.inputs, self.bank.inputs, self.defaults)

    @property
    def logits(self) -> OutputInfo:
        """The output that has the logits."""
        return scores_output(self.interface.outputs)


def load_model(
    artifact: Artifact,
    stages: Sequence[Stage],
    *,
    lanes: int,
    threads: int,
    mapped: bool = False,
    exact: bool = False,
    own: Collection[int] | None = None,
    companions: Companions = NO_COMPANIONS,
    max_step_nbytes: int | None = None,
    only: int | None = None,
    separate: bool = False,
    spin_us: int = 0,
) -> LoadedModel:
    """`artifact` cut into `stages`, on so many `lanes`, with the sessions of the lanes `own` (None: all).

    `only` that one of the stages is loaded, and nothing is read of what only others need; None: all of them.

    `threads` sessions are made at a time; `mapped` leaves the weights in their files, and `exact` is for comparisons
    (see `SessionSettings`). The ranks of a lane are stacked (`runtime/program/stacking.py`), unless they are to be
    `separate`, or the weights to stay in their files. With `spin_us` all ranks are one lane, whose nodes `threads`
    share within onnxruntime, which poll for each other for so long. Steps may allocate `max_step_nbytes`; None: what
    docs/limits.md says. Raises UnsupportedError for a model that is no decoder, and ExecutionError if onnxruntime
    refuses a segment.
    """
    manifest = artifact.manifest
    interface = interface_of(manifest)
    check_interface(interface)
    types = {info.name: DTYPES[info.dtype].numpy for info in manifest.inputs}
    defaults = {name: array.astype(types[name]) for name, array in default_inputs(artifact).items()}
    bank = AdapterBank(adapter_inputs(manifest, artifact.program.graph, defaults), apart=companions.apart)
    defaults = {name: array for name, array in defaults.items() if name not in bank.inputs.base}
    read = {name for node in artifact.program.graph.node for name in used_names(node)}
    StepFeeds([info for info in step_inputs(interface.inputs, bank.inputs, defaults) if info.name in read])
    serving, traits = serving_of(artifact, companions.doubled)
    traits = replace(traits, mixes=bank.mixes)
    graphs = _cut(artifact, serving, stages)
    settings = SessionSettings(
        intra_op_threads=threads if spin_us else 1,
        spin_us=spin_us,
        prepack=not mapped,
        exact=exact,
        dequantise=dequantises(artifact),
    )
    memory = max_step_nbytes or step_nbytes(manifest)
    count = 1 if spin_us else min(lanes, manifest.mesh.size)
    programs: list[StageProgram] = []
    for graph, laid in zip(graphs, _lanes(artifact, graphs, count, stacks=not (separate or mapped)), strict=True):
        if only in (None, graph.index):
            sessions = create_sessions(artifact, laid, settings, threads=threads, step_nbytes=memory, own=own)
            programs.append(StageProgram(graph=graph, lanes=laid, sessions=sessions))
    return LoadedModel(
        artifact=artifact,
        interface=interface,
        graphs=graphs,
        programs=tuple(programs),
        traits=traits,
        own=tuple(range(count)) if own is None else tuple(own),
        companions=companions,
        defaults=defaults,
        check=mapped_check(artifact) if mapped else None,
        bank=bank,
    )


def _cut(artifact: Artifact, serving: ServingGraph, stages: Sequence[Stage]) -> tuple[StageGraph, ...]:
    return cut_stages(
        serving.model,
        [_start(artifact, stage) for stage in stages],
        collectives=artifact.manifest.collectives,
        states=artifact.manifest.states,
        tensors=artifact.tensors,
    )


def stage_tensors(artifact: Artifact, stages: Sequence[Stage], stage: int) -> frozenset[str]:
    """The stored tensors of `artifact` that loading and running one of `stages` reads.

    Those of the biases are among them, by which each stage finds out what its steps may be, and all if an input has a
    default that is stored.
    """
    manifest = artifact.manifest
    inputs = {info.name for info in manifest.inputs}
    if any(entry.stored and entry.name in inputs for entry in manifest.initializers):
        return frozenset(artifact.tensors)
    serving = serving_graph(artifact.program, manifest)
    read = {tensor.name for tensor in _cut(artifact, serving, stages)[stage].model.graph.initializer}
    behind = set(serving.biases)
    for node in reversed(serving.model.graph.node):
        if behind.intersection(node.output):
            behind.update(used_names(node))
    return frozenset((read | behind) & artifact.tensors.keys())


def step_inputs(inputs: Sequence[InputInfo], adapters: AdapterInputs, defaults: Mapping[str, Array]) -> list[InputInfo]:
    """Those of `inputs` that a step's tokens make."""
    others = {*adapters.base, *defaults, *([] if adapters.rows is None else [adapters.rows.name])}
    return [info for info in inputs if info.name not in others]


def serving_of(artifact: Artifact, doubled: Collection[str] = ()) -> tuple[ServingGraph, Traits]:
    """The program of `artifact`, a decoder, as an engine runs it, and what its steps may be; see `Companions`."""
    manifest = artifact.manifest
    serving = serving_graph(artifact.program, manifest, doubled=doubled)
    longest = min(manifest.model.max_sequence_length or _LONGEST_CHECKED, _LONGEST_CHECKED)
    of_each = all(is_of_each_row(info) for info in manifest.inputs)
    if serving.ragged and not (of_each and rows_are_alone(serving, artifact, longest=longest)):
        serving = serving_graph(artifact.program, manifest, ragged=False, doubled=doubled)
    traits = Traits(
        rows="ragged" if serving.ragged else "equal",
        in_place=all(state.mode == "in_place" for state in manifest.states),
        selects=serving.selects,
        singly=takes_one_position(manifest.inputs),
        pads=serving.ragged and serving.selects and not serving.biases,
        batch=fixed_batch(manifest.inputs),
    )
    return serving, traits


def rank_lanes(artifact: Artifact, model: ModelProto) -> Lanes:
    """All of a serving program as rank 0 has it, for whoever looks at its segments: what ranks exchange is not sent."""
    manifest = artifact.manifest
    program = cut_program(model, manifest.collectives, size_names(manifest) | {"wanted"})
    alone = Mesh((1,) * len(manifest.mesh.shape))
    return lanes_of(program, alone, 1, shard_axes=shard_axes(manifest), inputs={})


def _lanes(artifact: Artifact, graphs: Sequence[StageGraph], count: int, *, stacks: bool) -> list[Lanes]:
    """The lanes of every stage; what a stage receives is alike on the ranks on which its stage had it alike.

    `stacks`: whether ranks of a lane are stacked.
    """
    manifest = artifact.manifest
    in_place = all(state.mode == "in_place" for state in manifest.states)
    padded = padded_shards(manifest)
    laid: list[Lanes] = []
    for graph in graphs:
        alike: dict[tuple[int, str], int] = dict(alike_inputs(manifest))
        for rank in range(manifest.mesh.size):
            alike.update({(rank, name): 0 for name in (WANTED, LAST_POSITIONS)})
            for name, stage in graph.received.items():
                known: Alike = laid[stage].alike
                alike[rank, name] = known.get((rank, name), rank)
        program = cut_program(graph.model, graph.collectives, size_names(manifest) | {"wanted"})
        states = (graph.states if in_place else ()) if stacks else None
        lanes = lanes_of(
            program,
            manifest.mesh,
            count,
            shard_axes=shard_axes(manifest),
            inputs=alike,
            states=states,
            padded=padded,
        )
        laid.append(joined(lanes))
    return laid


def _start(artifact: Artifact, stage: Stage) -> str | None:
    """The output of the collective after which a stage begins."""
    if stage.first_node == 0:
        return None
    return str(artifact.program.graph.node[stage.first_node - 1].output[0])
