"""Graphs that were built wrongly or doubted: each builds, runs equal to itself unsplit, and proves completely."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

from furiosa_llm.builder import ArtifactBuilder, BuildReport, plan_model
from furiosa_llm.builder.errors import OptionError, ShapeError
from furiosa_llm.builder.factors.scores import find_scores
from furiosa_llm.builder.options import BuildOptions
from furiosa_llm.builder.pipeline import analyse_model
from furiosa_llm.builder.shapes.roles import distinct_roles
from furiosa_llm.parity_options import ParityOptions
from furiosa_llm.runtime.artifact.reader import open_artifact
from furiosa_llm.runtime.execution.executor import Executor
from furiosa_llm.verification import verify_artifact
from tests.support.builder.graphs import model

_WIDTH = 64


def _weight(*shape: int) -> Any:
    return (np.random.default_rng([*shape]).standard_normal(shape) / np.sqrt(shape[0])).astype(np.float32)


def _ints(*numbers: int) -> Any:
    return np.array(numbers, dtype=np.int64)


_WEIGHTS = {
    "emb": _weight(128, _WIDTH),
    "w1": _weight(_WIDTH, 256),
    "w2": _weight(256, _WIDTH),
    "head": _weight(_WIDTH, 128),
    "wq": _weight(_WIDTH, 64),
    "wk": _weight(_WIDTH, 32),
    "wv": _weight(_WIDTH, 32),
    "wo": _weight(64, _WIDTH),
    "widen": _weight(32, _WIDTH),
    "packed": _weight(_WIDTH, 128),
    "p5": _ints(0, 0, 2, 4, 16),
    "parts": _ints(2, 1, 1),
    "types": _weight(8, _WIDTH),
    "norm": _weight(8),
    "zero": np.array([[0]]),
    "axis": _ints(1),
    "third": _ints(3),
    "twos": _ints(1, 1, 1, 2),
    "eight1": _ints(8),
    "four": _weight(4),
    "taps": _weight(64, 1, 3),
    "bias": _weight(64),
    "none1": _ints(0),
    "heads13": _ints(1, 2),
    "spread": _weight(8, _WIDTH),
    "last16": _ints(-16),
    "endless": _ints(2**62),
    "copies": _ints(1, 1, 2, 1, 1),
    "merge": _ints(4, 8, -1, 8),
    "two1": _ints(2),
    "eight": _ints(1, 1, 8),
    "sixteen": np.array(16),
    "table": _weight(1, 16, 8),
    "one": np.array(1),
    "two": np.array(2),
    "none": np.array(0),
    "heads": _ints(0, -1, 8),
    "q64": _ints(0, -1, 64),
    "k32": _ints(0, -1, 32),
    "q4": _ints(0, 0, 8, 8),
    "k4": _ints(0, 0, 4, 8),
    "b3": _ints(0, 0, 64),
    "scale": np.float32(0.35),
    "shown": np.float32(0),
    "hidden": np.float32(-1e9),
    "packed3": _weight(_WIDTH, 192),
    "m48": _ints(-1, 4, 8),
    "heads01": _ints(0, 1),
    "bias3": _weight(192),
}
_FEED_FORWARD = "h = MatMul(x2, w1) g = Relu(h) y = MatMul(g, w2) z = Add(x2, y) logits = MatMul(z, head)"


def _model(inputs: str, outputs: str, nodes: str, **types: Any) -> onnx.ModelProto:
    words = set(nodes.replace("(", " ").replace(")", " ").replace(",", " ").split())
    weights = {name: np.asarray(array) for name, array in _WEIGHTS.items() if name in words}
    weights = {name: array.astype(types.get(name, array.dtype)) for name, array in weights.items()}
    return model(inputs, outputs, nodes, weights, opset=24 if "TensorScatter" in words else 23)


def _checked(folder: Path, inputs: str, outputs: str, nodes: str, tp: int, **types: Any) -> BuildReport:
    path = folder / "model.onnx"
    onnx.save(_model(inputs, outputs, nodes, **types), path)
    report = ArtifactBuilder(path, tensor_parallel_size=tp).build(folder / "artifact")
    found = verify_artifact(folder / "artifact", against=path, options=ParityOptions(threads=1))
    assert [(check.name, check.faults) for check in found.record.checks if not check.passed] == []
    return report


@pytest.mark.parametrize(
    "index",
    ["s = Shape(input_ids) i = ConstantOfShape<value = int64[1] {0}>(s)", "s = Shape(input_ids) i = Expand(zero, s)"],
)
def test_a_lookup_by_an_index_that_is_a_constant(index: str, tmp_path: Path) -> None:
    """Of token types: which rank has the row is known, and no input tells it."""
    nodes = f"x = Gather(emb, input_ids) {index} t = Gather(types, i) x2 = Add(x, t) {_FEED_FORWARD}"
    report = _checked(tmp_path, "int64[batch, seq] input_ids", "float[batch, seq, 128] logits", nodes, 4)
    assert report.collectives["AllReduce"] == 2


def test_a_lookup_at_the_next_position_alone(tmp_path: Path) -> None:
    """Of a decoder that takes one token: its position is a sum of sizes, known for any of them."""
    nodes = """
        x = Gather(emb, input_ids) size = Shape(past) p = Gather(size, two) row = Unsqueeze(p, none1)
        place = Add(row, two) t = Gather(emb, place) x1 = Add(x, t) k0 = MatMul(x1, wk) k1 = Reshape(k0, k4)
        k = Transpose<perm=[0,2,1,3]>(k1) present = Concat<axis=2>(past, k)
        s0 = ReduceMean<keepdims=0>(present, heads13) s = Unsqueeze(s0, axis) x2 = MatMul(s, spread) z0 = Add(x1, x2)
        logits = MatMul(z0, head)
    """
    inputs = "int64[batch, 1] input_ids, float[batch, 4, past, 8] past"
    outputs = "float[batch, 1, 128] logits, float[batch, 4, total, 8] present"
    _checked(tmp_path, inputs, outputs, nodes, 4)


def test_a_cache_and_tokens_without_a_batch(tmp_path: Path) -> None:
    """The only dimension of the tokens counts positions, as there are none of sequences: it is compared by steps."""
    nodes = f"""
        x = Gather(emb, tokens) k0 = MatMul(x, wk) k1 = Reshape(k0, m48) k2 = Transpose<perm=[1, 0, 2]>(k1)
        new = Concat<axis=1>(old, k2) s0 = ReduceMean<keepdims=0>(new, heads01) s1 = Unsqueeze(s0, none1)
        s = MatMul(s1, spread) x2 = Add(x, s) {_FEED_FORWARD}
    """
    outputs = "float[seq, 128] logits, float[4, total, 8] new"
    _checked(tmp_path, "int64[seq] tokens, float[4, past, 8] old", outputs, nodes, 4)
    record = verify_artifact(tmp_path / "artifact", against=tmp_path / "model.onnx", options=ParityOptions(threads=1))
    assert record.parity is not None
    assert {error.case.partition(" ")[0] for error in record.parity.outputs} == {"prefill", "decode", "chunk"}


def test_scores_of_several_tokens_at_each_position_are_not_the_next_ones(tmp_path: Path) -> None:
    """As of the codebooks of music: tokens that an engine chooses one by one are not meant."""
    nodes = "x = Gather(emb, ids) y = MatMul(x, wq) z = Reshape(y, q4) logits = Transpose<perm=[0, 2, 1, 3]>(z)"
    onnx.save(_model("int64[batch, seq] ids", "float[batch, 8, seq, 8] logits", nodes), tmp_path / "model.onnx")
    analysed = analyse_model(tmp_path / "model.onnx", BuildOptions())
    assert find_scores(analysed.model.graph, analysed.probes.facts, ()) is None


def test_a_refusal_shows_no_size_that_was_tried(tmp_path: Path) -> None:
    """Not at the end of a sentence, either."""
    nodes = "x = Gather(emb, ids) y = MatMul(x, head) logits = Reshape(y, q4)"
    onnx.save(_model("int64[batch, seq] ids", "float[batch, seq, 8, 8] logits", nodes), tmp_path / "model.onnx")
    with pytest.raises(
        ShapeError, match=r"a size that follows from others elements cannot be \[batch, sequence, 8, 8\]"
    ):
        analyse_model(tmp_path / "model.onnx", BuildOptions())


def test_a_tower_whose_size_no_text_changes_is_split(tmp_path: Path) -> None:
    """What is summed up of an image is as much for any text: for each of its tokens it is less in a longer one."""
    nodes = """
        x = Gather(emb, input_ids) a0 = MatMul(x, w1) a1 = Relu(a0) a = MatMul(a1, w2) text = ReduceMean(a, axis)
        b0 = MatMul(image, w1) b1 = Sigmoid(b0) b = MatMul(b1, w2) seen = ReduceMean(b, axis) logits = Add(text, seen)
    """
    path = tmp_path / "model.onnx"
    onnx.save(
        _model("int64[batch, seq] input_ids, float[batch, 5, 64] image", "float[batch, 1, 64] logits", nodes), path
    )
    figures = analyse_model(path, BuildOptions()).lowered_for(BuildOptions(tensor_parallel_size=4))
    assert figures.plan.price.collectives == 2


def test_rows_that_the_model_chooses_are_refused_with_the_way_out(tmp_path: Path) -> None:
    """As many as it computes: of a mixture whose experts each gather their own."""
    nodes = """
        x = Gather(emb, input_ids) total = ReduceSum<keepdims=0>(x) count = Cast<to=7>(total)
        i = Range(none, count, one) y = Gather(w1, i) z = ReduceSum<keepdims=0>(y) logits = Add(x, z)
    """
    with pytest.raises(ShapeError, match=r"depends on the inputs' elements.*no option helps: export it so that sizes"):
        _checked(tmp_path, "int64[batch, seq] input_ids", "float[batch, seq, 64] logits", nodes, 4)


@pytest.mark.parametrize("tp", [4, 8])
def test_norms_per_head_in_front_of_group_query_attention(tp: int, tmp_path: Path) -> None:
    """Reshapes to sequence times heads and back, of queries and of keys, which only together explain the op."""
    nodes = f"""
        x = Gather(emb, input_ids) q0 = MatMul(x, wq) k0 = MatMul(x, wk) v = MatMul(x, wv)
        q1 = Reshape(q0, heads) q2 = RMSNormalization<axis=-1>(q1, norm) q = Reshape(q2, q64)
        k1 = Reshape(k0, heads) k2 = RMSNormalization<axis=-1>(k1, norm) k = Reshape(k2, k32)
        sum = ReduceSum<keepdims=0>(attention_mask, axis) last = Sub(sum, one) lengths = Cast<to=6>(last)
        size = Shape(attention_mask) long = Gather(size, one) total = Cast<to=6>(long)
        o, present_k, present_v = com.microsoft.GroupQueryAttention<num_heads=8, kv_num_heads=4>
            (q, k, v, past_k, past_v, lengths, total)
        a = MatMul(o, wo) x2 = Add(x, a) {_FEED_FORWARD}
    """
    caches = "float[batch, 4, past, 8] past_k, float[batch, 4, past, 8] past_v"
    inputs = f"int64[batch, seq] input_ids, int64[batch, total] attention_mask, {caches}"
    outputs = "float[batch, seq, 128] logits, float[batch, 4, t, 8] present_k, float[batch, 4, t, 8] present_v"
    report = _checked(tmp_path, inputs, outputs, nodes, tp)
    assert (report.collectives["AllReduce"], report.collectives["AllGather"]) == (3, 1)


def test_norms_per_head_of_one_position(tmp_path: Path) -> None:
    """On a rank with one head every dimension but the last is 1: sizes do not tell which of them is the heads'."""
    nodes = f"""
        x = Gather(emb, input_ids) q0 = MatMul(x, wq) k = MatMul(x, wk) v = MatMul(x, wv)
        q1 = Reshape(q0, q4) q2 = Reshape(q1, q64) q3 = Reshape(q2, heads) q4n = RMSNormalization<axis=-1>(q3, norm)
        q = Reshape(q4n, q64) o, present_k, present_v = com.microsoft.GroupQueryAttention<num_heads=8, kv_num_heads=4>
            (q, k, v, past_k, past_v, lengths, total)
        sum = ReduceSum<keepdims=0>(attention_mask, axis) last = Sub(sum, one) lengths = Cast<to=6>(last)
        size = Shape(attention_mask) long = Gather(size, one) total = Cast<to=6>(long)
        a = MatMul(o, wo) x2 = Add(x, a) {_FEED_FORWARD}
    """
    caches = "float[1, 4, past, 8] past_k, float[1, 4, past, 8] past_v"
    inputs = f"int64[1, 1] input_ids, int64[1, total] attention_mask, {caches}"
    outputs = "float[1, 1, 128] logits, float[1, 4, t, 8] present_k, float[1, 4, t, 8] present_v"
    _checked(tmp_path, inputs, outputs, nodes, 8)


