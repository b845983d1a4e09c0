"""Small models written as text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import numpy_helper

Array = npt.NDArray[Any]
Weights = Mapping[str, Any]


def random(*shape: int, seed: int = 0) -> Array:
    """Float32 numbers of a normal distribution."""
    return np.random.default_rng([seed, *shape]).standard_normal(shape, dtype=np.float32)


def model(
    inputs: str, outputs: str, nodes: str, weights: Weights | None = None, *, opset: int = 21, ir_version: int = 10
) -> onnx.ModelProto:
    """A model of `nodes` in ONNX's text format.

    `weights` are initializers: arrays, or shapes of random float32 ones. An input whose name begins with `past` is a
    state, which may be split; so is an output whose name begins with `present`.
    """
    proto = onnx.parser.parse_model(
        f'<ir_version: {ir_version}, opset_import: ["": {opset}, "com.microsoft": 1]>\n'
        f"handmade ({inputs}) => ({outputs}) {{ {nodes} }}"
    )
    for number, (name, weight) in enumerate((weights or {}).items()):
        array = random(*weight, seed=number) if isinstance(weight, tuple) else weight
        proto.graph.initializer.append(numpy_helper.from_array(array, name))
    return proto
