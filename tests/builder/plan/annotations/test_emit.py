"""Plans written into models as annotations: valid, harmless, true to the plan, and read back as the same plan."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import random
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import pytest

from furiosa_llm.builder import ArtifactBuilder, plan_model
from furiosa_llm.builder.errors import AnnotationError, OutputError
from furiosa_llm.builder.factors.factor import Factor
from furiosa_llm.builder.lower.layouts import Layouts
from furiosa_llm.builder.plan.annotations import (
    annotate,
    check_sharding,
    constraints_of,
    is_annotated,
    read_constraints,
    write_annotated,
)
from furiosa_llm.builder.plan.annotations.correspondence import Correspondence
from furiosa_llm.builder.plan.annotations.emit import UNEVEN_KEY, UNSAID_KEY
from furiosa_llm.builder.plan.constraints import leaf_parts
from furiosa_llm.builder.plan.outcome import Assignment, Axes, Outcome
from furiosa_llm.builder.plan.plan import Plan, Planning
from furiosa_llm.builder.plan.sweep import Sweeper
from furiosa_llm.builder.shapes.interface import PROBE, SizeSet
from furiosa_llm.builder.source.load import Source, load
from furiosa_llm.runtime.artifact.layout import Cat, Dim, Mesh, axes_of, index_map
from tests.support.builder.plans import Prepared, prepare, random_assignment
from tests.support.builder.sharding_specs import spec
from tests.support.builder.stitching import session
from tests.support.tiers import tiered

MESHES = {2: Mesh((2,)), 4: Mesh((2, 2)), 8: Mesh((2, 2, 2))}
MODELS = (
    "tiny-llama-optimum",
    "tiny-llama-genai-fp32",
    "tiny-bert-optimum",
    "tiny-t5-optimum/decoder_model.onnx",
    "tiny-mixtral-dynamo-tf5",
    "tiny-llama-9-3-optimum",
)
FAST = ("tiny-llama-genai-fp32", "tiny-llama-9-3-optimum")
DECODE = SizeSet(batch=2, sequence=1, past=9, encoder=6, others=(3, 5, 7, 11))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Annotated:
    """A model of the zoo, its plan, and the model with the plan in it."""

    path: Path
    prepared: Prepared
    plan: Plan
    proto: onnx.ModelProto

    @property
    def mesh(self) -> Mesh:
        return self.plan.mesh

    def source_in(self, folder: Path) -> Source:
        """The source, as if it had been read from a copy in another folder."""
        return dataclasses.replace(self.prepared.source, path=folder / self.path.name)

    def annotate(self, stages: Mapping[str, int] | None = None) -> onnx.ModelProto:
        analysis, plan = self.prepared.analysis, self.plan
        return annotate(self.prepared.source, analysis, plan.assignment, plan.outcome, plan.mesh, stages=stages)


Make = Callable[[str, int], Annotated]


@pytest.fixture(scope="module")
def annotated(zoo: Path) -> Make:
    ready = functools.cache(prepare)

    @functools.cache
    def make(name: str, tensor_parallel_size: int) -> Annotated:
        path = zoo / name if name.endswith(".onnx") else zoo / name / "model.onnx"
        prepared, mesh = ready(path), MESHES[tensor_parallel_size]
        plan = Planning(prepared.analysis, prepared.states, prepared.probes).plan(mesh)
        proto = annotate(prepared.source, prepared.analysis, plan.assignment, plan.outcome, mesh)
        return Annotated(path=path, prepared=prepared, plan=plan, proto=proto)

    return make


# -- the standard ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", tiered(MODELS, FAST))
def test_annotated_models_are_sound_and_compute_the_same(annotated: Make, name: str, tmp_path: Path) -> None:
    made = annotated(name, 4)
    folder = tmp_path / "model"
    shutil.copytree(made.path.parent, folder)
    written = folder / "annotated.onnx"
    write_annotated(made.proto, made.source_in(folder), written)
    proto = onnx.load(written, load_external_data=False)
    check_by_standard(proto, folder)
    assert proto.ir_version == 11
    assert [(c.name, c.num_devices, len(c.device)) for c in proto.configuration] == [("furiosa-tp4", 4, 4)]
    assert sum(bool(node.device_configurations) for node in proto.graph.node) > 20
    assert [finding for finding in check_sharding(proto, written) if finding.severity == "error"] == []
    before, after = session(onnx.load(made.path)), session(onnx.load(written))
    for sizes in (PROBE, DECODE) if "genai" not in name else (DECODE,):  # the kernel takes no chunk after a past
        wanted = {value.name for value in before.get_inputs()}
        feeds = {n: a for n, a in made.prepared.feeds(sizes).items() if n in wanted}
        for expected, found in zip(before.run(None, feeds), after.run(None, feeds), strict=True):
            np.testing.assert_array_equal(found, expected)


def check_by_standard(proto: onnx.ModelProto, folder: Path) -> None:
    """onnx.checker; onnxruntime's own operators are let pass, wherever an exporter has put them."""
    checked = onnx.ModelProto()
    checked.CopyFrom(proto)
    for node in checked.graph.node:
        if "Simplified" in node.op_type:
            node.domain = "com.microsoft"
    onnx.save(checked, folder / "checked.onnx")
    onnx.checker.check_model(folder / "checked.onnx")


