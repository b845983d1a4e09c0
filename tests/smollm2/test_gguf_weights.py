"""A tiny GGUF file, written by the `gguf` package, read as weights and written as a 4-bit model."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import onnxruntime as ort
import pytest
from gguf import GGMLQuantizationType

from furiosa_llm.example.errors import ModelFileError
from furiosa_llm.example.llama.genai import write_genai_graph
from furiosa_llm.example.llama.onnx_writer import MODEL, write_model_files
from furiosa_llm.example.llama.projection import DenseProjection, Projection
from furiosa_llm.example.llama.weights import EMBEDDING, FINAL_NORM, Array
from furiosa_llm.example.smollm2.gguf_weights import GgufWeights
from furiosa_llm.example.smollm2.int4 import Int4Projection
from furiosa_llm.example.smollm2.tokenizer import build_tokenizer, chat_template

HIDDEN, FEED_FORWARD, VOCABULARY, HEADS, KV_HEADS, WIDTH = 64, 96, 128, 4, 2, 16
MATRICES = {
    "attn_q": (HEADS * WIDTH, HIDDEN),
    "attn_k": (KV_HEADS * WIDTH, HIDDEN),
    "attn_v": (KV_HEADS * WIDTH, HIDDEN),
    "attn_output": (HIDDEN, HEADS * WIDTH),
    "ffn_gate": (FEED_FORWARD, HIDDEN),
    "ffn_up": (FEED_FORWARD, HIDDEN),
    "ffn_down": (HIDDEN, FEED_FORWARD),
}


def _write_gguf(path: Path, matrix_type: GGMLQuantizationType) -> None:
    random = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_vocab_size(VOCABULARY)
    writer.add_context_length(32)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(FEED_FORWARD)
    writer.add_block_count(1)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_dimension_count(WIDTH)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("other")
    writer.add_chat_template("{{ messages }}")
    for norm in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        writer.add_tensor(f"{norm}.weight", 1 + 0.2 * random.standard_normal(HIDDEN, dtype=np.float32))
    quantized = {f"blk.0.{name}": (shape, matrix_type) for name, shape in MATRICES.items()}
    quantized["token_embd"] = ((VOCABULARY, HIDDEN), GGMLQuantizationType.Q8_0)
    for name, (shape, kind) in quantized.items():
        values = random.standard_normal(shape, dtype=np.float32) / np.float32(np.sqrt(shape[1]))
        writer.add_tensor(f"{name}.weight", gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def tiny_gguf(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.gguf"
    _write_gguf(path, GGMLQuantizationType.Q4_1)
    return path


def _stored(path: Path, name: str) -> Array:
    (found,) = (tensor for tensor in gguf.GGUFReader(path).tensors if tensor.name == name)
    return gguf.quants.dequantize(found.data, found.tensor_type)


def test_sizes_come_from_the_file(tiny_gguf: Path) -> None:
    config = GgufWeights(tiny_gguf).config
    assert (config.hidden_size, config.intermediate_size, config.vocab_size) == (HIDDEN, FEED_FORWARD, VOCABULARY)
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (HEADS, KV_HEADS, WIDTH)
    assert config.rms_norm_eps == pytest.approx(1e-5)
    assert config.tie_word_embeddings


def test_tensors_under_hugging_face_names(tiny_gguf: Path) -> None:
    weights = GgufWeights(tiny_gguf)
    for name, stored in {
        EMBEDDING: "token_embd.weight",
        FINAL_NORM: "output_norm.weight",
        "model.layers.0.self_attn.v_proj.weight": "blk.0.attn_v.weight",
        "model.layers.0.mlp.down_proj.weight": "blk.0.ffn_down.weight",
    }.items():
        np.testing.assert_array_equal(weights.tensor(name), _stored(tiny_gguf, stored))


@pytest.mark.parametrize(("part", "heads"), [("q", HEADS), ("k", KV_HEADS)])
def test_query_and_key_rows_are_put_back(part: str, heads: int, tiny_gguf: Path) -> None:
    stored = _stored(tiny_gguf, f"blk.0.attn_{part}.weight")
    found = GgufWeights(tiny_gguf).tensor(f"model.layers.0.self_attn.{part}_proj.weight")
    half = WIDTH // 2
    for head in range(heads):
        first = head * WIDTH
        np.testing.assert_array_equal(found[first : first + half], stored[first : first + WIDTH : 2])
        np.testing.assert_array_equal(found[first + half : first + WIDTH], stored[first + 1 : first + WIDTH : 2])


def test_int4_graph_is_exact(tiny_gguf: Path, tmp_path: Path) -> None:
    weights = GgufWeights(tiny_gguf)
    results = []
    projections: list[Projection] = [DenseProjection(weights), Int4Projection(weights, accuracy_level=0)]
    for index, projection in enumerate(projections):
        results.append(_logits(tmp_path / str(index), weights, projection))
    dense, int4 = results
    np.testing.assert_allclose(int4, dense, rtol=0, atol=1e-5 * float(np.abs(dense).max()))


def test_int4_graph_at_level_4_rounds_activations(tiny_gguf: Path, tmp_path: Path) -> None:
    weights = GgufWeights(tiny_gguf)
    dense = _logits(tmp_path / "dense", weights, DenseProjection(weights))
    rounded = _logits(tmp_path / "rounded", weights, Int4Projection(weights))
    np.testing.assert_allclose(rounded, dense, rtol=0, atol=0.05 * float(np.abs(dense).max()))


def _logits(folder: Path, weights: GgufWeights, projection: Projection) -> Array:
    folder.mkdir()
    write_model_files(folder, lambda writer: write_genai_graph(writer, weights, projection))
    session = ort.InferenceSession(folder / MODEL, providers=["CPUExecutionProvider"])
    tokens = np.arange(5, dtype=np.int64)[None]
    past = np.zeros((1, KV_HEADS, 0, WIDTH), dtype=np.float32)
    inputs = {"input_ids": tokens, "attention_mask": np.ones_like(tokens)}
    caches = {f"past_key_values.0.{part}": past for part in ("key", "value")}
    logits: Array = session.run(["logits"], inputs | caches)[0]
    return logits


def test_what_is_not_gguf_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text.gguf").write_text("no model at all")
    with pytest.raises(ModelFileError, match=r"text\.gguf is not a readable GGUF file"):
        GgufWeights(tmp_path / "text.gguf")


def test_missing_field_and_tensor_are_named(tiny_gguf: Path) -> None:
    weights = GgufWeights(tiny_gguf)
    with pytest.raises(ModelFileError, match=r"has no field 'tokenizer\.ggml\.tokens'"):
        weights.field("tokenizer.ggml.tokens")
    with pytest.raises(ModelFileError, match=r"no tensor for 'lm_head\.weight'"):
        weights.tensor("lm_head.weight")


def test_another_quantisation_is_named(tmp_path: Path) -> None:
    path = tmp_path / "other.gguf"
    _write_gguf(path, GGMLQuantizationType.Q4_0)
    with pytest.raises(ModelFileError, match=r"tensor 'blk\.0\.ffn_up\.weight' is Q4_0, expected Q4_1"):
        GgufWeights(path).tensor("model.layers.0.mlp.up_proj.weight")


def test_another_pre_tokenizer_is_refused(tiny_gguf: Path) -> None:
    with pytest.raises(ModelFileError, match=r"tokenizer is \('gpt2', 'other'\), expected \('gpt2', 'smollm'\)"):
        build_tokenizer(GgufWeights(tiny_gguf))


def test_another_chat_template_is_refused(tiny_gguf: Path) -> None:
    with pytest.raises(
        ModelFileError, match=r"no default system message of the known text; found '\{\{ messages \}\}'"
    ):
        chat_template(GgufWeights(tiny_gguf))
