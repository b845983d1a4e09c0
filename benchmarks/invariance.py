"""What `batch_invariant` costs one request where this machine's kernels ask for a companion, alternated."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, closing
from functools import partial

from benchmarks.artifacts import artifact
from benchmarks.bars import Bar
from benchmarks.stepping import PAST, THREADS, Served, alternate, decode_milliseconds, ratio
from furiosa_llm.runtime.artifact.reader import open_artifact
from furiosa_llm.runtime.placement.stages import choose_stages
from furiosa_llm.runtime.runners.batch import NO_COMPANIONS, Companions
from furiosa_llm.runtime.runners.batch_invariance import probe_batch_invariance
from furiosa_llm.runtime.runners.local_runner import Host

_ROUNDS = 20
_LIMIT = 1.3
"""For one request of an int4 model."""


def bars() -> Iterator[Bar]:
    """A decode step of SmolLM2 with the companions that the probe asks for, and of a lone row with one anyway."""
    for name in ("genai-fp32", "int4"):
        built = artifact(name, 4)
        opened = open_artifact(built.folder, full=False)
        probed = probe_batch_invariance(opened)
        sides = {
            "plain": NO_COMPANIONS,
            "batch_invariant": probed.companions or NO_COMPANIONS,
            "a companion": Companions(lone=True),
        }
        with ExitStack() as stack:
            served: dict[str, Served] = {}
            for side, companions in sides.items():
                host = stack.enter_context(Host(opened, choose_stages(opened), threads=THREADS, companions=companions))
                served[side] = Served(stack.enter_context(closing(host.runner(slots_per_group=1))))
                served[side].prefill(PAST)
            times = alternate({side: partial(decode_milliseconds, one) for side, one in served.items()}, rounds=_ROUNDS)
        for side in ("batch_invariant", "a companion"):
            limit = _LIMIT if (name, side) == ("int4", "batch_invariant") else None
            what = f"{name}, tp 4, decoding one request: {side} / plain"
            yield ratio(what, times, side, "plain", limit=limit, beside=str(probed))
