"""What ops demand of their operands' shapes, and ONNX's own shape inference does not check.

onnxruntime's own ops have no shape inference at all: their rules may count on what is checked here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import onnx_ir as ir

from furiosa_llm.builder.source.validate_tensors import MAX_ELEMENTS

Shape = tuple[int, ...]
Shapes = Sequence[Shape | None]

_TAKE_AXES = (
    "ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceProd",
    "ReduceSum", "ReduceSumSquare", "Squeeze", "Unsqueeze",
)  # fmt: skip
_RANKS: Mapping[tuple[str, str], Mapping[int, tuple[int, ...]]] = {
    **{("", op_type): {1: (0, 1)} for op_type in _TAKE_AXES},
    ("", "ConstantOfShape"): {0: (1,)},
    ("", "Expand"): {1: (1,)},
    ("", "Reshape"): {1: (1,)},
    ("", "Slice"): dict.fromkeys(range(1, 5), (1,)),
    ("", "Split"): {1: (1,)},
    ("", "Tile"): {1: (1,)},
    ("com.microsoft", "GatherBlockQuantized"): {0: (2, 3)},
    ("com.microsoft", "GroupQueryAttention"): {**dict.fromkeys((0, 1, 2), (3,)), 3: (4,), 4: (4,), 10: (4,), 11: (1,)},
    ("com.microsoft", "MatMulNBits"): {0: tuple(range(1, 9)), 1: (3,), 2: (1, 2), 3: (1, 2), 5: (1,)},
    ("com.microsoft", "MoE"): {0: (2, 3), 1: (2, 3), 2: (3,), 3: (2,), 4: (3,), 5: (2,), 6: (3,), 7: (2,)},
    ("com.microsoft", "RotaryEmbedding"): {0: (3, 4)},
    ("com.microsoft", "SkipLayerNormalization"): {0: (2, 3), 1: (1, 2, 3), 2: (1,)},
    ("com.microsoft", "SkipSimplifiedLayerNormalization"): {0: (2, 3), 1: (1, 2, 3), 2: (1,)},
    ("", "SimplifiedLayerNormalization"): {0: tuple(range(1, 9)), 1: (1,)},
}
"""Op -> input -> the numbers of dimensions that it may have."""


_AXES = {"Flatten": (0, 0), "OneHot": (-1, 0)}
"""Ops whose axis may also lie beside the dimensions: what is added to the lowest and to the highest."""
_SCALED = frozenset(("DequantizeLinear", "QuantizeLinear"))
"""Ops that do not look at their axis if there is one scale for all elements."""


_ALONG_AN_AXIS = frozenset(
    ("ArgMax", "ArgMin", "Concat", "CumSum", "Gather", "GatherElements", "Hardmax", "LayerNormalization", "LogSoftmax",
     "RMSNormalization", "ScatterElements", "Slice", "Softmax", "Split", "TopK")
)  # fmt: skip
"""Ops that work along a dimension, which a scalar does not have."""


def operand_fault(node: ir.Node, shapes: Shapes) -> str | None:
    """What is wrong with the shapes of a node's inputs, if anything."""
    for port, ranks in _RANKS.get((node.domain, node.op_type), {}).items():
        shape = shapes[port] if port < len(shapes) else None
        if shape is not None and len(shape) not in ranks:
            return f"input {port} has {len(shape)} dimensions instead of {' or '.join(map(str, ranks))}"
    if node.op_type in _ALONG_AN_AXIS and not node.domain and shapes[0] == ():
        return "input 0 has no dimension"
    reason = _axis_fault(node, shapes)
    if reason is not None:
        return reason
    check = _CHECKS.get((node.domain, node.op_type))
    return None if check is None else check(node, shapes)


def result_fault(node: ir.Node, shapes: Shapes, results: Sequence[Shape]) -> str | None:
    """What is wrong with the shapes that were inferred for a node's outputs, if anything."""
    for shape in results:
        if any(size < 0 for size in shape) or math.prod(shape) > MAX_ELEMENTS:
            return f"an output would have the shape {list(shape)}"
    if node.op_type == "Reshape" and not node.domain and shapes[0] is not None:
        before, after = math.prod(shapes[0]), math.prod(results[0])
        if before != after:
            return f"{before} elements cannot be {list(results[0])}, which are {after}"
    return None


