"""Random Llama-like decoders in genai's graph shape with quantised products of any block and number of bits."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx

from furiosa_llm.example.llama.config import LlamaConfig
from furiosa_llm.example.llama.genai import write_genai_graph
from furiosa_llm.example.llama.onnx_writer import ModelWriter, write_model_files
from furiosa_llm.example.llama.projection import weight_name
from furiosa_llm.example.llama.weights import EMBEDDING, LM_HEAD, RandomWeights

Array = npt.NDArray[Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantizedModel:
    """The sizes of a model of two layers, and how its products are written."""

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    op: str
    """MatMulNBits or DequantizeLinear."""
    bits: int = 4
    block: int = 32
    """Inputs that share a scale; 0: all of an output's (one scale per channel)."""
    zero_points: bool = False
    """Whether zero is somewhere else for every block."""

    def write(self, folder: Path) -> Path:
        """Write `model.onnx` and its weights into a folder."""
        config = LlamaConfig(
            vocab_size=1024,
            hidden_size=self.hidden,
            intermediate_size=self.ffn,
            num_hidden_layers=2,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            head_dim=self.head_dim,
            max_position_embeddings=128,
            rms_norm_eps=1e-5,
            rope_theta=10000.0,
            tie_word_embeddings=False,
        )
        weights = RandomWeights(config, 0)

        def graph(writer: ModelWriter) -> onnx.ModelProto:
            return write_genai_graph(writer, weights, _Projection(self, weights))

        write_model_files(folder, graph)
        return folder / "model.onnx"


class _Projection:
    """Products of random codes; what exporters leave beyond the end of a row is random, too. See `Projection`."""

    def __init__(self, model: QuantizedModel, weights: RandomWeights) -> None:
        self._model = model
        self._weights = weights

    def project(self, writer: ModelWriter, scope: str, parts: Sequence[str], x: str) -> str:
        """See `Projection.project`."""
        shapes = [self._weights.tensor(part).shape for part in parts]
        return self._product(writer, scope, sum(n for n, _ in shapes), shapes[0][1], x, f"{scope}/MatMul/output_0")

    def embed(self, writer: ModelWriter, ids: str) -> str:
        """See `Projection.embed`."""
        scope = "/model/embed_tokens/Gather"
        table = writer.initializer(EMBEDDING, self._weights.tensor(EMBEDDING))
        return writer.node("Gather", [table, ids], [f"{scope}/output_0"], name=scope)

    def head(self, writer: ModelWriter, x: str) -> str:
        """See `Projection.head`."""
        rows, columns = self._weights.tensor(LM_HEAD).shape
        return self._product(writer, "/lm_head", rows, columns, x, "logits")

    def _product(self, writer: ModelWriter, scope: str, n: int, k: int, x: str, output: str) -> str:
        rng = np.random.default_rng([n, k, len(scope)])
        if self._model.op == "MatMulNBits":
            return self._matmul_nbits(writer, scope, n, k, x, output, rng)
        return self._dequantize(writer, scope, n, k, x, output, rng)

    def _matmul_nbits(
        self, writer: ModelWriter, scope: str, n: int, k: int, x: str, output: str, rng: np.random.Generator
    ) -> str:
        bits, block, name = self._model.bits, self._model.block, weight_name(scope)
        blocks = -(-k // block)
        codes = rng.integers(0, 256, (n, blocks, block * bits // 8), dtype=np.uint8)
        scales = self._scales(rng, (n, blocks), k)
        inputs = [x, writer.initializer(f"{name}_Q", codes), writer.initializer(f"{name}_scales", scales)]
        if self._model.zero_points:
            points = rng.integers(0, 256, (n, -(-blocks * bits // 8)), dtype=np.uint8)
            inputs.append(writer.initializer(f"{name}_zp", points))
        attributes: dict[str, Any] = {"K": k, "N": n, "bits": bits, "block_size": block}
        return writer.node("MatMulNBits", inputs, [output], domain="com.microsoft", name=scope, **attributes)

    def _dequantize(
        self, writer: ModelWriter, scope: str, n: int, k: int, x: str, output: str, rng: np.random.Generator
    ) -> str:
        bits, block, name = self._model.bits, self._model.block, weight_name(scope)
        dtype = np.dtype(np.int8) if bits == 8 else np.dtype(ml_dtypes.int4)
        shape = (-(-k // block), n) if block else (n,)
        high = 1 << (bits - 1)
        codes = rng.integers(-high, high, (k, n)).astype(dtype)
        scales = self._scales(rng, shape, k)
        inputs = [writer.small_initializer(f"{name}_Q", codes), writer.initializer(f"{name}_scales", scales)]
        if self._model.zero_points:
            points = rng.integers(-high, high, shape).astype(dtype)
            inputs.append(writer.small_initializer(f"{name}_zp", points))
        attributes: dict[str, Any] = {"axis": 0, "block_size": block} if block else {"axis": 1}
        weight = writer.node("DequantizeLinear", inputs, [f"{scope}/DQ/output_0"], name=f"{scope}/DQ", **attributes)
        return writer.node("MatMul", [x, weight], [output], name=f"{scope}/MatMul")

    def _scales(self, rng: np.random.Generator, shape: tuple[int, ...], k: int) -> Array:
        """Positive scales with which a row of codes has about the norm of one."""
        scales: Array = rng.uniform(0.5, 1.0, shape).astype(np.float32)
        return scales / np.float32((1 << (self._model.bits - 1)) * np.sqrt(k))
