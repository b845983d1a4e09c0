"""Graphs that exporters seldom write: each was once split wrongly, or broke the builder."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from furiosa_llm.builder import ArtifactBuilder, plan_model
from furiosa_llm.builder.errors import ShapeError, UnsupportedModelError
from furiosa_llm.builder.plan.outcome import InfeasibleError
from furiosa_llm.builder.shapes.interface import SizeSet
from furiosa_llm.runtime.artifact.layout import Mesh
from furiosa_llm.runtime.artifact.reader import open_artifact
from furiosa_llm.runtime.execution.executor import Executor
from tests.builder.test_traps import TWO, check, error_of, ints, leaf, merged, sweep
from tests.support.builder import growing
from tests.support.builder.graphs import model, random
from tests.support.builder.plans import Prepared, prepare_proto
from tests.support.builder.proofs import TOLERANCE, prove
from tests.support.builder.stitching import session


def test_contraction_without_a_common_refinement_is_not_partial() -> None:
    """(4, 6) against (6, 4): both operands are made whole, so that every rank has all of the sum already."""
    nodes = "x = Reshape(past_x, flat) w = Reshape(v, rows) y = MatMul(x, w)"
    weights = {"v": (6, 4, 5), "flat": ints(3, 24), "rows": ints(24, 5)}
    proto = check("float[3, 4, 6] past_x", "float[3, 5] y", nodes, weights)
    prepared = prepare_proto(proto)
    assert error_of(prepared, {leaf(prepared, "v", 0): (0,)}) < TOLERANCE


def test_a_partial_sum_is_not_cut_over_its_own_axes() -> None:
    """The looked up rows are partial; a later Concat in halves would cut them over the same ranks."""
    nodes = "x = Gather(e, index) r = Reshape(x, t) y = Mul(r, past_z)"
    inputs = "int64[6] index, float[8, 3] past_z"
    check(inputs, "float[8, 3] y", nodes, {"e": (9, 4), "t": ints(8, 3)})


def test_outer_product_of_a_split_vector_with_itself_is_refused() -> None:
    """Both dimensions would be split over the same ranks, which would hold a diagonal of blocks."""
    nodes = "a = Unsqueeze(past_x, zero) b = Unsqueeze(past_x, one) present_y = Mul(a, b)"
    weights = {"zero": ints(0), "one": ints(1)}
    prepared = prepare_proto(model("float[6] past_x", "float[6, 6] present_y", nodes, weights))
    with pytest.raises(InfeasibleError, match="split twice"):
        sweep(prepared, {leaf(prepared, "past_x", 0): (0,)})


def test_gram_matrix() -> None:
    nodes = "t = Transpose(past_x) g = MatMul(past_x, t) s = Softmax(g) y = MatMul(s, past_x)"
    check("float[6, 4] past_x", "float[6, 4] y", nodes, {})


def test_an_input_that_is_no_state_is_never_split() -> None:
    prepared = prepare_proto(model("float[4, 6] x", "float[4, 5] y", "y = MatMul(x, w)", {"w": (6, 5)}))
    with pytest.raises(InfeasibleError, match='input "x" would be split'):
        sweep(prepared, {leaf(prepared, "w", 0): (0,)})


def test_a_state_comes_out_as_it_went_in() -> None:
    """The present is gathered on its way: it could not be fed back."""
    nodes = "all = Concat<axis=1>(past_x, new) e = Softmax<axis=2>(all) present_x = Concat<axis=1>(past_x, new)"
    proto = model("float[batch, past, 6] past_x, float[batch, 1, 6] new", "float[batch, t, 6] present_x", nodes)
    prepared = prepare_proto(proto)
    assert [(pair.input.name, pair.output.name) for pair in prepared.states.pairs] == [("past_x", "present_x")]
    nodes = "g = GatherElements<axis=1>(past_x, i) present_x = Concat<axis=1>(past_x, new)"
    assert prove(proto).wrong == ()


def test_what_is_put_in_front_is_no_state() -> None:
    """Only a Concat whose first input is the cache appends to it."""
    nodes = "present_x = Concat<axis=1>(new, past_x)"
    proto = model("float[batch, past, 6] past_x, float[batch, 1, 6] new", "float[batch, t, 6] present_x", nodes)
    assert prepare_proto(proto).states.pairs == ()


def test_places_that_are_known_are_expanded_over_heads(tmp_path: Path) -> None:
    """Known integers of several dimensions are no sizes: what is one head on a rank is every head in the model."""
    nodes = """
        k0 = MatMul(x, wk) k1 = Reshape(k0, heads) k = Transpose<perm=[0, 2, 1, 3]>(k1) s = Shape(k)
        i = Expand(place, s) present_k = ScatterElements<axis=2>(past_k, i, k)
        r = ReduceSum<keepdims=0>(present_k, rows) f = Reshape(r, flat) y = MatMul(f, wo)
    """
    weights = {"wk": (64, 32), "wo": (32, 64), "place": np.full((1, 1, 1, 1), 3)}
    weights |= {"heads": ints(1, 1, 4, 8), "rows": ints(2), "flat": ints(1, 32)}
    inputs, outputs = "float[1, 1, 64] x, float[1, 4, 6, 8] past_k", "float[1, 64] y, float[1, 4, 6, 8] present_k"
    onnx.save(model(inputs, outputs, nodes, weights), tmp_path / "model.onnx")
    report = ArtifactBuilder(tmp_path / "model.onnx", tensor_parallel_size=4).build(tmp_path / "artifact")
    assert (report.faults, report.collectives) == ((), {"AllReduce": 1})


# -- dynamic dimensions --------------------------------------------------------------------------------------------


def test_gathering_a_dynamic_dimension_is_refused() -> None:
    """The order of what is gathered would be that of the probe's batch size."""
    output = "float[n, 5] y"
    proto = merged("y = Softmax<axis=0>(m)", f"float[batch, 4, 5] present_y, {output}")
    assert prove(proto).wrong == ()
    prepared = prepare_proto(proto)
    with pytest.raises(InfeasibleError, match="gathered along a dynamic dimension"):
        sweep(prepared, {leaf(prepared, "past_x", 1): (0,)})


