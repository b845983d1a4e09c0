"""Samples under the real LoadGen: each answered with the model's own tokens or vector, and timed; failures counted."""

from __future__ import annotations

import json
import threading
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from furiosa_llm import LLM, SamplingParams
from furiosa_llm.mlperf.errors import RunError, RunInterruptedError
from furiosa_llm.mlperf.loadgen import Mode, run_test
from furiosa_llm.mlperf.model import Model
from furiosa_llm.mlperf.run import run_mode
from furiosa_llm.mlperf.scoring import Scores, read_answers
from furiosa_llm.mlperf.sut import Query, SystemUnderTest
from furiosa_llm.runtime.encoder import Encoder
from furiosa_llm.runtime.errors import ReplicaError
from tests.mlperf.conftest import MAX_OUTPUT_TOKENS, PROMPTS, benchmark

Settings = Callable[..., Any]


def run(system: SystemUnderTest, settings: Any, mode: Mode, folder: Path, **options: Any) -> None:
    run_test(system, name="Test SUT", num_samples=len(PROMPTS), settings=settings, mode=mode, folder=folder, **options)


def log(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "mlperf_log_detail.txt").read_text().splitlines()
    return [json.loads(line.removeprefix(":::MLLOG ")) for line in lines]


def value(folder: Path, key: str) -> Any:
    [entry] = [entry for entry in log(folder) if entry["key"] == key]
    return entry["value"]


@pytest.mark.parametrize("scenario", ["Offline", "Server"])
def test_a_decoders_accuracy_log_has_the_tokens_that_it_generates(
    scenario: str, artifact: Path, model: Model, settings: Settings, tmp_path: Path
) -> None:
    system = model.system(first_tokens=scenario == "Server")
    run(system, settings(scenario, token_latencies=True), Mode.ACCURACY, tmp_path)
    params = SamplingParams(temperature=0.0, max_tokens=MAX_OUTPUT_TOKENS, min_tokens=2)
    with LLM.load_artifact(artifact) as llm:
        expected = [
            one.outputs[0].token_ids for one in llm.generate(prompt_token_ids=list(PROMPTS), sampling_params=params)
        ]
    answers = read_answers(tmp_path)
    assert [np.frombuffer(answers[index], np.int64).tolist() for index in range(len(PROMPTS))] == expected
    assert {one.sample: one.tokens for one in system.finished} == dict(enumerate(map(len, expected)))
    assert not system.failures


@pytest.mark.parametrize("scenario", ["Offline", "Server"])
def test_an_encoders_accuracy_log_has_its_vectors(
    scenario: str, encoder_artifact: Path, encoder: Model, settings: Settings, tmp_path: Path
) -> None:
    system = encoder.system(first_tokens=False)
    run(system, settings(scenario), Mode.ACCURACY, tmp_path)
    system.close()
    with Encoder.load_artifact(encoder_artifact) as plain:
        expected = [one.outputs.data for one in plain.encode(list(PROMPTS))]
    answers = read_answers(tmp_path)
    for index, wanted in enumerate(expected):
        np.testing.assert_allclose(np.frombuffer(answers[index], np.float32), wanted, atol=1e-5)


def test_loadgen_is_told_of_first_tokens_before_the_end(model: Model, settings: Settings, tmp_path: Path) -> None:
    system = model.system(first_tokens=True)
    run(system, settings("Server", token_latencies=True), Mode.PERFORMANCE, tmp_path)
    assert len(system.finished) >= 12
    for one in system.finished:
        assert one.issued < one.first < one.done
    first, total = value(tmp_path, "result_first_token_mean_latency_ns"), value(tmp_path, "result_mean_latency_ns")
    assert 0 < first < total
    # LoadGen counts from when a sample was due, which is before it was given, to when it was told, which is later.
    assert first > np.mean([one.first - one.issued for one in system.finished])
    assert total > np.mean([one.done - one.issued for one in system.finished])
    tokens = sum(one.tokens for one in system.finished)
    assert value(tmp_path, "result_completed_tokens_per_second") > 0
    assert tokens > len(system.finished)


def test_offline_waits_for_everything_and_counts_its_tokens(model: Model, settings: Settings, tmp_path: Path) -> None:
    system = model.system(first_tokens=False)
    run(system, settings("Offline", token_latencies=True), Mode.PERFORMANCE, tmp_path)
    tokens = sum(one.tokens for one in system.finished)
    rates = value(tmp_path, "result_tokens_per_second") / value(tmp_path, "result_samples_per_second")
    assert rates == pytest.approx(tokens / len(system.finished), rel=1e-3)
    assert value(tmp_path, "result_query_count") == 1


class _Failing(SystemUnderTest):
    """Answers every other sample, and fails the rest."""

    def close(self) -> None:
        """Nothing was started."""

    def _start(self, query: Query) -> None:
        if query.sample % 2:
            raise ReplicaError("the replica broke")
        query.answer, query.tokens = array("q", [1, 2]), 2
        self._finish(query)


class _FailingModel(Model):
    """A model whose system fails."""

    def __init__(self, model: Model) -> None:
        self.made = _Failing()
        self._model = model

    def system(self, *, first_tokens: bool) -> SystemUnderTest:
        return self.made

    def score(self, answers: dict[int, bytes]) -> Scores:
        return self._model.score(answers)

    def close(self) -> None:
        """Nothing was loaded."""


