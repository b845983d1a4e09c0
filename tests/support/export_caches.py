"""Rewrites of a decoder's states: layouts, ranks, types, stacks, and caches of a fixed size that are written into.

Each returns whether it applies.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from tests.support.builder.parity import Case
from tests.support.exports import Array, Arrays, Cache, Dims, Export, shape_of

CAPACITY = 520
"""Positions of a static cache: as many as the planner prices."""
_END = np.iinfo(np.int64).max

Change = Callable[[Array], Array]


def layout(x: Export, rng: random.Random) -> bool:
    """Caches whose dimensions have another order, one for keys and one for values."""
    growing = _growing(x)
    perms = {rank: [rng.sample(range(rank), rank) for _ in range(2)] for rank in {len(_dims(x, c)) for c in growing}}
    for number, cache in enumerate(growing):
        _transpose(x, cache, perms[len(_dims(x, cache))][number % 2])
    return bool(growing)


def _transpose(x: Export, cache: Cache, perm: Sequence[int]) -> None:
    back = [perm.index(d) for d in range(len(perm))]
    _reform(
        x, cache, perm,
        lambda value: x.op("Transpose", [value], perm=back),
        lambda value: x.op("Transpose", [value], perm=perm),
        lambda array: array.transpose(perm),
    )  # fmt: skip


def unit_dimension(x: Export, rng: random.Random) -> bool:
    """Caches with one dimension of size 1 more."""
    growing = _growing(x)
    place = rng.randrange(4)
    axis = x.constant([place])
    for cache in growing:
        order: list[int | None] = list(range(len(_dims(x, cache))))
        order.insert(place, None)
        _reform(
            x, cache, order,
            lambda value: x.op("Squeeze", [value, axis]),
            lambda value: x.op("Unsqueeze", [value, axis]),
            lambda array: np.expand_dims(array, place),
        )  # fmt: skip
    return bool(growing)


def flat_heads(x: Export, _: random.Random) -> bool:
    """Caches with heads and their vectors in one dimension, where they are side by side."""
    done = False
    for cache in _growing(x):
        dims = _dims(x, cache)
        first = next((d for d in range(len(dims) - 1) if all(isinstance(dim, int) for dim in dims[d : d + 2])), None)
        if first is None or 1 in dims[first : first + 2] or shape_of(cache.past)[first + 1] != dims[first + 1]:
            continue
        if "past" in dims[first + 2 :] and not x.opset(14):
            continue  # a Reshape before allowzero takes a past of 0 there for a dimension to copy
        done = True
        _flatten(x, cache, first)
    return done


def half_type(x: Export, _: random.Random) -> bool:
    """Caches of float16, which attention reads in float32."""
    growing = [cache for cache in _growing(x) if cache.past.dtype is ir.DataType.FLOAT]
    for cache in growing:
        _reform(
            x, cache, list(range(len(_dims(x, cache)))),
            lambda value: x.op("Cast", [value], to=int(ir.DataType.FLOAT)),
            lambda value: x.op("Cast", [value], to=int(ir.DataType.FLOAT16)),
            lambda array: array.astype(np.float16), ir.DataType.FLOAT16,
        )  # fmt: skip
    x.cheaper |= bool(growing)
    x.tolerance = 2e-3 if growing else x.tolerance
    return bool(growing)


def stacked(x: Export, rng: random.Random) -> bool:
    """Several caches in one tensor, stacked in a new dimension: all, those of a layer, or keys and values apart."""
    growing = _growing(x)
    alike = {(_dims(x, cache), str(cache.past.dtype), str(shape_of(cache.past))) for cache in growing}
    if len(growing) < 2 or len(alike) != 1:
        return False
    how = rng.choice(("all", "layer", "kind"))
    groups = {"all": [growing], "layer": [growing[i : i + 2] for i in range(0, len(growing), 2)]}
    groups["kind"] = [growing[::2], growing[1::2]]
    axis = rng.choice((0, 0, 1))
    for group in groups[how]:
        if len(group) > 1:
            _stack(x, group, axis, rng.random() < 0.5)
    return True


def joined(x: Export, rng: random.Random) -> bool:
    """Keys and values of a layer in one tensor, one after the other in a dimension of fixed size."""
    growing = _growing(x)
    done = False
    for key, value in zip(growing[::2], growing[1::2], strict=False):
        dims = _dims(x, key)
        static = [d for d, dim in enumerate(dims) if isinstance(dim, int) and dim > 1]
        if (
            dims == _dims(x, value)
            and static
            and shape_of(key.past) == shape_of(value.past)
            and key.past.dtype is value.past.dtype
        ):
            _join(x, [key, value], static[0])
            done = True
    return done


def written(x: Export, rng: random.Random) -> bool:
    """Caches of a fixed size, into which new positions are written behind a number of old ones."""
    growing = _growing(x)
    forms = ["slices", "nd", *(["tensor"] if x.opset(24) else [])]
    if not growing or "past" in x.sizes:
        return False
    form, length = rng.choice(forms), x.add_input(x.fresh("past_length"), (1,), ir.DataType.INT64)
    name = str(length.name)
    if form == "tensor" and any(_dims(x, cache)[0] != "batch" for cache in growing):
        form = "slices"
    for cache in growing:
        _write(x, cache, length, form)
    x.translate(lambda arrays, case: arrays.update({name: np.array([case.past])}))
    return True


# -- what several share --------------------------------------------------------------------------------------------


def _growing(x: Export) -> list[Cache]:
    return [cache for cache in x.caches if "past" in _dims(x, cache)]


def _dims(x: Export, cache: Cache) -> Dims:
    return x.dims[str(cache.past.name)]


def _ordered(values: Sequence[int | str | None], order: Sequence[int | None]) -> list[int | str | None]:
    return [1 if d is None else values[d] for d in order]


def _reform(
    x: Export,
    cache: Cache,
    order: Sequence[int | None],
    inward: Callable[[ir.Value], ir.Value],
    outward: Callable[[ir.Value], ir.Value],
    change: Change,
    dtype: ir.DataType | None = None,
) -> None:
    """Give a cache another form, whose dimension d is the old one's `order[d]`, or a new one of size 1."""
    old, name, wanted = cache.past, str(cache.past.name), dtype or cache.past.dtype
    assert wanted is not None
    dims: Dims = tuple(d for d in _ordered(x.dims[name], order) if d is not None)
    new = x.add_input(name, dims, wanted, _ordered(shape_of(old), order))
    x.replace_input(old, new, inward(new))
    cache.past = new
    result, shown = str(cache.present.name), cache.present
    after: Dims = tuple(d for d in _ordered(x.dims[result], order) if d is not None)
    outer = outward(shown)
    outer.type = ir.TensorType(wanted)
    x.replace_output(shown, outer, after, _ordered(shape_of(shown), order))
    cache.present = outer
    x.translate(_each(name, change), _each(result, change))


