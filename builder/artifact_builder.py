"""`ArtifactBuilder`: an ONNX model in, an artifact out."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import math
import os
import resource
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import onnx_ir as ir

from furiosa_llm.builder import configuration, writer
from furiosa_llm.builder.analysis import Analysis, analyse
from furiosa_llm.builder.blocks import find_blocks, levels
from furiosa_llm.builder.check import check_shapes, interpreter, local_shape
from furiosa_llm.builder.dimension_names import dimension, names_of_sizes
from furiosa_llm.builder.errors import OptionError
from furiosa_llm.builder.interface import PROBE, SECOND_PROBE, concrete, role_of
from furiosa_llm.builder.load import Source, check_external_data, load
from furiosa_llm.builder.lower import Lowered, lower
from furiosa_llm.builder.normalize import normalize
from furiosa_llm.builder.planner import MAX_PADDING, Plan, Planner
from furiosa_llm.builder.probe import Probes, probe
from furiosa_llm.builder.program import COLLECTIVE_DOMAIN, ShardedTensor
from furiosa_llm.builder.report import BuildReport, decisions, notes, plan_json
from furiosa_llm.builder.shapes import Facts
from furiosa_llm.builder.states import StatePair, pair_states, state_outputs
from furiosa_llm.builder.weights import num_shards
from furiosa_llm.runtime.artifact.layout import Dim, Mesh, axes_of, global_size, local_size
from furiosa_llm.runtime.artifact.manifest import (
    PROGRAM_NAME,
    SOURCE_NAME,
    Block,
    Collective,
    FileEntry,
    InputInfo,
    Manifest,
    ModelInfo,
    OriginalInitializer,
    OutputInfo,
    Provenance,
    State,
    StoredTensor,
)

SUPPORTED_SIZES = (4, 8)
EXPERIMENTAL_SIZES = (1, 2, 16)
_LIBRARIES = ("ml_dtypes", "numpy", "onnx", "onnx_ir")

Progress = Callable[[str, int, int], None]
"""Called with the stage's name, what is done and what there is to do (bytes for `write`, 0 or 1 for the others)."""


def check_tensor_parallel_size(size: int, *, experimental: bool) -> None:
    """Raise OptionError unless `size` is a size that artifacts can be built for."""
    allowed = (*SUPPORTED_SIZES, *EXPERIMENTAL_SIZES) if experimental else SUPPORTED_SIZES
    if size in allowed:
        return
    message = f"tensor parallel size {size} is not supported; a card has 8 PEs, fused by 4 or 8, so use 4 or 8"
    if size in EXPERIMENTAL_SIZES:
        message += f" (or say --experimental-tp to build for {size} all the same)"
    raise OptionError(message + ".")


def mesh_of(size: int) -> Mesh:
    """The mesh of `size` ranks: one axis for each factor of two, so that a dimension may be split in part."""
    return Mesh((2,) * (size.bit_length() - 1) or (1,))