def test_nothing_but_annotations_is_added(annotated: Make) -> None:
    made = annotated("tiny-llama-optimum", 4)
    stripped = onnx.ModelProto()
    stripped.CopyFrom(made.proto)
    del stripped.configuration[:]
    for node in stripped.graph.node:
        del node.device_configurations[:]
    original = onnx.load(made.path)
    stripped.ir_version = original.ir_version
    assert stripped == original


# -- true to the plan --------------------------------------------------------------------------------------------


def held(spec: onnx.ShardingSpecProto, shape: tuple[int, ...]) -> dict[int, tuple[npt.NDArray[np.int64], ...]]:
    """For every device the indices of each axis that it holds, worked out as the standard's text does."""
    flat = [(dim.axis % len(shape), simple) for dim in spec.sharded_dim for simple in dim.simple_sharding]
    groups = {entry.key: entry.value for entry in spec.index_to_device_group_map}
    found: dict[int, tuple[npt.NDArray[np.int64], ...]] = {}
    shards = itertools.product(*(range(simple.num_shards) for _, simple in flat))
    for key, shard in zip(spec.device, shards, strict=True):
        axes = [np.arange(size) for size in shape]
        for axis in {axis for axis, _ in flat}:
            indices = np.zeros(1, dtype=np.int64)
            for (_, simple), position in ((f, p) for f, p in zip(flat, shard, strict=True) if f[0] == axis):
                given = math.prod(s.dim_value for a, s in flat if a == axis and s.HasField("dim_value"))
                size = simple.dim_value if simple.HasField("dim_value") else shape[axis] // given
                count = -(-size // simple.num_shards)
                own = np.arange(position * count, min((position + 1) * count, size))
                indices = (indices[:, None] * size + own[None, :]).reshape(-1)
            axes[axis] = indices
        found |= dict.fromkeys(groups.get(key, (key,)), tuple(axes))
    return found


def packed(dim: Dim) -> bool:
    """Whether parts of a concatenation are split."""
    return bool(axes_of(dim)) and (isinstance(dim, Cat) or any(map(packed, getattr(dim, "parts", ()))))


def check_against_plan(proto: onnx.ModelProto, prepared: Prepared, plan: tuple[Assignment, Outcome], mesh: Mesh) -> int:
    """Compare every spec with the index maps of the plan; returns how many there were."""
    analysis = prepared.analysis
    correspondence, layouts = Correspondence(proto.graph, analysis.graph), Layouts(analysis, plan[0], mesh)
    count = 0
    for node in proto.graph.node:
        specs = {s.tensor_name: s for c in node.device_configurations for s in c.sharding_spec}
        unsaid = [name for e in node.metadata_props if e.key == UNSAID_KEY for name in e.value.split(", ")]
        counterpart = correspondence.node(node)
        step = plan[1].steps.get(counterpart) if counterpart is not None else None
        for name, port, is_output, value in correspondence.operands(node):
            whole = step.gather.get(port, ()) if step is not None and not is_output else ()
            dims = layouts.with_whole(value, whole) if value in analysis.dims else ()
            if name in unsaid:
                assert any(map(packed, dims)), name
            elif name in specs:
                count += 1
                own = held(specs[name], analysis.facts[value].shape)
                assert own.keys() == set(range(mesh.size))
                for rank, axes in own.items():
                    for dim, indices in zip(dims, axes, strict=True):
                        assert np.array_equal(indices, real_indices(dim, mesh, rank)), name
    return count


@functools.cache
def real_indices(dim: Dim, mesh: Mesh, rank: int) -> npt.NDArray[np.int64]:
    """What a rank holds of a dimension, padding left out."""
    indices = index_map(dim, mesh, rank)
    return indices[indices >= 0]


@pytest.mark.parametrize("name", tiered(MODELS, FAST))
def test_specs_say_what_the_plan_says(annotated: Make, name: str) -> None:
    made = annotated(name, 8)
    plan = (made.plan.assignment, made.plan.outcome)
    assert check_against_plan(made.proto, made.prepared, plan, made.mesh) > 50


@pytest.mark.parametrize(
    "name", tiered(["tiny-llama-optimum", "tiny-llama-genai-fp32", "tiny-bloom-optimum"], ["tiny-llama-genai-fp32"])
)
def test_random_plans_are_said_right_and_checked_sound(annotated: Make, name: str) -> None:
    made = annotated(name, 8)
    prepared, mesh = made.prepared, made.mesh
    candidates = prepared.static_leaves()
    sweeper = Sweeper(prepared.analysis, mesh, candidates, prepared.states)
    for seed in range(2):
        groups = [[leaf] for leaf in candidates]
        assignment, outcome = random_assignment(sweeper, groups, mesh, random.Random(seed), 6)
        proto = annotate(prepared.source, prepared.analysis, assignment, outcome, mesh)
        assert check_against_plan(proto, prepared, (assignment, outcome), mesh) > 50
        assert [f for f in check_sharding(proto, made.path) if f.severity == "error"] == [], seed


def test_sizes_that_change_are_not_told(annotated: Make) -> None:
    """Batch and heads in one axis: the batch was 5 when the model was analysed, and nothing else is."""
    specs = [
        s
        for n in annotated("tiny-bloom-optimum", 4).proto.graph.node
        for c in n.device_configurations
        for s in c.sharding_spec
    ]
    fused = [list(d.simple_sharding) for s in specs for d in s.sharded_dim if len(d.simple_sharding) > 1]
    assert any(not simple[0].HasField("dim_value") for simple in fused)
    assert not any(simple.dim_value == PROBE.batch for one in fused for simple in one)


def test_uneven_shards_are_declared(annotated: Make) -> None:
    def declared(proto: onnx.ModelProto) -> dict[str, str]:
        return {entry.key: entry.value for entry in proto.metadata_props}

    assert declared(annotated("tiny-llama-9-3-optimum", 4).proto) == {UNEVEN_KEY: "ceil"}
    assert UNEVEN_KEY not in declared(annotated("tiny-llama-optimum", 4).proto)


def replanned(made: Annotated, assignment: Mapping[Factor, Axes]) -> tuple[onnx.ModelProto, Outcome]:
    """The model annotated with another plan, and what its sweep found."""
    prepared = made.prepared
    leaves = [leaf for group in made.plan.groups for leaf in group.leaves]
    outcome = Sweeper(prepared.analysis, made.mesh, leaves, prepared.states).sweep(assignment)
    return annotate(prepared.source, prepared.analysis, assignment, outcome, made.mesh), outcome


def test_warnings_are_the_gatherings_of_the_plan(annotated: Make) -> None:
    """What the layers add to the residual stream is split: the norms behind need it whole."""
    made = annotated("tiny-llama-genai-fp32", 4)
    added = next(g.leaves for g in made.plan.groups if g.role == "hidden" and "[176, 64] dim 1" in g.description)
    proto, outcome = replanned(made, dict.fromkeys(added, (0,)))
    inner = {c.value.name for c in outcome.collectives if c.kind == "AllGather" and not c.value.is_graph_output()}
    assert len(inner) == 2
    assert {finding.tensor for finding in check_sharding(proto, made.path)} == inner


# -- pipeline stages ---------------------------------------------------------------------------------------------


def test_stages_are_followed_to_every_node(annotated: Make) -> None:
    made = annotated("tiny-llama-optimum", 4)
    value = "/model/layers.1/input_layernorm/Pow_output_0"
    positions = {name: i for i, node in enumerate(made.proto.graph.node) for name in node.output}
    nodes = made.prepared.analysis.nodes
    start = next(i for i, info in enumerate(nodes) if info.node.outputs[0].name == value)
    stages = {str(v.name): int(i >= start) for i, info in enumerate(nodes) for v in info.node.outputs}
    proto = made.annotate(stages)
    assert [(c.name, c.num_devices) for c in proto.configuration] == [("furiosa-tp4-pp2", 8)]
    assert [f for f in check_sharding(proto, made.path) if f.severity == "error"] == []
    found = [node.device_configurations[0].pipeline_stage for node in proto.graph.node]
    assert set(found) == {0, 1}
    assert found[positions[value]] == 1
    for node, stage in zip(proto.graph.node, found, strict=True):
        devices = {d for s in node.device_configurations[0].sharding_spec for d in held(s, (24,) * 8)}
        assert not devices or devices == set(range(4 * stage, 4 * stage + 4))


def test_nodes_without_a_stage_run_where_they_are_needed_first(tmp_path: Path) -> None:
    proto = onnx.parser.parse_model(
        '<ir_version: 11, opset_import: ["": 21]> g (float[8, 8] x) => (float[8, 8] e, float[8, 8] f)'
        "{ a = Relu(x)\nb = Neg(a)\nc = Abs(a)\nd = Exp(b)\ne = Sin(d)\nf = Cos(c) }"
    )
    onnx.save(proto, tmp_path / "model.onnx")
    prepared = prepare(tmp_path / "model.onnx")
    found = annotate(prepared.source, prepared.analysis, {}, Outcome(), MESHES[2], stages={"b": 1, "c": 0})
    stages = {node.output[0]: node.device_configurations[0].pipeline_stage for node in found.graph.node}
    assert stages == {"a": 0, "b": 1, "c": 0, "d": 1, "e": 1, "f": 0}


# -- constraints -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "tensor_parallel_size"),
    tiered([(name, size) for name in MODELS for size in (4, 8)], [(name, 4) for name in FAST]),
)
def test_constraints_are_the_whole_plan(annotated: Make, name: str, tensor_parallel_size: int, tmp_path: Path) -> None:
    made = annotated(name, tensor_parallel_size)
    analysis, mesh = made.prepared.analysis, made.mesh
    onnx.save(made.proto, tmp_path / "annotated.onnx")
    source = load(tmp_path / "annotated.onnx")
    found = leaf_parts(constraints_of(source, analysis, mesh.size), analysis)
    planned = {leaf: mesh.parts(made.plan.assignment.get(leaf, ())) for leaf in found}
    assert {leaf: demand.parts for leaf, demand in found.items()} == planned
    undecided = {leaf for group in made.plan.groups for leaf in group.leaves} - found.keys()
    assert undecided == set()
    assert max(planned.values()) == mesh.size


