"""The checker of annotations: every kind of fault is reported once, with the node, the tensor and a remedy."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest

from furiosa_llm.builder.annotations import check_sharding
from tests.builder.graphs import model

HERE = Path("handmade.onnx")

Axes = Mapping[int, int | Sequence[tuple[int, int]]]
"""Axis -> number of shards, or (dim_value, num_shards) of each component."""
Devices = Sequence[int] | Sequence[Sequence[int]]
"""A device for each shard, or a group of devices."""

ALL = ((0, 1, 2, 3),)
EACH = (0, 1, 2, 3)
PAIRS = ((0, 1), (2, 3))


def spec(tensor: str, axes: Axes, devices: Devices) -> onnx.ShardingSpecProto:
    """A sharding spec, written by hand."""
    made = onnx.ShardingSpecProto(tensor_name=tensor)
    for number, device in enumerate(devices, start=1):
        if isinstance(device, int):
            made.device.append(device)
        else:
            made.device.append(-number)
            made.index_to_device_group_map.add(key=-number, value=device)
    for axis, shards in axes.items():
        dim = made.sharded_dim.add(axis=axis)
        if isinstance(shards, int):
            dim.simple_sharding.add(num_shards=shards)
        else:
            for size, count in shards:
                dim.simple_sharding.add(dim_value=size, num_shards=count)
    return made


def node(proto: onnx.ModelProto, name: str) -> onnx.NodeProto:
    found: onnx.NodeProto = next(n for n in proto.graph.node if n.name == name)
    return found


def entry(proto: onnx.ModelProto, name: str) -> onnx.NodeDeviceConfigurationProto:
    found: onnx.NodeDeviceConfigurationProto = node(proto, name).device_configurations[0]
    return found


def spec_of(proto: onnx.ModelProto, name: str, tensor: str) -> onnx.ShardingSpecProto:
    found: onnx.ShardingSpecProto = next(s for s in entry(proto, name).sharding_spec if s.tensor_name == tensor)
    return found


def put(proto: onnx.ModelProto, name: str, tensor: str, axes: Axes, devices: Devices) -> None:
    """Replace the node's spec of a tensor, or add one."""
    found = [s for s in entry(proto, name).sharding_spec if s.tensor_name == tensor]
    for old in found:
        entry(proto, name).sharding_spec.remove(old)
    entry(proto, name).sharding_spec.append(spec(tensor, axes, devices))


NODES = """
    [up] h = MatMul(x, W1)
    [act] r = Relu(h)
    [down] y = MatMul(r, W2)
    [add] z = Add(y, x)
    [soft] p = Softmax<axis = -1>(z)
    [heads] q = Reshape(p, shape)
    [swap] out = Transpose<perm = [0, 2, 1, 3]>(q)
"""


@pytest.fixture
def sound() -> onnx.ModelProto:
    """A feed-forward block split over four devices, the way it is done, and a softmax that is whole."""
    proto = model(
        "float[2, 6, 64] x",
        "float[2, 8, 6, 8] out",
        NODES.replace("\n    [", "\n["),
        {"W1": (64, 128), "W2": (128, 64), "shape": np.array([2, 6, 8, 8])},
        ir_version=11,
    )
    proto.configuration.add(name="four", num_devices=4, device=["npu:0:0", "npu:0:1", "npu:0:2", "npu:0:3"])
    specs: dict[str, list[tuple[str, Axes, Devices]]] = {
        "up": [("x", {}, ALL), ("W1", {1: 4}, EACH), ("h", {-1: 4}, EACH)],
        "act": [("h", {2: 4}, EACH), ("r", {2: 4}, EACH)],
        "down": [("r", {2: 4}, EACH), ("W2", {0: 4}, EACH), ("y", {}, ALL)],
        "add": [("y", {}, ALL), ("x", {}, ALL), ("z", {}, ALL)],
        "soft": [("z", {}, ALL), ("p", {}, ALL)],
        "heads": [("p", {2: 4}, EACH), ("q", {2: 4}, EACH)],
        "swap": [("q", {2: 4}, EACH), ("out", {1: 4}, EACH)],
    }
    for name, given in specs.items():
        added = node(proto, name).device_configurations.add(configuration_id="four")
        added.sharding_spec.extend(spec(*arguments) for arguments in given)
    return proto


def test_a_sound_model_has_no_findings(sound: onnx.ModelProto) -> None:
    onnx.checker.check_model(sound)
    assert check_sharding(sound, HERE) == []


def stages(proto: onnx.ModelProto, **given: int) -> None:
    for name, stage in given.items():
        entry(proto, name).pipeline_stage = stage


