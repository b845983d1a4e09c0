"""Turn Constant nodes into initializers, also in branches and bodies. Like onnx-ir's own pass, but nodes are removed
together: that pass looks at every graph output again for each removed node, which is quadratic in layers.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

_TENSORS = {
    "value_float": np.float32,
    "value_floats": np.float32,
    "value_int": np.int64,
    "value_ints": np.int64,
    "value_string": np.str_,
    "value_strings": np.str_,
}
"""Attributes that hold a tensor's elements -> the type of the elements."""


def lift_constants(model: ir.Model) -> None:
    """Replace every Constant that is not itself an output of its graph."""
    for graph in model.graphs():
        lifted = []
        for node in graph:
            if node.op_type != "Constant" or node.domain or node.outputs[0].is_graph_output():
                continue
            output = node.outputs[0]
            tensor = _tensor_of(node, str(output.name))
            if tensor is None:
                continue
            value = ir.Value(
                name=output.name,
                shape=ir.Shape(tensor.shape.numpy()),
                type=ir.TensorType(tensor.dtype),
                const_value=tensor,
            )
            output.replace_all_uses_with(value)
            lifted.append((node, value))
        graph.remove([node for node, _ in lifted], safe=True)
        for _, value in lifted:
            graph.register_initializer(value)


def _tensor_of(node: ir.Node, name: str) -> ir.TensorProtocol | None:
    """The tensor that a Constant gives; None if it is not a plain tensor (but a sparse one)."""
    if len(node.attributes) != 1:
        return None
    (attribute,) = node.attributes.values()
    if attribute.name == "value":
        tensor: ir.TensorProtocol = attribute.as_tensor()
        return tensor
    if attribute.name not in _TENSORS:
        return None
    if attribute.name.startswith("value_string"):
        strings = [s.encode() if isinstance(s, str) else s for s in np.atleast_1d(attribute.value).tolist()]
        shape = ir.Shape([len(strings)] if attribute.name.endswith("s") else [])
        return ir.StringTensor(strings, shape=shape, name=name)
    return ir.Tensor(np.array(attribute.value, dtype=_TENSORS[attribute.name]), name=name)
