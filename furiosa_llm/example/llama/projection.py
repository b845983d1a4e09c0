"""How a genai-shaped graph writes its matrix products and its token embedding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from furiosa_llm.example.llama.onnx_writer import ModelWriter
from furiosa_llm.example.llama.weights import EMBEDDING, LM_HEAD, Array, LlamaWeights


class Projection(Protocol):
    """Writes the nodes and weights of a graph's matrix products.

    `scope` is a node's path without its operation, such as `/model/layers.0/mlp/up_proj`; the product's value is always
    named `{scope}/MatMul/output_0`, as the exporter does, except the head's, which is the graph output `logits`.
    """

    def project(self, writer: ModelWriter, scope: str, parts: Sequence[str], x: str) -> str:
        """Writes `x @ concat(parts).T`, [batch, sequence, in] -> [batch, sequence, sum of outs]; returns its name."""
        ...

    def embed(self, writer: ModelWriter, ids: str) -> str:
        """Writes the lookup of `ids`, [batch, sequence] -> [batch, sequence, H]; returns the value's name."""
        ...

    def head(self, writer: ModelWriter, x: str) -> str:
        """Writes the output projection, [batch, sequence, H] -> `logits` [batch, sequence, V]."""
        ...


def weight_name(scope: str) -> str:
    """The exporter's name for a product's weight: `/model/layers.0/x` -> `model.layers.0.x.MatMul.weight`."""
    return scope.strip("/").replace("/", ".") + ".MatMul.weight"


class DenseProjection:
    """Float32 weights and plain MatMul.

    A tied matrix is stored once, [H, V], and transposed for the lookup, as genai 0.18 does.
    """

    def __init__(self, weights: LlamaWeights) -> None:
        self._weights = weights

    def project(self, writer: ModelWriter, scope: str, parts: Sequence[str], x: str) -> str:
        """See `Projection.project`."""
        weight = writer.initializer(weight_name(scope), self._transposed(parts))
        return writer.node("MatMul", [x, weight], [f"{scope}/MatMul/output_0"], name=f"{scope}/MatMul")

    def embed(self, writer: ModelWriter, ids: str) -> str:
        """See `Projection.embed`."""
        scope = "/model/embed_tokens"
        if self._weights.config.tie_word_embeddings:
            shared = writer.initializer(weight_name("/lm_head"), self._transposed([EMBEDDING]))
            transposed = f"{scope}/Transpose/output_0"
            table = writer.node("Transpose", [shared], [transposed], name=f"{scope}/Transpose", perm=[1, 0])
        else:
            table = writer.initializer(EMBEDDING, self._weights.tensor(EMBEDDING))
        return writer.node("Gather", [table, ids], [f"{scope}/Gather/output_0"], name=f"{scope}/Gather")

    def head(self, writer: ModelWriter, x: str) -> str:
        """See `Projection.head`."""
        weight = weight_name("/lm_head")
        if not self._weights.config.tie_word_embeddings:
            writer.initializer(weight, self._transposed([LM_HEAD]))
        return writer.node("MatMul", [x, weight], ["logits"], name="/lm_head/MatMul")

    def _transposed(self, parts: Sequence[str]) -> Array:
        """[in, sum of outs], the layout MatMul multiplies by."""
        return np.concatenate([self._weights.tensor(part).T for part in parts], axis=1)