def test_a_cache_of_one_sequence_behind_idle_nodes(tmp_path: Path) -> None:
    """A cache without heads, of a model for one sequence: its only open dimension is the past, not the batch."""
    nodes = f"""
        x = Gather(emb, input_ids) k0 = MatMul(x, wk) k1 = Reshape(k0, k4) old4 = Reshape(old, k4)
        k2 = Concat<axis=1>(old4, k1) k3, dropped = Dropout(k2) k = Dropout(k3) new = Reshape(k, k32)
        s0 = ReduceMean(new, axis) s = MatMul(s0, widen) x2 = Add(x, s) {_FEED_FORWARD}
    """
    outputs = "float[1, seq, 128] logits, float[1, total, 32] new"
    _checked(tmp_path, "int64[1, seq] input_ids, float[1, past, 32] old", outputs, nodes, 4)
    states = open_artifact(tmp_path / "artifact").manifest.states
    assert [(state.input, state.output) for state in states] == [("old", "new")]


_MASK_OF = """
    tokens = Shape<end=1>(input_ids) n1 = Reshape(n, axis) size = Concat<axis=0>(tokens, n1)
    ones = ConstantOfShape<value = int64[1] {1}>(size)
"""
_ROLES = {
    "single integers, two of which the graph reads": (
        "int64[1] n, int64[1] m, int64[1] a, int64[1] b",
        "from = Squeeze(n) to = Squeeze(m) r = Range(from, to, one) f = Cast<to=1>(r) p = Unsqueeze(f, axis) "
        "x2 = Add(x, p)",
        {"n": "past_length", "m": "total_length", "a": "other", "b": "other"},
    ),
    "positions in two directions": (
        "int64[batch, seq] rows, int64[batch, seq] columns",
        "r0 = Cast<to=1>(rows) c0 = Cast<to=1>(columns) r1 = Cos(r0) c1 = Sin(c0) r = Unsqueeze(r1, two1) "
        "c = Unsqueeze(c1, two1) y0 = Add(x, r) x2 = Add(y0, c)",
        {"rows": "position_ids", "columns": "other"},
    ),
    "positions of rotary angles, and positions that are named so": (
        "int64[batch, seq] turns, int64[batch, seq] position_ids",
        "t0 = Cast<to=1>(turns) t1 = Cos(t0) t = Unsqueeze(t1, two1) p = Gather(spread, position_ids) y0 = Add(x, t) "
        "x2 = Add(y0, p)",
        {"turns": "other", "position_ids": "position_ids"},
    ),
    "a third table, which is no table of token types": (
        "int64[batch, seq] places, int64[batch, seq] languages",
        "p = Gather(w1, places) q = Gather(spread, languages) p2 = MatMul(p, w2) y0 = Add(x, p2) x2 = Add(y0, q)",
        {"places": "position_ids", "languages": "other"},
    ),
    "a cache that no layer reads": (
        "float[batch, 4, past, 8] past_7",
        "x2 = Relu(x)",
        {"past_7": "other"},
    ),
    "masks of two kinds of layers": (
        "float[batch, seq, 1] near, float[batch, seq, 1] far",
        "y0 = Add(x, near) y1 = Softmax(y0) y2 = Add(x, far) y3 = Softmax(y2) x2 = Add(y1, y3)",
        {"near": "attention_mask", "far": "other"},
    ),
    "a number of positions that only the mask's place tells": (
        "int64 n, float[2, batch, 8, past, 8] old",
        f"{_MASK_OF} m = Cast<to=6>(ones) o, new = com.microsoft.Attention<num_heads=8>(x, packed3, bias3, m, old) "
        "x2 = Add(x, o)",
        {"n": "total_length", "old": "state"},
    ),
    "where new positions are written, from which they are counted": (
        "int64[batch] start, float[batch, 8, 32, 8] k",
        "u = Unsqueeze(start, axis) p0 = Cast<to=1>(u) p1 = Cos(p0) p = Unsqueeze(p1, two1) y0 = Add(x, p) "
        "h0 = Reshape(x, q4) h1 = Transpose<perm=[0, 2, 1, 3]>(h0) new = TensorScatter(k, h1, start) "
        "s0 = ReduceMean<keepdims=0>(new, heads13) s1 = Unsqueeze(s0, axis) s = MatMul(s1, spread) x2 = Add(y0, s)",
        {"start": "past_length", "k": "state"},
    ),
    "the same with heads apart": (
        "int64 n, float[batch, 8, past, 8] k, float[batch, 8, past, 8] v",
        f"{_MASK_OF} m = Cast<to=6>(ones) o, new, v2 = com.microsoft.MultiHeadAttention<num_heads=8>"
        "(x, x, x, , m, , k, v) x2 = Add(x, o)",
        {"n": "total_length", "k": "state", "v": "state"},
    ),
    "the same with ONNX's attention": (
        "int64 n, float[batch, 8, past, 8] k, float[batch, 8, past, 8] v",
        f"{_MASK_OF} m0 = Unsqueeze(ones, heads13) m = Cast<to=9>(m0) o, new, v2 = Attention<q_num_heads=8, "
        "kv_num_heads=8>(x, x, x, m, k, v) x2 = Add(x, o)",
        {"n": "total_length", "k": "state", "v": "state"},
    ),
    "embeddings times a mask, which are no rotary angles": (
        "int64[batch, seq] attention_mask",
        "f = Cast<to=1>(attention_mask) u = Unsqueeze(f, two1) x2 = Mul(x, u)",
        {"attention_mask": "attention_mask"},
    ),
}
"""Inputs beside the tokens, nodes, and what each of them is."""


