"""Convolutions, pools, and other ops on images: channels and batch pass, positions are whole."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from furiosa_llm.builder.errors import ShapeError
from furiosa_llm.builder.rules.cost import QUANTIZE, Cost, elementwise, function_flops, movement, product, spent
from furiosa_llm.builder.rules.facts import Fact, present
from furiosa_llm.builder.rules.integers import offsets, per_channel
from furiosa_llm.builder.rules.registry import as_input, op, spell, standard_shape, whole, whole_inputs, words
from furiosa_llm.builder.rules.rule import Padding, Rule, ShapeOperand
from furiosa_llm.builder.rules.view import MICROSOFT, Inferred, NodeView, attributes_of


def _groups(view: NodeView, weight: int) -> dict[str, int]:
    """Sizes of g groups of i input and o output channels, when output channels come first in the weight."""
    groups = int(view.attribute("group", 1))
    outputs, inputs = view.shape(weight)[:2]
    return {"g": groups, "i": inputs, "o": outputs // groups}


def _space(view: NodeView) -> list[str]:
    return ["*"] * (view.rank(0) - 2)


def conv(view: NodeView) -> Rule:
    """Groups, the output channels of a group, and its input channels, which are contracted."""
    space = _space(view)
    operands = [["b", "(g i)", *space], ["(g o)", "i", *space], ["(g o)"]]
    present = operands[: 3 if view.has(2) else 2]
    return Rule(
        text=f"{spell(*present)} -> {spell(['b', '(g o)', *space])}; reduce i",
        sizes=_groups(view, 1),
        masked=(2,) if view.has(2) else (),
        attributes={"group": "g"},
        padding="product",
        padding_ports=(0, 1),
    )


def fused_conv(view: NodeView) -> Rule:
    """Conv followed by an addition and an activation, which need the whole sum over input channels."""
    space = _space(view)
    grouped = int(view.attribute("group", 1)) > 1
    data, out = ["b", "(g i)" if grouped else "*", *space], ["b", "(g o)", *space]
    operands: list[list[str] | None] = [data, ["(g o)", "i" if grouped else "*", *space]]
    operands += [c if view.has(p) else None for p, c in ((2, ["(g o)"]), (3, out)) if p < len(view.node.inputs)]
    pin = "; pin i" if grouped else ""
    text = f"{spell(*operands)} -> {spell(out)}{pin}"
    return Rule(text=text, sizes=_groups(view, 1), attributes={"group": "g"}, padding="finite")


def conv_transpose(view: NodeView) -> Rule:
    """Conv with the input channels first in the weight."""
    space = _space(view)
    groups = int(view.attribute("group", 1))
    inputs, outputs = view.shape(1)[:2]
    operands = [["b", "(g i)", *space], ["(g i)", "o", *space], ["(g o)"]]
    present = operands[: 3 if view.has(2) else 2]
    return Rule(
        text=f"{spell(*present)} -> {spell(['b', '(g o)', *space])}; reduce i",
        sizes={"g": groups, "i": inputs // groups, "o": outputs},
        masked=(2,) if view.has(2) else (),
        attributes={"group": "g"},
        padding="product",
        padding_ports=(0, 1),
    )


def conv_integer(view: NodeView) -> Rule:
    """Sums of products of codes less their zero points: exact in int32, whole or in parts."""
    space = _space(view)
    operands: list[list[str] | None] = [["b", "(g i)", *space], ["(g o)", "i", *space]]
    if len(view.node.inputs) > 2:
        operands.append(per_channel(view, 2, "*"))
    if len(view.node.inputs) > 3:
        operands.append(per_channel(view, 3, "(g o)"))
    shifted = offsets(view, {0: 2, 1: 3})
    return Rule(
        text=f"{spell(*operands)} -> {spell(['b', '(g o)', *space])}; reduce i",
        sizes=_groups(view, 1),
        attributes={"group": "g"},
        padding="product",
        padding_ports=tuple(port for port in (0, 1) if port not in shifted),
        offset=shifted,
    )


def quantized_conv(view: NodeView) -> Rule:
    """Only output channels are split: the op rounds the sum over input channels to 8 bits, so it must be whole."""
    space = _space(view)
    grouped = int(view.attribute("group", 1)) > 1
    channels = "(g o)"
    operands: list[list[str] | None] = [["b", "(g i)" if grouped else "*", *space], [], []]
    operands += [[channels, "i" if grouped else "*", *space], per_channel(view, 4, channels)]
    operands += [per_channel(view, 5, channels), [], []]
    operands = [dims if dims or dims is None else per_channel(view, p, "*") for p, dims in enumerate(operands)]
    if view.has(8):
        operands.append([channels])
    pin = "; pin i" if grouped else ""
    text = f"{spell(*operands)} -> {spell(['b', channels, *space])}{pin}"
    note = "QLinearConv rounds its sum to 8 bits: its input channels are gathered (as bytes), not contracted in parts"
    return Rule(text=text, sizes=_groups(view, 3), attributes={"group": "g"}, padding="finite", note=note)


# -- pools and sizes ---------------------------------------------------------------------------------------------


def _positions_whole(view: NodeView, padding: Padding = "finite") -> Rule:
    names = ["b", "c", *_space(view)]
    return Rule(text=f"{spell(names)} -> {spell(names)}", padding=padding)


def average_pool(view: NodeView) -> Rule:
    """Linear: partial sums pass."""
    return dataclasses.replace(_positions_whole(view, "moves"), linear=(0,))


def max_pool(view: NodeView) -> Rule:
    """Positions of maxima are counted through all channels of all images."""
    if len(view.node.outputs) > 1:
        return whole(view, note="MaxPool that gives positions, which count channels, too: replicated")
    return _positions_whole(view)


def resize(view: NodeView) -> Rule:
    """Dimensions that keep their size pass; linear in the data, whatever the interpolation."""
    names = words(view.rank(0))
    scales = view.static_value(1 if view.node.op_type == "Upsample" or view.opset < 11 else 2)
    by_size = view.has(3)
    if (scales is None or not scales.size) and not by_size:
        return whole(view, note="Resize by unknown factors: replicated")
    if view.attribute("axes") is not None or view.attribute("keep_aspect_ratio_policy", "stretch") != "stretch":
        return whole(view, note="Resize of some axes, or to an aspect ratio: replicated")
    same = [a == b for a, b in zip(view.shape(0), view.out(), strict=True)]
    if scales is not None and scales.size:
        same = [keep and float(scale) == 1 for keep, scale in zip(same, scales, strict=True)]
    if view.attribute("coordinate_transformation_mode", "half_pixel") == "tf_crop_and_resize":
        same = [False] * len(names)
    dims = [name if keep else "*" for name, keep in zip(names, same, strict=True)]
    text = f"{spell(dims, *whole_inputs(view))} -> {spell(dims)}"
    sizes = (ShapeOperand(3, "dims"),) if by_size else ()
    return Rule(text=text, linear=(0,), shape_operands=sizes, padding="moves", padding_ports=(0,))


_resize_shape = standard_shape("Resize")


def _scaled_shape(node: ir.Node, inputs: Sequence[Fact | None]) -> Inferred:
    if len(inputs) > 2:
        return list(_resize_shape(node, inputs))
    data, scales = present(inputs[0]), inputs[1] if len(inputs) > 1 else None
    factors = attributes_of(node).get("scales") if scales is None else scales.value
    if factors is None:
        raise ShapeError(f'{node.op_type} "{node.name}" needs constant scales; export the model at one image size.')
    return [(data.dtype, tuple(int(size * float(f)) for size, f in zip(data.shape, factors, strict=True)))]


def depth_to_space(view: NodeView) -> Rule:
    """The channels are a product of the output's channels and a p by q block of pixels, in either order."""
    block = int(view.attribute("blocksize"))
    packed = "(p q c)" if view.attribute("mode", "DCR") == "DCR" else "(c p q)"
    return _blocks(["b", packed, "h", "w"], ["b", "c", "(h p)", "(w q)"], block)


