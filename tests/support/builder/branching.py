"""Small models with branches, loops and functions, written as text."""

from __future__ import annotations

import functools

import numpy as np
import onnx

from tests.support.builder.graphs import Weights, model, random

HEAD = "int64[batch, sequence] input_ids"
LOGITS = "float[batch, sequence, 1001] logits"
WEIGHTS: Weights = {
    "e": (1001, 32),
    "up": random(32, 512) / 6,
    "down": random(512, 32) / 24,
    "lm": (32, 1001),
    "half": np.array(0.5, np.float32),
    "ones": np.ones(32, np.float32),
}
BEFORE = "row = Gather(e, input_ids) x = LayerNormalization(row, ones) u = MatMul(x, up)"
AFTER = "d = MatMul(a, down) add = Add(x, d) h = LayerNormalization(add, ones) logits = MatMul(h, lm)"
ACTIVATION = """
    a = If(condition) <
        then_branch = t () => (float[batch, sequence, 512] r) { s = Sigmoid(u) r = Mul(u, s) },
        else_branch = e () => (float[batch, sequence, 512] q) { q = Relu(u) }
    >
"""


def layer(condition: str, inputs: str = "") -> onnx.ModelProto:
    """A feed-forward layer whose activation is chosen by `condition`, which is nodes or an input."""
    head = f"{HEAD}, {inputs}" if inputs else HEAD
    return model(head, LOGITS, f"{BEFORE} {condition} {ACTIVATION} {AFTER}", WEIGHTS)


def on_an_input() -> onnx.ModelProto:
    """An If on a boolean input."""
    return layer("", "bool condition")


def on_elements() -> onnx.ModelProto:
    """An If on what the model computes."""
    return layer("m = ReduceMax<keepdims=0>(x) condition = Greater(m, half)")


def on_a_size() -> onnx.ModelProto:
    """An If on whether there is more than one sequence."""
    one = "one = Constant<value_int=1>() z = Constant<value_int=0>()"
    return layer(f"{one} shape = Shape(input_ids) n = Gather(shape, z) condition = Greater(n, one)")


def on_a_constant_size() -> onnx.ModelProto:
    """An If on the width of the layer, as exporters write: the other branch gives another rank."""
    nodes = f"""
        {BEFORE} three = Constant<value_int=3>() two = Constant<value_ints=[2]>()
        shape = Shape(u) n = Size(shape) condition = Equal(n, three)
        a = If(condition) <
            then_branch = t () => (float[batch, sequence, 512] r) {{ r = Relu(u) }},
            else_branch = e () => (float[batch, sequence] q) {{ q = ReduceMax<keepdims = 0>(u, two) }}
        > {AFTER}
    """
    return model(HEAD, LOGITS, nodes, WEIGHTS)


def on_a_size_that_folds() -> onnx.ModelProto:
    """An If on sizes that are equal whatever they are: sequence + 1 > sequence."""
    constants = "one = Constant<value_int=1>()"
    return layer(f"{constants} shape = Shape(input_ids) n = Gather(shape, one) m = Add(n, one) condition = Less(n, m)")


def with_a_lookup() -> onnx.ModelProto:
    """An If whose branches must not both be computed: the lookup is out of range where it is not taken."""
    nodes = f"""
        {BEFORE} a = If(condition) <
            then_branch = t () => (float[batch, sequence, 512] r) {{ p = Gather(table, index) r = Mul(u, p) }},
            else_branch = e () => (float[batch, sequence, 512] q) {{ q = Relu(u) }}
        > {AFTER}
    """
    return model(f"{HEAD}, bool condition, int64 index", LOGITS, nodes, {**WEIGHTS, "table": (7, 512)})


def loop() -> onnx.ModelProto:
    """A block of weights that a Loop runs three times, with its number."""
    nodes = f"""
        {BEFORE} a0 = Relu(u) three = Constant<value_int=3>() yes = Constant<value = bool {{1}}>()
        a, trace = Loop(three, yes, a0) <body = b (int64 i, bool c, float[batch, sequence, 512] s)
            => (bool again, float[batch, sequence, 512] next, float[batch, sequence] sum) {{
            m = MatMul(s, mix) f = Cast<to = 1>(i) g = Add(m, f) next = Tanh(g) again = Identity(c)
            axis = Constant<value_ints=[-1]>() sum = ReduceSum<keepdims = 0>(next, axis)
        }}> {AFTER}
    """
    return model(HEAD, f"{LOGITS}, float[3, batch, sequence] trace", nodes, {**WEIGHTS, "mix": random(512, 512) / 24})


