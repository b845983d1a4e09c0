"""Write a plan into the unsplit model as ONNX IR-11 multi-device annotations."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

import onnx
import onnx_ir as ir

from furiosa_llm.builder.errors import OutputError
from furiosa_llm.builder.factors.analysis import Analysis
from furiosa_llm.builder.factors.factor import Factor, Kind
from furiosa_llm.builder.plan.annotations.correspondence import Correspondence
from furiosa_llm.builder.plan.annotations.device_placement import Component, DeviceSpec, placement_of, to_proto
from furiosa_llm.builder.plan.outcome import Assignment, Outcome
from furiosa_llm.builder.source.load import Source
from furiosa_llm.runtime.artifact.graphs import all_tensors
from furiosa_llm.runtime.artifact.layout import Mesh
from furiosa_llm.runtime.artifact.temporary import replace_file
from furiosa_llm.runtime.placement.devices import first_pes

FIRST_IR_VERSION = 11
"""The first version of the format that has these annotations."""
UNEVEN_KEY = "furiosa_llm.uneven_shards"
"""Model metadata: what becomes of an axis that its shards do not divide, which the standard leaves to the backend."""
UNEVEN_CEIL = "ceil"
"""Every shard has ceil(size / shards) indices, and what goes beyond the axis is padding."""
UNSAID_KEY = "furiosa_llm.not_annotated"
"""Node metadata: the tensors that are split in a way that no sharding spec can say."""


def configuration_name(tensor_parallel_size: int, num_stages: int = 1) -> str:
    """The name of the device configuration: `furiosa-tp4`, or `furiosa-tp4-pp2`."""
    return f"furiosa-tp{tensor_parallel_size}" + (f"-pp{num_stages}" if num_stages > 1 else "")


def annotate(
    source: Source,
    analysis: Analysis,
    assignment: Assignment,
    outcome: Outcome,
    mesh: Mesh,
    *,
    stages: Mapping[str, int] | None = None,
) -> onnx.ModelProto:
    """The model of `source`, unsplit and unchanged, with the plan as annotations of its nodes.

    Every node that the analysed graph still has gets a sharding spec for each tensor of data with dimensions, split or
    replicated. An input that the node needs whole is replicated there, and partial results are placed where their sum
    will lie. Tensors that no sharding spec can describe are left out, and named in the node's metadata under
    UNSAID_KEY. `stages` maps names of values to the pipeline stages of the nodes that compute them; other nodes run in
    the first stage that needs them. Stage s uses the devices s * tp to s * tp + tp - 1.
    """
    model = onnx.load(source.path, load_external_data=False)
    num_stages = max(stages.values(), default=0) + 1 if stages else 1
    name = configuration_name(mesh.size, num_stages)
    writer = _Writer(analysis, assignment, outcome, mesh, Correspondence(model.graph, analysis.graph), name)
    node_stages = _node_stages(model.graph, stages) if stages and num_stages > 1 else None
    for position, node in enumerate(model.graph.node):
        writer.annotate(node, None if node_stages is None else node_stages[position])
    _declare(model, name, mesh.size * num_stages)
    if writer.is_uneven:
        _set_metadata(model, UNEVEN_KEY, UNEVEN_CEIL)
    model.ir_version = max(model.ir_version, FIRST_IR_VERSION)
    return model


def _declare(model: onnx.ModelProto, name: str, num_devices: int) -> None:
    for number in reversed(range(len(model.configuration))):
        if model.configuration[number].name == name:
            del model.configuration[number]
    devices = [str(pe) for pe in first_pes(num_devices)]
    model.configuration.add(name=name, num_devices=num_devices, device=devices)


def _set_metadata(owner: onnx.ModelProto | onnx.NodeProto, key: str, value: str | None) -> None:
    """Set a metadata entry, or remove it."""
    for number in reversed(range(len(owner.metadata_props))):
        if owner.metadata_props[number].key == key:
            del owner.metadata_props[number]
    if value is not None:
        owner.metadata_props.add(key=key, value=value)


class _Writer:
    """Writes the annotations of nodes, one at a time."""

    def __init__(
        self,
        analysis: Analysis,
        assignment: Assignment,
        outcome: Outcome,
        mesh: Mesh,
        correspondence: Correspondence,
        configuration: str,
    ) -> None:
        self.is_uneven = False
        self._analysis, self._outcome, self._mesh = analysis, outcome, mesh
        self._assignment = assignment
        # A leaf of an axis of fixed size is of fixed size, wherever it occurs.
        self._fixed = {
            leaf
            for value, dims in analysis.dims.items()
            for d, factor in enumerate(dims)
            if not analysis.is_dynamic(value, d)
            for leaf in factor.leaves()
        }
        self._correspondence = correspondence
        self._configuration = configuration
        self._placements: dict[tuple[ir.Value, tuple[int, ...], int], DeviceSpec | None] = {}

    def annotate(self, node: onnx.NodeProto, stage: int | None) -> None:
        """Annotate one node; one without a counterpart gets its stage, if there is any."""
        for number in reversed(range(len(node.device_configurations))):
            if node.device_configurations[number].configuration_id == self._configuration:
                del node.device_configurations[number]
        specs: dict[str, onnx.ShardingSpecProto] = {}
        unsaid: dict[str, None] = {}
        for name, placement in self._operands(node, (stage or 0) * self._mesh.size):
            if placement is None:
                unsaid[name] = None
            elif name not in specs:
                specs[name] = to_proto(name, placement)
                self.is_uneven = self.is_uneven or not all(split.is_even for split in placement.splits)
        if specs or stage is not None:
            entry = node.device_configurations.add(configuration_id=self._configuration)
            entry.sharding_spec.extend(spec for name, spec in specs.items() if name not in unsaid)
            if stage is not None:
                entry.pipeline_stage = stage
        _set_metadata(node, UNSAID_KEY, ", ".join(unsaid) or None)

    def _operands(self, node: onnx.NodeProto, first_device: int) -> Iterator[tuple[str, DeviceSpec | None]]:
        """Every tensor of the node that holds data and has a counterpart, with its placement there."""
        counterpart = self._correspondence.node(node)
        step = self._outcome.steps.get(counterpart) if counterpart is not None else None
        for name, port, is_output, value in self._correspondence.operands(node):
            fact = self._analysis.facts.get(value)
            # Sizes and positions that are known before the program runs are not data: every device has them.
            if fact is None or not fact.shape or (fact.value is not None and not fact.dtype.is_floating_point()):
                continue
            whole = step.gather.get(port, ()) if step is not None and not is_output else ()
            yield name, self._placement(value, whole, first_device)

    def _placement(self, value: ir.Value, whole: Collection[int], first_device: int) -> DeviceSpec | None:
        key = (value, tuple(whole), first_device)
        if key not in self._placements:
            factors = self._analysis.dims[value]
            axes = [self._components(factor, is_whole=d in whole) for d, factor in enumerate(factors)]
            self._placements[key] = placement_of(axes, self._mesh, first_device=first_device)
        return self._placements[key]

    def _components(self, factor: Factor, *, is_whole: bool = False) -> list[Component] | None:
        """The components of a dimension; None if parts of a concatenation are split, or blocks, the last one short."""
        root = factor.find()
        leaves = list(root.leaves())
        if is_whole or not any(self._assignment.get(leaf) for leaf in leaves):
            return [Component(root.size if self._fixed.issuperset(leaves) else None)]
        if root.kind is Kind.LEAF:
            return [Component(root.size, self._assignment[root])]
        if root.kind in (Kind.CONCATENATION, Kind.PREFIX):
            return None
        parts = [self._components(kid) for kid in root.kids]
        return None if None in parts else [component for part in parts if part is not None for component in part]


def _node_stages(graph: onnx.GraphProto, stages: Mapping[str, int]) -> list[int]:
    """The stage of every node: as given, or the first stage that needs it, or the last stage that it needs."""
    found: dict[int, int] = {}
    needed: dict[str, int] = {}
    told = [max((stages[name] for name in node.output if name in stages), default=None) for node in graph.node]
    for position in reversed(range(len(graph.node))):
        node = graph.node[position]
        own = told[position]
        if own is None:
            own = min((needed[name] for name in node.output if name in needed), default=None)
        if own is not None:
            found[position] = own
            for name in node.input:
                needed[name] = min(needed.get(name, own), own)
    reached: dict[str, int] = {}
    for position, node in enumerate(graph.node):
        latest = max((reached.get(name, 0) for name in node.input), default=0)
        reached.update(dict.fromkeys(node.output, found.setdefault(position, latest)))
    return [found[position] for position in range(len(graph.node))]


# -- the file ----------------------------------------------------------------------------------------------------


def write_annotated(model: onnx.ModelProto, source: Source, path: str | os.PathLike[str]) -> None:
    """Write an annotated model to `path`, its external data left where it is.

    References to external data are relative to the file, and may not leave its folder. Raises OutputError if the data
    would not be found from there, or if the file exists. Where the data is absent anyway, references are not changed.
    """
    target = Path(path)
    if target.exists():
        raise OutputError(f"{target} exists already; name another file, or remove it.")
    if not target.parent.is_dir():
        raise OutputError(f"{target.parent} is not a folder; make it first, or name another file.")
    folder = source.path.parent.resolve()
    moved = onnx.ModelProto()
    moved.CopyFrom(model)
    nodes = [*moved.graph.node, *(node for function in moved.functions for node in function.node)]
    for tensor in (*moved.graph.initializer, *all_tensors(nodes)):
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            _relocate(tensor, folder, target)
    data = moved.SerializeToString(deterministic=True)
    try:
        replace_file(target, data)
    except OSError as error:
        raise OutputError(f"{target} cannot be written: {error.strerror}; check the folder and its space.") from error


def _relocate(tensor: onnx.TensorProto, folder: Path, target: Path) -> None:
    """Change a reference that was relative to `folder` to be relative to the folder of `target`."""
    entry = next(entry for entry in tensor.external_data if entry.key == "location")
    data, here = folder / entry.value, target.resolve().parent
    if here == folder or not data.exists():
        return
    if not data.is_relative_to(here):
        raise OutputError(
            f'{target} would refer to the data of initializer "{tensor.name}" in {data}, which lies neither beside it '
            f"nor below, as ONNX demands; write the file into {folder} or into a folder above it."
        )
    entry.value = data.relative_to(here).as_posix()