def _with_roles(folder: Path, name: str) -> Path:
    inputs, nodes, _ = _ROLES[name]
    every = f"x = Gather(emb, input_ids) {nodes} {_FEED_FORWARD}"
    path = folder / "model.onnx"
    outputs = ", ".join(["float[batch, seq, 128] logits", *(f"float {one}" for one in ("new", "v2") if one in nodes)])
    onnx.save(_model(f"int64[batch, seq] input_ids, {inputs}", outputs, every), path)
    return path


@pytest.mark.parametrize("name", _ROLES)
def test_a_role_that_one_input_may_have(name: str, tmp_path: Path) -> None:
    graph = analyse_model(_with_roles(tmp_path, name), BuildOptions()).model.graph
    roles = {str(value.name): role.name for value, role in distinct_roles(graph.inputs).items()}
    assert roles == {"input_ids": "token_ids", **_ROLES[name][2]}


def test_the_position_of_the_only_token_counts_the_old_ones(tmp_path: Path) -> None:
    """As exports with caches of a fixed size have it; who says that it is a position has it so, and is verified."""
    nodes = f"x = Gather(emb, input_ids) p = Gather(spread, cache_position) x2 = Add(x, p) {_FEED_FORWARD}"
    path = tmp_path / "model.onnx"
    onnx.save(_model("int64[1, 1] input_ids, int64[1] cache_position", "float[1, 1, 128] logits", nodes), path)
    graph = analyse_model(path, BuildOptions()).model.graph
    assert [role.name for role in distinct_roles(graph.inputs).values()] == ["token_ids", "past_length"]
    ArtifactBuilder(path, roles={"cache_position": "positions"}).build(tmp_path / "artifact")
    found = verify_artifact(tmp_path / "artifact", against=path, options=ParityOptions(threads=1))
    assert [check.faults for check in found.record.checks if not check.passed] == []


