"""Which PE holds which stage and rank of which replica: the vendor's rule, with refusals that list what is accepted.

The rule: sort the PEs, fuse runs of `tensor_parallel_size`, then give every stage of every replica the first unused
run on a later card than the stage before it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from furiosa_llm.runtime.artifact.card import FUSIBLE, PES_PER_CARD
from furiosa_llm.runtime.artifact.units import counted
from furiosa_llm.runtime.errors import TopologyError
from furiosa_llm.runtime.placement.devices import MAX_CARDS, PE, format_pes, parse_devices

StagePEs = tuple[PE, ...]
"""The PEs of one stage of one replica: PE i has rank i."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Topology:
    """Where everything runs."""

    tensor_parallel_size: int
    """The number of PEs that share each matrix."""
    pipeline_parallel_size: int
    """The number of stages of a replica."""
    data_parallel_size: int
    """The number of replicas."""
    replicas: tuple[tuple[StagePEs, ...], ...]
    """`replicas[replica][stage]` are the PEs of that stage, in the order of their ranks."""

    @property
    def pes(self) -> tuple[PE, ...]:
        """Every PE that is used, sorted."""
        return tuple(sorted(pe for stages in self.replicas for group in stages for pe in group))

    def __str__(self) -> str:
        sizes = f"tp {self.tensor_parallel_size} x pp {self.pipeline_parallel_size} x dp {self.data_parallel_size}"
        return f"{sizes} = {counted(len(self.pes), 'PE')} on {format_pes(self.pes)}"

    def as_dict(self) -> dict[str, int | str]:
        """The sizes, and the PEs as `devices`."""
        return {
            "tensor_parallel_size": self.tensor_parallel_size,
            "pipeline_parallel_size": self.pipeline_parallel_size,
            "data_parallel_size": self.data_parallel_size,
            "devices": format_pes(self.pes),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """Arguments of `make_topology` that it accepts."""

    text: str
    """How a person gives the arguments that differ from the refused ones."""
    pipeline_parallel_size: int
    data_parallel_size: int | None
    devices: str


class RefusedTopologyError(TopologyError):
    """`choices` are what `make_topology` accepts instead, with everything else as it was asked for."""

    def __init__(self, message: str, choices: tuple[Choice, ...] = ()) -> None:
        super().__init__(message)
        self.choices = choices


class _RuleError(Exception):
    """The rule gives no topology; its text is the reason."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Request:
    """What was asked for, with defaults filled in."""

    tensor: int
    pipeline: int
    data: int | None
    """The data parallel size; None: it is to be inferred."""
    pes: tuple[PE, ...]
    allow_subset: bool
    most_stages: int
    """The most stages that a refusal suggests."""

    @property
    def replicas(self) -> int:
        """The replicas asked for, or that the PEs are enough for."""
        return len(self.pes) // (self.tensor * self.pipeline) if self.data is None else self.data

    @property
    def product(self) -> int:
        return self.tensor * self.pipeline * self.replicas


def make_topology(
    tensor_parallel_size: int,
    *,
    pipeline_parallel_size: int | None = None,
    data_parallel_size: int | None = None,
    devices: str | Sequence[str] | None = None,
    allow_subset: bool = False,
    max_pipeline_parallel_size: int | None = None,
) -> Topology:
    """The topology of an artifact for `tensor_parallel_size` (1, 2, 4 or 8) on `devices` (see `parse_devices`).

    `pipeline_parallel_size` None is 1. `data_parallel_size` None is as many replicas as the PEs are enough for.
    `devices` None is a machine of exactly the PEs that the sizes need (of one replica, if none are asked for). tensor x
    pipeline x data parallel size must be the number of PEs, or with `allow_subset` at most that, and then the first PEs
    are used; stages of a replica must be on ever later cards. More stages than `max_pipeline_parallel_size` are not
    suggested: give the number of the artifact's blocks.

    Raises DeviceError for a bad device string; TopologyError for a size that is no size; and RefusedTopologyError,
    which lists what would be accepted, where sizes and devices do not go together.
    """
    _check_sizes(tensor_parallel_size, pipeline_parallel_size, data_parallel_size)
    stages = pipeline_parallel_size or 1
    made = _machine(tensor_parallel_size, stages, data_parallel_size or 1)
    pes = made if devices is None else parse_devices(devices)
    request = _Request(
        tensor=tensor_parallel_size,
        pipeline=stages,
        data=data_parallel_size,
        pes=pes,
        allow_subset=allow_subset,
        most_stages=min(len(_cards(pes)), max_pipeline_parallel_size or len(pes)),
    )
    try:
        return _mesh(request)
    except _RuleError as reason:
        choices = tuple(_choices(request))
        text = ", ".join(choice.text for choice in choices[:-1])
        listed = f"{text}, or {choices[-1].text}" if text else choices[-1].text
        raise RefusedTopologyError(f"{reason}: use {listed}", choices) from None


def _check_sizes(tensor: int, pipeline: int | None, data: int | None) -> None:
    if tensor > PES_PER_CARD and tensor % PES_PER_CARD == 0:
        raise TopologyError(f"Inter-chip TP is not implemented yet: tp={tensor}, but a card has {PES_PER_CARD} PEs")
    if tensor not in FUSIBLE:
        raise TopologyError(f"Tensor parallelism degree must be 1, 2, 4 or 8, got {tensor}")
    for name, size in (("pipeline", pipeline), ("data", data)):
        if size is not None and size < 1:
            raise TopologyError(f"{name}_parallel_size must be at least 1, got {size}")
    cards = (pipeline or 1) * -(-(data or 1) * tensor // PES_PER_CARD)
    if cards > MAX_CARDS:
        raise TopologyError(
            f"{tensor} x {pipeline or 1} x {data or 1} PEs are more than the {MAX_CARDS} cards that can be simulated; "
            f"use smaller sizes"
        )


# -- the rule ------------------------------------------------------------------------------------------------------


def _mesh(request: _Request) -> Topology:
    """The vendor's rule; raises _RuleError."""
    count = len(request.pes)
    if request.product > count or not request.replicas:
        raise _RuleError(f"{'Not enough devices to run the model: ' if request.allow_subset else ''}{_sum(request)}")
    if request.product < count and not request.allow_subset:
        raise _RuleError(_sum(request))
    unused = _fuse(request.pes[: request.product], request.tensor)
    replicas = tuple(_take_stages(unused, request) for _ in range(request.replicas))
    return Topology(
        tensor_parallel_size=request.tensor,
        pipeline_parallel_size=request.pipeline,
        data_parallel_size=request.replicas,
        replicas=replicas,
    )


def _fuse(pes: Sequence[PE], size: int) -> list[StagePEs]:
    groups = [tuple(pes[start : start + size]) for start in range(0, len(pes), size)]
    for group in groups:
        first = group[0]
        if first.index % size:
            raise _RuleError(
                f"Invalid start pe index for fusion: {first.index}, but {size} PEs work as one from a multiple of "
                f"{size} on, and {format_pes(group)} begin at {first}"
            )
        for offset, found in enumerate(group):
            expected = PE(npu=first.npu, index=first.index + offset)
            if found != expected:
                raise _RuleError(
                    f"Unexpected pe index. Expected: {expected}, actual: {found}, because {size} PEs that work as one "
                    f"are consecutive on one card"
                )
    return groups


def _take_stages(unused: list[StagePEs], request: _Request) -> tuple[StagePEs, ...]:
    """The groups of the next replica, which are removed from `unused`."""
    stages: list[StagePEs] = []
    for stage in range(request.pipeline):
        group = next((g for g in unused if not stages or g[0].npu > stages[-1][0].npu), None)
        if group is None:
            raise _RuleError(
                f"Cannot form a proper pp group: pp={request.pipeline} wants each stage on a later card than the one "
                f"before, but of {format_pes(request.pes)} nothing free is behind npu:{stages[-1][0].npu} for stage "
                f"{stage}"
            )
        unused.remove(group)
        stages.append(group)
    return tuple(stages)


def _machine(tensor: int, pipeline: int, data: int) -> tuple[PE, ...]:
    """The PEs of the smallest machine: every run of `pipeline` cards holds as many replicas as fit side by side."""
    side_by_side = PES_PER_CARD // tensor
    return tuple(
        sorted(
            PE(npu=replica // side_by_side * pipeline + stage, index=replica % side_by_side * tensor + rank)
            for replica in range(data)
            for stage in range(pipeline)
            for rank in range(tensor)
        )
    )


# -- refusals ------------------------------------------------------------------------------------------------------


def _sum(request: _Request) -> str:
    where = f"{format_pes(request.pes)} {'has' if len(_cards(request.pes)) == 1 else 'have'} {len(request.pes)} PEs"
    if not request.replicas:
        return f"{request.tensor} x {request.pipeline} = {request.tensor * request.pipeline}, but {where}"
    return f"{request.tensor} x {request.pipeline} x {request.replicas} = {request.product}, but {where}"


def _choices(request: _Request) -> Iterator[Choice]:
    """What is accepted when one size is changed, or both where one is not enough; and devices for the sizes given."""
    sizes = [*filter(_is_accepted, _other_sizes(request))] or [*filter(_is_accepted, _both_sizes(request))][:1]
    for other in (*sizes, *[*filter(_is_accepted, _other_devices(request))][:1]):
        yield Choice(
            text=_difference(request, other),
            pipeline_parallel_size=other.pipeline,
            data_parallel_size=other.data,
            devices=format_pes(other.pes),
        )


def _is_accepted(request: _Request) -> bool:
    try:
        _mesh(request)
    except _RuleError:
        return False
    return True


def _other_sizes(request: _Request) -> Iterator[_Request]:
    most = len(request.pes) // (request.tensor * request.pipeline)
    if request.data is not None and most and most != request.data:
        yield dataclasses.replace(request, data=most)
    for stages in range(1, request.most_stages + 1):
        if stages != request.pipeline:
            yield dataclasses.replace(request, pipeline=stages)


def _both_sizes(request: _Request) -> Iterator[_Request]:
    for stages in range(1, request.most_stages + 1):
        if most := len(request.pes) // (request.tensor * stages):
            yield dataclasses.replace(request, pipeline=stages, data=most)


def _other_devices(request: _Request) -> Iterator[_Request]:
    """The first cards of those given, then a machine made for the sizes."""
    cards = _cards(request.pes)
    for last in cards[:-1]:
        yield dataclasses.replace(request, pes=tuple(pe for pe in request.pes if pe.npu <= last))
    yield dataclasses.replace(request, pes=_machine(request.tensor, request.pipeline, request.data or 1))


def _difference(request: _Request, other: _Request) -> str:
    if other.pes != request.pes:
        return f"--devices {format_pes(other.pes)}"
    pipeline = f"pp={other.pipeline}" if other.pipeline != request.pipeline else ""
    data = f"dp={other.data}" if other.data != request.data else ""
    return " with ".join(filter(None, (pipeline, data)))


def _cards(pes: Sequence[PE]) -> list[int]:
    return sorted({pe.npu for pe in pes})
