"""The reader's fuzz: damaged artifacts must be refused with an error of our own, or be sound whatever was altered.

    python -m tests.campaigns.fuzz_artifact --seconds 180

Every case follows from its seed, and runs in a process with little memory and little time. A case that loads is

* `same`: what the reader gives is what it gave before, but for the fields in FREE, which nothing computed depends on;
* `another`: the damage had its digests corrected, and made another artifact, sound in itself: all windows lie in their
  files and apart, and counted by brute force every index of every original is stored once. Whether it is the right one,
  only its digest tells, which is another.

Anything else is a finding: another exception, no end, no memory, an artifact that loads under the digest of the one it
was but differs from it, or one that stores an index twice or never. A finding is shown with the command that repeats
it, and the campaign ends with status 1.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import itertools
import json
import math
import multiprocessing
import random
import resource
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np

from furiosa_llm.runtime.artifact.dtypes import DTYPES
from furiosa_llm.runtime.artifact.errors import FuriosaLLMError
from furiosa_llm.runtime.artifact.layout import Leaf, Mesh, global_size, index_map
from furiosa_llm.runtime.artifact.manifest import Manifest, OriginalInitializer
from furiosa_llm.runtime.artifact.reader import Artifact, open_artifact
from tests.support.artifacts import artifact_of
from tests.support.runtime.artifact_damage import DAMAGES
from tests.support.runtime.models import LlamaSize, llama, mlp

LIMIT = 10
"""Seconds that a case may take."""
MEMORY = 2**30
"""Bytes that a case may take, beyond what the process has when it begins."""
FREE: Mapping[str, object] = {"provenance": None, "model": None, "plan": {}, "blocks": (), "files": ()}
"""Fields of the manifest without which the program is the same, for the comparison."""


@dataclasses.dataclass(frozen=True)
class Result:
    """How a case ended; `kind` is an error's name, `same`, `another`, or what was found."""

    seed: int
    damage: str
    kind: str
    finding: str | None = None

    def __str__(self) -> str:
        command = f"python -m tests.campaigns.fuzz_artifact --case {self.seed}"
        return f"seed {self.seed}, {self.damage}: {self.finding}\n    {command}"


def small(folder: Path) -> object:
    """A program with matrices split in one dimension and in two, and one that is whole."""
    rng = np.random.default_rng(0)
    program = mlp(Mesh((2, 2)))
    program.weight("unused", rng.standard_normal((6, 10), dtype=np.float32), Leaf(6, (1,)), Leaf(10, (0,)))
    program.weight("table", rng.standard_normal((300, 2), dtype=np.float32))
    return program.write(folder)


def built(name: str) -> Callable[[Path], object]:
    """A model of the zoo over 4 PEs."""
    return lambda folder: shutil.copytree(artifact_of(name), folder)


MODELS: Mapping[str, Callable[[Path], object]] = {
    "small": small,
    "decoder": lambda folder: llama(Mesh((2, 2)), LlamaSize(layers=1, vocab=32, max_length=8)).write(folder),
    "parts": built("tiny-llama-genai-fp16-cuda"),
    "int4": built("tiny-llama-genai-int4-qdq"),
}
"""What is damaged. The last two have weights in parts, and packed INT4 in short blocks."""
SHARES = (4, 3, 1, 1)
"""How often each is; a case over the last two takes some ten times as long."""