def test_leaves_that_only_packed_weights_have_stay_free(annotated: Make, tmp_path: Path) -> None:
    made = annotated("tiny-llama-genai-int4", 4)
    onnx.save(made.proto, tmp_path / "annotated.onnx")
    found = leaf_parts(
        constraints_of(load(tmp_path / "annotated.onnx"), made.prepared.analysis, 4), made.prepared.analysis
    )
    free = [group.description for group in made.plan.groups if not found.keys() & set(group.leaves)]
    assert sorted(free) == ["MatMulNBits[1][128, 2, 16] dim 2", "MatMulNBits[1][176, 2, 16] dim 2"]


def test_an_annotated_model_is_built_like_any_other(annotated: Make, tmp_path: Path) -> None:
    made = annotated("tiny-llama-optimum", 4)
    write_annotated(made.proto, made.prepared.source, tmp_path / "annotated.onnx")
    report = ArtifactBuilder(tmp_path / "annotated.onnx").build(tmp_path / "artifact")
    assert report.collectives == {"AllReduce": 5, "AllGather": 1}
    assert not is_annotated(onnx.load(tmp_path / "artifact" / "program.onnx", load_external_data=False))


@pytest.mark.parametrize(
    "name",
    tiered(["tiny-llama-optimum", "tiny-qwen2-14-2-optimum", "tiny-mixtral-dynamo-tf5"], ["tiny-qwen2-14-2-optimum"]),
)
def test_the_plan_of_an_annotated_model_is_the_one_in_it(annotated: Make, name: str, tmp_path: Path) -> None:
    made = annotated(name, 8)
    write_annotated(made.proto, made.prepared.source, tmp_path / "annotated.onnx")
    (again,) = plan_model(tmp_path / "annotated.onnx", tensor_parallel_sizes=(8,)).builds
    theirs = {(g.role, g.size): again.plan.mesh.parts(axes) for g, axes in again.plan.choices.items()}
    ours = {(g.role, g.size): made.plan.mesh.parts(axes) for g, axes in made.plan.choices.items()}
    assert theirs == ours
    assert again.plan.pins
    assert all("annotation of node" in pin.origin for pin in again.plan.pins.values())


