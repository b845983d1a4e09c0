"""A short run over stage servers without Ray, and that the campaign notices what it is there for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from furiosa_llm.runtime.artifact.layout import Mesh
from furiosa_llm.runtime.artifact.reader import Artifact
from furiosa_llm.runtime.engine import launch
from furiosa_llm.runtime.engine.engine_args import EngineArgs
from furiosa_llm.runtime.llm_engine import LLMEngine
from furiosa_llm.runtime.requests.outputs import RequestOutput
from tests.campaigns.cluster_campaign import SOON, wrong
from tests.campaigns.cluster_load import PARAMS, PROMPTS, run
from tests.support.runtime.blocks import llama_blocks
from tests.support.runtime.models import LlamaSize
from tests.support.runtime.stages import FixedCluster, serving_stages

ZOO = Path(__file__).parents[2] / "fixtures" / "zoo" / "tiny-llama-genai-fp32"
GOOD: dict[str, Any] = {
    "asked": 9,
    "answered": 8,
    "errors": {"StageError": 1},
    "wrong": [],
    "left open": {},
    "half copied": [],
    "stages left after": 0.1,
    "stages left after the head's end": SOON,
}


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return llama_blocks(Mesh((2, 2)), LlamaSize(layers=4, vocab=256), tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def expected(artifact: Artifact) -> list[list[int]]:
    args = EngineArgs(artifact.folder, tokenizer=ZOO, threads=1)
    with LLMEngine.from_engine_args(args) as engine:
        for number, prompt in enumerate(PROMPTS):
            engine.add_request(str(number), {"prompt_token_ids": prompt}, PARAMS)
        last: dict[str, RequestOutput] = {}
        while engine.has_unfinished_requests():
            last.update({output.request_id: output for output in engine.step()})
    return [list(last[str(number)].outputs[0].token_ids) for number in range(len(PROMPTS))]


def test_stages_that_end_under_load(
    artifact: Artifact, expected: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving_stages(6) as servers:
        cluster = FixedCluster([[server.address for server in servers[at : at + 2]] for at in (0, 2)])
        monkeypatch.setattr(launch, "open_cluster", lambda topology, args: cluster)
        monkeypatch.setattr(launch, "open_model", lambda args: artifact)
        engines: list[LLMEngine] = []
        from_args = LLMEngine.from_engine_args

        def keep(args: EngineArgs) -> LLMEngine:
            engines.append(from_args(args))
            return engines[0]

        monkeypatch.setattr(LLMEngine, "from_engine_args", keep)
        steps = iter(range(10**6))
        lost = [(4, 0, 1), (5, 1, 0)]  # which server takes the place of which stage

        def ended() -> bool:
            """Loses a stage every hundred steps; the end is when both replicas are back."""
            at = next(steps)
            if lost and at >= 100 and at % 100 == 0:
                spare, replica, stage = lost.pop(0)
                servers[2 * replica + stage].close()
                cluster.addresses[replica][stage] = servers[spare].address
            return not lost and all(one.counts.restarts == 1 for one in engines[0].core.replicas)

        args = EngineArgs(
            artifact.folder,
            tokenizer=ZOO,
            pipeline_parallel_size=2,
            data_parallel_size=2,
            distributed_executor_backend="ray",
        )
        report = run(args, expected, ended)
    assert report["wrong"] == []
    assert report["restarts"] == [1, 1]
    assert report["asked"] == report["answered"] + report["errors"]["StageError"]
    assert wrong({**GOOD, **report}) == []


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"wrong": ["3 has other tokens"]}, "3 has other tokens"),
        ({"left open": {"socket:[N]": 2}}, "left open: "),
        ({"half copied": ["a.part"]}, "half copied: "),
        ({"stages left after": None}, "stages are left"),
        ({"stages left after the head's end": SOON + 1}, "stages are left 11.0 s after the head's end"),
        ({"answered": 7}, "requests without an answer"),
    ],
)
def test_what_is_wrong(changed: dict[str, Any], message: str) -> None:
    assert wrong(GOOD) == []
    (found,) = wrong({**GOOD, **changed})
    assert found.startswith(message)


def test_another_token_is_noticed(artifact: Artifact, expected: list[list[int]]) -> None:
    steps = iter(range(30))
    args = EngineArgs(artifact.folder, tokenizer=ZOO, threads=1)
    others = [[token + 1 for token in tokens] for tokens in expected]
    report = run(args, others, lambda: next(steps, None) is None)
    assert len(report["wrong"]) == report["asked"] > 0
    assert report["wrong"][0].endswith("has other tokens")
