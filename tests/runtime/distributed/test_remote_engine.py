"""Engines whose stages are servers: the tokens of one process, and what requests meet when a stage is lost."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from furiosa_llm.builder import ArtifactBuilder
from furiosa_llm.runtime.adapters.adapter import LoRARequest
from furiosa_llm.runtime.artifact.layout import Mesh
from furiosa_llm.runtime.artifact.reader import Artifact, open_artifact
from furiosa_llm.runtime.distributed.stage_server import StageServer
from furiosa_llm.runtime.engine import launch
from furiosa_llm.runtime.engine.engine_args import EngineArgs
from furiosa_llm.runtime.errors import InputError, NoHostError, ReplicaError, StageError, UnsupportedError
from furiosa_llm.runtime.llm_engine import LLMEngine
from furiosa_llm.runtime.requests.outputs import RequestOutput
from furiosa_llm.runtime.tokens.sampling_params import SamplingParams
from tests.support.adapters import LORA, saved
from tests.support.builder.exported import exported
from tests.support.runtime.blocks import llama_blocks
from tests.support.runtime.models import LlamaSize
from tests.support.runtime.stages import FixedCluster, serving_stages
from tests.support.tiers import tiered

ZOO = Path(__file__).parents[3] / "fixtures" / "zoo" / "tiny-llama-genai-fp32"
DEADLINE = 60.0
SHARED = tuple(range(1, 33))


SIZE = LlamaSize(layers=4, vocab=256)
MESHES = {4: Mesh((2, 2)), 8: Mesh((2, 2, 2))}
ROWS = [(size, stages, replicas) for size in MESHES for stages in (1, 2, 3, 4) for replicas in (1, 2)]
FAST = [(4, 3, 1), (4, 2, 2)]
RELEASE = [row for row in ROWS if row not in (*FAST, (4, 1, 2), (4, 4, 2), (8, 3, 1), (8, 4, 2))]


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return llama_blocks(MESHES[4], SIZE, tmp_path_factory.mktemp("llama"))


@contextmanager
def engine_of(
    artifact: Artifact, cluster: FixedCluster | None, monkeypatch: pytest.MonkeyPatch, **options: Any
) -> Iterator[LLMEngine]:
    """An engine of stages in this process, or on the servers of `cluster`."""
    own: dict[str, Any] = {"threads": 1} if cluster is None else {"distributed_executor_backend": "ray"}
    args = EngineArgs(artifact.folder, tokenizer=ZOO, seed=7, **own, **options)
    monkeypatch.setattr(launch, "open_cluster", lambda topology, args: cluster)
    with LLMEngine(launch.start(launch.make_plan(args, artifact), args)) as engine:
        yield engine


def cluster_of(servers: Sequence[StageServer], replicas: int) -> FixedCluster:
    count = len(servers) // replicas
    addresses = [server.address for server in servers]
    return FixedCluster([addresses[replica * count : (replica + 1) * count] for replica in range(replicas)])


def requests() -> list[tuple[list[int], SamplingParams]]:
    """Ragged prompts, of which some begin alike, and every way of choosing a token."""
    rng = np.random.default_rng(3)
    prompts = [rng.integers(1, 250, length).tolist() for length in (3, 17, 40, 9)]
    prompts += [[*SHARED, *rng.integers(1, 250, length).tolist()] for length in (1, 5, 11)]
    kinds: list[dict[str, Any]] = [
        {},
        {"logprobs": 2},
        {"temperature": 0.8, "seed": 4},
        {},
        {},
        {"temperature": 0.5, "n": 2, "best_of": 2},
        {"repetition_penalty": 1.2},
    ]
    return [
        (prompt, SamplingParams(**{"temperature": 0.0, "max_tokens": 24, "ignore_eos": True, **kind}))
        for prompt, kind in zip(prompts, kinds, strict=True)
    ]


def add(engine: LLMEngine, number: int, prompt: list[int], params: SamplingParams) -> None:
    engine.add_request(str(number), {"prompt_token_ids": prompt}, params)


def ended(engine: LLMEngine) -> dict[int, RequestOutput]:
    last: dict[int, RequestOutput] = {}
    while engine.has_unfinished_requests():
        last.update({int(output.request_id): output for output in engine.step() if output.finished})
    return last


def answers(engine: LLMEngine) -> list[Any]:
    """What the requests give, those with a prefix that another one has behind it."""
    found: dict[int, RequestOutput] = {}
    for numbers in (range(5), range(5, 7)):
        for number in numbers:
            add(engine, number, *requests()[number])
        found |= ended(engine)
    assert [output.error for output in found.values()] == [None] * 7
    return [
        [
            (one.token_ids, None if one.logprobs is None else [sorted(entry) for entry in one.logprobs])
            for one in o.outputs
        ]
        for _, o in sorted(found.items())
    ]


@pytest.mark.parametrize(("size", "stages", "replicas"), tiered(ROWS, FAST, RELEASE))
def test_the_tokens_of_one_process(
    size: int, stages: int, replicas: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With so few pages that sequences lose their places, and with prefixes that are found."""
    artifact = llama_blocks(MESHES[size], SIZE, tmp_path)
    options = {
        "pipeline_parallel_size": stages,
        "data_parallel_size": replicas,
        "max_batch_size": 8,
        "prefill_chunk_size": 16,
        "paged_attention_num_blocks": 10,
    }
    with engine_of(artifact, None, monkeypatch, **options) as engine:
        expected = answers(engine)
    with (
        serving_stages(stages * replicas) as servers,
        engine_of(artifact, cluster_of(servers, replicas), monkeypatch, **options) as engine,
    ):
        assert answers(engine) == expected
        usage = [replica.usage for replica in engine.core.replicas]
        assert replicas > 1 or usage[0].preemptions > 0
        assert all(replica.counts.prefilled_tokens > 0 for replica in engine.core.replicas)