def axis_missing(p: onnx.ModelProto) -> None:
    spec_of(p, "up", "W1").sharded_dim[0].ClearField("axis")


def group_key_twice(p: onnx.ModelProto) -> None:
    spec_of(p, "up", "x").index_to_device_group_map.add(key=-1, value=[0])


def unused_group(p: onnx.ModelProto) -> None:
    spec_of(p, "up", "x").index_to_device_group_map.add(key=-7, value=[0])


def empty_group(p: onnx.ModelProto) -> None:
    del spec_of(p, "soft", "p").index_to_device_group_map[0].value[:]


def symbolic_size(p: onnx.ModelProto) -> None:
    spec_of(p, "up", "W1").sharded_dim[0].simple_sharding[0].dim_param = "ffn"


def all_stages(p: onnx.ModelProto) -> None:
    stages(p, up=0, act=0, down=0, add=1, soft=1, heads=1)


def gap_in_stages(p: onnx.ModelProto) -> None:
    stages(p, up=0, act=0, down=0, add=2, soft=2, heads=2, swap=2)


def backward(p: onnx.ModelProto) -> None:
    stages(p, up=0, act=1, down=0, add=1, soft=1, heads=1, swap=1)


def other_devices(p: onnx.ModelProto) -> None:
    p.configuration[0].num_devices = 8
    del p.configuration[0].device[:]
    put(p, "soft", "z", {}, ((4, 5, 6, 7),))


def another_order(p: onnx.ModelProto) -> None:
    put(p, "act", "h", {2: 4}, (3, 2, 1, 0))
    put(p, "act", "r", {2: 4}, (3, 2, 1, 0))
    put(p, "down", "r", {2: 4}, (3, 2, 1, 0))
    put(p, "down", "W2", {0: 4}, (3, 2, 1, 0))


def diagonal(p: onnx.ModelProto) -> None:
    put(p, "down", "r", {1: 2}, PAIRS)
    put(p, "act", "r", {1: 2}, PAIRS)
    put(p, "down", "W2", {1: 2}, PAIRS)


def inherited(p: onnx.ModelProto) -> None:
    entry(p, "down").sharding_spec.remove(spec_of(p, "down", "r"))
    put(p, "down", "W2", {}, ALL)


def gathered(p: onnx.ModelProto) -> None:
    put(p, "swap", "q", {}, ALL)
    put(p, "swap", "out", {}, ALL)


def split_softmax(p: onnx.ModelProto) -> None:
    put(p, "soft", "z", {2: 4}, EACH)
    put(p, "soft", "p", {2: 4}, EACH)


def another_reader(p: onnx.ModelProto) -> None:
    for name in ("up", "down", "add"):
        del entry(p, name).sharding_spec[:]
    put(p, "up", "x", {0: 2}, PAIRS)
    put(p, "down", "W2", {0: 4}, EACH)
    put(p, "add", "x", {1: 2}, PAIRS)


MODEL = ""
Fault = Callable[[onnx.ModelProto], object]

