"""Vectors of texts: those of the unsplit model, whatever stands beside a text, and what is refused."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from fixtures.packaged import sentence_encoder
from furiosa_llm import LLM
from furiosa_llm.builder import ArtifactBuilder
from furiosa_llm.runtime.artifact.pooling import Pooling, PoolingType
from furiosa_llm.runtime.encoder import Encoder
from furiosa_llm.runtime.errors import ContextLengthError, InputError, TokenizerError, UnsupportedError
from furiosa_llm.runtime.requests.prompts import Prompt
from furiosa_llm.runtime.tokens.tokenizer import Tokenizer
from tests.support.artifacts import artifact_of
from tests.support.runtime.bracketed import bracketed_tokenizer

LENGTHS = (7, 3, 7, 12, 3, 1, 7)


@pytest.fixture(scope="module")
def bert(zoo: Path) -> Path:
    return zoo / "tiny-bert-optimum" / "model.onnx"


@pytest.fixture(scope="module")
def built() -> dict[int, Path]:
    return {size: artifact_of("tiny-bert-optimum", size) for size in (4, 8)}


@pytest.fixture(scope="module")
def encoder(built: dict[int, Path]) -> Iterator[Encoder]:
    with Encoder.load_artifact(built[4]) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    random = np.random.default_rng(1)
    return [random.integers(0, 1024, length).tolist() for length in LENGTHS]


@pytest.fixture(scope="module")
def states(bert: Path) -> Callable[[list[int]], Any]:
    """The unsplit model's states `[sequence, hidden]` of one prompt."""
    session = onnxruntime.InferenceSession(bert)

    def run(prompt: list[int]) -> Any:
        ids = np.array([prompt])
        feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
        return session.run(["logits"], feeds)[0][0]

    return run


@pytest.mark.parametrize("size", [4, 8])
def test_vectors_are_those_of_the_unsplit_model(
    size: int, built: dict[int, Path], prompts: list[list[int]], states: Callable[[list[int]], Any]
) -> None:
    wholes = [states(prompt).astype(np.float64) for prompt in prompts]
    expected = {
        "mean": [whole.mean(axis=0) for whole in wholes],
        "cls": [whole[0] for whole in wholes],
        "last": [whole[-1] for whole in wholes],
    }
    with Encoder.load_artifact(built[size]) as encoder:
        for pooling, normalize in itertools.product(get_args(PoolingType), (False, True)):
            found = encoder.encode(prompts, pooling=pooling, normalize=normalize)
            assert [one.prompt_token_ids for one in found] == prompts
            for one, vector in zip(found, expected[pooling], strict=True):
                wanted = vector / np.linalg.norm(vector) if normalize else vector
                assert one.outputs.data.dtype == np.float32
                np.testing.assert_allclose(one.outputs.data, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())


def test_what_stands_beside_a_text_alters_nothing(encoder: Encoder, prompts: list[list[int]]) -> None:
    together = encoder.encode(prompts)
    for one, prompt in zip(together, prompts, strict=True):
        (alone,) = encoder.encode([prompt])
        assert np.array_equal(one.outputs.data, alone.outputs.data)


def test_padded_batches_give_the_same_but_for_rounding(
    built: dict[int, Path], encoder: Encoder, prompts: list[list[int]]
) -> None:
    with Encoder.load_artifact(built[4], padded=True, max_batch_size=4) as padded:
        assert [len(batch) for batch in padded._batches(prompts)] == [4, 3]
        for pooling in ("mean", "last"):
            pairs = zip(padded.encode(prompts, pooling=pooling), encoder.encode(prompts, pooling=pooling), strict=True)
            for one, other in pairs:
                np.testing.assert_allclose(one.outputs.data, other.outputs.data, rtol=0, atol=1e-6)


