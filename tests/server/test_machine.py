"""`/machine` and the machine's part of `/metrics`: their shapes, and that they say the same."""

from __future__ import annotations

import asyncio
import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

import furiosa_llm
from furiosa_llm import EngineArgs
from furiosa_llm.cli.serve import _expected
from furiosa_llm.runtime.encoder import Encoder
from furiosa_llm.runtime.engine.machine_snapshot import MachineSnapshot
from furiosa_llm.runtime.errors import InputError
from furiosa_llm.runtime.runners.batch import Companions
from furiosa_llm.runtime.runners.batch_invariance import BatchInvariance, KernelDifference
from furiosa_llm.server.machine_metrics import BusyShares, watch
from furiosa_llm.server.model import Decoder, load_served, open_served
from furiosa_llm.server.settings import ServerSettings
from furiosa_llm.simulate.device import load_device
from furiosa_llm.simulate.predicted import Prediction
from furiosa_llm.simulate.this_machine import device_text
from tests.server.conftest import NAME, connected, error_of, load, serving, wait_for
from tests.simulate.conftest import small_machine

KEYS = {
    "": {
        *("model", "task", "version", "time", "uptime_seconds", "parallelism", "cards", "replicas", "stages"),
        *("collectives", "tokens", "requests", "batch_invariance", "verification", "prediction"),
    },
    "parallelism": {"tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size", "devices"},
    "pes": {"pe", "replica", "stage", "rank", "memory_nbytes", "weights_nbytes", "kv_nbytes", "kv_used_nbytes", "host"},
    "replicas": {"replica", "alive", "ready", "running", "waiting", "used_pages", "num_pages"},
    "stages": {"replica", "stage", "first_block", "num_blocks", "busy_seconds", "batches"},
    "collectives": {"replica", "stage", "kind", "calls", "nbytes", "seconds"},
    "tokens": {"prompt", "generation"},
    "requests": {"received", "succeeded", "cancelled", "failed"},
}


def machine(url: str) -> dict[str, Any]:
    """What `/machine` says; its shape is checked."""
    response = httpx.get(f"{url}/machine")
    assert response.status_code == 200
    found: dict[str, Any] = response.json()
    assert set(found) == KEYS[""]
    for name in ("parallelism", "tokens", "requests"):
        assert set(found[name]) == KEYS[name]
    for name in ("replicas", "stages", "collectives"):
        assert all(set(one) == KEYS[name] for one in found[name])
    for card in found["cards"]:
        assert set(card) == {"npu", "pes"}
        assert [one["pe"] for one in card["pes"]] == list(range(8))
        assert all(set(one) == KEYS["pes"] for one in card["pes"])
    return found


def test_what_was_probed(artifact: Path) -> None:
    """What another machine's kernels would give, with what the engine does about it."""
    difference = KernelDifference(op="MatMul", node="q", nodes=2, rows=(1,), relative=2.5e-7)
    model = load(artifact, batch_invariant=True)
    assert isinstance(model.kind, Decoder)
    probed = BatchInvariance(differences=(difference,), companions=Companions(lone=True), chunks=False, unprobed=())
    kind = dataclasses.replace(model.kind, probe=lambda: probed)
    with serving(dataclasses.replace(model, kind=kind), ServerSettings()) as url:
        assert machine(url)["batch_invariance"] == {
            "enabled": True,
            "invariant": False,
            "possible": True,
            "chunks": False,
            "text": "a row alone has other last bits than in a batch: MatMul (by 2.5e-07 of its largest element)",
            "differences": [{"op": "MatMul", "node": "q", "nodes": 2, "rows": [1], "relative": 2.5e-07}],
        }


def families(url: str) -> dict[str, Metric]:
    text = httpx.get(f"{url}/metrics").text
    return {one.name.removeprefix("furiosa_llm_"): one for one in text_string_to_metric_families(text)}


def values(family: Metric, *labels: str) -> dict[tuple[str, ...], float]:
    """A family's samples by some of their labels; it has no others but the model's name."""
    assert all(set(one.labels) == {"model_name", *labels} for one in family.samples)
    found = {tuple(one.labels[label] for label in labels): one.value for one in family.samples}
    assert len(found) == len(family.samples)
    return found


def expected(entries: list[dict[str, Any]], field: str, *labels: str) -> dict[tuple[str, ...], float]:
    return {tuple(str(one[label]) for label in labels): one[field] for one in entries}


