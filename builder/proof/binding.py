"""Which pieces of a node's operands each symbol of the op's rule stands for."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Collection, Mapping, Sequence

import onnx_ir as ir

from furiosa_llm.builder.proof import pieces
from furiosa_llm.builder.proof.pieces import Dim, Size
from furiosa_llm.builder.proof.placement import REBUILD, ContradictionError, Placement
from furiosa_llm.builder.rules import op_of
from furiosa_llm.builder.rules.padding import Content
from furiosa_llm.builder.rules.rule import DimExpr, Operand, Rule, Signature
from furiosa_llm.runtime.artifact.layout import Leaf, Mesh

Symbols = dict[str, Dim]


def uses(signature: Signature, inputs: Mapping[int, Placement]) -> list[tuple[int, int, Dim, DimExpr]]:
    """Every input dimension: its port, its position, its pieces, and its expression in the rule."""
    found: list[tuple[int, int, Dim, DimExpr]] = []
    for port, placement in inputs.items():
        operand = signature.inputs[port] if port < len(signature.inputs) else None
        if operand is None:  # the rule does not mention it: it may mean anything, so it must be whole
            operand = (DimExpr("full"),) * len(placement.dims)
        if len(operand) != len(placement.dims):
            raise ContradictionError(
                f"an operand {port} of {len(placement.dims)} dimensions", f"{len(operand)} dimensions", REBUILD
            )
        found += [(port, d, dim, e) for d, (dim, e) in enumerate(zip(placement.dims, operand, strict=True))]
    return found


def global_sizes(
    signature: Signature,
    inputs: Mapping[int, Placement],
    shapes: Sequence[Sequence[Size]],
    given: Mapping[str, Size],
) -> dict[str, Size]:
    """The sizes of symbols in the unsplit model: the sizes `given`, and those of symbols that are a whole dimension.

    `shapes` are the outputs' shapes in the unsplit model.
    """
    found: dict[str, Size] = {}
    for _, _, dim, expression in uses(signature, inputs):
        found |= _named(expression, pieces.global_size(dim))
    for operand, shape in zip(signature.outputs, shapes, strict=False):
        for expression, size in zip(operand or (), shape, strict=False):
            found = {**_named(expression, size), **found}
    return {**found, **given}


def _named(expression: DimExpr, size: Size) -> dict[str, Size]:
    if expression.name is not None:
        return {expression.name: size}
    return {expression.segments[0][0]: size} if _is_lone(expression) else {}


def bind(
    signature: Signature, inputs: Mapping[int, Placement], sizes: Mapping[str, Size], mesh: Mesh
) -> tuple[Symbols, frozenset[str]]:
    """The pieces of every symbol, by global sizes; and the symbols that are no run of pieces, which must be whole."""
    known: Symbols = {}
    unlinked: set[str] = set()
    for port, d, dim, expression in uses(signature, inputs):
        _check_size(port, d, dim, expression, sizes)
        if expression.kind == "prefix":
            parts = _parts_of_prefix(dim, expression, sizes, mesh)
        else:
            parts = _parts(dim, expression, sizes)
        if parts is None:
            unlinked |= expression.symbols
            continue
        for symbol, part in parts:
            same = part if symbol not in known else pieces.unify(known[symbol], part)
            if same is None:
                raise ContradictionError(
                    f"an operand {port} whose dimension {d} is split as ({pieces.text(part)})",
                    f"({pieces.text(known[symbol])}), as the other operands are",
                    REBUILD,
                )
            known[symbol] = same
    # The op makes what only the outputs have, all of it on every rank.
    made = {s for operand in signature.outputs for expression in operand or () for s in expression.symbols}
    known |= {s: pieces.run(sizes[s]) for s in made if s in sizes and s not in known and s not in unlinked}
    return known, frozenset(unlinked)


def _check_size(port: int, d: int, dim: Dim, expression: DimExpr, sizes: Mapping[str, Size]) -> None:
    """Check that a dimension has as many indices as its symbols say."""
    if not expression.segments or _is_lone(expression):
        return
    wanted = [_product([sizes[s] for s in segment]) for segment in expression.segments]
    total = sum(size[0] for size in wanted), sum(size[1] for size in wanted)
    if expression.kind == "prefix":
        block = _product([sizes[s] for s in expression.segments[0][1:]])[0]
        size = pieces.global_size(dim)
        total = size if total[0] - block < size[0] == size[1] <= total[0] else total
    if total != pieces.global_size(dim):
        raise ContradictionError(
            f"an operand {port} of {pieces.global_size(dim)[0]} in dimension {d}", f"{total[0]}", REBUILD
        )


def _is_lone(expression: DimExpr) -> bool:
    return expression.kind == "product" and len(expression.segments[0]) == 1


def _parts(dim: Dim, expression: DimExpr, sizes: Mapping[str, Size]) -> list[tuple[str, Dim]] | None:
    """The symbols of one dimension with their pieces; None if there is no boundary between them."""
    if not expression.segments:
        return []
    if _is_lone(expression):
        return [(expression.segments[0][0], dim)]
    segments: list[Dim] | None = [dim]
    if expression.kind == "concatenation":
        wanted = [_product([sizes[s] for s in segment]) for segment in expression.segments]
        segments = pieces.segments(dim, wanted, pieces.global_size)
    if segments is None:
        return None
    found: list[tuple[str, Dim]] = []
    for segment, own in zip(expression.segments, segments, strict=True):
        rest = own
        for symbol in segment[:-1]:
            cut = pieces.take(rest, sizes[symbol])
            if cut is None:
                return None
            found.append((symbol, cut[0]))
            rest = cut[1]
        found.append((segment[-1], rest))
    return found


def _parts_of_prefix(
    dim: Dim, expression: DimExpr, sizes: Mapping[str, Size], mesh: Mesh
) -> list[tuple[str, Dim]] | None:
    """The prefix itself, and its product of whole blocks, which are dealt out as their elements are."""
    assert expression.name is not None
    first, *inner = expression.segments[0]
    plain = pieces.merged(dim)
    if pieces.is_whole(dim):
        outer = pieces.run(sizes[first])
    elif len(plain) == 1 and isinstance(plain[0], pieces.Padded):
        block = _product([sizes[s] for s in inner])[0]
        outer = pieces.of_layout(Leaf(sizes[first][0], plain[0].axes), mesh)
        if pieces.local_size(outer)[0] * block != plain[0].count:
            return None
    else:
        return None
    return [(expression.name, dim), (first, outer), *((s, pieces.run(sizes[s])) for s in inner)]


def _product(sizes: Sequence[Size]) -> Size:
    total = pieces.ONE
    for size in sizes:
        total = pieces.times(total, size)
    return total


def compose(
    operand: Operand, shape: Sequence[Size], symbols: Mapping[str, Dim], whole: Collection[str]
) -> tuple[Dim, ...]:
    """The dimensions of an output of global `shape`."""
    if operand is None:
        operand = (DimExpr("full"),) * len(shape)
    found: list[Dim] = []
    for expression, size in zip(operand, shape, strict=True):
        if not expression.segments or any(s in whole or s not in symbols for s in expression.symbols):
            found.append(pieces.run(size))
            continue
        if expression.name is not None:
            found.append(symbols[expression.name])
            continue
        found.append(pieces.concatenate([pieces.join(*(symbols[s] for s in own)) for own in expression.segments]))
    return tuple(found)


# -- from local sizes ------------------------------------------------------------------------------------------------


def solve(signature: Signature, inputs: Mapping[int, Placement], sizes: Mapping[str, int]) -> Symbols:
    """The pieces of symbols, by local sizes: pinned symbols take no axis, and the rest belongs to the last symbol.

    A dimension of 1 says the least: it may be broadcast, or a rank may have one of several indices there.
    """
    known: Symbols = {}
    whole = signature.pin | signature.full
    lone = {e.segments[0][0]: pieces.local_size(dim)[0] for _, _, dim, e in uses(signature, inputs) if _is_lone(e)}
    sizes = {**lone, **sizes}
    todo: list[tuple[Dim, tuple[str, ...]]] = []
    for _, _, dim, expression in uses(signature, inputs):
        if expression.kind == "concatenation":
            local = [_product([(sizes[s], sizes[s]) for s in own]) for own in expression.segments]
            cut = pieces.segments(dim, local, pieces.local_size)
            todo += zip(cut, expression.segments, strict=True) if cut is not None else []
        elif expression.name is not None:
            known[expression.name] = dim
        elif expression.segments:
            todo.append((dim, expression.segments[0]))
    clear = [(dim, symbols) for dim, symbols in todo if dim]
    _narrow_all(clear, known, whole, sizes)
    for symbol in (s for dim, symbols in todo if not dim for s in symbols):
        known.setdefault(symbol, ())
    _narrow_all(clear, known, whole, sizes)
    return known


def _narrow_all(
    todo: Sequence[tuple[Dim, tuple[str, ...]]], known: Symbols, whole: Collection[str], sizes: Mapping[str, int]
) -> None:
    for _ in range(len(todo)):
        before = len(known)
        for dim, symbols in todo:
            _narrow(dim, list(symbols), known, whole, sizes)
        if len(known) == before:
            break


def _narrow(dim: Dim, symbols: list[str], known: Symbols, whole: Collection[str], sizes: Mapping[str, int]) -> None:
    """Strip what is known or whole off both ends; the rest belongs to the last symbol."""
    while len(symbols) > 1:
        last, first = symbols[-1], symbols[0]
        if last in known or last in whole:
            own = known.get(last, pieces.run((sizes.get(last, 1), sizes.get(last, 1))))
            outer = pieces.over(pieces.global_size(dim), pieces.global_size(own))
            cut = None if outer is None else pieces.take(dim, outer)
            if cut is None or pieces.unify(cut[1], own) is None:
                return
            known[last], dim = own, cut[0]
            symbols.pop()
        elif first in known:
            cut = pieces.take(dim, pieces.global_size(known[first]))
            if cut is None or pieces.unify(cut[0], known[first]) is None:
                return
            dim = cut[1]
            symbols.pop(0)
        else:
            return
    known.setdefault(symbols[0], dim)


Attributes = dict[str, int | list[int]]


def unsplit_attributes(rule: Rule, signature: Signature, inputs: Mapping[int, Placement]) -> list[Attributes]:
    """Attributes that are sizes, as the unsplit model may have them; ContradictionError if operands do not settle them.

    `rule` is the rule of the node as a rank has it. Where a rank has one of something, for instance one group of a
    convolution, there may be one in all, or one for each rank: the operands must fit the rule in either case.
    """
    symbols = solve(signature, inputs, rule.sizes)
    whole = {tuple(e.segments[0]): dim for _, _, dim, e in uses(signature, inputs) if e.kind == "product" and dim}
    products = {name: [tuple(p.split()) for p in text.split(",")] for name, text in rule.attributes.items()}
    needed = {s: name for name, every in products.items() for own in every if own not in whole for s in own}
    missing = [s for s in needed if s not in symbols]
    ways = [_readings(s, rule, signature, inputs) for s in missing]
    if not all(ways):
        raise ContradictionError(
            f"an attribute {needed[missing[0]]} of which it is undecided what part of a size it is ({missing})",
            "operands that tell",
            REBUILD,
        )
    sizes = {s: pieces.global_size(symbols[s])[0] for s in needed if s in symbols}
    found: list[Attributes] = []
    for picks in itertools.product(*ways):
        known = {**sizes, **dict(zip(missing, picks, strict=True))}
        attributes: Attributes = {}
        for name, every in products.items():
            # A dimension's size is known, whatever its pieces are.
            values = [
                pieces.global_size(whole[own])[0] if own in whole else math.prod(known[s] for s in own) for own in every
            ]
            attributes[name] = values if "," in rule.attributes[name] else values[0]
        found.append(attributes)
    return found


def _readings(symbol: str, rule: Rule, signature: Signature, inputs: Mapping[int, Placement]) -> list[int]:
    """How many there may be in all where a rank has one: one, or one for each rank that a dimension is split over."""
    if rule.sizes.get(symbol) != 1:
        return []
    found = {1: None}
    for _, _, dim, expression in uses(signature, inputs):
        if expression.kind != "product" or expression.segments[0][0] != symbol:
            continue
        heads = (dim[:stop] for stop in range(1, len(dim) + 1))
        found |= {pieces.global_size(head)[0]: None for head in heads if pieces.local_size(head) == pieces.ONE}
    return list(found)


# -- copies ----------------------------------------------------------------------------------------------------------


def resolve_copies(node: ir.Node, signature: Signature, inputs: Mapping[int, Placement]) -> dict[int, Placement]:
    """The inputs, with copies taken for what the other inputs have in the dimensions that are aligned with theirs.

    `signature` is of the node as a rank has it: what it does not name alike is not aligned.
    """
    entry = op_of(node)
    skip = 0 if entry is None else entry.core_dims
    dims = {port: list(one.dims) for port, one in inputs.items()}
    for back in range(skip + 1, max(map(len, dims.values())) + 1):
        alike: dict[DimExpr, dict[int, Dim]] = {}
        for port, own in dims.items():
            operand = signature.inputs[port] if port < len(signature.inputs) else None
            if operand is not None and len(own) >= back:
                alike.setdefault(operand[-back], {})[port] = own[-back]
        for aligned in alike.values():
            for port, dim in _resolved(aligned).items():
                dims[port][-back] = dim
    found = dict(inputs)
    for port, one in inputs.items():
        if any(map(pieces.has_copies, one.dims)):
            padded = {place: Content.FINITE for dim in dims[port] for place in pieces.places(dim)}
            found[port] = dataclasses.replace(one, dims=tuple(dims[port]), contents={**padded, **one.contents})
    return found


def _resolved(aligned: Mapping[int, Dim]) -> dict[int, Dim]:
    """Aligned dimensions, each compared with the different ones among them: an op may have thousands of operands."""
    found, different = dict(aligned), dict.fromkeys(aligned.values())
    for port, dim in aligned.items():
        for other in list(different) if pieces.has_copies(dim) else ():
            same = pieces.unify(found[port], other)
            if same is not None and pieces.local_size(other) == pieces.local_size(found[port]):
                found[port] = same
        different.setdefault(found[port])
    return found
