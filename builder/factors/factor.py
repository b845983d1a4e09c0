"""Factors: the trees that dimensions are made of, and their unification.

Every dimension of every value is a `Factor`: a leaf, a row-major product of factors, a concatenation of factors, or the
prefix of a longer factor (176 columns in blocks of 32 are the first indices of 6 blocks, which are split as wholes).
Two dimensions that run over the same indices share one factor, so that deciding how a factor is split decides it for
every value at once. Factors are refined in place: a leaf of 768 becomes the product (12, 64) once a Reshape shows it.

Unification is exact index arithmetic. It can fail (`FactorConflictError`), never be wrong; a caller that meets a
conflict demands the whole dimension at that node instead.
"""

from __future__ import annotations

import bisect
import enum
import itertools
import math
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

from furiosa_llm.runtime.artifact.layout import Cat, Dim, Leaf, Prefix, Prod

MAX_SEGMENTS = 4096
"""What a dimension may be a concatenation of; one of more segments stays whole."""
MAX_CUTS = 256
"""How many segments two concatenations that are cut at different places may have together: each cut compares them all.
A dimension that is cut in more ways stays whole."""


class FactorConflictError(Exception):
    """Two product lists have no common refinement. Always caught by the analysis, never shown to a user."""


class Kind(enum.Enum):
    """What a factor is made of."""

    LEAF = enum.auto()
    PRODUCT = enum.auto()
    CONCATENATION = enum.auto()
    PREFIX = enum.auto()
    """The first indices of its only kid, which is longer than the prefix but less than twice as long."""


_serial = itertools.count()


class Factor:
    """A run of `size` indices. Mutable: merged factors forward to one representative, leaves may be refined."""

    __slots__ = ("_forward", "kids", "kind", "serial", "size")

    def __init__(self, size: int, kind: Kind = Kind.LEAF, kids: Sequence[Factor] = ()) -> None:
        self.size = size
        self.kind = kind
        self.kids = list(kids)
        self.serial = next(_serial)
        self._forward: Factor | None = None

    def find(self) -> Factor:
        """The representative of this factor's class."""
        root = self
        while root._forward is not None:
            root = root._forward
        node = self
        while node._forward is not None:
            node._forward, node = root, node._forward
        return root

    def forward(self, other: Factor) -> None:
        """Make `other` the representative of this factor's class."""
        self._forward = other

    def become(self, kind: Kind, kids: Sequence[Factor]) -> None:
        """Refine this factor in place."""
        self.kind, self.kids = kind, list(kids)

    def leaves(self) -> Iterator[Factor]:
        """The leaves below this factor, in order, each as often as it occurs."""
        root = self.find()
        if root.kind is Kind.LEAF:
            yield root
        else:
            for kid in root.kids:
                yield from kid.leaves()

    def __repr__(self) -> str:
        root = self.find()
        if root.kind is Kind.LEAF:
            return str(root.size)
        if root.kind is Kind.PREFIX:
            return f"({root.size} of {root.kids[0]!r})"
        sign = "x" if root.kind is Kind.PRODUCT else "|"
        return "(" + sign.join(map(repr, root.kids)) + ")"


def product(factors: Sequence[Factor]) -> Factor:
    """The row-major product of `factors`, flat; a single factor is its own product."""
    flat = flatten(factors)
    if len(flat) == 1:
        return flat[0]
    return Factor(math.prod(f.size for f in flat), Kind.PRODUCT, flat) if flat else Factor(1)


def prefix(size: int, factors: Sequence[Factor]) -> Factor:
    """The first `size` indices of the row-major product of `factors`.

    Raises FactorConflictError if they are not more than half. So no factor inside a prefix's kid is as long as the
    prefix itself, and unification cannot make a factor a part of itself.
    """
    whole = product(factors)
    if whole.size == size:
        return whole
    if not size < whole.size < 2 * size:
        raise FactorConflictError
    return Factor(size, Kind.PREFIX, [whole])


def concatenation(factors: Sequence[Factor]) -> Factor:
    """The concatenation of `factors`, flat, without empty segments.

    Raises FactorConflictError if there are more than MAX_SEGMENTS.
    """
    segments: list[Factor] = []
    for factor in factors:
        root = factor.find()
        if root.kind is Kind.CONCATENATION:
            segments.extend(root.kids)
        elif root.size:
            segments.append(root)
    if len(segments) == 1:
        return segments[0].find()
    if len(segments) > MAX_SEGMENTS:
        raise FactorConflictError
    return Factor(sum(f.find().size for f in segments), Kind.CONCATENATION, segments)