def test_embed_gives_lists_and_running_request_ids(encoder: Encoder, prompts: list[list[int]]) -> None:
    first, second = encoder.embed(prompts[:2])
    (array, _) = encoder.encode(prompts[:2])
    assert first.outputs.embedding == array.outputs.data.tolist()
    assert first.finished
    assert int(second.request_id) == int(first.request_id) + 1
    assert np.linalg.norm(first.outputs.embedding) == pytest.approx(1.0, abs=1e-6)


def test_texts_are_counted(
    built: dict[int, Path], prompts: list[list[int]], capsys: pytest.CaptureFixture[str]
) -> None:
    counts: list[int] = []

    class Bar:
        def __init__(self, **options: Any) -> None:
            counts.append(options["total"])

        def update(self, done: int) -> None:
            counts.append(done)

        def close(self) -> None:
            pass

    with LLM(built[4], use_tqdm_on_load=False) as llm:
        llm.encode(prompts[:3], use_tqdm=Bar)
        assert counts[0] == sum(counts[1:]) == 3
        assert capsys.readouterr().err == ""
        llm.embed(prompts[0], use_tqdm=True)
    assert capsys.readouterr().err.startswith("reading texts\n")


def test_forms_of_a_prompt(encoder: Encoder, zoo: Path, built: dict[int, Path]) -> None:
    expected = encoder.embed([[5, 6, 7]])[0].outputs
    for form in ([5, 6, 7], (5, 6, 7), {"prompt_token_ids": [5, 6, 7]}, [{"prompt_token_ids": [5, 6, 7]}]):
        (found,) = encoder.embed(form)
        assert found.outputs == expected
    assert encoder.embed([]) == []
    forms: list[Prompt] = ["hello", {"prompt": "hello"}]
    with Encoder.load_artifact(built[4], tokenizer=zoo / "tiny-llama-optimum") as reading:
        texts = reading.embed([*forms])
        assert texts[0].outputs == texts[1].outputs == reading.embed("hello")[0].outputs
        assert reading.embed([texts[0].prompt_token_ids])[0].outputs == texts[0].outputs


@pytest.mark.parametrize("prompt", [None, 2.5, {"text": "x"}, {"prompt": 5}, [1.5], b"ab", [True]])
def test_what_is_no_prompt(prompt: Any, encoder: Encoder) -> None:
    for given in (prompt, [prompt]):
        with pytest.raises(InputError, match="Unsupported prompt type"):
            encoder.embed([given])
    with pytest.raises(InputError, match="Unsupported prompt type: int 3"):
        encoder.embed(3)  # type: ignore[arg-type]


def test_prompts_that_cannot_be_run(encoder: Encoder) -> None:
    with pytest.raises(ContextLengthError, match=r"513 tokens, the model takes at most 512.*truncate_prompt_tokens"):
        encoder.embed([[1] * 513])
    assert len(encoder.embed([[1] * 513], truncate_prompt_tokens=-1)[0].prompt_token_ids) == 512
    assert encoder.embed([[1, 2, 3]], truncate_prompt_tokens=2)[0].prompt_token_ids == [1, 2]
    with pytest.raises(InputError, match="at least 1, or -1"):
        encoder.embed([[1]], truncate_prompt_tokens=0)
    with pytest.raises(InputError, match="no tokens"):
        encoder.embed([[]])
    for token in (-1, 1024):
        with pytest.raises(InputError, match=rf"ids\[1\] is {token}, but the model's tokens are 0 to 1023"):
            encoder.embed([[1, token]])
    with pytest.raises(TokenizerError, match=r"no tokenizer\.json; give token ids"):
        encoder.embed("hello")


def test_the_models_own_pooling_is_the_default(built: dict[int, Path], encoder: Encoder) -> None:
    own = Pooling(pooling="cls", normalize=False, max_sequence_length=4)
    with Encoder.load_artifact(built[4], pooling=own) as loaded:
        (found,) = loaded.embed([[5, 6, 7]])
        (expected,) = encoder.embed([[5, 6, 7]], pooling="cls", normalize=False)
        assert found.outputs == expected.outputs
        with pytest.raises(ContextLengthError, match="at most 4"):
            loaded.embed([[1] * 5])


