"""What the server says of itself, of its model and of tokens."""

from __future__ import annotations

import asyncio
import dataclasses
import re
from dataclasses import replace
from pathlib import Path

import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

import furiosa_llm
from furiosa_llm import LLM, SamplingParams
from furiosa_llm.runtime.errors import InputError
from furiosa_llm.server import app
from furiosa_llm.server.generation import Gate, Generator, collect
from furiosa_llm.server.metrics import Metrics
from furiosa_llm.server.model import Decoder
from furiosa_llm.server.settings import ServerSettings
from furiosa_llm.server.stats_log import log_stats
from tests.server.conftest import NAME, connected, error_of, load, metric, serving

HISTOGRAMS = {
    "time_to_first_token_seconds": ("0.001", "10.0"),
    "inter_token_latency_seconds": ("0.01", "2.5"),
    "time_per_output_token_seconds": ("0.01", "2.5"),
    "e2e_request_latency_seconds": ("0.3", "60.0"),
    "request_prompt_tokens": ("1.0", "500.0"),
    "request_generation_tokens": ("1.0", "500.0"),
    "request_params_max_tokens": ("1.0", "500.0"),
}


def test_health_and_version(url: str) -> None:
    health = httpx.get(f"{url}/health")
    assert (health.status_code, health.content) == (200, b"")
    assert httpx.get(f"{url}/version").json() == {"version": furiosa_llm.__version__}


def test_models_have_the_names_that_they_were_given(artifact: Path) -> None:
    args_names = ["org/model", "short"]
    model = load(artifact, data_parallel_size=2, pipeline_parallel_size=2, devices="npu:0,npu:1")
    named = dataclasses.replace(model, names=tuple(args_names))
    with serving(named, ServerSettings()) as url, connected(url) as client:
        assert [one.id for one in client.models.list()] == args_names
        found = client.models.retrieve("org/model")
        assert (found.object, found.id) == ("model", "org/model")
        assert found.model_extra is not None
        assert (found.model_extra["max_prompt_len"], found.model_extra["max_context_len"]) == (511, 512)
        assert found.model_extra["artifact_id"] == NAME
        assert found.model_extra["runtime_config"] == {
            "tensor_parallel_size": 4,
            "pipeline_parallel_size": 2,
            "data_parallel_size": 2,
            "devices": "npu:0,npu:1",
        }
        for name in args_names:
            assert client.completions.create(model=name, prompt="x", max_tokens=1).model == "org/model"
        with pytest.raises(openai.NotFoundError):
            client.completions.create(model=NAME, prompt="x")


def test_metrics(artifact: Path) -> None:
    model, settings = load(artifact, devices="npu:0", data_parallel_size=2), ServerSettings(metrics_names="both")
    with serving(model, settings) as url:
        with connected(url) as client:
            usages = []
            for _ in range(2):
                answer = client.completions.create(
                    model=NAME, prompt=[5] * 40, max_tokens=7, extra_body={"ignore_eos": True}
                )
                assert answer.usage is not None
                assert answer.usage.prompt_tokens_details is not None
                usages.append(answer.usage.prompt_tokens_details.cached_tokens or 0)
            assert usages[0] == 0
            assert 32 <= usages[1] < 40
            with pytest.raises(openai.BadRequestError):
                client.completions.create(model=NAME, prompt=[5] * 600)
        text = httpx.get(f"{url}/metrics").text
        counts = {
            name: metric(url, f"request_{name}_total") for name in ("received", "success", "cancelled", "failure")
        }
        assert counts == {"received": 3, "success": 2, "cancelled": 0, "failure": 1}
        assert metric(url, "prompt_tokens_total") == 80
        assert metric(url, "generation_tokens_total") == 14
        assert metric(url, "prefix_cache_queries_total") == 80
        assert metric(url, "prefix_cache_hits_total") == usages[1]
        families = {family.name.removeprefix("furiosa_llm_"): family for family in text_string_to_metric_families(text)}
        for name, (first, last) in HISTOGRAMS.items():
            bounds = [one.labels["le"] for one in families[name].samples if one.name.endswith("_bucket")]
            assert (bounds[0], *bounds[-2:]) == (first, last, "+Inf"), name
            [count] = [one.value for one in families[name].samples if one.name.endswith("_count")]
            assert count == {"inter_token_latency_seconds": 12, "request_params_max_tokens": 3}.get(name, 2), name
        [total] = families["kv_cache_total_bytes"].samples
        [used] = families["kv_cache_used_bytes"].samples
        [share] = families["kv_cache_usage_perc"].samples
        # K and V of 2 layers with 4 heads (2, each on two PEs) of 16 numbers of 4 bytes; two replicas on one card.
        token = 2 * 2 * 4 * 16 * 4
        assert total.value == 2 * 16 * 512 * token
        assert total.labels == {"model_name": NAME, "device_index": "0"}
        assert used.value == 3 * 16 * token  # 46 tokens are kept, in 3 pages
        assert share.value == used.value / total.value
        assert metric(url, "kv_cache_usage_percent") == pytest.approx(100 * share.value)
        check_vllm_names(text, usages[1])


