"""Generating text from an artifact, with the vendor's shapes, limits and words."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np
import pytest
from onnx import ModelProto

from furiosa_llm.runtime import LLM, LLMEngine, RequestOutputKind, SamplingParams, open_artifact
from furiosa_llm.runtime import model as model_module
from furiosa_llm.runtime.artifact.layout import Mesh
from furiosa_llm.runtime.engine.buckets import Bucket, BucketConfig
from furiosa_llm.runtime.engine.engine_args import EngineArgs
from furiosa_llm.runtime.engine.launch import make_plan
from furiosa_llm.runtime.errors import (
    CapacityError,
    ContextLengthError,
    DeviceError,
    EngineDeadError,
    ExecutionError,
    InputError,
    ReplicaError,
    TokenizerError,
    TopologyError,
    UnsupportedError,
)
from furiosa_llm.runtime.execution import sessions
from furiosa_llm.runtime.execution.decoder import DecoderSession
from furiosa_llm.runtime.execution.executor import Executor
from furiosa_llm.runtime.execution.ort import Session, SessionSettings
from furiosa_llm.runtime.requests.outputs import RequestOutput
from tests.support.runtime.bracketed import bracketed_tokenizer
from tests.support.runtime.models import LlamaSize, llama, mlp

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
def greedy(llm: LLM, folder: Path) -> list[int]:
    """The greedy completion of the prompt "hello", stepped by hand."""
    return stepped(folder, [llm.tokenizer.encode("hello")])[0]


def stepped(folder: Path, prompts: list[list[int]], count: int = 12) -> list[list[int]]:
    """The greedy completions of `prompts`, each stepped by hand in a session of its own."""
    completions: list[list[int]] = []
    with Executor(open_artifact(folder), threads=2) as executor:
        for prompt in prompts:
            session = DecoderSession(executor)
            logits = session.step(np.array([prompt]))
            token_ids = [int(logits[0].argmax())]
            while len(token_ids) < count:
                token_ids.append(int(session.step(np.array([[token_ids[-1]]]))[0].argmax()))
            completions.append(token_ids)
    return completions


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
    with LLM(bare, threads=1) as silent:
        completion = silent.generate(prompt_token_ids=[[5]], sampling_params=GREEDY)[0].outputs[0]
        assert (len(completion.token_ids), completion.text) == (12, "")
        with pytest.raises(TokenizerError, match=r"no tokenizer\.json; give token ids, or the folder of a tokenizer"):
            silent.generate("hello", GREEDY)
        with pytest.raises(TokenizerError, match=r"no tokenizer\.json; load it with the folder of a tokenizer"):
            silent.chat(TALK, GREEDY)
    with LLM.load_artifact(bare, tokenizer=ZOO, mapped=True, full_verification=True) as loaded:
        assert loaded.generate("hello", GREEDY).outputs[0].text
    with LLM.load_artifact(bare, tokenizer=loaded.tokenizer, data_parallel_size=1, pipeline_parallel_size=1) as again:
        assert again.tokenizer is loaded.tokenizer


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"devices": "gpu:0"}, DeviceError, "Invalid device string"),
        ({"data_parallel_size": 2, "devices": "npu:0:0-3,npu:1:0-3"}, TopologyError, "2 \\* 1 \\* 2|2 x 1 x 2 = 4"),
        ({"pipeline_parallel_size": 4}, TopologyError, "pp=4, but the artifact"),
        (
            {"pipeline_parallel_size": 1, "num_blocks_per_pp_stage": [1]},
            TopologyError,
            "Only one of `pipeline_parallel",
        ),
        ({"tensor_parallel_size": 4}, InputError, r"tensor_parallel_size=4, but .* is split for tp=2; leave it out"),
        ({"max_model_len": 65}, ContextLengthError, "larger than the model's max number of positions: 65 > 64"),
        ({"max_batch_size": 0}, InputError, "max_batch_size must be an integer of at least 1, got 0"),
        ({"max_batch_size": True}, InputError, "max_batch_size must be an integer of at least 1, got True"),
        ({"seed": -1}, InputError, "seed must be an integer of at least 0 and below 2\\*\\*64, got -1"),
        ({"step_timeout": 0}, InputError, "step_timeout must be a positive number, got 0"),
        ({"tokenizer_mode": "slow"}, UnsupportedError, "tokenizer_mode='slow' is not supported: there is only"),
        ({"paged_attention_num_blocks": 10**12}, CapacityError, "blocks=1000000000000, but the PEs have room for"),
        ({"trust_remote_code": True}, UnsupportedError, "trust_remote_code=True is not supported: an artifact is data"),
        ({"num_speculative_tokens": 3}, UnsupportedError, "num_speculative_tokens=3 is not supported: speculative"),
        ({"max_seq_len_to_capture": 512}, UnsupportedError, "=512 is not supported: .* max_model_len is the limit"),
        ({"prefill_buckets": [(1, 64)]}, UnsupportedError, "prefill_buckets=.* is not supported: any size runs"),
        ({"devices": 3}, DeviceError, "Invalid device string: 3 is int, not text or a list"),
        ({"num_blocks_per_pp_stage": "1"}, TopologyError, "is a list of integers such as .*, got '1'"),
        ({"num_blocks_per_pp_stage": 1}, TopologyError, "is a list of integers such as .*, got 1"),
        ({"num_blocks_per_pp_stage": [1.0]}, TopologyError, r"is a list of integers such as .*, got \[1.0\]"),
        ({"workers": 0}, InputError, "workers must be an integer of at least 1, got 0"),
    ],
)
def test_options_that_cannot_be_met_are_refused(
    folder: Path, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        LLM.load_artifact(folder, skip_engine=True, **options)


def test_unknown_options_are_type_errors(folder: Path) -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'max_batchsize'"):
        LLM.load_artifact(folder, max_batchsize=3)  # type: ignore[call-arg]
    unused: dict[str, Any] = {"trust_remote_code": False, "num_speculative_tokens": None, "prefill_buckets": []}
    with LLM(folder, threads=1, **unused) as plain:
        assert plain.generate("hello", GREEDY).finished


def test_a_model_that_does_not_generate(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="generate API can only be used for generative models; 'test' is of the"):
        LLM.load_artifact(mlp(Mesh((2,))).write(tmp_path))


def test_the_artifact_of_the_module_is_whole(folder: Path) -> None:
    assert open_artifact(folder, full=True).manifest.model.task == "decoder"


def test_long_prompts_are_prefilled_in_chunks(tmp_path: Path) -> None:
    program = llama(Mesh((2,)), LlamaSize(layers=1, vocab=1024, max_length=1300))
    program.max_sequence_length = 1300
    token_ids = np.random.default_rng(0).integers(3, 1024, 1200).tolist()
    path = program.write(tmp_path / "a")
    with LLM.load_artifact(path, tokenizer=ZOO, threads=2) as loaded:
        found = loaded.generate("", GREEDY, prompt_token_ids=token_ids).outputs[0].token_ids
    assert found[:1] == stepped(path, [token_ids], count=1)[0]


def test_many_prompts_run_together_and_answer_in_order(llm: LLM, folder: Path) -> None:
    prompts = [llm.tokenizer.encode(f"{word} {count}") for word in ("hello", "to", "you") for count in range(6)]
    outputs = llm.generate([""] * len(prompts), GREEDY, prompt_token_ids=prompts)
    assert [output.prompt_token_ids for output in outputs] == prompts
    assert [output.outputs[0].token_ids for output in outputs] == stepped(folder, prompts)


def test_each_prompt_may_have_params_of_its_own(llm: LLM, greedy: list[int]) -> None:
    params = [SamplingParams(temperature=0.0, max_tokens=count) for count in (9, 2)]
    outputs = llm.generate(["hello", "hello"], params)
    assert [output.outputs[0].token_ids for output in outputs] == [greedy[:9], greedy[:2]]
    with pytest.raises(InputError, match="sampling_params has 2 entries for 1 prompts"):
        llm.generate(["hello"], params)


def test_replicas_and_batches_of_any_size_give_the_same_tokens(folder: Path, greedy: list[int]) -> None:
    with LLM(folder, data_parallel_size=2, max_batch_size=2, max_model_len=32, prefill_chunk_size=2, threads=1) as many:
        assert many.topology is not None
        assert [len(replica) for replica in many.topology.replicas] == [1, 1]
        assert [output.outputs[0].token_ids for output in many.generate(["hello"] * 7, GREEDY)] == [greedy] * 7
        assert many.model_max_seq_len == many.max_seq_len_to_capture == 32
        assert many.prompt_max_seq_len == 31


def test_buckets_are_limits(folder: Path) -> None:
    assert [Bucket(1, 8).input_ids_size, Bucket(4, 32, 31).input_ids_size] == [8, 1]
    buckets = BucketConfig(prefill_buckets=(Bucket(1, 16),), decode_buckets=(Bucket(4, 24, 23), Bucket(2, 32)))
    with LLM(folder, bucket_config=buckets, skip_engine=True) as loaded:
        assert (loaded.model_max_seq_len, loaded.prompt_max_seq_len) == (32, 16)
    assert make_plan(EngineArgs(folder, bucket_config=buckets)).scheduling.slots_per_group == 4
    assert make_plan(EngineArgs(folder, bucket_config=buckets, max_batch_size=3)).scheduling.slots_per_group == 3
    with pytest.raises(InputError, match="decode_buckets must be given for generative models"):
        BucketConfig(prefill_buckets=(Bucket(1, 16),))
    with pytest.raises(InputError, match=r"Bucket\(batch_size=0"):
        Bucket(0, 16)


def test_a_cache_that_is_too_small_refuses_what_will_not_fit(folder: Path) -> None:
    with LLM(folder, paged_attention_num_blocks=2, threads=1) as small:
        assert len(small.generate("", GREEDY, prompt_token_ids=[5] * 20).outputs[0].token_ids) == 12
        with pytest.raises(ContextLengthError, match=r"33 tokens .* do not fit the KV cache, which has room for 32"):
            small.generate("", GREEDY, prompt_token_ids=[5] * 21)
        whole = SamplingParams(temperature=0.0, max_tokens=None)
        assert len(small.generate("", whole, prompt_token_ids=[5] * 20).outputs[0].token_ids) == 12
    spare = EngineArgs(folder, paged_attention_num_blocks=10, spare_blocks_ratio=0.25)
    assert make_plan(spare).scheduling.num_pages == 7


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ({"prompt_token_ids": [5, 1024]}, "1024"),
        ({"prompt_token_ids": [5, -1]}, "-1"),
        ({"prompt_token_ids": [5, "a"]}, "'a'"),
        ({"prompt_token_ids": []}, "the prompt has no tokens"),
        ({"prompt_ids": [5]}, "Unsupported prompt type: found 'prompt_ids', expected 'prompt' or 'prompt_token_ids'"),
        ({}, "Unsupported prompt type: found neither"),
        ({"prompt": 3}, "Unsupported prompt type: 'prompt' is a int"),
        (3, "Unsupported prompt type: int"),
        (None, "Unsupported prompt type: NoneType"),
    ],
)
def test_prompts_that_are_none(llm: LLM, prompt: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        llm.generate(["hello", prompt], GREEDY)


def test_params_that_are_none(llm: LLM) -> None:
    with pytest.raises(InputError, match="sampling_params: found a dict, expected SamplingParams"):
        llm.generate(["hello"], [{"max_tokens": 3}])  # type: ignore[list-item]
    wrong: list[Any] = [3, "greedy", {"max_tokens": 3}]
    for params in wrong:
        for ask in (partial(llm.generate, "hello"), partial(llm.chat, TALK, chat_template=TEMPLATE)):
            with pytest.raises(InputError, match=f"sampling_params: found a {type(params).__name__}, expected"):
                ask(sampling_params=params)


def test_a_refused_prompt_gives_the_others_up(llm: LLM, greedy: list[int]) -> None:
    with pytest.raises(ContextLengthError):
        llm.generate(["", ""], GREEDY, prompt_token_ids=[[5], [5] * 64])
    assert llm.generate("hello", GREEDY).outputs[0].token_ids == greedy
    assert [replica.num_requests for replica in llm.core.replicas] == [0]


def test_a_loaded_but_not_started_model(folder: Path) -> None:
    with LLM(folder, skip_engine=True) as idle:
        assert idle.tokenizer.encode("hello")
        with pytest.raises(EngineDeadError, match="loaded with skip_engine=True"):
            idle.generate("hello", GREEDY)


def test_a_closed_model(folder: Path) -> None:
    closed = LLM(folder, threads=1)
    closed.close()
    closed.shutdown()
    with pytest.raises(EngineDeadError, match="the engine is closed"):
        closed.generate("hello", GREEDY)


def test_embeddings_are_for_encoders(llm: LLM) -> None:
    for ask in (llm.encode, llm.embed):
        with pytest.raises(UnsupportedError, match="can only be used for encoders; this model generates"):
            ask(["hello"])
    assert llm.is_generative_model


TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
)


TALK = [{"role": "user", "content": "hello"}]
TOOLS = [{"type": "function", "function": {"name": "clock", "parameters": {}}}]


def test_the_vendors_forms_of_generate(llm: LLM, greedy: list[int]) -> None:
    ids = llm.tokenizer.encode("hello")
    singles = [
        llm.generate({"prompt": "hello"}, GREEDY),
        llm.generate({"prompt_token_ids": ids}, GREEDY),
        llm.generate("other", GREEDY, ids),
        llm.generate(None, GREEDY, ids),  # type: ignore[arg-type]
        llm.generate(sampling_params=GREEDY, prompt_token_ids=np.array(ids)),  # type: ignore[call-overload]
    ]
    assert [type(one) for one in singles] == [RequestOutput] * 5
    assert [one.prompt for one in singles] == ["hello", None, "other", None, None]
    lists = [
        llm.generate(["hello"], GREEDY),
        llm.generate(("hello",), GREEDY),
        llm.generate([ids], GREEDY),
        llm.generate([{"prompt": "hello"}], GREEDY),
        llm.generate(prompt_token_ids=[ids], sampling_params=[GREEDY]),
    ]
    assert [len(several) for several in lists] == [1] * 5
    found = [*singles, *(one for several in lists for one in several)]
    assert [one.outputs[0].token_ids for one in found] == [greedy] * 10
    assert llm.generate(prompt_token_ids=[], sampling_params=GREEDY) == []
    assert len(llm.generate("hello").outputs[0].token_ids) <= 16
    assert list(llm.stream({"prompt_token_ids": ids}, GREEDY)) == list(llm.stream("hello", GREEDY))
    with pytest.raises(InputError, match="prompts: found None; give a prompt"):
        llm.generate()


def test_special_tokens_around_the_prompt(folder: Path, tmp_path: Path) -> None:
    with LLM(folder, tokenizer=bracketed_tokenizer(tmp_path), threads=1) as llm:
        for wished, ids in ((True, [1, 3, 2]), (False, [3])):
            options = {"add_special_tokens": wished}
            [found] = llm.generate(["a"], GREEDY, tokenizer_kwargs=options)
            assert (found.prompt, found.prompt_token_ids) == ("a", ids)
            assert llm.generate("", GREEDY, [7], options).prompt_token_ids == [7]

            async def collect(options: dict[str, Any]) -> list[str]:
                return [piece async for piece in llm.stream_generate("a", GREEDY, tokenizer_kwargs=options)]

            assert "".join(asyncio.run(collect(options))) == found.outputs[0].text
        for bad in ({"padding": True}, {"add_special_tokens": 1}):
            with pytest.raises(UnsupportedError, match="only add_special_tokens=True or False is; give"):
                llm.generate("a", GREEDY, tokenizer_kwargs=bad)


def test_names_of_the_vendors_other_releases(folder: Path, greedy: list[int]) -> None:
    with pytest.warns(DeprecationWarning, match=r"LLM\.load_artifacts is deprecated; use LLM\.load_artifact"):
        old = LLM.load_artifacts(folder, threads=1)
    with old as llm:
        assert llm.generate("hello", GREEDY).outputs[0].token_ids == greedy
        with pytest.raises(UnsupportedError, match="bert_forward is not supported: encode gives"):
            llm.bert_forward(["a"], ["b"])
    with pytest.raises(UnsupportedError, match=r"from_artifacts: .* build one, and use load_artifact"):
        LLM.from_artifacts(folder)


def test_tools_are_told_to_the_template(llm: LLM) -> None:
    template = "{% if tools %}{{ tools | tojson }}{% endif %}" + TEMPLATE
    few = SamplingParams(temperature=0.0, max_tokens=2)
    [found] = llm.chat(TALK, few, chat_template=template, tools=TOOLS)
    assert found.prompt == f"{json.dumps(TOOLS)}<user>hello<a>"
    called: list[Any] = [
        *TALK,
        {"role": "assistant", "content": None, "tool_calls": TOOLS},
        {"role": "tool", "content": "noon"},
    ]
    [found] = llm.chat(called, few, chat_template=TEMPLATE.replace("m.content", "m.content or m.tool_calls|length"))
    assert found.prompt == "<user>hello<assistant>1<tool>noon<a>"


def test_chat(llm: LLM) -> None:
    talk = TALK
    [one] = llm.chat(talk, GREEDY, chat_template=TEMPLATE)
    assert one.prompt == "<user>hello<a>"
    assert one.outputs == llm.generate("<user>hello<a>", GREEDY).outputs
    parts: list[Any] = [
        {"role": "user", "content": [{"type": "text", "text": "good"}, {"type": "text", "text": "bye"}]}
    ]
    several = llm.chat([talk, parts], GREEDY, chat_template=TEMPLATE)
    assert [output.prompt for output in several] == ["<user>hello<a>", "<user>good\nbye<a>"]
    begun = [*talk, {"role": "assistant", "content": " well "}]
    options: dict[str, Any] = {"chat_template": TEMPLATE + "<end>", "add_generation_prompt": False}
    assert llm.chat(begun, GREEDY, **options)[0].prompt == "<user>hello<assistant> well <end>"
    assert llm.chat(begun, GREEDY, continue_final_message=True, **options)[0].prompt == "<user>hello<assistant> well "


@pytest.mark.parametrize(
    ("messages", "options", "error", "message"),
    [
        ("hello", {}, InputError, "expected a list of messages"),
        ([], {}, InputError, "expected a list of messages"),
        ([[]], {}, InputError, "expected a list of messages"),
        ([{"role": "user"}], {}, InputError, "expected an object with 'role' and 'content'"),
        ([["hello"]], {}, InputError, "found 'hello', expected an object"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], {}, InputError, "nothing else is understood here"),
        ([{"role": "user", "content": "a"}], {"tools": ["f"]}, InputError, r"tools: found \['f'\], expected a list of"),
        ([{"role": "user", "content": "a"}], {"tools": "f"}, InputError, "tools: found 'f', expected a list of"),
        ([{"role": "user", "tool_calls": []}], {}, InputError, "expected an object with 'role' and 'content'"),
        ([{"role": "user", "content": "a"}], {"chat_template": None}, TokenizerError, "has no chat template"),
        ([{"role": "user", "content": "a"}], {"continue_final_message": True}, InputError, "exclude each other"),
        (
            [{"role": "user", "content": "a"}],
            {"chat_template": "<>", "continue_final_message": True, "add_generation_prompt": False},
            InputError,
            "does not repeat the final message",
        ),
        (
            [{"role": "user", "content": "a"}],
            {"chat_template_content_format": "openai"},
            UnsupportedError,
            "chat_template_content_format='openai' is not supported",
        ),
    ],
)
def test_conversations_that_are_none(
    llm: LLM, messages: Any, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        llm.chat(messages, GREEDY, **{"chat_template": TEMPLATE, **options})


def test_ctrl_c_gives_all_requests_up(llm: LLM, greedy: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    class Interrupted(SimpleQueue[Any]):
        def get(self, *_: Any, **__: Any) -> Any:
            raise KeyboardInterrupt

    with monkeypatch.context() as interrupted:
        interrupted.setattr(model_module, "SimpleQueue", Interrupted)
        with pytest.raises(KeyboardInterrupt):
            llm.generate(["hello"] * 20, SamplingParams(temperature=0.0, max_tokens=50))
    assert llm.generate("hello", GREEDY).outputs[0].token_ids == greedy
    assert [replica.num_requests for replica in llm.core.replicas] == [0]


def test_several_completions_whatever_else_runs(llm: LLM) -> None:
    params = SamplingParams(temperature=2.0, max_tokens=12, seed=5, n=3)
    several = llm.generate("hello", params).outputs
    assert [completion.index for completion in several] == [0, 1, 2]
    assert len({tuple(completion.token_ids) for completion in several}) == 3
    assert llm.generate(["hello", "good bye"], params)[0].outputs == several
    with pytest.raises(InputError, match="a stream of text is of one completion, found n=3"):
        next(llm.stream("hello", params))


def test_a_stream_that_is_closed_aborts_its_request(llm: LLM) -> None:
    stream = llm.stream_outputs("hello", SamplingParams(temperature=0.0, max_tokens=None))
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    assert llm.generate("hello", GREEDY).finished
    assert [replica.num_requests for replica in llm.core.replicas] == [0]


def test_the_engine_of_a_model(llm: LLM, greedy: list[int]) -> None:
    llm.engine.add_request("0", "hello", GREEDY)
    assert llm.generate("hello", GREEDY).outputs[0].token_ids == greedy
    outputs: list[RequestOutput] = []
    while llm.engine.has_unfinished_requests():
        outputs += llm.engine.step()
    assert outputs[-1].outputs[0].token_ids == greedy


@pytest.mark.parametrize("options", [{}, {"data_parallel_size": 2}])
def test_a_failure_is_raised_and_the_model_goes_on(
    folder: Path, greedy: list[int], options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    with LLM(folder, threads=1, **options) as mended:
        broken = mended.core.replicas[0]._runner
        monkeypatch.setattr(broken, "submit", lambda batch: 1 / 0)
        with pytest.raises(ReplicaError, match="replica 0 failed while it had the request: ZeroDivisionError"):
            mended.generate(["hello"] * 5, GREEDY)
        assert [output.outputs[0].token_ids for output in mended.generate(["hello"] * 5, GREEDY)] == [greedy] * 5
        assert [replica.num_requests for replica in mended.core.replicas] == [0] * len(mended.core.replicas)


def test_a_segment_that_fails_is_raised_and_the_model_goes_on(folder: Path, greedy: list[int]) -> None:
    with LLM(folder, threads=2, data_parallel_size=2) as mended:
        mended.core.limits = replace(mended.core.limits, vocab_size=10**6)
        elsewhere = mended.stream_outputs("", SamplingParams(temperature=0.0, max_tokens=60), [5])
        next(elsewhere)
        with pytest.raises(ReplicaError, match=r"replica \d failed .* ExecutionError") as caught:
            mended.generate("", GREEDY, prompt_token_ids=[5000])
        assert isinstance(caught.value.__cause__, ExecutionError)
        *_, output = elsewhere
        assert output.outputs[0].finish_reason == "length"
        for _ in range(2):
            with pytest.raises(ReplicaError):
                mended.generate("", GREEDY, prompt_token_ids=[5000])
            assert [one.outputs[0].token_ids for one in mended.generate(["hello"] * 5, GREEDY)] == [greedy] * 5


def test_workers_give_the_same_tokens(folder: Path, greedy: list[int]) -> None:
    with LLM(folder, workers=2) as spread:
        assert [output.outputs[0].token_ids for output in spread.generate(["hello"] * 3, GREEDY)] == [greedy] * 3
    with pytest.raises(InputError, match="workers must be between 1 and the 2 PEs of a stage, got 3"):
        LLM(folder, workers=3)
    with pytest.raises(InputError, match="workers=2 and threads=1 exclude each other: leave one out"):
        LLM(folder, workers=2, threads=1)
    with pytest.raises(InputError, match="spin_us=50 is for the threads of this process"):
        LLM(folder, workers=2, spin_us=50)


def test_threads_that_spin_give_the_same_tokens(
    folder: Path, greedy: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All PEs are one lane, whose session has the threads."""
    made: list[tuple[int, int]] = []

    def noted(model: ModelProto, weights: Path, settings: SessionSettings) -> Session:
        made.append((settings.intra_op_threads, settings.spin_us))
        return Session(model, weights, settings)

    monkeypatch.setattr(sessions, "Session", noted)
    with LLM(folder, threads=2, spin_us=50) as spinning:
        assert [output.outputs[0].token_ids for output in spinning.generate(["hello"] * 3, GREEDY)] == [greedy] * 3
    assert made == [(2, 50)]