def test_models_that_make_no_vectors_of_tokens() -> None:
    for model, use in (("tiny-vit-optimum", "run"), ("tiny-llama-genai-fp32", "generate")):
        with pytest.raises(UnsupportedError, match=f"for encoders;.*furiosa-llm {use}"):
            Encoder.load_artifact(artifact_of(model))
    with pytest.raises(UnsupportedError, match=r"'encoder_attention_mask'.*cannot be made from token ids"):
        Encoder.load_artifact(artifact_of("tiny-t5-optimum/decoder_model.onnx"))


def test_options_out_of_range(built: dict[int, Path]) -> None:
    with pytest.raises(InputError, match="max_batch_size must be an integer of at least 1, got 0"):
        Encoder.load_artifact(built[4], max_batch_size=0)
    with pytest.raises(InputError, match=r"output='hidden' is no output.*logits \['batch', 'sequence', 1024\]"):
        Encoder.load_artifact(built[4], output="hidden")


# -- small models written by hand ----------------------------------------------------------------------------------


def write_model(path: Path, *, outputs: tuple[str, ...], quantised: bool = False) -> None:
    """A table of 32 tokens and a matrix; `states` for each token, `twice` them, `vector` for each text, no mask."""
    random = np.random.default_rng(2)
    table = random.standard_normal((32, 16)).astype(np.float32) * (10.0 ** np.arange(-16, 16) / 1e8)[:, None] ** 0.25
    weights = {"table": table.astype(np.float32), "matrix": random.standard_normal((16, 16)).astype(np.float32)}
    rounded = [
        helper.make_node("DynamicQuantizeLinear", ["rows"], ["codes", "scale", "zero"]),
        helper.make_node("DequantizeLinear", ["codes", "scale", "zero"], ["read"]),
    ]
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["rows"]),
        *(rounded if quantised else [helper.make_node("Identity", ["rows"], ["read"])]),
        helper.make_node("MatMul", ["read", "matrix"], ["states"]),
        helper.make_node("Add", ["states", "states"], ["twice"]),
        helper.make_node("ReduceMean", ["states", "axes"], ["vector"], keepdims=0),
    ]
    by_token: list[str | int | None] = ["batch", "sequence", 16]
    by_text: list[str | int | None] = ["batch", 16]
    shapes = {"states": by_token, "twice": by_token, "vector": by_text}
    graph = helper.make_graph(
        nodes,
        "hand-made",
        [helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "sequence"])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shapes[name]) for name in outputs],
        [numpy_helper.from_array(array, name) for name, array in weights.items()]
        + [numpy_helper.from_array(np.array([1]), "axes")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), path)


def load(tmp_path: Path, *, outputs: tuple[str, ...], quantised: bool = False, **options: Any) -> Encoder:
    write_model(tmp_path / "model.onnx", outputs=outputs, quantised=quantised)
    ArtifactBuilder(tmp_path / "model.onnx").build(tmp_path / "artifact", force=True)
    return Encoder.load_artifact(tmp_path / "artifact", **options)


def test_a_scale_over_the_batch_does_not_mix_texts(tmp_path: Path) -> None:
    prompts = [[1, 2], [30, 31], [3, 4]]  # tokens of very different magnitude
    with load(tmp_path, outputs=("states",), quantised=True) as encoder:
        found = encoder.encode(prompts, normalize=False)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    for one, prompt in zip(found, prompts, strict=True):
        (alone,) = session.run(["states"], {"input_ids": np.array([prompt])})
        np.testing.assert_allclose(one.outputs.data, alone[0].mean(axis=0), rtol=1e-5, atol=1e-7)


