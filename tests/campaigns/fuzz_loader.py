"""The loader's fuzz: damaged models must be refused with an error of our own, or give what onnxruntime gives.

Over the models of the zoo, and a few with branches, loops and functions:

    python -m tests.campaigns.fuzz_loader --seconds 600

Every case follows from its seed. One that ends otherwise is shown with the command that repeats it, and the campaign
ends with status 1.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType

import numpy as np
import onnx
import onnxruntime as ort
from onnxruntime.capi import onnxruntime_pybind11_state as ort_errors

from furiosa_llm.builder import ArtifactBuilder, BuildError
from furiosa_llm.runtime.artifact.reader import Artifact, open_artifact
from furiosa_llm.runtime.execution.one_by_one import takes_chunks_singly
from tests.support.builder import branching
from tests.support.builder.mutants import mutant
from tests.support.builder.parity import Case, cases_of, feeds_of
from tests.support.builder.plans import without_accuracy_level
from tests.support.builder.stitching import SplitModel, session

ZOO = Path(__file__).resolve().parents[2] / "fixtures" / "zoo"
LIMIT = 20
"""Seconds that a case may take."""
TOLERANCE, HALF_TOLERANCE = 1e-3, 2e-2
"""Mutants magnify rounding: a scale of 1e30, a normalisation that is gone. The second is for float16."""
LARGEST = 1e15
"""Beyond this, what overflows depends on the order of sums and scales; damaged weights are that large."""
RUNS = 0.5
"""The share of the mutants that build which are run, if onnxruntime runs them."""
ORT_ERRORS = (
    ort_errors.EPFail, ort_errors.Fail, ort_errors.InvalidArgument, ort_errors.InvalidGraph, ort_errors.InvalidProtobuf,
    ort_errors.NotImplemented, ort_errors.RuntimeException, ValueError, KeyError,
)  # fmt: skip
"""What onnxruntime, and the code around it, says of a model that is wrong."""


class HangError(Exception):
    """A case took longer than LIMIT."""


@dataclasses.dataclass(frozen=True)
class Result:
    """How a case ended."""

    seed: int
    model: str
    mutation: str
    kind: str
    """The error's name, or `built`, `same` (run, and equal to the unsplit model), or a finding."""
    finding: str | None = None

    def __str__(self) -> str:
        command = f"python -m tests.campaigns.fuzz_loader --seed {self.seed}"
        return f"seed {self.seed}, {self.model}, {self.mutation}: {self.finding}\n    {command}"


def models() -> list[Path]:
    """The files to damage: small ones, so that a case takes well under a second."""
    return [path for path in sorted(ZOO.glob("*/*.onnx")) if path.stat().st_size < 2**20]


class Fuzzer:
    """Cases over some models, each copied once into `folder`."""

    def __init__(self, folder: Path, paths: Sequence[Path], extra: Mapping[str, onnx.ModelProto] | None = None) -> None:
        self._folder = folder
        self._files: dict[str, Path] = {}
        for path in paths:
            copy = folder / path.parent.name
            if not copy.exists():
                shutil.copytree(path.parent, copy)
            self._files[f"{path.parent.name}/{path.name}"] = copy / path.name
        for name, proto in (extra or {}).items():
            (folder / name).mkdir()
            self._files[name] = folder / name / "model.onnx"
            onnx.save(proto, self._files[name])

    def case(self, seed: int) -> Result:
        """Make and try the mutant of one seed."""
        rng = random.Random(seed)
        name = rng.choice(list(self._files))
        original = self._files[name]
        mutation, data = mutant(original.read_bytes(), rng)
        path = original.with_name("mutant.onnx")
        path.write_bytes(data)
        output = self._folder / "artifact"
        try:
            with time_limit():
                kind, finding = self._try(path, output, rng)
        except BuildError as error:
            kind, finding = type(error).__name__, _fault_of(str(error))
        except Exception:  # noqa: BLE001 - whatever else comes out is what is looked for
            kind, finding = "crash", traceback.format_exc(limit=-6).strip().replace("\n", "\n    ")
        shutil.rmtree(output, ignore_errors=True)
        return Result(seed, name, mutation, kind, finding)

    def _try(self, path: Path, output: Path, rng: random.Random) -> tuple[str, str | None]:
        ArtifactBuilder(path, tensor_parallel_size=4).build(output)
        artifact = open_artifact(output, full=True)
        if rng.random() >= RUNS:
            return "built", None
        try:
            proto = without_accuracy_level(onnx.load(path))
            reference = session(proto)
        except ORT_ERRORS:
            return "built, which onnxruntime does not load", None
        return _compare(proto, reference, artifact, rng)


