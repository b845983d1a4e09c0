"""What ops cost, by hand for each kind."""

from __future__ import annotations

import numpy as np
import pytest

from furiosa_llm.builder.rules.cost import Cost
from furiosa_llm.builder.rules.registry import cost_of
from tests.support.builder.costs import cost, views_in
from tests.support.builder.graphs import Weights
from tests.support.builder.op_case import case, ints

MICROSOFT = "com.microsoft"


def test_costs_are_added_and_repeated() -> None:
    one = Cost(flops=1, nbytes_read=2, nbytes_written=3)
    assert one + one * 2 == Cost(flops=3, nbytes_read=6, nbytes_written=9)
    assert sum([one, one], Cost()) == one * 2


# -- products ----------------------------------------------------------------------------------------------------


def test_a_matrix_product() -> None:
    found = cost("float16[2, 3, 5] x, float16[5, 7] w", "y = MatMul(x, w)")
    assert found == Cost(flops=2 * 2 * 3 * 5 * 7, nbytes_read=2 * (30 + 35), nbytes_written=2 * 42)


@pytest.mark.parametrize(("ta", "tb"), [(0, 0), (0, 1), (1, 0), (1, 1)])
def test_a_matrix_product_with_a_bias(ta: int, tb: int) -> None:
    a, b = "5, 3" if ta else "3, 5", "7, 5" if tb else "5, 7"
    found = cost(f"float[{a}] x, float[{b}] w, float[7] b", f"y = Gemm<transA={ta}, transB={tb}>(x, w, b)")
    assert found.flops == 2 * 3 * 5 * 7 + 3 * 7


def test_a_product_of_four_bit_codes_reads_them_packed() -> None:
    k, n, rows = 4096, 1024, 3
    inputs = f"float16[{rows}, {k}] x, uint8[{n}, {k // 32}, 16] w, float16[{n}, {k // 32}] s, uint8[{n}, {k // 64}] z"
    found = cost(inputs, f"y = {MICROSOFT}.MatMulNBits<K={k}, N={n}, bits=4, block_size=32>(x, w, s, z)")
    packed = n * k // 2 + n * k // 32 * 2 + n * k // 32 // 2
    assert found == Cost(flops=2 * rows * k * n, nbytes_read=2 * rows * k + packed, nbytes_written=2 * rows * n)


@pytest.mark.parametrize(("kind", "bits"), [("int4", 4), ("uint2", 2), ("uint8", 8)])
def test_codes_are_read_at_their_width(kind: str, bits: int) -> None:
    inputs = f"{kind}[64, 32] w, float16[2, 32] s, {kind}[2, 32] z"
    found = cost(inputs, "y = DequantizeLinear<axis=0, block_size=32>(w, s, z)", opset=25)
    read = 64 * 32 * bits // 8 + 2 * 64 + -(-64 * bits // 8)
    assert found == Cost(flops=2 * 64 * 32, nbytes_read=read, nbytes_written=2 * 64 * 32)


def test_an_einsum_is_one_loop_over_its_letters() -> None:
    both = "float[2, 6, 3, 4] q, float[2, 6, 7, 4] k"
    assert cost(both, 'y = Einsum<equation="bhqd,bhkd->bhqk">(q, k)').flops == 2 * 2 * 6 * 3 * 7 * 4
    assert cost("float[3] a, float[4] b", 'y = Einsum<equation="i,j->ij">(a, b)').flops == 12
    assert cost("float[3, 4] a", 'y = Einsum<equation="ij->ji">(a)').flops == 0
    assert cost("float[3, 4] a", 'y = Einsum<equation="ij->i">(a)').flops == 12


def test_a_convolution() -> None:
    found = cost("float[2, 6, 9, 9] x, float[8, 3, 3, 3] w, float[8] b", "y = Conv<group=2>(x, w, b)")
    assert found.flops == 2 * 8 * 7 * 7 * (2 * 3 * 9 + 1)
    assert found.nbytes_written == 4 * 2 * 8 * 7 * 7
    found = cost("float[2, 6, 9, 9] x, float[6, 4, 3, 3] w", "y = ConvTranspose<group=2>(x, w)")
    assert found.flops == 2 * 2 * 6 * 81 * 4 * 9