def test_cutting_a_dynamic_dimension_is_refused() -> None:
    nodes = """
        s = Shape(past_x) b = Gather(s, i0) n = Mul(b, four) n0 = Squeeze(n) r = Range(zero, n0, one)
        f = Cast<to=1>(r) t = Concat<axis=0>(b, heads) g = Reshape(f, t) present_y = Add(past_x, g)
    """
    weights = {"i0": ints(0), "four": ints(4), "heads": ints(4), "zero": np.array(0), "one": np.array(1)}
    proto = model("float[batch, 4] past_x", "float[batch, 4] present_y", nodes, weights)
    assert prove(proto).wrong == ()


@pytest.mark.parametrize("end", ["end", "twenty"])
def test_slice_of_all_of_a_dynamic_dimension(end: str) -> None:
    """20 is all of it at the probe's batch of 5, and not at 6; the end of int32 is all of it at any size."""
    proto = merged(f"z = Slice(m, zero, {end}, zero)", "float[batch, 4, 5] present_y, float[n, 5] z")
    prepared = prepare_proto(proto)
    assignment = {leaf(prepared, "past_x", 1): (0,)}
    if end == "twenty":
        with pytest.raises(InfeasibleError, match="dynamic"):
            sweep(prepared, assignment)
        return
    with pytest.raises(InfeasibleError, match="gathered along a dynamic dimension"):
        sweep(prepared, assignment)  # because z is no state; what comes back out of it is one
    proto = merged(f"z = Slice(m, zero, {end}, zero) present_z = Reshape(z, back)",
                   "float[batch, 4, 5] present_y, float[batch, 4, 5] present_z")  # fmt: skip
    prepared = prepare_proto(proto)
    assignment = {leaf(prepared, "past_x", 1): (0,)}
    split = prepared.split(TWO, assignment, sweep(prepared, assignment))
    sizes = SizeSet(batch=6, sequence=4, past=6, encoder=6, others=(7,) * 8)
    assert prepared.greatest_error(split, sizes) < TOLERANCE


def test_dimensions_of_equal_size_by_chance_are_not_tied() -> None:
    """The batch is 5 at the first probe, as is the static dimension; at any other size they are not the same."""
    proto = model("float[batch, 5] past_x", "float[5, batch] y", "y = Reshape(past_x, t)", {"t": ints(5, -1)})
    prepared = prepare_proto(proto)
    assert "different sizes" in str(prepared.analysis.nodes[0].rule.note)
    assert prove(proto).wrong == ()


