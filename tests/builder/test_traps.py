"""Every trap that partitioning has: each was met in a trial, most of them as wrong numbers without any error."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from furiosa_llm.builder.factors.factor import Factor
from furiosa_llm.builder.plan.groups import candidates
from furiosa_llm.builder.plan.outcome import InfeasibleError, Outcome
from furiosa_llm.builder.plan.plan import Planning
from furiosa_llm.builder.plan.sweep import Sweeper
from furiosa_llm.runtime.artifact.layout import Mesh, axes_of
from tests.support.builder.graphs import Weights, model
from tests.support.builder.plans import Assignment, Prepared, prepare, prepare_proto
from tests.support.builder.proofs import SIZES, TOLERANCE, prove

TWO = Mesh((2,))


def dim(prepared: Prepared, name: str, d: int) -> Factor:
    """The factor of a dimension of a named value."""
    return next(factors[d] for value, factors in prepared.analysis.dims.items() if value.name == name)


def leaf(prepared: Prepared, name: str, d: int, position: int = 0) -> Factor:
    """A leaf of a dimension of a named value."""
    return list(dim(prepared, name, d).leaves())[position]


def sweep(prepared: Prepared, assignment: Assignment, mesh: Mesh = TWO) -> Outcome:
    return Sweeper(prepared.analysis, mesh, list(assignment), prepared.states).sweep(assignment)


def error_of(prepared: Prepared, assignment: Assignment, mesh: Mesh = TWO) -> float:
    return prepared.greatest_error(prepared.split(mesh, assignment, sweep(prepared, assignment, mesh)), SIZES)


def check(inputs: str, outputs: str, nodes: str, weights: Weights, opset: int = 21) -> onnx.ModelProto:
    """Prove a model right under all its feasible assignments, as it is and with its sizes folded."""
    proto = model(inputs, outputs, nodes, weights, opset=opset)
    for simplified in (False, True):
        proof = prove(proto, simplified=simplified)
        assert proof.wrong == ()
        assert proof.plans > 0
    return proto


def ints(*values: int) -> np.ndarray[tuple[int, ...], np.dtype[np.int64]]:
    return np.array(values, dtype=np.int64)


def test_equal_vectors_stored_once_tie_nothing_together() -> None:
    """Trap 1: exporters store one zero bias for all layers; its one dimension would tie heads to hidden."""
    nodes = "a = MatMul(past_x, w) h = Add(a, zero) c = MatMul(h, v) y = Add(c, zero)"
    weights = {"w": (6, 6), "v": (6, 6), "zero": np.zeros(6, np.float32)}
    prepared = prepare_proto(check("float[4, 6] past_x", "float[4, 6] y", nodes, weights))
    inner, outer = leaf(prepared, "w", 1), leaf(prepared, "v", 1)
    assert inner is not outer
    assert [c.kind for c in sweep(prepared, {inner: (0,)}).collectives] == ["AllReduce"]


def test_matrices_used_twice_stay_tied() -> None:
    """Trap 1, the other way: a tied embedding is split once, for both of its uses."""
    nodes = "x = Gather(e, input_ids) t = Transpose(e) y = MatMul(x, t)"
    proto = model("int64[batch, sequence] input_ids", "float[batch, sequence, 1001] y", nodes, {"e": (1001, 8)})
    prepared = prepare_proto(proto)
    vocabulary = leaf(prepared, "e", 0)
    assert dim(prepared, "y", 2).find() is vocabulary
    assert error_of(prepared, {vocabulary: (0,)}) < TOLERANCE


def test_equal_places_in_different_positions_are_different_groups(zoo: Path) -> None:
    """Trap 2: key heads and query groups of a packed projection have one size and the same consumers."""
    prepared = prepare(zoo / "tiny-llama-genai-fp32" / "model.onnx")
    plan = Planning(prepared.analysis, prepared.states, prepared.probes).plan(Mesh((2, 2)))
    heads = [group for group in plan.groups if group.size == 2]
    assert len(heads) == 2
    assert {plan.choices[group] for group in heads} == {(0,), (1,)}


def test_contraction_of_segments_that_are_split_differently_is_refused() -> None:
    """Trap 3: the segment that is whole on every rank would be added up once for each."""
    nodes = "c = Concat<axis=1>(past_x, past_z) y = MatMul(c, w)"
    proto = check("float[3, 6] past_x, float[3, 4] past_z", "float[3, 5] y", nodes, {"w": (10, 5)})
    prepared = prepare_proto(proto)
    with pytest.raises(InfeasibleError, match="segments"):
        sweep(prepared, {leaf(prepared, "past_x", 1): (0,)})


@pytest.mark.parametrize("name", ["tiny-gptoss-genai-fp32-fullkv", "tiny-llama-genai-fp32", "tiny-llama-genai-int4"])
def test_what_an_op_uses_inside_is_never_split(name: str, zoo: Path) -> None:
    """Trap 4: the pair of a swiglu, the head vector of fused attention, the block of a quantised weight."""
    prepared = prepare(zoo / name / "model.onnx")
    pinned = prepared.analysis.pinned
    assert pinned
    assert not pinned.intersection(candidates(prepared.analysis, prepared.states))
    for used in pinned:
        if used.size > 1:
            with pytest.raises(InfeasibleError, match="whole inside an op"):
                sweep(prepared, {used: (0,)})


def test_accumulating_experts_makes_one_sum() -> None:
    """Traps 5 and 6: zeros, then each expert's share scattered into them, then one sum for all."""
    nodes = """
        s = Shape(past_x) zeros = ConstantOfShape(s)
        p = MatMul(past_x, w) a = ScatterElements<axis=0>(zeros, i, p) one = Add(zeros, a)
        q = MatMul(past_x, v) b = ScatterElements<axis=0>(zeros, i, q) y = Add(one, b)
    """
    i = np.tile([[2], [0], [1]], (1, 6))
    proto = check("float[3, 6] past_x", "float[3, 6] y", nodes, {"w": (6, 6), "v": (6, 6), "i": i})
    prepared = prepare_proto(proto)
    outcome = sweep(prepared, {leaf(prepared, "past_x", 1): (0,)})
    assert [(c.kind, c.value.name) for c in outcome.collectives if c.kind == "AllReduce"] == [("AllReduce", "y")]