# What the dashboards ask for that vLLM publishes (examples/online_serving/prometheus_grafana and .../dashboards).
DASHBOARD = """
    e2e_request_latency_seconds_bucket e2e_request_latency_seconds_sum e2e_request_latency_seconds_count
    time_to_first_token_seconds_bucket time_to_first_token_seconds_sum time_to_first_token_seconds_count
    time_per_output_token_seconds_bucket time_per_output_token_seconds_sum time_per_output_token_seconds_count
    inter_token_latency_seconds_bucket inter_token_latency_seconds_sum inter_token_latency_seconds_count
    request_prompt_tokens_bucket request_prompt_tokens_sum request_prompt_tokens_count request_success_total
    request_generation_tokens_bucket request_generation_tokens_sum request_generation_tokens_count
    request_queue_time_seconds_sum request_prefill_time_seconds_sum request_decode_time_seconds_sum
    request_max_num_generation_tokens_sum prompt_tokens_total generation_tokens_total num_requests_running
    num_requests_waiting gpu_cache_usage_perc kv_cache_usage_perc prefix_cache_queries_total prefix_cache_hits_total
    request_inference_time_seconds_bucket request_params_n_sum request_params_max_tokens_sum num_preemptions_total
"""


def check_vllm_names(text: str, cached: int) -> None:
    """`text` has them for two requests, each of 40 tokens with 7 more, of the second of which some were `cached`."""
    families = [one for one in text_string_to_metric_families(text) if one.name.startswith("vllm:")]
    samples = [sample for one in families for sample in one.samples]
    assert [one for one in DASHBOARD.split() if f"vllm:{one}" not in {sample.name for sample in samples}] == []
    assert {(one.labels["model_name"], one.labels["engine"]) for one in samples} == {(NAME, "0")}
    kinds = {one.name.removeprefix("vllm:"): one.type for one in families}
    assert (kinds["request_success"], kinds["num_requests_running"]) == ("counter", "gauge")
    assert kinds["request_queue_time_seconds"] == "histogram"
    values = {sample.name.removeprefix("vllm:"): sample.value for sample in samples}
    ended = {one.labels["finished_reason"]: one.value for one in samples if one.name == "vllm:request_success_total"}
    assert ended == {"stop": 0, "length": 2, "abort": 0, "error": 1}
    assert (values["prompt_tokens_total"], values["prefix_cache_hits_total"]) == (80, cached)
    assert 0 < values["kv_cache_usage_perc"] < 0.1
    parts = [values[f"request_{name}_time_seconds_sum"] for name in ("queue", "prefill", "decode")]
    assert sum(parts) == pytest.approx(values["e2e_request_latency_seconds_sum"])
    assert all(part >= 0 for part in parts)
    assert sum(parts[1:]) == pytest.approx(values["request_inference_time_seconds_sum"])
    assert values["inter_token_latency_seconds_sum"] == values["time_per_output_token_seconds_sum"]