def test_one_of_two_inputs_has_the_role_in_the_artifact(tmp_path: Path) -> None:
    path = _with_roles(tmp_path, "positions in two directions")
    ArtifactBuilder(path, roles={"columns": "positions"}).build(tmp_path / "artifact")
    roles = {info.name: info.role for info in open_artifact(tmp_path / "artifact").manifest.inputs}
    assert (roles["rows"], roles["columns"]) == ("other", "position_ids")
    with pytest.raises(OptionError, match=r"rows.*columns.*position_ids"):
        plan_model(path, roles={"columns": "positions", "rows": "positions"})


def test_a_packed_weight_whose_segments_lie_inside_of_heads(tmp_path: Path) -> None:
    """Of each key head first its queries, then its key and its value: two of these have no more parts than key heads.

    Keys and values cannot be stored apart from queries there, so that queries are split no further than they.
    """
    nodes = f"""
        x = Gather(emb, input_ids) p0 = MatMul(x, packed) p = Reshape(p0, p5) q, k, v = Split<axis=3>(p, parts)
        qk = Mul(q, k) gate = Softmax<axis=-1>(qk) o = Mul(gate, v) o2 = Reshape(o, q64)
        a = MatMul(o2, wo) x2 = Add(x, a) {_FEED_FORWARD}
    """
    report = _checked(tmp_path, "int64[batch, seq] input_ids", "float[batch, seq, 128] logits", nodes, 4)
    assert report.weight_nbytes < report.model_nbytes / 2