PACKED = {
    "Split": "q, k, v = Split<axis=-1>(p, sizes)",
    "Slice": "q = Slice(p, s0, s4, axis) k = Slice(p, s4, s6, axis) v = Slice(p, s6, s8, axis)",
    "Reshape": """
        h = Reshape(p, heads) g, l, m = Split<axis=1>(h, counts)
        q = Reshape(g, wide) k = Reshape(l, narrow) v = Reshape(m, narrow)
    """,
}


@pytest.mark.parametrize("how", PACKED)
def test_packed_projections_are_split_by_heads(how: str) -> None:
    """Trap 7: query (4 heads of 3), key and value (2 heads each) in one matrix, cut in three ways."""
    weights = {"sizes": ints(12, 6, 6), "s0": ints(0), "s4": ints(12), "s6": ints(18), "s8": ints(24), "axis": ints(1)}
    weights |= {"heads": ints(5, 8, 3), "counts": ints(4, 2, 2), "wide": ints(5, 12), "narrow": ints(5, 6)}
    weights |= {"qh": ints(5, 2, 2, 3), "kh": ints(5, 2, 1, 3), "flat": ints(5, 12)}
    nodes = f"""
        p = MatMul(past_x, w) {PACKED[how]}
        qh4 = Reshape(q, qh) kh4 = Reshape(k, kh) vh4 = Reshape(v, kh)
        a = Mul(qh4, kh4) b = Mul(a, vh4) f = Reshape(b, flat) y = MatMul(f, o)
    """
    used = {name: array for name, array in weights.items() if name in nodes}
    proto = check("float[5, 7] past_x", "float[5, 7] y", nodes, {"w": (7, 24), "o": (12, 7), **used})
    prepared = prepare_proto(proto)
    kv = leaf(prepared, "kh4", 1)
    outcome = sweep(prepared, {kv: (0,)})
    assert [(c.kind, c.value.name) for c in outcome.collectives] == [("AllReduce", "y")]