def space_to_depth(view: NodeView) -> Rule:
    """The inverse of DepthToSpace."""
    block = int(view.attribute("blocksize"))
    return _blocks(["b", "c", "(h p)", "(w q)"], ["b", "(p q c)", "h", "w"], block)


def _blocks(left: list[str], right: list[str], block: int) -> Rule:
    text = f"{spell(left)} -> {spell(right)}; pin p q"
    return Rule(text=text, sizes={"p": block, "q": block}, linear=(0,), padding="moves")


# -- normalisation by channels -----------------------------------------------------------------------------------


def batch_normalization(view: NodeView) -> Rule:
    """In inference, an affine map of each channel; training is not supported."""
    if view.attribute("training_mode", 0):
        return whole(view, note="BatchNormalization in training: replicated")
    names = ["b", "c", *words(view.rank(0) - 2, "x")]
    padding: Padding = "sum" if view.attribute("epsilon", 1e-5) > 0 else "lost"
    return Rule(text=f"{spell(names, *[['c']] * 4)} -> {spell(names)}", padding=padding)


def instance_normalization(view: NodeView) -> Rule:
    """Statistics of each channel."""
    names = ["b", "c", *_space(view)]
    padding: Padding = "finite" if view.attribute("epsilon", 1e-5) > 0 else "lost"
    return Rule(text=f"{spell(names, ['c'], ['c'])} -> {spell(names)}", padding=padding)