# -- attention ---------------------------------------------------------------------------------------------------


def grouped(new: int, past: int, attributes: str = "") -> Cost:
    """Two sequences of 32 query heads of 128 that share 8 key heads, in float16."""
    inputs = f"""float16[2, {new}, 4096] q, float16[2, {new}, 1024] k, float16[2, {new}, 1024] v,
        float16[2, 8, {past}, 128] pk, float16[2, 8, {past}, 128] pv, int32[2] last, int32 total"""
    heads = f"num_heads=32, kv_num_heads=8{attributes}"
    return cost(inputs, f"y, nk, nv = {MICROSOFT}.GroupQueryAttention<{heads}>(q, k, v, pk, pv, last, total)")


def test_grouped_attention_reads_the_past_and_writes_the_new_position() -> None:
    row, scalars = 2 * 8 * 128 * 2, 12  # of keys or of values, of both sequences
    found = grouped(1, 1000)
    assert found.flops == 2 * 32 * 1001 * (2 * 128 + 2 * 128 + 6)
    assert found.nbytes_read == 2 * 2 * 4096 + 2 * row + 2 * 1000 * row + scalars
    assert found.nbytes_written == 2 * 2 * 4096 + 2 * row


def test_the_masked_half_of_a_prefill_is_counted() -> None:
    found = grouped(100, 20)
    assert found.flops == 2 * 32 * 100 * 120 * (4 * 128 + 6)
    assert found.nbytes_written == 100 * grouped(1, 20).nbytes_written


def test_a_window_limits_what_is_computed_and_read() -> None:
    assert grouped(1, 1000, ", local_window_size=64").flops == grouped(1, 63).flops
    assert grouped(1, 1000, ", local_window_size=64").nbytes_read == grouped(1, 63).nbytes_read
    assert grouped(1, 10, ", local_window_size=64") == grouped(1, 10)


def test_rotation_inside_attention() -> None:
    inputs = """float[1, 5, 96] x, float[1, 1, 7, 16] pk, float[1, 1, 7, 16] pv, int32[1] last, int32 total,
        float[512, 8] c, float[512, 8] s"""
    node = f"y, nk, nv = {MICROSOFT}.GroupQueryAttention<num_heads=4, kv_num_heads=1, do_rotary={{}}>"
    arguments = "(x, , , pk, pv, last, total, c, s)"
    without, found = (cost(inputs, node.format(rotary) + arguments) for rotary in (0, 1))
    assert found.flops - without.flops == 3 * 5 * (4 + 1) * 16
    assert found.nbytes_read == 4 * (5 * 96 + 2 * 7 * 16 + 2 * 5 * 8) + 8


def test_attention_of_onnx() -> None:
    inputs = "float[2, 6, 3, 8] q, float[2, 2, 5, 8] k, float[2, 2, 5, 4] v, float[3, 5] m"
    assert cost(inputs, "y = Attention(q, k, v, m)").flops == 2 * 6 * 3 * 5 * (2 * 8 + 2 * 4 + 7)
    flat = inputs.replace("2, 6, 3, 8", "2, 3, 48").replace("2, 2, 5, 8", "2, 5, 16").replace("2, 2, 5, 4", "2, 5, 8")
    assert cost(flat, "y = Attention<q_num_heads=6, kv_num_heads=2>(q, k, v, m)") == cost(
        inputs, "y = Attention(q, k, v, m)"
    )
    window = "y = Attention<is_causal=1, left_window_size=1>(q, k, v, m)"
    assert cost(inputs, window, opset=25).flops == 2 * 6 * 3 * 2 * (2 * 8 + 2 * 4 + 7)


def test_attention_with_its_projections() -> None:
    inputs = "float[2, 3, 10] x, float[10, 48] w, float[48] b, float[2, 2, 4, 7, 4] past"
    found = cost(inputs, f"y, n = {MICROSOFT}.Attention<num_heads=4>(x, w, b, , past)")
    assert found.flops == 2 * 3 * 48 * (2 * 10 + 1) + 2 * 4 * 3 * 10 * (4 * 4 + 6)
    assert found.nbytes_written == 4 * (2 * 3 * 16 + 2 * 2 * 4 * 3 * 4)