def test_metrics_may_have_vllms_names_alone(url: str, artifact: Path) -> None:
    assert "vllm:" not in httpx.get(f"{url}/metrics").text
    with pytest.raises(InputError, match="metrics_names='prometheus' is unknown; give furiosa, vllm, both"):
        ServerSettings(metrics_names="prometheus")
    model = load(artifact)
    try:
        text = Metrics(model, "vllm").render().decode()
        steering = Metrics(replace(model, names=("a\x1b[31m\x9b\u202e",)), "both").render().decode()
    finally:
        model.close()
    assert "vllm:num_requests_running" in text
    assert "furiosa_llm_" not in text
    assert 'model_name="a\\\\x1b[31m\\\\x9b\\\\u202e"' in steering
    assert not {*"\x1b\x9b\u202e"} & {*steering}


def test_the_line_of_figures(artifact: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = load(artifact)
    assert isinstance(model.kind, Decoder)
    metrics = Metrics(model)

    async def watch(decoder: Decoder) -> None:
        metrics.busy.note(decoder.machine())
        logging = asyncio.create_task(log_stats(metrics, decoder, interval=0.01))
        await asyncio.sleep(0.05)
        assert caplog.messages == []
        generator = Generator(decoder=decoder, gate=Gate(1), metrics=metrics, max_length=64)
        await collect(generator.run("a", [{"prompt_token_ids": [5] * 40}], SamplingParams(max_tokens=200)), 1, 1)
        while "Running: 0 reqs" not in caplog.text:
            await asyncio.sleep(0.01)
        logging.cancel()

    with caplog.at_level("INFO", "furiosa_llm.server.stats_log"):
        asyncio.run(watch(model.kind))
    model.close()
    line = re.compile(
        r"Avg prompt throughput: ([\d.]+) tokens/s, Avg generation throughput: ([\d.]+) tokens/s, "
        r"Running: \d reqs, Waiting: 0 reqs, RNGD KV cache usage \(device 0\): [\d.]+% \(0.00 GiB / 0.01 GiB\), "
        r"Busy \(replica 0, stage 0\): (\d+)%"
    )
    found = [line.fullmatch(message) for message in caplog.messages]
    assert found
    assert None not in found
    assert any(one and float(one[1]) > 0 for one in found)
    assert any(one and float(one[2]) > 0 for one in found)
    assert any(one and float(one[3]) > 0 for one in found)


def test_tokens_and_back(url: str) -> None:
    text = "hello wörld 你好"
    found = httpx.post(f"{url}/tokenize", json={"model": NAME, "prompt": text, "return_token_strs": True}).json()
    assert found["count"] == len(found["tokens"]) == len(found["token_strs"])
    assert found["max_model_len"] == 512
    assert found["token_strs"][:3] == ["he", "ll", "o"]
    back = httpx.post(f"{url}/detokenize", json={"tokens": found["tokens"]}).json()
    assert back == {"prompt": text}
    assert httpx.post(f"{url}/tokenize", json={"prompt": ""}).json()["tokens"] == []
    long = httpx.post(f"{url}/tokenize", json={"prompt": "hello " * 2000}).json()
    assert long["count"] > 2000


def test_special_tokens(artifact: Path, talking_tokenizer: Path) -> None:
    with serving(load(artifact, tokenizer=talking_tokenizer), ServerSettings()) as url, connected(url) as client:
        first = {"tokens": httpx.post(f"{url}/tokenize", json={"prompt": "hello"}).json()["tokens"][:1]}
        assert httpx.post(f"{url}/detokenize", json=first).json() == {"prompt": "<s>"}
        bare = httpx.post(f"{url}/tokenize", json={"prompt": "hello", "add_special_tokens": False}).json()
        chat = {"messages": [{"role": "user", "content": "x"}]}
        assert httpx.post(f"{url}/tokenize", json=chat).json()["tokens"][0] != 1
        assert bare["tokens"][0] != 1
        for special, count in ((True, 1 + bare["count"]), (False, bare["count"])):
            extra = {"add_special_tokens": special}
            answer = client.completions.create(model=NAME, prompt="hello", max_tokens=1, extra_body=extra)
            assert answer.usage is not None
            assert answer.usage.prompt_tokens == count


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        ("tokenize", {}, "give either prompt or messages"),
        ("tokenize", {"prompt": "x", "messages": [{"role": "user", "content": "x"}]}, "either prompt or messages"),
        ("tokenize", {"prompt": "x", "model": "y"}, "does not exist"),
        ("detokenize", {"tokens": [-1]}, "is -1, but the model's tokens are 0 to 1023"),
        ("detokenize", {"tokens": [1024]}, "is 1024, but the model's tokens are 0 to 1023"),
        ("detokenize", {"tokens": [1], "model": "y"}, "does not exist"),
    ],
)
def test_refusals(url: str, path: str, body: dict[str, object], message: str) -> None:
    response = httpx.post(f"{url}/{path}", json=body)
    assert message in error_of(response)["message"]
    assert response.status_code == (404 if "model" in body else 400)