class Fuzzer:
    """Cases over small artifacts, written once into `folder`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._whole: dict[str, Artifact] = {}
        for name, make in MODELS.items():
            if not (folder / name).exists():
                make(folder / name)
            self._whole[name] = open_artifact(folder / name, full=True)

    def case(self, seed: int) -> Result:
        """Damage an artifact as the seed says, and open it."""
        rng = random.Random(seed)
        name = rng.choices(list(self._whole), SHARES)[0]
        copy = self._folder / "case"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(self._folder / name, copy)
        damage = rng.choice(DAMAGES)
        shown = f"{name}, {damage(copy, rng)}"
        try:
            kind, finding = _judge(self._whole[name], open_artifact(copy, full=True))
        except FuriosaLLMError as error:
            kind, finding = type(error).__name__, _fault_of(str(error))
        except Exception:  # noqa: BLE001 - whatever else comes out is what is looked for
            kind, finding = "crash", traceback.format_exc(limit=-6).strip().replace("\n", "\n    ")
        return Result(seed, shown, kind, finding)


def _fault_of(message: str) -> str | None:
    if "\n" in message or len(message) > 2000:
        return f"a message that is not one line of moderate length: {message[:3000]}"
    return None


def _judge(whole: Artifact, found: Artifact) -> tuple[str, str | None]:
    same = _essence(whole) == _essence(found)
    if found.digest == whole.digest:
        # The weights were compared with their digests.
        return ("same", None) if same else ("wrong", "the same digest, and something else behind it")
    fault = unsound(found)
    if fault is not None:
        return "unsound", fault
    return ("same" if same else "another"), None


def _essence(artifact: Artifact) -> tuple[Manifest, bytes, Mapping[str, int]]:
    """All that the runtime makes use of."""
    program = artifact.program.SerializeToString(deterministic=True)
    return dataclasses.replace(artifact.manifest, **FREE), program, artifact.offsets  # type: ignore[arg-type]


def unsound(artifact: Artifact) -> str | None:
    """What is wrong with the stored tensors, found without trusting the reader's reasons: None if nothing is."""
    ends: dict[str, int] = {}
    for tensor in sorted(artifact.tensors.values(), key=lambda tensor: artifact.offsets[tensor.name]):
        begin = artifact.offsets[tensor.name]
        if begin < ends.get(tensor.file, 8):
            return f"{tensor.name} lies over another tensor"
        count = artifact.manifest.mesh.parts(tensor.shard_axes)
        ends[tensor.file] = begin + count * DTYPES[tensor.dtype].nbytes(tensor.local_shape)
        if ends[tensor.file] > (artifact.folder / tensor.file).stat().st_size:
            return f"{tensor.name} lies beyond the end of its file"
    for original in artifact.manifest.initializers:
        if original.stored:
            counts = _times_stored(artifact, original)
            if (counts != 1).any():
                return f"{original.name} has indices that are stored {counts.min()} to {counts.max()} times"
    return None


def _times_stored(artifact: Artifact, original: OriginalInitializer) -> np.ndarray[tuple[int, ...], np.dtype[np.int64]]:
    """How often each index of an original is stored, counted index by index."""
    counts = np.zeros(original.shape, dtype=np.int64)
    mesh = artifact.manifest.mesh
    for name in original.stored:
        tensor = artifact.tensors[name]
        assert tensor.layout is not None
        ranks = {mesh.position(rank, tensor.shard_axes): rank for rank in range(mesh.size)}
        sizes = [global_size(dim) for dim in tensor.layout]
        part = np.zeros(sizes, dtype=np.int64)
        for rank in ranks.values():
            maps = [index_map(dim, mesh, rank) for dim in tensor.layout]
            part[np.ix_(*(indices[indices >= 0] for indices in maps))] += 1
        place = [slice(None)] * len(sizes)
        if tensor.part is not None:
            place[tensor.part.dim] = slice(tensor.part.start, tensor.part.stop)
        counts[tuple(place)] += part
    return counts


def _work(connection: Connection, folder: Path, first_seed: int) -> None:
    """Run cases until the process is ended, telling which one begins and how each ends."""
    fuzzer = Fuzzer(folder)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    seed = first_seed
    while True:
        connection.send(fuzzer.case(seed))
        seed += 1


def campaign(seconds: float, first_seed: int = 0) -> Iterator[Result]:
    """Cases for as long as there is time, each in a process that is replaced if a case ends it or does not end."""
    seed = first_seed
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        Fuzzer(Path(folder))  # which writes the artifacts, once for all processes
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            receiver, sender = context.Pipe(duplex=False)
            worker = context.Process(target=_work, args=(sender, Path(folder), seed), daemon=True)
            worker.start()
            sender.close()
            try:
                while time.monotonic() < end:
                    if not receiver.poll(LIMIT):
                        yield Result(seed, "some damage", "hang", f"no end within {LIMIT} s")
                        seed += 1
                        break
                    yield receiver.recv()
                    seed += 1
            except EOFError:
                worker.join()
                yield Result(seed, "some damage", "death", f"the process ended with {worker.exitcode}")
                seed += 1
            finally:
                worker.kill()
                worker.join()


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description="Damage artifacts, open them, and look for anything but refusal.")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0, help="the first one")
    parser.add_argument("--cases", type=int, help="end after so many, however long they take")
    parser.add_argument("--case", type=int, help="this case only")
    arguments = parser.parse_args()
    kinds, findings = collections.Counter[str](), 0
    if arguments.case is not None:
        with tempfile.TemporaryDirectory() as folder:
            result = Fuzzer(Path(folder)).case(arguments.case)
        sys.stdout.write(f"{json.dumps(dataclasses.asdict(result), indent=1)}\n")
        return 1 if result.finding else 0
    seconds = arguments.seconds if arguments.cases is None else math.inf
    for result in itertools.islice(campaign(seconds, arguments.seed), arguments.cases):
        kinds[result.kind] += 1
        findings += result.finding is not None
        if result.finding is not None:
            sys.stdout.write(f"{result}\n")
            sys.stdout.flush()
    shown = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
    sys.stdout.write(f"{kinds.total()} cases: {shown}; {findings} findings\n")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