def test_annotations_are_kept_though_another_plan_is_cheaper(annotated: Make, tmp_path: Path) -> None:
    """The plan in it leaves the vocabulary whole on every rank."""
    made = annotated("tiny-llama-optimum", 4)
    vocabulary = {leaf for g in made.plan.groups if g.role in ("vocabulary", "output") for leaf in g.leaves}
    assignment = {leaf: axes for leaf, axes in made.plan.assignment.items() if leaf not in vocabulary}
    proto, _ = replanned(made, assignment)
    write_annotated(proto, made.prepared.source, tmp_path / "annotated.onnx")
    (build,) = plan_model(tmp_path / "annotated.onnx", tensor_parallel_sizes=(4,)).builds
    assert {g.role for g in build.plan.choices} & {"vocabulary", "output"} == set()
    assert build.plan.price.collectives == 4  # two layers' sums, no embedding's, no scores'


def test_annotations_for_another_size_are_refused(annotated: Make, tmp_path: Path) -> None:
    made = annotated("tiny-llama-optimum", 4)
    write_annotated(made.proto, made.prepared.source, tmp_path / "annotated.onnx")
    with pytest.raises(AnnotationError, match=r'annotated for "furiosa-tp4" \(4 devices\), not for 8 devices'):
        plan_model(tmp_path / "annotated.onnx", tensor_parallel_sizes=(8,))


