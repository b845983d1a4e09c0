"""Whether onnxruntime's kernels give a row the same bits alone as among others: `python -m benchmarks.kernels`.

Each kind of product computes 16 rows one by one, and the first 2, 3, ... 16 of them together. The table has the largest
difference from the row among 16, relative to the largest element of the result: of a row alone, and of a row among 2 to
15. "As it is" stands for weights that onnxruntime does not pack ahead, as those of a mapped artifact. Other processors'
kernels run by emulation: `qemu-x86_64 -cpu Haswell .venv/bin/python -m benchmarks.kernels`.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import click
import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
from onnx import helper, numpy_helper

from fixtures.processor import kernels

Array = npt.NDArray[Any]
Feeds = Callable[[int, int], dict[str, Array]]

ROWS = 16
WIDTHS = (64, 256, 576)
COLUMNS = 112
BLOCK = 32
UNFUSED_BLOCK = 8
"""onnxruntime makes MatMulNBits of larger blocks alone."""
EXPERTS = 4
HEADS, HEAD = 4, 32
PACKING = {"packed": "0", "as it is": "1"}
"""How weights are kept -> `session.disable_prepacking`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Product:
    """A graph of one product: what it is given for the rows from one to another, and the result's axis of rows."""

    nodes: Sequence[onnx.NodeProto]
    weights: Sequence[onnx.TensorProto] = ()
    feeds: Feeds
    axis: int = 0

    def runner(self, packing: str) -> Callable[[int, int], Array]:
        """A function that computes the rows from one to another, on one thread, row by row of the result."""
        inputs = [
            helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), [None] * array.ndim)
            for name, array in self.feeds(0, ROWS).items()
        ]
        result = helper.make_tensor_value_info("y", inputs[0].type.tensor_type.elem_type, None)
        graph = helper.make_graph(self.nodes, "product", inputs, [result], self.weights)
        opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        options.add_session_config_entry("session.disable_prepacking", PACKING[packing])
        session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        return lambda start, stop: np.moveaxis(session.run(["y"], self.feeds(start, stop))[0], self.axis, 0)


def differences(run: Callable[[int, int], Array]) -> tuple[float, float]:
    """Of a row alone, and of a row among fewer than 16: the largest difference from the row among 16."""
    among = run(0, ROWS).astype(np.float64)
    scale = np.abs(among).max()
    alone = np.concatenate([run(row, row + 1) for row in range(ROWS)])
    fewer = [np.abs(run(0, count) - among[:count]).max() for count in range(2, ROWS)]
    return float(np.abs(alone - among).max() / scale), float(max(fewer) / scale)


def products(width: int) -> Iterator[tuple[str, Product]]:
    """Every kind of product, of `width` summands."""
    rng = np.random.default_rng(width)
    x = rng.standard_normal((ROWS, width), dtype=np.float32)
    yield from _floats(x, rng)
    yield from _blocks(x, rng)
    yield from _experts(x, rng)
    yield from _attention(width, rng)


def _rows(x: Array) -> Feeds:
    return lambda start, stop: {"x": x[start:stop]}


def _numbers(rng: np.random.Generator, name: str, *shape: int, dtype: type = np.float32) -> onnx.TensorProto:
    return numpy_helper.from_array(rng.standard_normal(shape, dtype=np.float32).astype(dtype), name)


def _scales(rng: np.random.Generator, name: str, *shape: int) -> onnx.TensorProto:
    return numpy_helper.from_array(rng.uniform(0.01, 0.02, shape).astype(np.float32), name)


def _bytes(rng: np.random.Generator, name: str, *shape: int) -> onnx.TensorProto:
    return numpy_helper.from_array(rng.integers(0, 256, shape, dtype=np.uint8), name)


def _floats(x: Array, rng: np.random.Generator) -> Iterator[tuple[str, Product]]:
    width = x.shape[1]
    product = [helper.make_node("MatMul", ["x", "w"], ["y"])]
    yield "MatMul, fp32", Product(nodes=product, weights=[_numbers(rng, "w", width, COLUMNS)], feeds=_rows(x))
    half = _numbers(rng, "w", width, COLUMNS, dtype=np.float16)
    yield "MatMul, fp16", Product(nodes=product, weights=[half], feeds=_rows(x.astype(np.float16)))
    biased = [helper.make_node("Gemm", ["x", "w", "b"], ["y"], transB=1)]
    weights = [_numbers(rng, "w", COLUMNS, width), _numbers(rng, "b", COLUMNS)]
    yield "Gemm, fp32, weight transposed", Product(nodes=biased, weights=weights, feeds=_rows(x))


