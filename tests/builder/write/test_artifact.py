"""What is written: every weight once, in a way that leads back to the original, and the same bytes every time."""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from safetensors import safe_open

from furiosa_llm.builder import ArtifactBuilder, BuildReport, read_tactics
from furiosa_llm.runtime.artifact.layout import axes_of, global_size, index_map
from furiosa_llm.runtime.artifact.manifest import StoredTensor
from furiosa_llm.runtime.artifact.parse import parse_manifest
from furiosa_llm.runtime.artifact.reader import Artifact, open_artifact
from furiosa_llm.runtime.execution.executor import Executor
from tests.builder.write.test_streaming import digests
from tests.conftest import Built
from tests.support.artifacts import artifact_of
from tests.support.builder.graphs import model, random
from tests.support.builder.parity import DECODE, PREFILL, feeds_of
from tests.support.builder.stitching import Array, SplitModel, session, stitch
from tests.support.tiers import tiered

MODELS = [
    "tiny-llama-optimum",
    "tiny-qwen2-14-2-optimum",
    "tiny-llama-9-3-optimum",
    "tiny-phi3-optimum",
    "tiny-bert-optimum",
    "tiny-llama-genai-fp32",
    "tiny-gptoss-genai-fp32-fullkv",
    "tiny-llama-genai-fp16-cuda",
    "tiny-llama-genai-int4",
    "tiny-llama-genai-int4-qdq",
    "tiny-llama-genai-int8",
    "tiny-mixtral-dynamo-tf5",
]
FAST = {
    *(("tiny-llama-optimum", 4), ("tiny-qwen2-14-2-optimum", 8), ("tiny-llama-9-3-optimum", 8)),
    *(("tiny-phi3-optimum", 8), ("tiny-bert-optimum", 4), ("tiny-llama-genai-fp16-cuda", 4)),
    *(("tiny-llama-genai-int4", 4), ("tiny-llama-genai-int4-qdq", 8), ("tiny-mixtral-dynamo-tf5", 4)),
}
ROWS = tiered([(name, tp) for name in MODELS for tp in (4, 8)], FAST)


def build(path: Path, tp: int, folder: Path) -> tuple[BuildReport, Artifact]:
    report = ArtifactBuilder(path, tensor_parallel_size=tp).build(folder / "artifact")
    return report, open_artifact(folder / "artifact", full=True)


# -- the way back ----------------------------------------------------------------------------------------------------


def elements(artifact: Artifact, tensor: StoredTensor, rank: int) -> Array:
    """What a rank sees of a stored tensor."""
    data = artifact.read_window(artifact.window(tensor.name, rank)).tobytes()
    dtype = ir.DataType[tensor.dtype]
    proto = onnx.TensorProto(data_type=int(dtype), dims=tensor.local_shape, raw_data=data)
    return np.asarray(ir.serde.deserialize_tensor(proto).numpy())


def rebuild(artifact: Artifact, names: tuple[str, ...], shape: tuple[int, ...], dtype: ir.DataType) -> Array:
    """An original initializer from its stored tensors, checking that they hold every element and agree on it."""
    mesh = artifact.manifest.mesh
    whole = np.zeros(shape, dtype=dtype.numpy())
    covered = np.zeros(shape, dtype=np.int64)
    for tensor in (artifact.tensors[name] for name in names):
        assert tensor.layout is not None
        start = 0 if tensor.part is None else tensor.part.start
        for position in range(mesh.parts(tensor.shard_axes)):
            rank = next(r for r in range(mesh.size) if mesh.position(r, tensor.shard_axes) == position)
            maps = [index_map(dim, mesh, rank) for dim in tensor.layout]
            valid = [np.flatnonzero(indices >= 0) for indices in maps]
            shard = elements(artifact, tensor, rank)
            here = [i[v] + (start if tensor.part and d == tensor.part.dim else 0)
                    for d, (i, v) in enumerate(zip(maps, valid, strict=True))]  # fmt: skip
            kept = shard[np.ix_(*valid)]
            place = np.ix_(*here)
            assert bits(kept) == bits(np.where(covered[place] > 0, whole[place], kept)), "two shards disagree"
            whole[place] = kept
            covered[place] += 1
            padding = shard.copy()
            padding[np.ix_(*valid)] = np.zeros((), dtype=shard.dtype)
            assert not padding.astype(np.float64).any(), "padding is not zero"
    assert (covered > 0).all()
    return whole