def test_attention_of_heads_and_of_an_encoder() -> None:
    inputs = "float[2, 3, 32] q, float[2, 4, 9, 8] k, float[2, 4, 9, 8] v"
    found = cost(inputs, f"y = {MICROSOFT}.MultiHeadAttention<num_heads=4>(q, k, v)")
    assert found == Cost(flops=2 * 4 * 3 * 9 * (4 * 8 + 6), nbytes_read=4 * (192 + 1152), nbytes_written=4 * 192)


# -- experts -----------------------------------------------------------------------------------------------------


def mixture(tokens: int) -> Cost:
    """Two of eight experts of 16 -> 2 * 32 -> 16, gate and up interleaved."""
    inputs = f"float[{tokens}, 16] x, float[{tokens}, 8] r, float[8, 64, 16] a, float[8, 16, 32] b"
    attributes = 'k=2, activation_type="swiglu", swiglu_fusion=1'
    return cost(inputs, f"y = {MICROSOFT}.MoE<{attributes}>(x, r, a, , b)")


def test_a_token_goes_through_its_experts() -> None:
    expert, routing = 2 * 16 * 64 + 2 * 32 * 16 + 32 * 6, 8 * 5 + 2 * 2 * 16
    assert mixture(1).flops == 2 * expert + routing
    assert mixture(10).flops == 10 * mixture(1).flops


@pytest.mark.parametrize(("tokens", "touched"), [(1, 2), (2, 8 * (1 - 0.75**2)), (10, 7.549), (1000, 8)])
def test_weights_of_touched_experts_are_read(tokens: int, touched: float) -> None:
    expert = 4 * (64 * 16 + 16 * 32)
    assert mixture(tokens).nbytes_read - 4 * tokens * (16 + 8) == pytest.approx(touched * expert, rel=1e-3)


def test_quantised_experts_are_read_packed() -> None:
    inputs = """float16[1, 64] x, float16[1, 8] r, uint8[8, 256, 32] a, float16[8, 256, 2] s,
        uint8[8, 64, 64] b, float16[8, 64, 4] t"""
    attributes = 'k=2, activation_type="swiglu", swiglu_fusion=1, expert_weight_bits=4, block_size=32'
    found = cost(inputs, f"y = {MICROSOFT}.QMoE<{attributes}>(x, r, a, s, , b, t)")
    assert found.nbytes_read == 2 * (64 + 8) + 2 * (256 * 32 + 64 * 64 + 2 * (256 * 2 + 64 * 4))
    assert found.flops == 2 * (2 * 64 * 256 + 2 * 128 * 64 + 128 * 6) + 8 * 5 + 2 * 2 * 64


# -- recurrences -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("op", "gates", "after"), [("LSTM", 4, 18), ("GRU", 3, 14), ("RNN", 1, 1)])
@pytest.mark.parametrize("directions", [1, 2])
def test_a_recurrent_op_multiplies_with_all_gates_at_every_step(
    op: str, gates: int, after: int, directions: int
) -> None:
    inputs = f"""float[7, 2, 6] x, float[{directions}, {gates * 5}, 6] w, float[{directions}, {gates * 5}, 5] r,
        float[{directions}, {2 * gates * 5}] b"""
    kind = "bidirectional" if directions == 2 else "forward"
    found = cost(inputs, f'y = {op}<hidden_size=5, direction="{kind}">(x, w, r, b)')
    assert found.flops == 7 * 2 * directions * 5 * (2 * gates * (6 + 5) + 2 * gates + after)
    assert found.nbytes_written == 4 * 7 * directions * 2 * 5