def _blocks(x: Array, rng: np.random.Generator) -> Iterator[tuple[str, Product]]:
    width = x.shape[1]
    for bits in (4, 8):
        weights = [
            _bytes(rng, "w", COLUMNS, width // BLOCK, BLOCK * bits // 8),
            _scales(rng, "s", COLUMNS, width // BLOCK),
        ]
        sizes = {"K": width, "N": COLUMNS, "bits": bits, "block_size": BLOCK}
        for level in (4, 0):
            node = helper.make_node(
                "MatMulNBits", ["x", "w", "s"], ["y"], domain="com.microsoft", accuracy_level=level, **sizes
            )
            yield f"MatMulNBits, {bits} bits, level {level}", Product(nodes=[node], weights=weights, feeds=_rows(x))
        for block in (BLOCK, UNFUSED_BLOCK):
            yield f"DequantizeLinear and MatMul, {bits} bits, blocks of {block}", _dequantized(x, rng, bits, block)


def _dequantized(x: Array, rng: np.random.Generator, bits: int, block: int) -> Product:
    width = x.shape[1]
    kind = onnx.TensorProto.UINT4 if bits == 4 else onnx.TensorProto.UINT8
    values = rng.integers(0, 2**bits, width * COLUMNS).tolist()
    weights = [helper.make_tensor("w", kind, [width, COLUMNS], values), _scales(rng, "s", width // block, COLUMNS)]
    weight = helper.make_node("DequantizeLinear", ["w", "s"], ["d"], axis=0, block_size=block)
    return Product(nodes=[weight, helper.make_node("MatMul", ["x", "d"], ["y"])], weights=weights, feeds=_rows(x))


def _experts(x: Array, rng: np.random.Generator) -> Iterator[tuple[str, Product]]:
    """Two of four experts for each row, by scores that are given."""
    width = x.shape[1]
    scores = rng.standard_normal((ROWS, EXPERTS), dtype=np.float32)

    def feeds(start: int, stop: int) -> dict[str, Array]:
        return {"x": x[start:stop], "scores": scores[start:stop]}

    attributes: dict[str, Any] = {"k": 2, "activation_type": "silu", "normalize_routing_weights": 1}
    weights = [_numbers(rng, "up", EXPERTS, COLUMNS, width), _numbers(rng, "down", EXPERTS, width, COLUMNS)]
    node = helper.make_node("MoE", ["x", "scores", "up", "", "down"], ["y"], domain="com.microsoft", **attributes)
    yield "MoE, fp32", Product(nodes=[node], weights=weights, feeds=feeds)
    inner = width // 2
    inputs = ["x", "scores", "up", "up.scales", "", "down", "down.scales"]
    for bits in (4, 8):
        packed = 8 // bits
        weights = [
            _bytes(rng, "up", EXPERTS, inner, width // packed),
            _bytes(rng, "down", EXPERTS, width, inner // packed),
            _scales(rng, "up.scales", EXPERTS, inner, width // BLOCK),
            _scales(rng, "down.scales", EXPERTS, width, inner // BLOCK),
        ]
        quantized = attributes | {"expert_weight_bits": bits, "block_size": BLOCK}
        node = helper.make_node("QMoE", inputs, ["y"], domain="com.microsoft", **quantized)
        yield f"QMoE, {bits} bits", Product(nodes=[node], weights=weights, feeds=feeds)


def _attention(width: int, rng: np.random.Generator) -> Iterator[tuple[str, Product]]:
    """Tokens of one sequence with a past of `width`, tokens of as many sequences, and a product of two inputs."""
    tokens = rng.standard_normal((3, ROWS, HEADS * HEAD), dtype=np.float32)
    past = rng.standard_normal((2, HEADS, width, HEAD), dtype=np.float32)
    others = rng.standard_normal((2, ROWS, HEADS, width, HEAD), dtype=np.float32)
    kv = np.concatenate([past, np.swapaxes(tokens[1:].reshape(2, ROWS, HEADS, HEAD), 1, 2)], axis=2)

    def inputs(new: Array, old: Array) -> dict[str, Array]:
        total = old.shape[3] + new.shape[2]
        lengths = {"last": np.full(new.shape[1], total - 1, np.int32), "total": np.array(total, np.int32)}
        return {"q": new[0], "k": new[1], "v": new[2], "past.k": old[0], "past.v": old[1]} | lengths

    def sequence(start: int, stop: int) -> dict[str, Array]:
        return inputs(tokens[:, None, start:stop], kv[:, None, :, : width + start])

    def batch(start: int, stop: int) -> dict[str, Array]:
        return inputs(tokens[:, start:stop, None], others[:, start:stop])

    names = ["q", "k", "v", "past.k", "past.v", "last", "total"]
    attributes: dict[str, Any] = {"num_heads": HEADS, "kv_num_heads": HEADS}
    node = helper.make_node(
        "GroupQueryAttention", names, ["y", "present.k", "present.v"], domain="com.microsoft", **attributes
    )
    yield "GroupQueryAttention, tokens of one sequence", Product(nodes=[node], feeds=sequence, axis=1)
    yield "GroupQueryAttention, one token of each sequence", Product(nodes=[node], feeds=batch)
    x, w = (rng.standard_normal(shape, dtype=np.float32) for shape in ((ROWS, width), (width, COLUMNS)))
    product = helper.make_node("MatMul", ["x", "w"], ["y"])
    yield "MatMul, fp32, of two inputs", Product(nodes=[product], feeds=lambda a, b: {"x": x[a:b], "w": w})


def measure() -> list[str]:
    """The lines of the table."""
    found: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for width in WIDTHS:
        for kind, product in products(width):
            for packing in PACKING if product.weights else ["as it is"]:
                found.setdefault((kind, packing), []).append(differences(product.runner(packing)))
    lines = [f"| product | weight | {' | '.join(f'alone, {width}' for width in WIDTHS)} | among 2 to 15 |"]
    lines.append("|---|---|" + "---|" * (len(WIDTHS) + 1))
    for (kind, packing), pairs in found.items():
        cells = [*(alone for alone, _ in pairs), max(fewer for _, fewer in pairs)]
        lines.append(f"| {kind} | {packing} | {' | '.join(f'{cell:.1e}' if cell else 'none' for cell in cells)} |")
    return lines


@click.command(help=__doc__)
def main() -> None:
    click.echo(f"onnxruntime {ort.__version__}, {platform.machine()}, {kernels()}\n\n" + "\n".join(measure()))


if __name__ == "__main__":
    main()
