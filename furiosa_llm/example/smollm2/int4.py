"""SmolLM2's Q4_1 and Q8_0 blocks as com.microsoft quantised operators, without a rounding of their own.

Q4_1 is w = d*q + m with a real minimum m, MatMulNBits' fast kernel takes d*(q - z) with an integer z. Since d*q + m =
d*(q - 8) + (m + 8*d), the product is a symmetric MatMulNBits plus, per block of 32 inputs, the sum of the inputs times
m + 8*d: one small MatMul. README.md holds the measurements by which this way was chosen.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from onnx import numpy_helper

from furiosa_llm.example.llama.onnx_writer import ModelWriter
from furiosa_llm.example.llama.projection import weight_name
from furiosa_llm.example.llama.weights import EMBEDDING
from furiosa_llm.example.smollm2.blocks import BLOCK, Float, Q4Weight
from furiosa_llm.example.smollm2.gguf_weights import GgufWeights

_CONTRIB = "com.microsoft"
_SYMMETRIC_ZERO_POINT = 8
_HEAD_WEIGHT = weight_name("/lm_head")

Bytes = npt.NDArray[np.uint8]


def pack_nibbles(values: Bytes) -> Bytes:
    """Packs 4-bit values [..., 2n] into [..., n] bytes in MatMulNBits' order, the even one in the low nibble."""
    packed: Bytes = values[..., 0::2] | (values[..., 1::2] << np.uint8(4))
    return packed


def concatenate_rows(weights: Sequence[Q4Weight]) -> Q4Weight:
    """One matrix of the outputs of all, [N1 + N2 + ..., K]."""
    return Q4Weight(
        quants=np.concatenate([weight.quants for weight in weights]),
        step=np.concatenate([weight.step for weight in weights]),
        minimum=np.concatenate([weight.minimum for weight in weights]),
    )


