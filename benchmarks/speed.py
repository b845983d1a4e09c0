"""Decode and prefill against plain onnxruntime on the same cores, alternated in one process."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np

from benchmarks.artifacts import SYNTHETIC, artifact
from benchmarks.bars import Bar
from furiosa_llm.runtime.artifact.reader import open_artifact
from furiosa_llm.runtime.decoder import DecoderSession
from furiosa_llm.runtime.executor import Executor
from furiosa_llm.runtime.reference import ReferenceModel

PAST = 128
ROUNDS = 20
_STEPS_PER_ROUND = 8
_THREADS = 2

LIMITS: dict[tuple[str, int], tuple[float | None, float | None]] = {
    ("genai-fp32", 4): (1.3, 1.25),
    ("genai-fp32", 8): (1.55, 1.45),
    ("optimum-fp32", 4): (None, None),
    ("optimum-fp32", 8): (None, None),
    (SYNTHETIC, 4): (1.25, 1.15),
    (SYNTHETIC, 8): (1.3, 1.2),
    ("int4", 4): (None, None),
    ("int4", 8): (None, None),
}
"""Model and tensor parallel size -> the greatest ratio for a decode step and for a prefill of 128 tokens."""


def bars() -> Iterator[Bar]:
    """Two ratios for every model and size."""
    for (name, size), (decode_limit, prefill_limit) in LIMITS.items():
        built = artifact(name, size)
        manifest = open_artifact(built.folder, full=False).manifest
        weights = sum(f.nbytes for f in manifest.files if f.path.startswith("weights-"))
        padded = weights / sum(f.stat().st_size for f in built.model.parent.glob("model.onnx*"))
        with _sessions(name, size) as (ours, theirs):
            for what, measure, limit in (
                (f"decode step, past {PAST}", _decode, decode_limit),
                (f"prefill of {PAST}", _prefill, prefill_limit),
            ):
                yield _ratio(f"{name} tp {size}: {what} / plain onnxruntime", measure, ours, theirs, limit, padded)


@contextmanager
def _sessions(name: str, size: int) -> Iterator[tuple[DecoderSession, DecoderSession]]:
    built = artifact(name, size)
    opened = open_artifact(built.folder, full=False)
    manifest = opened.manifest
    reference = ReferenceModel(
        built.model, inputs=manifest.inputs, outputs=manifest.outputs, states=manifest.states, threads=_THREADS
    )
    with Executor(opened, threads=_THREADS) as executor:
        pair = DecoderSession(executor), DecoderSession(reference)
        for session in pair:
            session.reserve(2 * PAST)
            _prefill(session)
        yield pair


def _ratio(
    what: str,
    measure: Callable[[DecoderSession], float],
    ours: DecoderSession,
    theirs: DecoderSession,
    limit: float | None,
    padded: float,
) -> Bar:
    """The median over rounds of the ratio within a round; who goes first changes from round to round."""
    times: dict[DecoderSession, list[float]] = {ours: [], theirs: []}
    for number in range(ROUNDS):
        for session in (ours, theirs) if number % 2 else (theirs, ours):
            times[session].append(measure(session))
    ratios = [a / b for a, b in zip(times[ours], times[theirs], strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4)
    medians = f"{statistics.median(times[ours]):.1f} ms / {statistics.median(times[theirs]):.1f} ms"
    beside = f"{medians}, quartiles {low:.2f} to {high:.2f}, stored weights {padded:.2f}x"
    return Bar(what=what, figure=statistics.median(ratios), limit=limit, unit="x", beside=beside)


def _decode(session: DecoderSession) -> float:
    """Milliseconds of one decode step behind `PAST` tokens."""
    _prefill(session)
    token = np.array([[1]], dtype=np.int64)
    session.step(token)
    started = time.perf_counter()
    for _ in range(_STEPS_PER_ROUND):
        session.step(token)
    return (time.perf_counter() - started) / _STEPS_PER_ROUND * 1e3


def _prefill(session: DecoderSession) -> float:
    """Milliseconds of a prefill of `PAST` tokens."""
    tokens = np.arange(1, PAST + 1, dtype=np.int64)[None, :]
    session.reset()
    started = time.perf_counter()
    session.step(tokens)
    return (time.perf_counter() - started) * 1e3
