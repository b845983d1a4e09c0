"""Programs that never end, or take all memory there is: each kind says what it puts behind the first collective.

`x` is what the collective gives, `[batch, sequence, hidden]`; a kind gives a value that broadcasts with a scalar, and
that depends on `x`, unless it is to be computed while the program is loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from onnx import GraphProto, NodeProto, TensorProto, ValueInfoProto, helper

from tests.support.runtime.program_edits import Program

GIB = 2**28
"""Elements of 32 bits in a gibibyte."""


class Kit:
    """Nodes one after the other."""

    def __init__(self, program: Program, x: str) -> None:
        self.program = program
        self.nodes: list[NodeProto] = []
        self.x = x

    def do(self, op: str, *inputs: str, **attributes: Any) -> str:
        """The output of a new node."""
        self.nodes.append(self.program.node(op, inputs, **attributes))
        return str(self.nodes[-1].output[0])

    def number(self, *values: int) -> str:
        """Integers, `[len(values)]`."""
        return self.program.constant(values, np.int64)

    @property
    def scalar(self) -> str:
        """One number of `x`."""
        return self.do("ReduceMean", self.x, keepdims=0)

    @property
    def one(self) -> str:
        """An integer 1 that follows from `x`: nobody knows it before."""
        size = self.do("ReduceProd", self.do("Shape", self.x), keepdims=1)
        return self.do("Div", size, size)

    def many(self, *shape: int) -> str:
        """A number that follows from `x`, another one in each call, so many times."""
        number = self.do("Mul", self.scalar, self.program.constant(1.0 + len(self.nodes)))
        return self.do("Expand", number, self.number(*shape))

    def sum(self, value: str) -> str:
        """One number of all of them."""
        return self.do("ReduceSum", value, keepdims=0)

    def loop(
        self, body: Callable[[], Sequence[NodeProto]], carried: str, trips: str = "", scanned: bool = False
    ) -> str:
        """A Loop whose `body` makes `after` of `before`, and `scan` if it is scanned."""
        graph = _body([*body(), helper.make_node("Identity", ["go"], ["on"])], TensorProto.FLOAT)
        graph.output.extend([helper.make_tensor_value_info("scan", TensorProto.FLOAT, None)] if scanned else [])
        true = self.program.constant(True, np.bool_)
        last = self.do("Loop", trips, true, carried, body=graph)
        if scanned:
            self.nodes[-1].output.append(self.program.value())
            return self.sum(self.nodes[-1].output[1])
        return last


def same() -> list[NodeProto]:
    """A turn that changes nothing."""
    return [helper.make_node("Identity", ["before"], ["after"])]


def doubled() -> list[NodeProto]:
    """A turn that doubles."""
    return [helper.make_node("Concat", ["before", "before"], ["after"], axis=0)]


def scanned() -> list[NodeProto]:
    """A turn that leaves something behind."""
    return [*same(), helper.make_node("Identity", ["before"], ["scan"])]


def looped() -> list[NodeProto]:
    """A turn that is a Loop itself."""
    inner = helper.make_graph(
        [helper.make_node("Identity", ["b"], ["a"]), helper.make_node("Identity", ["c"], ["d"])],
        "inner",
        [
            helper.make_tensor_value_info("t", TensorProto.INT64, []),
            helper.make_tensor_value_info("c", TensorProto.BOOL, []),
            helper.make_tensor_value_info("b", TensorProto.FLOAT, None),
        ],
        [
            helper.make_tensor_value_info("d", TensorProto.BOOL, []),
            helper.make_tensor_value_info("a", TensorProto.FLOAT, None),
        ],
    )
    count = helper.make_node("Constant", [], ["count"], value_int=2**20)
    return [count, helper.make_node("Loop", ["count", "go", "before"], ["after"], body=inner)]


def chosen(kit: Kit) -> str:
    """An endless Loop in the branch that is taken."""
    inside = Kit(kit.program, kit.x)
    result = inside.loop(same, inside.scalar)
    branch = helper.make_graph(inside.nodes, "branch", [], [helper.make_tensor_value_info(result, 1, None)])
    other = GraphProto.FromString(branch.SerializeToString())
    for node in other.node:
        for names in (node.input, node.output):
            names[:] = [f"{name}/other" if any(name in n.output for n in inside.nodes) else name for name in names]
    other.output[0].name += "/other"
    true = kit.do("Cast", kit.one, to=TensorProto.BOOL)
    return kit.do("If", true, then_branch=branch, else_branch=other)


def chain(kit: Kit, op: str, value: str, count: int, **attributes: Any) -> str:
    """The op of a value and itself, so often."""
    for _ in range(count):
        value = kit.do(op, value, value, **attributes)
    return value


def together(kit: Kit, value: Callable[[], str], count: int) -> str:
    """So many values that all have to be there at once."""
    made = [value() for _ in range(count)]
    return kit.sum(kit.do("Sum", *made))


def scan(kit: Kit) -> str:
    """A Scan over many elements."""
    info = [helper.make_tensor_value_info(name, 1, []) for name in ("s", "e", "t")]
    body = helper.make_graph([helper.make_node("Add", ["s", "e"], ["t"])], "body", info[:2], info[2:])
    return kit.do("Scan", kit.scalar, kit.many(10**8), body=body, num_scan_inputs=1)


def folded(kit: Kit, *shape: int) -> str:
    """A number so many times, another one in each call, which is known before the program runs."""
    return kit.do("Expand", kit.program.constant(1.0 + len(kit.nodes)), kit.number(*shape))


def unknown(kit: Kit, *shape: int) -> str:
    """A shape that is known only when the program runs."""
    return kit.do("Mul", kit.number(*shape), kit.one)


def ranged(kit: Kit) -> str:
    """A Range that is longer than any memory."""
    zero, step = kit.program.constant(0, np.int64), kit.program.constant(1, np.int64)
    stop = kit.do("ReduceSum", unknown(kit, 2**40), keepdims=0)
    return kit.sum(kit.do("Cast", kit.do("Range", zero, stop, step), to=1))


def function(kit: Kit) -> str:
    """An endless Loop in a function."""
    inside = Kit(kit.program, "given")
    inside.do("Constant", value=helper.make_tensor("true", TensorProto.BOOL, [], [True]))
    true = str(inside.nodes[0].output[0])
    body = _body([*same(), helper.make_node("Identity", ["go"], ["on"])], TensorProto.FLOAT)
    result = inside.do("Loop", "", true, "given", body=body)
    model = kit.program.model
    own = helper.make_function("own", "Loop", ["given"], [result], inside.nodes, [helper.make_opsetid("", 18)])
    model.functions.append(own)
    model.opset_import.append(helper.make_opsetid("own", 1))
    return kit.do("Loop", kit.scalar, domain="own")


def collected(kit: Kit) -> str:
    """A Loop that carries a sequence, which grows."""
    more = kit.many(2**20)
    insert = helper.make_node("SequenceInsert", ["before", more], ["after"])
    body = _body([insert, helper.make_node("Identity", ["go"], ["on"])], None)
    true = kit.program.constant(True, np.bool_)
    last = kit.do("Loop", "", true, kit.do("SequenceConstruct", more), body=body)
    return kit.sum(kit.do("ConcatFromSequence", last, axis=0))


def mapped(kit: Kit) -> str:
    """A turn for each of 10^6 elements."""
    turn = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("before", "after")]
    body = helper.make_graph(same(), "body", turn[:1], turn[1:])
    parts = kit.do("SplitToSequence", kit.many(10**6), kit.program.constant(1, np.int64))
    return kit.sum(kit.do("ConcatFromSequence", kit.do("SequenceMap", parts, body=body), axis=0))


def _body(nodes: Sequence[NodeProto], dtype: int | None) -> GraphProto:
    """The graph of a Loop that carries a tensor, or a sequence of tensors if there is no type."""

    def carried(name: str) -> ValueInfoProto:
        if dtype is None:
            return helper.make_tensor_sequence_value_info(name, TensorProto.FLOAT, None)
        return helper.make_tensor_value_info(name, dtype, None)

    turn, go, on = (
        helper.make_tensor_value_info(name, kind, [])
        for name, kind in (("turn", TensorProto.INT64), ("go", TensorProto.BOOL), ("on", TensorProto.BOOL))
    )
    return helper.make_graph(nodes, "body", [turn, go, carried("before")], [on, carried("after")])


Kind = Callable[[Kit], str]

KINDS: dict[str, Kind] = {
    "an endless Loop": lambda k: k.loop(same, k.scalar),
    "a Loop of 2^62 turns": lambda k: k.loop(same, k.scalar, k.program.constant(2**62, np.int64)),
    "a Loop that grows": lambda k: k.sum(k.loop(doubled, k.many(1))),
    "a Loop that leaves something behind": lambda k: k.loop(scanned, k.scalar, scanned=True),
    "a Loop that leaves much behind": lambda k: k.loop(scanned, k.many(2**20), scanned=True),
    "a Loop of Loops": lambda k: k.loop(looped, k.scalar),
    "a Loop in a branch": chosen,
    "a Scan of 10^8 turns": scan,
    "16 GiB": lambda k: k.sum(k.many(16 * GIB)),
    "12 times 1 GiB, one after the other": lambda k: k.do("Sum", *[k.sum(k.many(GIB)) for _ in range(12)]),
    "12 times 1 GiB at once": lambda k: together(k, lambda: k.many(GIB), 12),
    "60 times 64 MiB at once": lambda k: together(k, lambda: k.many(GIB // 16), 60),
    "a shape of 2^40 known late": lambda k: k.sum(k.do("Expand", k.scalar, unknown(k, 2**40))),
    "a Tile": lambda k: k.sum(k.do("Tile", k.many(1024), unknown(k, 2**26))),
    "a ConstantOfShape": lambda k: k.sum(k.do("ConstantOfShape", unknown(k, 2**36))),
    "a Range": ranged,
    "Concat that doubles 40 times": lambda k: k.sum(chain(k, "Concat", k.many(1), 40, axis=0)),
    "an outer product": lambda k: k.sum(k.do("MatMul", k.many(2**17, 1), k.many(1, 2**17))),
    "a sum that broadcasts": lambda k: k.sum(k.do("Add", k.many(2**17, 1), k.many(1, 2**17))),
    "a comparison that broadcasts": lambda k: k.sum(
        k.do("Cast", k.do("Less", k.many(2**18, 1), k.many(1, 2**18)), to=TensorProto.FLOAT)
    ),
    "a Pad": lambda k: k.sum(k.do("Pad", k.many(1), unknown(k, 0, 2**34))),
    "a OneHot": lambda k: k.sum(
        k.do("OneHot", k.one, unknown(k, 2**34), k.program.constant([0.0, 1.0], np.float32), axis=-1)
    ),
    "an EyeLike": lambda k: k.sum(k.do("EyeLike", k.do("ConstantOfShape", unknown(k, 2**17, 2**17)), dtype=1)),
    "an Einsum": lambda k: k.do("Einsum", k.many(2**12), k.many(2**12), k.many(2**12), equation="i,j,k->"),
    "a Gather of many": lambda k: k.sum(k.do("Gather", k.many(4), k.do("ConstantOfShape", unknown(k, 2**34)))),
    "a Resize": lambda k: k.sum(
        k.do("Resize", k.many(1, 1, 4, 4), "", "", unknown(k, 1, 1, 2**17, 2**17), mode="nearest")
    ),
    "a CumSum of 2^32": lambda k: k.sum(k.do("CumSum", k.many(2**32), k.program.constant(0, np.int64))),
    "a TopK of 2^32": lambda k: k.sum(k.do("TopK", k.many(2**32), k.number(1))),
    "a random tensor": lambda k: k.sum(k.do("RandomNormalLike", k.many(2**34))),
    "a chain of 400 products": lambda k: k.sum(chain(k, "MatMul", k.many(2048, 2048), 400)),
    "one product of a minute": lambda k: k.sum(k.do("MatMul", k.many(3000, 2**15), k.many(2**15, 3000))),
    "a Loop of products": lambda k: k.sum(
        k.loop(lambda: [helper.make_node("MatMul", ["before", "before"], ["after"])], k.many(1024, 1024))
    ),
    "12 GiB of constants": lambda k: together(k, lambda: folded(k, GIB), 12),
    "constants that double": lambda k: k.sum(chain(k, "Concat", folded(k, 1), 36, axis=0)),
    "a chain of 200 constant products": lambda k: k.sum(chain(k, "MatMul", folded(k, 2000, 2000), 200)),
    "200 constants of 15 MiB": lambda k: together(k, lambda: folded(k, 15 * 2**18), 200),
    "the least integer by -1": lambda k: k.do("Cast", k.do("Div", unknown(k, -(2**63)), k.do("Neg", k.one)), to=1),
    "texts that double 36 times": lambda k: k.sum(
        k.do("Cast", k.do("Shape", chain(k, "StringConcat", k.do("Cast", k.many(1), to=TensorProto.STRING), 36)), to=1)
    ),
    "a set of 2^27": lambda k: k.sum(k.do("Unique", k.many(2**27))),
    "batch_dims of -2^63": lambda k: k.sum(k.do("GatherND", k.many(4), k.number(0), batch_dims=-(2**63))),
    "frames of no length": lambda k: k.sum(k.do("STFT", k.many(1, 16, 1), k.number(4), k.many(0))),
    "a sequence of 10^7": lambda k: k.sum(
        k.do("ConcatFromSequence", k.do("SplitToSequence", k.many(10**7), k.program.constant(1, np.int64)), axis=0)
    ),
    "sequences of 60 times 256 MiB": lambda k: k.sum(
        k.do("ConcatFromSequence", k.do("SequenceConstruct", *[k.many(GIB // 4) for _ in range(60)]), axis=0)
    ),
    "a Loop in a function": function,
    "a Loop that collects a sequence": collected,
    "a map over 10^6 elements": mapped,
    "indices of 26 dimensions": lambda k: k.sum(k.do("Cast", k.do("NonZero", k.many(*[2] * 26)), to=1)),
    "one convolution of a minute": lambda k: k.sum(
        k.do("Conv", k.many(1, 64, 512, 512), k.many(64, 64, 31, 31), pads=[15] * 4)
    ),
    "one determinant of a minute": lambda k: k.do("Det", k.many(6000, 6000)),
    "1000 constants of 1 MB": lambda k: together(k, lambda: folded(k, 250_000), 1000),
}


def make_endless(folder: Path, kind: str) -> None:
    """Puts the `kind` into the program of the artifact in `folder`."""
    program = Program(folder)

    def nodes(x: str) -> list[NodeProto]:
        kit = Kit(program, x)
        nothing = kit.do("Mul", KINDS[kind](kit), program.constant(0.0))
        kit.do("Add", x, nothing)
        return kit.nodes

    program.through(str(program.find("AllReduce").output[0]), nodes)
    program.save()
