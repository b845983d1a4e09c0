"""Generating text from an artifact, with the vendor's shapes, limits and words."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from furiosa_llm.runtime import LLM, RequestOutputKind, SamplingParams, open_artifact
from furiosa_llm.runtime.artifact.layout import Mesh
from furiosa_llm.runtime.decoder import DecoderSession
from furiosa_llm.runtime.errors import ContextLengthError, InputError, UnsupportedError
from tests.runtime.models import LlamaSize, llama, mlp

ZOO = Path(__file__).parents[2] / "fixtures" / "zoo" / "tiny-llama-genai-fp32"
SIZE = LlamaSize(layers=1, vocab=1024, max_length=64)
GREEDY = SamplingParams(temperature=0.0, max_tokens=12)


def write(folder: Path, **values: Any) -> Path:
    program = llama(Mesh((2,)), SIZE)
    program.files = {name: (ZOO / name).read_bytes() for name in ("tokenizer.json", "tokenizer_config.json")}
    for name, value in values.items():
        setattr(program, name, value)
    return program.write(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("llm") / "artifact")


@pytest.fixture(scope="module")
def llm(folder: Path) -> Iterator[LLM]:
    with LLM.load_artifact(folder, threads=2) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def greedy(llm: LLM) -> list[int]:
    """The greedy completion of the prompt "hello", stepped by hand."""
    session = DecoderSession(llm._executor)
    logits = session.step(np.array([llm.tokenizer.encode("hello")]))
    token_ids = [int(logits[0].argmax())]
    while len(token_ids) < 12:
        token_ids.append(int(session.step(np.array([[token_ids[-1]]]))[0].argmax()))
    return token_ids


def test_a_string_gives_one_output_and_a_list_a_list(llm: LLM, greedy: list[int]) -> None:
    one = llm.generate("hello", GREEDY)
    many = llm.generate(["hello", "good bye"], GREEDY)
    assert one.prompt == "hello"
    assert one.prompt_token_ids == llm.tokenizer.encode("hello")
    assert one.finished
    assert [completion.token_ids for completion in one.outputs] == [greedy]
    assert one.outputs[0].text == llm.tokenizer.decode(greedy)
    assert one.outputs[0].finish_reason == "length"
    assert [output.prompt for output in many] == ["hello", "good bye"]
    assert many[0].outputs == one.outputs
    assert len({output.request_id for output in (one, *many)}) == 3
    assert llm.generate([], GREEDY) == []


def test_token_ids_in_place_of_text(llm: LLM, greedy: list[int]) -> None:
    token_ids = llm.tokenizer.encode("hello")
    assert llm.generate("", GREEDY, prompt_token_ids=token_ids).outputs[0].token_ids == greedy
    assert llm.generate([""], GREEDY, prompt_token_ids=[token_ids])[0].outputs[0].token_ids == greedy
    with pytest.raises(InputError, match="prompt_token_ids has 1 sequences for 2 prompts"):
        llm.generate(["a", "b"], GREEDY, prompt_token_ids=[token_ids])


def test_streams_add_up(llm: LLM) -> None:
    text = llm.generate("hello", GREEDY).outputs[0].text
    assert "".join(llm.stream("hello", GREEDY)) == text

    async def collect() -> list[str]:
        return [piece async for piece in llm.stream_generate("hello", GREEDY)]

    assert "".join(asyncio.run(collect())) == text


def test_kinds_of_streamed_outputs(llm: LLM, greedy: list[int]) -> None:
    def outputs(kind: RequestOutputKind) -> list[Any]:
        params = SamplingParams(temperature=0.0, max_tokens=12, output_kind=kind)
        return [output.outputs[0] for output in llm.stream_outputs("hello", params)]

    cumulative, delta, final = (outputs(kind) for kind in RequestOutputKind)
    assert [output.token_ids for output in cumulative] == [greedy[: n + 1] for n in range(12)]
    assert [output.token_ids for output in delta] == [[token] for token in greedy]
    assert "".join(output.text for output in delta) == cumulative[-1].text
    assert final == cumulative[-1:]
    assert [output.finish_reason for output in cumulative] == [None] * 11 + ["length"]


def test_a_stream_left_early_does_not_block_others(llm: LLM, greedy: list[int]) -> None:
    stream = llm.stream("hello", GREEDY)
    next(stream)
    assert llm.generate("hello", GREEDY).outputs[0].token_ids == greedy
    assert "".join([*stream])
    del stream
    assert llm.generate("hello", GREEDY).outputs[0].token_ids == greedy


def test_stop_tokens_end_the_completion(llm: LLM, greedy: list[int]) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=12, stop_token_ids=(greedy[4],))
    completion = llm.generate("hello", params).outputs[0]
    end = greedy.index(greedy[4])
    assert completion.finish_reason == "stop"
    assert completion.token_ids == greedy[: end + 1]
    assert completion.text == llm.tokenizer.decode(greedy[:end])


def test_the_models_end_token_and_ignoring_it(greedy: list[int], tmp_path: Path) -> None:
    with LLM.load_artifact(write(tmp_path / "a", eos_token_ids=(greedy[3],)), threads=1) as ended:
        end = greedy.index(greedy[3])
        assert ended.generate("hello", GREEDY).outputs[0].token_ids == greedy[: end + 1]
        ignoring = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
        assert ended.generate("hello", ignoring).outputs[0].token_ids == greedy
        waiting = SamplingParams(temperature=0.0, max_tokens=12, min_tokens=12)
        assert greedy[3] not in ended.generate("hello", waiting).outputs[0].token_ids[:12]


def test_stop_strings_are_left_out(llm: LLM, greedy: list[int]) -> None:
    text = llm.tokenizer.decode(greedy)
    stop = text[4:7]
    params = SamplingParams(temperature=0.0, max_tokens=12, stop=stop)
    completion = llm.generate("hello", params).outputs[0]
    assert completion.text == text[: text.index(stop)]
    assert completion.finish_reason == "stop"
    assert "".join(llm.stream("hello", params)) == completion.text


def test_several_completions(llm: LLM) -> None:
    params = SamplingParams(temperature=1.5, max_tokens=6, n=3, seed=5)
    output = llm.generate("hello", params)
    assert [completion.index for completion in output.outputs] == [0, 1, 2]
    assert len({tuple(completion.token_ids) for completion in output.outputs}) == 3
    assert output.outputs[0] == llm.generate("hello", replace(params, n=1)).outputs[0]
    best = llm.generate("hello", replace(params, n=1, best_of=3, logprobs=0)).outputs
    ranked = llm.generate("hello", replace(params, logprobs=0)).outputs
    assert best[0].token_ids == max(ranked, key=lambda completion: completion.cumulative_logprob or 0.0).token_ids


def test_log_probabilities_of_prompt_and_completion(llm: LLM) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=5, logprobs=2, prompt_logprobs=1)
    output = llm.generate("hello", params)
    (completion,) = output.outputs
    assert completion.logprobs is not None
    assert [entry[token].rank for entry, token in zip(completion.logprobs, completion.token_ids, strict=True)] == [
        1
    ] * 5
    # The same tokens as a prompt have the same log probabilities.
    whole = [*output.prompt_token_ids, *completion.token_ids]
    again = llm.generate("", replace(params, max_tokens=1), prompt_token_ids=whole).prompt_logprobs
    assert output.prompt_logprobs is not None
    assert again is not None
    assert again[: len(output.prompt_logprobs)] == output.prompt_logprobs
    for token, entry, found in zip(completion.token_ids, completion.logprobs, again[-5:], strict=True):
        assert found is not None
        assert found[token].logprob == pytest.approx(entry[token].logprob, abs=1e-4)


def test_a_seed_repeats_a_random_completion(llm: LLM) -> None:
    params = SamplingParams(temperature=2.0, max_tokens=12, seed=5)
    assert llm.generate("hello", params).outputs == llm.generate("hello", params).outputs
    other = SamplingParams(temperature=2.0, max_tokens=12, seed=6)
    assert llm.generate("hello", params).outputs != llm.generate("hello", other).outputs


def test_no_limit_fills_up_to_the_models(llm: LLM) -> None:
    prompt = llm.tokenizer.encode("hello")
    completion = llm.generate("hello", SamplingParams(temperature=0.0, max_tokens=None)).outputs[0]
    assert len(completion.token_ids) == 64 - len(prompt)
    assert llm.model_max_seq_len == 64


def test_prompts_that_do_not_fit(llm: LLM) -> None:
    with pytest.raises(
        ContextLengthError,
        match=r"maximum input context length is 63 tokens, however you requested 64 tokens\. Please reduce your prompt",
    ) as caught:
        llm.generate("", GREEDY, prompt_token_ids=[5] * 64)
    assert isinstance(caught.value, ValueError)
    with pytest.raises(
        ContextLengthError,
        match=r"maximum context length is 64 tokens, however you requested 65 tokens \(53 in your prompt; 12 for the",
    ):
        llm.generate("", GREEDY, prompt_token_ids=[5] * 53)
    with pytest.raises(InputError, match="the prompt has no tokens"):
        llm.generate("", GREEDY)
    assert len(llm.generate("", GREEDY, prompt_token_ids=[5] * 52).outputs[0].token_ids) == 12


def test_a_model_without_a_limit_needs_max_tokens(tmp_path: Path) -> None:
    with LLM.load_artifact(write(tmp_path / "a", max_sequence_length=None), threads=1) as unlimited:
        assert len(unlimited.generate("hello", GREEDY).outputs[0].token_ids) == 12
        with pytest.raises(InputError, match="the model does not say how long a sequence may be; give max_tokens"):
            unlimited.generate("hello", SamplingParams(max_tokens=None))


def test_the_tokenizer_may_come_from_elsewhere(tmp_path: Path) -> None:
    bare = write(tmp_path / "a", files={})
    with LLM.load_artifact(bare, tokenizer=ZOO, mapped=True, full_verification=True) as loaded:
        assert loaded.generate("hello", GREEDY).outputs[0].text
    with LLM.load_artifact(bare, tokenizer=loaded.tokenizer, data_parallel_size=1, pipeline_parallel_size=1) as again:
        assert again.tokenizer is loaded.tokenizer


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data_parallel_size": 2}, "data_parallel_size=2 is not supported by this release; leave it out, or give 1"),
        ({"pipeline_parallel_size": 4}, "pipeline_parallel_size=4 is not supported by this release"),
        ({"devices": "npu:0"}, "devices='npu:0' is not supported by this release"),
    ],
)
def test_parallelism_beyond_the_artifacts_is_refused(folder: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedError, match=message):
        LLM.load_artifact(folder, **options)


def test_a_model_that_does_not_generate(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="generate API can only be used for generative models; 'test' is of the"):
        LLM.load_artifact(mlp(Mesh((2,))).write(tmp_path))


def test_the_artifact_of_the_module_is_whole(folder: Path) -> None:
    assert open_artifact(folder, full=True).manifest.model.task == "decoder"


def test_long_prompts_are_prefilled_in_chunks(tmp_path: Path) -> None:
    program = llama(Mesh((2,)), LlamaSize(layers=1, vocab=1024, max_length=1300))
    program.max_sequence_length = 1300
    token_ids = np.random.default_rng(0).integers(3, 1024, 1200).tolist()
    with LLM.load_artifact(program.write(tmp_path / "a"), tokenizer=ZOO, threads=2) as loaded:
        found = loaded.generate("", GREEDY, prompt_token_ids=token_ids).outputs[0].token_ids
        session = DecoderSession(loaded._executor)
        assert found[0] == int(session.step(np.array([token_ids]))[0].argmax())