def test_zero_by_chance_is_not_zero() -> None:
    """batch - 5 is zero at the first probe: what is added to a partial sum must be zero at every size."""
    nodes = """
        s = Shape(past_x) b = Gather(s, i0) d = Sub(b, five) f = Cast<to=1>(d)
        p = MatMul(past_x, w) y = Add(p, f)
    """
    weights = {"w": (6, 4), "i0": ints(0), "five": ints(5)}
    check("float[batch, 6] past_x", "float[batch, 4] y", nodes, weights)


def test_shapes_of_ops_that_differ_in_an_attribute() -> None:
    """What ops do alike to equal inputs is inferred once."""
    nodes = "y = Transpose<perm=[0, 2, 1]>(past_x) z = Transpose<perm=[1, 0, 2]>(past_x)"
    proto = model("float[2, 3, 4] past_x", "float[2, 4, 3] y, float[3, 2, 4] z", nodes)
    facts = prepare_proto(proto).analysis.facts
    assert [facts[value].shape for value in facts if value.name in ("y", "z")] == [(2, 4, 3), (3, 2, 4)]


# -- padding that only looks like a weight's -----------------------------------------------------------------------


def test_padding_under_a_zero_point_is_not_zero() -> None:
    """Codes of zero are not zeros of the weight; a contraction over them takes what activations have there."""
    nodes = "w = DequantizeLinear(q, s, z) y = MatMul(past_x, w)"
    q = np.arange(-7, 8, dtype=np.int8).reshape(5, 3)
    weights = {"q": q, "s": np.array(0.1, np.float32), "z": np.array(3, np.int8)}
    prepared = prepare_proto(check("float[4, 5] past_x", "float[4, 3] y", nodes, weights))
    with pytest.raises(InfeasibleError, match="holds no zeros"):
        sweep(prepared, {leaf(prepared, "q", 0): (0,)})


def test_padding_of_indices_selects_row_0() -> None:
    nodes = "v = Gather(w, i) y = MatMul(past_x, v)"
    prepared = prepare_proto(
        check("float[4, 5] past_x", "float[4, 3] y", nodes, {"w": (9, 3), "i": ints(7, 2, 2, 8, 1)})
    )
    with pytest.raises(InfeasibleError, match="holds no zeros"):
        sweep(prepared, {leaf(prepared, "i", 0): (0,)})


def test_padding_of_what_is_cut_repeats_element_0() -> None:
    nodes = "r = Reshape(v, t) y = MatMul(past_x, r)"
    prepared = prepare_proto(check("float[2, 3] past_x", "float[2, 8] y", nodes, {"v": (4, 6), "t": ints(3, 8)}))
    with pytest.raises(InfeasibleError, match="holds no zeros"):
        sweep(prepared, {leaf(prepared, "past_x", 1): (0,)})


def test_padding_is_not_looked_up() -> None:
    """Where indices are computed, their padding may be anything, also out of range."""
    nodes = "i = Cast<to=7>(past_i) o = Add(i, nine) y = Gather<axis=0>(past_x, o)"
    weights = {"nine": np.full(3, 4)}
    prepared = prepare_proto(check("float[9, 4] past_x, float[3] past_i", "float[3, 4] y", nodes, weights))
    with pytest.raises(InfeasibleError, match="look up or divide by padding"):
        sweep(prepared, {leaf(prepared, "past_i", 0): (0,)})


def test_integers_are_not_divided_by_padding() -> None:
    nodes = "i = Cast<to=7>(past_i) j = Mul(i, i) k = Add(j, one) d = Div(seven, k) present_y = Cast<to=1>(d)"
    weights = {"one": np.array(1), "seven": np.full(3, 7)}
    proto = check("float[2, 3] past_i", "float[2, 3] present_y", nodes, weights)
    prepared = prepare_proto(proto)
    with pytest.raises(InfeasibleError, match="divide by padding"):
        sweep(prepared, {leaf(prepared, "past_i", 1): (0,)})


# -- ops -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("index", [-9, -1, 0, 8])
@pytest.mark.parametrize("parts", [2, 4])
def test_lookup_counts_from_both_ends(index: int, parts: int) -> None:
    prepared, found = look_up(index, parts)
    np.testing.assert_allclose(found, prepared.expected({"index": np.array([index])})["y"])