def _flatten(x: Export, cache: Cache, first: int) -> None:
    """Make one dimension of two."""
    old, shown = cache.past, cache.present
    name, result = str(old.name), str(shown.name)
    two = x.dims[name][first : first + 2]
    product = int(two[0]) * int(two[1])
    rank = len(x.dims[name])
    assert old.dtype is not None

    def flat(values: Sequence[int | str | None]) -> list[int | str | None]:
        return [*values[:first], product, *values[first + 2 :]]

    def sizes(value: ir.Value, rank: int, behind: int, middle: Sequence[int]) -> ir.Value:
        shape = x.op("Shape", [value])
        parts = [x.op("Slice", [shape, x.constant([0]), x.constant([first])])] if first else []
        parts.append(x.constant(middle))
        if behind < rank:
            parts.append(x.op("Slice", [shape, x.constant([behind]), x.constant([rank])]))
        return x.op("Concat", parts, axis=0)  # type: ignore[no-any-return]

    dims: Dims = tuple(d for d in flat(x.dims[name]) if d is not None)
    after: Dims = tuple(d for d in flat(x.dims[result]) if d is not None)
    new = x.add_input(name, dims, old.dtype, flat(shape_of(old)))
    zero: dict[str, Any] = {"allowzero": 1} if x.opset(14) else {}
    x.replace_input(old, new, x.op("Reshape", [new, sizes(new, rank - 1, first + 1, [int(d) for d in two])], **zero))
    outer = x.op("Reshape", [shown, sizes(shown, rank, first + 2, [product])])
    outer.type = ir.TensorType(old.dtype)
    x.replace_output(shown, outer, after, flat(shape_of(shown)))
    cache.past, cache.present = new, outer

    def change(array: Array) -> Array:
        return array.reshape(*array.shape[:first], product, *array.shape[first + 2 :])

    x.translate(_each(name, change), _each(result, change))


