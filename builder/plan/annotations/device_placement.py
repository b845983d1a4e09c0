"""Which device holds which part of a tensor: the meaning of ONNX's sharding specs, in one form for each meaning.

A sharding spec (onnx.in.proto, ShardingSpecProto) lists split axes and, in row-major order of the shards, a device or
a group of devices for each. An axis may be the row-major product of several components, each with a number of shards
of its own; a component whose size is no multiple of them has shards of ceil(size / shards), the last ones smaller.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Literal

import onnx

from furiosa_llm.runtime.artifact.layout import Mesh

Relation = Literal["same", "gather", "slice", "exchange", "elsewhere"]
"""How a tensor gets from one placement to another. `gather`: devices receive what others hold; `slice`: every device
keeps a part of what it has; `exchange`: neither; `elsewhere`: other devices."""


@dataclasses.dataclass(frozen=True, slots=True)
class Component:
    """A factor of an axis in a plan."""

    size: int | None
    """Its size; None if it is dynamic."""
    mesh_axes: tuple[int, ...] = ()
    """The mesh axes that it is split over."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """A component of an axis, and who holds which of its parts."""

    axis: int
    """The axis, counted from the front. Components of one axis follow each other, the slowest first."""
    size: int | None
    """The component's size; None if it is dynamic."""
    parts: int
    """Into how many parts it is split; 1 if it is whole."""
    positions: tuple[int, ...]
    """For every device, in the order of `DeviceSpec.devices`, the part that it holds."""

    @property
    def is_even(self) -> bool:
        """Whether all parts are equally large, as far as the size is known."""
        return self.size is None or self.size % self.parts == 0


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class DeviceSpec:
    """Which device holds which part of a tensor; two placements are equal if they mean the same."""

    devices: tuple[int, ...]
    """The devices that hold a part, ascending."""
    splits: tuple[Split, ...]
    """The components of the axes that are split; axes that are not listed are whole on every device."""

    def of_axis(self, axis: int) -> tuple[Split, ...]:
        """The components of one axis; none if it is whole."""
        return tuple(split for split in self.splits if split.axis == axis)

    def parts(self, axis: int) -> int:
        """Into how many parts an axis is split."""
        return math.prod(split.parts for split in self.of_axis(axis))

    def describe(self) -> str:
        """The placement in words: `axis 1 split by 4`, or `whole on every device`."""
        axes = sorted({split.axis for split in self.splits})
        found = [f"axis {axis} split by {self.parts(axis)}" for axis in axes]
        return " and ".join(found) or "whole on every device"


def placement_of(axes: Sequence[Sequence[Component] | None], mesh: Mesh, *, first_device: int = 0) -> DeviceSpec | None:
    """The placement of a tensor, given the product that each of its axes is; None if no sharding spec can express it.

    No spec can express an axis that is no product (None): a concatenation whose segments are each split, for instance
    packed query, key and value projections, because no device's part of it is a block of the axis.
    """
    raw: list[Split] = []
    for axis, components in enumerate(axes):
        if components is None:
            return None
        for component in components:
            positions = tuple(mesh.position(rank, component.mesh_axes) for rank in range(mesh.size))
            parts = mesh.parts(component.mesh_axes)
            raw.append(Split(axis=axis, size=component.size, parts=parts, positions=positions))
    devices = tuple(range(first_device, first_device + mesh.size))
    placement = DeviceSpec(devices=devices, splits=_merged(raw))
    return placement if all(_shards(placement)) else None


def placement_from(spec: onnx.ShardingSpecProto, shape: Sequence[int | None]) -> DeviceSpec:
    """What a well-formed spec of a tensor of `shape` (None: dynamic) means."""
    groups = {entry.key: tuple(entry.value) for entry in spec.index_to_device_group_map}
    flat = [(dim.axis % len(shape), simple) for dim in spec.sharded_dim for simple in dim.simple_sharding]
    shards = list(itertools.product(*(range(simple.num_shards) for _, simple in flat)))
    if len(shards) == 1:  # replicated: each entry is a copy, however many there are
        shards *= len(spec.device)
    held = {d: index for key, index in zip(spec.device, shards, strict=True) for d in groups.get(key, (key,))}
    devices = tuple(sorted(held))
    raw = [
        Split(
            axis=axis,
            size=simple.dim_value if simple.HasField("dim_value") else None,
            parts=simple.num_shards,
            positions=tuple(held[device][column] for device in devices),
        )
        for column, (axis, simple) in enumerate(flat)
    ]
    raw.sort(key=lambda split: split.axis)
    return DeviceSpec(devices=devices, splits=_merged(_with_sizes(raw, shape)))


