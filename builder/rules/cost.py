"""What a node costs: FLOPs, and bytes read and written, as functions of the shapes that it sees.

On local shapes the cost is the cost on one PE. Nothing here knows a device: its cost model has to subtract what its
kernels save. The conventions:

* An addition, a comparison and a transcendental function (exp, tanh, erf, sqrt, ...) count 1 FLOP, for integers as for
  floating point numbers; a multiplication with the addition of its result counts 2. A function that is made of others
  counts their sum (a sigmoid 4, a softmax 5 per element). Selecting, converting and moving count 0, and so does work
  that unpacks the weight of a product (MatMulNBits, QMoE), scales all of it, or is done once for a row. Products with
  padding count.
* Every input is read once, and every output that has a name is written once, each element at its own width: packed
  weights as packed, with their scales and zero points. Scratch memory does not count.
* Views (Reshape, Squeeze, Identity, ...) cost nothing. An op that moves or selects reads no more than it gives: a table
  is looked up row by row. A cache is one buffer: attention and TensorScatter read the past and write new positions.
* Attention computes scores, softmax and values over the present length, the past and the new positions, and the masked
  half of a causal prefill counts. With a local window no query sees more keys than that.
* Each token goes through `k` of `n` experts. Weights are read of the experts that `t` tokens are expected to touch if
  routing is uniform, `n * (1 - (1 - k / n) ** t)`: `k` for one token, and never more than `n`.
* A recurrence (LSTM, LinearAttention, ...) is computed step by step, and reads its weights once.
* A Loop whose number of iterations is not known counts once; an If costs its dearer branch.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping

from furiosa_llm.builder.rules.view import NodeView

SIGMOID = 4
SILU = SIGMOID + 1
SOFTMAX = 5
RMS_NORM = 4
"""Square, add up, multiply, scale."""
QUANTIZE = 3
"""Divide, round, add the zero point."""
DEQUANTIZE = 2
"""Subtract the zero point, multiply."""
# fmt: off
_FUNCTIONS: dict[str, int] = {
    **dict.fromkeys(("none", "identity", "cast", "castlike", "where"), 0),
    **dict.fromkeys(("clip", "leakyrelu", "prelu", "shrink"), 2),
    **dict.fromkeys(("softplus", "softsign", "elu"), 3),
    **dict.fromkeys(("sigmoid", "hardsigmoid", "selu"), 4),
    **dict.fromkeys(("silu", "swish", "gelu", "hardswish", "mish"), 5),
    **dict.fromkeys(("biasgelu", "quickgelu", "scaledsilu", "swiglu"), 6),
    "celu": 7,
    "fastgelu": 9,
    "qlinearwhere": DEQUANTIZE + QUANTIZE,
    "qlinearadd": 2 * DEQUANTIZE + 1 + QUANTIZE,
    "qlinearmul": 2 * DEQUANTIZE + 1 + QUANTIZE,
    "qlinearsigmoid": DEQUANTIZE + SIGMOID + QUANTIZE,
    "qlinearleakyrelu": DEQUANTIZE + 2 + QUANTIZE,
}
# fmt: on
"""FLOPs of a function of one element, as an op or fused into another; 1 if it is not here."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """How much is computed and moved."""

    flops: int = 0
    nbytes_read: int = 0
    nbytes_written: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            flops=self.flops + other.flops,
            nbytes_read=self.nbytes_read + other.nbytes_read,
            nbytes_written=self.nbytes_written + other.nbytes_written,
        )

    def __mul__(self, count: int) -> Cost:
        """The cost of doing the same `count` times."""
        return Cost(
            flops=self.flops * count,
            nbytes_read=self.nbytes_read * count,
            nbytes_written=self.nbytes_written * count,
        )


CostFunction = Callable[[NodeView], Cost]
ReadFunction = Callable[[NodeView], dict[int, int]]
"""Input -> the bytes read of it, for the inputs of which a part is read."""


def function_flops(name: str) -> int:
    """FLOPs of a function of one element; `name` is an op type or an attribute's name for the function."""
    return _FUNCTIONS.get(name.lower(), 1)


def spent(
    view: NodeView, flops: int, reads: Mapping[int, int] | None = None, writes: Mapping[int, int] | None = None
) -> Cost:
    """`flops`, every input read and every output written; `reads` and `writes` are the bytes of ports that differ."""
    given = {v: port for port, v in enumerate(view.node.inputs) if v is not None}
    made = {v: port for port, v in enumerate(view.node.outputs) if v.name}
    return Cost(
        flops=flops,
        nbytes_read=sum((reads or {}).get(port, view.facts[v].nbytes) for v, port in given.items()),
        nbytes_written=sum((writes or {}).get(port, view.facts[v].nbytes) for v, port in made.items()),
    )


def nothing(_: NodeView) -> Cost:
    """A view of its input."""
    return Cost()


def generated(view: NodeView) -> Cost:
    """The output is written, and nothing but sizes is read."""
    return dataclasses.replace(spent(view, 0), nbytes_read=0)


def elementwise(per_output: int) -> CostFunction:
    """`per_output` FLOPs for each element of the first output."""

    def cost(view: NodeView) -> Cost:
        return spent(view, per_output * math.prod(view.out()))

    return cost


def reduction(per_input: int, per_output: int = 0) -> CostFunction:
    """FLOPs for each element of the first input, and for each element of the first output."""

    def cost(view: NodeView) -> Cost:
        return spent(view, per_input * math.prod(view.shape(0)) + per_output * math.prod(view.out()))

    return cost


def movement(view: NodeView) -> Cost:
    """No more of the first input is read than is written; the other inputs are sizes and positions."""
    return spent(view, 0, reads={0: min(view.fact(0).nbytes, spent(view, 0).nbytes_written)})


def copied(view: NodeView) -> Cost:
    """Everything is read and written, and nothing computed."""
    return spent(view, 0)


def taken(view: NodeView, tables: tuple[int, ...], axis: int, rows: int) -> dict[int, int]:
    """The bytes read of `tables` if `rows` indices of their axis are looked up."""
    return {p: view.fact(p).nbytes * min(rows, n) // n for p in tables if view.has(p) and (n := view.shape(p)[axis])}


def product(view: NodeView, contracted: int, *, per_output: int = 0, bias: int | None = None) -> Cost:
    """A matrix product over `contracted` indices, then `per_output` FLOPs and a bias if input `bias` is there."""
    each = 2 * contracted + per_output + (bias is not None and view.has(bias))
    return spent(view, each * math.prod(view.out()))