def test_linear_attention_updates_and_reads_its_states() -> None:
    inputs = "float[2, 3, 32] q, float[2, 3, 16] k, float[2, 3, 8] v, float[2, 2, 8, 4] s, float[2, 3, 2] g"
    heads, states, tokens = 4, 2, 2 * 3
    plain = 'y, n = LinearAttention<q_num_heads=4, kv_num_heads=2, update_rule="{}">(q, k, v, s{})'
    read = heads * (2 * 8 * 4 + 4)
    assert cost(inputs, plain.format("linear", ""), opset=27).flops == tokens * (states * 2 * 8 * 4 + read)
    gated = states * (3 * 8 * 4 + 1) + read
    assert cost(inputs, plain.format("gated", ", g"), opset=27).flops == tokens * gated
    delta = 'y, n = LinearAttention<q_num_heads=4, kv_num_heads=2, update_rule="delta">(q, k, v, s, , g)'
    assert cost(inputs, delta, opset=27).flops == tokens * (states * (4 * 8 * 4 + 2 * 4) + read)


def test_of_a_window_of_states_the_last_is_read() -> None:
    inputs = "float[2, 3, 16] q, float[2, 3, 16] k, float[2, 3, 8] v, float[5, 2, 2, 8, 4] s"
    attributes = 'q_num_heads=2, kv_num_heads=2, update_rule="linear", state_window=5'
    found = cost(inputs, f"y, n = {MICROSOFT}.LinearAttention<{attributes}>(q, k, v, s)")
    assert found.nbytes_read == 4 * (2 * 3 * (16 + 16 + 8) + 2 * 2 * 8 * 4)


def test_a_causal_convolution() -> None:
    inputs = "float[2, 6, 5] x, float[6, 1, 4] w, float[6] b, float[2, 6, 3] s"
    found = cost(inputs, 'y, n = CausalConvWithState<activation="silu">(x, w, b, s)', opset=27)
    assert found.flops == 60 * (2 * 4 + 1 + 5)


# -- other ops ---------------------------------------------------------------------------------------------------

