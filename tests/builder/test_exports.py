"""Exports of kinds that people report: each builds, runs equal to the unsplit model, and proves completely."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from onnx import ModelProto, TensorProto, TensorShapeProto, helper, numpy_helper

from furiosa_llm import LLM, SamplingParams
from furiosa_llm.builder import ArtifactBuilder
from furiosa_llm.builder.errors import OptionError, ShapeError, UnsupportedModelError
from furiosa_llm.builder.factors.scores import find_scores
from furiosa_llm.builder.options import BuildOptions
from furiosa_llm.builder.pipeline import analyse_model
from furiosa_llm.builder.shapes.roles import read_role, role_of
from furiosa_llm.cli.main import cli
from furiosa_llm.parity_options import ParityOptions
from furiosa_llm.runtime.artifact.compute import computing
from furiosa_llm.runtime.artifact.dtypes import Array
from furiosa_llm.runtime.artifact.reader import open_artifact
from furiosa_llm.runtime.artifact.tools.originals import default_inputs
from furiosa_llm.runtime.errors import UnsupportedError
from furiosa_llm.runtime.execution.decoder import DecoderSession
from furiosa_llm.runtime.execution.executor import Executor
from furiosa_llm.runtime.verification.reference import ReferenceModel
from furiosa_llm.verification import verify_artifact
from tests.support.builder.exported import Change, exported, renamed
from tests.support.tiers import tiered


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """What a build must give."""

    task: str = "decoder"
    collectives: tuple[int, int]
    """AllReduce and AllGather."""
    share: float = 1.15
    """The most bytes on a PE, of the model's over the number of PEs."""
    states: tuple[str, ...]
    roles: str
    """Of the inputs that are no states, by their first letters: t(okens), m(ask), p(ositions), l(ength), o(ther)."""
    change: Change | None = None
    fixed: dict[str, int] = dataclasses.field(default_factory=dict)
    note: str = ""
    """What one of the notes says."""
    limit: int | None = 32
    """The longest sequence, by the tables of positions."""
    runs: bool = True
    """Whether onnxruntime has kernels for it."""
    compute: str | None = None
    """The type that it runs in, if not its own."""


def _batch_of_four(model: ModelProto) -> None:
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 4


def _any_rank(model: ModelProto) -> None:
    for value in model.graph.input:
        for dim in value.type.tensor_type.shape.dim:
            if "lora" in value.name and dim.dim_value == 8:
                dim.dim_param = "rank"


def _without_zero_points(model: ModelProto) -> None:
    for node in model.graph.node:
        if node.op_type == "MatMulNBits":
            node.input[3] = ""


def _shuffled(model: ModelProto) -> None:
    _without_zero_points(model)
    names = {node.input[4] for node in model.graph.node if node.op_type == "MatMulNBits"}
    random = np.random.default_rng(0)
    for tensor in model.graph.initializer:
        if tensor.name in names:
            tensor.CopyFrom(numpy_helper.from_array(random.permutation(numpy_helper.to_array(tensor)), tensor.name))


def _wide_heads(model: ModelProto) -> None:
    """Heads of 16, which onnxruntime's kernel takes; half as many."""
    for value in (*model.graph.input, *model.graph.output):
        if len(value.type.tensor_type.shape.dim) == 4:
            value.type.tensor_type.shape.dim[1].dim_value, value.type.tensor_type.shape.dim[3].dim_value = 2, 16
    for node in model.graph.node:
        if node.op_type == "GroupQueryAttention":
            kept = [a for a in node.attribute if a.name not in ("num_heads", "kv_num_heads")]
            del node.attribute[:]
            node.attribute.extend([*kept, helper.make_attribute("num_heads", 4)])
            node.attribute.append(helper.make_attribute("kv_num_heads", 2))
    angles = np.arange(32)[:, None] / 10000 ** (np.arange(8)[None] / 8)
    for tensor in model.graph.initializer:
        if tensor.name in ("cos", "sin"):
            table = {"cos": np.cos, "sin": np.sin}[tensor.name](angles).astype(np.float32)
            tensor.CopyFrom(numpy_helper.from_array(table, tensor.name))


