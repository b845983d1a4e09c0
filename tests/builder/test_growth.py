"""Which dimension of a cache grows, seen through the forms that exporters give it."""

from __future__ import annotations

import onnx_ir as ir
import pytest

from furiosa_llm.builder.shapes.growth import growing_dim
from tests.builder.test_traps import ints
from tests.support.builder.graphs import model

_INPUTS = "float[b, p, 8] cache, float[b, 1, 2, 4] fresh"
_GROWN = "h = Reshape(cache, shape) present = Concat<axis = 1>(h, fresh)"
_SIZES = "s = Shape(cache) "
_WEIGHTS = {"start": ints(0), "two": ints(2), "heads": ints(2, 4), "one": ints(1), "far": ints(7)}


def _grown(nodes: str, **shape: tuple[int, ...]) -> int | None:
    weights = {**_WEIGHTS, **{name: ints(*numbers) for name, numbers in shape.items()}}
    read = {name: array for name, array in weights.items() if name in nodes}
    proto = model(_INPUTS, "float[b, t, 2, 4] present", nodes, read)
    return growing_dim(ir.from_proto(proto).graph.inputs[0])


@pytest.mark.parametrize(
    ("nodes", "expected"),
    [
        ("front = Slice(s, start, two) shape = Concat<axis = 0>(front, heads) ", 1),
        ("b = Gather(s, start) p = Gather(s, one) shape = Concat<axis = 0>(b, p, heads) ", 1),
        ("front = Shape<start = 0, end = 2>(cache) shape = Concat<axis = 0>(front, heads) ", 1),
        ("front = Cast<to = 7>(s) b = Slice(front, start, two) shape = Concat<axis = 0>(b, heads) ", 1),
        ("b = Gather(s, start) p = Gather(s, far) shape = Concat<axis = 0>(b, p, heads) ", None),
        ("p = Gather(s, one) f = Shape(fresh) b = Gather(f, start) shape = Concat<axis = 0>(b, p, heads) ", 1),
        ("many = ConstantOfShape(s) n = Shape(many) shape = Concat<axis = 0>(n, heads) ", None),
        ("o = Shape(fresh) front = Slice(o, start, two) shape = Concat<axis = 0>(front, heads) ", None),
    ],
)
def test_a_reshape_keeps_the_sizes_that_it_takes_from_its_input(nodes: str, expected: int | None) -> None:
    assert _grown(_SIZES + nodes + _GROWN) == expected


def test_a_reshape_keeps_dimensions_by_zeros() -> None:
    assert _grown(_GROWN, shape=(0, 0, 2, 4)) == 1
    assert _grown(_GROWN, shape=(0, -1, 2, 4)) is None
    assert _grown(_GROWN.replace("Reshape(", "Reshape<allowzero = 1>("), shape=(0, 0, 2, 4)) is None


def test_what_is_computed_of_shapes_takes_no_time() -> None:
    doubled = " ".join(f"d{n + 1} = Concat<axis = 0>(d{n}, d{n})" for n in range(60))
    assert _grown(f"d0 = Shape(cache) {doubled} shape = Gather(d60, start) {_GROWN}") is None
    long = " ".join(f"a{n + 1} = Identity(a{n})" for n in range(3000))
    assert _grown(f"a0 = Shape(cache) {long} shape = Concat<axis = 0>(a3000, heads) {_GROWN}") is None
