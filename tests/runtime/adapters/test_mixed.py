"""Requests with unlike adapters over one artifact: each has the tokens of its adapter merged into the weights, alone.

The merged weights are rounded where the sum of two products is not, so that logits differ in their last bits. The
models' weights are random, and the best two logits lie further apart than that by orders of magnitude: tokens are
equal.
"""

from __future__ import annotations

import asyncio
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from click.testing import CliRunner

from furiosa_llm import LLM, AsyncLLMEngine, LoRARequest, SamplingParams
from furiosa_llm.builder import ArtifactBuilder, build_by_plan_of, plan_model, reshard
from furiosa_llm.builder.errors import OptionError
from furiosa_llm.cli.main import cli
from furiosa_llm.parity_options import ParityOptions
from furiosa_llm.runtime.artifact.adapters.inputs import adapter_inputs
from furiosa_llm.runtime.artifact.adapters.stored import own_adapters, to_safetensors
from furiosa_llm.runtime.artifact.dtypes import Array
from furiosa_llm.runtime.artifact.errors import AdapterError
from furiosa_llm.runtime.artifact.reader import open_artifact
from furiosa_llm.verification import verify_artifact
from tests.support.adapters import LORA, deltas, greedy, merged, saved
from tests.support.builder.exported import exported

ZOO = Path(__file__).parents[3] / "fixtures" / "zoo"
LLAMA = {
    f"model.layers.{layer}.{module}": size
    for layer in (0, 1)
    for module, size in (("self_attn.q_proj", (64, 64)), ("self_attn.o_proj", (64, 64)), ("mlp.down_proj", (176, 64)))
}
"""Of fixtures/zoo/tiny-llama-optimum, which has no inputs for adapters."""
PROMPTS = ([3, 17, 5, 60, 9], [1, 2], [4, 4, 4, 4, 4], [9], [3, 17, 5, 60, 9], [3, 17, 5, 60, 9], [7, 7])
TOKENS = 6
PARAMS = SamplingParams(max_tokens=TOKENS, temperature=0, ignore_eos=True)
_SCALES = {"one": 8 / 4, "two": 4 / 8**0.5, "three": 16 / 3}


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model, adapters for it, its artifact, and which tokens each adapter chooses after each prompt."""

    model: Path
    artifact: Path
    adapters: dict[str, Path]
    expected: dict[str | None, list[list[int]]]

    def requests(self, count: int) -> list[LoRARequest | None]:
        """None and all adapters in turn."""
        named = list(enumerate(self.adapters.items(), 1))
        found = [None, *(LoRARequest(name, number, str(path)) for number, (name, path) in named)]
        return [found[index % len(found)] for index in range(count)]

    def tokens(self, requests: Sequence[LoRARequest | None]) -> list[list[int]]:
        """What the prompts must give."""
        return [self.expected[None if r is None else r.lora_name][index] for index, r in enumerate(requests)]


def _case(folder: Path, model: Path, sizes: dict[str, tuple[int, int]], weights: dict[str, str], **build: bool) -> Case:
    names = list(sizes)
    adapters = {
        "one": saved(folder / "one", {name: sizes[name] for name in names[::2]}, rank=4, seed=1),
        "two": saved(folder / "two", {n: sizes[n] for n in names[1:]}, rank=8, alpha=4, seed=2, use_rslora=True),
        "three": saved(folder / "three", sizes, rank=3, alpha=16, seed=3),
    }
    artifact = folder / "artifact"
    report = ArtifactBuilder(model, lora=adapters if build["lora"] else None).build(artifact)
    assert report.faults == ()
    plain = artifact if not build["lora"] else folder / "plain"
    if build["lora"]:
        ArtifactBuilder(model).build(plain)
    opened = open_artifact(plain)
    expected: dict[str | None, list[list[int]]] = {}
    for name, path in [(None, None), *adapters.items()]:
        added = {} if path is None or name is None else deltas(path, _SCALES[name])
        expected[name] = greedy(merged(model, folder / "merged.onnx", weights, added), opened, PROMPTS, TOKENS)
    assert len({str(tokens) for tokens in expected.values()}) == 4
    return Case(model=model, artifact=artifact, adapters=adapters, expected=expected)


@pytest.fixture(scope="module")
def taking(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """A model that takes adapters, one set in a step."""
    folder = tmp_path_factory.mktemp("taking")
    weights = {
        "layers.0.self_attn.q_proj": "w16_64x64",
        "layers.0.self_attn.v_proj": "w20_64x32",
        "layers.0.mlp.down_proj": "w45_128x64",
    }
    return _case(folder, exported("lora", folder), dict(LORA), weights, lora=False)


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """A model that takes none as it was exported, and gets inputs for them."""
    folder = tmp_path_factory.mktemp("given")
    source = shutil.copytree(ZOO / "tiny-llama-optimum", folder / "source") / "model.onnx"
    weights = dict(_weights(source))
    return _case(folder, source, LLAMA, weights, lora=True)


def _weights(model: Path) -> Iterator[tuple[str, str]]:
    for node in onnx.load(model, load_external_data=False).graph.node:
        module = node.name.strip("/").replace("/", ".").removesuffix(".MatMul")
        if node.op_type == "MatMul" and module.endswith("_proj"):
            yield module, node.input[1]


@pytest.fixture(params=["taking", "given"])
def case(request: pytest.FixtureRequest) -> Case:
    found: Case = request.getfixturevalue(request.param)
    return found


def completed(llm: LLM, requests: Sequence[LoRARequest | None]) -> list[list[int]]:
    outputs = llm.generate(prompt_token_ids=list(PROMPTS), sampling_params=PARAMS, lora_request=list(requests))
    return [output.outputs[0].token_ids for output in outputs]


def test_tokens_are_those_of_merged_weights(case: Case) -> None:
    requests = case.requests(len(PROMPTS))
    with LLM(case.artifact, threads=1) as llm:
        assert completed(llm, requests) == case.tokens(requests)
        for request in case.requests(4):
            assert completed(llm, [request] * len(PROMPTS)) == case.tokens([request] * len(PROMPTS))


@pytest.mark.parametrize(
    ("options", "tp"),
    [
        ({"pipeline_parallel_size": 2, "data_parallel_size": 2}, 4),
        pytest.param({"workers": 2}, 4, marks=pytest.mark.slow),
        pytest.param({"batch_invariant": True}, 4, marks=pytest.mark.slow),
        pytest.param({"paged_attention_num_blocks": 2, "max_batch_size": 4}, 4, marks=pytest.mark.slow),
        pytest.param({"pipeline_parallel_size": 2}, 8, marks=pytest.mark.slow),
    ],
)
def test_however_it_is_run(options: dict[str, Any], tp: int, given: Case, tmp_path: Path) -> None:
    artifact, requests = given.artifact, given.requests(len(PROMPTS))
    if tp != 4:
        artifact = tmp_path / "resharded"
        assert reshard(given.artifact, artifact, tensor_parallel_size=tp).faults == ()
        before, after = (open_artifact(one) for one in (given.artifact, artifact))
        assert {n: p.read_bytes() for n, p in own_adapters(before).items()} == {
            n: p.read_bytes() for n, p in own_adapters(after).items()
        }
    with LLM(artifact, **options) as llm:
        assert completed(llm, requests) == given.tokens(requests)


def test_kv_is_found_by_adapter(given: Case) -> None:
    prompt = [5] * 24
    with LLM(given.artifact, threads=1) as llm:
        requests = given.requests(2)
        found = [
            llm.generate(prompt_token_ids=[prompt], sampling_params=PARAMS, lora_request=one)[0]
            for one in (*requests, *requests)
        ]
    assert [output.num_cached_tokens for output in found] == [0, 0, 22, 22]
    tokens = [output.outputs[0].token_ids for output in found]
    assert tokens[:2] == tokens[2:]
    assert tokens[0] != tokens[1]


def test_another_adapter_takes_the_place_of_one_without_a_build(taking: Case, tmp_path: Path) -> None:
    """Under the same name, id and path: nothing that was computed with the old one serves the new one."""
    folder = shutil.copytree(taking.adapters["one"], tmp_path / "adapter")
    request = LoRARequest("swapped", 5, str(folder))
    with LLM(taking.artifact, threads=1) as llm:
        assert completed(llm, [request] * len(PROMPTS)) == taking.expected["one"]
        shutil.copytree(taking.adapters["two"], folder, dirs_exist_ok=True)
        assert completed(llm, [request] * len(PROMPTS)) == taking.expected["one"]
        assert llm.engine.list_loras() == {5}
        assert llm.engine.remove_lora(5)
        assert not llm.engine.remove_lora(5)
        assert llm.engine.list_loras() == set()
        assert completed(llm, [request] * len(PROMPTS)) == taking.expected["two"]


@pytest.mark.parametrize("suffix", [".safetensors", ".onnx_adapter"])
def test_files_whose_tensors_are_named_as_the_inputs(suffix: str, taking: Case, tmp_path: Path) -> None:
    with LLM(taking.artifact, threads=1) as llm:
        arrays = dict(llm.core.adapters.add(LoRARequest("three", 3, str(taking.adapters["three"]))).arrays)
        path = tmp_path / f"adapter{suffix}"
        if suffix == ".safetensors":
            path.write_bytes(to_safetensors(arrays))
        else:
            adapter = onnxruntime.AdapterFormat()
            adapter.set_parameters({n: onnxruntime.OrtValue.ortvalue_from_numpy(a) for n, a in arrays.items()})
            adapter.export_adapter(str(path))
        request = LoRARequest("named", 4, str(path))
        assert completed(llm, [request] * len(PROMPTS)) == taking.expected["three"]


def test_the_artifacts_own_adapters(given: Case) -> None:
    async def ask(engine: AsyncLLMEngine, name: str) -> list[int]:
        request = LoRARequest(name, 1 + list(given.adapters).index(name))
        async with aclosing(engine.generate({"prompt_token_ids": [9]}, PARAMS, name, request)) as outputs:
            return [output async for output in outputs][-1].outputs[0].token_ids

    async def ask_all(engine: AsyncLLMEngine) -> list[list[int]]:
        assert await engine.add_lora(LoRARequest("one", 1))
        found = await asyncio.gather(*(ask(engine, name) for name in given.adapters))
        assert await engine.list_loras() == {1, 2, 3}
        assert await engine.remove_lora(2)
        return found

    with LLM(given.artifact, threads=1) as llm:
        assert set(llm.core.adapters.own) == set(given.adapters)
        assert asyncio.run(ask_all(AsyncLLMEngine.from_llm(llm))) == [given.expected[n][3] for n in given.adapters]


def test_an_engine_takes_adapters_request_by_request(taking: Case) -> None:
    requests = taking.requests(len(PROMPTS))
    with LLM(taking.artifact, threads=1) as llm:
        for number, request in enumerate(requests):
            llm.engine.add_request(str(number), {"prompt_token_ids": PROMPTS[number]}, PARAMS, request)
        assert llm.engine.add_lora(LoRARequest("one", 1, str(taking.adapters["one"])))
        outputs = {}
        while llm.engine.has_unfinished_requests():
            outputs.update({one.request_id: one.outputs[0].token_ids for one in llm.engine.step()})
    assert [outputs[str(number)] for number in range(len(PROMPTS))] == taking.tokens(requests)


@pytest.mark.slow
def test_verification_runs_adapters(given: Case, taking: Case) -> None:
    for case in (given, taking):
        found = verify_artifact(case.artifact, against=case.model, options=ParityOptions(threads=1, max_length=24))
        assert [(check.name, check.faults) for check in found.record.checks if not check.passed] == []
        assert "engine" in {check.name for check in found.record.checks}


@pytest.mark.parametrize(
    ("request_of", "message"),
    [
        (lambda _: LoRARequest("none", 9), "'none' is no adapter of .*, which has none; give its lora_path"),
        (lambda _: LoRARequest("none", 9, "/nowhere"), "adapter /nowhere is not there"),
        (lambda _: LoRARequest("none", 9, __file__ + ".onnx_adapter"), "cannot be read by onnxruntime"),
        (lambda one: LoRARequest("two", 1, str(one)), r"lora_int_id 1 belongs to 'one' \(.*\); remove that one"),
        (lambda _: "one", "lora_request: found a str, expected a LoRARequest"),
    ],
)
def test_requests_that_name_none(request_of: object, message: str, taking: Case) -> None:
    assert callable(request_of)
    with LLM(taking.artifact, threads=1) as llm:
        llm.engine.add_lora(LoRARequest("one", 1, str(taking.adapters["one"])))
        with pytest.raises(AdapterError, match=message):
            llm.generate(prompt_token_ids=[[1]], lora_request=request_of(taking.adapters["one"]))


@pytest.mark.parametrize(
    ("name", "number", "path", "message"),
    [
        ("", 1, "", "lora_name is empty"),
        ("a", 0, "", "lora_int_id is 0, expected at least 1"),
        ("a", True, "", "lora_int_id: found a bool, expected int"),
        ("a", 1, None, "lora_path: found a NoneType, expected str"),
    ],
)
def test_requests_that_are_none(name: str, number: int, path: str, message: str) -> None:
    with pytest.raises(AdapterError, match=message):
        LoRARequest(name, number, path)


def test_inputs_that_are_no_adapters_are_told_from_those_that_are(taking: Case, given: Case) -> None:
    for case, count, mixes in ((taking, 6, False), (given, 12, True)):
        artifact = open_artifact(case.artifact)
        inputs = adapter_inputs(artifact.manifest, artifact.program.graph, {})
        assert (len(inputs.infos), inputs.rows is not None) == (count, mixes)
    program = onnx.ModelProto()
    program.CopyFrom(open_artifact(taking.artifact).program)
    sums = [node for node in program.graph.node if node.op_type == "Add" and node.output[0] == "Add_21_0"]
    sums[0].op_type = "Max"
    found = adapter_inputs(open_artifact(taking.artifact).manifest, program.graph, {})
    assert not any("q_proj" in info.name for info in found.infos)
    assert len(found.infos) == 4


def test_a_build_puts_adapters_into_an_artifact(taking: Case, tmp_path: Path) -> None:
    """Of a model that takes adapters, by the command line; and its plan serves other weights of the same graph."""
    chosen = [f"--lora={name}={path}" for name, path in taking.adapters.items()]
    result = CliRunner().invoke(cli, ["build", str(taking.model), str(tmp_path / "artifact"), *chosen])
    assert result.exit_code == 0, result.output
    with LLM(tmp_path / "artifact", threads=1) as llm:
        assert completed(llm, [LoRARequest("two", 1)] * len(PROMPTS)) == taking.expected["two"]
    build_by_plan_of(tmp_path / "artifact", taking.model, tmp_path / "again")
    assert own_adapters(open_artifact(tmp_path / "again")) == {}


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        ({"model.layers.0.self_attn.query": (64, 64)}, "has no product of its own.*without packing this module"),
        (
            {"model.layers.0.self_attn.qkv_proj": (64, 192)},
            "192 features out, the model has q_proj of 64 and k_proj of 32",
        ),
        ({"model.layers.0.mlp.down_proj": (128, 64)}, "another base model: .* has 128 features in, the model 176"),
    ],
)
def test_adapters_of_other_models_are_refused_in_a_build(
    modules: dict[str, tuple[int, int]], message: str, given: Case, tmp_path: Path
) -> None:
    builder = ArtifactBuilder(given.model, lora={"other": saved(tmp_path / "other", modules)})
    with pytest.raises(AdapterError, match=message):
        builder.build(tmp_path / "artifact")
    assert not (tmp_path / "artifact").exists()


_ATTENTION, _FEED_FORWARD = "model.layers.0.self_attn", "model.layers.0.mlp"
_APART = {
    f"{_ATTENTION}.q_proj": (64, 64),
    f"{_ATTENTION}.k_proj": (64, 32),
    f"{_ATTENTION}.v_proj": (64, 32),
    f"{_FEED_FORWARD}.gate_proj": (64, 176),
    f"{_FEED_FORWARD}.up_proj": (64, 176),
    "model.layers.1.self_attn.v_proj": (64, 32),
}
_TOGETHER = {f"{_ATTENTION}.qkv_proj": (64, 128), f"{_FEED_FORWARD}.gate_up_proj": (64, 352)}


@pytest.mark.slow
@pytest.mark.parametrize(("source", "sizes"), [("tiny-phi3-optimum", _APART), ("tiny-llama-optimum", _TOGETHER)])
def test_modules_that_the_model_has_packed_or_apart(
    source: str, sizes: dict[str, tuple[int, int]], tmp_path: Path
) -> None:
    model = shutil.copytree(ZOO / source, tmp_path / "source") / "model.onnx"
    adapter = saved(tmp_path / "one", sizes, rank=4, seed=1)
    assert ArtifactBuilder(model, lora={"one": adapter}).build(tmp_path / "artifact").faults == ()
    own, weights = deltas(adapter, _SCALES["one"]), dict(_weights(model))
    added: dict[str, Array] = {}
    for packed, parts in (("qkv_proj", ("q_proj", "k_proj", "v_proj")), ("gate_up_proj", ("gate_proj", "up_proj"))):
        for name in [name for name in own if name.endswith(f".{packed}")]:
            widths = [_APART[name.replace(packed, part)][1] for part in parts]
            cut = np.split(own[name], np.cumsum(widths)[:-1], axis=1)
            added |= {name.replace(packed, part): delta for part, delta in zip(parts, cut, strict=True)}
        for name in [name for name in own if name.endswith(f".{parts[-1]}")]:
            names = [name.replace(parts[-1], part) for part in parts]
            widths = [_APART[one.replace("layers.1", "layers.0")][1] for one in names]
            zeros = [np.zeros((64, width), np.float32) for width in widths]
            halves = [own.get(one, zero) for one, zero in zip(names, zeros, strict=True)]
            added[name.replace(parts[-1], packed)] = np.concatenate(halves, axis=1)
    opened = open_artifact(tmp_path / "artifact")
    expected = greedy(merged(model, tmp_path / "merged.onnx", weights, added), opened, PROMPTS, TOKENS)
    with LLM(tmp_path / "artifact", threads=1) as llm:
        assert completed(llm, [LoRARequest("one", 1)] * len(PROMPTS)) == expected
        assert completed(llm, [None] * len(PROMPTS)) != expected


def test_a_folder_of_several_graphs_takes_none(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="--lora is about one graph"):
        ArtifactBuilder(ZOO / "tiny-t5-optimum", lora={"one": saved(tmp_path, LORA)})


def test_adapters_take_no_collective_of_their_own(tmp_path: Path) -> None:
    """Nine heads over four PEs are padded, and what the adapters of split rows add is summed with the product."""
    model = shutil.copytree(ZOO / "tiny-llama-9-3-optimum", tmp_path / "source") / "model.onnx"
    modules = [f"model.layers.{n}.{name}" for n in (0, 1) for name in ("self_attn.o_proj", "mlp.down_proj")]
    [plain] = plan_model(model, tensor_parallel_sizes=(4,)).builds
    [adapted] = plan_model(model, tensor_parallel_sizes=(4,), lora_modules=modules).builds
    counts = [Counter(node.op_type for node in one.lowered.graph if node.domain) for one in (plain, adapted)]
    assert counts[0]["AllReduce"] == counts[1]["AllReduce"] == 5


def test_plan_gives_a_graph_the_inputs_that_a_build_with_the_adapters_does(tmp_path: Path) -> None:
    folder = saved(tmp_path / "one", {"model.layers.0.mlp.down_proj": (176, 64)})
    model = ZOO / "tiny-llama-optimum" / "model.onnx"
    arguments = ["plan", str(model), "-tp", "4", "--lora", f"one={folder}", "--roles"]
    result = CliRunner().invoke(cli, arguments, env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    for name in ("layers.0.mlp.down_proj.lora_A", "layers.0.mlp.down_proj.lora_B", "lora_rows"):
        assert name in result.output
    assert "layers.1.mlp.down_proj.lora_A" not in result.output