_KV = ("append", "append")
ROWS = {
    "batch1": Row(collectives=(3, 1), states=_KV, roles="tpm"),
    "batch1, four": Row(collectives=(3, 1), states=_KV, roles="tpm", change=_batch_of_four),
    "bsnh": Row(collectives=(3, 1), states=_KV, roles="tpm"),
    "dake": Row(task="encoder", collectives=(4, 0), states=_KV, roles="tllo"),
    "embeds": Row(task="other", collectives=(3, 1), states=_KV, roles="op"),
    "genai-exclude-lm-head": Row(task="encoder", collectives=(5, 0), states=("in_place",) * 4, roles="tm", limit=128),
    "genai-phi3-longrope": Row(
        collectives=(3, 1), states=("in_place",) * 4, roles="tm", note="If: replicated", limit=None
    ),
    "genai-prune-lm-head": Row(collectives=(5, 1), states=("in_place",) * 4, roles="tm", limit=128),
    "genai-qwen25vl-mrope": Row(collectives=(5, 1), states=("in_place",) * 4, roles="tmp", limit=128),
    "genai-lfm2": Row(collectives=(5, 1), states=("in_place", "in_place", "replace"), roles="tm", share=1.3, limit=128),
    "genai-qwen35": Row(
        collectives=(5, 1), states=("in_place", "in_place", "replace", "replace"), roles="tmp", limit=128
    ),
    "gidx-ordered": Row(collectives=(1, 3), states=_KV, roles="tp", note="g_idx: the rows are whole"),
    "gidx-ordered, no zero points": Row(collectives=(3, 1), states=_KV, roles="tp", change=_without_zero_points),
    "gidx-ordered, shuffled": Row(collectives=(1, 3), states=_KV, roles="tp", change=_shuffled, note="g_idx"),
    "gpt2_past": Row(collectives=(3, 1), states=("append",), roles="tpm"),
    "gqa8": Row(collectives=(3, 1), states=("in_place",) * 2, roles="tm", runs=False),
    "gqa8, wide": Row(collectives=(3, 1), states=("in_place",) * 2, roles="tm", change=_wide_heads, share=1.5),
    "lora": Row(collectives=(3, 1), states=_KV, roles="tpoooooo"),
    "lora, any rank": Row(collectives=(3, 1), states=_KV, roles="tpoooooo", change=_any_rank),
    "lora_init": Row(collectives=(3, 1), states=_KV, roles="tpoooooo"),
    "mask4d": Row(collectives=(3, 1), states=_KV, roles="tpm"),
    "merged": Row(collectives=(3, 1), states=_KV, roles="tp", fixed={"use_cache_branch": 1}),
    "mobius-bf16": Row(collectives=(5, 1), states=_KV * 2, roles="tmp", compute="float32", limit=128),
    "mobius-llama": Row(collectives=(5, 1), states=_KV * 2, roles="tmp", limit=128),
    "mobius-mamba": Row(collectives=(9, 1), states=("replace",) * 4, roles="t", limit=None),
    "mobius-static-cache": Row(collectives=(5, 1), states=("replace",) * 4, roles="tpll", limit=64),
    "nvfp4": Row(collectives=(3, 1), states=_KV, roles="tp", compute="float32"),
    "sha": Row(collectives=(18, 1), states=_KV * 4, roles="t", share=1.25, note="written head by head", limit=None),
    "stacked": Row(collectives=(3, 1), states=("append",), roles="tp"),
}
"""Over four PEs."""
_LETTERS = {"token_ids": "t", "attention_mask": "m", "position_ids": "p", "past_length": "l", "sequence_length": "l"}
_LETTERS |= {"total_length": "l", "other": "o"}