def _each(name: str, change: Change) -> Callable[[Arrays, Case], None]:
    def translation(arrays: Arrays, _: Case) -> None:
        arrays[name] = np.ascontiguousarray(change(arrays[name]))

    return translation


def _stack(x: Export, group: Sequence[Cache], axis: int, by_gather: bool) -> None:
    first = group[0]
    names, results = [str(c.past.name) for c in group], [str(c.present.name) for c in group]
    dims, after = list(_dims(x, first)), list(x.dims[results[0]])
    shape, late = shape_of(first.past), shape_of(first.present)
    for values in (dims, after, shape, late):
        values.insert(axis, len(group))
    assert first.past.dtype is not None
    stack = x.add_input(names[0], tuple(dims), first.past.dtype, shape)
    if by_gather:
        parts = [x.op("Gather", [stack, x.constant(i)], axis=axis) for i in range(len(group))]
    else:
        sizes = x.constant([1] * len(group))
        pieces = x.op("Split", [stack, sizes], outputs=len(group), axis=axis)
        parts = [x.op("Squeeze", [piece, x.constant([axis])]) for piece in pieces]
    _merge(x, group, stack, parts)
    rows = [x.op("Unsqueeze", [cache.present, x.constant([axis])]) for cache in group]
    _merge_outputs(x, group, x.op("Concat", rows, axis=axis), tuple(after), late)
    x.translate(_together(names, lambda a: np.stack(a, axis)), _together(results, lambda a: np.stack(a, axis)))
    x.caches = [c for c in x.caches if c not in group]
    x.caches.append(Cache(past=stack, present=next(v for v in x.graph.outputs if v.name == results[0])))


def _join(x: Export, group: Sequence[Cache], axis: int) -> None:
    first = group[0]
    names, results = [str(c.past.name) for c in group], [str(c.present.name) for c in group]
    size = int(_dims(x, first)[axis])
    dims, after = list(_dims(x, first)), list(x.dims[results[0]])
    shape, late = shape_of(first.past), shape_of(first.present)
    for values in (dims, after, shape, late):
        values[axis] = size * len(group)
    assert first.past.dtype is not None
    whole = x.add_input(names[0], tuple(dims), first.past.dtype, shape)
    parts = x.op("Split", [whole, x.constant([size] * len(group))], outputs=len(group), axis=axis)
    _merge(x, group, whole, list(parts))
    _merge_outputs(x, group, x.op("Concat", [c.present for c in group], axis=axis), tuple(after), late)
    x.translate(
        _together(names, lambda a: np.concatenate(a, axis)), _together(results, lambda a: np.concatenate(a, axis))
    )
    x.caches = [c for c in x.caches if c not in group]
    x.caches.append(Cache(past=whole, present=next(v for v in x.graph.outputs if v.name == results[0])))


