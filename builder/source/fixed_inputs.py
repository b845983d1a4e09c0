"""Inputs that the user fixes to one value; they become initializers of the model."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
from onnx import ModelProto, TensorProto

from furiosa_llm.builder.errors import OptionError

_INTEGERS = frozenset((TensorProto.BOOL, TensorProto.INT32, TensorProto.INT64))


def fix_inputs(proto: ModelProto, fixed: Mapping[str, int], name: str) -> None:
    """Make every input that `fixed` names an initializer of that value, in place; `name` is the file's, for errors.

    Raises OptionError for an input that does not exist, or that is not a single boolean or integer.
    """
    inputs = {value.name: value for value in proto.graph.input}
    for key, number in fixed.items():
        if key not in inputs:
            raise OptionError(f"--fix names {key!r}, but the inputs of {name} are {sorted(inputs)}.")
        tensor = inputs[key].type.tensor_type
        shape = [max(dim.dim_value, 1) for dim in tensor.shape.dim]
        if tensor.elem_type not in _INTEGERS or any(size != 1 for size in shape):
            raise OptionError(f"--fix {key}={number}: {key!r} of {name} is not one boolean or integer.")
        dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(np.full(shape, number, dtype=dtype), key))
        proto.graph.input.remove(inputs[key])