def test_a_split_of_what_was_copied_along_other_dimensions(tmp_path: Path) -> None:
    """Rotary tables that are tiled for each sequence, looked up and cut in halves."""
    nodes = f"""
        x = Gather(emb, input_ids) size = Shape(input_ids) b = Slice(size, none1, axis)
        each = Concat<axis=0>(b, axis, axis) wide = Tile(table, each)
        index0 = Unsqueeze(input_ids, two1) across = Expand(index0, eight) index = Mod(across, sixteen)
        found = GatherElements<axis=1>(wide, index) sin, cos = Split<axis=-1, num_outputs=2>(found)
        s = Sum(sin, cos) t = ReduceMean<keepdims=1>(s, two1) x2 = Add(x, t) {_FEED_FORWARD}
    """
    _checked(tmp_path, "int64[batch, seq] input_ids", "float[batch, seq, 128] logits", nodes, 4)


def test_a_copied_head_of_which_a_rank_has_one(tmp_path: Path) -> None:
    """Keys are copied for each query head, and computed with before the copies are heads."""
    nodes = f"""
        x = Gather(emb, input_ids) q0 = MatMul(x, wq) q1 = Reshape(q0, q4) q = Transpose<perm=[0,2,1,3]>(q1)
        k0 = MatMul(x, wk) k1 = Reshape(k0, k4) k2 = Transpose<perm=[0,2,1,3]>(k1) k3 = Unsqueeze(k2, two1)
        k6 = Expand(k3, copies) k8 = Mul(k6, scale) k5 = Cast<to=11>(k8) k9 = Cast<to=1>(k5) k7 = Reshape(k9, merge)
        k = Transpose<perm=[0,1,3,2]>(k7)
        s0 = MatMul(q, k) s = Softmax<axis=-1>(s0) o0 = MatMul(s, k7) o1 = Transpose<perm=[0,2,1,3]>(o0)
        o = Reshape(o1, b3) a = MatMul(o, wo) x2 = Add(x, a) {_FEED_FORWARD}
    """
    report = _checked(tmp_path, "int64[4, seq] input_ids", "float[4, seq, 128] logits", nodes, 8)
    assert report.weight_nbytes < report.model_nbytes / 7


