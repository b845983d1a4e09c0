"""What planning takes: full-size graphs in processes of their own, and time against the number of layers."""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from benchmarks.artifacts import run_measured
from benchmarks.bars import Bar
from furiosa_llm.example.llama.config import LlamaConfig
from furiosa_llm.example.llama.genai import write_genai_graph
from furiosa_llm.example.llama.onnx_writer import write_model_files
from furiosa_llm.example.llama.optimum import write_optimum_graph
from furiosa_llm.example.llama.projection import DenseProjection
from furiosa_llm.example.llama.weights import RandomWeights

GRAPHS = Path("fixtures/graphs")
PLOT = Path("docs/planning-time.png")
LAYERS = (2, 4, 8, 16, 32, 64, 128)
_ROUNDS = 3
_PLAN = "import sys; from furiosa_llm.cli.main import main; main()"
_FULL_SIZE = (
    ("llama-3.1-405b-genai-bf16-cuda", "8", 3.0),
    ("llama-3.1-70b-dynamo-op21-bf16", "8", 6.0),
    ("smollm2-135m-optimum-fp32", "4,8", 6.0),
)
"""Graph, sizes, and seconds that it may take."""

Times = dict[int, tuple[int, float]]
"""Layers -> nodes, seconds."""


def bars() -> Iterator[Bar]:
    """Seconds and memory of `furiosa-llm plan` from a cold start, and how its time grows with the nodes."""
    for name, sizes, limit in _FULL_SIZE:
        command = [sys.executable, "-c", _PLAN, "plan", str(GRAPHS / name / "model.onnx"), "-tp", sizes, "--json"]
        runs = [run_measured(command) for _ in range(_ROUNDS)]
        seconds = [run.seconds for run in runs]
        what = f"plan of {name}, tp {sizes}"
        beside = f"{_ROUNDS} processes, {min(seconds):.2f} to {max(seconds):.2f}"
        yield Bar(what=what, figure=statistics.median(seconds), limit=limit, unit=" s", beside=beside)
        peak = max(run.peak_rss_nbytes for run in runs) / 1e6
        yield Bar(what=f"{what}: peak memory", figure=peak, limit=500, unit=" MB")
    series = {shape: _times(shape) for shape in ("genai", "Optimum")}
    for shape, times in series.items():
        nodes, times_taken = zip(*times.values(), strict=True)
        exponent = float(np.polyfit(np.log(nodes), np.log(times_taken), 1)[0])
        last = float(np.log(times_taken[-1] / times_taken[-2]) / np.log(nodes[-1] / nodes[-2]))
        ends = f"{nodes[0]} nodes {times_taken[0]:.2f} s, {nodes[-1]} nodes {times_taken[-1]:.2f} s"
        beside = f"{ends}; {last:.2f} between the last two"
        what = f"planning time against nodes, {LAYERS[0]} to {LAYERS[-1]} layers, {shape}'s shape: exponent"
        yield Bar(what=what, figure=max(exponent, last), limit=1.1, beside=beside)
    _plot(series)


def _times(shape: str) -> Times:
    """Seconds to plan small decoders of some depths at tp 4 and 8 from a cold start, the least of some rounds."""
    found: Times = {}
    with tempfile.TemporaryDirectory() as folder:
        for layers in LAYERS:
            model = _write(Path(folder) / f"{shape}-{layers}", shape, layers)
            runs = [run_measured([sys.executable, "-c", _PLAN, "plan", str(model), "--json"]) for _ in range(_ROUNDS)]
            found[layers] = (json.loads(runs[0].output)["num_nodes"], min(run.seconds for run in runs))
    return found


def _write(folder: Path, shape: str, layers: int) -> Path:
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=64,
        rms_norm_eps=1e-5,
        rope_theta=1e4,
        tie_word_embeddings=False,
    )
    weights = RandomWeights(config, seed=0)
    folder.mkdir()
    if shape == "genai":
        write_model_files(folder, lambda writer: write_genai_graph(writer, weights, DenseProjection(weights)))
    else:
        write_model_files(folder, lambda writer: write_optimum_graph(writer, weights))
    return folder / "model.onnx"


def _plot(series: dict[str, Times]) -> None:
    """Time against nodes, both on logarithmic axes, with a line of exponent 1."""
    import matplotlib as mpl  # slow to import, and wanted here alone

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    for shape, times in series.items():
        nodes, seconds = zip(*times.values(), strict=True)
        axes.loglog(nodes, seconds, marker="o", label=f"{shape}'s shape")
        for count, (n, s) in times.items():
            axes.annotate(str(count), (n, s), textcoords="offset points", xytext=(4, -11), fontsize=8)
    nodes, seconds = zip(*series["Optimum"].values(), strict=True)
    line = [seconds[-1] * n / nodes[-1] for n in nodes]
    axes.loglog(nodes, line, linestyle=":", color="grey", label="exponent 1")
    axes.set(xlabel="nodes (at each point: layers)", ylabel="seconds", title="Planning for tp 4 and 8")
    axes.legend()
    figure.savefig(PLOT, dpi=110, metadata={"Software": None})
    pyplot.close(figure)
