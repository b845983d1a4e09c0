"""Branches, loops and functions, end to end: build for 4 ranks, load, run, and compare with the unsplit model."""

from __future__ import annotations

import collections
import itertools
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from furiosa_llm.builder import ArtifactBuilder, BuildReport, UnsupportedModelError
from furiosa_llm.builder.rewrite.polynomial import Polynomial
from furiosa_llm.runtime.artifact.reader import open_artifact
from furiosa_llm.runtime.execution.executor import Executor
from tests.support.builder import branching
from tests.support.builder.branching import AFTER, BEFORE, HEAD, LOGITS, WEIGHTS
from tests.support.builder.graphs import model, random
from tests.support.builder.proofs import prove
from tests.support.builder.stitching import Array, session

TOLERANCE = 1e-5
SPLIT = {"on_an_input", "on_a_constant_size", "on_a_size", "on_a_size_that_folds", "on_elements", "nested", "functions"}
"""Models whose branches can be inlined: all their matrices are split."""


def feeds_of(proto: onnx.ModelProto, batch: int, rng: np.random.Generator) -> list[dict[str, Array]]:
    """Inputs, once for each choice of the boolean ones."""
    names = [v.name for v in proto.graph.input if v.type.tensor_type.elem_type == TensorProto.BOOL]
    found = []
    for booleans in itertools.product([False, True], repeat=len(names)):
        feeds: dict[str, Array] = {name: np.array(value) for name, value in zip(names, booleans, strict=True)}
        feeds["input_ids"] = rng.integers(0, 1001, (batch, 5))
        if any(value.name == "index" for value in proto.graph.input):
            feeds["index"] = np.array(3 if feeds["condition"] else 99)
        found.append(feeds)
    return found


def build_and_compare(proto: onnx.ModelProto, folder: Path) -> tuple[BuildReport, onnx.ModelProto]:
    """Build for 4 ranks, run on them at two batch sizes, and compare; returns the report and the program."""
    (folder / "model").mkdir()
    onnx.save(proto, folder / "model" / "model.onnx")
    report = ArtifactBuilder(folder / "model" / "model.onnx").build(folder / "artifact")
    artifact = open_artifact(folder / "artifact", full=True)
    reference, rng = session(proto), np.random.default_rng(0)
    names = [value.name for value in reference.get_outputs()]
    with Executor(artifact, threads=2, exact=True) as executor:
        for feeds in (*feeds_of(proto, 1, rng), *feeds_of(proto, 3, rng)):
            wanted = {value.name for value in reference.get_inputs()}
            expected = reference.run(names, {name: array for name, array in feeds.items() if name in wanted})
            found = executor.run(feeds)
            for name, array in zip(names, expected, strict=True):
                assert np.std(array) > 1e-3, name
                np.testing.assert_allclose(found[name], array, rtol=0, atol=TOLERANCE * np.abs(array).max())
    return report, artifact.program


@pytest.mark.parametrize("name", list(branching.MODELS))
def test_split_model_gives_the_unsplit_models_results(name: str, tmp_path: Path) -> None:
    report, program = build_and_compare(branching.models()[name], tmp_path)
    kinds = collections.Counter(node.op_type for node in program.graph.node)
    inlined = not kinds.keys() & {"If", "Loop", "Scan"}
    assert inlined == (name in SPLIT)
    assert any("replicated" in note for note in report.notes) != inlined
    if inlined:
        assert report.collectives == {"AllReduce": 2, "AllGather": 1}
        shapes = {tensor.name: tensor.local_shape for tensor in open_artifact(tmp_path / "artifact").manifest.tensors}
        assert (shapes["up"], shapes["down"]) == ((32, 128), (128, 32))
    onnx.checker.check_model(without_collectives(program), full_check=False)


def without_collectives(program: onnx.ModelProto) -> onnx.ModelProto:
    """A copy that the checker understands: it knows no collectives, nor data that lies in an artifact."""
    plain = onnx.ModelProto()
    plain.CopyFrom(program)
    for node in plain.graph.node:
        if node.domain == "furiosa_llm":
            node.domain, node.op_type = "", "Identity"
            del node.attribute[:]
    for tensor in plain.graph.initializer:
        if tensor.data_location == TensorProto.EXTERNAL:
            tensor.data_location = TensorProto.DEFAULT
            del tensor.external_data[:]
            tensor.raw_data = np.zeros(tensor.dims, helper.tensor_dtype_to_np_dtype(tensor.data_type)).tobytes()
    return plain


@pytest.mark.parametrize("name", ["on_an_input", "nested_in_a_loop", "with_a_lookup"])
def test_every_feasible_plan_is_right(name: str) -> None:
    """Around a replicated node, too, whatever is split: what it reads is gathered, and its weights are whole."""
    proof = prove(branching.models()[name])
    assert proof.wrong == ()
    assert proof.plans > 0