def test_expand_whose_target_is_computed() -> None:
    """Trap 8: keys repeated for each query of a group, by the long way that tracing writes."""
    nodes = """
        s = Shape(past_k) b = Gather(s, i0) h = Gather(s, i1) t = Gather(s, i2) d = Gather(s, i3)
        want = Concat<axis=0>(b, h, three, t, d) r = Reshape(want, flat) n = Shape(r)
        ones = ConstantOfShape<value=int64[1] {1}>(n) minus = Mul(ones, m1) e = Equal(r, minus) w = Where(e, ones, r)
        five = Unsqueeze(past_k, axis) x = Expand(five, w) all = Concat<axis=0>(b, six, t, d) k = Reshape(x, all)
        present_y = Mul(k, past_q)
    """
    weights = {f"i{d}": ints(d) for d in range(4)} | {
        "three": ints(3),
        "six": ints(6),
        "flat": ints(-1),
        "axis": ints(2),
    }
    weights["m1"] = np.array(-1, dtype=np.int64)
    inputs = "float[batch, 2, past, 5] past_k, float[batch, 6, past, 5] past_q"
    proto = check(inputs, "float[batch, 6, past, 5] present_y", nodes, weights)
    prepared = prepare_proto(proto)
    assert [factor.size for factor in dim(prepared, "past_q", 1).leaves()] == [2, 3]
    for position in range(2):
        assert error_of(prepared, {leaf(prepared, "past_q", 1, position): (0,)}) < TOLERANCE


MERGED = """
    s = Shape(past_x) b = Gather(s, i0) bh = Mul(b, four) t = Concat<axis=0>(bh, rest)
    m = Reshape(past_x, t) e = Exp(m) back = Concat<axis=0>(b, heads) present_y = Reshape(e, back)
"""


def merged(nodes: str = "", output: str = "float[batch, 4, 5] present_y", heads: int = 4) -> onnx.ModelProto:
    weights = {"i0": ints(0), "four": ints(heads), "rest": ints(5), "heads": ints(heads, 5)}
    weights |= {
        name: ints(value) for name, value in {"zero": 0, "end": 2**31 - 1, "twenty": 20}.items() if name in nodes
    }
    return model(f"float[batch, {heads}, 5] past_x", output, MERGED + nodes, weights)


def test_batch_and_heads_merged_into_one_dimension() -> None:
    """Trap 9: sizes of such a dimension are divided and multiplied, not replaced."""
    proto = merged()
    assert prove(proto).wrong == ()
    prepared = prepare_proto(proto)
    assert error_of(prepared, {leaf(prepared, "past_x", 1): (0,)}) < TOLERANCE


def test_padding_inside_a_dynamic_dimension_is_refused() -> None:
    """Traps 9 and 15: the local size would not be the global size divided by anything."""
    prepared = prepare_proto(merged(heads=3))
    with pytest.raises(InfeasibleError, match="padded inside a dynamic dimension"):
        sweep(prepared, {leaf(prepared, "past_x", 1): (0,)})
    assert prove(merged(heads=3)).wrong == ()


def test_scalars_stay_scalars() -> None:
    """Trap 10: what is told apart by rank may have no dimension at all."""
    nodes = "p = MatMul(past_x, w) y = Add(p, bias)"
    proto = check("float[4, 6] past_x", "float[4, 3] y", nodes, {"w": (6, 3), "bias": np.array(2.5, np.float32)})
    prepared = prepare_proto(proto)
    assignment = {leaf(prepared, "w", 0): (0,)}
    split = prepared.split(TWO, assignment, sweep(prepared, assignment))
    mask = next(tensor for tensor in split.program.graph.initializer if tensor.name.startswith("rank/is_first"))
    assert list(mask.dims) == []


def test_weights_with_the_same_first_index_and_length_are_not_confused() -> None:
    """Trap 11: the same matrix under two concatenated layouts."""
    nodes = """
        a = MatMul(past_x, w) a0, a1 = Split<axis=1>(a, first) y = MatMul(a0, u)
        b = MatMul(past_z, w) b0, b1 = Split<axis=1>(b, second) z = MatMul(b0, v)
        c = MatMul(a1, o) d = MatMul(b1, q)
    """
    weights = {
        "w": (6, 12),
        "u": (4, 3),
        "v": (8, 3),
        "o": (8, 3),
        "q": (4, 3),
        "first": ints(4, 8),
        "second": ints(8, 4),
    }
    outputs = "float[5, 3] y, float[5, 3] z, float[5, 3] c, float[5, 3] d"
    check("float[5, 6] past_x, float[5, 6] past_z", outputs, nodes, weights)


