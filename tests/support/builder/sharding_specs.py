"""Sharding specs written by hand, and a small model that is annotated with them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx

from tests.support.builder.graphs import model

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


def sound_model() -> onnx.ModelProto:
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