def test_copies_side_by_side_beside_a_whole_dimension(tmp_path: Path) -> None:
    """Rotary angles of which each is written twice, side by side, times heads that are split."""
    nodes = f"""
        x = Gather(emb, input_ids) q0 = MatMul(x, wq) q1 = Reshape(q0, q4) q2 = Transpose<perm=[0,2,1,3]>(q1)
        f = Cast<to=1>(input_ids) u = Unsqueeze(f, two1) angle = Mul(u, four) r = Unsqueeze(angle, third)
        twice = Tile(r, twos) size = Shape<end=2>(angle) new = Concat<axis=0>(size, eight1)
        flat = Reshape(twice, new) c0 = Cos(flat) c = Unsqueeze(c0, axis) y0 = Mul(q2, c)
        y1 = Transpose<perm=[0,2,1,3]>(y0) y2 = Reshape(y1, b3) a = MatMul(y2, wo) x2 = Add(x, a) {_FEED_FORWARD}
    """
    _checked(tmp_path, "int64[batch, seq] input_ids", "float[batch, seq, 128] logits", nodes, 4)


def test_a_function_for_an_op_that_onnxruntime_has(tmp_path: Path) -> None:
    """It is for runtimes that lack the op, and is not what runs: the body here could not even be split."""
    inputs = "int64[batch, seq] input_ids, float[batch, 64, 2] past"
    outputs = "float[batch, seq, 128] logits, float[batch, 64, 2] present"
    nodes = f"""
        x = Gather(emb, input_ids) t = Transpose<perm=[0,2,1]>(x)
        c, present = com.microsoft.CausalConvWithState<activation="silu">(t, taps, bias, past)
        x2 = Transpose<perm=[0,2,1]>(c) {_FEED_FORWARD}
    """
    names = ("emb", "taps", "bias", "w1", "w2", "head")
    proto = model(inputs, outputs, nodes, {name: np.asarray(_WEIGHTS[name]) for name in names}, opset=23)
    function = proto.functions.add(name="CausalConvWithState", domain="com.microsoft")
    function.input.extend(["a", "b", "c", "d"])
    function.output.extend(["y", "z"])
    function.attribute.append("activation")
    function.opset_import.add(domain="", version=23)
    for source, made in (("a", "y"), ("d", "z")):
        function.node.add(op_type="NonZero", input=[source], output=[made])
    onnx.save(proto, tmp_path / "model.onnx")
    report = ArtifactBuilder(tmp_path / "model.onnx", tensor_parallel_size=4).build(tmp_path / "artifact")
    assert report.faults == ()


