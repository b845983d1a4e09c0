"""A run as a trace that Perfetto and chrome://tracing open: a process for each replica, a thread for each stage."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from furiosa_llm.bench.load import Record
from furiosa_llm.simulate.clock import Run, Span

_MICROSECONDS = 1e6
_NAMED = 8
"""Sequences of a batch that are listed."""


def chrome_trace(run: Run) -> dict[str, Any]:
    """The document; times are in microseconds."""
    stages = sorted({(span.replica, span.stage) for span in run.spans})
    names = [_name("process_name", replica, 0, f"replica {replica}") for replica in sorted({r for r, _ in stages})]
    names += [_name("thread_name", replica, stage, f"stage {stage}") for replica, stage in stages]
    return {
        "displayTimeUnit": "ms",
        "traceEvents": [*names, *map(_event, run.spans), *_waiting(run.observed.records)],
    }


def _name(kind: str, replica: int, stage: int, name: str) -> dict[str, Any]:
    return {"ph": "M", "name": kind, "pid": replica, "tid": stage, "args": {"name": name}}


def _event(span: Span) -> dict[str, Any]:
    sequences = ", ".join(map(str, span.sequences[:_NAMED])) + ", ..." * (len(span.sequences) > _NAMED)
    return {
        "ph": "X",
        "name": f"{span.kind} {span.tokens}",
        "cat": span.kind,
        "pid": span.replica,
        "tid": span.stage,
        "ts": round(span.begin * _MICROSECONDS, 3),
        "dur": round((span.end - span.begin) * _MICROSECONDS, 3),
        "args": {"tokens": span.tokens, "requests": sequences},
    }


def _waiting(records: Sequence[Record]) -> list[dict[str, Any]]:
    """The number of requests under way, wherever it changes."""
    changes = [(record.due, 1) for record in records]
    changes += [(record.ended, -1) for record in records if record.ended is not None]
    count, found = 0, []
    for at, change in sorted(changes):
        count += change
        found.append(
            {"ph": "C", "name": "requests", "pid": 0, "ts": round(at * _MICROSECONDS, 3), "args": {"under way": count}}
        )
    return found
