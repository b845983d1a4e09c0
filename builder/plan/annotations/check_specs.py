"""Check each annotation by itself: configurations, devices, axes, and shapes."""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence

import onnx

from furiosa_llm.builder.plan.annotations.device_placement import DeviceSpec, placement_from
from furiosa_llm.builder.plan.annotations.emit import FIRST_IR_VERSION, UNEVEN_CEIL, UNEVEN_KEY
from furiosa_llm.builder.plan.annotations.finding import Finding, error, warning
from furiosa_llm.builder.plan.annotations.nodes import (
    Annotation,
    DeclaredShape,
    annotations_of,
    devices_of,
    label_of,
    nodes_of,
)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Placed:
    """A well-formed spec: where a node wants one of its tensors."""

    annotation: Annotation
    tensor: str
    placement: DeviceSpec


def check_configurations(model: onnx.ModelProto) -> Iterator[Finding]:
    """What the model says of its device configurations."""
    for configuration in model.configuration:
        yield from _check_configuration(configuration)
    for name, count in collections.Counter(c.name for c in model.configuration if c.name).items():
        if count > 1:
            yield error("", "", f'{count} device configurations are named "{name}"', "give each a name of its own")
    annotations = list(annotations_of(model))
    if (model.configuration or annotations) and model.ir_version < FIRST_IR_VERSION:
        yield error(
            "",
            "",
            f"the model has IR version {model.ir_version}, but multi-device annotations exist from version "
            f"{FIRST_IR_VERSION} on, so that readers may ignore or refuse them",
            f"set the model's ir_version to {FIRST_IR_VERSION}",
        )
    used = {annotation.configuration for annotation in annotations}
    for configuration in model.configuration:
        if configuration.name and configuration.name not in used:
            yield warning(
                "",
                "",
                f'no node has annotations for configuration "{configuration.name}"',
                "annotate the nodes for it, or remove it",
            )


def _check_configuration(configuration: onnx.DeviceConfigurationProto) -> Iterator[Finding]:
    if not configuration.name:
        yield error("", "", "a device configuration has no name", "give it the name that the nodes refer to")
    named = f'configuration "{configuration.name}"'
    if configuration.num_devices < 1:
        yield error(
            "",
            "",
            f"{named} has num_devices {configuration.num_devices}, expected at least 1",
            "set num_devices to the number of devices",
        )
    if configuration.device and len(configuration.device) != configuration.num_devices:
        yield error(
            "",
            "",
            f"{named} has num_devices {configuration.num_devices} and {len(configuration.device)} device names",
            "name every device, or none",
        )
    for name, count in collections.Counter(configuration.device).items():
        if count > 1:
            yield warning("", "", f'{named} names {count} devices "{name}"', "give each device a name of its own")


def check_specs(model: onnx.ModelProto, shapes: Mapping[str, DeclaredShape]) -> tuple[list[Finding], list[Placed]]:
    """Check every spec by itself; returns the findings, and what the specs without errors mean."""
    configurations = {c.name: c.num_devices for c in model.configuration}
    uneven = any(entry.key == UNEVEN_KEY and entry.value == UNEVEN_CEIL for entry in model.metadata_props)
    findings: list[Finding] = []
    placed: list[Placed] = []
    padded: list[Finding] = []
    for node, _ in nodes_of(model):
        counts = collections.Counter(entry.configuration_id for entry in node.device_configurations)
        for name in (name for name, count in counts.items() if count > 1):
            findings.append(
                error(
                    label_of(node),
                    "",
                    f'the node has {counts[name]} annotations for configuration "{name}"',
                    "put all of its sharding specs into one",
                )
            )
    for annotation in annotations_of(model):
        checker = _SpecChecker(annotation, configurations, {} if annotation.is_inner else shapes, uneven=uneven)
        findings += checker.check_annotation()
        for spec in annotation.specs:
            found = list(checker.check_spec(spec))
            findings += found
            shape = checker.shape_of(spec)
            if shape is not None and not any(finding.severity == "error" for finding in found):
                sizes = [dim if isinstance(dim, int) else None for dim in shape]
                placement = placement_from(spec, sizes)
                placed.append(Placed(annotation=annotation, tensor=spec.tensor_name, placement=placement))
        padded += checker.padded
    if padded:
        more = f" (and {len(padded) - 1} more such axes)" if len(padded) > 1 else ""
        findings.append(dataclasses.replace(padded[0], what=padded[0].what + more))
    return findings, placed


