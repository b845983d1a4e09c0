"""Replace shape arithmetic by the sizes that it computes.

Exporters write the arithmetic of sizes into every layer: Shape, Gather, Unsqueeze, Concat, Equal, Where, sixty nodes
and more. All of it is polynomials in a few sizes of the graph's inputs. Each such value is replaced by one vector that
is computed once for the whole graph, or by a constant.

A dimension is known by its factor, not by its size at some probe: two dimensions are the same size if they are the same
factor. A factor that no input has is taken as constant if it is equal at all probes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from furiosa_llm.builder.factors.analysis import Analysis
from furiosa_llm.builder.factors.factor import Factor, Kind
from furiosa_llm.builder.rewrite.dead_code import remove_unused
from furiosa_llm.builder.rewrite.polynomial import _BEYOND_INT64, Polynomial
from furiosa_llm.builder.rewrite.writer import NodeWriter
from furiosa_llm.builder.rules import evaluate, op_of
from furiosa_llm.builder.shapes.interpreter import Facts, attributes_of

_MAX_ELEMENTS = 64
_MIN_NODES = 16
"""Graphs with less shape arithmetic than this are left as they are, because they have little to gain."""
_ARITHMETIC = frozenset(("Add", "Concat", "Mul", "Sub"))
"""Ops, besides those that only move elements, whose numpy evaluation works on polynomials as it does on numbers."""

Sizes = npt.NDArray[Any]
"""An array of polynomials or of booleans."""


def fold_sizes(
    model: ir.Model, analysis: Analysis, kinds: Mapping[str, tuple[int | str, ...]], probes: Sequence[Facts]
) -> int:
    """Rewrite `model` in place; returns how many nodes were removed. `probes` are facts at very different sizes."""
    before = len(model.graph)
    folder = _Folder(model, analysis, kinds, probes)
    folder.run()
    remove_unused(model)
    return before - len(model.graph)


def proven_conditions(
    model: ir.Model, analysis: Analysis, kinds: Mapping[str, tuple[int | str, ...]], probes: Sequence[Facts]
) -> dict[ir.Value, bool]:
    """The single booleans of `model` that are the same at any sizes, with their values."""
    folder = _Folder(model, analysis, kinds, probes)
    folder.evaluate()
    known = folder.known.items()
    return {v: bool(sizes.item()) for v, sizes in known if sizes.dtype == np.bool_ and sizes.size == 1}


class _Folder:
    def __init__(
        self, model: ir.Model, analysis: Analysis, kinds: Mapping[str, tuple[int | str, ...]], probes: Sequence[Facts]
    ) -> None:
        self._graph = model.graph
        self._analysis = analysis
        self._probes = probes
        self._sources: dict[str, tuple[ir.Value, int]] = {}
        self._names: dict[Factor, str] = {}
        for value in model.graph.inputs:
            for d, kind in enumerate(kinds[str(value.name)]):
                if isinstance(kind, str):
                    self._sources.setdefault(kind, (value, d))
                    self._names.setdefault(analysis.dims[value][d].find(), kind)
        self.known: dict[ir.Value, Sizes] = {}
        self._emitted: dict[object, ir.Value] = {}
        self._new = NodeWriter(self._graph, lambda _: f"sizes/{len(self._emitted)}")

    def evaluate(self) -> None:
        """Find out what is known of every value."""
        for value in self._graph.initializers.values():
            constant = self._constant(value)
            if constant is not None:
                self.known[value] = constant
        for node in self._graph:
            for value, sizes in zip(node.outputs, self._evaluate(node), strict=False):
                self.known[value] = sizes

    def run(self) -> None:
        self.evaluate()
        if sum(all(o in self.known for o in node.outputs) for node in self._graph) < _MIN_NODES:
            return
        for node in list(self._graph):
            for value in node.outputs:
                if value in self.known and self._is_read(value):
                    self._replace(value, self.known[value])
        self._new.put_before(self._graph[0])

    # -- what is known -------------------------------------------------------------------------------------------

    def _constant(self, value: ir.Value) -> Sizes | None:
        array = self._analysis.facts[value].value
        if array is None or array.size > _MAX_ELEMENTS or array.dtype.kind not in "iub":
            return None
        if array.dtype.kind == "b":
            return array
        return _polynomials([Polynomial.constant(int(n)) for n in array.reshape(-1)], array.shape)

    def _size(self, value: ir.Value, d: int) -> Polynomial | None:
        known = self._polynomial(self._analysis.dims[value][d])
        if known is not None:
            return known
        sizes = {facts[value].shape[d] for facts in self._probes}
        return Polynomial.constant(sizes.pop()) if len(sizes) == 1 else None

    def _polynomial(self, factor: Factor) -> Polynomial | None:
        root = factor.find()
        if root in self._names:
            return Polynomial.of({(self._names[root],): 1})
        if root.kind is Kind.LEAF:
            return None
        if root.kind is Kind.PREFIX:
            return Polynomial.constant(root.size)  # a dimension of a block-quantised weight, which never changes
        kids = [self._polynomial(kid) or self._static(kid) for kid in root.kids]
        total = kids[0]
        for kid in kids[1:]:
            if total is None or kid is None:
                return None
            total = total * kid if root.kind is Kind.PRODUCT else total + kid
        return total

    def _static(self, factor: Factor) -> Polynomial | None:
        """The size of a factor of some weight, which never changes; None for any other factor."""
        if not hasattr(self, "_fixed"):
            self._fixed = {
                leaf
                for value in self._graph.initializers.values()
                for dim in self._analysis.dims[value]
                for leaf in dim.leaves()
            }
        root = factor.find()
        return Polynomial.constant(root.size) if root in self._fixed else None

    def _evaluate(self, node: ir.Node) -> Sequence[Sizes]:
        if node.domain:
            return ()
        if node.op_type == "Shape" and node.inputs[0] is not None:
            return self._shape(node, node.inputs[0])
        if node.op_type == "Size" and node.inputs[0] is not None:
            return self._number_of_elements(node.inputs[0])
        inputs = [None if v is None else self.known.get(v) for v in node.inputs]
        if any(v is not None and known is None for v, known in zip(node.inputs, inputs, strict=True)):
            return ()
        if node.op_type == "Cast":
            integer = ir.DataType(node.attributes["to"].as_int()).is_integer()
            data = inputs[0]
            return (data,) if integer and data is not None and data.dtype == object else ()
        if node.op_type == "ConstantOfShape":
            return self._constant_of_shape(node, inputs[0])
        if node.op_type in _ON_SIZES:
            found = _ON_SIZES[node.op_type](inputs)
            return () if found is None else (found,)
        entry = op_of(node)
        if entry is None or entry.value is None:
            return ()
        if node.op_type in _ARITHMETIC:
            arguments: list[Sizes | None] = inputs
        elif entry.moves not in (
            None,
            "type",
            "decode",
        ):  # the first input's elements are moved; the other inputs are numbers that say from where or to where
            arguments = [inputs[0], *map(_numbers, inputs[1:])]
        else:
            return ()
        if any(v is not None and a is None for v, a in zip(node.inputs, arguments, strict=True)):
            return ()
        result = entry.value(attributes_of(node), arguments)
        outputs = result if isinstance(result, tuple) else (result,)
        return tuple(o if o.size <= _MAX_ELEMENTS else _NOTHING for o in map(np.asarray, outputs))

    def _shape(self, node: ir.Node, value: ir.Value) -> Sequence[Sizes]:
        attributes = attributes_of(node)
        rank = len(self._analysis.dims[value])
        dims = range(rank)[attributes.get("start", 0) : attributes.get("end")]
        sizes = [self._size(value, d) for d in dims]
        return () if any(s is None for s in sizes) else (_polynomials(sizes, (len(sizes),)),)

    def _number_of_elements(self, value: ir.Value) -> Sequence[Sizes]:
        total: Polynomial | None = Polynomial.constant(1)
        for d in range(len(self._analysis.dims[value])):
            size = self._size(value, d)
            total = None if total is None or size is None else total * size
        return () if total is None else (_polynomials([total], ()),)

    def _constant_of_shape(self, node: ir.Node, shape: Sizes | None) -> Sequence[Sizes]:
        numbers = _numbers(shape)
        if numbers is None or np.prod(numbers) > _MAX_ELEMENTS:
            return ()
        filled = evaluate.constant_of_shape(attributes_of(node), [numbers])
        array = np.asarray(filled)
        if array.dtype.kind not in "iu":
            return ()
        return (_polynomials([Polynomial.constant(int(n)) for n in array.reshape(-1)], array.shape),)

    # -- what is written -----------------------------------------------------------------------------------------

    def _is_read(self, value: ir.Value) -> bool:
        """Whether a node that is not itself folded away reads `value`."""
        known = self.known[value]
        if known is _NOTHING or known.ndim > 1 or not _can_be_written(known):
            return False
        return any(not any(o in self.known for o in node.outputs) for node, _ in value.uses())

    def _replace(self, value: ir.Value, sizes: Sizes) -> None:
        dtype = self._analysis.facts[value].dtype
        if sizes.dtype == object:
            new = self._vector(tuple(sizes.reshape(-1)), scalar=sizes.ndim == 0)
            if dtype is not ir.DataType.INT64:
                new = self._node("Cast", [new], ("cast", id(new), dtype), to=int(dtype))
        else:
            new = self._initializer(sizes)
        for node, port in list(value.uses()):  # a graph output stays what it is
            node.replace_input_with(port, new)

    def _vector(self, elements: tuple[Polynomial, ...], *, scalar: bool) -> ir.Value:
        numbers = [e.number() for e in elements]
        if all(n is not None for n in numbers):
            array = np.array(numbers, dtype=np.int64)
            return self._initializer(array.reshape(()) if scalar else array)
        parts = [self._single(e) for e in elements]
        vector = parts[0] if len(parts) == 1 else self._node("Concat", parts, ("vector", elements), axis=0)
        if not scalar:
            return vector
        zero = self._initializer(np.array(0, dtype=np.int64))
        return self._node("Gather", [vector, zero], ("scalar", elements))

    def _single(self, polynomial: Polynomial) -> ir.Value:
        """A vector of one element."""
        number = polynomial.number()
        if number is not None:
            return self._initializer(np.array([number], dtype=np.int64))
        total: ir.Value | None = None
        for monomial, coefficient in polynomial.terms:
            term = (
                self._initializer(np.array([coefficient], dtype=np.int64)) if coefficient != 1 or not monomial else None
            )
            for i, name in enumerate(monomial):
                size = self._named(name)
                term = (
                    size if term is None else self._node("Mul", [term, size], ("mul", monomial[: i + 1], coefficient))
                )
            assert term is not None
            total = term if total is None else self._node("Add", [total, term], ("add", id(total), id(term)))
        assert total is not None
        return total

    def _named(self, name: str) -> ir.Value:
        value, d = self._sources[name]
        shape = self._node("Shape", [value], ("shape", value))
        index = self._initializer(np.array([d], dtype=np.int64))
        return self._node("Gather", [shape, index], ("named", name))

    def _node(self, op_type: str, inputs: Sequence[ir.Value], key: object, **attributes: int) -> ir.Value:
        if key not in self._emitted:
            self._emitted[key] = self._new.add_all(op_type, inputs, [""], attributes=attributes)[0]
        return self._emitted[key]

    def _initializer(self, array: npt.NDArray[Any]) -> ir.Value:
        key = ("constant", array.dtype.str, array.shape, array.tobytes())
        if key not in self._emitted:
            self._emitted[key] = self._new.constant(array)
        return self._emitted[key]


def _can_be_written(sizes: Sizes) -> bool:
    """Whether every number in `sizes` fits an int64."""
    polynomials = sizes.reshape(-1) if sizes.dtype == object else ()
    return all(abs(c) < _BEYOND_INT64 for polynomial in polynomials for _, c in polynomial.terms)


_NOTHING: Sizes = np.empty(0, dtype=object)


def _polynomials(elements: Sequence[Polynomial | None], shape: tuple[int, ...]) -> Sizes:
    array = np.empty(len(elements), dtype=object)
    array[:] = elements
    return array.reshape(shape)


def _numbers(sizes: Sizes | None) -> npt.NDArray[np.int64] | None:
    """The elements as numbers; None unless all are numbers."""
    if sizes is None or sizes.dtype != object:
        return None
    numbers = [e.number() for e in sizes.reshape(-1)]
    return None if any(n is None for n in numbers) else np.array(numbers, dtype=np.int64).reshape(sizes.shape)


def _equal(inputs: Sequence[Sizes | None]) -> Sizes | None:
    a, b = inputs
    if a is None or b is None or a.dtype != object or b.dtype != object:
        return None
    pairs = np.broadcast(a, b)
    results = [x.equals(y) for x, y in pairs]
    return None if any(r is None for r in results) else np.array(results, dtype=np.bool_).reshape(pairs.shape)


def _greater(inputs: Sequence[Sizes | None]) -> Sizes | None:
    a, b = inputs
    if a is None or b is None or a.dtype != object or b.dtype != object:
        return None
    pairs = np.broadcast(a, b)
    results = [x.exceeds(y) for x, y in pairs]
    return None if any(r is None for r in results) else np.array(results, dtype=np.bool_).reshape(pairs.shape)


def _logical(function: Callable[..., Any]) -> Callable[[Sequence[Sizes | None]], Sizes | None]:
    def evaluate(inputs: Sequence[Sizes | None]) -> Sizes | None:
        known = [i for i in inputs if i is not None and i.dtype == np.bool_]
        return np.asarray(function(*known)) if len(known) == len(inputs) else None

    return evaluate


def _where(inputs: Sequence[Sizes | None]) -> Sizes | None:
    condition, a, b = inputs
    if condition is None or condition.dtype != np.bool_ or a is None or b is None:
        return None
    return np.where(condition, a, b)


def _divide(inputs: Sequence[Sizes | None]) -> Sizes | None:
    """Exact quotients by numbers only."""
    a, divisor = inputs[0], _numbers(inputs[1])
    if a is None or a.dtype != object or divisor is None or not np.all(divisor > 0):
        return None
    quotients = []
    for x, n in np.broadcast(a, divisor):
        if any(c % n for _, c in x.terms):
            return None
        quotients.append(Polynomial.of({m: c // int(n) for m, c in x.terms}))
    return _polynomials(quotients, np.broadcast_shapes(a.shape, divisor.shape))


def _negated(comparison: Sizes | None) -> Sizes | None:
    return None if comparison is None else np.logical_not(comparison)


_ON_SIZES: Mapping[str, Callable[[Sequence[Sizes | None]], Sizes | None]] = {
    "And": _logical(np.logical_and),
    "Div": _divide,
    "Equal": _equal,
    "Greater": _greater,
    "GreaterOrEqual": lambda inputs: _negated(_greater(inputs[::-1])),
    "Less": lambda inputs: _greater(inputs[::-1]),
    "LessOrEqual": lambda inputs: _negated(_greater(inputs)),
    "Not": _logical(np.logical_not),
    "Or": _logical(np.logical_or),
    "Where": _where,
}
"""Ops that are evaluated on sizes by a function of their own."""
