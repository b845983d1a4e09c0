"""Rewrites of what a decoder takes beside its states, and of what it gives: names, tokens, masks, positions, scores.

Each returns whether it applies.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from tests.support.builder.parity import Case
from tests.support.exports import Array, Arrays, Dims, Export, Translation, dtype_of, shape_of

_FLOAT, _INT64, _INT32, _BOOL = ir.DataType.FLOAT, ir.DataType.INT64, ir.DataType.INT32, ir.DataType.BOOL
_HIDDEN = -1e9


def names(x: Export, rng: random.Random) -> bool:
    """Names that say nothing, in one of a few styles."""
    style = rng.choice(("x{}", "input.{}", "onnx::In_{}", "t{}_0", "serving_default_args_{}:0"))
    numbers = rng.sample(range(100), len(x.graph.inputs) + len(x.graph.outputs))
    values = [*x.graph.inputs, *x.graph.outputs]
    found = {str(v.name): style.format(n) for v, n in zip(values, numbers, strict=True)}
    for value in values:
        value.name = found[str(value.name)]
    x.dims = {found.get(name, name): dims for name, dims in x.dims.items()}

    def renamed(arrays: Arrays, _: Case) -> None:
        moved = {found.get(name, name): array for name, array in arrays.items()}
        arrays.clear()
        arrays.update(moved)

    x.translate(renamed, renamed)
    return True


def symbols(x: Export, rng: random.Random) -> bool:
    """Other symbols: none at all, one for each dimension, or one for each meaning."""
    style = rng.choice(("none", "each", "meaning", "sums"))
    chosen = dict(
        zip(("batch", "sequence", "past", "total"), rng.sample(("s0", "u7", "N", "L", "n_1", "?q"), 4), strict=True)
    )
    if style == "sums":
        chosen["total"] = f"{chosen['past']} + {chosen['sequence']}"
    for value in (*x.graph.inputs, *x.graph.outputs):
        dims: list[int | str | None] = []
        assert value.shape is not None
        for d, (dim, kind) in enumerate(zip(value.shape, x.dims[str(value.name)], strict=True)):
            fixed = dim if isinstance(dim, int) else None
            unnamed = None if style == "none" else f"d{abs(hash((str(value.name), d))) % 10**6}"
            other = chosen.get(str(kind), unnamed) if style in ("meaning", "sums") else unnamed
            dims.append(other if fixed is None else fixed)
        value.shape = ir.Shape(dims)
    return True


def order(x: Export, rng: random.Random) -> bool:
    """Inputs and outputs in another order."""
    for values in (x.graph.inputs, x.graph.outputs):
        shuffled = rng.sample(list(values), len(values))
        values.clear()
        values.extend(shuffled)
    return True


def batch_size(x: Export, rng: random.Random) -> bool:
    """A fixed number of sequences."""
    size = 1 if x.one_by_one else rng.choice((1, 1, 2, 4))
    x.dearer = size > 1
    return _fixed(x, {"batch": size})


def one_position(x: Export, _: random.Random) -> bool:
    """One new position in every step."""
    return _fixed(x, {"sequence": 1})


def all_sizes(x: Export, rng: random.Random) -> bool:
    """Every size fixed, also those of the past and of the step."""
    counted = any("length" in name for name in x.dims)
    if counted or not any("past" in x.dims[str(value.name)] for value in x.graph.inputs):
        return False
    x.cheaper, x.steps = True, False
    batch = x.sizes.get("batch", 1)
    return _fixed(x, {"batch": batch, "sequence": x.sizes.get("sequence", rng.choice((1, 1, 4))), "past": 7})


def _fixed(x: Export, sizes: dict[str, int]) -> bool:
    x.sizes |= sizes
    if {"past", "sequence"} <= x.sizes.keys():
        x.sizes["total"] = x.sizes["past"] + x.sizes["sequence"]
    for value in (*x.graph.inputs, *x.graph.outputs):
        assert value.shape is not None
        kinds = x.dims[str(value.name)]
        value.shape = ir.Shape([x.sizes.get(str(kind), dim) for dim, kind in zip(value.shape, kinds, strict=True)])
    return True


# -- tokens --------------------------------------------------------------------------------------------------------


def narrow_tokens(x: Export, _: random.Random) -> bool:
    """Token ids of 32 bits."""
    return x.tokens is not None and _typed(x, x.tokens, _INT32, "tokens")


def time_first(x: Export, _: random.Random) -> bool:
    """Tokens and scores with the batch in the second dimension."""
    if x.tokens is None or len(x.dims[str(x.logits.name)]) != 3:
        return False
    old, name = x.tokens, str(x.tokens.name)
    assert old.shape is not None
    assert x.logits.shape is not None
    assert old.dtype is not None
    dims, shape = x.dims[name][::-1], shape_of(old)[::-1]
    x.tokens = x.add_input(name, dims, old.dtype, shape)
    x.replace_input(old, x.tokens, x.op("Transpose", [x.tokens], perm=[1, 0]))
    scores = str(x.logits.name)
    (batch, sequence, width), (b, s, w) = x.dims[scores], shape_of(x.logits)
    logits = x.op("Transpose", [x.logits], perm=[1, 0, 2])
    x.replace_output(x.logits, logits, (sequence, batch, width), (s, b, w))
    x.logits = logits
    x.translate(_changed(name, lambda a: a.T), _changed(scores, lambda a: a.transpose(1, 0, 2)))
    return True


def embeddings(x: Export, _: random.Random) -> bool:
    """Vectors in the place of token ids."""
    if x.tokens is None or len(x.dims[str(x.tokens.name)]) != 2 or x.dims[str(x.tokens.name)][0] == "sequence":
        return False
    old, name = x.tokens, str(x.tokens.name)
    lookups = [(node, port) for node, port in old.uses() if node.op_type == "Gather" and port == 1]
    others = [node for node, _ in old.uses() if node.op_type not in ("Gather", "Shape")]
    if len(lookups) != 1 or others:
        return False
    table = lookups[0][0].inputs[0]
    if table is None or table.const_value is None or lookups[0][0].attributes.get_int("axis", 0) != 0:
        return False
    rows = table.const_value.numpy()
    assert old.shape is not None
    dims: Dims = (*x.dims[name], rows.shape[1])
    vectors = x.add_input(
        x.fresh("embeds") if name.startswith("x") else "inputs_embeds", dims, _FLOAT, (*shape_of(old), rows.shape[1])
    )
    lookup = lookups[0][0].outputs[0]
    for node in [reader for reader, __ in old.uses()]:
        if node.op_type == "Shape":
            sizes = x.op("Shape", [vectors])
            two = x.op("Slice", [sizes, x.constant([0]), x.constant([2])])
            first, behind = node.attributes.get_int("start", 0), node.attributes.get_int("end", 2)
            if (first, behind) != (0, 2):
                two = x.op("Slice", [two, x.constant([first]), x.constant([behind])])
            node.outputs[0].replace_all_uses_with(two)
            x.graph.remove(node, safe=True)
    lookup.replace_all_uses_with(vectors)
    x.graph.remove(lookups[0][0], safe=True)
    x.replace_input(old, vectors, vectors)
    x.tokens, x.cheaper, new = None, True, str(vectors.name)

    def looked_up(arrays: Arrays, _: Case) -> None:
        arrays[new] = rows[arrays.pop(name)]

    x.translate(looked_up)
    return True


def unread_input(x: Export, rng: random.Random) -> bool:
    """An input that no node reads."""
    if any("unread" in name for name in x.dims):
        return False
    name = x.fresh("unread")
    dims: Dims = rng.choice([("batch", "sequence"), ("batch", 3), (1,)])
    x.add_input(name, dims, _INT64, [_dim_of(x, dim) for dim in dims])

    def given(arrays: Arrays, case: Case) -> None:
        arrays[name] = np.zeros([case.sizes[d] if isinstance(d, str) else d for d in dims], dtype=np.int64)

    x.translate(given)
    return True


def _dim_of(x: Export, dim: int | str) -> int | str | None:
    """The size or symbol that inputs have for a dimension of this meaning."""
    if isinstance(dim, int):
        return dim
    for value in x.graph.inputs:
        if dim in x.dims[str(value.name)]:
            assert value.shape is not None
            found = value.shape[x.dims[str(value.name)].index(dim)]
            return found if isinstance(found, int) else found.value
    return dim


# -- masks ---------------------------------------------------------------------------------------------------------


def mask_type(x: Export, rng: random.Random) -> bool:
    """A mask of another type."""
    return x.mask is not None and _typed(x, x.mask, rng.choice((_INT32, _BOOL, _FLOAT)), "mask")


def square_mask(x: Export, rng: random.Random) -> bool:
    """A mask of new positions by all, of each sequence or of all at once, added or true where a key is seen."""
    if x.tokens is None or x.mask is None or len(x.dims[str(x.mask.name)]) != 2 or x.mask.dtype is None:
        return False
    old, name, added = x.mask, str(x.mask.name), rng.random() < 0.5
    assert old.shape is not None
    front: Dims = rng.choice((("batch", 1), ("batch",), (1, 1), ()))
    dims: Dims = (*front, "sequence", "total")
    batch, total = shape_of(old)
    new = x.add_input(
        name,
        dims,
        _FLOAT if added else _BOOL,
        (*(batch if dim == "batch" else dim for dim in front), _dim_of(x, "sequence"), total),
    )
    end = x.constant([np.iinfo(np.int64).max])
    last = x.op("Slice", [new, x.constant([-1]), end, x.constant([len(front)])])
    row = x.op("Squeeze", [last, x.constant([d for d, dim in enumerate(dims) if dim in (1, "sequence")])])
    if "batch" not in front:
        assert x.tokens is not None
        size = _size(x, x.tokens, x.dims[str(x.tokens.name)].index("batch"))
        row = x.op("Expand", [row, x.op("Concat", [size, x.constant([1])], axis=0)])
    seen = x.op("GreaterOrEqual", [row, x.constant(-1.0, np.float32)]) if added else row
    inner = seen if old.dtype is _BOOL else x.op("Cast", [seen], to=int(dtype_of(old)))
    x.replace_input(old, new, inner)
    x.mask = new

    def made(arrays: Arrays, case: Case) -> None:
        keys, rows = np.arange(case.past + case.sequence), np.arange(case.past, case.past + case.sequence)
        lead = tuple(case.batch if dim == "batch" else 1 for dim in front)
        shown = np.broadcast_to(keys <= rows[:, None], (*lead, case.sequence, len(keys)))
        arrays[name] = np.where(shown, 0, _HIDDEN).astype(np.float32) if added else shown.copy()

    x.translate(made)
    return True


def no_mask(x: Export, rng: random.Random) -> bool:
    """No mask: ones are made of the number of positions, which is an input, or follows from a cache."""
    if x.mask is None or len(x.dims[str(x.mask.name)]) != 2 or x.mask.dtype is None or x.tokens is None:
        return False
    old, name = x.mask, str(x.mask.name)
    if "past" not in x.sizes and rng.random() < 0.5:
        rank = rng.choice((0, 1))
        length = x.add_input(x.fresh("length"), (1,) * rank, _INT64)
        total = x.op("Reshape", [length, x.constant([1])])
        new = str(length.name)

        def counted(arrays: Arrays, case: Case) -> None:
            arrays.pop(name)
            arrays[new] = np.full((1,) * rank, case.past + case.sequence)

        x.translate(counted)
        x.replace_input(old, length, _ones(x, old, total))
    else:
        past = _past_size(x)
        if past is None:
            return False
        total = x.op("Add", [past, _size(x, x.tokens, x.dims[str(x.tokens.name)].index("sequence"))])
        x.translate(lambda arrays, _: arrays.__delitem__(name))
        x.replace_input(old, None, _ones(x, old, total))
    x.mask = None
    return True


def _ones(x: Export, old: ir.Value, total: ir.Value) -> ir.Value:
    assert x.tokens is not None
    assert old.dtype is not None
    places = x.dims[str(x.tokens.name)]
    batch = _size(x, x.tokens, places.index("batch"))
    shape = x.op("Concat", [batch, total], axis=0)
    ones = x.op("ConstantOfShape", [shape], value=ir.tensor(np.array([1], dtype=np.int64)))
    return ones if old.dtype is _INT64 else x.op("Cast", [ones], to=int(old.dtype))  # type: ignore[no-any-return]


def _size(x: Export, value: ir.Value, d: int) -> ir.Value:
    """A dimension of a value, as a vector of one element."""
    return x.op("Gather", [x.op("Shape", [value]), x.constant([d])])  # type: ignore[no-any-return]


def _past_size(x: Export) -> ir.Value | None:
    for cache in x.caches:
        if "past" in x.dims.get(str(cache.past.name), ()):
            return _size(x, cache.past, x.dims[str(cache.past.name)].index("past"))
    return None


# -- positions -----------------------------------------------------------------------------------------------------


def position_type(x: Export, _: random.Random) -> bool:
    """Positions of 32 bits."""
    return x.positions is not None and _typed(x, x.positions, _INT32, "positions")


def position_rows(x: Export, rng: random.Random) -> bool:
    """Positions with several rows, of which one is read."""
    if x.positions is None or x.positions.dtype is None or len(x.dims[str(x.positions.name)]) != 2:
        return False
    old, name, rows = x.positions, str(x.positions.name), rng.choice((2, 3, 4))
    assert old.shape is not None
    assert old.dtype is not None
    new = x.add_input(name, (rows, *x.dims[name]), old.dtype, (rows, *shape_of(old)))
    if rng.random() < 0.5:
        inner = x.op("Gather", [new, x.constant(rng.randrange(rows))], axis=0)
    else:
        row = rng.randrange(rows)
        part = x.op("Slice", [new, x.constant([row]), x.constant([row + 1]), x.constant([0])])
        inner = x.op("Squeeze", [part, x.constant([0])])
    x.replace_input(old, new, inner)
    x.positions = new
    x.translate(_changed(name, lambda a: np.stack([a] * rows)))
    return True


def position_vector(x: Export, _: random.Random) -> bool:
    """One row of positions for all sequences."""
    if x.positions is None or x.tokens is None or x.dims[str(x.tokens.name)][0] == "sequence":
        return False
    old, name = x.positions, str(x.positions.name)
    if len(x.dims[name]) != 2 or old.dtype is None:
        return False
    assert old.shape is not None
    new = x.add_input(name, x.dims[name][1:], old.dtype, shape_of(old)[1:])
    x.replace_input(old, new, x.op("Expand", [new, x.op("Shape", [x.tokens])]))
    x.positions = new
    x.translate(_changed(name, lambda a: a[0]))
    return True


def no_positions(x: Export, rng: random.Random) -> bool:
    """Positions that follow from the past: from a cache, from the mask, or from a number that is an input."""
    if x.positions is None or x.tokens is None or x.positions.dtype is not _INT64:
        return False
    old, name = x.positions, str(x.positions.name)
    dims = x.dims[name]
    if len(dims) not in (2, 3) or x.dims[str(x.tokens.name)][0] == "sequence":
        return False
    kind = rng.choice(("cache", "mask", *(() if "past" in x.sizes else ("number",))))
    new_positions = _size(x, x.tokens, 1)
    length: ir.Value | None = None
    if kind == "number":
        length = x.add_input(x.fresh("past_length"), (1,), _INT64)
        past: ir.Value | None = length
    elif kind == "mask" and x.mask is not None and x.dims[str(x.mask.name)][-1] == "total":
        past = x.op("Sub", [_size(x, x.mask, len(x.dims[str(x.mask.name)]) - 1), new_positions])
    else:
        past = _past_size(x)
    if past is None:
        return False
    zero, one = x.constant([0]), x.constant([1])
    start = x.op("Squeeze", [past, zero])
    end = x.op("Squeeze", [x.op("Add", [past, new_positions]), zero])
    row = x.op("Range", [start, end, x.op("Squeeze", [one, zero])])
    shape = x.op("Shape", [x.tokens])
    if len(dims) == 3:
        shape = x.op("Concat", [x.constant([dims[0]]), shape], axis=0)
    x.replace_input(old, length, x.op("Expand", [row, shape]))
    x.positions, new = None, None if length is None else str(length.name)

    def counted(arrays: Arrays, case: Case) -> None:
        arrays.pop(name)
        if new is not None:
            arrays[new] = np.array([case.past])

    x.translate(counted)
    return True


# -- scores --------------------------------------------------------------------------------------------------------


def last_scores(x: Export, rng: random.Random) -> bool:
    """Scores of the last position only."""
    name = str(x.logits.name)
    dims = x.dims[name]
    if len(dims) != 3 or dims[0] == "sequence" or dims[1] != "sequence":
        return False
    assert x.logits.shape is not None
    if rng.random() < 0.5:
        last = x.op("Gather", [x.logits, x.constant(-1)], axis=1)
        x.replace_output(x.logits, last, (dims[0], dims[2]), (shape_of(x.logits)[0], shape_of(x.logits)[2]))
        x.translate(outputs=_changed(name, lambda a: a[:, -1]))
    else:
        last = x.op("Slice", [x.logits, x.constant([-1]), x.constant([np.iinfo(np.int64).max]), x.constant([1])])
        x.replace_output(x.logits, last, (dims[0], 1, dims[2]), (shape_of(x.logits)[0], 1, shape_of(x.logits)[2]))
        x.translate(outputs=_changed(name, lambda a: a[:, -1:]))
    x.logits = last
    return True


def turned_scores(x: Export, rng: random.Random) -> bool:
    """Scores with the vocabulary elsewhere, or with the positions of all sequences in one dimension."""
    name = str(x.logits.name)
    dims, shape = x.dims[name], shape_of(x.logits)
    if len(dims) != 3 or dims[:2] != ("batch", "sequence"):
        return False
    order = rng.choice(((0, 2, 1), (1, 0, 2), (2, 0, 1), (1, 2, 0), None))
    if order is None:
        turned = x.op("Flatten", [x.logits], axis=2)
        x.replace_output(x.logits, turned, ("rows", dims[2]), (None, shape[2]))
        x.translate(outputs=_changed(name, lambda a: a.reshape(-1, a.shape[2])))
    else:
        turned = x.op("Transpose", [x.logits], perm=list(order))
        x.replace_output(x.logits, turned, tuple(dims[d] for d in order), [shape[d] for d in order])
        x.translate(outputs=_changed(name, lambda a: a.transpose(order)))
    x.logits = turned
    return True


# -- what several share --------------------------------------------------------------------------------------------


def _typed(x: Export, old: ir.Value, dtype: ir.DataType, field: str) -> bool:
    if old.dtype is dtype or old.dtype is None or old.dtype is ir.DataType.BOOL:
        return False
    name, numbers = str(old.name), dtype.numpy()
    assert old.shape is not None
    new = x.add_input(name, x.dims[name], dtype, shape_of(old))
    x.replace_input(old, new, x.op("Cast", [new], to=int(old.dtype)))
    setattr(x, field, new)
    x.translate(_changed(name, lambda a: a.astype(numbers)))
    return True


def _changed(name: str, change: Callable[[Array], Array]) -> Translation:
    def translation(arrays: Arrays, _: Case) -> None:
        arrays[name] = np.ascontiguousarray(change(arrays[name]))

    return translation