def test_weights_in_a_body_are_stored_once(tmp_path: Path) -> None:
    report, program = build_and_compare(branching.loop(), tmp_path)
    body = next(node for node in program.graph.node if node.op_type == "Loop").attribute[0].g
    assert not body.initializer
    stored = [tensor for tensor in open_artifact(tmp_path / "artifact").manifest.tensors if tensor.name == "mix"]
    assert [tensor.local_shape for tensor in stored] == [(512, 512)]
    assert "Loop: replicated, with all that it reads (1 nodes)" in report.notes


def test_weights_of_a_branch_become_the_programs(tmp_path: Path) -> None:
    """Initializers inside of branches, under one name in both."""
    proto = branching.with_a_lookup()
    node = next(node for node in proto.graph.node if node.op_type == "If")
    for number, attribute in enumerate(node.attribute):
        attribute.g.initializer.append(onnx.numpy_helper.from_array(random(512, seed=number), "scale"))
        last = attribute.g.node[-1]
        attribute.g.node.add(op_type="Mul", input=[last.output[0], "scale"], output=["scaled"])
        attribute.g.output[0].name = "scaled"
    build_and_compare(proto, tmp_path)


def test_a_weight_of_one_branch_may_have_the_name_of_a_value_in_the_other(tmp_path: Path) -> None:
    """Both lie in one closure, which passes the weight to either branch."""
    proto = branching.with_a_lookup()
    then, other = (a.g for a in next(node for node in proto.graph.node if node.op_type == "If").attribute)
    then.initializer.append(onnx.numpy_helper.from_array(random(512), "scale"))
    then.node.add(op_type="Mul", input=[then.output[0].name, "scale"], output=["scaled"])
    then.output[0].name = "scaled"
    other.node.add(op_type="Neg", input=[other.output[0].name], output=["scale"])
    other.output[0].name = "scale"
    build_and_compare(proto, tmp_path)


def test_weights_of_a_branch_may_be_external(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    proto = branching.with_a_lookup()
    graph = next(node for node in proto.graph.node if node.op_type == "If").attribute[1].g
    data = random(512)
    (tmp_path / "source" / "scale.data").write_bytes(data.tobytes())
    tensor = graph.initializer.add(name="scale", data_type=TensorProto.FLOAT, dims=[512])
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="scale.data")
    graph.node.add(op_type="Mul", input=["q", "scale"], output=["scaled"])
    graph.output[0].name = "scaled"
    (tmp_path / "source" / "model.onnx").write_bytes(proto.SerializeToString())
    ArtifactBuilder(tmp_path / "source" / "model.onnx").build(tmp_path / "artifact")
    original = onnx.load(tmp_path / "artifact" / "source.onnx", load_external_data=False)
    kept = next(node for node in original.graph.node if node.op_type == "If").attribute[1].g.initializer[0]
    np.testing.assert_array_equal(onnx.numpy_helper.to_array(kept), data)


def size(**terms: int) -> Polynomial:
    """A polynomial in sizes: `one` is the number, the others are names."""
    return Polynomial.of({() if name == "one" else (name,): factor for name, factor in terms.items()})


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        (size(one=3), size(one=2), True),
        (size(one=2), size(one=2), False),
        (size(one=2), size(one=3), False),
        (size(n=2, one=1), size(n=1), True),
        (size(n=1), size(n=1, one=1), False),
        (size(n=2), size(n=1), None),
        (size(n=1), size(n=2), False),
        (size(n=1), size(one=1), None),
        (size(n=1), size(past=1), None),
    ],
)
def test_what_is_known_of_two_sizes(first: Polynomial, second: Polynomial, expected: bool | None) -> None:
    """Whether the first is greater, for any sizes of 0 or more."""
    assert first.exceeds(second) is expected


def test_branches_that_sizes_decide_are_inlined(tmp_path: Path) -> None:
    """sequence + 1 < sequence never holds; not (sequence + 1 <= sequence) always does."""
    one = "one = Constant<value_int=1>() shape = Shape(input_ids) n = Gather(shape, one) m = Add(n, one)"
    for number, nodes in enumerate(("condition = Less(m, n)", "c = LessOrEqual(m, n) condition = Not(c)")):
        folder = tmp_path / str(number)
        folder.mkdir()
        report, program = build_and_compare(branching.layer(f"{one} {nodes}"), folder)
        kinds = {node.op_type for node in program.graph.node}
        assert "Relu" in kinds if number == 0 else "Sigmoid" in kinds
        assert not kinds & {"If", "Relu" if number else "Sigmoid"}
        assert report.notes == ()


# -- what is refused -----------------------------------------------------------------------------------------------