def test_an_artifact_that_is_at_the_head_alone(
    artifact: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with engine_of(artifact, None, monkeypatch, pipeline_parallel_size=2) as engine:
        expected = answers(engine)
    options = {"pipeline_parallel_size": 2, "artifact_cache": tmp_path / "cache"}
    with serving_stages(2) as servers, engine_of(artifact, cluster_of(servers, 1), monkeypatch, **options) as engine:
        assert answers(engine) == expected
        assert len(list((tmp_path / "cache").glob(f"{artifact.digest}-*/manifest.json"))) == 2  # one for each stage


def test_adapters_go_to_the_stages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ArtifactBuilder(exported("lora", tmp_path)).build(tmp_path / "artifact")
    artifact = open_artifact(tmp_path / "artifact")
    adapters = [None, *(LoRARequest(f"a{i}", i, str(saved(tmp_path / f"a{i}", LORA, seed=i))) for i in (1, 2))]
    found = []
    with serving_stages(1) as servers:
        for cluster in (None, cluster_of(servers, 1)):
            with engine_of(artifact, cluster, monkeypatch) as engine:
                for number, adapter in enumerate(adapters):
                    params = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)
                    engine.add_request(str(number), {"prompt_token_ids": [3, 1, 4]}, params, lora_request=adapter)
                found.append([output.outputs[0].token_ids for _, output in sorted(ended(engine).items())])
    assert found[0] == found[1]
    assert len({str(tokens) for tokens in found[0]}) == 3


# -- faults --------------------------------------------------------------------------------------------------------

LONG = SamplingParams(temperature=0.0, max_tokens=150, ignore_eos=True)


def until(happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_lost_stage_ends_what_its_replica_has_begun_and_nothing_else(
    artifact: Artifact, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The other replica runs on; the lost one waits for a host, then is built anew, its other stage as it was."""
    prompts = ([3, 1, 4], [1, 5, 9, 2, 6])
    options = {"pipeline_parallel_size": 2, "data_parallel_size": 2, "max_batch_size": 2}
    with engine_of(artifact, None, monkeypatch, **options) as engine:
        for number, prompt in enumerate(prompts):
            add(engine, number, prompt, LONG)
        tokens = [output.outputs[0].token_ids for _, output in sorted(ended(engine).items())]
    with serving_stages(5) as servers:
        cluster = cluster_of(servers[:4], 2)
        with engine_of(artifact, cluster, monkeypatch, **options) as engine:
            for number, prompt in enumerate(prompts):
                add(engine, number, prompt, LONG)
            begun: set[str] = set()
            while len(begun) < 2:
                begun.update(output.request_id for output in engine.step())
            cluster.error = NoHostError("no room")
            servers[1].close()
            outputs = ended(engine)
            error = outputs[0].error
            assert isinstance(error, ReplicaError)
            assert isinstance(error.__cause__, StageError)
            assert "stage 1 on host0.1 is lost" in str(error)
            assert outputs[0].outputs[0].token_ids == tokens[0][: len(outputs[0].outputs[0].token_ids)]
            assert outputs[1].outputs[0].token_ids == tokens[1]
            first, second = engine.core.replicas
            assert (first.ready, second.ready, engine.core.ready) == (False, True, True)
            hosts = {(pe.replica, pe.stage): pe.host for card in engine.core.machine().cards for pe in card.pes}
            assert hosts[0, 1] == "host0.1"
            assert hosts[1, 0] == "host1.0"
            asked = cluster.asked
            until(lambda: cluster.asked > asked + 1)
            assert first.death is None
            assert caplog.text.count("NoHostError: no room") == 1  # however often it asks
            cluster.addresses[0][1] = servers[4].address
            cluster.error = None
            until(lambda: first.ready)
            for number, prompt in enumerate(prompts):
                add(engine, number, prompt, LONG)
            assert [output.outputs[0].token_ids for _, output in sorted(ended(engine).items())] == tokens
            assert first.counts.restarts == 1
    assert cluster.closed


def test_a_replica_that_cannot_load_ends_the_others(artifact: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving_stages(2) as servers:
        cluster = cluster_of(servers, 2)
        monkeypatch.setattr("furiosa_llm.runtime.distributed.remote_runner.CONNECT_SECONDS", 0.3)
        cluster.addresses[1][0] = "tcp://127.0.0.1:1"
        with (
            pytest.raises(StageError, match=r"stage 0 on host1\.0 does not answer at tcp://127\.0\.0\.1:1"),
            engine_of(artifact, cluster, monkeypatch, data_parallel_size=2),
        ):
            pass
        assert cluster.closed
        with engine_of(artifact, cluster_of(servers, 2), monkeypatch, data_parallel_size=2):
            pass  # the servers are free again


@pytest.mark.parametrize("option", [{"workers": 2}, {"threads": 2}])
def test_threads_and_workers_are_of_this_process(
    option: dict[str, int], artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster = FixedCluster([])
    with (
        pytest.raises(InputError, match="workers and threads are of stages in this process; leave them out"),
        engine_of(artifact, cluster, monkeypatch, **option),
    ):
        pass


def test_without_the_extra(artifact: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "find_spec", lambda name: None if name == "zmq" else nullcontext())
    with (
        pytest.raises(UnsupportedError, match=r"distributed_executor_backend='ray' needs pyzmq; `pip install 'furiosa"),
        engine_of(artifact, FixedCluster([]), monkeypatch),
    ):
        pass