def bits(array: Array) -> bytes:
    return np.ascontiguousarray(array).tobytes()


@pytest.mark.parametrize(("name", "tp"), ROWS)
def test_every_initializer_is_there_bit_for_bit(name: str, tp: int, built: Built, zoo: Path) -> None:
    _, artifact = built(name, tp)
    originals = {i.name: i for i in onnx.load(zoo / name / "model.onnx").graph.initializer}
    source = onnx.load(artifact.folder / "source.onnx", load_external_data=False)
    kept = {initializer.name: initializer for initializer in source.graph.initializer}
    entries = {entry.name: entry for entry in artifact.manifest.initializers}
    assert entries.keys() == originals.keys() == kept.keys()
    for initializer_name, original in originals.items():
        expected, entry = ir.from_proto(original), entries[initializer_name]
        assert (entry.dtype, entry.shape) == (expected.dtype.name, tuple(expected.shape.numpy()))
        if entry.stored:
            found = rebuild(artifact, entry.stored, entry.shape, expected.dtype)
            external = {item.key: item.value for item in kept[initializer_name].external_data}
            assert external == {"location": "artifact"}
            assert not kept[initializer_name].raw_data
        else:
            found = ir.from_proto(kept[initializer_name]).numpy()
        assert bits(found) == bits(expected.numpy()), initializer_name


@pytest.mark.parametrize("name", tiered(MODELS, {name for name, tp in FAST if tp == 4}))
def test_source_is_the_original_graph(name: str, built: Built, zoo: Path) -> None:
    _, artifact = built(name, 4)
    source = onnx.load(artifact.folder / "source.onnx", load_external_data=False)
    original = onnx.load(zoo / name / "model.onnx", load_external_data=False)
    del source.graph.initializer[:], original.graph.initializer[:]
    assert source == original


@pytest.mark.parametrize(("name", "tp"), ROWS)
def test_nothing_is_stored_twice(name: str, tp: int, built: Built) -> None:
    """2 % for what every layer repeats; and padding, which is declared."""
    report, artifact = built(name, tp)
    assert report.stored_nbytes <= 1.02 * report.model_nbytes + report.padding_nbytes
    mesh = artifact.manifest.mesh
    padding = sum(
        (np.prod(t.local_shape) * mesh.parts(t.shard_axes) - np.prod([global_size(dim) for dim in t.layout]))
        * ir.DataType[t.dtype].bitwidth // 8
        for t in artifact.manifest.tensors if t.layout is not None
    )  # fmt: skip
    assert report.padding_nbytes == padding


def test_aliases_unused_and_dead_initializers_are_kept(tmp_path: Path) -> None:
    """One matrix under two names, one that no node reads, and one that only dead code reads."""
    nodes = "x = Gather(e, input_ids) a = MatMul(x, w) b = Identity(w) c = MatMul(a, b) y = Identity(c) d = Neg(dead)"
    names = {"e": (64, 32), "w": (32, 32), "unused": (40, 40), "dead": (50, 50)}
    weights = {name: random(*shape, seed=number) for number, (name, shape) in enumerate(names.items())}
    proto = model("int64[batch, sequence] input_ids", "float[batch, sequence, 32] y", nodes, weights)
    (tmp_path / "model.onnx").write_bytes(proto.SerializeToString())
    _, artifact = build(tmp_path / "model.onnx", 4, tmp_path)
    entries = {entry.name: entry for entry in artifact.manifest.initializers}
    for name, array in weights.items():
        assert entries[name].stored, "source.onnx must not keep weights"
        np.testing.assert_array_equal(rebuild(artifact, entries[name].stored, array.shape, ir.DataType.FLOAT), array)


