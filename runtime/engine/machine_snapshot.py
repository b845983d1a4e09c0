"""`MachineSnapshot`: what lies on every PE of a running model, and what its replicas and stages have done so far."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from furiosa_llm.runtime.artifact.card import PE_NBYTES, PES_PER_CARD
from furiosa_llm.runtime.artifact.reader import Artifact
from furiosa_llm.runtime.engine.replica import Replica, ReplicaUsage
from furiosa_llm.runtime.engine.replica_counts import ReplicaCounts
from furiosa_llm.runtime.execution.counters import StageCounts
from furiosa_llm.runtime.placement.capacity import kv_nbytes_per_token
from furiosa_llm.runtime.placement.devices import PE, first_pes
from furiosa_llm.runtime.placement.stages import Stage, choose_stages
from furiosa_llm.runtime.placement.topology import Topology

HostOf = Callable[[int, int], str | None]
"""The name of the host that has a stage of a replica, None while none has."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineLayout:
    """What does not change while a model runs."""

    topology: Topology
    """Which PE has which rank of which stage of which replica."""
    stages: tuple[Stage, ...]
    """The stages of a replica."""
    page_nbytes: tuple[int, ...]
    """What a page of KV takes on each PE, for each stage."""
    host_of: HostOf | None = None
    """Where stages are, if they are not here."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PESnapshot:
    """A PE of a card that is used, and what lies in its memory."""

    pe: PE
    """Its card and number."""
    replica: int | None = None
    stage: int | None = None
    rank: int | None = None
    """`replica`, `stage`, `rank`: what the PE has; None if it is not used."""
    memory_nbytes: int = PE_NBYTES
    """Its even share of the card's memory."""
    weights_nbytes: int = 0
    """What it reads; what several PEs of a card read is there once, and counts an equal part for each."""
    kv_nbytes: int = 0
    """Room for KV."""
    kv_used_nbytes: int = 0
    """KV in use, the prefix cache included."""
    host: str | None = None
    """The host that runs it, if stages are on other hosts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CardSnapshot:
    """A card that is used, with all of its PEs."""

    npu: int
    pes: tuple[PESnapshot, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class StageSnapshot:
    """A stage of a replica: its blocks, and what it has done."""

    stage: Stage
    counts: StageCounts


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaSnapshot:
    """A replica."""

    replica: int
    """Its index."""
    alive: bool
    """Whether it was not given up."""
    ready: bool
    """Whether it has a runner at the moment."""
    usage: ReplicaUsage
    """Its sequences and pages."""
    counts: ReplicaCounts
    """What it has done, on all the runners that it has had."""
    stages: tuple[StageSnapshot, ...]
    """What each stage has done."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineSnapshot:
    """A running model at one moment; what is counted only grows, over restarts of replicas too."""

    topology: Topology
    """Which PE has which rank of which stage of which replica."""
    cards: tuple[CardSnapshot, ...]
    """The cards that are used, in order."""
    replicas: tuple[ReplicaSnapshot, ...]
    """The replicas, in order."""


def layout_of(artifact: Artifact, topology: Topology, stages: Sequence[Stage], *, page_size: int) -> MachineLayout:
    """What `artifact` lays on the PEs of `topology`, with pages of `page_size` tokens."""
    return MachineLayout(
        topology=topology,
        stages=tuple(stages),
        page_nbytes=tuple(nbytes * page_size for nbytes in kv_nbytes_per_token(artifact, stages)),
    )


def layout_of_one(artifact: Artifact) -> MachineLayout:
    """The layout of a model that runs by itself, as one replica of one stage: its ranks are the first PEs."""
    size = artifact.manifest.mesh.size
    topology = Topology(
        tensor_parallel_size=size, pipeline_parallel_size=1, data_parallel_size=1, replicas=((first_pes(size),),)
    )
    return layout_of(artifact, topology, choose_stages(artifact), page_size=1)


def layout_of_parts(parts: Sequence[Artifact]) -> MachineLayout:
    """The same of a model in several parts, which all lie on the same PEs; shown as one stage, the last part's."""
    layouts = [layout_of_one(part) for part in parts]
    stage = replace(layouts[-1].stages[0], weight_nbytes=sum(one.stages[0].weight_nbytes for one in layouts))
    return MachineLayout(topology=layouts[-1].topology, stages=(stage,), page_nbytes=(0,))


def machine_of(layout: MachineLayout, replicas: Sequence[Replica]) -> MachineSnapshot:
    """The machine at this moment."""
    return snapshot(
        layout,
        [
            replica_snapshot(
                layout,
                index,
                usage=one.usage,
                counts=one.counts,
                alive=one.death is None,
                ready=one.death is None and one.ready,
            )
            for index, one in enumerate(replicas)
        ],
    )


def replica_snapshot(
    layout: MachineLayout, index: int, *, usage: ReplicaUsage, counts: ReplicaCounts, alive: bool, ready: bool
) -> ReplicaSnapshot:
    """A replica, its stages with their blocks."""
    return ReplicaSnapshot(
        replica=index,
        alive=alive,
        ready=ready,
        usage=usage,
        counts=counts,
        stages=tuple(
            StageSnapshot(stage=stage, counts=done) for stage, done in zip(layout.stages, counts.stages, strict=True)
        ),
    )


def snapshot(layout: MachineLayout, replicas: Sequence[ReplicaSnapshot]) -> MachineSnapshot:
    """The machine with `replicas`."""
    used = {one.pe: one for one in _used(layout, [replica.usage for replica in replicas])}
    return MachineSnapshot(
        topology=layout.topology,
        cards=tuple(
            CardSnapshot(
                npu=npu,
                pes=tuple(
                    used.get(pe) or PESnapshot(pe=pe)
                    for pe in (PE(npu=npu, index=index) for index in range(PES_PER_CARD))
                ),
            )
            for npu in sorted({pe.npu for pe in used})
        ),
        replicas=tuple(replicas),
    )


def _used(layout: MachineLayout, usages: Sequence[ReplicaUsage]) -> Iterator[PESnapshot]:
    """The PEs that are used."""
    sharing: dict[tuple[int, int, int], list[int]] = {}
    for replica, groups in enumerate(layout.topology.replicas):
        for stage, group in enumerate(groups):
            for rank, pe in enumerate(group):
                sharing.setdefault((pe.npu, stage, rank), []).append(replica)
    for replica, (groups, usage) in enumerate(zip(layout.topology.replicas, usages, strict=True)):
        for stage, group in enumerate(groups):
            for rank, pe in enumerate(group):
                on_card = sharing[pe.npu, stage, rank]
                yield PESnapshot(
                    pe=pe,
                    replica=replica,
                    stage=stage,
                    rank=rank,
                    weights_nbytes=_part(layout.stages[stage].weight_nbytes, on_card.index(replica), len(on_card)),
                    kv_nbytes=layout.page_nbytes[stage] * usage.num_pages,
                    kv_used_nbytes=layout.page_nbytes[stage] * usage.used_pages,
                    host=layout.host_of and layout.host_of(replica, stage),
                )


def _part(whole: int, index: int, count: int) -> int:
    """One of `count` parts of `whole`, as equal as can be."""
    return whole * (index + 1) // count - whole * index // count
