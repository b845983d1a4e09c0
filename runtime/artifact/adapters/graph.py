"""Give a graph inputs for adapters: beside the product of each module a product with two factors, added to it.

The ranks of several adapters lie side by side, and `ROWS` says of every sequence which of them are its own. So one
batch may hold sequences of any adapters, and of none.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from onnx import ModelProto, NodeProto, TensorProto, helper

from furiosa_llm.runtime.artifact.adapters.names import Module, half_of, module_of, parts_of, same_module
from furiosa_llm.runtime.artifact.adapters.packed import found_as
from furiosa_llm.runtime.artifact.errors import AdapterError

ROWS = "lora_rows"
"""The input `[batch, 1, rank]`: 1 for the ranks of each sequence's own adapter, else 0."""
RANK = "lora_rank"
"""The dynamic dimension of all ranks side by side."""

MASKED = "/lora/own"
"""How the names of the products' nodes end that are masked so."""

_FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE)
_PLAIN = ("MatMul", "Gemm")
_PACKED = ("MatMulNBits", "MatMulBnb4")
"""Products whose weight is packed, and whose sizes are the attributes K and N."""
_SHOWN = 6
_SCOPES = "pkg.torch.onnx.name_scopes"
"""torch's list of the modules around a node, from the outermost inwards, and the node's own name."""
_NAMES = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class _Product:
    """A product with a weight [in, out], and the type of what it multiplies."""

    node: NodeProto
    names: tuple[str, ...]
    features_in: int
    features_out: int
    dtype: int


def add_adapter_inputs(model: ModelProto, modules: Sequence[str]) -> None:
    """Add the inputs `MODULE.lora_A` and `MODULE.lora_B` for each of `modules`, and `ROWS`, in place.

    A graph that takes adapters stays as it is. Raises AdapterError for a module of which the graph has no product with
    a weight.
    """
    if not modules or any(half_of(value.name) for value in model.graph.input):
        return
    chosen = _products_of(model, modules)
    mixes = all(product.node.op_type != "Gemm" for product in chosen.values())
    rows_dtype = next(iter(chosen.values())).dtype
    for name, product in chosen.items():
        _add_inputs(model, name, product)
        _insert(model, name, product, rows_dtype if mixes else None)
    if mixes:
        model.graph.input.append(helper.make_tensor_value_info(ROWS, rows_dtype, [_batch(model), 1, RANK]))


def _products_of(model: ModelProto, modules: Sequence[str]) -> dict[str, _Product]:
    products = list(_products(model))
    by_name = [_by_module(products, place) for place in range(_NAMES)]
    chosen: dict[str, _Product] = {}
    for name in modules:
        found = found_as(parts_of(name), lambda module: _find(module, by_name))
        if not found:
            known = sorted({".".join(key) for named in by_name for key in named if len(key) > 1})
            raise AdapterError(
                f"module {name!r:.120} has no product of its own in the graph, which has {', '.join(known[:_SHOWN])} "
                f"and {max(0, len(known) - _SHOWN)} more; export the model without packing this module with others, or "
                f"with inputs for adapters"
            )
        for module, product in found.items():
            shown = ".".join(module)
            taken = next((other for other, one in chosen.items() if one.node is product.node), shown)
            if taken != shown:
                raise AdapterError(
                    f"modules {taken!r:.120} and {shown!r:.120} are one product of the graph; give one of them"
                )
            chosen[shown] = product
    return chosen


def _find(module: Module, by_name: Sequence[dict[Module, _Product]]) -> _Product | None:
    for named in by_name:
        match = same_module(module, named)
        if match is not None:
            return named[match]
    return None


def _products(model: ModelProto) -> Iterator[_Product]:
    producer = {name: node for node in model.graph.node for name in node.output if name}
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type in _PACKED:
            sizes = {attribute.name: attribute.i for attribute in node.attribute}
            scales = constants.get(node.input[2])
            if scales is not None and {"K", "N"} <= sizes.keys():
                yield _Product(
                    node=node,
                    names=_names(node, node.input[1]),
                    features_in=sizes["K"],
                    features_out=sizes["N"],
                    dtype=scales.data_type,
                )
        elif node.op_type in _PLAIN and len(node.input) > 1:
            found = _weight(node, producer, constants)
            if found is not None:
                yield found