def test_a_decoder(artifact: Path) -> None:
    model = load(artifact, devices="npu:0,npu:2", data_parallel_size=2, pipeline_parallel_size=2)
    with serving(model, ServerSettings()) as url, connected(url) as client:
        before = machine(url)
        assert (before["model"], before["task"], before["version"]) == (NAME, "decoder", furiosa_llm.__version__)
        assert before["parallelism"] == {
            "tensor_parallel_size": 4,
            "pipeline_parallel_size": 2,
            "data_parallel_size": 2,
            "devices": "npu:0,npu:2",
        }
        assert before["batch_invariance"]["enabled"] is False
        assert before["batch_invariance"]["possible"] is True
        assert before["batch_invariance"]["invariant"] == (before["batch_invariance"]["differences"] == [])
        assert before["tokens"] == {"prompt": 0, "generation": 0}
        client.completions.create(model=NAME, prompt=[5] * 40, max_tokens=7, extra_body={"ignore_eos": True})
        with pytest.raises(openai.BadRequestError, match="maximum input context length"):
            client.completions.create(model=NAME, prompt=[5] * 600)
        wait_for(lambda: not any(one["running"] for one in machine(url)["replicas"]))
        after, metrics = machine(url), families(url)
    assert after["tokens"] == {"prompt": 40, "generation": 7}
    assert after["requests"] == {"received": 2, "succeeded": 1, "cancelled": 0, "failed": 1}
    assert after["uptime_seconds"] > before["uptime_seconds"]
    assert after["time"] > before["time"] > 1.5e9
    assert [card["npu"] for card in after["cards"]] == [0, 2]
    for stage, card in enumerate(after["cards"]):
        places = [(one["replica"], one["stage"], one["rank"]) for one in card["pes"]]
        assert places == [(replica, stage, rank) for replica in range(2) for rank in range(4)]
    assert [(one["replica"], one["alive"], one["ready"], one["running"]) for one in after["replicas"]] == [
        (0, True, True, 0),
        (1, True, True, 0),
    ]
    assert [one["used_pages"] for one in after["replicas"]] == [3, 0]
    assert [(one["replica"], one["stage"], one["batches"]) for one in after["stages"]] == [
        *((0, 0, 7), (0, 1, 7)),
        *((1, 0, 0), (1, 1, 0)),
    ]
    kinds = [(one["replica"], one["stage"], one["kind"]) for one in after["collectives"]]
    of_stages = ((0, "AllReduce"), (0, "AllGather"), (1, "AllReduce"), (1, "AllGather"), (1, "Send"))
    assert kinds == [(replica, *one) for replica in range(2) for one in of_stages]
    sent = next(one for one in after["collectives"] if one["kind"] == "Send")
    assert (sent["calls"], sent["nbytes"]) == (7, 46 * 256)  # `furiosa-llm topology` says 256 bytes a token
    agree(after, metrics)


def agree(found: Mapping[str, Any], metrics: Mapping[str, Metric]) -> None:
    """What was counted is what the metrics say; nothing has run in between."""
    for name, field in (("calls", "calls"), ("bytes", "nbytes"), ("seconds", "seconds")):
        family, labels = metrics[f"collective_{name}"], ("replica", "stage", "kind")
        assert family.type == "counter"
        assert values(family, *labels) == expected(found["collectives"], field, *labels)
    for name, field in (("busy_seconds", "busy_seconds"), ("batches", "batches")):
        family = metrics[f"stage_{name}"]
        assert family.type == "counter"
        assert values(family, "replica", "stage") == expected(found["stages"], field, "replica", "stage")
    assert metrics["stage_busy_share"].type == "gauge"
    shares = values(metrics["stage_busy_share"], "replica", "stage")
    assert {key for key, share in shares.items() if share} == {
        key for key, busy in expected(found["stages"], "busy_seconds", "replica", "stage").items() if busy
    }
    memory = values(metrics["pe_memory_bytes"], "npu", "pe", "kind")
    kinds = {
        "capacity": "memory_nbytes",
        "weights": "weights_nbytes",
        "kv_room": "kv_nbytes",
        "kv_used": "kv_used_nbytes",
    }
    assert memory == {
        (str(card["npu"]), str(one["pe"]), kind): one[field]
        for card in found["cards"]
        for one in card["pes"]
        if one["replica"] is not None
        for kind, field in kinds.items()
    }
    [info] = metrics["pipeline_info"].samples
    assert (info.name, info.value) == ("furiosa_llm_pipeline_info", 1)
    parallelism = {name: str(value) for name, value in found["parallelism"].items()}
    assert info.labels == {"model_name": found["model"], **parallelism}


def test_counters_of_replicas(artifact: Path) -> None:
    model = load(artifact, data_parallel_size=2)
    with serving(model, ServerSettings()) as url, connected(url) as client:
        client.completions.create(model=NAME, prompt=[5] * 40, max_tokens=7, extra_body={"ignore_eos": True})
        wait_for(lambda: not any(one["running"] for one in machine(url)["replicas"]))
        metrics = families(url)
    for name, counts in {
        "prefilled_tokens": (40, 0),
        "decoded_tokens": (6, 0),
        "num_preemptions": (0, 0),
        "slot_copies": (0, 0),
        "replica_restarts": (0, 0),
    }.items():
        assert metrics[name].type == "counter"
        assert values(metrics[name], "replica") == {("0",): counts[0], ("1",): counts[1]}, name