def group_normalization(view: NodeView) -> Rule:
    """Statistics of each group of channels; before opset 21 a scale for each group, then one for each channel."""
    groups = int(view.attribute("num_groups"))
    names = ["b", "(g c)", *_space(view)]
    scale = ["g"] if view.opset < 21 else ["(g c)"]
    padding: Padding = "finite" if view.attribute("epsilon", 1e-5) > 0 else "lost"
    return Rule(
        text=f"{spell(names, scale, scale)} -> {spell(names)}; pin c",
        sizes={"g": groups, "c": view.shape(0)[1] // groups},
        attributes={"num_groups": "g"},
        padding=padding,
    )


def local_response_normalization(view: NodeView) -> Rule:
    """Each channel needs its neighbours, so channels are whole."""
    names = ["b", "*", *words(view.rank(0) - 2, "x")]
    return Rule(text=f"{spell(names)} -> {spell(names)}", padding="finite")


def mean_variance_normalization(view: NodeView) -> Rule:
    """Statistics over some axes."""
    axes = [int(axis) % view.rank(0) for axis in np.atleast_1d(view.attribute("axes", (0, 2, 3)))]
    names = ["*" if d in axes else n for d, n in enumerate(words(view.rank(0)))]
    return Rule(text=f"{spell(names)} -> {spell(names)}", padding="lost")


def _conv_cost(view: NodeView) -> Cost:
    """Every output is a product over the input channels of its group and the window."""
    weight = 3 if view.node.op_type == "QLinearConv" else 1
    after = QUANTIZE if weight == 3 else function_flops(view.attribute("activation", "none")) + view.has(3)
    bias = {"Conv": 2, "FusedConv": 2, "QLinearConv": 8}.get(view.node.op_type)
    return product(view, math.prod(view.shape(weight)[1:]), per_output=after, bias=bias)


def _conv_transpose_cost(view: NodeView) -> Cost:
    """Every input is multiplied with the window of each output channel of its group."""
    products = 2 * math.prod(view.shape(0)) * math.prod(view.shape(1)[1:])
    return spent(view, products + (math.prod(view.out()) if view.has(2) else 0))


def _pool_cost(view: NodeView) -> Cost:
    """One operation for each element of a window, and the powers of LpPool."""
    window = math.prod(view.attribute("kernel_shape", view.shape(0)[2:]))
    return elementwise(window * (2 if "Lp" in view.node.op_type else 1))(view)


def _resize_cost(view: NodeView) -> Cost:
    """Weighted neighbours, two or four along each dimension that changes; the nearest is copied."""
    neighbours = {"linear": 2, "cubic": 4}.get(view.attribute("mode", "nearest"), 0)
    changed = sum(a != b for a, b in zip(view.shape(0), view.out(), strict=True))
    return elementwise(2 * neighbours**changed if neighbours and changed else 0)(view)


def _lrn_cost(view: NodeView) -> Cost:
    """A square, the sum over neighbours, a product, a sum, a power, a quotient."""
    return elementwise(int(view.attribute("size")) + 5)(view)


op("Conv", rule=conv, cost=_conv_cost)
op("FusedConv", domain=MICROSOFT, rule=fused_conv, shape=standard_shape("Conv", drop_inputs_from=3), cost=_conv_cost)
op("ConvTranspose", rule=conv_transpose, cost=_conv_transpose_cost)
op("ConvInteger", rule=conv_integer, cost=_conv_cost)
op("QLinearConv", rule=quantized_conv, cost=_conv_cost)
op("AveragePool", "GlobalAveragePool", rule=average_pool, cost=_pool_cost)
op("MaxPool", "GlobalMaxPool", "LpPool", "GlobalLpPool", rule=max_pool, cost=_pool_cost)
op("Resize", "Upsample", rule=resize, shape=_scaled_shape, cost=_resize_cost)
op("DepthToSpace", rule=depth_to_space, moves="form", cost=movement)
op("SpaceToDepth", rule=space_to_depth, moves="form", cost=movement)
op("BatchNormalization", rule=batch_normalization, cost=elementwise(4))
op("InstanceNormalization", rule=instance_normalization, cost=elementwise(7))
op("GroupNormalization", rule=group_normalization, shape=as_input, cost=elementwise(7))
op("LRN", rule=local_response_normalization, cost=_lrn_cost)
op("MeanVarianceNormalization", rule=mean_variance_normalization, shape=as_input, cost=elementwise(5))
