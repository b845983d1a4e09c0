"""Find decomposed attention by its wiring: from the product with the values back to the query and the two caches.

Nothing here looks at a name. What the matcher takes for granted (that an Expand repeats heads in the right order, that
a Reshape only merges dimensions) is proved on numbers afterwards, see `furiosa_llm.builder.rewrite.fusion.trial`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import numpy as np
import onnx_ir as ir

from furiosa_llm.builder.rewrite.fusion.match import Cache, Form, Heads, LeftAloneError, Match, Term
from furiosa_llm.builder.rewrite.fusion.tracing import (
    FACTORS,
    MAX_STEPS,
    MOVES,
    REPEATS,
    VIEWS,
    Hop,
    cache_source,
    factor_port,
    is_guard,
    operand,
    scalar,
)
from furiosa_llm.builder.shapes.interpreter import Facts


def match(node: ir.Node, facts: Sequence[Facts]) -> Match:
    """The attention that `node`, an anchor, belongs to; raises LeftAloneError with the reason why it is not one.

    `facts` are shapes at two sets of sizes in which no two dynamic dimensions are equal.
    """
    return _Matcher(node, facts).run()


class _Matcher:
    def __init__(self, anchor: ir.Node, facts: Sequence[Facts]) -> None:
        self._anchor = anchor
        self._facts = facts
        self._scale = 1.0
        self._softcap = 0.0

    def run(self) -> Match:
        """See `match`."""
        if self._anchor.op_type == "Attention":
            query, key, terms = self._fused()
        else:
            query, key, terms = self._decomposed()
        value = self._cache(operand(self._anchor, 2 if self._anchor.op_type == "Attention" else 1), scaled=False)
        if key.new.num_heads != value.new.num_heads or key.new.size != value.new.size:
            raise LeftAloneError("its keys and values differ in heads or in the size of a head")
        heads = self._query(query, key)
        return Match(
            anchor=self._anchor,
            query=heads,
            key=key,
            value=value,
            output=self._output(heads),
            scale=self._scale,
            softcap=self._softcap,
            terms=terms,
        )

    # -- from the product with the values to the scores ----------------------------------------------------------

    def _fused(self) -> tuple[ir.Value, Cache, tuple[Term, ...]]:
        """Match an Attention op, with the defaults of the standard."""
        node = self._anchor
        if len(node.outputs) > 1 and any(o.uses() or o.is_graph_output() for o in node.outputs[1:]):
            raise LeftAloneError("its scores are read elsewhere")
        query, key = operand(node, 0), self._cache(operand(node, 1), scaled=False)
        default = 1 / float(np.sqrt(key.new.size))
        scale, softcap = node.attributes.get("scale"), node.attributes.get("softcap")
        self._scale = default if scale is None else scale.as_float()
        self._softcap = 0.0 if softcap is None else softcap.as_float()
        mask = node.inputs[3] if len(node.inputs) > 3 else None
        if mask is None:
            return query, key, ()
        end = node.outputs[0]
        if self._dtype(mask) is ir.DataType.BOOL:
            return query, key, (Term(before=end, after=end, condition=mask),)
        return query, key, (Term(before=end, after=end, value=mask),)

    def _decomposed(self) -> tuple[ir.Value, Cache, tuple[Term, ...]]:
        softmax = self._softmax(operand(self._anchor, 0))
        axis = softmax.attributes["axis"].as_int() if "axis" in softmax.attributes else -1
        scores = operand(softmax, 0)
        if axis not in (-1, len(self._shape(scores)) - 1):
            raise LeftAloneError(f"its softmax is over axis {axis}, not over the last one")
        steps = next(self._ways_back(scores), None)
        if steps is None:
            raise LeftAloneError("no product of a query with cached keys leads to its softmax")
        query, key, terms = self._read(steps)
        return query, key, terms

    def _softmax(self, weights: ir.Value) -> ir.Node:
        """The Softmax that gives `weights`, with only changes of form and a guard against NaN between them."""
        current = weights
        for _ in range(MAX_STEPS):
            node = current.producer()
            if node is None or node.domain:
                break
            if node.op_type == "Softmax":
                return node
            if node.op_type in VIEWS:
                current = operand(node, 0)
            elif node.op_type == "Where" and is_guard(node):
                current = operand(node, 2)
            else:
                raise LeftAloneError(f'{node.op_type} "{node.name}" changes the weights behind its softmax')
        raise LeftAloneError("no softmax gives its weights")

    def _ways_back(self, value: ir.Value, depth: int = 0) -> Iterator[list[Hop]]:
        """Paths from the softmax back to a product with cached keys: each node with the port that the scores enter."""
        node = value.producer()
        if node is None or node.domain or depth > MAX_STEPS:
            return
        if node.op_type == "MatMul":
            if cache_source(operand(node, 1), REPEATS | FACTORS) is not None:
                yield [(node, 0)]
            return
        ports = {"Add": (0, 1), "Mul": (0, 1), "Div": (0,), "Tanh": (0,), "Where": (1, 2)}.get(node.op_type, ())
        for port in (0,) if node.op_type in VIEWS else ports:
            for rest in self._ways_back(operand(node, port), depth + 1):
                yield [(node, port), *rest]

    def _read(self, steps: list[Hop]) -> tuple[ir.Value, Cache, tuple[Term, ...]]:
        """Read scale, soft cap and terms along `steps`, which go back from the softmax; each kind has its place."""
        terms: list[Term] = []
        scaled = False
        for (node, port), (before, _) in itertools.pairwise(steps):
            if node.op_type in VIEWS:
                terms.append(Term(before=operand(node, 0), after=node.outputs[0]))
            elif node.op_type in ("Add", "Where"):
                if scaled:
                    raise LeftAloneError(f'{node.op_type} "{node.name}" comes before the scale of its scores')
                terms.append(_term(node, port))
            elif node.op_type == "Tanh":
                raise LeftAloneError(f'Tanh "{node.name}" is no soft cap: nothing scales the scores behind it')
            else:
                factor = self._factor(node, port)
                if before.op_type == "Tanh" and not scaled:
                    self._softcap = factor
                    return *self._product(steps, start=steps.index((before, 0)) + 1), tuple(reversed(terms))
                scaled = True
                self._scale *= factor
        return *self._product(steps, start=len(steps) - 1), tuple(reversed(terms))

    def _product(self, steps: list[Hop], *, start: int) -> tuple[ir.Value, Cache]:
        """The query and the cached keys; the steps from `start` on scale the scores before the soft cap."""
        for node, port in steps[start:-1]:
            if node.op_type in FACTORS:
                self._scale *= self._factor(node, port)
            elif node.op_type not in VIEWS:
                raise LeftAloneError(f'{node.op_type} "{node.name}" comes before the soft cap of its scores')
        if self._softcap:
            self._scale *= self._softcap
        product = steps[-1][0]
        return operand(product, 0), self._cache(operand(product, 1), scaled=True)

    # -- queries, caches and the output --------------------------------------------------------------------------

    def _cache(self, value: ir.Value, *, scaled: bool) -> Cache:
        """The cache that `value` comes from, through changes of form, repeated heads and, for keys, factors."""
        found = cache_source(value, REPEATS | (FACTORS if scaled else frozenset()))
        if found is None:
            raise LeftAloneError("its keys or values are not appended to a cache")
        concat, path = found
        for node, port in path:
            if node.op_type in FACTORS:
                self._scale *= self._factor(node, port)
        present = concat.outputs[0]
        shapes = self._shapes(present)
        if concat.attributes["axis"].as_int() not in (2, -2) or any(len(s) != 4 for s in shapes):
            raise LeftAloneError("its cache has the form [{}], not batch, heads, positions, vector", shapes)
        if any(s[1::2] != shapes[0][1::2] for s in shapes):
            raise LeftAloneError("its cache has heads or vectors of changing size: [{}]", shapes)
        past, new = operand(concat, 0), operand(concat, 1)
        heads, size = shapes[0][1], shapes[0][3]
        return Cache(past=past, new=self._heads(new, heads, size), present=present)

    def _query(self, value: ir.Value, key: Cache) -> Heads:
        """The query of all heads: the last `b h s d` on the way back through factors and changes of form."""
        current, found, scale = value, None, 1.0
        for _ in range(MAX_STEPS):
            shapes = self._shapes(current)
            if self._is_heads_first(shapes, key):
                found = (current, shapes[0][1], scale)
            node = current.producer()
            if node is None or node.domain:
                break
            port = factor_port(node) if node.op_type in FACTORS else 0
            if port is None or not (node.op_type in MOVES or self._is_factor(node, port)):
                break
            if node.op_type in FACTORS:
                scale *= self._factor(node, port)
            current = operand(node, port)
        if found is None:
            raise LeftAloneError("its query has no dimension of heads")
        self._scale *= found[2]
        return self._heads(found[0], found[1], key.new.size)

    def _is_heads_first(self, shapes: Sequence[tuple[int, ...]], key: Cache) -> bool:
        news = self._shapes(key.present)
        return all(
            len(s) == 4 and s[0] == k[0] and s[1] == shapes[0][1] and s[1] % k[1] == 0 and s[3] == k[3]
            for s, k in zip(shapes, news, strict=True)
        )

    def _heads(self, value: ir.Value, num_heads: int, size: int) -> Heads:
        """`value`, which has heads first, or the value that it is a transposition of."""
        form: Form = "heads first"
        node = value.producer()
        if node is not None and node.op_type == "Transpose" and _permutation(node) == (0, 2, 1, 3):
            value, form = operand(node, 0), "heads inside"
            node = value.producer()
            if node is not None and node.op_type == "Reshape":
                before = operand(node, 0)
                shapes = zip(self._shapes(before), self._shapes(value), strict=True)
                if all(b == (*a[:2], num_heads * size) for b, a in shapes):
                    value, form = before, "packed"
        return Heads(value=value, form=form, num_heads=num_heads, size=size)

    def _output(self, query: Heads) -> Heads:
        """The furthest value after the anchor that is only another form of the anchor's output."""
        current, found = self._anchor.outputs[0], None
        for _ in range(4):
            form = self._form(current, query)
            if form is not None:
                found = Heads(value=current, form=form, num_heads=query.num_heads, size=query.size)
            readers = [node for node, _ in current.uses()]
            if form == "packed" or len(readers) != 1 or current.is_graph_output() or readers[0].op_type not in MOVES:
                break
            current = readers[0].outputs[0]
        if found is None:
            raise LeftAloneError("its output has the form [{}]", self._shapes(self._anchor.outputs[0]))
        return found

    def _form(self, value: ir.Value, query: Heads) -> Form | None:
        expected: dict[Form, list[tuple[int, ...]]] = {"packed": [], "heads inside": [], "heads first": []}
        heads, size = query.num_heads, query.size
        at = {"heads first": 2, "heads inside": 1, "packed": 1}[query.form]
        for shape in self._shapes(query.value):
            batch, sequence = shape[0], shape[at]
            expected["packed"].append((batch, sequence, heads * size))
            expected["heads inside"].append((batch, sequence, heads, size))
            expected["heads first"].append((batch, heads, sequence, size))
        return next((form for form, shapes in expected.items() if shapes == self._shapes(value)), None)

    # -- facts ---------------------------------------------------------------------------------------------------

    def _shapes(self, value: ir.Value) -> list[tuple[int, ...]]:
        return [facts[value].shape for facts in self._facts]

    def _shape(self, value: ir.Value) -> tuple[int, ...]:
        return self._facts[0][value].shape

    def _dtype(self, value: ir.Value) -> ir.DataType:
        return self._facts[0][value].dtype

    def _is_factor(self, node: ir.Node, port: int) -> bool:
        return node.op_type in FACTORS and scalar(operand(node, 1 - port)) is not None

    def _factor(self, node: ir.Node, port: int) -> float:
        """The number by which `node` multiplies its input `port`."""
        number = scalar(operand(node, 1 - port))
        if number is None or (node.op_type == "Div" and (port == 1 or not number)):
            raise LeftAloneError(f'{node.op_type} "{node.name}" scales by more than one constant')
        return 1 / number if node.op_type == "Div" else number


def _permutation(node: ir.Node) -> tuple[int, ...] | None:
    return tuple(node.attributes["perm"].as_ints()) if "perm" in node.attributes else None


def _term(node: ir.Node, port: int) -> Term:
    before, after = operand(node, port), node.outputs[0]
    if node.op_type == "Add":
        return Term(before=before, after=after, value=operand(node, 1 - port))
    condition, other = operand(node, 0), operand(node, 3 - port)
    return Term(before=before, after=after, value=other, condition=condition, keeps=port == 1)
