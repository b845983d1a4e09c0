"""`/v1/score` and `/v1/rerank`: cosines of an encoder's vectors, or what a cross-encoder says of pairs."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from furiosa_llm.builder import ArtifactBuilder
from furiosa_llm.runtime.encoder import Encoder
from furiosa_llm.server.settings import ServerSettings
from tests.server.conftest import error_of, load, serving

TEXTS = ["the quick brown fox", "hello", "hello there"]


@pytest.fixture(scope="module")
def by_vectors(encoder_artifact: Path) -> Iterator[httpx.Client]:
    with serving(load(encoder_artifact), ServerSettings()) as url, httpx.Client(base_url=url) as client:
        yield client


@pytest.fixture(scope="module")
def cross_encoder(tmp_path_factory: pytest.TempPathFactory, zoo: Path) -> Path:
    """An artifact of a model that gives a number for each pair; its tokenizer puts 1 before, between and behind."""
    folder = tmp_path_factory.mktemp("cross-encoder")
    random = np.random.default_rng(0)
    weights = {
        "words": random.standard_normal((1024, 16)).astype(np.float32),
        "kinds": random.standard_normal((2, 16)).astype(np.float32),
        "matrix": random.standard_normal((16, 16)).astype(np.float32),
        "label": random.standard_normal((16, 1)).astype(np.float32),
        "axes": np.array([1]),
    }
    nodes = [
        helper.make_node("Gather", ["words", "input_ids"], ["read"]),
        helper.make_node("Gather", ["kinds", "token_type_ids"], ["kind"]),
        helper.make_node("Add", ["read", "kind"], ["both"]),
        helper.make_node("MatMul", ["both", "matrix"], ["states"]),
        helper.make_node("Tanh", ["states"], ["bent"]),
        helper.make_node("ReduceMean", ["bent", "axes"], ["vector"], keepdims=0),
        helper.make_node("MatMul", ["vector", "label"], ["logits"]),
    ]
    inputs = [
        helper.make_tensor_value_info(name, TensorProto.INT64, ["batch", "sequence"])
        for name in ("input_ids", "token_type_ids")
    ]
    graph = helper.make_graph(
        nodes,
        "cross-encoder",
        inputs,
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 1])],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), folder / "model.onnx"
    )
    written = json.loads((zoo / "tiny-llama-optimum" / "tokenizer.json").read_text(encoding="utf-8"))
    around = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    behind = {"SpecialToken": {"id": "<s>", "type_id": 1}}
    texts = [{"Sequence": {"id": name, "type_id": kind}} for kind, name in enumerate("AB")]
    written["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [around, texts[0]],
        "pair": [around, texts[0], around, texts[1], behind],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
    }
    (folder / "tokenizer.json").write_text(json.dumps(written))
    (folder / "config.json").write_text(json.dumps({"max_position_embeddings": 48, "vocab_size": 1024}))
    ArtifactBuilder(folder / "model.onnx").build(folder / "artifact")
    return folder


@pytest.fixture(scope="module")
def by_pairs(cross_encoder: Path) -> Iterator[httpx.Client]:
    with serving(load(cross_encoder / "artifact"), ServerSettings()) as url, httpx.Client(base_url=url) as client:
        yield client


def asked(client: httpx.Client, path: str, **fields: Any) -> httpx.Response:
    name = client.get("/v1/models").json()["data"][0]["id"]
    return client.post(path, json={"model": name, **fields})


def test_scores_are_cosines_of_vectors(by_vectors: httpx.Client) -> None:
    data = asked(by_vectors, "/v1/embeddings", input=TEXTS).json()
    vectors = [np.array(one["embedding"]) for one in data["data"]]
    expected = [float(vectors[0] @ vectors[1]), float(vectors[0] @ vectors[2])]
    answer = asked(by_vectors, "/v1/score", text_1=TEXTS[0], text_2=TEXTS[1:]).json()
    assert [one["score"] for one in answer["data"]] == pytest.approx(expected, abs=1e-6)
    assert [(one["index"], one["object"]) for one in answer["data"]] == [(0, "score"), (1, "score")]
    assert answer["usage"] == data["usage"]  # each text is read once
    each = asked(by_vectors, "/score", queries=TEXTS[:2], documents=TEXTS[1:]).json()["data"]
    assert each[0]["score"] == answer["data"][0]["score"]
    assert each[1]["score"] == pytest.approx(float(vectors[1] @ vectors[2]), abs=1e-6)
    same = asked(by_vectors, "/v1/score", text_1="hello", text_2="hello").json()["data"]
    assert same[0]["score"] == pytest.approx(1.0)


@pytest.mark.parametrize("path", ["/v1/rerank", "/v2/rerank", "/rerank"])
def test_documents_are_put_in_order(by_vectors: httpx.Client, path: str) -> None:
    scores = asked(by_vectors, "/v1/score", text_1=TEXTS[2], text_2=TEXTS).json()["data"]
    documents = [TEXTS[0], {"text": TEXTS[1], "title": "x"}, TEXTS[2]]
    found = asked(by_vectors, path, query=TEXTS[2], documents=documents).json()
    assert found["results"][0]["index"] == 2
    assert [one["relevance_score"] for one in found["results"]] == sorted((s["score"] for s in scores), reverse=True)
    assert all(one["document"] == {"text": TEXTS[one["index"]]} for one in found["results"])
    first = asked(by_vectors, path, query=TEXTS[2], documents=documents, top_n=1, return_documents=False).json()
    assert [(one["index"], one["document"]) for one in first["results"]] == [(2, None)]


def test_a_cross_encoder_reads_both_texts(by_pairs: httpx.Client, cross_encoder: Path) -> None:
    session = onnxruntime.InferenceSession(cross_encoder / "model.onnx")
    with Encoder.load_artifact(cross_encoder / "artifact") as encoder:
        assert encoder.tokenizer is not None
        rows = [encoder.tokenizer.encode(text) for text in TEXTS]
    expected = []
    for row in rows[1:]:
        tokens, kinds = [1, *rows[0], 1, *row, 1], [0] * (len(rows[0]) + 2) + [1] * (len(row) + 1)
        (logits,) = session.run(None, {"input_ids": np.array([tokens]), "token_type_ids": np.array([kinds])})
        expected.append(1 / (1 + math.exp(-logits[0, 0])))
    answer = asked(by_pairs, "/v1/score", text_1=TEXTS[0], text_2=TEXTS[1:]).json()
    assert [one["score"] for one in answer["data"]] == pytest.approx(expected, rel=1e-5)
    assert answer["usage"]["prompt_tokens"] == sum(len(rows[0]) + len(row) + 3 for row in rows[1:])
    many = asked(by_pairs, "/v1/score", text_1=TEXTS[0], text_2=TEXTS[1:] * 20).json()["data"]
    # A product with one row for each text rounds by their number: docs/encoders.md has the bound.
    assert [one["score"] for one in many] == pytest.approx([one["score"] for one in answer["data"]] * 20, abs=1e-6)
    turned = asked(by_pairs, "/v1/score", text_1=TEXTS[1], text_2=TEXTS[0]).json()["data"][0]["score"]
    assert turned != answer["data"][0]["score"]
    best = asked(by_pairs, "/v1/rerank", query=TEXTS[0], documents=TEXTS[1:]).json()["results"][0]
    assert best["relevance_score"] == max(one["score"] for one in answer["data"])


def test_pairs_are_cut_at_the_end_of_the_second_text(by_pairs: httpx.Client) -> None:
    long = "the quick brown fox jumps over the lazy dog " * 4
    refused = asked(by_pairs, "/v1/score", text_1="hello", text_2=long)
    assert "the model takes at most 48" in error_of(refused)["message"]
    cut = asked(by_pairs, "/v1/score", text_1="hello", text_2=long, truncate_prompt_tokens=-1).json()
    assert cut["usage"]["prompt_tokens"] == 48
    both = asked(by_pairs, "/v1/score", text_1=long, text_2=long, truncate_prompt_tokens=-1).json()
    assert both["usage"]["prompt_tokens"] == 48


@pytest.mark.parametrize(
    ("path", "fields", "message"),
    [
        ("/v1/score", {"text_1": "a"}, "text_1 and text_2 need a text"),
        ("/v1/score", {"text_1": ["a", "b"], "text_2": ["a", "b", "c"]}, "text_1 has 2 texts for the 3 of text_2"),
        ("/v1/score", {"text_1": "a", "text_2": [""]}, "the prompt has no tokens"),
        ("/v1/score", {"text_1": "a", "text_2": "x" * 2**18}, "more than 262144 characters"),
        ("/v1/rerank", {"query": "a", "documents": []}, "documents is empty"),
        ("/v1/rerank", {"query": "a", "documents": [{"image": "x"}]}, "documents"),
        ("/v1/rerank", {"query": "a"}, "documents: Field required"),
        ("/v1/rerank", {"query": "a", "documents": ["b"], "top_n": -1}, "top_n must be at least 0"),
    ],
)
def test_what_cannot_be_scored(by_vectors: httpx.Client, path: str, fields: dict[str, Any], message: str) -> None:
    response = asked(by_vectors, path, **fields)
    assert response.status_code == 400
    assert message in error_of(response)["message"]


def test_models_that_cannot_score_say_so(url: str, by_pairs: httpx.Client) -> None:
    with httpx.Client(base_url=url) as decoder:
        for response in (
            asked(decoder, "/v1/rerank", query="a", documents=["b"]),
            asked(decoder, "/v1/score", text_1="a", text_2="b"),
        ):
            assert response.status_code == 400
            assert "generates and makes no embeddings" in error_of(response)["message"]
    refused = asked(by_pairs, "/v1/embeddings", input="a")
    assert "scores pairs of texts, and makes no embeddings; use /v1/score" in error_of(refused)["message"]