def _with_sizes(splits: Sequence[Split], shape: Sequence[int | None]) -> list[Split]:
    """The components; where one component of an axis has no size, its size follows from the axis' size."""
    filled: list[Split] = []
    for split in splits:
        siblings = [other for other in splits if other.axis == split.axis]
        others = [other.size for other in siblings if other is not split]
        total = shape[split.axis]
        if split.size is None and total is not None and None not in others:
            filled.append(dataclasses.replace(split, size=total // math.prod(n for n in others if n is not None)))
        else:
            filled.append(split)
    return filled


def _merged(splits: Sequence[Split]) -> tuple[Split, ...]:
    """The fewest components that say the same; axes that are not split are left out."""
    kept: list[Split] = []
    for axis, group in itertools.groupby(splits, key=lambda split: split.axis):
        components: list[Split] = []
        for split in group:
            if split.size == 1 and split.parts == 1:
                continue
            while components and _are_one(components[-1], split):
                before = components.pop()
                split = _joined(axis, before, split)
            components.append(split)
        if any(split.parts > 1 for split in components):
            kept += components
    return tuple(kept)


def _are_one(outer: Split, inner: Split) -> bool:
    """Whether the parts of two neighbouring components are those of one component."""
    if outer.parts == inner.parts == 1:
        return True
    if outer.size is None or inner.size is None or not inner.is_even:
        return False
    return outer.size == outer.parts or (inner.parts == 1 and outer.is_even)


def _joined(axis: int, outer: Split, inner: Split) -> Split:
    return Split(
        axis=axis,
        size=None if outer.size is None or inner.size is None else outer.size * inner.size,
        parts=outer.parts * inner.parts,
        positions=tuple(p * inner.parts + q for p, q in zip(outer.positions, inner.positions, strict=True)),
    )


def _shards(placement: DeviceSpec) -> list[list[int]]:
    """The devices that hold each shard, in row-major order of the shards."""
    held: dict[tuple[int, ...], list[int]] = {}
    for number, device in enumerate(placement.devices):
        held.setdefault(tuple(split.positions[number] for split in placement.splits), []).append(device)
    return [held.get(index, []) for index in itertools.product(*(range(split.parts) for split in placement.splits))]


def to_proto(tensor: str, placement: DeviceSpec) -> onnx.ShardingSpecProto:
    """The sharding spec of `tensor`."""
    spec = onnx.ShardingSpecProto(tensor_name=tensor)
    shards = _shards(placement)
    if all(len(devices) == 1 for devices in shards):
        spec.device.extend(devices[0] for devices in shards)
    else:
        for number, devices in enumerate(shards, start=1):
            spec.device.append(-number)
            spec.index_to_device_group_map.add(key=-number, value=devices)
    for axis, splits in itertools.groupby(placement.splits, key=lambda split: split.axis):
        dim = spec.sharded_dim.add(axis=axis)
        for split in splits:
            simple = dim.simple_sharding.add(num_shards=split.parts)
            if split.size is not None:
                simple.dim_value = split.size
    return spec


# -- from one placement to another -------------------------------------------------------------------------------


def relation(before: DeviceSpec, after: DeviceSpec) -> Relation:
    """How a tensor placed as `before` gets to where `after` wants it."""
    if before == after:
        return "same"
    if before.devices != after.devices:
        return "elsewhere"
    if all(_is_within(before, after, device) for device in range(len(before.devices))):
        return "gather"
    if all(_is_within(after, before, device) for device in range(len(before.devices))):
        return "slice"
    return "exchange"


def _is_within(small: DeviceSpec, large: DeviceSpec, device: int) -> bool:
    """Whether what a device holds under `small` is part of what it holds under `large`."""
    return all(
        _is_axis_within(small.of_axis(axis), large.of_axis(axis), device)
        for axis in {split.axis for split in large.splits}
    )


def _is_axis_within(small: Sequence[Split], large: Sequence[Split], device: int) -> bool:
    if len(small) == len(large) == 1:
        (first, last), (start, stop) = _interval(small[0], device), _interval(large[0], device)
        return start <= first and last <= stop
    alike = [(split.size, split.parts) for split in small] == [(split.size, split.parts) for split in large]
    return alike and all(s.positions[device] == g.positions[device] for s, g in zip(small, large, strict=True))


def _interval(split: Split, device: int) -> tuple[Fraction, Fraction]:
    """The run of the component that a device holds, as fractions of the component."""
    position = split.positions[device]
    if split.size is None or split.is_even:
        return Fraction(position, split.parts), Fraction(position + 1, split.parts)
    count = -(-split.size // split.parts)
    return Fraction(min(position * count, split.size), split.size), Fraction(
        min((position + 1) * count, split.size), split.size
    )