def loop_until() -> onnx.ModelProto:
    """A Loop that ends when what it carries has grown enough."""
    nodes = f"""
        {BEFORE} yes = Constant<value = bool {{1}}>() top = Constant<value_int=9>()
        a = Loop(top, yes, u) <body = b (int64 i, bool c, float[batch, sequence, 512] s)
            => (bool again, float[batch, sequence, 512] next) {{
            next = Mul(s, half) m = ReduceMax<keepdims = 0>(next) again = Greater(m, half)
        }}> {AFTER}
    """
    return model(HEAD, LOGITS, nodes, WEIGHTS)


def scan() -> onnx.ModelProto:
    """A Scan over the positions, which carries a sum."""
    nodes = f"""
        {BEFORE} z = Constant<value_int=0>() first = Gather<axis = 1>(u, z) start = Sub(first, first)
        last, a = Scan<num_scan_inputs = 1, scan_input_axes = [1], scan_output_axes = [1],
            body = b (float[batch, 512] total, float[batch, 512] row)
                => (float[batch, 512] now, float[batch, 512] out) {{
            r = Mul(row, half) now = Add(total, r) out = Tanh(now)
        }}>(start, u) {AFTER}
    """
    return model(HEAD, f"{LOGITS}, float[batch, 512] last", nodes, WEIGHTS)


def nested() -> onnx.ModelProto:
    """An If in a branch of an If, which reads what lies around both."""
    nodes = f"""
        {BEFORE} a = If(condition) <
            then_branch = t () => (float[batch, sequence, 512] r) {{
                n = Neg(u)
                r = If(second) <
                    then_branch = tt () => (float[batch, sequence, 512] v) {{ v = Mul(n, u) }},
                    else_branch = te () => (float[batch, sequence, 512] w) {{ k = Cos(n) w = Add(k, half) }}
                >
            }},
            else_branch = e () => (float[batch, sequence, 512] q) {{ q = Relu(u) }}
        > {AFTER}
    """
    return model(f"{HEAD}, bool condition, bool second", LOGITS, nodes, WEIGHTS)


def nested_in_a_loop() -> onnx.ModelProto:
    """An If in the body of a Loop; one branch gives what is carried, as it is."""
    nodes = f"""
        {BEFORE} three = Constant<value_int=3>()
        a = Loop(three, , u) <body = b (int64 i, bool c, float[batch, sequence, 512] s)
            => (bool again, float[batch, sequence, 512] next) {{
            one = Constant<value_int=1>() odd = Equal(i, one) again = Identity(c)
            next = If(odd) <
                then_branch = t () => (float[batch, sequence, 512] v) {{ m = MatMul(s, mix) v = Tanh(m) }},
                else_branch = e () => (float[batch, sequence, 512] w) {{ w = Identity(s) }}
            >
        }}> {AFTER}
    """
    return model(HEAD, LOGITS, nodes, {**WEIGHTS, "mix": random(512, 512) / 24})


def functions() -> onnx.ModelProto:
    """Functions that call functions, with an attribute, one with a default, and one with branches."""
    text = f"""
        <ir_version: 10, opset_import: ["": 21, "local": 1]>
        g ({HEAD}, bool condition) => ({LOGITS}) {{
            {BEFORE} a = local.Act<alpha = 0.5>(u, condition)
            d = MatMul(a, down) add = local.Residual(x, d) h = LayerNormalization(add, ones) logits = MatMul(h, lm)
        }}
        <opset_import: ["": 21, "local": 1], domain: "local">
        Act<alpha, beta: float = 0.25>(u, c) => (a) {{
            s = local.Leaky<slope: float = @alpha>(u) b = Constant<value_float: float = @beta>()
            a = If(c) <
                then_branch = t () => (r) {{ r = Mul(s, b) }},
                else_branch = e () => (q) {{ q = local.Leaky<slope: float = @beta>(s) }}
            >
        }}
        <opset_import: ["": 20], domain: "local">
        Leaky<slope>(x) => (y) {{ y = LeakyRelu<alpha: float = @slope>(x) }}
        <opset_import: ["": 21], domain: "local">
        Residual(a, b) => (c) {{ c = Add(a, b) }}
    """
    proto = onnx.parser.parse_model(text)
    proto.graph.initializer.extend(layer("", "bool condition").graph.initializer)
    return proto


MODELS = {
    function.__name__: function
    for function in (
        on_an_input, on_elements, on_a_size, on_a_constant_size, on_a_size_that_folds, with_a_lookup, loop, loop_until,
        scan, nested, nested_in_a_loop, functions,
    )
}  # fmt: skip


@functools.cache
def models() -> dict[str, onnx.ModelProto]:
    """All of them, by name."""
    return {name: function() for name, function in MODELS.items()}