def test_a_prefill_graph_keeps_its_caches_split() -> None:
    """Trap 13: presents without pasts are states, too."""
    nodes = "x = Gather(e, input_ids) k = MatMul(x, w) present_k = Reshape(k, t)"
    weights = {"e": (1000, 8), "w": (8, 20), "t": ints(0, 0, 4, 5)}
    outputs = "float[batch, sequence, 4, 5] present_k"
    prepared = prepare_proto(model("int64[batch, sequence] input_ids", outputs, nodes, weights))
    assignment = {leaf(prepared, "w", 1): (0,)}
    assert sweep(prepared, assignment).collectives == []
    split = prepared.split(TWO, assignment, sweep(prepared, assignment))
    assert [axes_of(d) for d in split.outputs["present_k"] if d is not None] == [(), (), (0,), ()]


PADDED = "h = MatMul(past_x, a) s = Reshape(h, heads)"
SIZES_OF_HEADS = {"heads": ints(4, 3, 2), "flat": ints(4, 6), "last": ints(-1), "axis1": ints(1)}
HARMFUL = {
    "divides by zero": "m = ReduceL2(s, last) n = Div(s, m)",
    "takes the logarithm of zero": "q = Mul(s, s) m = ReduceSum(q, last) l = Log(m) n = Mul(s, l)",
    "inverts zero": "q = Mul(s, s) m = ReduceSum(q, last) r = Sqrt(m) i = Reciprocal(r) n = Mul(s, i)",
    "normalises zero": "n = LpNormalization(s)",
    "raises zero to a negative power": "q = Mul(s, s) m = ReduceSum(q, last) l = Pow(m, minus) n = Mul(s, l)",
}


@pytest.mark.parametrize("how", HARMFUL)
def test_padding_that_is_not_a_number_does_no_harm(how: str) -> None:
    """Trap 15: zero weights do not help against it, as zero times infinity is not zero."""
    weights = {name: array for name, array in SIZES_OF_HEADS.items() if name in HARMFUL[how] + "heads flat"}
    weights |= {"minus": np.array(-0.5, np.float32)} if "minus" in HARMFUL[how] else {}
    nodes = f"{PADDED} {HARMFUL[how]} f = Reshape(n, flat) y = MatMul(f, b)"
    proto = check("float[4, 5] past_x", "float[4, 7] y", nodes, {"a": (5, 6), "b": (6, 7), **weights})
    prepared = prepare_proto(proto)
    assignment = {leaf(prepared, "s", 1): (0,)}
    assert [step.clear for step in sweep(prepared, assignment).steps.values() if step.clear] == [{0: [1]}]


SHORT_BLOCK = "y = com.microsoft.MatMulNBits<K=24, N=6, bits=4, block_size=16>({}, q, s)"
"""A block and a half: in the other half lies whatever the exporter left there."""


def short_block(x: str, nodes: str, weights: Weights) -> onnx.ModelProto:
    codes = np.random.default_rng(0).integers(0, 256, (6, 2, 8), dtype=np.uint8)
    return model(f"float[5, {x}] past_x", "float[5, 6] y", nodes, {"q": codes, "s": (6, 2), **weights})


def test_what_follows_a_short_block_is_cleared() -> None:
    """The weights are no zeros there, so that the activations must be."""
    prepared = prepare_proto(short_block("24", SHORT_BLOCK.format("past_x"), {}))
    assignment = {leaf(prepared, "q", 1): (0,)}
    assert [step.clear for step in sweep(prepared, assignment).steps.values()] == [{0: [1]}]
    assert error_of(prepared, assignment) < TOLERANCE


def test_zeros_after_a_short_block_are_followed_to_it() -> None:
    """Columns of a weight that pad the last block give zeros, and so do activations that keep zeros."""
    nodes = "h = MatMul(past_x, a) g = Sigmoid(h) m = Mul(g, h) " + SHORT_BLOCK.format("m")
    prepared = prepare_proto(short_block("7", nodes, {"a": (7, 24)}))
    assignment = {leaf(prepared, "q", 1): (0,)}
    assert all(not step.clear for step in sweep(prepared, assignment).steps.values())
    assert error_of(prepared, assignment) < TOLERANCE