class ArtifactBuilder:
    """Builds an artifact from an ONNX model.

    Args:
        model: Path of the .onnx file. What lies beside it (tokenizer, configuration) goes into the artifact.
        name: The artifact's name; the model's folder or file name if empty.
        tensor_parallel_size: How many PEs share each matrix: 4 or 8.
        max_seq_len_to_capture: The longest sequence to serve, in tokens; at most, and if None, the model's own limit.
        dims: Sizes of dynamic input dimensions that do not follow from the model, by symbol or `input.symbol`.
        max_padding: By how much padding may make one dimension larger (1.34: a third).
        experimental_tp: Also allow tensor_parallel_size 1, 2 and 16.
    """

    def __init__(
        self,
        model: str | os.PathLike[str],
        name: str = "",
        *,
        tensor_parallel_size: int = 4,
        max_seq_len_to_capture: int | None = None,
        dims: Mapping[str, int] | None = None,
        max_padding: float = MAX_PADDING,
        experimental_tp: bool = False,
    ) -> None:
        check_tensor_parallel_size(tensor_parallel_size, experimental=experimental_tp)
        if max_padding < 1:
            raise OptionError(f"max_padding must be at least 1 (no padding), got {max_padding}.")
        if max_seq_len_to_capture is not None and max_seq_len_to_capture < 1:
            raise OptionError(f"max_seq_len_to_capture must be at least 1, got {max_seq_len_to_capture}.")
        self._model = Path(model)
        self._name = name
        self._mesh = mesh_of(tensor_parallel_size)
        self._max_seq_len = max_seq_len_to_capture
        self._dims = dict(dims or {})
        self._max_padding = max_padding

    def build(
        self, save_dir: str | os.PathLike[str], *, force: bool = False, progress: Progress | None = None
    ) -> BuildReport:
        """Write the artifact to `save_dir`; raises a BuildError and leaves nothing behind if that fails."""
        started = time.monotonic()
        told = progress or (lambda *_: None)
        destination = Path(save_dir)
        with writer.output_folder(destination, force=force) as folder:
            told("load", 0, 1)
            source = load(self._model)
            check_external_data(source)
            model = normalize(source)
            told("analyse", 0, 1)
            probes = probe(model, self._dims, configuration.read_json(source.path, "config.json"))
            pairs = pair_states(model.graph, probes.facts)
            states = state_outputs(model.graph, pairs) | {v for v in model.graph.inputs if role_of(v) == "state"}
            analysis = analyse(model.graph, probes.facts, probes.others)
            told("plan", 0, 1)
            planner = Planner(analysis, self._mesh, states, probes.decode, probes.longer, self._max_padding)
            plan = planner.decide()
            told("lower", 0, 1)
            built = _Built(source, model, probes, pairs, states, analysis, plan, lower(analysis, plan, source.model))
            tensors = built.tensors_in_order()
            total = sum(t.local_nbytes * num_shards(t, self._mesh) for t in tensors)
            written = _Counter(total, told)
            placements, files = writer.write_weights(folder, tensors, self._mesh, written.add)
            program = writer.program_proto(built.lowered.graph, placements, built.shapes(), built.ir_version)
            stored, small = built.stored_initializers()
            original = writer.source_proto(source.path, stored, small)
            files.append(writer.write_bytes(folder, PROGRAM_NAME, program.SerializeToString(deterministic=True)))
            files.append(writer.write_bytes(folder, SOURCE_NAME, original.SerializeToString(deterministic=True)))
            files += [writer.write_bytes(folder, p.name, p.read_bytes()) for p in configuration.companions(source.path)]
            manifest = built.manifest(self._model_info(built), self._provenance(source), placements, stored, files)
            writer.write_manifest(folder, manifest)
        return built.report(destination, manifest, started)

    def _model_info(self, built: _Built) -> ModelInfo:
        path = built.source.path
        limits = [n for n in (configuration.max_sequence_length(path), self._max_seq_len) if n is not None]
        logits = built.logits()
        return ModelInfo(
            name=self._name or (path.stem if path.stem != "model" else path.resolve().parent.name),
            task=built.task(),
            max_sequence_length=min(limits) if limits else None,
            vocab_size=built.probes.facts[logits].shape[-1] if logits is not None else None,
            eos_token_ids=configuration.eos_token_ids(path),
        )

    def _provenance(self, source: Source) -> Provenance:
        options: dict[str, Any] = {
            "tensor_parallel_size": self._mesh.size,
            "max_seq_len_to_capture": self._max_seq_len,
            "dims": dict(sorted(self._dims.items())),
            "max_padding": self._max_padding,
        }
        digest = hashlib.sha256()
        with source.path.open("rb") as file:
            while chunk := file.read(2**20):
                digest.update(chunk)
        return Provenance(
            tool=f"furiosa-llm-onnx {importlib.metadata.version('furiosa-llm-onnx')}",
            libraries={name: importlib.metadata.version(name.replace("_", "-")) for name in _LIBRARIES},
            options=options,
            source_sha256=digest.hexdigest(),
        )