@pytest.mark.parametrize("mode", list(Mode))
def test_failed_samples_make_the_result_invalid_and_the_logs_are_whole(
    mode: Mode, model: Model, settings: Settings, tmp_path: Path
) -> None:
    failing, summaries, lines = _FailingModel(model), list[str](), list[str]()
    chosen, made = benchmark("gpt-j-offline"), settings("Offline", min_duration_ms=0)
    with pytest.raises(RunError, match=r"failed \d+ samples.*the replica broke") as raised:
        run_mode(chosen, mode, tmp_path, failing, len(PROMPTS), made, summary=summaries.append, progress=lines.append)
    assert isinstance(raised.value.__cause__, ReplicaError)
    count = len(failing.made.failures)
    assert 0 < count < len(failing.made.finished)
    assert f"Engine failures : {count}, the first: the replica broke" in summaries[-1]
    assert "VALID" not in summaries[-1].replace("INVALID", "")
    assert (tmp_path / "furiosa_summary.txt").read_text() == summaries[-1]
    assert not (tmp_path / "accuracy.txt").exists()
    if mode is Mode.PERFORMANCE:
        assert "Result is : VALID" in (tmp_path / "mlperf_log_summary.txt").read_text()  # LoadGen cannot know
        assert "Result is : INVALID" in summaries[-1]
    assert (
        json.loads((tmp_path / "furiosa_latencies.json").read_text())["samples"] == len(failing.made.finished) - count
    )


def test_a_replica_that_dies_fails_its_samples(model: Model, settings: Settings, tmp_path: Path) -> None:
    system: Any = model.system(first_tokens=True)
    system._core.close()
    run(system, settings("Server", token_latencies=True), Mode.PERFORMANCE, tmp_path)
    assert len(system.failures) == len(system.finished) >= 12
    assert all(one.failed for one in system.finished)
    assert "closed" in str(system.failures[0])


class _Interrupt:
    """Presses Ctrl-C once many samples are under way, and notes how many were done."""

    def __init__(self, system: Any) -> None:
        self._system = system
        self.done = 0

    def __call__(self) -> None:
        if len(self._system._queries) > 300:
            self.done = len(self._system.finished)
            raise KeyboardInterrupt


def test_ctrl_c_gives_everything_up_and_loadgen_closes_its_logs(
    model: Model, settings: Settings, tmp_path: Path
) -> None:
    system = model.system(first_tokens=False)
    made = settings("Offline", token_latencies=True)
    made.min_query_count = 5000
    pressed = _Interrupt(system)
    with pytest.raises(RunInterruptedError, match=r"interrupted: \d+ samples were done") as raised:
        run(system, made, Mode.PERFORMANCE, tmp_path, look=pressed)
    assert raised.value.exit_code == 130
    assert sum(not one.failed for one in system.finished) < pressed.done + 150  # batches that were on their way
    assert "Result is : " in (tmp_path / "mlperf_log_summary.txt").read_text()
    assert not [thread for thread in threading.enumerate() if thread.name == "loadgen"]


def test_the_summary_has_the_vendors_lines(model: Model, settings: Settings, tmp_path: Path) -> None:
    summaries, lines = list[str](), list[str]()
    made = settings("Offline", min_duration_ms=0)
    made.infer_token_latencies, made.token_latency_scaling_factor = True, 69
    run_mode(
        benchmark("gpt-j-offline"),
        Mode.PERFORMANCE,
        tmp_path,
        model,
        len(PROMPTS),
        made,
        summary=summaries.append,
        progress=lines.append,
    )
    assert len(summaries) == 1
    assert lines == [f"gpt-j-offline, PerformanceOnly: {len(PROMPTS)} samples, logs in {tmp_path}"]
    lines = summaries[-1].splitlines()
    assert lines[:3] == ["=" * 48, "MLPerf Results Summary", "=" * 48]
    assert lines[3:6] == ["SUT name : GPT-J SUT", "Scenario : Offline", "Mode     : PerformanceOnly"]
    assert lines[6].startswith("Samples per second: ")
    assert lines[7].startswith("Tokens per second (inferred): ")
    assert lines[8] == "Result is : VALID"
    assert "Additional Stats" not in summaries[-1]
    assert (tmp_path / "mlperf_log_summary.txt").read_text().startswith(summaries[-1].rstrip())


def test_an_accuracy_run_leaves_its_scores(model: Model, settings: Settings, tmp_path: Path) -> None:
    summaries, lines = list[str](), list[str]()
    made = settings("Offline")
    run_mode(
        benchmark("llama-3.1-offline"),
        Mode.ACCURACY,
        tmp_path,
        model,
        len(PROMPTS),
        made,
        summary=summaries.append,
        progress=lines.append,
    )
    assert "Accuracy Results Summary" in summaries[-1]
    text = (tmp_path / "accuracy.txt").read_text()
    assert text.startswith("{'rouge1': ")
    assert f"'gen_num': {len(PROMPTS)}.0" in text


def test_completions_are_greedy_and_have_the_tokens_that_loadgen_needs(
    model: Model, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    system: Any = model.system(first_tokens=False)
    submit, seen = system._core.submit, list[SamplingParams]()

    def watched(name: str, prompt: Any, params: SamplingParams, sink: Any) -> Any:
        seen.append(params)
        return submit(name, prompt, params, sink)

    monkeypatch.setattr(system._core, "submit", watched)
    run(system, settings("Offline"), Mode.ACCURACY, tmp_path)
    assert {(one.temperature, one.min_tokens, one.max_tokens) for one in seen} == {(0.0, 2, MAX_OUTPUT_TOKENS)}