@pytest.mark.parametrize("index", [-(2**31), -19, -10, 9, 10, 11, 100, 2**31])
@pytest.mark.parametrize("parts", [2, 4])
def test_lookup_out_of_range_fails_as_before(index: int, parts: int) -> None:
    """9 rows over 4 ranks: 9 to 11 are padding of the last, and no rows of the table."""
    with pytest.raises(RuntimeError, match="indices element out of data bounds"):
        look_up(index, parts)


def look_up(index: int, parts: int) -> tuple[Prepared, np.ndarray[tuple[int, ...], np.dtype[np.float32]]]:
    prepared = prepare_proto(model("int64[1] index", "float[1, 3] y", "y = Gather(w, index)", {"w": (9, 3)}))
    mesh, assignment = Mesh((parts,)), {leaf(prepared, "w", 0): (0,)}
    split = prepared.split(mesh, assignment, sweep(prepared, assignment, mesh))
    return prepared, split.run(split.session(), {"index": np.array([index])})["y"][0]


def test_mean_of_integers_is_not_a_mean_of_means() -> None:
    nodes = "i = Cast<to=6>(past_x) m = ReduceMean(i, axes) y = Cast<to=1>(m)"
    prepared = prepare_proto(check("float[4, 6] past_x", "float[4, 1] y", nodes, {"axes": ints(1)}))
    assert [c.kind for c in sweep(prepared, {leaf(prepared, "past_x", 1): (0,)}).collectives] == ["AllGather"]


@pytest.mark.parametrize(
    ("source", "target", "passes"), [(10, 1, True), (16, 1, True), (16, 10, False), (1, 16, False)]
)
def test_partial_sums_pass_casts_that_lose_nothing(source: int, target: int, passes: bool) -> None:
    """bfloat16 and float16 have equally many bits, and neither holds the other."""
    nodes = f"w16 = Cast<to={source}>(w) x16 = Cast<to={source}>(past_x) p = MatMul(x16, w16) y = Cast<to={target}>(p)"
    name = {1: "float", 10: "float16", 16: "bfloat16"}[target]
    prepared = prepare_proto(model("float[4, 6] past_x", f"{name}[4, 3] y", nodes, {"w": (6, 3)}))
    outcome = sweep(prepared, {leaf(prepared, "w", 0): (0,)})
    assert [c.value.name for c in outcome.collectives] == ["y" if passes else "p"]


def test_an_op_without_a_rule_is_replicated_and_named() -> None:
    nodes = "h = MatMul(past_x, w) d = Det(h) y = Mul(h, d)"
    prepared = prepare_proto(check("float[3, 6] past_x", "float[3, 3] y", nodes, {"w": (6, 3)}))
    notes = [info.rule.note for info in prepared.analysis.nodes if info.rule.note]
    assert notes == ["no rule for ai.onnx::Det: replicated"]


def test_input_that_a_rule_does_not_speak_of_is_whole() -> None:
    """MoE has more inputs in newer versions than its rule knows."""
    nodes = "y = com.microsoft.MoE<k=2>(past_x, past_r, a, , b, , , , c)"
    weights = {"a": (4, 6, 8), "b": (4, 8, 6), "c": (4, 6, 8)}
    prepared = prepare_proto(model("float[3, 8] past_x, float[3, 4] past_r", "float[3, 8] y", nodes, weights))
    assert {port for port, _ in prepared.analysis.nodes[0].full_inputs} >= {8}


# -- values --------------------------------------------------------------------------------------------------------


def test_initializers_among_the_inputs() -> None:
    """Files of IR version 3 list them so."""
    proto = model("float[4, 6] past_x", "float[4, 5] y", "y = MatMul(past_x, w)", {"w": (6, 5)})
    proto.graph.input.append(helper.make_tensor_value_info("w", TensorProto.FLOAT, [6, 5]))
    assert prove(proto).wrong == ()
    assert [value.name for value in prepare_proto(proto).model.graph.inputs] == ["past_x"]


def test_initializers_among_the_outputs() -> None:
    proto = model("float[4, 6] past_x", "float[4, 5] y, float[6, 5] w", "y = MatMul(past_x, w)", {"w": (6, 5)})
    assert prove(proto).wrong == ()