@pytest.mark.parametrize("packed", ["g, u = Split<axis=1, num_outputs=2>(h)", "r = Reshape(h, pairs) {}"])
def test_short_blocks_reach_a_packed_gate(packed: str) -> None:
    """Both halves of the packed product are split by the blocks of what multiplies them."""
    apart = "g = Gather<axis=2>(r, zero) u = Gather<axis=2>(r, one)"
    nodes = f"h = MatMul(past_x, a_w) {packed.format(apart)} m = Mul(g, u) " + SHORT_BLOCK.format("m")
    sizes = {"pairs": ints(5, 24, 2), "zero": np.array(0), "one": np.array(1)} if "Reshape" in packed else {}
    proto = short_block("7", nodes, {"a_w": (7, 48), **sizes})
    assert prove(proto).wrong == ()
    prepared = prepare_proto(proto)
    assignment = {leaf(prepared, "q", 1): (0,)}
    assert [c.kind for c in sweep(prepared, assignment).collectives] == ["AllReduce"]
    assert error_of(prepared, assignment) < TOLERANCE


def test_short_block_taken_for_a_whole_one_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """The proofs see it if padding is looked for in leaves alone: two blocks over two ranks are not padded."""

    def leaves_alone(factor: Factor, _: object, uneven: set[Factor]) -> list[Factor]:
        return [leaf for leaf in factor.leaves() if leaf in uneven]

    monkeypatch.setattr("furiosa_llm.builder.plan.sweep_pass.padded_places", leaves_alone)
    assert prove(short_block("24", SHORT_BLOCK.format("past_x"), {})).wrong != ()


def test_flat_scales_are_whole_with_what_they_run_over() -> None:
    """Heads of 12 have nothing in common with blocks of 16: the columns are whole, too, as they share a dimension."""
    nodes = "f = Reshape(past_x, t) y = com.microsoft.MatMulNBits<K=48, N=6, bits=4, block_size=16>(f, q, s)"
    codes = np.random.default_rng(0).integers(0, 256, (6, 3, 8), dtype=np.uint8)
    check("float[5, 4, 12] past_x", "float[5, 6] y", nodes, {"t": ints(5, 48), "q": codes, "s": (18,)})


def test_contraction_of_padding_needs_zeros() -> None:
    """Trap 15: neither operand of a product of activations holds zeros; nor does a sum over an activation."""
    nodes = "g = MatMul(past_x, past_z) t = ReduceSum(past_x, axis1)"
    inputs, outputs = "float[4, 3] past_x, float[3, 5] past_z", "float[4, 5] g, float[4, 1] t"
    prepared = prepare_proto(check(inputs, outputs, nodes, {"axis1": ints(1)}))
    with pytest.raises(InfeasibleError, match="holds no zeros"):
        sweep(prepared, {leaf(prepared, "past_x", 1): (0,)})


def test_a_number_added_to_padding_leaves_no_zeros() -> None:
    """Trap 15: a scalar, which has no padding, is added to that of the other operand."""
    nodes = "h = MatMul(past_x, a) s = Add(h, one) y = ReduceSum(s, axis1)"
    weights = {"a": (6, 5), "one": np.array(1, np.float32), "axis1": ints(1)}
    prepared = prepare_proto(check("float[4, 6] past_x", "float[4, 1] y", nodes, weights))
    with pytest.raises(InfeasibleError, match="holds no zeros"):
        sweep(prepared, {leaf(prepared, "a", 1): (0,)})


def test_mean_over_padding_is_refused() -> None:
    """Trap 15: the zeros would count."""
    nodes = "m = ReduceMean(w, axis1) y = Mul(past_x, m)"
    weights = {"w": (6, 3), "axis1": ints(1)}
    prepared = prepare_proto(model("float[6, 6] past_x", "float[6, 6] y", nodes, weights))
    with pytest.raises(InfeasibleError, match="average over padding"):
        sweep(prepared, {leaf(prepared, "w", 1): (0,)})


def test_later_readers_share_one_sum() -> None:
    """Trap 16: the residual stream is summed where it is first needed, once."""
    nodes = "p = MatMul(past_x, w) x = Add(p, r) n = Relu(x) y = Add(x, n) z = Neg(x)"
    proto = check("float[4, 6] past_x, float[4, 5] r", "float[4, 5] y, float[4, 5] z", nodes, {"w": (6, 5)})
    prepared = prepare_proto(proto)
    outcome = sweep(prepared, {leaf(prepared, "w", 0): (0,)})
    assert [c.value.name for c in outcome.collectives] == ["p"]