class _Counter:
    """Turns bytes written into progress."""

    def __init__(self, total: int, told: Progress) -> None:
        self._done, self._total, self._told = 0, total, told

    def add(self, nbytes: int) -> None:
        self._done += nbytes
        self._told("write", self._done, self._total)


@dataclasses.dataclass(frozen=True, slots=True)
class _Built:
    """Everything known about one build, and the manifest and report made of it."""

    source: Source
    model: ir.Model
    probes: Probes
    pairs: list[StatePair]
    states: frozenset[ir.Value]
    analysis: Analysis
    plan: Plan
    lowered: Lowered

    @property
    def ir_version(self) -> int:
        """The program's IR version: the source's, raised to what the converter writes for older files."""
        return max(self.source.model.ir_version, 8)

    # -- the interface -------------------------------------------------------------------------------------------

    def logits(self) -> ir.Value | None:
        """The output that holds next-token scores, if the model takes tokens."""
        graph = self.model.graph
        if not any(role_of(v) == "token_ids" for v in graph.inputs):
            return None
        found = [v for v in graph.outputs if v not in self.states and v.dtype is not None and v.dtype.is_floating_point()]
        named = [v for v in found if v.name == "logits"]
        return next(iter(named or (found if self.pairs else [])), None)

    def task(self) -> Any:
        """`decoder` if the model carries state from token to token, `encoder` if it reads tokens, else `other`."""
        if self.pairs and self.logits() is not None:
            return "decoder"
        return "encoder" if any(role_of(v) == "token_ids" for v in self.model.graph.inputs) else "other"

    def _shape(self, value: ir.Value) -> tuple[int | str, ...]:
        names = names_of_sizes(self.probes.kinds)
        dims = zip(self.probes.facts[value].shape, self.probes.others[value].shape, strict=True)
        found = [dimension(sizes, names) for sizes in dims]
        return tuple(f"{value.name}.{i}" if d is None else d for i, d in enumerate(found))

    def _layouts(self, shape: tuple[int | str, ...], layout: tuple[Dim, ...]) -> tuple[Dim | None, ...]:
        return tuple(None if isinstance(size, str) else dim for size, dim in zip(shape, layout, strict=True))

    def inputs(self) -> tuple[InputInfo, ...]:
        """The manifest's inputs."""
        found = []
        for value in self.model.graph.inputs:
            assert value.dtype is not None
            shape = self._shape(value)
            layout = self._layouts(shape, self.lowered.input_layouts[str(value.name)])
            role: Any = role_of(value)
            found.append(
                InputInfo(name=str(value.name), dtype=value.dtype.name, shape=shape, layout=layout, role=role)
            )
        return tuple(found)

    def outputs(self) -> tuple[OutputInfo, ...]:
        """The manifest's outputs."""
        logits = self.logits()
        found = []
        for value in self.model.graph.outputs:
            shape = self._shape(value)
            layout = self._layouts(shape, self.lowered.output_layouts[str(value.name)])
            role: Any = "logits" if value is logits else "state" if value in self.states else "other"
            dtype = self.probes.facts[value].dtype.name
            found.append(OutputInfo(name=str(value.name), dtype=dtype, shape=shape, layout=layout, role=role))
        return tuple(found)

    # -- the program ---------------------------------------------------------------------------------------------

    def tensors_in_order(self) -> list[ShardedTensor]:
        """Stored tensors in the order in which the program first reads them, unused ones last."""
        order = {
            str(v.name): i
            for i, v in reversed(list(enumerate(v for n in self.lowered.graph for v in n.inputs if v is not None)))
        }
        return sorted(self.lowered.tensors.values(), key=lambda t: order.get(t.name, len(order) + 2**31))

    def _program_facts(self) -> tuple[Facts, Facts]:
        mesh = self.plan.mesh
        run = interpreter(ir.Model(self.lowered.graph, ir_version=self.ir_version), mesh).run
        both = []
        for sizes in (PROBE, SECOND_PROBE):
            shapes = concrete(self.probes.kinds, sizes)
            both.append(run({n: local_shape(self.lowered.input_layouts[n], s, mesh) for n, s in shapes.items()}))
        check_shapes(self.lowered, both[0])
        return both[0], both[1]

    def shapes(self) -> dict[str, tuple[ir.DataType, tuple[int | str | None, ...]]]:
        """Local types and shapes of inputs, outputs and all values that a collective touches or that cross one."""
        first, second = self._program_facts()
        names = names_of_sizes(self.probes.kinds)
        graph = self.lowered.graph
        level = levels(list(graph))
        wanted = dict.fromkeys((*graph.inputs, *graph.outputs))
        for node in graph:
            for value in (v for v in node.inputs if v is not None and not v.is_initializer()):
                made = level.get(value, 0)
                if made >= 0 and (node.domain == COLLECTIVE_DOMAIN or made != level[node.outputs[0]]):
                    wanted[value] = None
            if node.domain == COLLECTIVE_DOMAIN:
                wanted.update(dict.fromkeys(node.outputs))
        return {
            str(v.name): (
                first[v].dtype,
                tuple(dimension(s, names) for s in zip(first[v].shape, second[v].shape, strict=True)),
            )
            for v in wanted
        }

    def collectives(self) -> tuple[Collective, ...]:
        """The manifest's collectives, in program order."""
        shapes = self.shapes()
        found = []
        for node in self.lowered.graph:
            if node.domain != COLLECTIVE_DOMAIN:
                continue
            value = node.inputs[0]
            assert value is not None
            dtype, dims = shapes[str(value.name)]
            kind: Any = node.op_type
            found.append(
                Collective(
                    id=str(node.name),
                    kind=kind,
                    axes=tuple(node.attributes["axes"].as_ints()),
                    dim=node.attributes["dim"].as_int() if "dim" in node.attributes else None,
                    dtype=dtype.name,
                    shape=tuple(f"{node.name}.{i}" if d is None else d for i, d in enumerate(dims)),
                )
            )
        return tuple(found)

    # -- the way back --------------------------------------------------------------------------------------------

    def stored_initializers(self) -> tuple[dict[str, tuple[str, ...]], dict[str, ir.TensorProtocol]]:
        """Original initializer -> stored tensors that make it up, and the initializers whose data stays in source.onnx."""
        by_source: dict[int, dict[tuple[Dim, ...] | None, list[str]]] = {}
        for t in self.lowered.tensors.values():
            if t.source is not None:
                by_source.setdefault(id(t.source), {}).setdefault(t.whole_layout, []).append(t.name)
        stored: dict[str, tuple[str, ...]] = {}
        small: dict[str, ir.TensorProtocol] = {}
        for name, value in self.source.model.graph.initializers.items():
            assert value.const_value is not None
            if id(value.const_value) in by_source:
                stored[name] = tuple(next(iter(by_source[id(value.const_value)].values())))
            else:
                small[name] = value.const_value
        return stored, small

    def manifest(
        self,
        info: ModelInfo,
        provenance: Provenance,
        placements: Mapping[str, writer.Placement],
        stored: Mapping[str, tuple[str, ...]],
        files: list[FileEntry],
    ) -> Manifest:
        """The whole manifest."""
        origins = {tensor: name for name, tensors in reversed(stored.items()) for tensor in tensors}
        originals = self.source.model.graph.initializers
        spans = find_blocks(self.lowered.graph, [str(p.input.name) for p in self.pairs], self.lowered.tensors)
        return Manifest(
            provenance=provenance,
            model=info,
            mesh=self.plan.mesh,
            files=tuple(sorted(files, key=lambda f: f.path)),
            tensors=tuple(
                StoredTensor(
                    name=t.name,
                    file=placements[t.name].file,
                    dtype=t.dtype.name,
                    local_shape=t.local_shape,
                    shard_axes=t.shard_axes,
                    layout=t.layout,
                    part=t.part,
                    origin=origins.get(t.name),
                )
                for t in self.tensors_in_order()
            ),
            initializers=tuple(
                OriginalInitializer(
                    name=name,
                    dtype=_constant(value).dtype.name,
                    shape=tuple(int(d) for d in _constant(value).shape),
                    stored=stored.get(name, ()),
                )
                for name, value in originals.items()
            ),
            inputs=self.inputs(),
            outputs=self.outputs(),
            states=tuple(
                State(
                    input=str(p.input.name),
                    output=str(p.output.name),
                    sequence_dim=p.sequence_dim,
                    mode="in_place" if p.in_place else "append",
                )
                for p in self.pairs
            ),
            collectives=self.collectives(),
            blocks=tuple(
                Block(name=f"block.{i}", first_node=s.first_node, collectives=s.collectives,
                      weight_nbytes=s.weight_nbytes, crossing=s.crossing)
                for i, s in enumerate(spans)
            ),
            plan=plan_json(self.plan, notes(self.analysis)),
        )

    # -- the report ----------------------------------------------------------------------------------------------

    def report(self, destination: Path, manifest: Manifest, started: float) -> BuildReport:
        """What the build did."""
        mesh = self.plan.mesh
        tensors = list(self.lowered.tensors.values())
        replicated = sorted((t for t in tensors if not t.shard_axes and t.layout), key=lambda t: -t.local_nbytes)
        counts: dict[str, int] = {}
        for collective in manifest.collectives:
            counts[collective.kind] = counts.get(collective.kind, 0) + 1
        initializers = self.source.model.graph.initializers.values()
        return BuildReport(
            artifact=str(destination),
            tensor_parallel_size=mesh.size,
            weight_nbytes=sum(t.local_nbytes for t in tensors),
            replicated_nbytes=sum(t.local_nbytes for t in replicated),
            padding_nbytes=sum(_padding_nbytes(t, mesh) for t in tensors),
            model_nbytes=sum(tensor.nbytes for tensor in {id(t): t for t in map(_constant, initializers)}.values()),
            stored_nbytes=sum(f.nbytes for f in manifest.files if f.path.startswith("weights-")),
            state_nbytes_per_token=sum(self._state_nbytes(p) for p in self.pairs),
            collectives=counts,
            collective_nbytes=sum(self._payload(c) for c in manifest.collectives),
            decisions=decisions(self.plan),
            replicated=tuple(f"{t.name} {list(t.local_shape)}" for t in replicated),
            notes=notes(self.analysis),
            num_nodes=len(self.lowered.graph),
            seconds=time.monotonic() - started,
            peak_rss_nbytes=_peak_rss_nbytes(),
        )

    def _state_nbytes(self, pair: StatePair) -> int:
        layout = self.lowered.input_layouts[str(pair.input.name)]
        fact = self.probes.decode.facts[pair.input]
        sizes = [local_size(dim, self.plan.mesh) if axes_of(dim) else n for dim, n in zip(layout, fact.shape, strict=True)]
        return math.prod(n for d, n in enumerate(sizes) if d != pair.sequence_dim) * fact.dtype.bitwidth // 8

    def _payload(self, collective: Collective) -> int:
        """Bytes that a rank receives for one decoded token."""
        local = math.prod(n if isinstance(n, int) else 1 for n in collective.shape)
        parts = self.plan.mesh.parts(collective.axes) if collective.kind == "AllGather" else 1
        return local * parts * ir.DataType[collective.dtype].bitwidth // 8


def _constant(value: ir.Value) -> ir.TensorProtocol:
    assert value.const_value is not None
    return value.const_value


def _padding_nbytes(tensor: ShardedTensor, mesh: Mesh) -> int:
    """Zeros in the stored tensor that no original element stands for."""
    if tensor.layout is None:
        return 0
    elements = math.prod(tensor.local_shape) * num_shards(tensor, mesh)
    return (elements - math.prod(global_size(dim) for dim in tensor.layout)) * tensor.dtype.bitwidth // 8


def _peak_rss_nbytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
