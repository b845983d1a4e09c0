"""Attention fused against attention as exported, on SmolLM2 in Optimum's shape."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path

import numpy as np
import onnx_ir as ir

from benchmarks.artifacts import FOLDER, model, run_measured
from benchmarks.bars import Bar
from furiosa_llm.builder.rewrite.normalize import normalize
from furiosa_llm.builder.rewrite.passes import rewrite
from furiosa_llm.builder.source import companions
from furiosa_llm.builder.source.load import load
from furiosa_llm.runtime.artifact.reader import open_artifact
from furiosa_llm.runtime.execution.decoder import DecoderSession
from furiosa_llm.runtime.execution.executor import Executor
from furiosa_llm.runtime.verification.reference import ReferenceModel

MODEL = "optimum-fp32"
CONTEXTS = (128, 2048)
PREFILLS = (128, 512)
ROUNDS = 12
_STEPS_PER_ROUND = 6
_THREADS = 2
_CHUNK = 128
_LIMITS: dict[tuple[str, int], float] = {("decode", 2048): 1 / 1.3}
"""The greatest ratio of fused to unfused, on plain onnxruntime; the others are reported only."""

Times = dict[str, list[float]]


def bars() -> Iterator[Bar]:
    """Fused to unfused for decode and prefill on plain onnxruntime, then artifacts to the model as exported."""
    with _plain() as sessions:
        for context in CONTEXTS:
            yield _ratio("decode", context, _alternate(sessions, context, _decode), "fused", "unfused")
        for tokens in PREFILLS:
            times = _alternate(sessions, tokens, _prefill, ROUNDS // 2)
            yield _ratio("prefill", tokens, times, "fused", "unfused")
    for size in (4, 8):
        with _split(size) as sessions:
            for context in CONTEXTS:
                times = _alternate(sessions, context, _decode)
                for name in (f"tp {size} unfused", f"tp {size} fused"):
                    yield _ratio("decode", context, times, name, "plain")


def _ratio(what: str, context: int, times: Times, ours: str, theirs: str) -> Bar:
    ratios = [a / b for a, b in zip(times[ours], times[theirs], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    medians = f"{statistics.median(times[ours]):.1f} ms / {statistics.median(times[theirs]):.1f} ms"
    limit = _LIMITS.get((what, context)) if theirs == "unfused" else None
    beside = f"{medians}, quartiles {low:.2f} to {high:.2f}"
    return Bar(
        what=f"{what}, context {context}: {ours} / {theirs}", figure=middle, limit=limit, unit="x", beside=beside
    )


def _alternate(
    sessions: Mapping[str, DecoderSession],
    context: int,
    measure: Callable[[DecoderSession, int], float],
    rounds: int = ROUNDS,
) -> Times:
    """Milliseconds of each session in each round; who goes first changes from round to round."""
    times: Times = {name: [] for name in sessions}
    for session in sessions.values():
        session.reset()
        for start in range(0, context, _CHUNK):
            session.step(np.arange(start, min(start + _CHUNK, context), dtype=np.int64)[None, :])
    for number in range(rounds):
        for name in sorted(sessions, reverse=number % 2 == 1):
            times[name].append(measure(sessions[name], context))
    return times


def _decode(session: DecoderSession, _: int) -> float:
    """Milliseconds of a decode step; each call makes the context a little longer."""
    token = np.array([[1]], dtype=np.int64)
    session.step(token)
    started = time.perf_counter()
    for _ in range(_STEPS_PER_ROUND):
        session.step(token)
    return (time.perf_counter() - started) / _STEPS_PER_ROUND * 1e3


def _prefill(session: DecoderSession, context: int) -> float:
    """Milliseconds of a prefill of `context` tokens."""
    session.reset()
    started = time.perf_counter()
    session.step(np.arange(1, context + 1, dtype=np.int64)[None, :])
    return (time.perf_counter() - started) * 1e3


@contextmanager
def _plain() -> Iterator[dict[str, DecoderSession]]:
    """The model as exported, and as its graph is after fusion, each in one session."""
    yield {"unfused": _session(_reference(model(MODEL))), "fused": _session(_reference(_fused_model()))}


@contextmanager
def _split(size: int) -> Iterator[dict[str, DecoderSession]]:
    """The artifacts with and without fusion, and the model as exported."""
    with ExitStack() as stack:
        sessions = {"plain": _session(_reference(model(MODEL)))}
        for name, fuse in (("fused", True), ("unfused", False)):
            executor = stack.enter_context(
                Executor(open_artifact(_artifact(size, fuse=fuse), full=False), threads=_THREADS)
            )
            sessions[f"tp {size} {name}"] = _session(executor)
        yield sessions


def _session(decoder: ReferenceModel | Executor) -> DecoderSession:
    session = DecoderSession(decoder)
    session.reserve(max(CONTEXTS) + 4 * ROUNDS * _STEPS_PER_ROUND)
    return session


def _reference(path: Path) -> ReferenceModel:
    manifest = open_artifact(_artifact(4, fuse=True), full=False).manifest
    return ReferenceModel(
        path, inputs=manifest.inputs, outputs=manifest.outputs, states=manifest.states, threads=_THREADS
    )


@cache
def _artifact(size: int, *, fuse: bool) -> Path:
    """An artifact of the model, built by the command line."""
    folder = FOLDER / f"{MODEL}-tp{size}-{'fused' if fuse else 'unfused'}"
    option = "--fuse-attention" if fuse else "--no-fuse-attention"
    arguments = ["build", "--force", "-tp", str(size), option, str(model(MODEL)), str(folder)]
    run_measured([sys.executable, "-c", "from furiosa_llm.cli.main import main; main()", *arguments])
    return folder


@cache
def _fused_model() -> Path:
    """The model after the passes that a build runs in front of the split."""
    source = load(model(MODEL))
    fused = normalize(source)
    rewrite(fused, {}, companions.read_json(source.path, "config.json"), fuse=True)
    folder = FOLDER / f"{MODEL}-fused"
    folder.mkdir(parents=True, exist_ok=True)
    ir.save(fused, folder / "model.onnx", external_data="model.onnx.data")
    return folder / "model.onnx"