FAULTS: dict[str, tuple[Fault, str, str, str, str, str]] = {
    # Fault -> how to make it, then what is reported: severity, node, tensor, what, remedy.
    "old IR version": (
        lambda p: setattr(p, "ir_version", 10),
        *("error", MODEL, "", "IR version 10", "ir_version to 11"),
    ),
    "configuration without a name": (
        lambda p: p.configuration.add(num_devices=2),
        *("error", MODEL, "", "has no name", "give it the name"),
    ),
    "configuration twice": (
        lambda p: p.configuration.add(name="four", num_devices=4),
        *("error", MODEL, "", '2 device configurations are named "four"', "a name of its own"),
    ),
    "no devices in a configuration": (
        lambda p: p.configuration.add(name="none", num_devices=0),
        *("error", MODEL, "", "num_devices 0", "set num_devices"),
    ),
    "names for some devices": (
        lambda p: p.configuration[0].device.pop(),
        *("error", MODEL, "", "num_devices 4 and 3 device names", "name every device, or none"),
    ),
    "device name twice": (
        lambda p: p.configuration[0].device.__setitem__(3, "npu:0:0"),
        *("warning", MODEL, "", '2 devices "npu:0:0"', "a name of its own"),
    ),
    "unused configuration": (
        lambda p: p.configuration.add(name="eight", num_devices=8),
        *("warning", MODEL, "", 'configuration "eight"', "annotate the nodes for it, or remove it"),
    ),
    "unknown configuration": (
        lambda p: setattr(entry(p, "act"), "configuration_id", "five"),
        *("error", 'Relu "act"', "", '"five" is not a configuration of the model', 'add a device configuration "five"'),
    ),
    "no configuration": (
        lambda p: setattr(entry(p, "act"), "configuration_id", ""),
        *("error", 'Relu "act"', "", "names no configuration", "['four']"),
    ),
    "two annotations for one configuration": (
        lambda p: node(p, "act").device_configurations.add(configuration_id="four", pipeline_stage=0),
        *("error", 'Relu "act"', "", "2 annotations", "into one"),
    ),
    "empty annotation": (
        lambda p: node(p, "soft").device_configurations[0].ClearField("sharding_spec"),
        *("warning", 'Softmax "soft"', "", "says nothing", "remove it"),
    ),
    "negative stage": (
        lambda p: stages(p, up=-1, act=0, down=0, add=0, soft=0, heads=0, swap=0),
        *("error", 'MatMul "up"', "", "pipeline_stage is -1", "count stages from 0"),
    ),
    "spec without a tensor": (
        lambda p: spec_of(p, "up", "W1").ClearField("tensor_name"),
        *("error", 'MatMul "up"', "", "no tensor_name", "name an input or output"),
    ),
    "tensor of another node": (
        lambda p: setattr(spec_of(p, "soft", "p"), "tensor_name", "W2"),
        *("error", 'Softmax "soft"', "W2", "neither an input nor an output", '"z", "p"'),
    ),
    "two specs for a tensor": (
        lambda p: entry(p, "soft").sharding_spec.append(spec("z", {}, ALL)),
        *("error", 'Softmax "soft"', "z", "2 sharding specs", "keep one"),
    ),
    "no devices in a spec": (
        lambda p: put(p, "soft", "p", {}, ()),
        *("error", 'Softmax "soft"', "p", "lists no devices", "for each shard"),
    ),
    "device out of range": (
        lambda p: put(p, "up", "W1", {1: 4}, (0, 1, 2, 4)),
        *("error", 'MatMul "up"', "W1", "device 4 is out of range", "from 0 to 3"),
    ),
    "member of a group out of range": (
        lambda p: put(p, "soft", "p", {}, ((0, 1, 2, 9),)),
        *("error", 'Softmax "soft"', "p", "device 9 is out of range", "from 0 to 3"),
    ),
    "unknown group": (
        lambda p: put(p, "up", "W1", {1: 4}, (0, 1, 2, -5)),
        *("error", 'MatMul "up"', "W1", "-5 in the device list", "add an entry with key -5"),
    ),
    "group key twice": (group_key_twice, "error", 'MatMul "up"', "x", "2 entries for key -1", "keep one"),
    "empty group": (
        empty_group,
        "error",
        'Softmax "soft"',
        "p",
        "device group -1 is empty",
        "list the group's devices",
    ),
    "unused group": (unused_group, "warning", 'MatMul "up"', "x", "device group -7", "remove its entry"),
    "device twice": (
        lambda p: put(p, "up", "W1", {1: 4}, (0, 1, 2, 2)),
        *("error", 'MatMul "up"', "W1", "device 2 is listed 2 times", "one shard"),
    ),
    "no axis": (axis_missing, "error", 'MatMul "up"', "W1", "has no axis", "say which axis"),
    "axis out of range": (
        lambda p: put(p, "up", "W1", {2: 4}, EACH),
        *("error", 'MatMul "up"', "W1", "axis 2 is out of range: the tensor has 2 dimensions", "from -2 to 1"),
    ),
    "negative axis out of range": (
        lambda p: put(p, "up", "W1", {-3: 4}, EACH),
        *("error", 'MatMul "up"', "W1", "axis -3 is out of range", "from -2 to 1"),
    ),
    "axis twice": (
        lambda p: put(p, "up", "W1", {1: 2, -1: 2}, EACH),
        *("error", 'MatMul "up"', "W1", "axis 1 has several sharded_dim entries", "keep one"),
    ),
    "axis without shards": (
        lambda p: put(p, "up", "W1", {1: []}, EACH),
        *("error", 'MatMul "up"', "W1", "no simple_sharding", "into how many shards"),
    ),
    "no shards": (
        lambda p: put(p, "up", "W1", {1: 0}, (0,)),
        *("error", 'MatMul "up"', "W1", "num_shards of axis 1 is 0", "set num_shards"),
    ),
    "negative size": (
        lambda p: put(p, "up", "W1", {1: [(-128, 4)]}, EACH),
        *("error", 'MatMul "up"', "W1", "dim_value of axis 1 is less than 1", "give the axis' size"),
    ),
    "wrong size": (
        lambda p: put(p, "up", "W1", {1: [(64, 4)]}, EACH),
        *("error", 'MatMul "up"', "W1", "multiplies to 64, but the axis has size 128", "multiply to 128"),
    ),
    "wrong size of a fused axis": (
        lambda p: put(p, "up", "W1", {1: [(4, 4), (33, 1)]}, EACH),
        *("error", 'MatMul "up"', "W1", "multiplies to 132, but the axis has size 128", "multiply to 128"),
    ),
    "symbol for a fixed size": (symbolic_size, "warning", 'MatMul "up"', "W1", '"ffn"', "use the name that the shape"),
    "indivisible": (
        lambda p: put(p, "add", "z", {1: 4}, EACH),
        *(
            "error",
            'Add "add"',
            "z",
            "6 on axis 1 is not divisible by num_shards 4",
            "split it by 2, with a group of 2 devices",
        ),
    ),
    "fewer indices than shards": (
        lambda p: put(p, "add", "z", {0: 4}, EACH),
        *("error", 'Add "add"', "z", "2 on axis 0 is not divisible by num_shards 4", "pad it to 4"),
    ),
    "devices for half of the shards": (
        lambda p: put(p, "up", "W1", {1: 4}, (0, 1)),
        *("error", 'MatMul "up"', "W1", "4 shards, but the device list has 2 entries", "for each shard"),
    ),
    "neighbours split different axes": (
        lambda p: put(p, "swap", "q", {3: 4}, EACH),
        *("error", 'Transpose "swap"', "q", "axis 2 split by 4, this node takes it axis 3 split by 4", "the same spec"),
    ),
    "neighbours order devices differently": (
        another_order,
        *("error", 'Relu "act"', "h", "other parts on the devices", 'output spec of MatMul "up"'),
    ),
    "neighbours on other devices": (
        other_devices,
        *("error", 'Softmax "soft"', "z", "takes it from [4, 5, 6, 7] in the same pipeline stage", "same devices"),
    ),
    "gathered before a node": (
        gathered,
        *("warning", 'Transpose "swap"', "q", "the parts are gathered before the node", "split it in the node, too"),
    ),
    "weight split differently by two readers": (
        another_reader,
        *("error", 'Add "add"', "x", 'MatMul "up" takes it axis 0 split by 2', "each a tensor of its own"),
    ),
    "elementwise inputs split differently": (
        lambda p: put(p, "add", "y", {2: 4}, EACH),
        *("error", 'Add "add"', "x", 'axis 2 of this tensor with axis 2 of "y"', "split both axes"),
    ),
    "contraction split on one side": (
        lambda p: put(p, "down", "W2", {}, ALL),
        *("error", 'MatMul "down"', "W2", 'contracts axis 0 of this tensor with axis 2 of "r"', "split both axes"),
    ),
    "contraction split otherwise than its input was left": (
        inherited,
        *("error", 'MatMul "down"', "W2", "whole against 4 shards", "split both axes"),
    ),
    "contraction split into other parts": (
        lambda p: put(p, "down", "W2", {0: 2}, PAIRS),
        *("error", 'MatMul "down"', "W2", "2 shards on devices [0, 1, 2, 3] against 4 shards", "split both axes"),
    ),
    "contraction on other devices": (
        lambda p: put(p, "down", "W2", {0: 4}, (0, 2, 1, 3)),
        *("error", 'MatMul "down"', "W2", "not split alike", "on the same devices"),
    ),
    "softmax over a split axis": (
        split_softmax,
        *("error", 'Softmax "soft"', "z", "Softmax needs axis 2 whole", "leave axis 2 out"),
    ),
    "only some pairs of shards": (
        diagonal,
        *("error", 'MatMul "down"', "y", "devices hold 2 of the 4 pairs", "different device groups"),
    ),
    "stages go backwards": (
        backward,
        *(
            "error",
            'MatMul "down"',
            "r",
            'stage 0 of configuration "four", but it needs a value of Relu "act"',
            "stage 1",
        ),
    ),
    "gap in the stages": (gap_in_stages, "warning", MODEL, "", "pipeline stage 1", "without gaps"),
    "stage missing": (all_stages, "warning", 'Transpose "swap"', "", "no pipeline stage", "give every node a stage"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_reported_with_node_and_remedy(sound: onnx.ModelProto, name: str) -> None:
    seed, severity, where, tensor, what, remedy = FAULTS[name]
    seed(sound)
    found = check_sharding(sound, HERE)
    reported = [f for f in found if (f.severity, f.node, f.tensor) == (severity, where, tensor) and what in f.what]
    assert len(reported) == 1, found
    assert remedy in reported[0].remedy
    assert [f for f in found if f.severity == "error"] == [f for f in reported if f.severity == "error"]


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
