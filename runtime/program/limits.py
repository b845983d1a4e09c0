"""How long work may take, and how much memory: what is plausible for a model's size, so that no program runs for ever.

Every figure is far above what an honest model takes on a slow machine. docs/limits.md has the table.
"""

from __future__ import annotations

from dataclasses import dataclass

from furiosa_llm.runtime.artifact.manifest import Manifest

STEP_SECONDS = 8.0
"""For any step; more for weights."""
LONGEST_STEP_SECONDS = 300.0
"""For any step of an engine, unless more is asked for."""
LONGEST_LOAD_SECONDS = 3600.0
"""For making a session of a model whose size is not looked at."""
LOAD_SECONDS = 7.0
"""For making the sessions of any model; more for weights and nodes."""
STEP_NBYTES = 3 * 2**28
"""What onnxruntime may allocate at once for any model's steps; more for weights and long sequences."""
FOLDED_NBYTES = 2**16
"""Of a value that onnxruntime computes while it loads, and keeps; more for weights, which it may transpose."""
_STEP_NBYTES_PER_SECOND = 2.5e8
"""Bytes of weights times tokens: half a per cent of what two cores do."""
_LOAD_NBYTES_PER_SECOND = 1e7
_LOAD_NODES_PER_SECOND = 1000
_SCORES_NBYTES = 256
"""For each pair of a new token and one before it: 64 heads in 32 bits; models of more have more weights."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkLimits:
    """What one session may take: seconds to be made, seconds of each run, and bytes that onnxruntime may allocate."""

    load_seconds: float
    step_seconds: float
    step_nbytes: int


def weight_nbytes(manifest: Manifest) -> int:
    """The bytes of all shards."""
    return sum(map(manifest.stored_nbytes, manifest.tensors))


def step_seconds(manifest: Manifest, tokens: int) -> float:
    """What a step of so many new tokens may take."""
    return STEP_SECONDS + weight_nbytes(manifest) * max(1, tokens) / _STEP_NBYTES_PER_SECOND


def load_seconds(manifest: Manifest, nodes: int) -> float:
    """What making the sessions of a program of so many nodes may take."""
    return LOAD_SECONDS + weight_nbytes(manifest) / _LOAD_NBYTES_PER_SECOND + nodes / _LOAD_NODES_PER_SECOND


def folded_nbytes(manifest: Manifest) -> int:
    """What onnxruntime may keep of one value that it computes while it loads: a weight, in elements of 32 bits."""
    return max([FOLDED_NBYTES, *(4 * tensor.local_nbytes for tensor in manifest.tensors)])


def step_nbytes(manifest: Manifest, *, tokens: int = 256, length: int = 2048) -> int:
    """What onnxruntime may allocate for steps of so many new tokens, at most, in sequences of a `length`."""
    return STEP_NBYTES + 4 * weight_nbytes(manifest) + _SCORES_NBYTES * tokens * length


def whole_limits(manifest: Manifest, *, nodes: int, tokens: int, length: int, ranks: int = 1) -> WorkLimits:
    """Of one session that runs the whole model, as so many ranks have it: `nodes` of each, steps of so many tokens."""
    return WorkLimits(
        load_seconds=ranks * load_seconds(manifest, nodes),
        step_seconds=ranks * step_seconds(manifest, tokens),
        step_nbytes=ranks * step_nbytes(manifest, tokens=tokens, length=length),
    )