class Bar:
    """What `generate` asks of a tqdm."""

    def __init__(self, **options: Any) -> None:
        self.options = options
        self.updates: list[int] = []
        self.closed = False

    def update(self, by: int) -> None:
        self.updates.append(by)

    def close(self) -> None:
        self.closed = True


def test_prompts_are_counted(llm: LLM, capsys: pytest.CaptureFixture[str]) -> None:
    bars: list[Bar] = []

    def make(**options: Any) -> Bar:
        bars.append(Bar(**options))
        return bars[-1]

    params = SamplingParams(temperature=0.0, max_tokens=2)
    llm.generate(["one", "two", "three"], params, use_tqdm=make)
    assert [(bar.options["total"], bar.options["desc"], sum(bar.updates), bar.closed) for bar in bars] == [
        (3, "Processed prompts", 3, True)
    ]
    assert capsys.readouterr().err == ""
    llm.generate(["one", "two"], params)
    assert capsys.readouterr().err == ""
    llm.generate(["one", "two"], params, use_tqdm=True)
    assert capsys.readouterr().err.startswith("completing prompts: 0 of 2\n")


def test_repr_says_model_sizes_and_place(folder: Path) -> None:
    with LLM(folder, skip_engine=True, devices="npu:1", data_parallel_size=4, max_model_len=64) as idle:
        assert repr(idle) == (f"<LLM {folder}: decoder, at most 64 tokens, tp 2 x pp 1 x dp 4 = 8 PEs on npu:1>")


def test_an_engine_shows_loading_too(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("furiosa_llm.runtime.artifact.progress._has_reader", lambda: True)
    LLMEngine.from_engine_args(EngineArgs(folder)).close()
    assert capsys.readouterr().err.startswith("opening the artifact\n")


def test_loading_is_shown(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with LLM(folder, use_tqdm_on_load=True):
        pass
    shown = capsys.readouterr().err
    assert shown.startswith("opening the artifact\n")
    assert "\nloading the weights: 1 of " in shown