def _merge(x: Export, group: Sequence[Cache], whole: ir.Value, parts: Sequence[ir.Value]) -> None:
    """Let the inputs of a group be parts of one input."""
    for number, (cache, part) in enumerate(zip(group, parts, strict=True)):
        x.replace_input(cache.past, whole if number == 0 else None, part)


def _merge_outputs(
    x: Export, group: Sequence[Cache], whole: ir.Value, dims: Dims, shape: Sequence[int | str | None]
) -> None:
    """Let one output take the place of a group's."""
    for cache in group[1:]:
        x.graph.outputs.remove(cache.present)
        x.dims.pop(str(cache.present.name))
        cache.present.name = x.fresh("inner")
    assert group[0].present.dtype is not None
    whole.type = ir.TensorType(group[0].present.dtype)
    x.replace_output(group[0].present, whole, dims, shape)


def _together(names: Sequence[str], change: Callable[[list[Array]], Array]) -> Callable[[Arrays, Case], None]:
    def translation(arrays: Arrays, _: Case) -> None:
        arrays[names[0]] = change([arrays.pop(name) for name in names])

    return translation


def _write(x: Export, cache: Cache, length: ir.Value, form: str) -> None:
    name, result, dims = str(cache.past.name), str(cache.present.name), _dims(x, cache)
    axis = dims.index("past")
    sizes: Dims = tuple(CAPACITY if d == axis else dim for d, dim in enumerate(dims))
    shape = [CAPACITY if d == axis else dim for d, dim in enumerate(shape_of(cache.past))]
    assert cache.past.dtype is not None
    buffer = x.add_input(name, sizes, cache.past.dtype, shape)
    zero, axes, end = x.constant([0]), x.constant([axis]), x.constant([_END])
    x.replace_input(cache.past, buffer, x.op("Slice", [buffer, zero, length, axes]))
    fresh = x.op("Slice", [cache.present, length, end, axes])
    match form:
        case "slices":
            count = x.op("Gather", [x.op("Shape", [cache.present]), axes])
            before = x.op("Slice", [buffer, zero, length, axes])
            after = x.op("Concat", [before, fresh, x.op("Slice", [buffer, count, end, axes])], axis=axis)
        case "nd":
            perm = [axis, *(d for d in range(len(dims)) if d != axis)]
            back = [perm.index(d) for d in range(len(perm))]
            total = x.op("Squeeze", [x.op("Gather", [x.op("Shape", [cache.present]), axes]), zero])
            rows = x.op("Range", [x.op("Squeeze", [length, zero]), total, x.constant(1)])
            rows = x.op("Unsqueeze", [rows, x.constant([1])])
            turned = [x.op("Transpose", [value], perm=perm) for value in (buffer, fresh)]
            after = x.op("Transpose", [x.op("ScatterND", [turned[0], rows, turned[1]])], perm=back)
        case _:
            batch = x.op("Gather", [x.op("Shape", [buffer]), zero])
            after = x.op("TensorScatter", [buffer, fresh, x.op("Expand", [length, batch])], axis=axis)
    after.type = ir.TensorType(cache.past.dtype)
    x.replace_output(cache.present, after, sizes, shape)
    cache.past, cache.present = buffer, after

    def roomy(arrays: Arrays, _: Case) -> None:
        old = arrays[name]
        arrays[name] = np.full([CAPACITY if d == axis else n for d, n in enumerate(old.shape)], 0.5, old.dtype)
        arrays[name][(slice(None),) * axis + (slice(0, old.shape[axis]),)] = old

    def filled(arrays: Arrays, case: Case) -> None:
        new = arrays[result]
        arrays[result] = np.full([CAPACITY if d == axis else n for d, n in enumerate(new.shape)], 0.5, new.dtype)
        arrays[result][(slice(None),) * axis + (slice(0, new.shape[axis]),)] = new

    x.translate(roomy, filled)