OTHERS: tuple[tuple[str, str, Weights, int], ...] = (
    ("float[2, 64, 1] x", "y = DFT(x, , axis)", {"axis": np.array(1)}, 5 * 2 * 64 * 6),
    ("float[2, 256, 1] x", "y = STFT(x, s, w)", {"s": np.array(64), "w": (64,)}, 2 * 4 * 64 * (1 + 5 * 6)),
    ("float x", "y = HannWindow(n)", {"n": np.array(64)}, 5 * 64),
    ("float x", "y = BlackmanWindow(n)", {"n": np.array(64)}, 9 * 64),
    ("float[2, 2, 3] t", "y = AffineGrid(t, n)", {"n": ints(2, 3, 4, 5)}, 2 * 3 * 2 * 4 * 5 * 2),
    ("float[9, 6] x", "y = CenterCropPad(x, n)", {"n": ints(5, 6)}, 0),
    ("float[1, 8, 9] x", "y = Col2Im(x, i, b)", {"i": ints(4, 4), "b": ints(2, 2)}, 72),
    ("float[1, 3, 8, 8] x, float[1, 5, 5, 2] g", "y = GridSample(x, g)", {}, 3 * 25 * 4 * 2),
    ("float[1, 3, 8, 8] x, float[1, 5, 5, 2] g", 'y = GridSample<mode="nearest">(x, g)', {}, 0),
    (
        "float[1, 3, 8, 8] x, float[4, 4] r, int64[4] b",
        "y = RoiAlign<output_height=2, output_width=2, sampling_ratio=2>(x, r, b)",
        {},
        4 * 3 * 4 * 4 * 8,
    ),
    (
        "float[1, 3, 8, 8] x, float[5, 3, 3, 3] w, float[1, 18, 6, 6] o",
        "y = DeformConv(x, w, o)",
        {},
        36 * (5 * 2 * 27 + 8 * 27),
    ),
    ("float[1, 3, 8, 8] x, float[2, 5] r", "y = MaxRoiPool<pooled_shape=[2, 2]>(x, r)", {}, 192),
    ("float[1, 1, 2, 2] x, int64[1, 1, 2, 2] i", "y = MaxUnpool<kernel_shape=[2, 2], strides=[2, 2]>(x, i)", {}, 0),
    ("float[2, 6] x", "y = EyeLike(x)", {}, 0),
    (
        """float[1, 1, 64] q, float[1, 1, 32] k, float[1, 1, 32] v, float[1, 2, 32, 16] pk, float[1, 2, 32, 16] pv,
        int32[1, 3] rows, int32[1, 4] columns, int32 total, int32[1] lengths""",
        f"""y, nk, nv = {MICROSOFT}.SparseAttention<num_heads=4, kv_num_heads=2, sparse_block_size=16>
        (q, k, v, pk, pv, rows, columns, total, lengths)""",
        {},
        4 * 32 * (4 * 16 + 6),
    ),
    ("float[2, 3, 8] x, float[3, 8] s", f"y = {MICROSOFT}.BranchwiseRMSNorm(x, s)", {}, 4 * 48),
    (
        "uint8[6, 3] x, float s, uint8 z, uint8[7, 6] w, float[7] t, uint8[7] o",
        f"y = {MICROSOFT}.QGemm<transA=1, transB=1>(x, s, z, w, t, o)",
        {},
        3 * 7 * (2 * 6 + 1),
    ),
    ("float[2, 4, 3, 8] x", "y = Attention<softcap=2.0>(x, x, x)", {}, 8 * 3 * 3 * (4 * 8 + 6 + 3)),
    (
        "float[2, 3, 32] q, float[2, 5, 32] k, float[2, 5, 16] v, float[80] b",
        f"y = {MICROSOFT}.MultiHeadAttention<num_heads=4>(q, k, v, b)",
        {},
        2 * 4 * 3 * 5 * (2 * 8 + 2 * 4 + 6) + 2 * (3 * 32 + 5 * (32 + 16)),
    ),
    (
        "float[3, 16] x, float[3, 4] r, float[4, 32, 16] a, float[4, 16, 32] b, float[4, 32, 16] c",
        f'y = {MICROSOFT}.MoE<k=2, activation_type="silu">(x, r, a, , b, , c)',
        {},
        3 * (2 * (3 * 2 * 16 * 32 + 32 * 5) + 4 * 5 + 2 * 2 * 16),
    ),
    (
        "float[6, 2, 8] q, float[6, 2, 8] k, float[6, 4, 5] v, int32[3] n, float[6, 4] g, float[6, 4] b",
        f'y, s = {MICROSOFT}.GatedDeltaNet<beta_activation="sigmoid">(q, k, v, n, g, b)',
        {},
        6 * 4 * (2 * 40 + 40 + 2 * 40 + 2 * 5 + 2 * 40 + 5) + 24 + 4 * 24,
    ),
    ("float[2, 3, 8] s, float[2, 3] g", f"y = {MICROSOFT}.HyperConnectionPreMix(s, g)", {}, 2 * 48),
    (
        "float[2, 3, 8] s, float[2, 8] b, float[2, 3] g, float[2, 3, 3] m",
        f"y = {MICROSOFT}.HyperConnectionPostMix(s, b, g, m)",
        {},
        48 * (2 * 3 + 2),
    ),
)


@pytest.mark.parametrize(("inputs", "nodes", "weights", "flops"), OTHERS)
def test_other_ops(inputs: str, nodes: str, weights: Weights, flops: int) -> None:
    found = cost(inputs, nodes, weights)
    assert found.flops == flops
    assert found.nbytes_written > 0


# -- what moves --------------------------------------------------------------------------------------------------


def test_a_table_is_read_by_rows() -> None:
    found = cost("float16[49152, 576] w, int64[2, 3] i", "y = Gather(w, i)")
    assert found == Cost(nbytes_read=2 * 6 * 576 + 8 * 6, nbytes_written=2 * 6 * 576)
    assert cost("float[4, 5] w, int64[9] i", "y = Gather(w, i)").nbytes_read == 4 * 20 + 8 * 9
    assert cost("float[5, 9] w, int64[2] i", "y = Gather<axis=-1>(w, i)").nbytes_read == 4 * 5 * 2 + 8 * 2


def test_a_quantised_table_is_read_by_packed_rows() -> None:
    inputs = "uint8[1000, 64] w, int64[3] i, float[1000, 4] s, uint8[1000, 2] z"
    found = cost(inputs, f"y = {MICROSOFT}.GatherBlockQuantized<bits=4, block_size=32>(w, i, s, z)")
    assert found == Cost(flops=2 * 3 * 128, nbytes_read=3 * (64 + 16 + 2) + 24, nbytes_written=4 * 3 * 128)


