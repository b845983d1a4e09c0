"""Hyper-connections: c streams in the place of one residual, mixed into one in front of a block and out of it behind.

onnxruntime-genai writes the streams side by side in one dimension (`num_branches` of them), or apart.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from furiosa_llm.builder.rules.cost import RMS_NORM, Cost, elementwise, reduction
from furiosa_llm.builder.rules.facts import Fact, present
from furiosa_llm.builder.rules.operands import Operands, Shapes, has, takes
from furiosa_llm.builder.rules.registry import as_input, op, spell, words
from furiosa_llm.builder.rules.rule import Padding, Rule
from furiosa_llm.builder.rules.view import MICROSOFT, Inferred, NodeView, attributes_of

# -- streams into one and back ---------------------------------------------------------------------------------------


def _streams(shape: tuple[int, ...], branches: int) -> tuple[int, int, int]:
    """The number of dimensions in front of the streams, the number of streams, and the features of each."""
    if branches:
        return len(shape) - 1, branches, shape[-1] // branches
    return len(shape) - 2, shape[-2], shape[-1]


def _gates(shape: tuple[int, ...], rows: Sequence[str], streams: int, features: int) -> list[str]:
    """A gate for each stream, or for each of its features, apart or side by side."""
    last = shape[len(rows) :]
    if len(last) == 1:
        return [*rows, "c" if last[0] == streams else "(c h)"]
    return [*rows, "c", "h" if last[1] == features else "1"]


def pre_mix(view: NodeView) -> Rule:
    """The streams, each times its gate, are added up; they stay together where no operand says how many a rank has."""
    branches = int(view.attribute("num_branches", 0))
    count, streams, features = _streams(view.shape(0), branches)
    rows = words(count, "r")
    operands = [[*rows, *(["(c h)"] if branches else ["c", "h"])], _gates(view.shape(1), rows, streams, features)]
    together = operands[0] == operands[1] and branches > 0
    return Rule(
        text=f"{spell(*operands)} -> {spell([*rows, 'h'])}; {'pin' if together else 'reduce'} c",
        sizes={"c": streams, "h": features},
        linear=(0,),
        attributes={"num_branches": "c"} if branches and not together else {},
        padding="product",
    )


def post_mix(view: NodeView) -> Rule:
    """Each stream, or with a matrix each mixture of them, takes up the block's output times its gate."""
    branches, mixes = int(view.attribute("num_branches", 0)), view.has(3)
    count, streams, features = _streams(view.shape(0), branches)
    rows = words(count, "r")
    data = [*rows, *(["(c h)"] if branches else ["c", "h"])]
    operands = [data, [*rows, "h"], _gates(view.shape(2), rows, streams, features)]
    if mixes:  # every mixture needs all streams
        operands.append([*rows, "c", "c"])
    return Rule(
        text=f"{spell(*operands)} -> {spell(data)}" + ("; pin c" if mixes else ""),
        sizes={"c": streams, "h": features},
        linear=(0, 1),
        attributes={"num_branches": "c"} if branches and not mixes else {},
        padding="sum",
        padding_ports=(0, 1),
    )


def _pre_mix_shape(node: ir.Node, inputs: Sequence[Fact | None]) -> Inferred:
    data = present(inputs[0])
    count, _, features = _streams(data.shape, attributes_of(node).get("num_branches", 0))
    return [(data.dtype, (*data.shape[:count], features))]


def _mix_fault(node: ir.Node, shapes: Shapes) -> str | None:
    """Whether the streams can be told apart, and each gate belongs to one of them."""
    branches, data = attributes_of(node).get("num_branches", 0), shapes[0] or ()
    if branches < 0 or len(data) < (1 if branches else 2) or (branches and data[-1] % branches):
        return f"{list(data)} are no {branches or ''} streams"
    count, streams, features = _streams(data, branches)
    block = None if node.op_type == "HyperConnectionPreMix" else shapes[1]
    gates = shapes[1] if block is None else shapes[2]
    of_each = [(streams,), (streams, 1), (streams, features)]
    if block is None and branches:
        of_each.append((streams * features,))
    if gates is None or gates[:count] != data[:count] or gates[count:] not in of_each:
        return f"the gates are not one for each of {streams} streams, or for each of their {features} features"
    if block is not None and block != (*data[:count], features):
        return f"the block's output is not {[*data[:count], features]}"
    if has(shapes, 3) and shapes[3] != (*data[:count], streams, streams):
        return f"the matrix is not {[*data[:count], streams, streams]}"
    return None


# -- Engram ------------------------------------------------------------------------------------------------------------


def engram_gate(view: NodeView) -> Rule:
    """One value for all streams, times a gate for each: how alike its key and the stream are, both normalised."""
    streams, scale = ["b", "s", "c", "*"], ["c", "*"]
    operands = [streams, streams, ["b", "s", "*"], scale, scale, scale][: len(view.node.inputs)]
    outputs = [streams] * len(view.node.outputs)
    padding: Padding = "finite" if view.attribute("epsilon", 1e-5) > 0 else "lost"
    return Rule(text=f"{spell(*operands)} -> {spell(*outputs)}", padding=padding)


def _engram_gate_shape(node: ir.Node, inputs: Sequence[Fact | None]) -> Inferred:
    key = present(inputs[0])
    return [(key.dtype, key.shape)] * len(node.outputs)


def _engram_gate_fault(_: ir.Node, shapes: Shapes) -> str | None:
    key = shapes[0] or ()
    expected = [key, key, (*key[:2], *key[3:]), *[key[2:]] * 3]
    for port, (shape, wanted) in enumerate(zip(shapes, expected, strict=False)):
        if shape is not None and shape != wanted:
            return f"input {port} is not {list(wanted)}"
    return None


def _post_mix_cost(view: NodeView) -> Cost:
    """The block's output times a gate on top of each stream, or of each mixture of all streams."""
    streams = _streams(view.shape(0), int(view.attribute("num_branches", 0)))[1]
    return elementwise(2 + (2 * streams if view.has(3) else 0))(view)


def _engram_gate_cost(view: NodeView) -> Cost:
    """Two norms and a product of them give the gate; the value times it may be normalised, too."""
    return elementwise(2 * RMS_NORM + 2 + 1 + (RMS_NORM if len(view.node.outputs) > 1 else 0))(view)


op(
    "HyperConnectionPreMix",
    domain=MICROSOFT,
    rule=pre_mix,
    shape=_pre_mix_shape,
    definition=takes(range(2, 3), (0, 1)),
    operands=Operands(check=_mix_fault),
    cost=reduction(2),
)
op(
    "HyperConnectionPostMix",
    domain=MICROSOFT,
    rule=post_mix,
    shape=as_input,
    definition=takes(range(3, 5), (0, 1, 2)),
    operands=Operands(check=_mix_fault),
    cost=_post_mix_cost,
)
op(
    "EngramGate",
    domain=MICROSOFT,
    rule=engram_gate,
    shape=_engram_gate_shape,
    definition=takes(range(5, 7), (0, 1, 2, 3, 4), outputs=2),
    operands=Operands(ranks={0: (4,)}, check=_engram_gate_fault),
    cost=_engram_gate_cost,
)