@pytest.mark.parametrize("tp", [4, pytest.param(8, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ROWS)
def test_export(name: str, tp: int, tmp_path: Path) -> None:
    row = ROWS[name]
    model = exported(name.partition(",")[0], tmp_path, row.change)
    report = ArtifactBuilder(model, tensor_parallel_size=tp, fixed=row.fixed).build(tmp_path / "artifact")
    assert report.faults == ()
    manifest = open_artifact(tmp_path / "artifact").manifest
    assert (manifest.model.task, tuple(state.mode for state in manifest.states)) == (row.task, row.states)
    assert manifest.model.max_sequence_length == row.limit
    assert "".join(_LETTERS[i.role] for i in manifest.inputs if i.role != "state") == row.roles
    assert row.note in " ".join((*report.notes, *report.shortfalls))
    if tp == 4:
        assert (report.collectives.get("AllReduce", 0), report.collectives.get("AllGather", 0)) == row.collectives
        assert report.weight_nbytes * tp <= row.share * report.model_nbytes
    if row.runs:
        found = verify_artifact(
            tmp_path / "artifact",
            against=model,
            options=ParityOptions(threads=1, sizes={"rank": 3}, compute=row.compute),
        )
        assert [(check.name, check.faults) for check in found.record.checks if not check.passed] == []
        assert found.parity is not None
        assert {error.case.partition(" ")[0] for error in found.parity.outputs} == {"prefill", "decode", "chunk"}


@pytest.mark.parametrize("name", [name for name in ROWS if name not in ("merged", "lora, any rank")])
def test_names_tell_nothing_that_the_graph_does_not(name: str, tmp_path: Path) -> None:
    """Without any names of inputs, outputs and dimensions, everything is found to be what it is with them."""
    row = ROWS[name]

    def change(model: ModelProto) -> None:
        if row.change is not None:
            row.change(model)
        renamed(model)

    found = []
    for folder, how in (("named", row.change), ("renamed", change)):
        (tmp_path / folder).mkdir()
        path = exported(name.partition(",")[0], tmp_path / folder, how)
        model = analyse_model(path, BuildOptions(fuse_attention=False))
        graph, facts, states = model.model.graph, model.probes.facts, model.states
        roles = ["state" if value in states.values else role_of(value) for value in graph.inputs]
        pairs = [
            (graph.inputs.index(p.input), graph.outputs.index(p.output), p.sequence_dim, p.mode) for p in states.pairs
        ]
        scores = find_scores(graph, facts, states.values) if "token_ids" in roles else None
        shapes = [facts[value].shape for value in graph.inputs]
        found.append((roles, pairs, shapes, None if scores is None else graph.outputs.index(scores)))
    assert found[0] == found[1]


_STEPPED = [name for name, row in ROWS.items() if row.task == "decoder" and row.runs and name[:4] != "lora"]
_FAST = (
    "batch1, four",
    "genai-qwen35",
    "mobius-mamba",
    "mobius-static-cache",
    "stacked",
    "mask4d",
    "genai-prune-lm-head",
)
_PROMPTS = ([3, 17, 5, 60, 9], [1, 2], [4, 4, 4, 4, 4], [9])


@pytest.mark.parametrize("name", tiered(_STEPPED, _FAST))
def test_sequences_together_and_alone_have_the_same_tokens(name: str, tmp_path: Path) -> None:
    """Of each prompt the tokens that the unsplit model chooses, whatever is stepped beside it."""
    row = ROWS[name]
    model = exported(name.partition(",")[0], tmp_path, row.change)
    ArtifactBuilder(model, tensor_parallel_size=4, fixed=row.fixed).build(tmp_path / "artifact")
    params = SamplingParams(max_tokens=6, temperature=0, ignore_eos=True)
    with LLM(tmp_path / "artifact", compute=row.compute) as llm:
        together = llm.generate(prompt_token_ids=_PROMPTS, sampling_params=params)
        alone = [llm.generate(prompt_token_ids=[prompt], sampling_params=params)[0] for prompt in _PROMPTS]
    tokens = [output.outputs[0].token_ids for output in together]
    assert tokens == [output.outputs[0].token_ids for output in alone]
    manifest = computing(open_artifact(tmp_path / "artifact"), row.compute).manifest
    reference = ReferenceModel(
        model,
        inputs=manifest.inputs,
        outputs=manifest.outputs,
        states=manifest.states,
        compute=row.compute,
        fixed=row.fixed,
    )
    if manifest.inputs[0].shape[0] == "batch" and all(state.mode != "in_place" for state in manifest.states):
        assert tokens == [_greedy(reference, prompt, 6) for prompt in _PROMPTS]


@pytest.mark.slow
@pytest.mark.parametrize("heads_first", [False, True])
def test_a_fixed_number_of_sequences_that_other_dimensions_have_as_size(heads_first: bool, tmp_path: Path) -> None:
    """Of keys and values, or of the heads on a PE: which one runs over the sequences, the artifact says."""

    def two(model: ModelProto) -> None:
        for value in (*model.graph.input, *model.graph.output):
            dims = value.type.tensor_type.shape.dim
            dims[1 if len(dims) == 5 else 0].dim_value = 2

    def turned(model: ModelProto) -> None:
        """Caches as [heads, batch, past, d]: over four PEs, two heads on each."""
        two(model)
        for value, state in ((model.graph.input[-1], True), (model.graph.output[-1], False)):
            name, dims = value.name, value.type.tensor_type.shape.dim
            order = [2, 1, 0, 3, 4]
            new = [TensorShapeProto.Dimension.FromString(dims[d].SerializeToString()) for d in order]
            del dims[:]
            dims.extend(new)
            node = helper.make_node(
                "Transpose", *(([name], [f"{name}_"]) if state else ([f"{name}_"], [name])), perm=order
            )
            for other in model.graph.node:
                for names in (other.input, other.output):
                    names[:] = [f"{own}_" if own == name else own for own in names]
            model.graph.node.insert(0 if state else len(model.graph.node), node)

    params = SamplingParams(max_tokens=6, temperature=0, ignore_eos=True)
    found = []
    for change in (None, turned if heads_first else two):
        model = exported("gpt2_past", tmp_path, change)
        ArtifactBuilder(model, tensor_parallel_size=4).build(tmp_path / "artifact", force=True)
        with LLM(tmp_path / "artifact") as llm:
            outputs = llm.generate(prompt_token_ids=_PROMPTS, sampling_params=params)
        found.append([output.outputs[0].token_ids for output in outputs])
    assert found[0] == found[1]


@pytest.mark.parametrize("name", ["genai-qwen35", "genai-lfm2", "mobius-mamba"])
def test_states_of_a_fixed_size_in_a_batch_that_is_preempted(name: str, tmp_path: Path) -> None:
    """A gated delta net, a short convolution and a state-space model: 16 sequences in too little memory, and alone."""
    model = exported(name, tmp_path)
    ArtifactBuilder(model, tensor_parallel_size=4).build(tmp_path / "artifact")
    random = np.random.default_rng(0)
    prompts = [random.integers(3, 300, size=n).tolist() for n in (1, 2, 31, 16, *random.integers(1, 40, size=12))]
    params = SamplingParams(max_tokens=16, temperature=0, ignore_eos=True)
    with LLM(tmp_path / "artifact", max_model_len=64, paged_attention_num_blocks=16) as llm:
        together = llm.generate(prompt_token_ids=prompts, sampling_params=params)
        assert sum(replica.usage.preemptions for replica in llm.core.machine().replicas) > 0
        alone = [llm.generate(prompt_token_ids=[prompt], sampling_params=params)[0] for prompt in prompts]
    tokens = [output.outputs[0].token_ids for output in together]
    assert tokens == [output.outputs[0].token_ids for output in alone]
    assert all(output.num_cached_tokens == 0 for output in alone)
    manifest = open_artifact(tmp_path / "artifact").manifest
    reference = ReferenceModel(model, inputs=manifest.inputs, outputs=manifest.outputs, states=manifest.states)
    assert tokens == [_greedy(reference, prompt, 16) for prompt in prompts]


def _greedy(model: ReferenceModel, prompt: list[int], count: int) -> list[int]:
    session, found, new = DecoderSession(model), [], prompt
    for _ in range(count):
        found.append(int(session.step(np.array([new], dtype=np.int64))[0].argmax()))
        new = found[-1:]
    return found


def test_an_adapter_that_is_left_out_has_its_default(tmp_path: Path) -> None:
    model = exported("lora_init", tmp_path)
    ArtifactBuilder(model).build(tmp_path / "artifact")
    params = SamplingParams(max_tokens=4, temperature=0, ignore_eos=True)
    with LLM(tmp_path / "artifact") as llm:
        assert len(llm.generate(prompt_token_ids=[[1, 2, 3]], sampling_params=params)[0].outputs[0].token_ids) == 4
    artifact = open_artifact(tmp_path / "artifact")
    tokens, empty = np.array([[1, 2, 3]]), np.zeros((1, 4, 0, 8), dtype=np.float32)
    inputs = {"input_ids": tokens, "position_ids": np.arange(3)[None]}
    inputs |= {state.input: empty for state in artifact.manifest.states}
    with Executor(artifact, threads=1) as executor:
        assert default_inputs(artifact).keys() == {i.name for i in artifact.manifest.inputs if i.role == "other"}
        left_out = executor.run(inputs)["logits"]
        given = executor.run({**inputs, **default_inputs(artifact)})["logits"]
        other = executor.run({**inputs, **{n: 2 * a for n, a in default_inputs(artifact).items()}})["logits"]
    assert np.array_equal(left_out, given)
    assert not np.allclose(left_out, other)


def test_what_cannot_be_generated_is_refused_when_it_is_loaded(tmp_path: Path) -> None:
    """An input that scales what it is added to is no adapter: without it, nothing would be left."""

    def scaled(model: ModelProto) -> None:
        model.graph.input.append(helper.make_tensor_value_info("scale", TensorProto.FLOAT, [1, 64]))
        [product] = [node for node in model.graph.node if node.output[0] == "MatMul_18_0"]
        product.output[0] = "unscaled"
        place = list(model.graph.node).index(product) + 1
        model.graph.node.insert(place, helper.make_node("Exp", ["scale"], ["factor"]))
        model.graph.node.insert(place + 1, helper.make_node("Mul", ["unscaled", "factor"], ["MatMul_18_0"]))

    ArtifactBuilder(exported("lora", tmp_path, scaled)).build(tmp_path / "artifact")
    with pytest.raises(UnsupportedError, match=r"'scale'.*cannot be made from token ids"):
        LLM(tmp_path / "artifact")


def test_a_refusal_names_what_was_taken_for_what_and_what_settles_it(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=r"batch, 4, total, 8.*--fix use_cache_branch=true"):
        ArtifactBuilder(exported("merged", tmp_path)).build(tmp_path / "artifact")
    model = exported("dake", tmp_path)
    with pytest.raises(ShapeError) as caught:
        ArtifactBuilder(model, roles={"history_len": "other", "ids_len": "other"}).build(tmp_path / "artifact")
    for part in ('"history_len" [1], taken for other', "the user says so", "--role INPUT=ROLE", "--fix INPUT=VALUE"):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"), [("place", "expected one of"), ("positions[3", "expected one of"), ("", "expected one of")]
)
def test_roles_that_are_none(text: str, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        read_role("pos", text)


def test_inputs_that_cannot_be_fixed(tmp_path: Path) -> None:
    model = exported("merged", tmp_path)
    with pytest.raises(OptionError, match=r"'cache', but the inputs of model\.onnx are"):
        ArtifactBuilder(model, fixed={"cache": 1}).build(tmp_path / "artifact")
    with pytest.raises(OptionError, match=r"'past_key_values\.0\.key' of model\.onnx is not one boolean or integer"):
        ArtifactBuilder(model, fixed={"past_key_values.0.key": 1}).build(tmp_path / "artifact")


def test_plan_shows_what_was_inferred(tmp_path: Path) -> None:
    result = CliRunner().invoke(cli, ["plan", str(exported("mask4d", tmp_path)), "--roles"], env={"COLUMNS": "200"})
    assert result.exit_code == 0
    for part in ("FLOAT [batch, 1, sequence, total]", "attention_mask", "it reaches the attention scores", "append"):
        assert part in result.output


def test_both_sides_of_a_switch_between_tables(tmp_path: Path) -> None:
    """Rotary tables of 32 and of 128 positions, chosen by the length of the mask: back and forth in one executor."""
    model = exported("genai-phi3-longrope", tmp_path)
    ArtifactBuilder(model).build(tmp_path / "artifact")
    artifact, random = open_artifact(tmp_path / "artifact"), np.random.default_rng(0)
    manifest = artifact.manifest
    reference = ReferenceModel(
        model, inputs=manifest.inputs, outputs=manifest.outputs, states=manifest.states, accuracy_level=0
    )
    with Executor(artifact, threads=1, exact=True) as executor:
        for length in (8, 33, 32):
            empty = {state.input: np.zeros((1, 8, 0, 16), dtype=np.float32) for state in manifest.states}
            tokens = random.integers(0, 384, (1, length))
            mask = np.ones((1, length), dtype=np.int64)
            inputs: dict[str, Array] = {"input_ids": tokens, "attention_mask": mask, **empty}
            expected = reference.run(inputs)
            for name, array in executor.run(inputs).items():
                assert np.abs(array - expected[name]).max() <= 1e-5 * np.abs(expected[name]).max(), (length, name)
