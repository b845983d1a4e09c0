"""`compute="float32"`: numbers and tokens of the model that numpy converts, on plain onnxruntime, and what it costs."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import httpx
import ml_dtypes
import numpy as np
import onnx
import onnxruntime as ort
import pytest
from click.testing import CliRunner
from onnx import ModelProto, TensorProto, numpy_helper

from furiosa_llm import LLM, SamplingParams
from furiosa_llm.builder import ArtifactBuilder
from furiosa_llm.cli.main import cli
from furiosa_llm.runtime.artifact.compute import computing, float32_memory, in_float32, narrow_types
from furiosa_llm.runtime.artifact.graphs import used_names
from furiosa_llm.runtime.artifact.reader import Artifact, open_artifact
from furiosa_llm.runtime.errors import InputError, KernelError
from furiosa_llm.runtime.execution.executor import Executor
from furiosa_llm.runtime.placement.capacity import Memory
from furiosa_llm.runtime.placement.stages import choose_stages
from furiosa_llm.runtime.placement.workload import Workload
from tests.support.builder.exported import exported
from tests.support.builder.graphs import model as written
from tests.support.builder.graphs import random
from tests.support.float32 import Array, float32_model, greedy, narrowed
from tests.support.server.process import started

ZOO = Path(__file__).parents[3] / "fixtures" / "zoo"
PROMPT = [1, 2, 3, 4, 5]
GREEDY = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)


def run(model: ModelProto, **feeds: Array) -> list[Array]:
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    found: list[Array] = session.run(None, feeds)
    return found


def tokens(folder: Path, **options: Any) -> list[int]:
    with LLM.load_artifact(folder, compute="float32", **options) as llm:
        [output] = llm.generate([{"prompt_token_ids": PROMPT}], GREEDY)
    return list(output.outputs[0].token_ids)


# -- the conversion ------------------------------------------------------------------------------------------------


def test_values_attributes_branches_and_types() -> None:
    nodes = """
        a = MatMul(past_x, w)
        zero = ConstantOfShape<value = float[1] {1.0}>(one)
        b = Cast<to=1>(past_n)
        c = Add(a, zero) d = Mul(c, b)
        y = If(past_flag) <
            then_branch = t () => (float[2, 3] u) { u = Add(d, v) },
            else_branch = e () => (float[2, 3] u) { k = Constant<value = float[1] {2.0}>() u = Mul(d, k) }
        >
    """
    weights = {"w": (4, 3), "v": (2, 3), "one": np.array([1])}
    proto = narrowed(written("float[2, 4] past_x, int64[1] past_n, bool past_flag", "float[2, 3] y", nodes, weights))
    assert narrow_types(proto) == ("BFLOAT16",)
    converted, oracle = in_float32(proto).model, float32_model(proto)
    assert narrow_types(converted) == ()
    for flag in (True, False):
        feeds = {"past_x": random(2, 4), "past_n": np.array([3]), "past_flag": np.array(flag)}
        assert np.array_equal(run(converted, **feeds)[0], run(oracle, **feeds)[0])


def test_positions_of_nodes() -> None:
    """Where the nodes of the original begin, with the conversions in front of those that read weights."""
    proto = written("bfloat16[8, 80] past_x", "bfloat16[8, 80] y", "a = Add(past_x, w) b = Neg(a) y = Add(b, w)")
    proto.graph.initializer.append(numpy_helper.from_array(random(8, 80).astype(ml_dtypes.bfloat16), "w"))
    converted = in_float32(proto)
    assert [node.op_type for node in converted.model.graph.node] == ["Cast", "Add", "Neg", "Cast", "Add"]
    assert converted.positions == (0, 2, 3)


E2M1 = np.arange(16, dtype=np.uint8).view(ml_dtypes.float4_e2m1fn)


@pytest.mark.parametrize(
    ("kind", "attributes", "scale"),
    [
        (ml_dtypes.float4_e2m1fn, "axis=0, block_size=8", (2, 6)),
        (ml_dtypes.float4_e2m1fn, "axis=-1", (6,)),
        (ml_dtypes.float8_e4m3fn, "axis=0", (16,)),
        (ml_dtypes.float8_e5m2, "axis=1, block_size=3", (16, 2)),
    ],
)
@pytest.mark.parametrize("moved", [False, True])
def test_weights_that_are_dequantised(kind: type, attributes: str, scale: tuple[int, ...], *, moved: bool) -> None:
    """Also where the codes are moved before; the scale is bfloat16, and the result float32."""
    codes: Array = np.resize(E2M1.astype(np.float32), (16, 6)).astype(kind)
    move = "m = Identity(q) r = Transpose<perm=[1, 0]>(m) s = Transpose<perm=[1, 0]>(r)" if moved else "s = Identity(q)"
    nodes = f"{move} w = DequantizeLinear<{attributes}>(s, f) y = MatMul(past_x, w)"
    proto = written("bfloat16[2, 16] past_x", "bfloat16[2, 6] y", nodes, opset=23)
    proto.graph.initializer.append(numpy_helper.from_array(codes, "q"))
    numbers = np.abs(random(*scale)).astype(ml_dtypes.bfloat16)
    proto.graph.initializer.append(numpy_helper.from_array(numbers, "f"))
    plain = ModelProto()
    plain.CopyFrom(proto)
    del plain.graph.node[:-2]
    plain.graph.node[0].input[0] = "q"
    assert np.array_equal(
        run(in_float32(proto).model, past_x=random(2, 16))[0], run(float32_model(plain), past_x=random(2, 16))[0]
    )


def test_what_quantises_stays() -> None:
    """The type of a zero point says what an op quantises to."""
    proto = written(
        "bfloat16[2, 4] past_x", "bfloat16[2, 4] y", "q = QuantizeLinear(past_x, f, z) y = DequantizeLinear(q, f)"
    )
    proto.graph.initializer.append(numpy_helper.from_array(np.array(0.5, ml_dtypes.bfloat16), "f"))
    proto.graph.initializer.append(numpy_helper.from_array(np.array(0, ml_dtypes.float8_e4m3fn), "z"))
    x = random(2, 4)
    expected = (x / 0.5).astype(ml_dtypes.float8_e4m3fn).astype(np.float32) * 0.5
    assert np.array_equal(run(in_float32(proto).model, past_x=x)[0], expected)


# -- artifacts -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bf16(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A bfloat16 decoder over four PEs, and its model."""
    return built("mobius-bf16", tmp_path_factory.mktemp("bf16"), 4)