def test_which_output_is_taken(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"several outputs.*states.*twice.*output=NAME"):
        load(tmp_path, outputs=("states", "twice"))
    with (
        load(tmp_path, outputs=("states", "twice"), output="states") as one,
        Encoder.load_artifact(tmp_path / "artifact", output="twice") as two,
    ):
        (single,), (double,) = (e.encode([[3, 4, 5]], normalize=False) for e in (one, two))
        np.testing.assert_array_equal(2 * single.outputs.data, double.outputs.data)
    with load(tmp_path, outputs=("states", "vector")) as by_token:
        states = by_token.encode([[3, 4, 5]], normalize=False)[0].outputs.data
    with load(tmp_path, outputs=("vector",)) as by_text:
        vector = by_text.encode([[3, 4, 5]], pooling="cls", normalize=False)[0].outputs.data
    np.testing.assert_allclose(states, vector, rtol=1e-5, atol=1e-7)


def test_padding_needs_a_mask(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="padded=True needs a model with an attention mask"):
        load(tmp_path, outputs=("states",), padded=True)


# -- the tokenizer -------------------------------------------------------------------------------------------------


@pytest.fixture
def bracketed(tmp_path: Path) -> Tokenizer:
    return bracketed_tokenizer(tmp_path)


def test_special_tokens_stay_around_a_text_that_is_cut(bracketed: Tokenizer) -> None:
    assert bracketed.encode("a b c") == [3, 4, 5]
    assert bracketed.encode("a b c", add_special_tokens=True) == [1, 3, 4, 5, 2]
    assert bracketed.encode("a b c", add_special_tokens=True, max_length=4) == [1, 3, 4, 2]
    assert bracketed.encode("a b c", max_length=2) == [3, 4]
    assert bracketed.encode("a", add_special_tokens=True, max_length=4) == [1, 3, 2]


def test_texts_are_cut_to_the_limit(built: dict[int, Path], bracketed: Tokenizer) -> None:
    with Encoder.load_artifact(built[4], tokenizer=bracketed) as encoder:
        (found,) = encoder.embed("a b c", truncate_prompt_tokens=3)
        assert found.prompt_token_ids == [1, 3, 2]


# -- the real model ------------------------------------------------------------------------------------------------

CATS, SHARES, DOG = (
    ("A cat sits on the mat.", "A kitten is lying on a rug."),
    ("The stock market fell sharply today.", "Shares lost a lot of value this morning."),
    "Dogs bark loudly at night near our old stone house by the river.",
)


@pytest.mark.real_model
@pytest.mark.parametrize("size", [4, 8])
def test_sentences_that_mean_the_same_are_close(size: int, tmp_path: Path) -> None:
    folder = sentence_encoder()
    ArtifactBuilder(folder / "model.onnx", tensor_parallel_size=size).build(tmp_path / "artifact")
    texts = [*CATS, *SHARES, DOG]
    with Encoder.load_artifact(tmp_path / "artifact") as encoder:
        assert encoder.pooling == Pooling(pooling="mean", normalize=True, max_sequence_length=256)
        found = encoder.encode(texts)
        for one, text in zip(found, texts, strict=True):
            assert np.array_equal(one.outputs.data, encoder.encode(text)[0].outputs.data)
    assert [row.prompt_token_ids[0] for row in found] == [101] * 5  # [CLS] first, [SEP] last
    assert [row.prompt_token_ids[-1] for row in found] == [102] * 5
    vectors = np.stack([one.outputs.data for one in found])
    session = onnxruntime.InferenceSession(folder / "model.onnx")
    for one in found:
        ids = np.array([one.prompt_token_ids])
        feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
        expected = session.run(["last_hidden_state"], feeds)[0][0].mean(axis=0)
        np.testing.assert_allclose(one.outputs.data, expected / np.linalg.norm(expected), rtol=0, atol=1e-5)
    cosines = vectors @ vectors.T
    related = min(cosines[0, 1], cosines[2, 3])
    unrelated = max(cosines[a, b] for a in range(5) for b in range(a) if (b, a) not in ((0, 1), (2, 3)))
    assert related > 0.5
    assert unrelated < 0.2
