"""A Llama-like decoder in the graph shape of onnxruntime-genai's model builder (0.18).

Opset 22 and com.microsoft: one packed QKV product, rotary embedding inside GroupQueryAttention, skip connections fused
into the norms, keys before values among the inputs. The shape was read off that exporter's output
(`fixtures/zoo/tiny-llama-genai-fp32`).
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

from furiosa_llm.example.llama.config import LlamaConfig
from furiosa_llm.example.llama.onnx_writer import Dim, ModelWriter
from furiosa_llm.example.llama.projection import Projection
from furiosa_llm.example.llama.weights import FINAL_NORM, QKV, LlamaWeights, layer_weight, rotary_caches

_MASK = "/model/attn_mask_reformat/attn_mask_subgraph"
_CONTRIB = "com.microsoft"
_HEAD_WIDTH = "kv_cache_dim"  # the exporter leaves it symbolic: readers take the number from genai_config.json
_TOKENS: tuple[Dim, Dim] = ("batch_size", "sequence_length")


def write_genai_graph(writer: ModelWriter, weights: LlamaWeights, projection: Projection) -> onnx.ModelProto:
    """Writes the decoder that `weights` hold, its products as `projection` says, and returns the model.

    Inputs: input_ids [batch, sequence] and attention_mask [batch, total] in int64, past_key_values.N.key and .value
    [batch, kv heads, past, D] in float32. Outputs: logits [batch, sequence, V] and present.N.key and .value
    [batch, kv heads, total, D] in float32.
    """
    graph = _GenaiGraph(writer, weights, projection)
    graph.declare_inputs_and_outputs()
    graph.sequence_lengths()
    graph.decoder()
    opsets = {"": 22, _CONTRIB: 1}
    return writer.model(producer="fixtures.llama.genai", ir_version=10, opsets=opsets)


class _GenaiGraph:
    """The parts of the graph, in the exporter's order of nodes."""

    def __init__(self, writer: ModelWriter, weights: LlamaWeights, projection: Projection) -> None:
        self._writer = writer
        self._weights = weights
        self._projection = projection
        self._config: LlamaConfig = weights.config

    def declare_inputs_and_outputs(self) -> None:
        """Declares token ids, mask and caches; all keys come before all values, as the exporter orders them."""
        config, writer = self._config, self._writer
        writer.graph_input("input_ids", TensorProto.INT64, _TOKENS)
        writer.graph_input("attention_mask", TensorProto.INT64, ("batch_size", "total_sequence_length"))
        writer.graph_output("logits", TensorProto.FLOAT, (*_TOKENS, config.vocab_size))
        for part in ("key", "value"):
            for layer in range(config.num_hidden_layers):
                heads = config.num_key_value_heads
                past: tuple[Dim, ...] = ("batch_size", heads, "past_sequence_length", _HEAD_WIDTH)
                present: tuple[Dim, ...] = ("batch_size", heads, "total_sequence_length", _HEAD_WIDTH)
                writer.graph_input(f"past_key_values.{layer}.{part}", TensorProto.FLOAT, past)
                writer.graph_output(f"present.{layer}.{part}", TensorProto.FLOAT, present)

    def sequence_lengths(self) -> None:
        """Writes what GroupQueryAttention takes for a mask: valid tokens less one, [batch], and the total, a scalar."""
        writer = self._writer
        one_axis = self._int64_constant("[1]", np.array([1], dtype=np.int64))
        total = writer.node(
            "ReduceSum",
            ["attention_mask", one_axis],
            [f"{_MASK}/ReduceSum/output_0"],
            name=f"{_MASK}/ReduceSum",
            keepdims=0,
        )
        last = writer.node("Sub", [total, one_axis], [f"{_MASK}/Sub/output_0"], name=f"{_MASK}/Sub")
        self._cast_to_int32(f"{_MASK}/Sub/Cast", last)
        shape = writer.node("Shape", ["attention_mask"], [f"{_MASK}/Shape/output_0"], name=f"{_MASK}/Shape")
        one = self._int64_constant("1", np.array(1, dtype=np.int64))
        length = writer.node("Gather", [shape, one], [f"{_MASK}/Gather/output_0"], name=f"{_MASK}/Gather", axis=0)
        self._cast_to_int32(f"{_MASK}/Gather/Cast", length)

    def decoder(self) -> None:
        """Writes embedding, blocks, last norm and head."""
        config = self._config
        residual = self._activation(self._projection.embed(self._writer, "input_ids"), config.hidden_size)
        normed = self._first_norm(residual)
        for layer in range(config.num_hidden_layers):
            attended = self._attention(layer, normed)
            scope = f"/model/layers.{layer}/post_attention_layernorm"
            normed, residual = self._skip_norm(
                scope, layer_weight(layer, "post_attention_layernorm"), residual, attended
            )
            fed = self._feed_forward(layer, normed)
            normed, residual = self._norm_after_block(layer, residual, fed)
        self._projection.head(self._writer, normed)

    def _first_norm(self, residual: str) -> str:
        scope = "/model/layers.0/input_layernorm"
        weight = self._norm_weight(scope, layer_weight(0, "input_layernorm"))
        output = self._writer.node(
            "SimplifiedLayerNormalization",
            [residual, weight],
            [f"{scope}/output_0"],
            name=f"{scope}/LayerNorm",
            epsilon=self._config.rms_norm_eps,
            axis=-1,
            stash_type=1,
        )
        return self._activation(output, self._config.hidden_size)

    def _norm_after_block(self, layer: int, residual: str, update: str) -> tuple[str, str]:
        """The next block's input norm, or the model's last norm after the last block."""
        following = layer + 1
        if following == self._config.num_hidden_layers:
            scope = f"/model/layers.{following}/final_norm_layernorm"
            return self._skip_norm(scope, FINAL_NORM, residual, update, last=True)
        scope = f"/model/layers.{following}/input_layernorm"
        return self._skip_norm(scope, layer_weight(following, "input_layernorm"), residual, update)

    def _skip_norm(self, scope: str, source: str, residual: str, update: str, last: bool = False) -> tuple[str, str]:
        """norm(residual + update) and, unless nothing follows, the sum itself."""
        weight = self._norm_weight(scope, source)
        outputs = [f"{scope}/output_0"] if last else [f"{scope}/output_0", "", "", f"{scope}/output_3"]
        self._writer.node(
            "SkipSimplifiedLayerNormalization",
            [residual, update, weight],
            outputs,
            name=f"{scope}/SkipLayerNorm",
            domain=_CONTRIB,
            epsilon=self._config.rms_norm_eps,
        )
        for output in filter(None, outputs):
            self._activation(output, self._config.hidden_size)
        return outputs[0], outputs[-1]

    def _attention(self, layer: int, normed: str) -> str:
        config, scope = self._config, f"/model/layers.{layer}/attn"
        parts = [layer_weight(layer, part) for part in QKV]
        packed = self._product(f"{scope}/qkv_proj", parts, normed, config.query_size + 2 * config.kv_size)
        if layer == 0:
            for name, cache in zip(("cos_cache", "sin_cache"), rotary_caches(config), strict=True):
                self._writer.initializer(name, cache)
        past = [f"past_key_values.{layer}.key", f"past_key_values.{layer}.value"]
        lengths = [f"{_MASK}/Sub/Cast/output_0", f"{_MASK}/Gather/Cast/output_0"]
        attended = self._writer.node(
            "GroupQueryAttention",
            [packed, "", "", *past, *lengths, "cos_cache", "sin_cache", "", "", ""],
            [f"{scope}/GroupQueryAttention/output_0", f"present.{layer}.key", f"present.{layer}.value"],
            name=f"{scope}/GroupQueryAttention",
            domain=_CONTRIB,
            num_heads=config.num_attention_heads,
            kv_num_heads=config.num_key_value_heads,
            scale=config.attention_scale,
            local_window_size=-1,
            softcap=0.0,
            do_rotary=1,
            rotary_interleaved=0,
        )
        self._activation(attended, config.query_size)
        return self._product(f"{scope}/o_proj", [layer_weight(layer, "self_attn.o_proj")], attended, config.hidden_size)

    def _feed_forward(self, layer: int, normed: str) -> str:
        config, writer, scope = self._config, self._writer, f"/model/layers.{layer}/mlp"
        width = config.intermediate_size
        gate = self._product(f"{scope}/gate_proj", [layer_weight(layer, "mlp.gate_proj")], normed, width)
        up = self._product(f"{scope}/up_proj", [layer_weight(layer, "mlp.up_proj")], normed, width)
        activation = f"{scope}/act_fn"
        sigmoid = writer.node("Sigmoid", [gate], [f"{activation}/Sigmoid/output_0"], name=f"{activation}/Sigmoid")
        silu = writer.node("Mul", [gate, sigmoid], [f"{activation}/Mul/output_0"], name=f"{activation}/Mul")
        gated = writer.node("Mul", [silu, up], [f"{scope}/Mul/output_0"], name=f"{scope}/Mul")
        for value in (sigmoid, silu, gated):
            self._activation(value, width)
        return self._product(f"{scope}/down_proj", [layer_weight(layer, "mlp.down_proj")], gated, config.hidden_size)

    def _product(self, scope: str, parts: list[str], x: str, width: int) -> str:
        return self._activation(self._projection.project(self._writer, scope, parts, x), width)

    def _norm_weight(self, scope: str, source: str) -> str:
        return self._writer.initializer(scope.strip("/").replace("/", ".") + ".weight", self._weights.tensor(source))

    def _activation(self, value: str, width: int) -> str:
        self._writer.value_info(value, TensorProto.FLOAT, (*_TOKENS, width))
        return value

    def _int64_constant(self, text: str, values: np.ndarray) -> str:
        output = f"/model/constants/INT64/{text}"
        tensor = numpy_helper.from_array(values, output)
        return self._writer.node("Constant", [], [output], name=f"/model/constant_nodes/INT64/{text}", value=tensor)

    def _cast_to_int32(self, name: str, value: str) -> str:
        return self._writer.node("Cast", [value], [f"{name}/output_0"], name=name, to=TensorProto.INT32)
