"""An encoder-decoder's artifact generates what plain onnxruntime does on the unsplit files."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from fixtures.packaged import title_writer
from furiosa_llm.builder import ArtifactBuilder
from furiosa_llm.runtime import LLM
from furiosa_llm.runtime.artifact.composite import open_composite
from furiosa_llm.runtime.errors import (
    ContextLengthError,
    InputError,
    SamplingParamsError,
    TokenizerError,
    UnsupportedError,
)
from furiosa_llm.runtime.seq2seq import Seq2Seq
from furiosa_llm.runtime.tokens.sampling_params import RequestOutputKind, SamplingParams
from tests.support.artifacts import artifact_of
from tests.support.runtime.bracketed import bracketed_tokenizer
from tests.support.runtime.seq2seq_reference import CachedReference, WholeReference, generate
from tests.support.tiers import tiered

GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
START = 0
LENGTHS = (9, 1, 4)


@pytest.fixture(scope="module")
def t5(zoo: Path) -> Path:
    return zoo / "tiny-t5-optimum"


@pytest.fixture(scope="module")
def built() -> dict[int, Path]:
    return {size: artifact_of("tiny-t5-optimum", size) for size in (4, 8)}


@pytest.fixture(scope="module")
def model(built: dict[int, Path]) -> Iterator[Seq2Seq]:
    with Seq2Seq.load_artifact(built[4]) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def reference(t5: Path) -> CachedReference:
    return CachedReference(t5)


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    random = np.random.default_rng(3)
    return [random.integers(3, 1024, length).tolist() for length in LENGTHS]


@pytest.mark.parametrize("size", tiered([4, 8], [8]))
def test_greedy_tokens_are_those_of_the_unsplit_model(
    size: int, built: dict[int, Path], reference: CachedReference, prompts: list[list[int]]
) -> None:
    expected = [generate(reference, prompt, start=START, count=12) for prompt in prompts]
    assert len({tuple(tokens) for tokens in expected}) > 1
    with Seq2Seq.load_artifact(built[size]) as model:
        found = model.generate(prompts, GREEDY)
    assert [one.outputs[0].token_ids for one in found] == expected
    assert [one.prompt_token_ids for one in found] == prompts
    assert {one.outputs[0].finish_reason for one in found} == {"length"}


@pytest.mark.parametrize("size", tiered([4, 8], [4]))
def test_logits_are_those_of_the_unsplit_model(
    size: int, built: dict[int, Path], reference: CachedReference, prompts: list[list[int]]
) -> None:
    tokens = [START, *np.random.default_rng(4).integers(3, 1024, 9).tolist()]
    with Seq2Seq.load_artifact(built[size]) as model:
        steps = model._take_steps()
        for prompt in prompts:  # by one session, so that nothing of a completion may stay behind
            steps.start(model._encoded(prompt))
            for token, expected in zip(tokens, reference.logits(prompt, tokens), strict=True):
                found = steps.step(token)
                np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * float(np.abs(expected).max()))


@pytest.mark.parametrize("size", tiered([4, 8], [4]))
def test_a_decoder_without_a_past_gives_the_same_tokens(
    size: int, t5: Path, tmp_path: Path, reference: CachedReference, prompts: list[list[int]]
) -> None:
    for name in ("encoder_model.onnx", "decoder_model.onnx", "config.json"):
        shutil.copy(t5 / name, tmp_path)
    ArtifactBuilder(tmp_path, tensor_parallel_size=size).build(tmp_path / "artifact")
    assert list(open_composite(tmp_path / "artifact").parts) == ["encoder", "decoder"]
    with Seq2Seq.load_artifact(tmp_path / "artifact") as model:
        found = model.generate(prompts[:2], GREEDY)
    expected = [generate(reference, prompt, start=START, count=12) for prompt in prompts[:2]]
    assert [one.outputs[0].token_ids for one in found] == expected


def test_requests_at_the_same_time_do_not_meet(model: Seq2Seq, prompts: list[list[int]]) -> None:
    alone = [one.outputs[0].token_ids for one in model.generate(prompts, GREEDY)]
    streams = [model.stream_outputs(prompt, GREEDY) for prompt in prompts]
    interleaved = [list(outputs)[-1] for outputs in zip(*(list(zip(*streams, strict=True))), strict=True)]
    assert [one.outputs[0].token_ids for one in interleaved] == alone


def test_a_completion_ends(model: Seq2Seq, prompts: list[list[int]], t5: Path) -> None:
    (whole,) = model.generate(prompts[0], GREEDY)
    tokens = whole.outputs[0].token_ids
    stop = next(token for token in tokens if token != tokens[0]) if len(set(tokens)) > 1 else tokens[0]
    end = tokens.index(stop) + 1
    (stopped,) = model.generate([prompts[0]], SamplingParams(temperature=0.0, max_tokens=12, stop_token_ids=[stop]))
    assert stopped.outputs[0].token_ids == tokens[:end]
    assert stopped.outputs[0].finish_reason == "stop"
    (late,) = model.generate(
        prompts[0], SamplingParams(temperature=0.0, max_tokens=12, min_tokens=end + 1, stop_token_ids=[stop])
    )
    assert stop not in late.outputs[0].token_ids[:end]
    (short,) = model.generate(prompts[0], SamplingParams(temperature=0.0, max_tokens=3))
    assert (short.outputs[0].token_ids, short.outputs[0].finish_reason) == (tokens[:3], "length")


def test_the_models_own_end(model: Seq2Seq, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch) -> None:
    assert model.composite.manifest.eos_token_ids == (2,)
    first = model.generate(prompts[0], GREEDY)[0].outputs[0].token_ids[0]
    ending = replace(model.composite.manifest, eos_token_ids=(first,))
    monkeypatch.setattr(model, "composite", replace(model.composite, manifest=ending))
    params = SamplingParams(temperature=0.0, max_tokens=12)
    assert model.generate(prompts[0], params)[0].outputs[0].token_ids == [first]
    assert len(model.generate(prompts[0], GREEDY)[0].outputs[0].token_ids) == 12


def test_sampling_is_repeatable(model: Seq2Seq, prompts: list[list[int]]) -> None:
    def sampled(seed: int) -> list[int]:
        params = SamplingParams(temperature=1.5, max_tokens=8, seed=seed, ignore_eos=True)
        return model.generate(prompts[0], params)[0].outputs[0].token_ids

    assert sampled(1) == sampled(1)
    assert sampled(1) != sampled(2)


def test_several_completions_of_one_prompt(model: Seq2Seq, prompts: list[list[int]]) -> None:
    params = SamplingParams(temperature=1.5, max_tokens=8, seed=1, n=3, logprobs=1, ignore_eos=True)
    (found,) = model.generate(prompts[0], params)
    assert [one.index for one in found.outputs] == [0, 1, 2]
    assert len({tuple(one.token_ids) for one in found.outputs}) > 1
    assert all(one.logprobs is not None and len(one.logprobs) == 8 for one in found.outputs)
    alone = model.generate(prompts[0], replace(params, n=1))[0]
    assert alone.outputs[0].token_ids == found.outputs[0].token_ids


def test_an_encoder_has_no_prompt_logprobs(model: Seq2Seq, prompts: list[list[int]]) -> None:
    with pytest.raises(SamplingParamsError, match="prompt_logprobs: an encoder gives no logits"):
        model.generate(prompts[0], SamplingParams(prompt_logprobs=1))


def test_streams(model: Seq2Seq, prompts: list[list[int]]) -> None:
    tokens = model.generate(prompts[0], GREEDY)[0].outputs[0].token_ids

    def streamed(kind: RequestOutputKind) -> list[list[int]]:
        params = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True, output_kind=kind)
        outputs = list(model.stream_outputs(prompts[0], params))
        assert [one.finished for one in outputs] == [False] * (len(outputs) - 1) + [True]
        return [one.outputs[0].token_ids for one in outputs]

    assert streamed(RequestOutputKind.CUMULATIVE) == [tokens[: count + 1] for count in range(12)]
    assert streamed(RequestOutputKind.DELTA) == [[token] for token in tokens]
    assert streamed(RequestOutputKind.FINAL) == [tokens]


def test_texts_have_their_special_tokens(built: dict[int, Path], tmp_path: Path, model: Seq2Seq) -> None:
    tokenizer = bracketed_tokenizer(tmp_path)
    with Seq2Seq.load_artifact(built[4], tokenizer=tmp_path) as reading:
        (found,) = reading.generate("a b c", GREEDY)
    assert found.prompt_token_ids == [1, 3, 4, 5, 2]
    assert found.prompt == "a b c"
    assert found.outputs[0].text == tokenizer.decode(found.outputs[0].token_ids)
    (expected,) = model.generate([1, 3, 4, 5, 2], GREEDY)
    assert found.outputs[0].token_ids == expected.outputs[0].token_ids


def test_what_cannot_be_generated(model: Seq2Seq, built: dict[int, Path]) -> None:
    with pytest.raises(TokenizerError, match=r"no tokenizer\.json; give token ids"):
        model.generate("hello", GREEDY)
    with pytest.raises(InputError, match="no tokens"):
        model.generate([[]], GREEDY)
    with pytest.raises(InputError, match=r"prompt_token_ids\[0\] is 1024, but the model's tokens are 0 to 1023"):
        model.generate([[1024]], GREEDY)
    with pytest.raises(InputError, match="Unsupported prompt type"):
        model.generate([3.5], GREEDY)  # type: ignore[arg-type]
    with pytest.raises(SamplingParamsError, match=r"stop_token_ids holds \[1024\]"):
        model.generate([[5]], SamplingParams(temperature=0.0, stop_token_ids=[1024]))
    with LLM(built[4]) as llm, pytest.raises(InputError, match="sampling_params: found a int, expected SamplingParams"):
        llm.generate([[5]], [3])  # type: ignore[list-item]
    with pytest.raises(InputError, match=r"tensor_parallel_size=8, but .* is split for tp=4"):
        LLM(built[4], tensor_parallel_size=8)
    with pytest.raises(InputError, match="does not say how long a completion may be; give max_tokens"):
        model.generate([[5]], SamplingParams(max_tokens=None))


def test_the_models_limits(t5: Path, tmp_path: Path) -> None:
    folder = tmp_path / "t5"
    shutil.copytree(t5, folder)
    (folder / "decoder_with_past_model.onnx").unlink()
    config = (folder / "config.json").read_text().replace('"num_heads"', '"n_positions": 10,\n  "num_heads"')
    (folder / "config.json").write_text(config)
    ArtifactBuilder(folder).build(tmp_path / "artifact")
    with Seq2Seq.load_artifact(tmp_path / "artifact") as model:
        assert (model.max_prompt_length, model.max_length) == (10, 9)
        with pytest.raises(ContextLengthError, match=r"maximum input context length is 10 tokens.*requested 11"):
            model.generate([[5] * 11], GREEDY)
        with pytest.raises(ContextLengthError, match=r"maximum completion length is 9 tokens.*requested 12"):
            model.generate([[5]], GREEDY)
        (found,) = model.generate([[5] * 10], SamplingParams(temperature=0.0, max_tokens=None, ignore_eos=True))
        assert len(found.outputs[0].token_ids) == 9


def test_a_part_is_not_loaded_for_the_whole(built: dict[int, Path]) -> None:
    with pytest.raises(
        UnsupportedError, match=r"artifact/decoder is a part of the encoder-decoder in .*artifact; load that one"
    ):
        LLM.load_artifact(built[4] / "decoder")


@pytest.mark.real_model
@pytest.mark.parametrize("size", [4, 8])
def test_titles_are_those_of_the_unsplit_model(size: int, tmp_path: Path) -> None:
    folder = title_writer()
    reference = WholeReference(folder / "encoder.onnx", folder / "decoder.onnx")
    report = ArtifactBuilder(folder, tensor_parallel_size=size).build(tmp_path / "artifact")
    assert "the first token 0 was taken from tokenizer.json" in report.notes[0]
    issue = "The login page crashes when the user enters an empty password and presses the button twice."
    with Seq2Seq.load_artifact(tmp_path / "artifact") as model:
        (found,) = model.generate(issue, SamplingParams(temperature=0.0, max_tokens=24))
    expected = generate(reference, found.prompt_token_ids, start=0, count=24, ends=(1,))
    assert found.outputs[0].token_ids == expected
    assert expected[-1] == 1
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert found.outputs[0].text == tokenizer.decode(expected)
    # The unsplit model's title is the first by onnxruntime's int8 products on VNNI, the second on plain AVX2.
    assert found.outputs[0].text in ("Attempt to use empty password", "Attempt to use dictionary")