def built(name: str, folder: Path, tp: int) -> tuple[Path, Path]:
    model = exported(name, folder)
    ArtifactBuilder(model, tensor_parallel_size=tp).build(folder / "artifact")
    return folder / "artifact", model


def oracle_tokens(model: Path, artifact: Artifact) -> list[int]:
    return greedy(float32_model(onnx.load(model)), PROMPT, 8, artifact.manifest)


def test_tokens_of_a_bfloat16_decoder(bf16: tuple[Path, Path]) -> None:
    folder, model = bf16
    assert tokens(folder) == oracle_tokens(model, open_artifact(folder))


@pytest.mark.parametrize(
    ("name", "tp"), [("nvfp4", 4), *(pytest.param(n, 8, marks=pytest.mark.slow) for n in ("mobius-bf16", "nvfp4"))]
)
def test_tokens(name: str, tp: int, tmp_path: Path) -> None:
    folder, model = built(name, tmp_path, tp)
    assert tokens(folder) == oracle_tokens(model, open_artifact(folder))


ROWS = [
    ("tiny-llama-optimum", "BFLOAT16"),
    ("tiny-llama-genai-int4-qdq", "BFLOAT16"),
    ("tiny-qwen2-optimum", "FLOAT16"),
]


@pytest.mark.parametrize(
    ("name", "dtype"), [ROWS[0], *(pytest.param(*row, marks=pytest.mark.slow) for row in ROWS[1:])]
)
def test_tokens_of_narrowed_models_of_the_zoo(name: str, dtype: str, tmp_path: Path) -> None:
    narrow = narrowed(onnx.load(ZOO / name / "model.onnx"), TensorProto.DataType.Value(dtype))
    onnx.save(narrow, tmp_path / "model.onnx")
    ArtifactBuilder(tmp_path / "model.onnx").build(tmp_path / "artifact")
    artifact = open_artifact(tmp_path / "artifact")
    assert tokens(tmp_path / "artifact") == greedy(float32_model(narrow), PROMPT, 8, artifact.manifest)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"workers": 2}, {"pipeline_parallel_size": 2, "devices": "npu:0,npu:1"}])
