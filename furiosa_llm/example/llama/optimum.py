"""A Llama-like decoder in the graph shape of Optimum's export (torch's tracing exporter, opset 18).

Everything decomposed: attention, rotary embedding from `position_ids`, norms by Pow, ReduceMean and Sqrt, grouped
key/value heads by Unsqueeze, Expand and Reshape, caches by Concat, the causal mask made in the graph. The shape and the
names were read off that exporter's output (`fixtures/zoo/tiny-llama-optimum`); weights of products are [in, out] under
running numbers, as there.
"""

from __future__ import annotations

import math
from itertools import count

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

from furiosa_llm.example.llama.onnx_writer import Dim, ModelWriter
from furiosa_llm.example.llama.torch_scope import END, TorchScope
from furiosa_llm.example.llama.weights import (
    EMBEDDING,
    FINAL_NORM,
    LM_HEAD,
    LlamaWeights,
    inverse_frequencies,
    layer_weight,
)

_FLOAT = TensorProto.FLOAT
_TOTAL = "past_sequence_length + sequence_length"


def write_optimum_graph(writer: ModelWriter, weights: LlamaWeights) -> onnx.ModelProto:
    """Writes the decoder that `weights` hold and returns the model.

    Inputs: input_ids [batch, sequence], attention_mask [batch, past + sequence] and position_ids [batch, sequence] in
    int64, past_key_values.N.key and .value [batch, kv heads, past, D] in float32, interleaved. Outputs: logits [batch,
    sequence, V] and present.N.key and .value [batch, kv heads, past + sequence, D] in float32, interleaved.
    """
    graph = _OptimumGraph(writer, weights)
    graph.declare_inputs_and_outputs()
    graph.decoder()
    return writer.model(producer="fixtures.llama.optimum", ir_version=8, opsets={"": 18})


