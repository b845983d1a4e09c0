"""How one dimension lies over the ranks, in a normal form: a product of pieces, outermost first.

Sizes are pairs, one for each of two sets of sizes of the dynamic dimensions. Two dimensions that lie alike have equal
pieces: an axis stands for itself, whole runs are merged, and a concatenation takes in whatever follows it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction

import numpy as np
import numpy.typing as npt

from furiosa_llm.runtime.artifact import layout as stored
from furiosa_llm.runtime.artifact.errors import LayoutError
from furiosa_llm.runtime.artifact.layout import Mesh

Size = tuple[int, int]
ONE: Size = (1, 1)
MAX_PIECES = 4096
"""Of one dimension; the builder splits none of more. A chain of 40 concatenations of a value and itself has 2^40."""


@dataclasses.dataclass(frozen=True, slots=True)
class Run:
    """Consecutive indices, all of which every rank holds."""

    size: Size


@dataclasses.dataclass(frozen=True, slots=True)
class Axis:
    """An index that is the rank's position on a mesh axis."""

    axis: int
    length: int


@dataclasses.dataclass(frozen=True, slots=True)
class Padded:
    """`size` indices dealt out over `axes`, `count` to each rank; what lies beyond `size` is padding.

    `count` may be more than the least that suffices: 176 columns in blocks of 32 are dealt out as 6 blocks.
    """

    size: int
    axes: tuple[int, ...]
    count: int


@dataclasses.dataclass(frozen=True, slots=True)
class Copies:
    """`count` local indices at which elements are equal, so that any split of any size may be meant."""

    count: Size


@dataclasses.dataclass(frozen=True, slots=True)
class Gathered:
    """What an AllGather gives: all ranks' indices one after the other, here `order` (int64 bytes, -1 is padding)."""

    size: int
    order: bytes


@dataclasses.dataclass(frozen=True, slots=True)
class Cat:
    """A concatenation; `count` are the pieces in it that are none, `local` what each rank holds of it.

    `whole`: every rank holds all of it, in its order. These follow from the parts, which are gone through once.
    """

    parts: tuple[Dim, ...]
    count: int
    local: Size
    whole: bool


Piece = Run | Axis | Padded | Copies | Gathered | Cat
Dim = tuple[Piece, ...]
Measure = Callable[[Dim], Size]
Place = tuple[tuple[int, ...], Fraction]
"""The axes of a padded piece, and how many ranks' parts it fills; what lies beyond these parts is padding."""


def times(a: Size, b: Size) -> Size:
    """The product at both sets of sizes."""
    return a[0] * b[0], a[1] * b[1]


def over(a: Size, b: Size) -> Size | None:
    """The quotient at both sets of sizes; None if it is not an integer."""
    if not b[0] or not b[1] or a[0] % b[0] or a[1] % b[1]:
        return None
    return a[0] // b[0], a[1] // b[1]