def flatten(factors: Sequence[Factor]) -> list[Factor]:
    """`factors` as one product list of leaves, concatenations and prefixes, without factors of size 1."""
    flat: list[Factor] = []
    for factor in factors:
        root = factor.find()
        if root.kind is Kind.PRODUCT:
            flat.extend(flatten(root.kids))
        elif root.size != 1:
            flat.append(root)
    return flat


def unify(left: Sequence[Factor], right: Sequence[Factor]) -> None:
    """Make two product lists that describe the same index space share their factors.

    Raises FactorConflictError if they cannot; the factors that they share by then are right all the same.
    """
    a, b = deque(flatten(left)), deque(flatten(right))
    size = math.prod(f.size for f in a)
    if size != math.prod(f.size for f in b):
        raise FactorConflictError
    if size == 0:
        return  # nothing is indexed
    while a and b:
        x, y = _head(a), _head(b)
        if x is y or x.size == y.size:
            a.popleft()
            b.popleft()
            if x is not y:
                _merge(x, y)
        elif x.size < y.size:
            _cut_larger(a, b)
        else:
            _cut_larger(b, a)


def segment(factor: Factor, start: int, stop: int) -> Factor:
    """The factor of indices [start, stop) of `factor`, which is refined so that they are a segment of it."""
    root = factor.find()
    if (start, stop) == (0, root.size):
        return root
    if root.kind is Kind.LEAF:
        sizes = (start, stop - start, root.size - stop)
        kids = [Factor(size) for size in sizes if size]
        root.become(Kind.CONCATENATION, kids)
        return kids[1 if start else 0]
    if root.kind is Kind.PREFIX:
        raise FactorConflictError
    if root.kind is Kind.CONCATENATION:
        _cut(root, (start, stop))
        return concatenation([kid for offset, kid in _segments(root) if start <= offset < stop])
    inner = math.prod(kid.find().size for kid in root.kids[1:])
    if start % inner or stop % inner:
        raise FactorConflictError
    return product([segment(root.kids[0], start // inner, stop // inner), *root.kids[1:]])


def segments_of(factor: Factor) -> list[Factor]:
    """The segments of every concatenation below `factor`, or the factor itself if there is no concatenation."""
    root = factor.find()
    if root.kind is Kind.LEAF:
        return [root]
    if root.kind is Kind.CONCATENATION or (root.kind is Kind.PREFIX and has_concatenation(root)):
        return [s for kid in root.kids for s in segments_of(kid)]
    # A product of a concatenation and other factors: each segment with all the rest.
    return [root] if not any(has_concatenation(kid) for kid in root.kids) else list(_expand(root))


def leaves_in_prefixes(factors: Iterable[Factor]) -> frozenset[Factor]:
    """The leaves below any prefix in `factors`."""
    found: set[Factor] = set()
    pending = list({factor.find() for factor in factors})
    while pending:
        root = pending.pop().find()
        if root.kind is Kind.PREFIX:
            found.update(root.leaves())
        else:
            pending.extend(root.kids)
    return frozenset(found)


def has_concatenation(factor: Factor) -> bool:
    """Whether a concatenation is among what `factor` is made of."""
    root = factor.find()
    return root.kind is Kind.CONCATENATION or any(has_concatenation(kid) for kid in root.kids)


def _expand(product_: Factor) -> Iterator[Factor]:
    rows: list[list[Factor]] = [[]]
    for kid in product_.kids:
        parts = segments_of(kid) if has_concatenation(kid) else [kid.find()]
        rows = [[*row, part] for row in rows for part in parts]
    for row in rows:
        yield Factor(math.prod(f.find().size for f in row), Kind.PRODUCT, row)


def to_dim(factor: Factor, axes: Mapping[Factor, tuple[int, ...]]) -> Dim:
    """The layout of `factor` when leaves are split as `axes` says; leaves that `axes` lacks are replicated."""
    root = factor.find()
    if root.kind is Kind.LEAF:
        return Leaf(root.size, axes.get(root, ()))
    kids = tuple(to_dim(kid, axes) for kid in root.kids)
    if root.kind is Kind.PREFIX:
        return Prefix(root.size, kids[0])
    return Prod(kids) if root.kind is Kind.PRODUCT else Cat(kids)


def _head(queue: deque[Factor]) -> Factor:
    """The first factor of a product list, expanded if it was refined into a product meanwhile."""
    while True:
        head = queue[0].find()
        if head.kind is not Kind.PRODUCT:
            return head
        queue.popleft()
        queue.extendleft(reversed(flatten([head])))


def _cut_larger(smalls: deque[Factor], larges: deque[Factor]) -> None:
    """Refine the larger head so that its leading part has the size of the smaller one."""
    small, large = _head(smalls), _head(larges)
    if large.kind is Kind.LEAF:
        if large.size % small.size:
            raise FactorConflictError
        large.become(Kind.PRODUCT, [Factor(small.size), Factor(large.size // small.size)])
        return
    parts = _take(smalls, large.size)
    larges.popleft()
    if large.kind is Kind.PREFIX:
        _prefix_as_product(large, parts)
    else:
        _concatenation_as_product(large, parts)


def _take(queue: deque[Factor], size: int) -> list[Factor]:
    """Remove a prefix of exactly `size` indices from a product list, cutting a leaf if necessary."""
    taken: list[Factor] = []
    while size > 1:
        if not queue:
            raise FactorConflictError
        head = _head(queue)
        if size % head.size == 0:
            taken.append(head)
            queue.popleft()
            size //= head.size
        elif head.kind is Kind.LEAF and head.size % size == 0:
            head.become(Kind.PRODUCT, [Factor(size), Factor(head.size // size)])
        else:
            raise FactorConflictError
    return taken


def _merge(x: Factor, y: Factor) -> None:
    """Make two factors of equal size, neither of them a product, one."""
    if x.kind is Kind.LEAF:
        x.forward(y)
    elif y.kind is Kind.LEAF:
        y.forward(x)
    elif x.kind is not y.kind:
        raise FactorConflictError
    elif x.kind is Kind.PREFIX:
        short, long = sorted((x, y), key=lambda factor: factor.kids[0].find().size)
        part = short.kids[0]
        unify([part], [prefix(part.find().size, long.kids)])  # a block of 128 is four blocks of 32
        long.forward(short)
    else:
        while (offsets := _offsets(x)) != (others := _offsets(y)):  # cutting one may cut the other: they share segments
            if len(offsets) + len(others) > MAX_CUTS:
                raise FactorConflictError
            _cut(x, others - offsets)
            _cut(y, offsets - others)
        pairs = list(zip(x.kids, y.kids, strict=True))
        for p, q in pairs:
            unify([p], [q])
        y.forward(x)


def _concatenation_as_product(cat: Factor, parts: list[Factor]) -> None:
    """Refine a concatenation, n = parts[0] * inner, into a product whose first factor is the concatenation."""
    inner = cat.size // parts[0].size
    if any(kid.find().size % inner for kid in cat.kids):
        raise FactorConflictError
    leading: list[Factor] = []
    for kid in list(cat.kids):
        lead = Factor(kid.find().size // inner)
        unify([kid], [lead, *parts[1:]])
        leading.append(lead)
    unify([parts[0]], [concatenation(leading)])
    cat.become(Kind.PRODUCT, parts)


def _prefix_as_product(whole: Factor, parts: list[Factor]) -> None:
    """Refine a prefix, n = parts[0] * inner, whose blocks are multiples of `inner`, into a product of a prefix."""
    inner = whole.size // parts[0].size
    longer = whole.kids[0]
    if longer.find().size % inner:
        raise FactorConflictError
    lead = Factor(longer.find().size // inner)
    unify([longer], [lead, *parts[1:]])
    unify([parts[0]], [prefix(parts[0].size, [lead])])
    whole.become(Kind.PRODUCT, parts)


def _segments(cat: Factor) -> list[tuple[int, Factor]]:
    offsets = itertools.accumulate((kid.find().size for kid in cat.kids), initial=0)
    return list(zip(offsets, cat.kids, strict=False))


def _offsets(cat: Factor) -> set[int]:
    return {offset for offset, _ in _segments(cat)}


def _cut(cat: Factor, positions: Collection[int]) -> None:
    """Refine the segments of a concatenation so that one starts at each position; nested ones are expanded."""
    kids: list[Factor] = []
    starts = sorted(positions)
    for offset, kid in _segments(cat):
        size = kid.find().size
        inner = starts[bisect.bisect_right(starts, offset) : bisect.bisect_left(starts, offset + size)]
        kids += _cut_kid(kid, [position - offset for position in inner]) if inner else [kid]
    flat: list[Factor] = []
    for kid in kids:
        root = kid.find()
        flat.extend(root.kids if root.kind is Kind.CONCATENATION else [root])
    cat.become(Kind.CONCATENATION, flat)


def _cut_kid(kid: Factor, positions: Sequence[int]) -> list[Factor]:
    """A segment that is cut at `positions`: itself as a concatenation, or its parts."""
    root = kid.find()
    pairs = itertools.pairwise([0, *positions, root.size])
    if root.kind is Kind.LEAF:
        root.become(Kind.CONCATENATION, [Factor(stop - start) for start, stop in pairs])
    elif root.kind is Kind.CONCATENATION:
        _cut(root, positions)
    else:
        return [segment(root, start, stop) for start, stop in pairs]
    return [root]
