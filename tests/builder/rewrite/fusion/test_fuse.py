"""Attention recognised by structure: what is fused gives the same numbers, and what is altered is left alone."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import pytest
from click.testing import CliRunner

from furiosa_llm.builder import ArtifactBuilder
from furiosa_llm.builder.rewrite.fusion import fuse, fuse_attention
from furiosa_llm.builder.rewrite.fusion.match import LeftAloneError, Match
from furiosa_llm.builder.rewrite.fusion.matching import match
from furiosa_llm.builder.rewrite.fusion.rewriting import replace
from furiosa_llm.builder.rewrite.fusion.sizes import Sizes
from furiosa_llm.builder.rewrite.fusion.tracing import anchors
from furiosa_llm.builder.rewrite.fusion.trial import prove
from furiosa_llm.cli.main import cli
from furiosa_llm.example.smollm2.recipe import ensure
from furiosa_llm.runtime import verify_against
from furiosa_llm.runtime.artifact.reader import open_artifact
from tests.conftest import Built
from tests.support.builder.attention import KV, LOWEST, SIZE, VOCAB, Attention, fused, prepared
from tests.support.builder.stitching import session
from tests.support.tiers import MECHANISMS, tiered

Array = npt.NDArray[Any]
EXACT = 1e-5

SAME = {
    "as exporters write it": Attention(),
    "scale on query and keys": Attention(
        scores="kt = Transpose<perm=[0, 1, 3, 2]>(k7) ks = Mul(kt, root) qs = Mul(root, q) scaled = MatMul(qs, ks)"
    ),
    "scale on the query before it has heads": Attention(
        query="q0 = MatMul(x, q_weight) q1 = Mul(q0, scale)",
        scores="kt = Transpose<perm=[0, 1, 3, 2]>(k7) scaled = MatMul(q, kt)",
    ),
    "division": Attention(scores="kt = Transpose<perm=[0, 1, 3, 2]>(k7) raw = MatMul(q, kt) scaled = Div(raw, ten)"),
    "no scale": Attention(scores="kt = Transpose<perm=[0, 1, 3, 2]>(k7) scaled = MatMul(q, kt)"),
    "soft cap": Attention(
        scores="""kt = Transpose<perm=[0, 1, 3, 2]>(k7) raw = MatMul(q, kt) half_way = Mul(raw, scale)
            divided = Div(half_way, cap) bent = Tanh(divided) scaled = Mul(bent, cap)"""
    ),
    "soft cap, scale and cap in one": Attention(
        scores="""kt = Transpose<perm=[0, 1, 3, 2]>(k7) raw = MatMul(q, kt) divided = Mul(raw, scale_by_cap)
            bent = Tanh(divided) scaled = Mul(bent, cap)"""
    ),
    "Where instead of Add": Attention(biased="biased = Where(visible, scaled, hidden)"),
    "Where the other way round": Attention(biased="concealed = Not(visible) biased = Where(concealed, lowest, scaled)"),
    "infinite mask with a guard": Attention(
        biased="infinite = Where(visible, nothing, hidden) biased = Add(infinite, scaled)",
        softmax="""unsafe = Softmax<axis=3>(biased) nan = IsNaN(unsafe) weights = Where(nan, nothing, unsafe)""",
    ),
    "linear bias of each head": Attention(
        biased="""where = Cast<to=1>(key_at) slope = Mul(where, slopes) tilted = Add(scaled, slope)
            biased = Add(tilted, bias)"""
    ),
    "window in the mask": Attention(mask="window of 3"),
    "batch and heads merged": Attention(
        scores="""q_end = Shape<start=2>(q) q_form = Concat<axis=0>(minus, q_end) q3 = Reshape(q, q_form)
            k_end = Shape<start=2>(k7) k_form = Concat<axis=0>(minus, k_end) k8 = Reshape(k7, k_form)
            kt = Transpose<perm=[0, 2, 1]>(k8) raw = MatMul(q3, kt) times = Mul(raw, scale)
            score_shape = Shape<end=3>(q) score_form = Concat<axis=0>(score_shape, minus)
            scaled = Reshape(times, score_form)"""
    ),
    "Attention op": Attention(
        scores="", biased="", softmax="", weighed="weighed = Attention<scale=0.1>(q, k7, v7, visible)"
    ),
    "Attention op with a bias": Attention(
        scores="", biased="", softmax="", weighed="weighed = Attention<scale=0.1, softcap=4.0>(q, k7, v7, bias)"
    ),
}

PLAIN = "kt = Transpose<perm=[0, 1, 3, 2]>(k7) raw = MatMul(q, kt)"

ALTERED = {
    "mask that shows the next position": (Attention(mask="sees the next"), "differs by"),
    "mask that shows all positions": (Attention(mask="sees all"), "differs by"),
    "no mask": (Attention(biased="biased = Identity(scaled)"), "differs by"),
    "scale behind the mask": (
        Attention(scores=PLAIN, biased="sum = Add(raw, bias) biased = Mul(sum, scale)"),
        'Add ".*" comes before the scale',
    ),
    "another scale for each head": (
        Attention(scores=f"{PLAIN} scaled = Mul(raw, scales)"),
        "scales by more than one constant",
    ),
    "scale under the fraction": (Attention(scores=f"{PLAIN} scaled = Div(ten, raw)"), "no product of a query"),
    "softmax over the queries": (Attention(softmax="weights = Softmax<axis=2>(biased)"), "softmax is over axis 2"),
    "new positions before the past": (
        Attention(caches="present_key = Concat<axis=2>(k, past_key) present_value = Concat<axis=2>(v, past_value)"),
        "no product of a query with cached keys",
    ),
    "new values before the past": (
        Attention(caches="present_key = Concat<axis=2>(past_key, k) present_value = Concat<axis=2>(v, past_value)"),
        "not appended to a cache",
    ),
    "cap behind the mask": (
        Attention(biased="sum = Add(scaled, bias) part = Div(sum, cap) bent = Tanh(part) biased = Mul(bent, cap)"),
        'Add ".*" comes before the soft cap',
    ),
    "tanh without a cap": (Attention(biased="bent = Tanh(scaled) biased = Add(bent, bias)"), "is no soft cap"),
    "cap of another size": (
        Attention(
            scores=f"{PLAIN} part = Div(raw, cap) bent = Tanh(part) capped = Mul(bent, cap) scaled = Mul(capped, scale)"
        ),
        "is no soft cap",
    ),
    "factor behind the softmax": (
        Attention(softmax="soft = Softmax<axis=-1>(biased) weights = Mul(soft, half)"),
        'Mul ".*" changes the weights',
    ),
    "bias behind the softmax": (
        Attention(softmax="soft = Softmax<axis=-1>(scaled) weights = Add(soft, bias)"),
        'Add ".*" changes the weights',
    ),
    "scores are an output": (
        Attention(outputs="float[batch, 4, sequence, total] scaled"),
        '"scaled" inside it is read elsewhere',
    ),
    "weights are read elsewhere": (
        Attention(
            outputs="float[batch, 4, sequence, 1] greatest",
            weighed="weighed = MatMul(weights, v7) greatest = ReduceMax<keepdims=1>(weights, minus)",
        ),
        '"weights" inside it is read elsewhere',
    ),
    "heads repeated in another order": (
        Attention(
            repeat="""
                k5 = Unsqueeze(present_key, axis1) k6 = Expand(k5, rounds) k7 = Reshape(k6, heads_first)
                v5 = Unsqueeze(present_value, axis1) v6 = Expand(v5, rounds) v7 = Reshape(v6, heads_first)"""
        ),
        "differs by",
    ),
    "mask made from the scores": (
        Attention(
            biased="biased = Add(scaled, mirrored)", scores=f"{PLAIN} scaled = Mul(raw, scale) mirrored = Neg(scaled)"
        ),
        "inside it is read elsewhere|mask is made from its scores",
    ),
    "guard with another number": (
        Attention(softmax="soft = Softmax<axis=-1>(biased) nan = IsNaN(soft) weights = Where(nan, half, soft)"),
        'Where ".*" changes the weights',
    ),
}
"""What is no attention that the op computes: its text, and the reason that the report gives."""


@pytest.fixture
def written(tmp_path: Path) -> Callable[[Attention], Path]:
    """Writes an attention to a file."""

    def write(attention: Attention) -> Path:
        onnx.save(attention.proto(), tmp_path / "model.onnx")
        return tmp_path / "model.onnx"

    return write


def feeds(batch: int, sequence: int, past: int, *, padded: bool = False) -> dict[str, Array]:
    """Inputs of a step; `padded` hides a first position more in every sequence."""
    rng = np.random.default_rng([batch, sequence, past])
    mask = np.ones((batch, past + sequence), dtype=np.int64)
    for row in range(batch if padded else 0):
        mask[row, : row + 1] = 0
    caches = {
        name: rng.standard_normal((batch, KV, past, SIZE), dtype=np.float32) for name in ("past_key", "past_value")
    }
    return {"input_ids": rng.integers(0, VOCAB, (batch, sequence)), "attention_mask": mask, **caches}


def outputs_of(model: onnx.ModelProto, inputs: dict[str, Array]) -> list[Array]:
    return list(session(model).run(["logits", "present_key", "present_value"], inputs))


STEPS = {
    "prefill": feeds(2, 5, 0),
    "padded prefill": feeds(3, 6, 0, padded=True),
    "decode": feeds(2, 1, 7),
    "padded decode": feeds(3, 1, 7, padded=True),
    "chunk": feeds(1, 4, 6),
    "padded chunk": feeds(1, 4, 6, padded=True),
}


@pytest.mark.parametrize("name", SAME)
def test_attention_is_fused_and_gives_the_same(name: str, written: Callable[[Attention], Path]) -> None:
    path = written(SAME[name])
    model, fusion = fused(path)
    ops = Counter(node.op_type for node in model.graph)
    assert (fusion.fused, fusion.left) == (1, ())
    assert (ops["GroupQueryAttention"], ops["Softmax"], ops["Attention"], ops["Expand"]) == (1, 0, 0, 1)
    original, ours = onnx.load(path), ir.to_proto(model)
    for step, inputs in STEPS.items():
        expected, found = outputs_of(original, inputs), outputs_of(ours, inputs)
        sequence = inputs["input_ids"].shape[1]
        visible = inputs["attention_mask"][:, -sequence:].astype(bool)
        np.testing.assert_allclose(found[0][visible], expected[0][visible], rtol=EXACT, atol=EXACT, err_msg=step)
        for cache in (1, 2):
            np.testing.assert_array_equal(found[cache], expected[cache], err_msg=step)


@pytest.mark.parametrize("name", ["as exporters write it", "linear bias of each head", "Attention op"])
def test_caches_may_be_longer_than_what_is_valid(name: str, written: Callable[[Attention], Path]) -> None:
    path = written(SAME[name])
    original, ours = onnx.load(path), ir.to_proto(fused(path)[0])
    for inputs in (STEPS["padded decode"], STEPS["padded chunk"]):
        expected = outputs_of(original, inputs)
        total = inputs["attention_mask"].shape[1]
        room = np.full((len(inputs["input_ids"]), KV, 9, SIZE), 7, dtype=np.float32)
        longer = {name: np.concatenate([inputs[name], room], axis=2) for name in ("past_key", "past_value")}
        found = outputs_of(ours, inputs | longer)
        np.testing.assert_allclose(found[0], expected[0], rtol=EXACT, atol=EXACT)
        for cache in (1, 2):
            assert found[cache].shape[2] > total
            np.testing.assert_array_equal(found[cache][:, :, :total], expected[cache])


@pytest.mark.parametrize("name", ["infinite mask with a guard", "Where instead of Add", "Attention op"])
def test_no_bias_is_infinite(name: str, written: Callable[[Attention], Path]) -> None:
    """A row that is hidden wholly would be infinity less infinity, and no kernel says what it makes of that."""
    proto = ir.to_proto(fused(written(SAME[name]))[0])
    (node,) = (node for node in proto.graph.node if node.op_type == "GroupQueryAttention")
    proto.graph.output.append(onnx.ValueInfoProto(name=node.input[10]))
    (bias,) = session(proto).run([node.input[10]], STEPS["padded prefill"])
    assert bias.min() == LOWEST


@pytest.mark.parametrize("name", ALTERED)
def test_altered_attention_is_left_alone(name: str, written: Callable[[Attention], Path]) -> None:
    attention, reason = ALTERED[name]
    path = written(attention)
    model, fusion = fused(path)
    assert fusion.fused == 0
    assert len(fusion.left) == 1
    (node,) = anchors(model.graph)
    prefix = f'{node.op_type} "{node.name}": '
    assert fusion.left[0].startswith(prefix)
    assert re.search(reason, fusion.left[0]), fusion.left[0]
    original = onnx.load(path)
    assert Counter(n.op_type for n in model.graph)["GroupQueryAttention"] == 0
    for inputs in (STEPS["prefill"], STEPS["decode"]):
        for ours, theirs in zip(outputs_of(ir.to_proto(model), inputs), outputs_of(original, inputs), strict=True):
            np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("name", ["mask that shows all positions", "weights are read elsewhere"])
def test_an_artifact_with_an_altered_attention(name: str, written: Callable[[Attention], Path], tmp_path: Path) -> None:
    path = written(ALTERED[name][0])
    report = ArtifactBuilder(path).build(tmp_path / "artifact")
    assert (report.fused_attentions, len(report.attentions_left)) == (0, 1)
    found = verify_against(tmp_path / "artifact", path, max_length=32)
    assert {error.case.split()[0] for error in found.outputs} == {"prefill", "decode", "chunk"}
    assert found.within(EXACT)


def test_bfloat16_is_left_alone(written: Callable[[Attention], Path]) -> None:
    path = written(Attention())
    proto = onnx.load(path)
    for value in (*proto.graph.input, *proto.graph.output):
        if value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT:
            value.type.tensor_type.elem_type = onnx.TensorProto.BFLOAT16
    for tensor in proto.graph.initializer:
        if tensor.data_type == onnx.TensorProto.FLOAT:
            array = onnx.numpy_helper.to_array(tensor).astype(ir.DataType.BFLOAT16.numpy())
            tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))
    onnx.save(proto, path)
    model, fusion = fused(path)
    assert fusion.fused == 0
    assert re.search("no fused op for BFLOAT16", fusion.left[0])
    assert not fusion.changed
    assert "GroupQueryAttention" not in {node.op_type for node in model.graph}


ZOO = {
    **{f"tiny-{name}-optimum": (2, 0) for name in ("llama", "qwen2", "qwen3", "gemma", "phi3", "qwen3moe", "neox")},
    **{f"tiny-{name}-optimum": (2, 0) for name in ("llama-mha-tied", "gpt2", "bloom", "llama-9-3", "qwen2-14-2")},
    **{f"tiny-{name}-tf5": (2, 0) for name in ("llama-dynamo", "mistral-dynamo", "gpt2-dynamo", "mixtral-dynamo")},
    "tiny-llama-dynamo-op23-tf5": (2, 0),
    "tiny-t5-optimum/decoder_with_past_model.onnx": (2, 2),
    "tiny-t5-optimum/decoder_model.onnx": (0, 4),
    "tiny-t5-optimum/encoder_model.onnx": (0, 2),
    "tiny-bert-optimum": (0, 2),
    "tiny-vit-optimum": (0, 2),
    "tiny-llama-genai-fp32": (0, 0),
}
"""Model -> attentions that are fused, and that are left alone; attention across to an encoder has no growing cache."""
FAST = {name for name, tp in MECHANISMS if tp == 4 and name in ZOO}


@pytest.mark.parametrize("name", tiered(ZOO, FAST))
def test_every_decoder_of_the_zoo_is_fused(name: str, built: Built) -> None:
    report, _ = built(name, 4)
    assert (report.fused_attentions, len(report.attentions_left)) == ZOO[name]


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        ("tiny-llama-optimum", "in_place"),
        ("tiny-bloom-optimum", "in_place"),
        ("tiny-mixtral-dynamo-tf5", "in_place"),
        ("tiny-mistral-dynamo-tf5", "append"),
        ("tiny-t5-optimum/decoder_with_past_model.onnx", "append"),
    ],
)
def test_caches_are_in_place_where_other_inputs_tell_their_length(name: str, mode: str, built: Built) -> None:
    _, artifact = built(name, 4)
    assert {state.mode for state in artifact.manifest.states} == {mode}


def test_fusion_can_be_turned_off(zoo: Path, tmp_path: Path) -> None:
    builder = ArtifactBuilder(zoo / "tiny-llama-optimum" / "model.onnx", fuse_attention=False)
    report = builder.build(tmp_path / "artifact")
    artifact = open_artifact(tmp_path / "artifact")
    ops = Counter(node.op_type for node in artifact.program.graph.node)
    assert (ops["GroupQueryAttention"], ops["Softmax"]) == (0, 2)
    assert (report.fused_attentions, report.attentions_left) == (0, ())
    assert {state.mode for state in artifact.manifest.states} == {"append"}
    assert artifact.manifest.provenance.options["fuse_attention"] is False


@pytest.mark.slow
@pytest.mark.parametrize(
    ("option", "told"),
    tiered([("--fuse-attention", True), ("--no-fuse-attention", False)], [("--fuse-attention", True)]),
)
def test_the_command_line_tells_what_was_fused(option: str, *, told: bool, zoo: Path, tmp_path: Path) -> None:
    model = zoo / "tiny-t5-optimum" / "decoder_with_past_model.onnx"
    result = CliRunner().invoke(cli, ["build", option, str(model), str(tmp_path / "artifact")])
    assert result.exit_code == 0
    assert ("2 fused, 2 left as they are" in result.stdout) is told
    assert result.stdout.count("attention left") == (2 if told else 0)


def test_the_manifest_tells_what_was_fused(built: Built) -> None:
    _, artifact = built("tiny-bert-optimum", 4)
    told = artifact.manifest.plan["attention"]
    assert told["fused"] == 0
    assert len(told["left"]) == 2


def test_layers_of_one_structure_are_proved_once(zoo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    proved: list[object] = []

    def counted(*given: Any) -> None:
        proved.append(given)
        prove(*given)

    monkeypatch.setattr(fuse, "prove", counted)
    model, probes = prepared(zoo / "tiny-llama-optimum" / "model.onnx")
    assert fuse_attention(model, probes).fused == 2
    assert len(proved) == 1


@pytest.fixture
def prove_with(written: Callable[[Attention], Path]) -> Callable[[Callable[[Match], Match]], None]:
    """Proves the replacement of a match that was altered, for the one that was found."""
    model, probes = prepared(written(Attention()))
    facts = (probes.facts, probes.others)
    (anchor,) = anchors(model.graph)
    found = match(anchor, facts)
    sizes = Sizes(model.graph, probes.kinds)
    for past in (found.key.past, found.value.past):
        sizes.replace_shape_of(past)
    model.graph.opset_imports["com.microsoft"] = 1

    def with_change(change: Callable[[Match], Match]) -> None:
        prove(found, replace(change(found), facts, sizes), model.graph, probes.kinds, probes.facts)

    with_change(lambda found: found)
    return with_change


@pytest.mark.parametrize(
    "wrong",
    [
        {"scale": 0.11},
        {"softcap": 30.0},
        {"terms": ()},
    ],
    ids=lambda wrong: next(iter(wrong)),
)
def test_the_proof_finds_a_wrong_replacement(wrong: dict[str, Any], prove_with: Callable[..., None]) -> None:
    with pytest.raises(LeftAloneError, match="differs by"):
        prove_with(lambda found: dataclasses.replace(found, **wrong))


@pytest.mark.parametrize(("name", "by"), [("key", "value"), ("value", "key")])
def test_the_proof_compares_both_caches(name: str, by: str, prove_with: Callable[..., None]) -> None:
    with pytest.raises(LeftAloneError, match="gives another cache"):
        prove_with(lambda found: dataclasses.replace(found, **{name: getattr(found, by)}))


@pytest.mark.real_model
def test_every_attention_of_a_real_model_is_fused() -> None:
    model, fusion = fused(ensure("optimum-fp32") / "model.onnx")
    assert (fusion.fused, fusion.left) == (30, ())
    assert Counter(node.op_type for node in model.graph)["Softmax"] == 0