def small(*given: tuple[str, onnx.ShardingSpecProto], devices: int = 4) -> onnx.ModelProto:
    proto = onnx.parser.parse_model(
        '<ir_version: 11, opset_import: ["": 21]> g (float[8, 8] x) => (float[8, 8] z)'
        "{ [one] y = MatMul(x, W)\n[two] z = MatMul(y, W) }"
    )
    proto.graph.initializer.append(onnx.numpy_helper.from_array(np.eye(8, dtype=np.float32), "W"))
    proto.configuration.add(name="c", num_devices=devices)
    for name, made in given:
        node = next(n for n in proto.graph.node if n.name == name)
        if not node.device_configurations:
            node.device_configurations.add(configuration_id="c")
        node.device_configurations[0].sharding_spec.append(made)
    return proto


def test_a_reader_that_gathers_does_not_contradict() -> None:
    proto = small(("one", spec("W", {1: 4}, range(4))), ("two", spec("W", {}, [range(4)])))
    found = {(c.dim, c.parts, c.origin) for c in read_constraints(proto, 4)}
    assert found == {(0, 1, 'annotation of node MatMul "one"'), (1, 4, 'annotation of node MatMul "one"')}


def test_the_order_of_readers_does_not_matter() -> None:
    proto = small(("one", spec("W", {}, [range(4)])), ("two", spec("W", {-1: 4}, range(4))))
    assert {(c.dim, c.parts) for c in read_constraints(proto, 4)} == {(0, 1), (1, 4)}


