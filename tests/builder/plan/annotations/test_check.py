"""The checker of annotations: every kind of fault is reported once, with the node, the tensor and a remedy."""

from __future__ import annotations

from collections.abc import Callable

import onnx
import pytest

from furiosa_llm.builder.plan.annotations import check_sharding
from tests.support.builder.sharding_specs import ALL, EACH, HERE, PAIRS, entry, node, put, sound_model, spec, spec_of


@pytest.fixture
def sound() -> onnx.ModelProto:
    return sound_model()


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
