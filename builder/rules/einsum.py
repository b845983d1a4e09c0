"""Einsum: the equation is the rule."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import onnx_ir as ir

from furiosa_llm.builder.errors import ShapeError
from furiosa_llm.builder.rules.cost import Cost, spent
from furiosa_llm.builder.rules.facts import Fact
from furiosa_llm.builder.rules.registry import op, spell
from furiosa_llm.builder.rules.rule import Rule
from furiosa_llm.builder.rules.view import Inferred, NodeView

_ELLIPSIS = "..."


def einsum(view: NodeView) -> Rule:
    """`bhqd,bhkd->bhqk` is `b h q d, b h k d -> b h q k; reduce d`.

    A letter that one operand has twice takes a diagonal, and must be whole. Dimensions under an ellipsis are aligned
    from the right, and those of size 1 are broadcast.
    """
    operands, out = _letters_of(view.node, [view.rank(port) for port in range(len(view.node.inputs))])
    diagonal = {letter for letters in operands for letter, count in Counter(letters).items() if count > 1}

    def dims(letters: Sequence[str], shape: Sequence[int]) -> list[str]:
        words = ["*" if letter in diagonal else letter for letter in letters]
        return [word if size != 1 else "1" for word, size in zip(words, shape, strict=True)]

    spelled = [dims(letters, view.shape(port)) for port, letters in enumerate(operands)]
    named = dict.fromkeys(word for words in spelled for word in words if word not in ("*", "1"))
    contracted = [letter for letter in named if letter not in out]
    clause = f"; reduce {' '.join(contracted)}" if contracted else ""
    text = f"{spell(*spelled)} -> {spell(dims(out, view.out()))}{clause}"
    return Rule(text=text, linear=(0,) if len(operands) == 1 else (), padding="product")


def _einsum_shape(node: ir.Node, inputs: Sequence[Fact | None]) -> Inferred:
    facts = [fact for fact in inputs if fact is not None]
    operands, out = _letters_of(node, [len(fact.shape) for fact in facts])
    sizes: dict[str, int] = {}
    for letters, fact in zip(operands, facts, strict=True):
        for letter, size in zip(letters, fact.shape, strict=True):
            if sizes.setdefault(letter, size) != size and 1 not in (size, sizes[letter]):
                raise ShapeError(
                    f'Einsum "{node.name}" has two sizes for {letter!r}: {sizes[letter]} and {size}, expected one; '
                    "export the model again."
                )
            sizes[letter] = max(sizes[letter], size)
    return [(facts[0].dtype, tuple(sizes[letter] for letter in out))]


def _letters_of(node: ir.Node, ranks: Sequence[int]) -> tuple[list[list[str]], list[str]]:
    """The letters of every dimension of the operands and of the result; those under an ellipsis are e0, e1, ...

    Raises ShapeError for an equation that does not fit.
    """
    equation = node.attributes["equation"].as_string()
    terms, result = _equation(equation)
    named = [len(letters) - (_ELLIPSIS in letters) for letters in terms]
    fits = len(terms) == len(ranks) and all(
        count == rank or (count < rank and _ELLIPSIS in letters)
        for count, rank, letters in zip(named, ranks, terms, strict=True)
    )
    if not fits or not {*result} <= {letter for letters in terms for letter in letters}:
        raise ShapeError(
            f'Einsum "{node.name}": the equation {equation!r} does not fit operands of {list(ranks)} dimensions; '
            "export the model again."
        )
    hidden = [
        rank - count if _ELLIPSIS in letters else 0 for rank, count, letters in zip(ranks, named, terms, strict=True)
    ]
    names = [f"e{i}" for i in range(max(hidden))]
    operands = [_spread(letters, names[len(names) - count :]) for letters, count in zip(terms, hidden, strict=True)]
    return operands, _spread(result, names)


def _equation(equation: str) -> tuple[list[list[str]], list[str]]:
    """The letters of each operand and of the result; an ellipsis is one letter."""
    left, arrow, right = equation.replace(" ", "").partition("->")
    terms = [_letters(term) for term in left.split(",")]
    if arrow:
        return terms, _letters(right)
    counts = Counter(letter for letters in terms for letter in letters)
    once = sorted(letter for letter, count in counts.items() if count == 1 and letter != _ELLIPSIS)
    return terms, ([_ELLIPSIS] if _ELLIPSIS in counts else []) + once


def _letters(term: str) -> list[str]:
    before, ellipsis, after = term.partition(_ELLIPSIS)
    return [*before, *([_ELLIPSIS] if ellipsis else []), *after]


def _spread(letters: Sequence[str], names: Sequence[str]) -> list[str]:
    """The letters with `names` in place of the ellipsis."""
    return [name for letter in letters for name in (names if letter == _ELLIPSIS else [letter])]


def _einsum_cost(view: NodeView) -> Cost:
    """One loop over all letters: the operands are multiplied, and added up if letters are contracted."""
    operands, out = _letters_of(view.node, [view.rank(port) for port in range(len(view.node.inputs))])
    sizes: dict[str, int] = {}
    for port, letters in enumerate(operands):
        for letter, size in zip(letters, view.shape(port), strict=True):
            sizes[letter] = max(size, sizes.get(letter, 1)) if size else 0
    contracted = not sizes.keys() <= {*out}
    return spent(view, (len(operands) - 1 + contracted) * math.prod(sizes.values()))


op("Einsum", rule=einsum, shape=_einsum_shape, cost=_einsum_cost)