def test_the_schema_has_every_endpoint_and_one_kind_of_error(url: str) -> None:
    schema = httpx.get(f"{url}/openapi.json").json()
    assert set(schema["paths"]) == {
        *("/v1/completions", "/v1/chat/completions", "/v1/embeddings", "/v1/models", "/v1/models/{model}"),
        *("/v1/responses", "/v1/responses/{response_id}", "/v1/responses/{response_id}/cancel", "/v1/messages"),
        *("/v1/messages/count_tokens", "/v1/score", "/v1/rerank"),
        *("/tokenize", "/detokenize", "/tokenizer_info", "/health", "/version", "/metrics", "/machine"),
    }
    for path, operations in schema["paths"].items():
        for method, operation in operations.items():
            answers = operation["responses"]
            generates = "completions" in path or path in ("/v1/responses", "/v1/messages")
            assert ("text/event-stream" in answers["200"].get("content", {})) is generates
            expected = {"post": {"400", "404", "408", "413", "415"}, "get": {"413"}, "delete": {"404", "413"}}[method]
            assert expected <= set(answers)
            assert {"429", "503", "504"} <= set(answers) or not (generates or path == "/v1/embeddings")
            assert {"422", "401"}.isdisjoint(answers)
            for status, answer in answers.items():
                assert "x-request-id" in answer["headers"]
                if status != "200":
                    content = answer["content"]["application/json"]
                    kind = "AnthropicErrorResponse" if path.startswith("/v1/messages") else "ErrorResponse"
                    assert content["schema"] == {"$ref": f"#/components/schemas/{kind}"}
    assert schema["components"]["schemas"]["CompletionRequest"]["properties"]["model"]["enum"] == [NAME]


def test_the_schema_says_what_needs_a_key(artifact: Path) -> None:
    with serving(load(artifact), ServerSettings(api_keys=["k"])) as url:
        schema = httpx.get(f"{url}/openapi.json").json()
    needing = {
        path for path, methods in schema["paths"].items() if any("401" in one["responses"] for one in methods.values())
    }
    assert needing == set(schema["paths"]) - {"/health", "/version", "/metrics"}
    assert all(
        schema["paths"][path][method]["security"] == [{"key": []}]
        for path in needing
        for method in schema["paths"][path]
    )


def test_what_clients_need_to_know_of_the_tokenizer(artifact: Path, url: str, llm: LLM) -> None:
    found = httpx.get(f"{url}/tokenizer_info").json()
    assert (found["bos_token"], found["eos_token"], found["pad_token"]) == ("<s>", "</s>", "<pad>")
    assert found["chat_template"] == llm.tokenizer.chat_template
    with serving(load(artifact), ServerSettings(chat_template="x")) as other:
        assert httpx.get(f"{other}/tokenizer_info").json()["chat_template"] == "x"


def test_a_task_of_the_server_that_ends_is_logged(
    artifact: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def broken(*_: object) -> None:
        raise OSError("the figures broke")

    monkeypatch.setattr(app, "watch", broken)
    with serving(load(artifact), ServerSettings()) as url:
        assert httpx.get(f"{url}/health").status_code == 200
    said = capsys.readouterr().err
    assert "a task of the server has ended; its figures stay as they are" in said
    assert "OSError: the figures broke" in said
