"""What each dimension of the graph's inputs is, and the sizes to probe them with.

The same symbol is the same size, wherever it stands. What a symbol means follows from the roles of the inputs in which
it stands (see `furiosa_llm.builder.shapes.roles`): tokens are [batch, sequence], a state grows in past, a mask ends in
total. The meaning of any other symbol follows from its place.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Iterator, Mapping

import onnx_ir as ir

from furiosa_llm.builder.errors import OptionError, ShapeError
from furiosa_llm.builder.shapes.growth import batch_dim, growing_dim, is_written
from furiosa_llm.builder.shapes.roles import GIVEN, LENGTHS, Role, find_roles, has_roles, inferred_role, settle_role
from furiosa_llm.builder.shapes.roles import role_of as role_of


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SizeSet:
    """One choice of sizes for the dynamic dimensions."""

    batch: int
    sequence: int
    past: int
    encoder: int
    others: tuple[int, ...]
    """Sizes for the dimensions of which nothing is known, in order of appearance."""

    @property
    def total(self) -> int:
        """Positions after the step."""
        return self.past + self.sequence


PROBE = SizeSet(batch=5, sequence=7, past=11, encoder=13, others=(19, 23, 29, 31, 37, 41, 43, 47))
SECOND_PROBE = SizeSet(batch=3, sequence=5, past=17, encoder=29, others=(53, 59, 61, 67, 71, 73, 79, 83))
"""Both are distinct primes: a product shows its factors, and a size that differs between the two is dynamic."""

_COUNTS = frozenset((ir.DataType.INT32, ir.DataType.INT64))
_SUM = re.compile(r"\s*([^\s+*/()-]+)\s*\+\s*([^\s+*/()-]+)\s*")
"""A symbol that is written as the sum of two others."""
_BATCH_LAST = "furiosa_llm.batch_last"
_FIXED_TOTAL = re.compile(r"past \+ (\d+)")


def dimension_kinds(
    graph: ir.Graph, given: Mapping[str, int], config: Mapping[str, object]
) -> dict[str, tuple[int | str, ...]]:
    """For each graph input its dimensions: a size, or one of batch, sequence, past, total, encoder, or another name.

    `given` are sizes that the user gave for symbols or for `input.symbol`; `config` is the model's config.json, which
    states the image size of vision models.
    """
    if not has_roles(graph):
        find_roles(graph, {})
    for value in graph.inputs:
        if value.shape is None:
            raise ShapeError(
                f'input "{value.name}" has no shape, not even its number of dimensions; '
                "export the model with dynamic axes instead of unknown ones."
            )
    if _BATCH_LAST not in graph.meta:
        settle_batch_last(graph, batch_last=_shows_batch_last(graph))
    sizes = _given_sizes(graph, given)
    known = _known(graph, sizes)
    symbols: dict[str, str] = {}
    for key in sorted(known, key=lambda key: _RANK[known[key][1]]):
        symbol = _symbol(key)
        if symbol is not None:
            symbols.setdefault(symbol, known[key][0])
    _settle_lengths(graph, symbols)
    _settle_lone_position(graph)
    inner = {s for v, d in _dynamic(graph) if d and role_of(v) == "other" and (s := _symbol((v, d))) is not None}
    inner -= {s for v, d in _dynamic(graph) if d == 0 and role_of(v) != "other" and (s := _symbol((v, d))) is not None}
    batch = _fixed(graph, batch=True)
    kinds = {str(v.name): tuple(_kinds(v, known, symbols, sizes, config, inner, batch)) for v in graph.inputs}
    return _with_fixed_steps(kinds, fixed_sequence(graph))


def settle_batch_last(graph: ir.Graph, *, batch_last: bool) -> None:
    """Take tokens, or embeddings in their place, for [sequence, batch], or for [batch, sequence] as usual."""
    graph.meta[_BATCH_LAST] = batch_last


def is_batch_last(graph: ir.Graph) -> bool:
    """Whether tokens are taken for [sequence, batch]."""
    return bool(graph.meta.get(_BATCH_LAST))


def _shows_batch_last(graph: ir.Graph) -> bool:
    """Whether states have the second symbol of the tokens, not the first: then that is the batch, not the sequence."""
    states = [value for value in graph.inputs if role_of(value) == "state"]
    kept = {_symbol((v, d)) for v in states if v.shape is not None for d in range(len(v.shape)) if d != growing_dim(v)}
    tokens = (v for v in graph.inputs if role_of(v) == "token_ids" and v.shape is not None and len(v.shape) == 2)
    return any(_symbol((v, 1)) in kept - {None} and _symbol((v, 0)) not in kept for v in tokens)


def fixed_sequence(graph: ir.Graph) -> int | None:
    """How many new positions each step has, if the shape of the tokens or of their embeddings fixes it."""
    return _fixed(graph, batch=False)


def _fixed(graph: ir.Graph, *, batch: bool) -> int | None:
    """The size of that dimension of the tokens or of their embeddings, if their shape fixes it."""
    for value in graph.inputs:
        tokens = role_of(value) == "token_ids"
        if (tokens or _is_embedding(graph, value)) and value.shape is not None and len(value.shape) > 1:
            first = batch != is_batch_last(graph)
            size = value.shape[0 if first else len(value.shape) - (1 if tokens else 2)]
            return size if isinstance(size, int) else None
    return None


def _with_fixed_steps(kinds: dict[str, tuple[int | str, ...]], steps: int | None) -> dict[str, tuple[int | str, ...]]:
    """`kinds` in which the total is the past and a fixed number of new positions, if that is fixed."""
    if steps is None:
        return kinds
    total = f"past + {steps}"
    return {name: tuple(total if kind == "total" else kind for kind in dims) for name, dims in kinds.items()}


def total_name(kind: str) -> str:
    """The name of a dimension of this kind: that of the total is the same if the number of new positions is fixed."""
    return "total" if _FIXED_TOTAL.fullmatch(kind) else kind


def _settle_lengths(graph: ir.Graph, symbols: Mapping[str, str]) -> None:
    """Take a single integer input for the size of the dimensions that have its name."""
    roles = {kind: role for role, kind in LENGTHS.items()}
    for value in graph.inputs:
        role = roles.get(symbols.get(str(value.name), ""))
        if role is not None and value in open_counts(graph):
            settle_role(value, Role(name=role, why="dimensions have its name", tie=True))


def _settle_lone_position(graph: ir.Graph) -> None:
    """Take a single integer for the number of old positions if it is the position of all there is in a step."""
    for value in graph.inputs:
        role = inferred_role(value)
        alone = value.shape is not None and len(value.shape) < 2 and _is_single(value) and fixed_sequence(graph) == 1
        if alone and role.name == "position_ids" and role.why != GIVEN:
            why = f"{role.why}, and each step has one position"
            settle_role(value, dataclasses.replace(role, name="past_length", why=why))


def lengths(graph: ir.Graph, sizes: SizeSet) -> dict[str, int]:
    """The name of each input that holds a number of positions -> that number."""
    steps = fixed_sequence(graph)
    sizes = sizes if steps is None else dataclasses.replace(sizes, sequence=steps)
    return {
        str(value.name): getattr(sizes, LENGTHS[role])
        for value in graph.inputs
        if (role := role_of(value)) in LENGTHS and _is_single(value)
    }


def open_counts(graph: ir.Graph) -> list[ir.Value]:
    """The inputs that are single integers and for which nothing shows what they count."""
    singles = [value for value in graph.inputs if value.dtype in _COUNTS and _is_single(value)]
    return [v for v in singles if role_of(v) == "other" and inferred_role(v).why != GIVEN]


def _is_single(value: ir.Value) -> bool:
    return value.shape is not None and all(dim == 1 for dim in value.shape)


_Place = tuple[ir.Value, int]
"""An input and one of its dimensions."""
_RANK = {"user": 0, "token_ids": 1, "position_ids": 2, "state": 3, "token_type_ids": 4, "attention_mask": 5, "other": 6}
"""The order in which roles decide about a symbol that stands in several inputs."""


def _symbol(place: _Place) -> str | None:
    """The symbol of a dimension; None for a dimension without a name, and for a size."""
    value, d = place
    assert value.shape is not None
    dim = value.shape[d]
    return None if isinstance(dim, int) or dim.value is None else str(dim.value)


def _shown(place: _Place) -> str:
    """The symbol of a dimension, or the name that stands for it if it has no symbol."""
    return _symbol(place) or f"{place[0].name}.{place[1]}"


def _given_sizes(graph: ir.Graph, given: Mapping[str, int]) -> dict[_Place, int]:
    """The dimensions whose sizes the user gave."""
    unused, found = set(given), {}
    dynamic = list(_dynamic(graph))
    for place in dynamic:
        symbol = _shown(place)
        key = next((k for k in (f"{place[0].name}.{symbol}", symbol) if k in given), None)
        if key is not None:
            unused.discard(key)
            found[place] = given[key]
    if unused:
        known = sorted({_shown(place) for place in dynamic})
        raise OptionError(f"--dim names {sorted(unused)}, but the dynamic dimensions are {known}.")
    return found


def _dynamic(graph: ir.Graph) -> Iterator[_Place]:
    for value in graph.inputs:
        assert value.shape is not None
        yield from ((value, d) for d, dim in enumerate(value.shape) if not isinstance(dim, int))


def _known(graph: ir.Graph, sizes: Mapping[_Place, int]) -> dict[_Place, tuple[str, str]]:
    """For dynamic dimensions: what the role of their input says that they are, and which role says it."""
    found: dict[_Place, tuple[str, str]] = {}
    dynamic = [place for place in _dynamic(graph) if place not in sizes]
    grows = {v: growing_dim(v) for v in graph.inputs if role_of(v) == "state"}
    has_state = bool(grows)
    batches, sequences = (
        {_symbol((v, d)) for v, d in dynamic if role_of(v) == "token_ids" and d == n} - {None}
        for n in ((1, 0) if is_batch_last(graph) else (0, 1))
    )
    for place in dynamic:
        value, d = place
        role = inferred_role(value)
        if role.dims is not None:
            kind: str | None = str(role.dims[d])
            found[place] = str(role.dims[d]), "user"
            continue
        assert value.shape is not None
        behind = len(value.shape) - 1 - d
        kind = None
        if role.name == "state":
            kind = {grows[value]: "past", batch_dim(value): "batch"}.get(d)
        elif _is_encoders(value) and role.name == "attention_mask":
            kind = ("encoder" if behind == 0 else None) if len(value.shape) > 1 else None
        elif role.name == "other" and _is_embedding(graph, value) and behind == 1:
            kind = "sequence"
        elif role.name in ("token_ids", "position_ids", "token_type_ids", "attention_mask"):
            kind = _of_steps(role.name, behind, len(value.shape), has_state=has_state)
            if len(value.shape) == 1 and role.name != "attention_mask":
                alone = role.name == "token_ids" and has_state and not any(_has_batch(v, d) for v, d in grows.items())
                kind = "sequence" if alone or (role.name == "position_ids" and _symbol(place) not in batches) else None
            if kind == "batch" and role.name == "attention_mask" and _symbol(place) in sequences:
                kind = "sequence"  # of new positions by all, the same for all sequences
        if is_batch_last(graph) and (role.name == "token_ids" or _is_embedding(graph, value)):
            kind = {0: "sequence", 1: "batch"}.get(d, kind)
        if kind is not None:
            found[place] = kind, role.name
    return found


def _has_batch(state: ir.Value, growing: int | None) -> bool:
    """Whether a state may be of several sequences: whether it has an open dimension beside the one that grows."""
    dims = () if state.shape is None else state.shape
    return growing is None or any(d != growing and not isinstance(dim, int) for d, dim in enumerate(dims))


def _is_embedding(graph: ir.Graph, value: ir.Value) -> bool:
    """Whether `value` has a vector for each position, in a model that takes no tokens."""
    if value.shape is None or len(value.shape) != 3 or _is_encoders(value) or value.dtype is None or not value.uses():
        return False
    alone = not any(role_of(other) == "token_ids" for other in graph.inputs)
    return alone and value.dtype.is_floating_point() and isinstance(value.shape[2], int)


def _of_steps(role: str, behind: int, rank: int, *, has_state: bool) -> str | None:
    """What a dimension of tokens, positions or a mask is, if `behind` other dimensions follow it."""
    if role == "attention_mask":
        last = "total" if has_state else "sequence"
        names = (last, "batch") if rank == 2 else (last, "sequence")
    else:
        names = ("sequence", "batch")
    return names[behind] if behind < len(names) else ("batch" if behind == rank - 1 else None)


def _is_encoders(value: ir.Value) -> bool:
    name = str(value.name)
    return "encoder" in name and not name.startswith("decoder")


def _kinds(
    value: ir.Value,
    known: Mapping[_Place, tuple[str, str]],
    symbols: Mapping[str, str],
    sizes: Mapping[_Place, int],
    config: Mapping[str, object],
    inner: Collection[str],
    batch: int | None,
) -> Iterator[int | str]:
    assert value.shape is not None
    has_batch = batch is not None and batch in value.shape
    found: dict[int, int | str] = {}
    for d, dim in enumerate(value.shape):
        place = (value, d)
        if isinstance(dim, int):
            found[d] = dim
        elif place in sizes:
            found[d] = sizes[place]
        elif place in known:
            found[d] = known[place][0]
        elif (kind := _of_symbol(_symbol(place), symbols)) is not None:
            found[d] = kind
    for d in range(len(value.shape)):
        if d not in found:
            found[d] = _by_place(value, d, found, config, inner, has_batch=has_batch)
    yield from (found[d] for d in range(len(value.shape)))


def _of_symbol(symbol: str | None, symbols: Mapping[str, str]) -> str | None:
    """What a symbol means in other inputs; a sum of past and sequence is total."""
    if symbol is None:
        return None
    if symbol in symbols:
        return symbols[symbol]
    match = _SUM.fullmatch(symbol)
    parts = {symbols.get(part) for part in match.groups()} if match else set()
    return "total" if parts == {"past", "sequence"} else None


def _by_place(
    value: ir.Value,
    d: int,
    found: Mapping[int, int | str],
    config: Mapping[str, object],
    inner: Collection[str],
    *,
    has_batch: bool,
) -> int | str:
    """What a dimension is taken for if nothing is known of it; no symbol in `inner` is taken for the batch.

    `has_batch`: the batch has a fixed size, and another dimension has that size.
    """
    assert value.shape is not None
    symbol = _shown((value, d))
    free = [other for other in range(len(value.shape)) if other not in found or other == d]
    state = role_of(value) == "state"
    batch = not has_batch and "batch" not in found.values() and symbol not in inner
    if batch and (d == 0 or (state and d == free[0])):
        return "batch"
    if state and d == free[0] and not {"past", "encoder"} & set(found.values()) and not is_written(value):
        return "encoder" if _is_encoders(value) else "past"
    size = config.get({"num_channels": "num_channels", "height": "image_size", "width": "image_size"}.get(symbol, ""))
    if isinstance(size, int):
        return size
    if _is_encoders(value) and d == 1:
        return "encoder"
    return symbol


def concrete(kinds: Mapping[str, tuple[int | str, ...]], sizes: SizeSet) -> dict[str, tuple[int, ...]]:
    """Shapes of the graph inputs at one set of sizes."""
    names = dict.fromkeys(k for dims in kinds.values() for k in dims if isinstance(k, str))
    found = {name: size for name in names if (size := _known_size(name, sizes)) is not None}
    unknown = [name for name in names if name not in found]
    found |= {name: sizes.others[i % len(sizes.others)] for i, name in enumerate(unknown)}
    return {name: tuple(k if isinstance(k, int) else found[k] for k in dims) for name, dims in kinds.items()}


def _known_size(kind: str, sizes: SizeSet) -> int | None:
    match = _FIXED_TOTAL.fullmatch(kind)
    if match is not None:
        return sizes.past + int(match[1])
    size = getattr(sizes, kind, None)
    return size if isinstance(size, int) else None
