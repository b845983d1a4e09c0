"""The checker of annotations on odd models: absurd numbers, damage, branches, packed tensors, unknown operators."""

from __future__ import annotations

import contextlib
import random

import numpy as np
import onnx
import pytest

from furiosa_llm.builder.errors import AnnotationError
from furiosa_llm.builder.plan.annotations import check_sharding, read_constraints
from tests.support.builder.graphs import model
from tests.support.builder.sharding_specs import EACH, HERE, PAIRS, entry, node, put, sound_model, spec_of


@pytest.fixture
def sound() -> onnx.ModelProto:
    return sound_model()


def test_absurd_numbers_are_reported_at_once(sound: onnx.ModelProto) -> None:
    put(sound, "up", "W1", {1: 2**60, 2**60: 2}, EACH)
    entry(sound, "up").pipeline_stage = 2**31 - 1
    what = " ".join(finding.what for finding in check_sharding(sound, HERE))
    assert "128 on axis 1 is not divisible" in what
    assert f"axis {2**60} is out of range" in what
    assert f"{2**61} shards, but the device list has 4 entries" in what
    assert "no node of configuration" in what


def test_a_model_that_cannot_be_analysed_is_checked_as_far_as_it_declares_shapes(sound: onnx.ModelProto) -> None:
    node(sound, "soft").input[0] = "nowhere"
    spec_of(sound, "soft", "z").tensor_name = "nowhere"
    put(sound, "up", "W1", {5: 4}, EACH)
    found = check_sharding(sound, HERE)
    assert any(f.node == 'MatMul "up"' and "axis 5 is out of range" in f.what for f in found)
    assert any(f.node == 'Softmax "soft"' and "shape is not known" in f.what for f in found)
    assert any(f.severity == "warning" and 'reads "nowhere"' in f.what for f in found)


def test_nodes_in_branches_are_checked_too(sound: onnx.ModelProto) -> None:
    branch = onnx.parser.parse_graph("g () => (float[2] b) { [inner] b = Identity(W1) }")
    branch.node[0].device_configurations.add(configuration_id="none", pipeline_stage=0)
    chosen = onnx.helper.make_node("If", ["c"], ["o"], name="if", then_branch=branch, else_branch=branch)
    sound.graph.node.append(chosen)
    sound.graph.input.append(onnx.helper.make_tensor_value_info("c", onnx.TensorProto.BOOL, []))
    unknown = [f for f in check_sharding(sound, HERE) if '"none" is not a configuration' in f.what]
    assert [f.node for f in unknown] == ['Identity "inner"'] * 2


def test_branches_that_are_settled_in_a_build_are_settled_here_too(sound: onnx.ModelProto) -> None:
    declared = "(float[2, 6, 64] z2)"
    taken = onnx.parser.parse_graph(f"g () => {declared} {{ z2 = Identity(z) }}")
    other = onnx.parser.parse_graph("g () => (float[2] z3) { z3 = ReduceSum<keepdims = 0>(z, last) }")
    extra = onnx.parser.parse_graph("g () => (bool c) { s = Shape(x) n = Size(s) c = Equal(n, three) }")
    chosen = onnx.helper.make_node("If", ["c"], ["chosen"], name="if", then_branch=taken, else_branch=other)
    place = [n.name for n in sound.graph.node].index("soft")
    for added in reversed([*extra.node, chosen]):
        sound.graph.node.insert(place, added)
    for name, array in (("three", np.array(3)), ("last", np.array([1, 2]))):
        sound.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    node(sound, "soft").input[0] = "chosen"
    spec_of(sound, "soft", "z").tensor_name = "chosen"
    assert check_sharding(sound, HERE) == []


def test_packed_projections_are_warned_of() -> None:
    proto = model(
        "float[2, 6, 16] x",
        "float[2, 6, 32] out",
        "[qkv] h = MatMul(x, W)\n[cut] a, b = Split<axis = -1>(h, sizes)\n[mul] out = Mul(a, b)",
        {"W": (16, 64), "sizes": np.array([32, 32])},
        ir_version=11,
    )
    proto.configuration.add(name="four", num_devices=4)
    node(proto, "qkv").device_configurations.add(configuration_id="four")
    put(proto, "qkv", "W", {1: 4}, EACH)
    found = check_sharding(proto, HERE)
    assert [(f.severity, f.node, f.tensor) for f in found] == [("warning", 'MatMul "qkv"', "W")]
    assert "packed of several parts" in found[0].what


def test_halves_of_heads_are_warned_of() -> None:
    """Heads of two halves that are cut apart: 8 shards of 4 heads give every device one half."""
    proto = model(
        "float[2, 6, 16] x",
        "float[2, 6, 4, 8] out",
        "[q] h = MatMul(x, W)\n[view] v = Reshape(h, shape)\n[cut] a, b = Split<axis = -1>(v, sizes)\n"
        "[mul] out = Mul(a, b)",
        {"W": (16, 64), "shape": np.array([2, 6, 4, 16]), "sizes": np.array([8, 8])},
        ir_version=11,
    )
    proto.configuration.add(name="eight", num_devices=8)
    node(proto, "q").device_configurations.add(configuration_id="eight")
    put(proto, "q", "W", {1: 8}, range(8))
    assert [f.what.split(" (")[0] for f in check_sharding(proto, HERE)] == ["axis 1 is packed of several parts"]
    put(proto, "q", "W", {1: 4}, ((0, 1), (2, 3), (4, 5), (6, 7)))
    assert check_sharding(proto, HERE) == []