def _weight(node: NodeProto, producer: dict[str, NodeProto], constants: dict[str, TensorProto]) -> _Product | None:
    """The product of `node`, if its second operand is a stored matrix, perhaps in another form."""
    flags = {attribute.name: attribute.i for attribute in node.attribute}
    if flags.get("transA"):
        return None
    flipped, dtype, name = bool(flags.get("transB")), 0, node.input[1]
    while name not in constants:
        made = producer.get(name)
        if made is None or made.op_type not in ("Transpose", "Cast", "Identity", "DequantizeLinear"):
            return None
        if made.op_type == "Transpose":
            flipped = not flipped
        if made.op_type == "Cast":
            dtype = dtype or next(attribute.i for attribute in made.attribute if attribute.name == "to")
        if made.op_type == "DequantizeLinear":
            dtype = dtype or (constants[made.input[1]].data_type if made.input[1] in constants else 0)
        name = made.input[0]
    dims, dtype = list(constants[name].dims), dtype or constants[name].data_type
    if len(dims) != 2 or dtype not in _FLOATS:
        return None
    features_in, features_out = dims[::-1] if flipped else dims
    return _Product(
        node=node, names=_names(node, name), features_in=features_in, features_out=features_out, dtype=dtype
    )


def _by_module(products: Sequence[_Product], place: int) -> dict[Module, _Product]:
    """The products by what one of their names says; a name that several have says nothing."""
    modules = [module_of(product.names[place]) for product in products]
    counts = Counter(modules)
    return {module: product for module, product in zip(modules, products, strict=True) if counts[module] == 1}


def _names(node: NodeProto, weight: str) -> tuple[str, ...]:
    """The names that may say which module a product is of: its weight's, its own, and the scope that torch kept."""
    listed = next((entry.value for entry in node.metadata_props if entry.key == _SCOPES), "")
    scopes = re.findall(r"'([^']*)'", listed)
    return weight, node.name, scopes[-2] if len(scopes) > 1 else ""


def _add_inputs(model: ModelProto, name: str, product: _Product) -> None:
    shapes: tuple[tuple[str, list[int | str]], ...] = (
        ("A", [product.features_in, RANK]),
        ("B", [RANK, product.features_out]),
    )
    for half, shape in shapes:
        model.graph.input.append(helper.make_tensor_value_info(f"{name}.lora_{half}", product.dtype, shape))


def _insert(model: ModelProto, name: str, product: _Product, rows_dtype: int | None) -> None:
    """Adds to a product what its adapter gives, masked by `ROWS` of the type `rows_dtype` if that is given."""
    node, nodes = product.node, model.graph.node
    given, result = node.input[0], node.output[0]
    base, down, own, up = (f"{name}{part}" for part in ("/lora/base", "/lora/down", MASKED, "/lora/up"))
    node.output[0] = base
    made = [helper.make_node("MatMul", [given, f"{name}.lora_A"], [down], name=down)]
    if rows_dtype is not None:
        rows = ROWS
        if rows_dtype != product.dtype:
            rows = f"{name}/lora/rows"
            made.append(helper.make_node("Cast", [ROWS], [rows], name=rows, to=product.dtype))
        made.append(helper.make_node("Mul", [down, rows], [own], name=own))
    made.append(helper.make_node("MatMul", [own if rows_dtype is not None else down, f"{name}.lora_B"], [up], name=up))
    made.append(helper.make_node("Add", [base, up], [result], name=f"{name}/lora/sum"))
    place = next(index for index, other in enumerate(nodes) if other is node)
    for offset, one in enumerate(made, 1):
        nodes.insert(place + offset, one)


def _batch(model: ModelProto) -> int | str:
    """The first dimension that most inputs share."""
    found: Counter[int | str] = Counter()
    initialized = {tensor.name for tensor in model.graph.initializer}
    for value in model.graph.input:
        dims = value.type.tensor_type.shape.dim
        if dims and value.name not in initialized and ".lora_" not in value.name:
            found[dims[0].dim_param or dims[0].dim_value] += 1
    return found.most_common(1)[0][0]