def test_tokens_in_processes_and_in_stages(bf16: tuple[Path, Path], options: dict[str, object]) -> None:
    folder, model = bf16
    assert tokens(folder, **options) == oracle_tokens(model, open_artifact(folder))


def step() -> dict[str, Array]:
    empty = np.zeros((1, 4, 0, 8), ml_dtypes.bfloat16)
    inputs: dict[str, Array] = {f"past_key_values.{i}.{kind}": empty for i in (0, 1) for kind in ("key", "value")}
    return inputs | {
        "input_ids": np.array([PROMPT]),
        "attention_mask": np.ones((1, 5), np.int64),
        "position_ids": np.arange(5)[None],
    }


def test_inputs_and_outputs_of_a_run_are_as_declared(bf16: tuple[Path, Path], tmp_path: Path) -> None:
    """Each output is the float32 model's, rounded once; the same by the command line, whose files have no bfloat16."""
    folder, model = bf16
    wide = float32_model(onnx.load(model))
    inputs = step()
    feeds = {name: a.astype(np.float32) if a.dtype == ml_dtypes.bfloat16 else a for name, a in inputs.items()}
    expected = dict(zip([value.name for value in wide.graph.output], run(wide, **feeds), strict=True))
    with Executor(computing(open_artifact(folder), "float32"), threads=1) as executor:
        found = executor.run(inputs)
        with pytest.raises(InputError, match=r"past_key_values\.0\.key': found float32, expected bfloat16"):
            executor.run(feeds)
    for name, array in found.items():
        assert array.dtype == ml_dtypes.bfloat16
        error = np.abs(array.astype(np.float32) - expected[name]).max()
        assert error <= np.abs(expected[name]).max() * 2.0**-8, name  # half a unit in the last of 8 bits
    np.savez(tmp_path / "in.npz", allow_pickle=False, **inputs)
    given = ["--inputs", str(tmp_path / "in.npz"), "--outputs", str(tmp_path / "out.npz"), "--compute", "float32"]
    result = CliRunner().invoke(cli, ["run", str(folder), *given])
    assert result.exit_code == 0, result.output
    with np.load(tmp_path / "out.npz") as archive:
        assert np.array_equal(archive["logits"].view(ml_dtypes.bfloat16), found["logits"])


def test_sums_are_float32(bf16: tuple[Path, Path]) -> None:
    artifact = open_artifact(bf16[0])
    wide = computing(artifact, "float32")
    assert {one.dtype for one in artifact.manifest.collectives} == {"BFLOAT16"}
    assert {one.dtype for one in wide.manifest.collectives} == {"FLOAT"}
    assert narrow_types(wide.program) == ("BFLOAT16",)  # weights, as they are stored
    starts = [block.first_node for block in wide.manifest.blocks]
    assert starts == sorted(starts)
    assert starts[-1] > artifact.manifest.blocks[-1].first_node


def test_memory_is_counted_in_float32(bf16: tuple[Path, Path]) -> None:
    artifact = open_artifact(bf16[0])
    wide = computing(artifact, "float32")
    [own] = Memory(artifact).of_stages(choose_stages(artifact), Workload())
    [found] = Memory(wide).of_stages(choose_stages(wide), Workload())
    integers = sum(tensor.local_nbytes for tensor in artifact.manifest.tensors if tensor.dtype == "INT64")
    assert found.weight_nbytes == 2 * own.weight_nbytes - integers
    assert found.kv_nbytes_per_token == 2 * own.kv_nbytes_per_token
    assert found.activation_nbytes is not None
    assert own.activation_nbytes is not None
    assert found.activation_nbytes > own.activation_nbytes
    read = {name for node in artifact.program.graph.node for name in used_names(node)}
    said = float32_memory(artifact.manifest, read)
    assert said is not None
    assert (said.weight_nbytes, said.state_nbytes_per_token) == (found.weight_nbytes, found.kv_nbytes_per_token)
    assert said.tensors == {"BFLOAT16": sum(tensor.dtype == "BFLOAT16" for tensor in artifact.manifest.tensors)}