def test_a_cache_that_rolls_over_in_a_window_is_kept_whole(tmp_path: Path) -> None:
    """And gives what onnxruntime gives with a cache of the window's size, which starts again at its first row."""
    nodes = f"""
        x = Gather(emb, input_ids) q = MatMul(x, wq) k = MatMul(x, wk) v = MatMul(x, wv)
        sum = ReduceSum<keepdims=0>(attention_mask, axis) back = Sub(sum, one) lengths = Cast<to=6>(back)
        size = Shape(attention_mask) long = Gather(size, one) total = Cast<to=6>(long)
        o, present_k, present_v = com.microsoft.GroupQueryAttention
            <num_heads=8, kv_num_heads=4, local_window_size=8, sliding_window_cache=1>
            (q, k, v, past_k, past_v, lengths, total)
        a = MatMul(o, wo) x2 = Add(x, a) {_FEED_FORWARD}
    """
    caches = "float[batch, 4, past, 8] past_k, float[batch, 4, past, 8] past_v"
    inputs = f"int64[batch, seq] input_ids, int64[batch, total] attention_mask, {caches}"
    outputs = "float[batch, seq, 128] logits, float[batch, 4, t, 8] present_k, float[batch, 4, t, 8] present_v"
    _checked(tmp_path, inputs, outputs, nodes, 4)
    tokens = np.random.default_rng(0).integers(0, 128, (1, 30))
    unsplit = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    rolling = np.zeros((2, 1, 4, 8, 8), dtype=np.float32)
    expected = []
    for place in range(30):
        feeds = {"input_ids": tokens[:, place : place + 1], "attention_mask": np.ones((1, place + 1), dtype=np.int64)}
        binding = unsplit.io_binding()
        for name, array in feeds.items():
            binding.bind_cpu_input(name, array)
        binding.bind_output("logits")
        memory = [onnxruntime.OrtValue.ortvalue_from_numpy(cache) for cache in rolling]
        for name, value in zip("kv", memory, strict=True):
            binding.bind_ortvalue_input(f"past_{name}", value)
            binding.bind_ortvalue_output(f"present_{name}", value)
        unsplit.run_with_iobinding(binding)
        expected.append(binding.get_outputs()[0].numpy()[0, 0])
        rolling = np.stack([value.numpy() for value in memory])
    empty = np.zeros((1, 4, 0, 8), dtype=np.float32)
    given: dict[str, Any] = {
        "input_ids": tokens,
        "attention_mask": np.ones_like(tokens),
        "past_k": empty,
        "past_v": empty,
    }
    with Executor(open_artifact(tmp_path / "artifact"), threads=1) as executor:
        found = executor.run(given)["logits"][0]
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


def test_a_window_of_a_cache_is_shorter_at_first(tmp_path: Path) -> None:
    """At usual sizes it has one size, which the output was declared to have always: short sequences failed."""
    nodes = f"""
        x = Gather(emb, input_ids) k0 = MatMul(x, wk) k1 = Reshape(k0, k4) k = Transpose<perm=[0,2,1,3]>(k1)
        all = Concat<axis=2>(old, k) new = Slice(all, last16, endless, two1) s0 = ReduceMean(all, two1)
        s1 = Transpose<perm=[0,2,1,3]>(s0) s2 = Reshape(s1, k32) s = MatMul(s2, widen) x2 = Add(x, s) {_FEED_FORWARD}
    """
    inputs = "int64[batch, seq] input_ids, float[batch, 4, past, 8] old"
    _checked(tmp_path, inputs, "float[batch, seq, 128] logits, float[batch, 4, kept, 8] new", nodes, 4)
    outputs = {info.name: info.shape for info in open_artifact(tmp_path / "artifact").manifest.outputs}
    assert outputs["new"] == ("batch", 4, "new.2", 8)