def test_an_input_that_is_an_output_is_refused() -> None:
    """A program must write its outputs, and could not write this one under its name."""
    proto = model("float[4, 6] past_x, float[2] z", "float[4, 6] y, float[2] z", "y = Exp(past_x)")
    with pytest.raises(UnsupportedModelError, match=r'gives its input "z" back as an output.*remove it'):
        prove(proto)


def test_a_state_that_is_passed_through() -> None:
    proto = model("float[4, 6] past_x", "float[4, 6] present_x, float[4, 5] y",
                  "present_x = Identity(past_x) y = MatMul(past_x, w)", {"w": (6, 5)})  # fmt: skip
    assert prove(proto).wrong == ()


def test_one_value_under_two_output_names() -> None:
    """Every output keeps its name, though both are the same value."""
    nodes = "h = MatMul(past_x, w) y = Identity(h) z = Identity(h)"
    proto = model("float[4, 6] past_x", "float[4, 5] h, float[4, 5] y, float[4, 5] z", nodes, {"w": (6, 5)})
    prepared = prepare_proto(proto)
    assert [value.name for value in prepared.model.graph.outputs] == ["h", "y", "z"]
    assert prove(proto).wrong == ()


def test_an_output_that_is_also_read() -> None:
    """Whole outside, split for its reader; summed outside, and before its reader."""
    nodes = "h = MatMul(past_x, w) r = Relu(h) y = MatMul(r, v)"
    proto = check("float[4, 6] past_x", "float[4, 5] h, float[4, 3] y", nodes, {"w": (6, 5), "v": (5, 3)})
    prepared = prepare_proto(proto)
    outcome = sweep(prepared, {leaf(prepared, "w", 1): (0,)})
    assert [(c.kind, c.value.name) for c in outcome.collectives] == [("AllGather", "h"), ("AllReduce", "y")]


def test_one_weight_under_two_layouts() -> None:
    """Split for one reader, whole for the other."""
    nodes = "p = MatMul(past_x, w) s = Softmax<axis=0>(w) y = MatMul(past_x, s)"
    proto = check("float[4, 6] past_x", "float[4, 5] p, float[4, 5] y", nodes, {"w": (6, 5)})
    prepared = prepare_proto(proto)
    split = prepared.split(TWO, {leaf(prepared, "w", 0): (0,)}, sweep(prepared, {leaf(prepared, "w", 0): (0,)}))
    assert sorted(list(t.dims) for t in split.program.graph.initializer if t.name.startswith("w")) == [[3, 5], [6, 5]]


def test_tensors_without_elements() -> None:
    nodes = "c = Concat<axis=0>(past_x, none) e = Reshape(none, t) f = Concat<axis=1>(e, e) y = MatMul(c, w)"
    weights = {"none": np.zeros((0, 6), np.float32), "t": ints(0, 6), "w": (6, 5)}
    proto = model("float[4, 6] past_x", "float[4, 5] y, float[0, 12] f", nodes, weights)
    assert prove(proto).wrong == ()


def test_scalar_inputs() -> None:
    nodes = "p = MatMul(past_x, w) y = Mul(p, factor)"
    check("float[4, 6] past_x, float factor", "float[4, 5] y", nodes, {"w": (6, 5)})


def test_doubles() -> None:
    weights = {"w": random(6, 5).astype(np.float64), "b": random(5).astype(np.float64)}
    check("double[4, 6] past_x", "double[4, 5] y", "p = MatMul(past_x, w) y = Add(p, b)", weights)


def test_bfloat16_weights() -> None:
    nodes = "w = Cast<to=1>(w16) y = MatMul(past_x, w)"
    proto = model("float[4, 6] past_x", "float[4, 5] y", nodes)
    proto.graph.initializer.append(numpy_helper.from_array(random(6, 5).astype(ml_dtypes.bfloat16), "w16"))
    assert prove(proto).wrong == ()
    assert prove(proto).plans > 0


# -- functions and branches ----------------------------------------------------------------------------------------


def test_functions_are_inlined() -> None:
    text = """
        <ir_version: 10, opset_import: ["": 21, "mine": 1]>
        g (float[4, 6] past_x, float[6, 5] past_w) => (float[4, 5] y) { y = mine.layer(past_x, past_w) }
        <opset_import: ["": 21], domain: "mine"> layer (x, w) => (y) { p = MatMul(x, w) y = Relu(p) }
    """
    assert prove(onnx.parser.parse_model(text)).wrong == ()