def test_an_encoder(encoder_artifact: Path) -> None:
    with serving(load(encoder_artifact), ServerSettings()) as url, connected(url) as client:
        name = client.models.list().data[0].id
        client.embeddings.create(model=name, input=[[5] * 4, [6] * 4])
        with pytest.raises(openai.BadRequestError, match="takes at most 512"):
            client.embeddings.create(model=name, input=[[5] * 10_000])
        found, metrics = machine(url), families(url)
    assert (found["model"], found["task"], found["batch_invariance"]) == (name, "encoder", None)
    assert found["parallelism"]["devices"] == "npu:0:0-3"
    [card] = found["cards"]
    assert [one["rank"] for one in card["pes"]] == [0, 1, 2, 3, None, None, None, None]
    assert card["pes"][0]["weights_nbytes"] > 0
    assert {one["kv_nbytes"] for one in card["pes"]} == {0}
    assert found["replicas"] == [
        {"replica": 0, "alive": True, "ready": True, "running": 0, "waiting": 0, "used_pages": 0, "num_pages": 0}
    ]
    [stage] = found["stages"]
    assert (stage["batches"], stage["first_block"]) == (1, 0)
    assert next(one for one in found["collectives"] if one["kind"] == "AllReduce")["calls"] > 0
    assert found["tokens"] == {"prompt": 8, "generation": 0}
    assert found["requests"] == {"received": 3, "succeeded": 2, "cancelled": 0, "failed": 1}
    agree(found, metrics)


def test_the_machine_needs_the_key(artifact: Path) -> None:
    with serving(load(artifact), ServerSettings(api_keys=["key"])) as url:
        refused = httpx.get(f"{url}/machine")
        assert (refused.status_code, error_of(refused)["code"]) == (401, "invalid_api_key")
        assert httpx.get(f"{url}/machine", headers={"Authorization": "Bearer key"}).status_code == 200


# -- busy shares ---------------------------------------------------------------------------------------------------


class Clock:
    """A clock that is set by hand."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_busy_shares_are_those_of_the_last_seconds(encoder_artifact: Path) -> None:
    with Encoder.load_artifact(encoder_artifact) as encoder:
        clock, busy = Clock(), encoder._executor._counters[0]
        shares = BusyShares(clock)
        assert shares.read(encoder.machine()) == {(0, 0): 0.0}
        for second in range(21):
            clock.now = 100.0 + second
            shares.note(encoder.machine())
            busy[1] += 500_000_000 if second <= 10 else 250_000_000
            if second == 3:
                clock.now += 1
                assert shares.read(encoder.machine()) == {(0, 0): 0.5}
        assert len(shares._noted) == 11
        clock.now = 121.0
        assert shares.read(encoder.machine()) == {(0, 0): pytest.approx(0.25)}


def test_the_machine_is_watched(encoder_artifact: Path) -> None:
    noted: list[MachineSnapshot] = []

    class Noting(BusyShares):
        def note(self, found: MachineSnapshot) -> None:
            noted.append(found)

    async def run(encoder: Encoder) -> None:
        task = asyncio.create_task(watch(Noting(), encoder.machine, interval=0.001))
        while len(noted) < 3:
            await asyncio.sleep(0.001)
        task.cancel()

    with Encoder.load_artifact(encoder_artifact) as encoder:
        asyncio.run(run(encoder))
    assert len(noted) >= 3


def test_what_a_device_file_predicts(artifact: Path, tmp_path: Path) -> None:
    """The command's `--device`, from its file to what the page is told."""
    file = tmp_path / "here.toml"
    file.write_text(device_text(small_machine(len(os.sched_getaffinity(0)))))
    args = EngineArgs(artifact)
    opened, plan = open_served(args)
    expected = _expected(file, args, plan)
    with serving(
        dataclasses.replace(load_served(args, opened, plan, None, 1), expected=expected), ServerSettings()
    ) as url:
        assert machine(url)["prediction"] == {"device": str(file), "recent": None}
        with connected(url) as client:
            client.completions.create(model=NAME, prompt=[5] * 40, max_tokens=7, extra_body={"ignore_eos": True})
        wait_for(lambda: machine(url)["prediction"]["recent"] is not None)
        found = machine(url)["prediction"]["recent"]
    assert (found["requests"], found["prompt_tokens"], found["generated_tokens"]) == (1, 40, 7)
    assert found["concurrency"] == pytest.approx(1)
    assert found["tokens_per_second"]["measured"] > 0
    assert plan is not None
    said = Prediction(load_device(str(file)), args).steady(plan, 1, 40, 7)
    assert found["ttft_ms"]["predicted"] == pytest.approx(1000 * said.ttft)
    assert found["tpot_ms"]["predicted"] == pytest.approx(1000 * said.tpot)
    with pytest.raises(InputError, match="an encoder runs without an engine"):
        _expected(file, args, None)