def test_names_that_look_like_ours(tmp_path: Path) -> None:
    """A weight keeps its own name, whatever is in it."""
    names = ("layers/use_cache/w", "constant/0", "rank/is_first/0")
    chain = "x = Gather(e, input_ids) a = MatMul(x, w0) b = MatMul(a, w1) y = MatMul(b, w2)"
    weights = {f"w{number}": (32, 32) for number in range(3)}
    inputs, outputs = "int64[batch, sequence] input_ids", "float[batch, sequence, 32] y"
    proto = model(inputs, outputs, chain, {"e": (64, 32), **weights})
    for number, name in enumerate(names):  # the text format has no such names
        next(i for i in proto.graph.initializer if i.name == f"w{number}").name = name
        next(n for n in proto.graph.node if f"w{number}" in n.input).input[1] = name
    (tmp_path / "model.onnx").write_bytes(proto.SerializeToString())
    _, artifact = build(tmp_path / "model.onnx", 4, tmp_path)
    assert artifact.tensors.keys() >= set(names)


# -- the same every time ---------------------------------------------------------------------------------------------


def test_two_builds_are_the_same_bytes(zoo: Path, tmp_path: Path) -> None:
    """In two processes, whose hashes of names differ."""
    program = (
        "import sys; from furiosa_llm.builder import ArtifactBuilder; ArtifactBuilder(sys.argv[1]).build(sys.argv[2])"
    )
    command = [sys.executable, "-c", program, str(zoo / "tiny-qwen2-14-2-optimum" / "model.onnx"), "again"]
    subprocess.run(command, check=True, env={**os.environ, "PYTHONHASHSEED": "1"}, cwd=tmp_path)
    assert digests(tmp_path / "again") == digests(artifact_of("tiny-qwen2-14-2-optimum"))


def test_manifest_is_read_as_it_was_written(built: Built) -> None:
    _, artifact = built("tiny-llama-optimum", 4)
    written = (artifact.folder / "manifest.json").read_bytes()
    assert parse_manifest(written).to_bytes() == written