def branches(then: str, other: str, condition: str = "condition", extra: str = "") -> onnx.ModelProto:
    nodes = f"""
        {BEFORE} {extra} b = If({condition}) <then_branch = t () => (float r) {{ {then} }},
                                             else_branch = e () => (float q) {{ {other} }}>
        a = Mul(u, b) {AFTER}
    """
    return model(f"{HEAD}, bool condition, int64 n", LOGITS, nodes, {**WEIGHTS, "ax": np.array([2])})


def body(text: str, trips: str = "three", outputs: str = "", results: str = "") -> onnx.ModelProto:
    nodes = f"""
        {BEFORE} three = Constant<value_int=3>() yes = Constant<value = bool {{1}}>()
        a {outputs} = Loop({trips}, yes, u) <body = b (int64 i, bool c, float s) => (bool again, float next {results})
            {{ {text} }}> {AFTER}
    """
    return model(f"{HEAD}, int64 n", LOGITS, nodes, WEIGHTS)


ONE = "one = Constant<value_int=1>() z = Constant<value_int=0>() shape = Shape(input_ids) k = Gather(shape, z)"
REFUSED = {
    "shapes": (branches("r = Relu(u)", "q = ReduceMax(u, ax)"),
               ("[batch, sequence, 512] and FLOAT[batch, sequence, 1]", "the same type and shape", "separate models")),
    "types": (branches("r = Relu(u)", "q = Cast<to=11>(u)"),
              ("FLOAT[batch, sequence, 512] and DOUBLE[batch, sequence, 512]",)),
    "shapes that a size decides": (
        branches("r = Relu(u)", "q = ReduceMax(u, ax)", "many", f"{ONE} many = Greater(k, one)"),
        ("[batch, sequence, 1]", "separate models"),
    ),
    "carried shapes": (body("again = Identity(c) next = Concat<axis=1>(s, s)"),
                       ("goes in as FLOAT[batch, sequence, 512] and comes out as FLOAT[batch, sequence*2, 512]",
                        "unrolled")),
    "unknown trips": (body("again = Identity(c) next = Relu(s) t = Neg(s)", "n", ", all", ", float t"),
                      ("how many there are depends on the inputs' elements", "unrolled")),
    "an early end": (body("m = ReduceMax<keepdims=0>(s) again = Less(m, half) next = Relu(s) t = Neg(s)", "three",
                          ", all", ", float t"), ("how many there are depends",)),
    "random numbers": (body("again = Identity(c) next = RandomNormalLike(s)"), ("RandomNormalLike", "random numbers")),
}  # fmt: skip


@pytest.mark.parametrize("name", list(REFUSED))
def test_refused(name: str, tmp_path: Path) -> None:
    proto, parts = REFUSED[name]
    onnx.save(proto, tmp_path / "model.onnx")
    with pytest.raises(UnsupportedModelError) as caught:
        ArtifactBuilder(tmp_path / "model.onnx").build(tmp_path / "artifact")
    for part in parts:
        assert part in str(caught.value)
    assert not (tmp_path / "artifact").exists()


def test_function_whose_op_has_changed_since(tmp_path: Path) -> None:
    proto = branching.functions()
    next(f for f in proto.functions if f.name == "Leaky").opset_import[0].version = 7
    next(f for f in proto.functions if f.name == "Leaky").node[0].op_type = "Relu"
    next(f for f in proto.functions if f.name == "Leaky").node[0].ClearField("attribute")
    onnx.save(proto, tmp_path / "model.onnx")
    with pytest.raises(UnsupportedModelError, match=r"Leaky uses Relu of ai.onnx opset 7, the model's opset is 21"):
        ArtifactBuilder(tmp_path / "model.onnx").build(tmp_path / "artifact")


def doubling(levels: int) -> onnx.ModelProto:
    """Functions that each call the next one twice."""
    proto = model("float[n, 4] x", "float[n, 4] y", "y = local.f0(x)")
    proto.opset_import.add(domain="local", version=1)
    for level in range(levels):
        function = proto.functions.add(name=f"f{level}", domain="local", input=["x"], output=["y"])
        function.opset_import.add(domain="", version=21)
        function.opset_import.add(domain="local", version=1)
        last = level + 1 == levels
        op, domain = ("Neg", "") if last else (f"f{level + 1}", "local")
        function.node.add(op_type=op, domain=domain, input=["x"], output=["h"])
        function.node.add(op_type=op, domain=domain, input=["h"], output=["y"])
    return proto


def test_functions_that_double_are_refused_before_they_fill_memory(tmp_path: Path) -> None:
    onnx.save(doubling(40), tmp_path / "model.onnx")
    with pytest.raises(UnsupportedModelError, match=r"has \d{13} nodes in functions once these are inlined"):
        ArtifactBuilder(tmp_path / "model.onnx").build(tmp_path / "artifact")
    onnx.save(doubling(3), tmp_path / "model.onnx")
    assert ArtifactBuilder(tmp_path / "model.onnx").build(tmp_path / "artifact").num_nodes == 8