def test_inspect_says_what_is_converted(bf16: tuple[Path, Path]) -> None:
    result = CliRunner().invoke(cli, ["inspect", str(bf16[0])], env={"COLUMNS": "250"})
    [line] = [line for line in result.output.splitlines() if "in float32" in line]
    assert "BFLOAT16 tensors converted: " in line
    assert "--compute float32" in line


def test_topology_and_plan_count_in_float32(bf16: tuple[Path, Path]) -> None:
    folder, model = bf16
    plain, wide = (
        CliRunner().invoke(cli, ["plan", str(model), "-tp", "4", "--json", *more]).output
        for more in ([], ["--compute", "float32"])
    )
    own, found = (json.loads(text) for text in (plain, wide))
    assert found["plans"][0]["weight_nbytes"] > 1.9 * own["plans"][0]["weight_nbytes"]
    assert found["plans"][0]["working"]["nbytes"] > own["plans"][0]["working"]["nbytes"]
    assert {one["op"] for one in own["missing_kernels"]} >= {"MatMul", "Attention"}
    result = CliRunner().invoke(cli, ["topology", str(folder), "--compute", "float32", "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.output)["stages"][0]["weight_nbytes"] == found["plans"][0]["weight_nbytes"]


# -- refusals ------------------------------------------------------------------------------------------------------


def test_a_missing_kernel_names_the_way_out(bf16: tuple[Path, Path]) -> None:
    with pytest.raises(
        KernelError, match=r"no CPU kernel here for \w+ .*BFLOAT16; .*--compute float32, compute='float32'"
    ):
        LLM.load_artifact(bf16[0])


def test_other_types_are_refused(bf16: tuple[Path, Path]) -> None:
    with pytest.raises(InputError, match=r'compute must be "float32", got \'int8\''):
        LLM.load_artifact(bf16[0], compute="int8")
    result = CliRunner().invoke(cli, ["verify", os.fspath(bf16[0]), "--compute", "bfloat16"])
    assert (result.exit_code, 'must be "float32", got bfloat16' in result.output) == (2, True)


# -- an encoder-decoder, a server ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_tokens_of_a_bfloat16_encoder_decoder(tmp_path: Path) -> None:
    """Those of the artifact of the models that numpy converted."""
    prompts = [np.random.default_rng(n).integers(3, 1024, n).tolist() for n in (1, 5, 23)]
    found = []
    for name, convert in (("narrow", narrowed), ("wide", lambda model: float32_model(narrowed(model)))):
        (tmp_path / name).mkdir()
        for part in ("encoder_model", "decoder_model", "decoder_with_past_model"):
            onnx.save(convert(onnx.load(ZOO / "tiny-t5-optimum" / f"{part}.onnx")), tmp_path / name / f"{part}.onnx")
        (tmp_path / name / "config.json").write_bytes((ZOO / "tiny-t5-optimum" / "config.json").read_bytes())
        ArtifactBuilder(tmp_path / name).build(tmp_path / f"{name}.artifact")
        with LLM.load_artifact(tmp_path / f"{name}.artifact", compute="float32" if name == "narrow" else None) as llm:
            outputs = llm.generate(prompt_token_ids=prompts, sampling_params=GREEDY)
        found.append([list(output.outputs[0].token_ids) for output in outputs])
    assert found[0] == found[1]
    assert len(set(map(tuple, found[0]))) > 1


@pytest.mark.slow
def test_a_server_of_a_bfloat16_decoder(bf16: tuple[Path, Path]) -> None:
    pytest.importorskip("fastapi")
    folder, _ = bf16
    body = {"model": "m", "prompt": PROMPT, "temperature": 0, "max_tokens": 8, "ignore_eos": True}
    with started(folder, "--compute", "float32", "--served-model-name", "m", "--threads", "1") as server:
        answer = httpx.post(f"{server.url}/v1/completions", json={**body, "return_token_ids": True}, timeout=60)
    assert answer.status_code == 200, answer.text
    assert answer.json()["choices"][0]["token_ids"] == tokens(folder)