class Int4Projection:
    """Products by 4-bit MatMulNBits and block sums; embedding and head share one 8-bit matrix. See `Projection`.

    Args:
        source: the GGUF file's weights.
        accuracy_level: MatMulNBits' attribute; 4 lets it round activations to 8 bits, 0 keeps them in float32.
    """

    def __init__(self, source: GgufWeights, accuracy_level: int = 4) -> None:
        self._source = source
        self._accuracy_level = accuracy_level
        self._block_sums: dict[str, str] = {}
        self._shapes: dict[tuple[int, ...], str] = {}

    def project(self, writer: ModelWriter, scope: str, parts: Sequence[str], x: str) -> str:
        """See `Projection.project`."""
        weight = self.q4_weight(parts)
        symmetric = self.matmul_nbits(
            writer,
            scope,
            x,
            packed=pack_nibbles(weight.quants),
            scales=weight.step,
            output=f"{scope}/MatMul_Q4/output_0",
        )
        offsets = weight.minimum + np.float32(_SYMMETRIC_ZERO_POINT) * weight.step
        name = writer.initializer(f"{weight_name(scope)}_offsets", offsets.T)
        path = f"{scope}/offset"
        sums = self._sums_of_blocks(writer, x, blocks=offsets.shape[1])
        correction = writer.node("MatMul", [sums, name], [f"{path}/MatMul/output_0"], name=f"{path}/MatMul")
        return writer.node("Add", [symmetric, correction], [f"{scope}/MatMul/output_0"], name=f"{path}/Add")

    def embed(self, writer: ModelWriter, ids: str) -> str:
        """See `Projection.embed`; as genai's shared embedding, a block-quantised Gather from the head's weight."""
        weight = self._source.q8_weight(EMBEDDING)
        rows, blocks, _ = weight.quants.shape
        unsigned = (weight.quants.view(np.uint8)) ^ np.uint8(
            0x80
        )  # q + 128: 128 is the zero point the operators assume
        shared = writer.initializer(f"{_HEAD_WEIGHT}_Q8", unsigned)
        scales = writer.initializer(f"{_HEAD_WEIGHT}_scales", weight.step)
        scope = "/model/embed_tokens"
        shape = self._shape(writer, (rows, blocks * BLOCK))
        table = writer.node("Reshape", [shared, shape], [f"{scope}/Reshape/output_0"], name=f"{scope}/Reshape")
        return writer.node(
            "GatherBlockQuantized",
            [table, ids, scales],
            [f"{scope}/GatherBlockQuantized/output_0"],
            name=f"{scope}/GatherBlockQuantized",
            domain=_CONTRIB,
            bits=8,
            block_size=BLOCK,
            gather_axis=0,
            quantize_axis=1,
        )

    def head(self, writer: ModelWriter, x: str) -> str:
        """See `Projection.head`; multiplies by the matrix that `embed` wrote."""
        config = self._source.config
        return writer.node(
            "MatMulNBits",
            [x, f"{_HEAD_WEIGHT}_Q8", f"{_HEAD_WEIGHT}_scales"],
            ["logits"],
            name="/lm_head/MatMul_Q8",
            domain=_CONTRIB,
            K=config.hidden_size,
            N=config.vocab_size,
            accuracy_level=self._accuracy_level,
            bits=8,
            block_size=BLOCK,
        )

    def q4_weight(self, parts: Sequence[str]) -> Q4Weight:
        """The blocks of the projections `parts`, their outputs one after the other."""
        return concatenate_rows([self._source.q4_weight(part) for part in parts])

    def matmul_nbits(
        self,
        writer: ModelWriter,
        scope: str,
        x: str,
        *,
        packed: Bytes,
        scales: Float,
        output: str,
        bits: int = 4,
        zero_points: npt.NDArray[np.uint8] | Float | None = None,
    ) -> str:
        """Writes one MatMulNBits, `packed` [N, K/32, 4*bits], `scales` [N, K/32]; by default zero is at the middle."""
        name = weight_name(scope)
        rows, blocks = scales.shape
        inputs = [x, writer.initializer(f"{name}_Q{bits}", packed), writer.initializer(f"{name}_scales", scales)]
        if zero_points is not None:
            inputs.append(writer.initializer(f"{name}_zp", zero_points))
        return writer.node(
            "MatMulNBits",
            inputs,
            [output],
            name=f"{scope}/MatMul_Q{bits}",
            domain=_CONTRIB,
            K=blocks * BLOCK,
            N=rows,
            accuracy_level=self._accuracy_level,
            bits=bits,
            block_size=BLOCK,
        )

    def write_block_sums(self, writer: ModelWriter, x: str, blocks: int) -> str:
        """Writes the sums of x over each block, [batch, sequence, K] -> [batch, sequence, K/32]; returns the name."""
        path = x.removesuffix("/output_0") + "/block_sums"
        shape = self._shape(writer, (0, 0, blocks, BLOCK))
        split = writer.node("Reshape", [x, shape], [f"{path}/Reshape/output_0"], name=f"{path}/Reshape")
        inputs, output = [split, self._shape(writer, (-1,))], f"{path}/ReduceSum/output_0"
        return writer.node("ReduceSum", inputs, [output], name=f"{path}/ReduceSum", keepdims=0)

    def _sums_of_blocks(self, writer: ModelWriter, x: str, blocks: int) -> str:
        """The sums for x, written once: the products of gate and up share them."""
        if x not in self._block_sums:
            self._block_sums[x] = self.write_block_sums(writer, x, blocks)
        return self._block_sums[x]

    def _shape(self, writer: ModelWriter, sizes: tuple[int, ...]) -> str:
        """A one-dimensional int64 constant, written once per graph."""
        if sizes not in self._shapes:
            text = str(list(sizes))
            output = f"/model/constants/INT64/{text}"
            tensor = numpy_helper.from_array(np.array(sizes, dtype=np.int64), output)
            self._shapes[sizes] = writer.node(
                "Constant", [], [output], name=f"/model/constant_nodes/INT64/{text}", value=tensor
            )
        return self._shapes[sizes]