@pytest.mark.parametrize(
    ("proto", "message"),
    [
        (small(("one", spec("W", {1: 4}, range(4))), ("two", spec("W", {0: 4}, range(4)))), "split by 4 on axis 0"),
        (small(("one", spec("y", {1: 4}, range(4))), ("two", spec("y", {0: 4}, range(4)))), 'MatMul "two" has "y"'),
        (small(("one", spec("W", {1: 2}, range(2))), devices=2), r'"c" \(2 devices\), not for 4'),
        (small(("one", spec("W", {2: 4}, range(4)))), "the tensor has 2 dimensions"),
        (small(("one", spec("y", {-1: 4}, range(4)))), "counts axis -1 from the back"),
        (small(("one", spec("W", {1: 0}, [range(4)]))), "num_shards 0"),
    ],
)
def test_contradictions_are_refused_with_the_node(proto: onnx.ModelProto, message: str) -> None:
    with pytest.raises(AnnotationError, match=message):
        read_constraints(proto, 4)


def test_two_configurations_of_one_size_are_refused() -> None:
    proto = small(("one", spec("W", {1: 4}, range(4))))
    proto.configuration.add(name="d", num_devices=4)
    other = proto.graph.node[0].device_configurations.add(configuration_id="d")
    other.sharding_spec.append(spec("W", {0: 4}, range(4)))
    with pytest.raises(AnnotationError, match='several configurations for 4 devices, "c" and "d"'):
        read_constraints(proto, 4)


def test_a_model_without_annotations_has_no_constraints() -> None:
    assert read_constraints(small(), 4) == ()


# -- files -------------------------------------------------------------------------------------------------------


def test_external_data_is_referred_to_from_a_folder_above(annotated: Make, tmp_path: Path) -> None:
    made = annotated("tiny-llama-genai-fp32", 4)
    shutil.copytree(made.path.parent, tmp_path / "model")
    source = made.source_in(tmp_path / "model")
    write_annotated(made.proto, source, tmp_path / "above.onnx")
    locations = {
        entry.value
        for tensor in onnx.load(tmp_path / "above.onnx", load_external_data=False).graph.initializer
        for entry in tensor.external_data
        if entry.key == "location"
    }
    assert locations == {"model/model.onnx.data"}
    session(onnx.load(tmp_path / "above.onnx"))
    (tmp_path / "elsewhere").mkdir()
    with pytest.raises(OutputError, match=r"neither beside it nor below.*write the file into"):
        write_annotated(made.proto, source, tmp_path / "elsewhere" / "out.onnx")
    assert list((tmp_path / "elsewhere").iterdir()) == []
    (tmp_path / "model" / "model.onnx.data").unlink()  # a graph without its weights
    write_annotated(made.proto, source, tmp_path / "elsewhere" / "out.onnx")


def test_existing_files_and_missing_folders_are_refused(annotated: Make, tmp_path: Path) -> None:
    made = annotated("tiny-llama-optimum", 4)
    (tmp_path / "there.onnx").touch()
    with pytest.raises(OutputError, match="exists already; name another file"):
        write_annotated(made.proto, made.prepared.source, tmp_path / "there.onnx")
    with pytest.raises(OutputError, match="is not a folder; make it first"):
        write_annotated(made.proto, made.prepared.source, tmp_path / "none" / "out.onnx")


def test_annotating_again_replaces_the_annotations(annotated: Make, tmp_path: Path) -> None:
    made = annotated("tiny-llama-genai-fp32", 4)
    shutil.copytree(made.path.parent, tmp_path / "model")
    write_annotated(made.proto, made.source_in(tmp_path / "model"), tmp_path / "model" / "annotated.onnx")
    again = prepare(tmp_path / "model" / "annotated.onnx")
    plan = Planning(again.analysis, again.states, again.probes).plan(made.mesh)
    proto = annotate(again.source, again.analysis, plan.assignment, plan.outcome, made.mesh)
    assert proto == made.proto