def test_a_dimension_whose_symbol_is_a_number(tmp_path: Path) -> None:
    """As exporters write the size of a cache that had a symbol before it was known."""
    nodes = f"""
        x = Gather(emb, input_ids) k0 = MatMul(x, wk) k1 = Reshape(k0, k4) k = Transpose<perm=[0,2,1,3]>(k1)
        present = Concat<axis=2>(past, k) seen = ReduceMean<keepdims=0>(present, all) x2 = Add(x, seen) {_FEED_FORWARD}
    """
    path = tmp_path / "model.onnx"
    weights = {name: np.asarray(_WEIGHTS[name]) for name in ("emb", "wk", "k4", "w1", "w2", "head")}
    inputs = "int64[batch, seq] input_ids, float[batch, four, past, eight] past"
    outputs = "float[batch, seq, 128] logits, float[batch, four, total, eight] present"
    proto = model(inputs, outputs, nodes, {**weights, "all": _ints(0, 1, 2, 3)}, opset=23)
    for value in (*proto.graph.input, *proto.graph.output):
        for dim in value.type.tensor_type.shape.dim:
            dim.dim_param = {"four": "4", "eight": "8"}.get(dim.dim_param, dim.dim_param)
    onnx.save(proto, path)
    ArtifactBuilder(path, tensor_parallel_size=4).build(tmp_path / "artifact")
    assert open_artifact(tmp_path / "artifact").manifest.inputs[1].shape == ("batch", 4, "past", 8)


def test_scores_in_float32_over_caches_in_float16(tmp_path: Path) -> None:
    """Nothing behind the attention casts back: the fused op's output is cast to what the model goes on with."""
    nodes = (
        f"""
        x = Gather(emb, input_ids) q0 = MatMul(x, wq) k0 = MatMul(x, wk) v0 = MatMul(x, wv)
        q1 = Reshape(q0, q4) k1 = Reshape(k0, k4) v1 = Reshape(v0, k4)
        q2 = Transpose<perm=[0,2,1,3]>(q1) k2 = Transpose<perm=[0,2,1,3]>(k1) v2 = Transpose<perm=[0,2,1,3]>(v1)
        present_k = Concat<axis=2>(past_k, k2) present_v = Concat<axis=2>(past_v, v2)
        kf = Cast<to=1>(present_k) qf = Cast<to=1>(q2) vf = Cast<to=1>(present_v) kt = Transpose<perm=[0,1,3,2]>(kf)
        s0 = MatMul(qf, kt) s1 = Mul(s0, scale) new = Shape(input_ids) n = Gather(new, one)
        old = Shape(past_k) p = Gather(old, two) all = Add(n, p) keys = Range(none, all, one)
        rows0 = Range(p, all, one) rows = Unsqueeze(rows0, axis) seen = LessOrEqual(keys, rows)
        mask = Where(seen, shown, hidden) s2 = Add(s1, mask) w = Softmax<axis=-1>(s2) o0 = MatMul(w, vf)
        o1 = Transpose<perm=[0,2,1,3]>(o0) o2 = Reshape(o1, b3) a = MatMul(o2, wo) xf = Cast<to=1>(x)
        x2 = Add(xf, a) {_FEED_FORWARD}
    """.replace("MatMul(x, wk)", "MatMul(x, wq)")
        .replace("MatMul(x, wv)", "MatMul(x, wq)")
        .replace("k4", "q4")
    )
    inputs = "int64[batch, seq] input_ids, float16[batch, 8, past, 8] past_k, float16[batch, 8, past, 8] past_v"
    outputs = "float[batch, seq, 128] logits, float16[batch, 8, t, 8] present_k, float16[batch, 8, t, 8] present_v"
    report = _checked(tmp_path, inputs, outputs, nodes, 4, emb=np.float16, wq=np.float16)
    assert (report.fused_attentions, report.attentions_left) == (1, ())