def branch(name: str, factor: float) -> onnx.GraphProto:
    weight = numpy_helper.from_array(np.array(factor, np.float32), "factor")
    node = helper.make_node("Mul", ["h", "factor"], [f"{name}_out"], name=f"{name}_mul")
    output = helper.make_tensor_value_info(f"{name}_out", TensorProto.FLOAT, None)
    return helper.make_graph([node], name, [], [output], [weight])


@pytest.mark.parametrize("as_node", [False, True])
def test_branches_of_a_constant_condition(as_node: bool) -> None:
    """Two Ifs whose branches use one name for different constants, and a branch that gives an outer value."""
    proto = model("float[4, 6] past_x", "float[4, 6] y", "h = Exp(past_x) y = Identity(h)")
    del proto.graph.node[1:]
    condition = numpy_helper.from_array(np.array(True), "yes")
    if as_node:
        proto.graph.node.insert(0, helper.make_node("Constant", [], ["yes"], value=condition))
    else:
        proto.graph.initializer.append(condition)
    outer = helper.make_graph([helper.make_node("Identity", ["h"], ["same"])], "outer", [],
                              [helper.make_tensor_value_info("same", TensorProto.FLOAT, None)])  # fmt: skip
    for number, (taken, other) in enumerate([(branch("a", 2), branch("b", 3)), (branch("c", 5), branch("d", 7))]):
        proto.graph.node.append(
            helper.make_node("If", ["yes"], [f"part{number}"], then_branch=taken, else_branch=other)
        )
    proto.graph.node.append(helper.make_node("If", ["yes"], ["part2"], then_branch=outer, else_branch=branch("e", 11)))
    proto.graph.node.append(helper.make_node("Sum", ["part0", "part1", "part2"], ["y"]))
    prepared = prepare_proto(proto)
    assert all(node.op_type != "If" for node in prepared.model.graph)
    split = prepared.split(
        TWO, {leaf(prepared, "past_x", 1): (0,)}, sweep(prepared, {leaf(prepared, "past_x", 1): (0,)})
    )
    result = split.run(split.session(), {"past_x": np.zeros((4, 6), np.float32)})["y"]
    np.testing.assert_allclose(result, 8)  # 2 + 5 + 1


def test_an_if_that_reads_what_another_one_gives() -> None:
    """Both branches of each are computed, in one pass over the graph."""
    assert prove(growing.open_branches(3)).wrong == ()


# -- folded sizes ----------------------------------------------------------------------------------------------------


def window(length: int) -> onnx.ModelProto:
    """The last positions of a cache, as many as a window holds, and the size of that computed in the graph."""
    nodes = """
        all = Concat<axis=1>(past_k, new) cut = Slice(all, start, end, axis)
        s = Shape(cut) n = Gather(s, one) r = Concat<axis=0>(n, minus) y = Reshape(cut, r)
        f = Mul(n, n) present_k = Identity(all)
    """
    weights = {"start": ints(-length), "end": ints(2**31 - 1), "axis": ints(1), "one": ints(1), "minus": ints(-1)}
    inputs = "float[1, past, 6] past_k, float[1, sequence, 6] new"
    outputs = "float[t, u] y, float[1, total, 6] present_k, int64[1] f"
    return model(inputs, outputs, nodes, weights)


@pytest.mark.parametrize("length", [3, 8, 16, 1024])
@pytest.mark.parametrize(("sequence", "past"), [(1, 1), (2, 3), (4, 6), (9, 20)])
def test_sizes_that_a_window_bounds_are_not_constant(length: int, sequence: int, past: int) -> None:
    """Longer contexts than the window all give one size; shorter ones do not."""
    prepared = prepare_proto(window(length), simplified=True)
    sizes = SizeSet(batch=1, sequence=sequence, past=past, encoder=6, others=(sequence,) * 8)
    split = prepared.split(TWO, {}, sweep(prepared, {}))
    assert prepared.greatest_error(split, sizes) == 0