def _axis_fault(node: ir.Node, shapes: Shapes) -> str | None:
    """An axis that is not there: kernels refuse it, shape inference often does not look."""
    attribute = node.attributes.get("axis")
    if attribute is None or node.domain or (node.op_type in _SCALED and shapes[1] in ((), (1,))):
        return None
    rank = len(shapes[0]) if shapes and shapes[0] is not None else 0
    low, high = _AXES.get(node.op_type, (0, -1))
    axis = attribute.as_int()
    if rank and not -rank + low <= axis <= rank + high:
        return f"there is no axis {axis}"
    return None


def _transpose(node: ir.Node, shapes: Shapes) -> str | None:
    order = node.attributes.get("perm")
    if order is None or shapes[0] is None or sorted(order.as_ints()) == list(range(len(shapes[0]))):
        return None
    return f"{list(order.as_ints())} is no order of {len(shapes[0])} dimensions"


def _range(_: ir.Node, shapes: Shapes) -> str | None:
    single = all(shape is not None and math.prod(shape) == 1 for shape in shapes)
    return None if single else "start, limit and delta are not one element each"


def _cumulative_sum(_: ir.Node, shapes: Shapes) -> str | None:
    return "the axis is not one element" if shapes[1] not in ((), (1,)) else None


def _slice(_: ir.Node, shapes: Shapes) -> str | None:
    lengths = {shape for shape in shapes[1:] if shape is not None}
    return "starts, ends, axes and steps are not equally many" if len(lengths) > 1 else None


def _group_query_attention(node: ir.Node, shapes: Shapes) -> str | None:
    heads, groups = node.attributes["num_heads"].as_int(), node.attributes["kv_num_heads"].as_int()
    query = shapes[0]
    if heads < 1 or groups < 1 or heads % groups:
        return f"{heads} query heads cannot share {groups} key and value heads"
    if query is None or query[2] % (heads if _has(shapes, 1) else heads + 2 * groups):
        return f"the packed heads do not divide by num_heads={heads} and kv_num_heads={groups}"
    if _has(shapes, 1) != _has(shapes, 2) or _has(shapes, 3) != _has(shapes, 4):
        return "a key is there without its value, or a value without its key"
    return None


def _matmul_nbits(node: ir.Node, shapes: Shapes) -> str | None:
    K, N, block = (node.attributes[name].as_int() for name in ("K", "N", "block_size"))
    bits = node.attributes["bits"].as_int() if "bits" in node.attributes else 4
    if K < 1 or N < 1 or block < 1 or bits not in (2, 4, 8):
        return f"K={K}, N={N}, block_size={block} and bits={bits} are no weight's"
    blocks = -(-K // block)
    data, codes, scales = shapes[0], shapes[1], shapes[2]
    if data is None or data[-1] != K:
        return f"the last dimension is not K={K}"
    if codes != (N, blocks, -(-block * bits // 8)):
        return f"the codes are not {[N, blocks, -(-block * bits // 8)]}"
    if scales is None or math.prod(scales) != N * blocks:
        return f"the scales are not one for each of {N} times {blocks} blocks"
    return None


def _mixture_of_experts(_: ir.Node, shapes: Shapes) -> str | None:
    first, second = shapes[2], shapes[4]
    if first is None or second is None or first[0] != second[0] or first[1] not in (second[2], 2 * second[2]):
        return "the experts' two weights do not fit together"
    return None


def _skip(_: ir.Node, shapes: Shapes) -> str | None:
    data, skip, scale = shapes[0], shapes[1], shapes[2]
    if data is None or skip is None or scale != data[-1:] or len(skip) > len(data):
        return "the sum, or the scale, does not fit the data"
    fits = all(s in (1, d) for s, d in zip(skip[::-1], data[::-1], strict=False))
    return None if fits else "what is added does not fit the data"


def _has(shapes: Shapes, port: int) -> bool:
    return port < len(shapes) and shapes[port] is not None


_CHECKS = {
    ("", "CumSum"): _cumulative_sum,
    ("", "Range"): _range,
    ("", "Slice"): _slice,
    ("", "Transpose"): _transpose,
    ("com.microsoft", "GroupQueryAttention"): _group_query_attention,
    ("com.microsoft", "MatMulNBits"): _matmul_nbits,
    ("com.microsoft", "MoE"): _mixture_of_experts,
    ("com.microsoft", "SkipLayerNormalization"): _skip,
    ("com.microsoft", "SkipSimplifiedLayerNormalization"): _skip,
}