def test_a_packed_input_may_be_whole_beside_split_caches() -> None:
    """No spec can say how it is split, so that it is left whole, and the operator takes its part."""
    proto = model(
        "float[1, 6, 64] qkv, float[1, 2, 4, 8] k, float[1, 2, 4, 8] v, int32[1, 1] s, int32 t",
        "float[1, 6, 32] out, float[1, 2, 10, 8] ko, float[1, 2, 10, 8] vo",
        "[attend] out, ko, vo = com.microsoft.GroupQueryAttention<num_heads = 4, kv_num_heads = 2>"
        "(qkv, , , k, v, s, t)",
        ir_version=11,
    )
    proto.configuration.add(name="two", num_devices=2)
    node(proto, "attend").device_configurations.add(configuration_id="two")
    put(proto, "attend", "qkv", {}, ((0, 1),))
    for cache in ("k", "v", "ko", "vo"):
        put(proto, "attend", cache, {1: 2}, (0, 1))
    assert check_sharding(proto, HERE) == []
    put(proto, "attend", "v", {}, ((0, 1),))
    assert [f.tensor for f in check_sharding(proto, HERE)] == ["v"]


def test_units_that_an_operator_works_on_are_not_split() -> None:
    proto = model(
        "float[1, 6, 32] q, float[1, 6, 16] k, float[1, 6, 16] v, int32[1, 1] s, int32 t",
        "float[1, 6, 32] out",
        "[attend] out = com.microsoft.GroupQueryAttention<num_heads = 4, kv_num_heads = 2>(q, k, v, , , s, t)",
        ir_version=11,
    )
    proto.configuration.add(name="eight", num_devices=8)
    node(proto, "attend").device_configurations.add(configuration_id="eight")
    put(proto, "attend", "q", {2: 8}, range(8))
    found = check_sharding(proto, HERE)
    assert [(f.severity, f.node, f.tensor) for f in found] == [("error", 'GroupQueryAttention "attend"', "q")]
    assert "inside units of 8" in found[0].what
    assert "at most 4 shards" in found[0].remedy


def test_an_operator_without_a_rule_is_a_warning() -> None:
    proto = model("float[8, 8] x", "float[8, 8] out", "[strange] out = com.example.Strange(x)", ir_version=11)
    proto.opset_import.add(domain="com.example", version=1)
    proto.configuration.add(name="four", num_devices=4)
    node(proto, "strange").device_configurations.add(configuration_id="four")
    put(proto, "strange", "x", {0: 4}, EACH)
    assert {f.severity for f in check_sharding(proto, HERE)} == {"warning"}


NUMBERS = (-(2**31), -5, -3, -1, 0, 1, 2, 3, 4, 7, 64, 2**31 - 1)
NAMES = ("x", "W1", "h", "r", "W2", "y", "z", "p", "q", "shape", "", "nowhere")


def damage(proto: onnx.ModelProto, rng: random.Random) -> None:
    """Change something about the annotations of a random node."""
    damaged = rng.choice(list(proto.graph.node))
    annotation = rng.choice(list(damaged.device_configurations))
    chosen = rng.choice(list(annotation.sharding_spec) or [annotation.sharding_spec.add()])
    match rng.randrange(9):
        case 0:
            annotation.pipeline_stage = rng.choice(NUMBERS)
        case 1:
            chosen.tensor_name = rng.choice(NAMES)
        case 2:
            chosen.device.append(rng.choice(NUMBERS))
        case 3:
            del chosen.device[:]
        case 4:
            chosen.index_to_device_group_map.add(key=rng.choice((-1, -2, 0)), value=[rng.randrange(6)])
        case 5:
            dim = chosen.sharded_dim.add(axis=rng.choice(NUMBERS))
            dim.simple_sharding.add(num_shards=rng.choice(NUMBERS), dim_value=rng.choice(NUMBERS))
        case 6:
            damaged.device_configurations.add(configuration_id=rng.choice(("four", "", "other")))
        case 7:
            proto.configuration[0].num_devices = rng.choice(NUMBERS)
        case 8:
            devices = rng.choice((EACH, PAIRS, (3, 1, 2, 0)))
            put(proto, damaged.name, rng.choice(NAMES), {rng.randrange(-3, 3): len(devices)}, devices)


@pytest.mark.parametrize("seed", range(40))
def test_random_damage_is_reported_and_never_a_crash(sound: onnx.ModelProto, seed: int) -> None:
    rng = random.Random(seed)
    entry(sound, "up").sharding_spec.remove(spec_of(sound, "up", "h"))  # counted from the back, which is refused
    assert read_constraints(sound, 4)
    for _ in range(rng.choice((1, 3))):
        damage(sound, rng)
    findings = check_sharding(sound, HERE)
    assert all(finding.what and finding.remedy for finding in findings)
    with contextlib.suppress(AnnotationError):  # nothing else may come of it
        read_constraints(sound, 4)