class _SpecChecker:
    """Checks what one node says for one configuration."""

    def __init__(
        self,
        annotation: Annotation,
        configurations: Mapping[str, int],
        shapes: Mapping[str, DeclaredShape],
        *,
        uneven: bool,
    ) -> None:
        self._annotation = annotation
        self._configurations = configurations
        self._num_devices = configurations.get(annotation.configuration)
        self._shapes = shapes
        self._uneven = uneven
        self.padded: list[Finding] = []
        """Findings of uneven shards for which the model says how they are padded."""

    def shape_of(self, spec: onnx.ShardingSpecProto) -> DeclaredShape | None:
        """The shape of the spec's tensor, if it is known."""
        return self._shapes.get(spec.tensor_name)

    def _error(self, tensor: str, what: str, remedy: str) -> Finding:
        return error(self._annotation.label, tensor, what, remedy)

    def _warning(self, tensor: str, what: str, remedy: str) -> Finding:
        return warning(self._annotation.label, tensor, what, remedy)

    def check_annotation(self) -> Iterator[Finding]:
        """What the node says besides its specs."""
        name, known = self._annotation.configuration, sorted(self._configurations)
        if not name:
            yield self._error("", "an annotation names no configuration", f"set configuration_id to one of {known}")
        elif name not in self._configurations:
            yield self._error(
                "",
                f'configuration_id "{name}" is not a configuration of the model, which has {known or "none"}',
                f'add a device configuration "{name}" to the model, or refer to one that it has',
            )
        stage = self._annotation.stage
        if stage is not None and stage < 0:
            yield self._error("", f"pipeline_stage is {stage}, expected 0 or more", "count stages from 0")
        if stage is None and not self._annotation.specs:
            yield self._warning("", f'the annotation for "{name}" says nothing', "remove it, or add sharding specs")
        counts = collections.Counter(spec.tensor_name for spec in self._annotation.specs)
        for tensor, count in counts.items():
            if tensor and count > 1:
                yield self._error(tensor, f"the node has {count} sharding specs for this tensor", "keep one of them")

    def check_spec(self, spec: onnx.ShardingSpecProto) -> Iterator[Finding]:
        """One spec by itself."""
        tensor = spec.tensor_name
        if not tensor:
            yield self._error("", "a sharding spec has no tensor_name", "name an input or output of the node")
            return
        operands = (*self._annotation.node.input, *self._annotation.node.output)
        if tensor not in operands:
            listed = ", ".join(f'"{name}"' for name in operands if name)
            yield self._error(
                tensor,
                f'the sharding spec is of "{tensor}", which is neither an input nor an output of the node',
                f"name one of {listed}",
            )
            return
        yield from self._check_devices(spec)
        shape = self.shape_of(spec)
        if shape is None and not self._annotation.is_inner:
            yield self._warning(
                tensor,
                "the tensor's shape is not known, so that its axes cannot be checked",
                "add a value_info with its shape, or infer shapes before annotating",
            )
        yield from self._check_axes(spec, shape)
        yield from self._check_count(spec)

    # -- devices -------------------------------------------------------------------------------------------------

    def _check_devices(self, spec: onnx.ShardingSpecProto) -> Iterator[Finding]:
        tensor = spec.tensor_name
        if not spec.device:
            yield self._error(tensor, "the spec lists no devices", "list a device, or a device group, for each shard")
        keys = collections.Counter(entry.key for entry in spec.index_to_device_group_map)
        for key, count in keys.items():
            if count > 1:
                yield self._error(
                    tensor, f"index_to_device_group_map has {count} entries for key {key}", "keep one of them"
                )
            if key not in spec.device:
                yield self._warning(
                    tensor,
                    f"device group {key} is defined, but the device list {list(spec.device)} does not use it",
                    "use it, or remove its entry",
                )
        for entry in spec.index_to_device_group_map:
            if not entry.value:
                yield self._error(tensor, f"device group {entry.key} is empty", "list the group's devices")
        for key in dict.fromkeys(key for key in spec.device if key < 0 and key not in keys):
            yield self._error(
                tensor,
                f"{key} in the device list is neither a device nor a key of index_to_device_group_map, which has "
                f"{sorted(keys) or 'none'}",
                f"add an entry with key {key}, or name devices by their numbers",
            )
        yield from self._check_numbers(spec, set(keys))

    def _check_numbers(self, spec: onnx.ShardingSpecProto, keys: set[int]) -> Iterator[Finding]:
        used = [
            d
            for key, group in zip(spec.device, devices_of(spec), strict=True)
            for d in group
            if key >= 0 or key in keys
        ]
        for device, count in collections.Counter(used).items():
            if self._num_devices is not None and not 0 <= device < self._num_devices:
                yield self._error(
                    spec.tensor_name,
                    f'device {device} is out of range: configuration "{self._annotation.configuration}" has '
                    f"{self._num_devices} devices",
                    f"use device numbers from 0 to {self._num_devices - 1}",
                )
            if count > 1:
                yield self._error(
                    spec.tensor_name,
                    f"device {device} is listed {count} times",
                    "give every device one shard: list it once, in one group",
                )

    # -- axes ----------------------------------------------------------------------------------------------------

    def _check_axes(self, spec: onnx.ShardingSpecProto, shape: DeclaredShape | None) -> Iterator[Finding]:
        seen: set[int] = set()
        for dim in spec.sharded_dim:
            if not dim.HasField("axis"):
                yield self._error(spec.tensor_name, "a sharded_dim has no axis", "say which axis is sharded")
                continue
            axis = dim.axis
            if shape is not None:
                if not -len(shape) <= axis < len(shape):
                    yield self._error(spec.tensor_name, *_out_of_range(axis, shape))
                    continue
                axis %= len(shape)
            if axis in seen:
                yield self._error(
                    spec.tensor_name,
                    f"axis {axis} has several sharded_dim entries",
                    "keep one; several simple_sharding entries in it describe an axis that was fused of several",
                )
            seen.add(axis)
            yield from self._check_shards(spec.tensor_name, dim, None if shape is None else shape[axis])

    def _check_shards(self, tensor: str, dim: onnx.ShardedDimProto, size: int | str | None) -> Iterator[Finding]:
        if not dim.simple_sharding:
            yield self._error(
                tensor,
                f"axis {dim.axis} has no simple_sharding",
                "say into how many shards it is split, or leave it out",
            )
            return
        for simple in dim.simple_sharding:
            if simple.num_shards < 1:
                yield self._error(
                    tensor,
                    f"num_shards of axis {dim.axis} is {simple.num_shards}, expected at least 1",
                    "set num_shards to the number of shards",
                )
                return
        sizes = [s.dim_value if s.HasField("dim_value") else None for s in dim.simple_sharding]
        if any(n is not None and n < 1 for n in sizes):
            yield self._error(tensor, f"dim_value of axis {dim.axis} is less than 1", "give the axis' size")
            return
        yield from self._check_sizes(tensor, dim, sizes, size)
        if isinstance(size, int) and sizes.count(None) == 1:
            given = math.prod(n for n in sizes if n is not None)
            sizes = [size // given if n is None else n for n in sizes]
        for n, simple in zip(sizes, dim.simple_sharding, strict=True):
            if n is not None and n % simple.num_shards:
                yield from self._check_uneven(tensor, dim.axis, n, simple.num_shards)

    def _check_sizes(
        self, tensor: str, dim: onnx.ShardedDimProto, sizes: Sequence[int | None], size: int | str | None
    ) -> Iterator[Finding]:
        """What the spec says of the axis' size, against the tensor's shape."""
        given = math.prod(n for n in sizes if n is not None)
        is_wrong = isinstance(size, int) and (given != size if None not in sizes else bool(size % given))
        if is_wrong:
            yield self._error(
                tensor,
                f"dim_value of axis {dim.axis} multiplies to {given}, but the axis has size {size}",
                f"make the dim_value entries multiply to {size}, or leave them out",
            )
        symbols = [s.dim_param for s in dim.simple_sharding if s.HasField("dim_param")]
        if len(dim.simple_sharding) == 1 and symbols and size is not None and symbols[0] != size:
            yield self._warning(
                tensor,
                f'dim_param of axis {dim.axis} is "{symbols[0]}", but the tensor\'s shape says {size!r}',
                "use the name that the shape uses, or leave it out",
            )

    def _check_uneven(self, tensor: str, axis: int, size: int, shards: int) -> Iterator[Finding]:
        what = f"{size} on axis {axis} is not divisible by num_shards {shards}"
        if self._uneven:
            count = -(-size // shards)
            self.padded.append(
                self._warning(
                    tensor,
                    f"{what}: as the model's metadata say, shards have {count}, and the last ones less or none",
                    "make sure that the backend pads uneven shards at the end",
                )
            )
            return
        common = math.gcd(size, shards)
        split = f"split it by {common}, with a group of {shards // common} devices for each shard"
        yield self._error(
            tensor,
            f"{what}; the standard leaves uneven shards to the backend",
            f"{split if common > 1 else 'leave the axis whole'}, or pad it to {-(-size // shards) * shards}",
        )

    def _check_count(self, spec: onnx.ShardingSpecProto) -> Iterator[Finding]:
        shards = math.prod(max(s.num_shards, 1) for dim in spec.sharded_dim for s in dim.simple_sharding)
        if spec.device and shards > 1 and shards != len(spec.device):
            yield self._error(
                spec.tensor_name,
                f"the axes are split into {shards} shards, but the device list has {len(spec.device)} entries",
                "list one device, or one device group, for each shard",
            )


def _out_of_range(axis: int, shape: DeclaredShape) -> tuple[str, str]:
    if not shape:
        return f"axis {axis} of a scalar is sharded", "leave sharded_dim out: a scalar can only be replicated"
    return (
        f"axis {axis} is out of range: the tensor has {len(shape)} dimensions",
        f"use an axis from {-len(shape)} to {len(shape) - 1}",
    )