def _fault_of(message: str) -> str | None:
    if "\n" in message or len(message) > 2000:
        return f"a message that is not one line of moderate length: {message[:3000]}"
    return None


def _compare(
    proto: onnx.ModelProto, reference: ort.InferenceSession, artifact: Artifact, rng: random.Random
) -> tuple[str, str | None]:
    """Run the unsplit model and, if it runs, the artifact, and compare."""
    case: Case = rng.choice(cases_of(proto))
    if takes_chunks_singly(artifact.program):  # and what is a chunk may have been damaged
        case = case.with_batch(1)
    try:
        feeds = feeds_of(artifact.manifest.inputs, case, artifact.manifest.model.vocab_size)
        wanted = {value.name for value in reference.get_inputs()}
        names = [value.name for value in reference.get_outputs()]
        results = reference.run(names, {name: array for name, array in feeds.items() if name in wanted})
    except ORT_ERRORS:
        return "built, which onnxruntime does not run", None
    if not all(np.isfinite(array.astype(np.float64)).all() for array in results):
        return "built, with outputs that are not finite", None
    if max(np.abs(array.astype(np.float64)).max(initial=0) for array in results) > LARGEST:
        return "built, with outputs whose squares overflow", None
    program = without_accuracy_level(artifact.program)
    split = SplitModel.of_artifact(dataclasses.replace(artifact, program=program))
    errors = split.greatest_error(split.run(split.session(), feeds), dict(zip(names, results, strict=True)))
    half = any(tensor.data_type == onnx.TensorProto.FLOAT16 for tensor in proto.graph.initializer)
    tolerance = HALF_TOLERANCE if half else TOLERANCE
    wrong = {name: error for name, error in errors.items() if not error <= tolerance}
    return ("wrong", f"{case.name}: relative errors {wrong}") if wrong else ("same", None)


@contextlib.contextmanager
def time_limit(seconds: int = LIMIT) -> Iterator[None]:
    """Raise HangError in the block once `seconds` have gone by."""

    def ring(_: int, __: FrameType | None) -> None:
        raise HangError(f"{seconds} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def campaign(fuzzer: Fuzzer, seconds: float, first_seed: int = 0) -> Iterator[Result]:
    """Cases for as long as there is time."""
    end, seed = time.monotonic() + seconds, first_seed
    while time.monotonic() < end:
        yield fuzzer.case(seed)
        seed += 1


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description="Damage models, build them, and look for anything but our own errors.")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--seed", type=int, help="this case only")
    arguments = parser.parse_args()
    ort.set_default_logger_severity(4)
    kinds, findings = collections.Counter[str](), 0
    with tempfile.TemporaryDirectory() as folder:
        fuzzer = Fuzzer(Path(folder), models(), branching.models())
        single = arguments.seed is not None
        results = (
            iter([fuzzer.case(arguments.seed)]) if single else campaign(fuzzer, arguments.seconds, arguments.first_seed)
        )
        for result in results:
            kinds[result.kind] += 1
            findings += result.finding is not None
            if result.finding is not None or single:
                sys.stdout.write(f"{result}\n")
                sys.stdout.flush()
    shown = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
    sys.stdout.write(f"{kinds.total()} cases: {shown}; {findings} findings\n")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