# -- the program -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["tiny-llama-optimum", "tiny-gpt2-dynamo-tf5", "tiny-llama-genai-fp32", "tiny-phi3-optimum"]
)
def test_one_block_for_each_layer(name: str, built: Built) -> None:
    _, artifact = built(name, 4)
    manifest, nodes = artifact.manifest, artifact.program.graph.node
    assert [block.name for block in manifest.blocks] == ["block.0", "block.1"]
    assert manifest.blocks[0].first_node == 0
    assert sum(block.collectives for block in manifest.blocks) == len(manifest.collectives)
    second = manifest.blocks[1]
    assert 1 <= len(second.crossing) <= 2
    assert nodes[second.first_node - 1].domain == "furiosa_llm", "a block ends with a collective"
    states = {state.input for state in manifest.states}
    used = [
        {i for n in part for i in n.input} & states for part in (nodes[: second.first_node], nodes[second.first_node :])
    ]
    assert [len(part) for part in used] == [2, 2]
    local = {t.name: int(np.prod(t.local_shape)) * ir.DataType[t.dtype].bitwidth // 8 for t in manifest.tensors}
    assert sum(block.weight_nbytes for block in manifest.blocks) == sum(local.values())


@pytest.mark.parametrize(
    "name", ["tiny-llama-optimum", "tiny-bloom-optimum", "tiny-llama-genai-fp32", "tiny-mixtral-dynamo-tf5"]
)
def test_declared_shapes_are_those_of_onnxruntime(name: str, built: Built) -> None:
    """The shapes of what collectives take and give, against what runs."""
    _, artifact = built(name, 4)
    split, manifest = SplitModel.of_artifact(artifact), artifact.manifest
    graph = artifact.program.graph
    declared = {value.name: value.type.tensor_type for value in (*graph.value_info, *graph.output)}
    stitched = stitch(split)
    stitched.graph.output.extend(onnx.ValueInfoProto(name=f"r1/{value.name}") for value in graph.value_info)
    running = session(stitched, artifact.folder)
    names = [value.name for value in running.get_outputs() if value.name.startswith("r1/")]
    for case in (PREFILL, DECODE):
        feeds = feeds_of(manifest.inputs, case, manifest.model.vocab_size)
        local = split.local_feeds(feeds)
        wanted = {value.name for value in running.get_inputs()}
        found = dict(zip(names, running.run(names, {n: a for n, a in local.items() if n in wanted}), strict=True))
        sizes = dict(case.sizes)
        for value, declaration in declared.items():
            array = found[f"r1/{value}"]
            assert ir.DataType.from_numpy(array.dtype) == declaration.elem_type
            assert len(declaration.shape.dim) == array.ndim, value
            for dim, size in zip(declaration.shape.dim, array.shape, strict=True):
                if dim.HasField("dim_value"):
                    assert dim.dim_value == size, value
                elif dim.dim_param in sizes:
                    assert sizes[dim.dim_param] == size, value


def test_every_rank_runs_the_same_nodes(built: Built) -> None:
    """Ranks differ in initializers only, and those are windows of one length."""
    _, artifact = built("tiny-qwen2-14-2-optimum", 8)
    for initializer in artifact.program.graph.initializer:
        if initializer.data_location == onnx.TensorProto.EXTERNAL:
            entries = {item.key: item.value for item in initializer.external_data}
            window = artifact.window(initializer.name, 0)
            assert (entries["location"], int(entries["offset"]), int(entries["length"])) == (
                window.file,
                window.offset,
                window.nbytes,
            )


def test_a_key_head_is_stored_once_for_all_ranks_that_have_it(built: Built) -> None:
    """2 key heads over 8 ranks: 2 shards, each for 4 ranks."""
    _, artifact = built("tiny-qwen2-14-2-optimum", 8)
    keys = [t for t in artifact.manifest.tensors if t.layout and [global_size(d) for d in t.layout] == [224, 32]]
    assert len(keys) == 4, "keys and values of two layers"
    for tensor in keys:
        assert artifact.manifest.mesh.parts(tensor.shard_axes) == 2
        assert len({artifact.window(tensor.name, rank).offset for rank in range(8)}) == 2


# -- the files -------------------------------------------------------------------------------------------------------


def test_tokenizer_and_configuration_are_copied(built: Built, zoo: Path) -> None:
    folder = zoo / "tiny-llama-genai-fp32"
    _, artifact = built(folder.name, 4)
    for name in ("chat_template.jinja", "genai_config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (artifact.folder / name).read_bytes() == (folder / name).read_bytes()
        assert name in {entry.path for entry in artifact.manifest.files}
    listed = {entry.path for entry in artifact.manifest.files} | {"manifest.json"}
    assert {path.name for path in artifact.folder.iterdir()} == listed
    assert "model.onnx.data" not in listed


@pytest.mark.parametrize("name", ["tiny-llama-optimum", "tiny-llama-genai-int4-qdq", "tiny-llama-genai-fp16-cuda"])
def test_safetensors_opens_the_weights(name: str, built: Built) -> None:
    _, artifact = built(name, 4)
    with safe_open(artifact.folder / "weights-00001.safetensors", framework="numpy") as file:
        assert set(file.keys()) == artifact.tensors.keys()
        for tensor in artifact.manifest.tensors:
            found = file.get_tensor(tensor.name)
            shards = artifact.manifest.mesh.parts(tensor.shard_axes)
            assert found.shape[0] == shards
            for rank in range(artifact.manifest.mesh.size):
                shard = found[artifact.manifest.mesh.position(rank, tensor.shard_axes)]
                assert shard.tobytes() == artifact.read_window(artifact.window(tensor.name, rank)).tobytes()


@pytest.mark.parametrize(
    ("name", "tp"), [("tiny-bert-optimum", 4), ("tiny-llama-genai-int4-qdq", 8), ("tiny-llama-genai-fp16-cuda", 4)]
)
def test_every_window_is_aligned_to_its_elements(name: str, tp: int, built: Built) -> None:
    _, artifact = built(name, tp)
    for tensor in artifact.manifest.tensors:
        size = max(1, ir.DataType[tensor.dtype].bitwidth // 8)
        assert [artifact.window(tensor.name, rank).offset % size for rank in range(tp)] == [0] * tp


def test_weights_files_have_a_greatest_size(zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("furiosa_llm.builder.write.streaming.MAX_WEIGHTS_FILE_NBYTES", 200_000)
    _, artifact = build(zoo / "tiny-llama-optimum" / "model.onnx", 4, tmp_path)
    sizes = [entry.nbytes for entry in artifact.manifest.files if entry.path.startswith("weights-")]
    assert len(sizes) > 3
    largest = max(
        math.prod(t.local_shape) * 4 * artifact.manifest.mesh.parts(t.shard_axes) for t in artifact.tensors.values()
    )
    assert max(sizes) < max(200_000, largest) + 10_000


def test_progress_counts_every_byte(zoo: Path, tmp_path: Path) -> None:
    told: list[tuple[str, int, int]] = []
    builder = ArtifactBuilder(zoo / "tiny-llama-optimum" / "model.onnx")
    builder.build(tmp_path / "artifact", progress=lambda *step: told.append(step))
    stages = list(dict.fromkeys(stage for stage, _, _ in told))
    assert stages == ["load", "analyse", "plan", "lower", "write", "prove"]
    written = [(done, total) for stage, done, total in told if stage == "write"]
    assert written == sorted(written)
    assert written[-1][0] == written[-1][1] > 0


def test_what_the_report_says(built: Built) -> None:
    report, artifact = built("tiny-qwen2-14-2-optimum", 8)
    assert report.artifact == str(artifact.folder)
    assert report.collectives == {"AllReduce": 5, "AllGather": 1}
    assert report.weight_nbytes < report.model_nbytes / 5
    heads = [d for d in report.decisions if d.size == 7]
    assert [(d.parts, d.padded_size) for d in heads] == [(4, 8)]
    assert report.state_nbytes_per_token == 2 * 2 * 16 * 4, "one key head and one value head, in two layers"
    assert report.padding_nbytes > 0
    assert report.num_nodes == len(artifact.program.graph.node)
    assert [axes_of(dim) for dim in artifact.manifest.inputs[-1].layout if dim is not None] == [(0,), ()]


def test_a_weight_in_two_layouts(tmp_path: Path) -> None:
    """One product takes its columns in parts, a softmax of it needs them whole: both are stored, and both are read."""
    nodes = "h = MatMul(x, w) r = Relu(h) y = MatMul(r, v) s = Softmax<axis = 1>(w) t = MatMul(x, s) z = ReduceMax(t)"
    weights = {"w": (8, 64), "v": (64, 8)}
    proto = model("float[batch, 8] x", "float[batch, 8] y, float[one, two] z", nodes, weights)
    onnx.save(proto, tmp_path / "model.onnx")
    text = '[[tactic]]\nweight = "w"\ndim = 1\nplace = 4'
    (tmp_path / "tactics.toml").write_text(text)
    builder = ArtifactBuilder(tmp_path / "model.onnx", tactics=read_tactics(tmp_path / "tactics.toml"))
    report = builder.build(tmp_path / "artifact")
    assert report.faults == ()
    layouts = [t.layout for t in open_artifact(tmp_path / "artifact").tensors.values() if t.origin == "w"]
    assert len(layouts) == 2
    x = np.random.default_rng(0).standard_normal((3, 8)).astype(np.float32)
    expected = session(proto).run(None, {"x": x})
    with Executor(open_artifact(tmp_path / "artifact")) as executor:
        found = executor.run({"x": x})
    for name, array in zip(("y", "z"), expected, strict=True):
        np.testing.assert_allclose(found[name], array, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", tiered(MODELS, {name for name, tp in FAST if tp == 8}))
def test_programs_pass_the_checker(name: str, built: Built, tmp_path: Path) -> None:
    """The collectives' domain is declared, and the weights are where ONNX says that external data may be.

    What no ONNX version has, but an exporter wrote into the standard domain, is let pass.
    """
    _, artifact = built(name, 8)
    shutil.copytree(artifact.folder, tmp_path / "artifact")
    program = onnx.load(artifact.folder / "program.onnx", load_external_data=False)
    for node in program.graph.node:
        node.domain = "com.microsoft" if "Simplified" in node.op_type else node.domain
    onnx.save(program, tmp_path / "artifact" / "program.onnx")
    onnx.checker.check_model(tmp_path / "artifact" / "program.onnx")
    domains = {entry.domain for entry in artifact.program.opset_import}
    assert {node.domain for node in artifact.program.graph.node} <= domains
    assert "furiosa_llm" in domains