def test_a_collective_of_what_weights_alone_give(tmp_path: Path) -> None:
    """The sum does not depend on any input; its type and shape must be known all the same."""
    nodes = "c = MatMul(w, v) m = MatMul(x, c) y = Softmax(m)"
    proto = model("float[n, 64] x", "float[n, 64] y", nodes, {"w": (64, 2048), "v": (2048, 64)})
    onnx.save(proto, tmp_path / "model.onnx")
    report = ArtifactBuilder(tmp_path / "model.onnx").build(tmp_path / "artifact")
    assert report.collectives == {"AllReduce": 1}
    artifact = open_artifact(tmp_path / "artifact", full=True)
    assert [(c.id, c.shape) for c in artifact.manifest.collectives] == [("c/AllReduce", (64, 64))]
    x = random(3, 64)
    with Executor(artifact, threads=1) as executor:
        np.testing.assert_allclose(executor.run({"x": x})["y"], session(proto).run(None, {"x": x})[0], atol=1e-4)


def test_sizes_beyond_int64_are_left_to_the_graph() -> None:
    """Shape arithmetic that overflows is not folded: the unsplit model wraps around, and so does the split one."""
    powers = " ".join(f"s{i + 1} = Mul(s{i}, thousand)" for i in range(20))
    nodes = f"s0 = Shape(x) {powers} y = Cast<to = 1>(s20)"
    proto = model("float[batch, 4] x", "float[2] y", nodes, {"thousand": np.array([1000])})
    prepared = prepare_proto(proto, simplified=True)
    assert len(prepared.model.graph) > 1
    assert error_of(prepared, {}) < TOLERANCE


def test_an_operand_of_another_rank_is_the_models_mistake(zoo: Path, tmp_path: Path) -> None:
    proto = onnx.load(zoo / "tiny-llama-genai-int4-qdq" / "model.onnx", load_external_data=False)
    node = next(node for node in proto.graph.node if node.op_type == "DequantizeLinear")
    (scales,) = (t for t in proto.graph.initializer if t.name == node.input[1])
    scales.dims.append(1)
    onnx.save(proto, tmp_path / "model.onnx")
    with pytest.raises(ShapeError, match=rf'"{scales.name}" has the shape .*, expected 2 dimensions'):
        plan_model(tmp_path / "model.onnx")


def test_a_folded_size_may_be_an_output() -> None:
    powers = " ".join(f"s{i + 1} = Mul(s{i}, one)" for i in range(20))
    nodes = f"s0 = Shape(x) {powers} y = Cast<to = 1>(s20)"
    prepared = prepare_proto(
        model("float[batch, 4] x", "float[2] y, int64[2] s20", nodes, {"one": np.array([1])}), simplified=True
    )
    assert error_of(prepared, {}) < TOLERANCE


def test_too_few_factors_of_a_resize(tmp_path: Path) -> None:
    nodes = 'y = Resize<mode = "nearest">(x, , factors)'
    proto = model("float[2, 3, 8, 8] x", "float[a, b, c, d] y", nodes, {"factors": np.array([2.0], dtype=np.float32)})
    onnx.save(proto, tmp_path / "model.onnx")
    with pytest.raises(ShapeError, match=r'Resize "" does not fit its inputs'):
        plan_model(tmp_path / "model.onnx")


def test_an_attribute_of_another_type(zoo: Path, tmp_path: Path) -> None:
    proto = onnx.load(zoo / "tiny-llama-genai-fp32" / "model.onnx", load_external_data=False)
    node = next(node for node in proto.graph.node if node.op_type == "SkipSimplifiedLayerNormalization")
    (epsilon,) = (a for a in node.attribute if a.name == "epsilon")
    epsilon.CopyFrom(helper.make_attribute("epsilon", [1e-5, 1e-5]))
    onnx.save(proto, tmp_path / "model.onnx")
    with pytest.raises(ShapeError, match="SkipSimplifiedLayerNormalization does not take"):
        plan_model(tmp_path / "model.onnx")


@pytest.mark.parametrize(("size", "pairs"), [("2", 0), ("past", 1)])
def test_what_never_grows_is_no_state_from_step_to_step(size: str, pairs: int) -> None:
    proto = model(
        f"float[{size}, 8] past_x, float[sequence, 8] x",
        "float[total, 8] present_y",
        "present_y = Concat<axis = 0>(past_x, x)",
    )
    assert len(prepare_proto(proto).states.pairs) == pairs