VIEWS = "y = Reshape(x, t)", "y = Squeeze(x)", "y = Identity(x)", "y = Flatten(x)", "y = Dropout(x)"


@pytest.mark.parametrize("nodes", VIEWS)
def test_views_cost_nothing(nodes: str) -> None:
    assert cost("float[6, 1, 5] x", nodes, {"t": ints(5, 6)}) == Cost()


def test_what_selects_reads_what_it_gives() -> None:
    weights = {"s": ints(0), "e": ints(2), "t": ints(9, 6)}
    assert cost("float[9, 6] x", "y = Slice(x, s, e)", weights) == Cost(nbytes_read=4 * 12 + 16, nbytes_written=4 * 12)
    assert cost("float[1, 6] x", "y = Expand(x, t)", weights) == Cost(nbytes_read=4 * 6 + 16, nbytes_written=4 * 54)
    assert cost("float[9, 6] x", "y = Shape(x)") == Cost(nbytes_written=16)


def test_a_cache_is_written_in_place() -> None:
    found = cost("float[2, 6, 900, 5] x, float[2, 6, 3, 5] u", "y = TensorScatter(x, u)", opset=24)
    assert found == Cost(nbytes_read=4 * 180, nbytes_written=4 * 180)


def test_what_is_read_twice_is_read_once() -> None:
    assert cost("float[6] x", "y = Mul(x, x)") == Cost(flops=6, nbytes_read=24, nbytes_written=24)


def test_elementwise_ops_are_sums_of_what_they_are_made_of() -> None:
    x = "float[6, 5] x"
    assert [cost(x, f"y = {op}(x)").flops for op in ("Exp", "Sigmoid", "Gelu", "Cast<to=10>")] == [30, 120, 150, 0]
    assert cost(x, 'y = Gelu<approximate="tanh">(x)').flops == 9 * 30
    assert cost(x + ", float[5] z", "y = Sum(x, z, x)").flops == 2 * 30
    assert cost(x, "y = Softmax(x)").flops == 5 * 30
    assert cost(x + ", float[5] g", "y = RMSNormalization(x, g)").flops == 4 * 30


# -- control flow ------------------------------------------------------------------------------------------------


def test_the_dearer_branch_is_counted() -> None:
    branches = """<then_branch = t () => (float a) { b = CumSum(x, one) a = Sigmoid(b) },
        else_branch = e () => (float d) { d = CumSum(x, one) }>"""
    found = case_cost(f"y = If(c) {branches}", "float[6, 5] x, bool c", "If", one=np.array(1))
    assert found == Cost(flops=30 + 120, nbytes_read=128 + 120, nbytes_written=240)


@pytest.mark.parametrize(("trips", "count"), [("three", 3), ("n", 1)])
def test_a_loop_is_counted_as_often_as_it_runs(trips: str, count: int) -> None:
    body = "<body = l (int64 i, bool c, float[6, 5] s) => (bool d, float[6, 5] t) { d = Identity(c) t = Exp(s) }>"
    found = case_cost(f"y = Loop({trips}, , x) {body}", "float[6, 5] x, int64 n", "Loop", three=np.array(3))
    assert found == Cost(flops=30, nbytes_read=120, nbytes_written=120) * count


def test_a_scan_is_counted_for_each_element() -> None:
    body = """<num_scan_inputs=1, body = l (float[5] s, float[5] r) => (float[5] t, float[5] o)
        { t = Add(s, r) o = Exp(t) }>"""
    nodes = f"last, y = Scan{body}(zeros, x)"
    found = case_cost(nodes, "float[6, 5] x", "Scan", zeros=np.zeros(5, np.float32))
    assert found == Cost(flops=10, nbytes_read=60, nbytes_written=40) * 6


def case_cost(nodes: str, inputs: str, op: str, **weights: object) -> Cost:
    made = case(op, "", inputs, "float[6, 5] y", nodes, **weights)
    return cost_of(views_in(made)[-1])