class _OptimumGraph:
    """The parts of the graph, in the exporter's order of nodes."""

    def __init__(self, writer: ModelWriter, weights: LlamaWeights) -> None:
        self._writer = writer
        self._weights = weights
        self._config = weights.config
        self._numbers = count(1)
        self._model = TorchScope(writer, "/model")
        self._cosine = ""
        self._sine = ""

    def declare_inputs_and_outputs(self) -> None:
        """Declares token ids, mask, positions and caches; each layer's key comes before its value."""
        config, writer = self._config, self._writer
        tokens: tuple[Dim, Dim] = ("batch_size", "sequence_length")
        writer.graph_input("input_ids", TensorProto.INT64, tokens)
        writer.graph_input("attention_mask", TensorProto.INT64, ("batch_size", _TOTAL))
        writer.graph_input("position_ids", TensorProto.INT64, tokens)
        writer.graph_output("logits", _FLOAT, (*tokens, config.vocab_size))
        for layer in range(config.num_hidden_layers):
            for part in ("key", "value"):
                heads, width = config.num_key_value_heads, config.head_dim
                past: tuple[Dim, ...] = ("batch_size", heads, "past_sequence_length", width)
                writer.graph_input(f"past_key_values.{layer}.{part}", _FLOAT, past)
                writer.graph_output(f"present.{layer}.{part}", _FLOAT, ("batch_size", heads, _TOTAL, width))

    def decoder(self) -> None:
        """Writes embedding, mask, rotary angles, blocks, last norm and head."""
        embedding = self._writer.initializer(EMBEDDING, self._weights.tensor(EMBEDDING))
        residual = TorchScope(self._writer, "/model/embed_tokens").op("Gather", embedding, "input_ids")
        mask = self._causal_mask(residual)
        angles = self._rotary_embedding()
        for layer in range(self._config.num_hidden_layers):
            block = TorchScope(self._writer, f"/model/layers.{layer}")
            scope = f"/model/layers.{layer}/input_layernorm"
            residual, normed = self._norm(scope, layer_weight(layer, "input_layernorm"), residual)
            residual = block.op("Add", residual, self._attention(layer, normed, mask, angles))
            scope = f"/model/layers.{layer}/post_attention_layernorm"
            residual, normed = self._norm(scope, layer_weight(layer, "post_attention_layernorm"), residual)
            residual = block.op("Add", residual, self._feed_forward(layer, normed))
        _, normed = self._norm("/model/norm", FINAL_NORM, residual)
        self._head(normed, embedding)

    def _causal_mask(self, hidden: str) -> str:
        """A boolean mask [batch, 1, sequence, total]: true where a query may see a key."""
        scope = self._model
        past = scope.size("past_key_values.0.key", 2)
        end = scope.op("Add", past, scope.size(hidden, 1))
        positions = scope.arange(scope.cast(past, TensorProto.INT64), end)
        valid = scope.cast("attention_mask", TensorProto.BOOL)
        queries = scope.size(positions, 0)
        total = scope.op("Add", past, queries)
        batch = scope.size(hidden, 0)
        query = scope.unsqueeze(positions, 0, 1, 3)
        row = scope.unsqueeze(scope.arange(scope.int64(0), batch), 1, 2, 3)
        key = scope.unsqueeze(scope.arange(scope.int64(0), total), 0, 1, 2)
        empty_shape = scope.constant(np.array([], dtype=np.int64))
        true = scope.op("ConstantOfShape", empty_shape, value=numpy_helper.from_array(np.array([True])))
        causal = scope.op("And", true, scope.cast(scope.op("LessOrEqual", key, query), TensorProto.BOOL))
        mask = scope.op("And", causal, self._looked_up_validity(valid, row, key))
        return scope.expand(mask, scope.shape(batch, -1, queries, total))

    def _looked_up_validity(self, valid: str, row: str, key: str) -> str:
        """attention_mask[row, key] as tracing writes two-dimensional indexing: flat, by row * width + key."""
        scope = self._model
        width = scope.op("Gather", scope.op("Shape", valid), scope.axes(1), axis=0)
        flat = scope.op("Flatten", valid, axis=2)
        index = scope.op("Add", key, scope.op("Mul", row, width))
        found = scope.op("Gather", flat, index, axis=0)
        shape = scope.op("Shape", index)
        found = scope.reshape(found, scope.axes(-1))
        found = scope.reshape(found, scope.op("Concat", shape, axis=0))
        return scope.cast(found, TensorProto.BOOL)

    def _rotary_embedding(self) -> tuple[str, str]:
        """Cosine and sine of the rotary angles, each [batch, sequence, D]."""
        scope = TorchScope(self._writer, "/model/rotary_emb")
        frequencies = scope.constant(inverse_frequencies(self._config)[None, :, None])
        frequencies = scope.expand(frequencies, scope.shape(scope.size("position_ids", 0), -1, 1))
        frequencies = scope.cast(frequencies, _FLOAT)
        positions = scope.cast(scope.unsqueeze("position_ids", 1), _FLOAT)
        angles = scope.op("MatMul", scope.cast(frequencies, _FLOAT), scope.cast(positions, _FLOAT))
        angles = scope.op("Transpose", angles, perm=[0, 2, 1])
        both_halves = scope.op("Concat", angles, angles, axis=-1)
        cosine = scope.op("Mul", scope.op("Cos", both_halves), scope.float32(1.0))
        sine = scope.op("Mul", scope.op("Sin", both_halves), scope.float32(1.0))
        return scope.cast(cosine, _FLOAT), scope.cast(sine, _FLOAT)

    def _norm(self, path: str, source: str, x: str) -> tuple[str, str]:
        """The input and its root-mean-square norm; the residual goes on from the norm's cast, as tracing leaves it."""
        scope = TorchScope(self._writer, path)
        x = scope.cast(x, _FLOAT)
        square = scope.op("Pow", x, scope.float32(2.0))
        mean = scope.op("ReduceMean", square, scope.axes(-1), keepdims=1)
        root = scope.op("Sqrt", scope.op("Add", mean, scope.float32(self._config.rms_norm_eps)))
        normed = scope.op("Mul", x, scope.op("Div", scope.float32(1.0), root))
        weight = self._writer.initializer(source, self._weights.tensor(source))
        return x, scope.op("Mul", weight, scope.cast(normed, _FLOAT))

    def _attention(self, layer: int, normed: str, mask: str, angles: tuple[str, str]) -> str:
        config, path = self._config, f"/model/layers.{layer}/self_attn"
        scope = TorchScope(self._writer, path)
        batch, sequence = scope.size(normed, 0), scope.size(normed, 1)
        query = self._product(f"{path}/q_proj", layer_weight(layer, "self_attn.q_proj"), normed)
        shapes = [scope.shape(batch, sequence, -1, config.head_dim) for _ in range(3)]
        query = self._split_heads(scope, query, shapes[0])
        key = self._product(f"{path}/k_proj", layer_weight(layer, "self_attn.k_proj"), normed)
        key = self._split_heads(scope, key, shapes[1])
        value = self._product(f"{path}/v_proj", layer_weight(layer, "self_attn.v_proj"), normed)
        value = self._split_heads(scope, value, shapes[2])
        if layer == 0:
            # The exporter merges equal nodes, so that every block uses the first one's cosine and sine.
            self._cosine, self._sine = (scope.unsqueeze(part, 1) for part in angles)
        query, key = self._rotate(scope, query), self._rotate(scope, key)
        key = scope.op("Concat", f"past_key_values.{layer}.key", key, output=f"present.{layer}.key", axis=-2)
        value = scope.op("Concat", f"past_key_values.{layer}.value", value, output=f"present.{layer}.value", axis=-2)
        if config.num_key_value_heads != config.num_attention_heads:
            key, value = self._repeat_heads(scope, key), self._repeat_heads(scope, value)
        attended = self._scaled_dot_product(scope, query, key, value, mask)
        attended = scope.op("Transpose", attended, perm=[0, 2, 1, 3])
        attended = scope.reshape(attended, scope.shape(batch, sequence, -1))
        return self._product(f"{path}/o_proj", layer_weight(layer, "self_attn.o_proj"), attended)

    def _split_heads(self, scope: TorchScope, x: str, shape: str) -> str:
        """[batch, sequence, heads*D] -> [batch, heads, sequence, D]."""
        return scope.op("Transpose", scope.reshape(x, shape), perm=[0, 2, 1, 3])

    def _rotate(self, scope: TorchScope, x: str) -> str:
        """Turns element i of each head against element i + D/2; [batch, heads, sequence, D]."""
        straight = scope.op("Mul", x, self._cosine)
        half = scope.op("Div", scope.size(x, 3), scope.int64(2))
        half = scope.cast(scope.cast(half, TensorProto.INT64), TensorProto.INT64)
        first = scope.slice(x, 0, scope.unsqueeze(half, 0), 3)
        second = scope.slice(x, scope.unsqueeze(half, 0), END, 3)
        turned = scope.op("Concat", scope.op("Neg", second), first, axis=-1)
        return scope.op("Add", straight, scope.op("Mul", turned, self._sine))

    def _repeat_heads(self, scope: TorchScope, x: str) -> str:
        """[batch, kv heads, total, D] -> [batch, heads, total, D], each key/value head repeated for its query heads."""
        groups = self._config.num_attention_heads // self._config.num_key_value_heads
        batch, heads, total, width = (scope.size(x, dim) for dim in range(4))
        grouped = scope.unsqueeze(x, 2)
        grouped = scope.expand(grouped, scope.shape(batch, heads, groups, total, width))
        repeated = scope.op("Mul", heads, scope.int64(groups))
        return scope.reshape(grouped, scope.shape(batch, repeated, total, width))

    def _scaled_dot_product(self, scope: TorchScope, query: str, key: str, value: str, mask: str) -> str:
        """softmax(q k^T / sqrt(D) + mask) v with the scale's root on either side; [batch, heads, sequence, D]."""
        root = math.sqrt(self._config.attention_scale)
        total = scope.size(key, 2)
        visible = scope.slice(mask, 0, scope.unsqueeze(total, 0), 3)
        transposed = scope.op("Transpose", key, perm=[0, 1, 3, 2])
        query = scope.op("Mul", query, scope.float32(root))
        transposed = scope.op("Mul", transposed, scope.float32(root))
        scores = scope.op("MatMul", query, transposed)
        zero, hidden = (scope.constant(np.array([number], dtype=np.float32)) for number in (0.0, -np.inf))
        scores = scope.op("Add", scores, scope.op("Where", visible, zero, hidden))
        probabilities = scope.op("Softmax", scores, axis=-1)
        undefined = scope.op("IsNaN", probabilities)
        zero = scope.constant(np.array([0.0], dtype=np.float32))
        return scope.op("MatMul", scope.op("Where", undefined, zero, probabilities), value)

    def _feed_forward(self, layer: int, normed: str) -> str:
        path = f"/model/layers.{layer}/mlp"
        activation = TorchScope(self._writer, f"{path}/act_fn")
        gate = self._product(f"{path}/gate_proj", layer_weight(layer, "mlp.gate_proj"), normed)
        silu = activation.op("Mul", gate, activation.op("Sigmoid", gate))
        up = self._product(f"{path}/up_proj", layer_weight(layer, "mlp.up_proj"), normed)
        gated = TorchScope(self._writer, path).op("Mul", silu, up)
        return self._product(f"{path}/down_proj", layer_weight(layer, "mlp.down_proj"), gated)

    def _product(self, path: str, source: str, x: str, output: str | None = None) -> str:
        weight = self._writer.initializer(f"onnx::MatMul_{next(self._numbers)}", self._weights.tensor(source).T)
        return TorchScope(self._writer, path).op("MatMul", x, weight, output=output)

    def _head(self, normed: str, embedding: str) -> None:
        """The output projection; a tied embedding is transposed in the graph, so that it is stored once."""
        if not self._config.tie_word_embeddings:
            self._product("/lm_head", LM_HEAD, normed, output="logits")
            return
        scope = TorchScope(self._writer, "/lm_head")
        transposed = scope.op("Transpose", embedding, output="model.embed_tokens.weight_transposed", perm=[1, 0])
        scope.op("MatMul", normed, transposed, output="logits")
