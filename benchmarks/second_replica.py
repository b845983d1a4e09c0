"""What a second replica on the same card takes: `python -m benchmarks.second_replica ARTIFACT` measures one process."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.artifacts import artifact, run_measured
from benchmarks.bars import Bar
from benchmarks.stepping import PAST, THREADS, Served
from furiosa_llm.runtime.artifact.dimensions import shape_of
from furiosa_llm.runtime.artifact.manifest import Manifest
from furiosa_llm.runtime.artifact.reader import open_artifact
from furiosa_llm.runtime.execution.decoder import interface_of
from furiosa_llm.runtime.execution.memory import array_nbytes
from furiosa_llm.runtime.execution.states import grown_capacity
from furiosa_llm.runtime.placement.stages import choose_stages
from furiosa_llm.runtime.runners.local_runner import Host

_LIMIT = 0.02


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Bytes: resident before and after the second replica has run, of its KV cache, and of the weights on disk."""

    before: int
    after: int
    kv: int
    weights: int


def bars(name: str, size: int) -> Iterator[Bar]:
    """Its memory beside its KV cache, as a share of the weights."""
    command = [sys.executable, "-m", "benchmarks.second_replica", str(artifact(name, size).folder)]
    found = Memory(**json.loads(run_measured(command).output))
    besides = found.after - found.before - found.kv
    beside = (
        f"{besides / 1e6:.1f} MB of {found.weights / 1e6:.0f} MB; resident {found.before / 1e6:.0f} MB, "
        f"then {found.after / 1e6:.0f} MB, of which {found.kv / 1e6:.1f} MB KV"
    )
    what = f"{name} tp {size}: memory of a second replica beside its KV / weights"
    yield Bar(what=what, figure=besides / found.weights, limit=_LIMIT, beside=beside)


def measure(folder: Path) -> Memory:
    """Loads the artifact in `folder`, and has two replicas run the same one after the other."""
    opened = open_artifact(folder, full=False)
    manifest = opened.manifest
    with Host(opened, choose_stages(opened), threads=THREADS) as host:
        resident = []
        for _ in range(2):
            served = Served(host.runner(slots_per_group=1), logits="last")
            served.prefill(PAST)
            for _ in range(PAST, capacity()):
                served.decode()
            resident.append(_resident_nbytes())
    return Memory(
        before=resident[0],
        after=resident[1],
        kv=kv_nbytes(manifest),
        weights=sum(entry.nbytes for entry in manifest.files if entry.path.startswith("weights-")),
    )


def capacity() -> int:
    """The positions of a slot once a prefill of `PAST` tokens has been in it; all are used, so that all take memory."""
    return grown_capacity(PAST, 0)


def kv_nbytes(manifest: Manifest) -> int:
    """Of the KV of one slot on all PEs."""
    interface = interface_of(manifest)
    dtypes = {info.name: info.dtype for info in interface.inputs}
    nbytes = 0
    for state in interface.states:
        shape = list(shape_of(interface.state_shapes[state.input], {"batch": 1, "past": 0, "total": 0}))
        shape[state.grown_dim] = capacity()
        nbytes += array_nbytes(dtypes[state.input], tuple(shape)) * interface.ranks
    return nbytes


def _resident_nbytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
    sys.stdout.write(json.dumps(asdict(measure(Path(sys.argv[1])))))