def _size(piece: Piece, measure: Measure, *, local: bool) -> Size:
    match piece:
        case Run(size) | Copies(size):
            return size
        case Axis(_, length):
            return ONE if local else (length, length)
        case Padded(size, _, count):
            return (count, count) if local else (size, size)
        case Gathered(size, order):
            return (len(order) // 8,) * 2 if local else (size, size)
        case Cat(parts):
            if local or piece.whole:
                return piece.local
            sizes = [measure(part) for part in parts]
            return sum(s[0] for s in sizes), sum(s[1] for s in sizes)


def local_size(dim: Dim) -> Size:
    """How many indices each rank holds, padding included."""
    total = ONE
    for piece in dim:
        total = times(total, _size(piece, local_size, local=True))
    return total


def global_size(dim: Dim) -> Size:
    """How many indices there are, padding left out."""
    total = ONE
    for piece in dim:
        total = times(total, _size(piece, global_size, local=False))
    return total


def pieces_of(dim: Dim) -> Iterator[Piece]:
    """Every piece that is not a concatenation, in order."""
    for piece in dim:
        if isinstance(piece, Cat):
            for part in piece.parts:
                yield from pieces_of(part)
        else:
            yield piece


def axes_of(dim: Dim) -> tuple[int, ...]:
    """The mesh axes that a dimension is split over, each once, in order of first appearance."""
    found: dict[int, None] = {}
    for piece in pieces_of(dim):
        if isinstance(piece, Axis):
            found[piece.axis] = None
        elif isinstance(piece, Padded):
            found.update(dict.fromkeys(piece.axes))
    return tuple(found)


def is_whole(dim: Dim) -> bool:
    """Whether every rank holds all of the dimension in its order."""
    return all(piece.whole if isinstance(piece, Cat) else isinstance(piece, Run | Copies) for piece in dim)


def has_copies(dim: Dim) -> bool:
    """Whether some piece is `Copies`, which several splits may explain."""
    return any(isinstance(piece, Copies) for piece in pieces_of(dim))


def places(dim: Dim) -> tuple[Place, ...]:
    """Where a dimension is padded; a factor of it that has the same padding has the same place."""
    padded = (piece for piece in pieces_of(dim) if isinstance(piece, Padded))
    return tuple(dict.fromkeys((piece.axes, Fraction(piece.size, piece.count)) for piece in padded))


# -- putting together ------------------------------------------------------------------------------------------------


def run(size: Size) -> Dim:
    """A whole dimension."""
    return () if size == ONE else (Run(size),)


def join(*dims: Dim) -> Dim:
    """The product of dimensions."""
    made: list[Piece] = []
    for piece in (piece for dim in dims for piece in dim):
        last = made[-1] if made else None
        if isinstance(last, Cat):
            made[-1:] = concatenate([join(part, (piece,)) for part in last.parts])
        elif isinstance(piece, Run) and piece.size == ONE:
            continue
        elif isinstance(piece, Run) and isinstance(last, Run):
            made[-1] = Run(times(last.size, piece.size))
        elif isinstance(piece, Copies) and isinstance(last, Copies):
            made[-1] = Copies(times(last.count, piece.count))
        else:
            made.append(piece)
    return tuple(made)


def concatenate(dims: Sequence[Dim]) -> Dim:
    """The concatenation of dimensions: a whole one of more than MAX_PIECES is a run; LayoutError if one is split."""
    parts: list[Dim] = []
    flat = [part for dim in dims for part in (dim[0].parts if len(dim) == 1 and isinstance(dim[0], Cat) else (dim,))]
    for dim in flat:
        size = local_size(dim)
        if size == (0, 0):
            continue
        last = parts[-1] if parts else None
        if last is not None and _is_run(last) and _is_run(dim):
            before = local_size(last)
            parts[-1] = (Run((before[0] + size[0], before[1] + size[1])),)
        else:
            parts.append(dim)
    if len(parts) == 1:
        return parts[0]
    sizes = [local_size(part) for part in parts]
    local = sum(one for one, _ in sizes), sum(other for _, other in sizes)
    count = sum(piece.count if isinstance(piece, Cat) else 1 for part in parts for piece in part)
    whole = all(map(is_whole, parts))
    if count > MAX_PIECES and not whole:
        raise LayoutError(f"a dimension that is split has more than {MAX_PIECES} pieces")
    return (Cat(tuple(parts), count, local, whole),) if parts and count <= MAX_PIECES else run(local)


def _is_run(dim: Dim) -> bool:
    return all(isinstance(piece, Run) for piece in dim)


def of_layout(dim: stored.Dim, mesh: Mesh) -> Dim:
    """The normal form of a layout of the manifest; LayoutError if it cannot be decided."""
    match dim:
        case stored.Leaf(size, axes):
            parts = mesh.parts(axes)
            if size % parts:
                return (Padded(size, axes, -(-size // parts)),)
            split = tuple(Axis(axis, mesh.shape[axis]) for axis in axes if mesh.shape[axis] > 1)
            return join(split, run((size // parts, size // parts)))
        case stored.Prod(parts):
            return join(*(of_layout(part, mesh) for part in parts))
        case stored.Cat(parts):
            return concatenate([of_layout(part, mesh) for part in parts])
        case stored.Prefix(size, part):
            return _first(size, of_layout(part, mesh))


def _first(size: int, dim: Dim) -> Dim:
    """The first `size` indices of a dimension of whole blocks, where each rank has a run of equally many blocks."""
    if is_whole(dim):
        return run((size, size))
    split = dim[:-1] if isinstance(dim[-1], Run) else dim
    axes = tuple(piece.axis for piece in split if isinstance(piece, Axis))
    if len(split) == 1 and isinstance(split[0], Padded):
        axes = split[0].axes
    elif len(axes) != len(split):
        raise LayoutError(f"the first {size} of ({text(dim)}) are not dealt out in blocks, one rank's after another's")
    return (Padded(size, axes, local_size(dim)[0]),)


# -- taking apart ----------------------------------------------------------------------------------------------------


def take(dim: Dim, size: Size) -> tuple[Dim, Dim] | None:
    """The outermost pieces of global `size`, and the rest; None if no boundary lies there."""
    if size == ONE:
        return (), dim
    if not dim:
        return None
    head, rest = dim[0], dim[1:]
    own = global_size((head,))
    if own == size:
        return (head,), rest
    if (more := over(size, own)) is not None:
        found = take(rest, more)
        return None if found is None else ((head, *found[0]), found[1])
    inner = over(own, size)
    cut = None if inner is None else cut_piece(head, size, inner)
    return None if cut is None else (cut[0], join(cut[1], rest))


def cut_piece(piece: Piece, size: Size, inner: Size) -> tuple[Dim, Dim] | None:
    """One piece as a product of global `size` and `inner`."""
    match piece:
        case Run():
            return run(size), run(inner)
        case Copies():
            return (Copies(size),), (Copies(inner),)
        case Padded(_, axes, count) if count % inner[0] == 0:
            return (Padded(size[0], axes, count // inner[0]),), run(inner)
        case Cat(parts):
            return _cut_cat(parts, inner)
        case _:
            return None


def _cut_cat(parts: Sequence[Dim], inner: Size) -> tuple[Dim, Dim] | None:
    """A concatenation of products whose last factors are the same `inner`."""
    lefts: list[Dim] = []
    right: Dim | None = None
    for part in parts:
        outer = over(global_size(part), inner)
        found = None if outer is None else take(part, outer)
        if found is None or (right is not None and found[1] != right):
            return None
        lefts.append(found[0])
        right = found[1]
    return None if right is None else (concatenate(lefts), right)


def segments(dim: Dim, sizes: Sequence[Size], measure: Measure) -> list[Dim] | None:
    """`dim` cut into consecutive segments of these sizes, local or global; None if a cut lies inside a split piece."""
    if len(dim) == 1 and isinstance(dim[0], Cat):
        return _segments_of_cat(list(dim[0].parts), sizes, measure)
    filled = [i for i, size in enumerate(sizes) if size != (0, 0)]
    if len(filled) == 1 and sizes[filled[0]] == measure(dim):
        return [dim if i == filled[0] else run((0, 0)) for i in range(len(sizes))]
    if not dim or not isinstance(dim[0], Run | Copies):
        return None
    inner = measure(dim[1:])
    counts = [over(size, inner) for size in sizes]
    found: list[Dim] = []
    for count in counts:
        if count is None:
            return None
        head: Dim = (Copies(count),) if isinstance(dim[0], Copies) else (Run(count),)
        found.append(join(head, dim[1:]))
    return found


def _segments_of_cat(parts: list[Dim], sizes: Sequence[Size], measure: Measure) -> list[Dim] | None:
    found: list[Dim] = []
    for size in sizes:
        own: list[Dim] = []
        while size != (0, 0):
            if not parts:
                return None
            part = parts.pop(0)
            have = measure(part)
            if have[0] > size[0] or have[1] > size[1]:
                cut = segments(part, [size, (have[0] - size[0], have[1] - size[1])], measure)
                if cut is None:
                    return None
                parts.insert(0, cut[1])
                part, have = cut[0], size
            own.append(part)
            size = size[0] - have[0], size[1] - have[1]
        found.append(concatenate(own))
    return found if not parts else None


# -- comparing -------------------------------------------------------------------------------------------------------


def unify(a: Dim, b: Dim) -> Dim | None:
    """What both dimensions are, with copies read as what the other has there; None if they lie differently."""
    if a == b or merged(a) == merged(b):
        return a
    if not has_copies(a) and not has_copies(b):
        return None
    for one, other in ((a, b), (b, a)):
        if len(one) == 1 and isinstance(one[0], Cat):
            return _unify_parts(one[0].parts, other)
    prefix, a, b = _strip(a, b, at_end=False)
    suffix, a, b = _strip(a, b, at_end=True)
    middle = _unify_copies(a, b)
    return None if middle is None else join(prefix, middle, suffix)


def _unify_parts(parts: Sequence[Dim], other: Dim) -> Dim | None:
    """Unify a concatenation that has copies with a dimension that can be cut where the parts end."""
    cut = segments(other, [local_size(part) for part in parts], local_size)
    if cut is None:
        return None
    same = [unify(x, y) for x, y in zip(parts, cut, strict=True)]
    found = [part for part in same if part is not None]
    return concatenate(found) if len(found) == len(same) else None


def _unify_copies(a: Dim, b: Dim) -> Dim | None:
    if a == b:
        return a
    for copies, other in ((a, b), (b, a)):
        if len(copies) == 1 and isinstance(copies[0], Copies) and local_size(other) == copies[0].count:
            return other
        if is_whole(copies) and is_whole(other) and not has_copies(other) and local_size(copies) == local_size(other):
            return other
        if not copies and all(isinstance(p, Copies) and p.count == ONE for p in other):
            return copies
    return None


def _strip(a: Dim, b: Dim, *, at_end: bool) -> tuple[Dim, Dim, Dim]:
    """The pieces that both dimensions have in common at one end, and the rest of each."""
    end = -1 if at_end else 0
    common: Dim = ()
    while a and b:
        x, y = a[end], b[end]
        if x == y:
            same: Dim = (x,)
            a, b = (a[:-1], b[:-1]) if at_end else (a[1:], b[1:])
        elif isinstance(x, Run) and isinstance(y, Run):
            small = x if over(y.size, x.size) is not None else y
            left, right = over(x.size, small.size), over(y.size, small.size)
            if left is None or right is None:
                break
            same = (small,)
            a = (*a[:-1], *run(left)) if at_end else (*run(left), *a[1:])
            b = (*b[:-1], *run(right)) if at_end else (*run(right), *b[1:])
        else:
            break
        common = join(same, common) if at_end else join(common, same)
    return common, a, b


def merged(dim: Dim) -> Dim:
    """The same dimension, each padded piece merged with what follows it: 11 heads of 16 are 176 in parts of 16."""
    made: list[Piece] = []
    for piece in dim:
        last = made[-1] if made else None
        if isinstance(last, Padded) and isinstance(piece, Run) and piece.size[0] == piece.size[1]:
            made[-1] = Padded(last.size * piece.size[0], last.axes, last.count * piece.size[0])
        else:
            made.append(piece)
    return tuple(made)


# -- as numbers ------------------------------------------------------------------------------------------------------


def index_map(dim: Dim, mesh: Mesh, rank: int) -> npt.NDArray[np.int64]:
    """The global index of each local index of `rank` at the first set of sizes; -1 is padding."""
    combined = np.zeros(1, dtype=np.int64)
    for piece in dim:
        part, size = _map_of(piece, mesh, rank), global_size((piece,))[0]
        outer, inner = combined[:, None], part[None, :]
        combined = np.where((outer < 0) | (inner < 0), -1, outer * size + inner).reshape(-1)
    return combined


def _map_of(piece: Piece, mesh: Mesh, rank: int) -> npt.NDArray[np.int64]:
    match piece:
        case Axis(axis, _):
            return np.array([mesh.coordinates(rank)[axis]], dtype=np.int64)
        case Padded(size, axes, count):
            indices = np.arange(count, dtype=np.int64) + mesh.position(rank, axes) * count
            return np.where(indices < size, indices, -1)
        case Run(size) | Copies(size):
            return np.arange(size[0], dtype=np.int64)
        case Gathered(_, order):
            return np.frombuffer(order, dtype=np.int64)
        case Cat(parts):
            maps, start = [], 0
            for part in parts:
                own = index_map(part, mesh, rank)
                maps.append(np.where(own < 0, -1, own + start))
                start += global_size(part)[0]
            return np.concatenate(maps)


def text(dim: Dim) -> str:
    """A dimension for people: `axis0 axis1 16`."""
    return " ".join(_text(piece) for piece in dim) or "1"


def _text(piece: Piece) -> str:
    match piece:
        case Run(size):
            return str(size[0]) if size[0] == size[1] else "?"
        case Axis(axis, length):
            return f"axis{axis}({length})"
        case Padded(size, axes, count):
            return f"{size} padded over axes {list(axes)} by {count}"
        case Copies(count):
            return f"copies({count[0] if count[0] == count[1] else '?'})"
        case Gathered(size, _):
            return f"gathered({size})"
        case Cat(parts):
            return "[" + " | ".join(text(part) for part in parts) + "]"
