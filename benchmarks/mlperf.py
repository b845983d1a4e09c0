"""`furiosa-mlperf` on this machine: `python -m benchmarks.mlperf` runs every scenario until LoadGen calls it VALID."""

from __future__ import annotations

import json
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import mlperf_loadgen
from rich.console import Console

from benchmarks.artifacts import FOLDER, artifact
from benchmarks.bars import Bar, show
from fixtures.packaged import sentence_encoder
from furiosa_llm import LLM, SamplingParams
from furiosa_llm.dataset import read_dataset
from furiosa_llm.mlperf.benchmarks import default_dataset
from furiosa_llm.mlperf.loadgen import Mode, run_test
from furiosa_llm.mlperf.sut import MIN_TOKENS, DecoderSystem

LOGS = Path("build/mlperf")
CONFIGURATIONS = Path("fixtures/mlperf")
_MAX_OUTPUT_TOKENS = 16
_ROUNDS = 5
_TOLERATED_MILLISECONDS = 1.0
_TOLERATED_RATIO = 1 / 0.97
_LOADGENS_LATENCIES = {
    "latency_ns": ("result_mean_latency_ns", "result_50.00_percentile_latency_ns"),
    "first_token_latency_ns": (
        "result_first_token_mean_latency_ns",
        "result_first_token_50.00_percentile_latency_ns",
    ),
}
"""Of each of our latencies LoadGen's own: the mean and the median."""


def bars() -> Iterator[Bar]:
    """The four scenarios, then the accuracy of both models, then what the harness costs."""
    decoder, encoder = artifact("int4", 4).folder, _encoder_artifact()
    tokens = ["--max-output-tokens", str(_MAX_OUTPUT_TOKENS)]
    for command in ("llama-3.1-offline", "llama-3.1-server"):
        yield from _valid(command, decoder, CONFIGURATIONS / "llama.conf", tokens)
    for command in ("bert-offline", "bert-server"):
        yield from _valid(command, encoder, CONFIGURATIONS / "bert.conf", [])
    yield _accuracy("llama-3.1-offline", decoder, tokens, "rougeL")
    yield _accuracy("bert-offline", encoder, [], "exact_match")
    yield _overhead(decoder)


def _encoder_artifact() -> Path:
    folder = FOLDER / "minilm-tp4"
    model = sentence_encoder() / "model.onnx"
    command = "import sys; from furiosa_llm.cli.main import main; main()"
    subprocess.run([sys.executable, "-c", command, "build", "--force", "-tp", "4", str(model), str(folder)], check=True)
    return folder


def _run(command: str, folder: Path, logs: Path, options: list[str]) -> str:
    program = "from furiosa_llm.mlperf.cli import main; main()"
    arguments = [sys.executable, "-c", program, command, *options, str(folder), str(logs)]
    return subprocess.run(arguments, check=True, stdout=subprocess.PIPE, text=True).stdout


def _valid(command: str, folder: Path, configuration: Path, options: list[str]) -> Iterator[Bar]:
    """Whether LoadGen calls the run VALID, and in Server how far its latencies are from the engine's own."""
    logs, started = LOGS / command, time.monotonic()
    summary = _run(command, folder, logs, ["--user-conf", str(configuration), *options])
    minutes = (time.monotonic() - started) / 60
    rates = re.findall(r"(?:Samples|Completed samples|Tokens|Completed tokens) per second *: *([\d.]+)", summary)
    verdict = "VALID" if "Result is : VALID" in summary else "INVALID"
    beside = f"{' samples/s, '.join(rates)} {'tokens' if len(rates) > 1 else 'samples'}/s, {minutes:.1f} min"
    yield Bar(what=f"{command}: {verdict}", figure=float(verdict != "VALID"), limit=0.0, beside=beside)
    if command.endswith("-server"):
        yield from _latencies(command, logs)


def _latencies(command: str, logs: Path) -> Iterator[Bar]:
    ours = json.loads((logs / "furiosa_latencies.json").read_text())
    lines = (logs / "mlperf_log_detail.txt").read_text().splitlines()
    theirs = {entry["key"]: entry["value"] for entry in (json.loads(line.partition(" ")[2]) for line in lines)}
    for name, (mean, median) in _LOADGENS_LATENCIES.items():
        for statistic, key in (("mean", mean), ("p50", median)):
            if ours[name]:
                own = ours[name][statistic]
                yield Bar(
                    what=f"{command}: LoadGen's {statistic} {name.removesuffix('_ns').replace('_', ' ')} over ours",
                    figure=abs(theirs[key] - own) / 1e6,
                    limit=_TOLERATED_MILLISECONDS,
                    unit=" ms",
                    beside=f"{theirs[key] / 1e6:.2f} ms, {own / 1e6:.2f} ms",
                )


def _accuracy(command: str, folder: Path, options: list[str], score: str) -> Bar:
    summary = _run(command, folder, LOGS / f"{command}-accuracy", ["--test-mode", "accuracy-only", *options])
    found = re.search(rf"^{score} : ([\d.]+)$", summary, flags=re.MULTILINE)
    assert found is not None, summary
    return Bar(what=f"{command}: {score}", figure=float(found[1]), limit=None, unit=" %")


def _overhead(folder: Path) -> Bar:
    """The same requests through LoadGen and through `LLM.generate`, alternated in one process."""
    samples = read_dataset(default_dataset("decoder"))
    params = SamplingParams(temperature=0.0, max_tokens=_MAX_OUTPUT_TOKENS, min_tokens=MIN_TOKENS, detokenize=False)
    ours: list[float] = []
    loadgens: list[float] = []
    with LLM.load_artifact(folder, enable_prefix_caching=False) as llm:
        prompts = [sample.token_ids(llm.tokenizer, None) for sample in samples]
        for _ in range(1 + _ROUNDS):  # the first one warms up
            started = time.perf_counter()
            llm.generate(prompt_token_ids=prompts, sampling_params=params)
            ours.append(len(prompts) / (time.perf_counter() - started))
            loadgens.append(_offline_rate(llm, prompts))
    generated, measured = statistics.median(ours[1:]), statistics.median(loadgens[1:])
    return Bar(
        what="llama-3.1-offline: LLM.generate's samples/s over LoadGen's",
        figure=generated / measured,
        limit=_TOLERATED_RATIO,
        unit="x",
        beside=f"{generated:.2f}/s, {measured:.2f}/s",
    )


def _offline_rate(llm: LLM, prompts: list[list[int]]) -> float:
    settings = mlperf_loadgen.TestSettings()
    settings.scenario = mlperf_loadgen.TestScenario.Offline
    settings.use_token_latencies = True
    settings.min_duration_ms, settings.min_query_count, settings.offline_expected_qps = 0, len(prompts), 1.0
    settings.sample_concatenate_permutation = True
    system = DecoderSystem(llm.core, prompts, max_output_tokens=_MAX_OUTPUT_TOKENS, first_tokens=False)
    with TemporaryDirectory() as logs:
        run_test(
            system,
            name="overhead",
            num_samples=len(prompts),
            settings=settings,
            mode=Mode.PERFORMANCE,
            folder=Path(logs),
        )
    assert len(system.finished) == len(prompts)
    return len(prompts) / ((max(one.done for one in system.finished) - system.finished[0].issued) / 1e9)


if __name__ == "__main__":
    sys.exit(0 if show(bars(), Console(width=180)) else 1)
