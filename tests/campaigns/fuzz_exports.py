"""The export fuzz: decoders, their interfaces and graphs rewritten at random, built and compared with the originals.

    python -m tests.campaigns.fuzz_exports --count 2000

Every export follows from its seed. One that does not end as it should is shown, and the campaign ends with status 1:
if an export is wrong, crashes, is not proved or loses a state, or if more than one in a hundred is refused, or more
than two in a hundred have another price than the original.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import functools
import json
import random
import re
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort

from furiosa_llm import LLM, SamplingParams
from furiosa_llm.builder import ArtifactBuilder, BuildError
from furiosa_llm.builder.options import BuildOptions
from furiosa_llm.builder.pipeline import Analysed, analyse_model
from furiosa_llm.builder.plan.pricing import Price
from furiosa_llm.runtime.artifact.reader import Artifact, open_artifact
from furiosa_llm.runtime.errors import UnsupportedError
from furiosa_llm.runtime.execution.executor import Executor
from furiosa_llm.runtime.execution.one_by_one import is_chunk_of_many, takes_chunks_singly
from furiosa_llm.runtime.execution.ort import ORT_ERRORS
from tests.support import export_caches as caches
from tests.support import export_graphs as graphs
from tests.support import export_interfaces as interfaces
from tests.support.builder.parity import Case
from tests.support.builder.stitching import SplitModel, session
from tests.support.exports import BASES, Array, Arrays, Base, Export, Original

Rewrite = Callable[[Export, random.Random], bool]
REWRITES: tuple[Rewrite, ...] = (
    *(interfaces.names, interfaces.symbols, interfaces.order, interfaces.batch_size, interfaces.one_position),
    *(interfaces.all_sizes, interfaces.narrow_tokens, interfaces.time_first, interfaces.embeddings),
    *(interfaces.unread_input, interfaces.mask_type, interfaces.square_mask, interfaces.no_mask),
    *(interfaces.position_type, interfaces.position_rows, interfaces.position_vector, interfaces.no_positions),
    *(interfaces.last_scores, interfaces.turned_scores, caches.layout, caches.unit_dimension, caches.flat_heads),
    *(caches.half_type, caches.stacked, caches.joined, caches.written, graphs.constant_nodes),
    *(graphs.transposed_weights, graphs.products_as_einsum, graphs.products_as_gemm, graphs.idle_nodes),
    *(graphs.newer_opset, graphs.functions, graphs.listed_initializers, graphs.branches),
)
SIZES = (2, 4, 4, 4, 8)
"""Tensor parallel sizes."""
MOST = 6
"""How many rewrites are tried on an export, at most."""
PRICE = 0.1
"""By what share a plan may cost more or less than the original's."""
GENERATED = 0.05
"""The share of exports with which tokens are generated, too."""
PROMPTS = ((3, 17, 5, 60, 9), (1, 2), (9,))
SURE = 1e-3
"""Where outputs may differ by more, the likeliest of two close tokens may be the other one."""
FINE = ("same", "not generated")
_OPTION = re.compile(r"--(role|dim|fix)\b")
Steps = list[tuple[Case, Arrays, Arrays]]
"""Cases with the rewritten model's inputs and outputs."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """How an export ended."""

    seed: int
    export: str
    kind: str
    """One of FINE, or what is wrong with it."""
    found: str = ""

    def __str__(self) -> str:
        return f"seed {self.seed}, {self.export}: {self.kind}\n    {self.found}"


@functools.cache
def original(base: Base) -> Original:
    """The decoder of a base, with its numbers."""
    return Original(base)


@functools.cache
def _analysed(base: Base) -> Analysed:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        onnx.save(original(base).proto, path)
        return analyse_model(path, BuildOptions())


@functools.cache
def original_price(base: Base, size: int) -> tuple[Price, float]:
    """The price of the original's plan, and what a collective counts as."""
    plan = _analysed(base).lowered_for(BuildOptions(tensor_parallel_size=size)).plan
    return plan.price, plan.charge


def rewritten(base: Base, rewrites: Sequence[Rewrite], rng: random.Random) -> Export:
    """The decoder of a base after those rewrites that apply to it."""
    export = original(base).export()
    for rewrite in rewrites:
        if rewrite(export, rng):
            export.applied.append(rewrite.__name__)
    return export


def case(seed: int, folder: Path) -> Result:
    """Make, build and compare the export of a seed."""
    rng = random.Random(seed)
    base = rng.choices(BASES, [base.weight for base in BASES])[0]
    export = rewritten(base, rng.sample(REWRITES, rng.randint(1, MOST)), rng)
    size, generate = rng.choice(SIZES), rng.random() < GENERATED
    kind, found = tried(base, export, size, folder, generate=generate)
    return Result(seed=seed, export=f"{base.name} tp {size}, {', '.join(export.applied)}", kind=kind, found=found)


def tried(base: Base, export: Export, size: int, folder: Path, *, generate: bool = False) -> tuple[str, str]:
    """What becomes of an export: a word for it, and what was found."""
    proto, source = export.proto(), original(base)
    steps = [_translated(export, source, step) for step in export.cases()]
    try:
        different = _rewritten_wrongly(proto, steps, export.tolerance)
    except ORT_ERRORS as error:
        different = f"onnxruntime refuses it: {error}"
    if different:
        return "rewritten wrongly", different
    model, output = folder / "model.onnx", folder / "artifact"
    onnx.save(proto, model)
    shutil.rmtree(output, ignore_errors=True)
    try:
        builder = ArtifactBuilder(model, tensor_parallel_size=size, experimental_tp=True, fixed=export.fixed)
        report = builder.build(output)
        if report.faults:
            return "unproved", "; ".join(report.faults)
        kind, found = _compared(open_artifact(output), export, steps, original_price(base, size))
        return _generated(output, source, export) if generate and kind in FINE else (kind, found)
    except BuildError as error:
        helped = _OPTION.search(str(error)) is not None
        return "refused" if helped else "refused without a way out", f"{type(error).__name__}: {error}"
    except Exception:  # noqa: BLE001 - whatever else comes out is what is looked for
        return "crash", traceback.format_exc(limit=-6).strip().replace("\n", "\n    ")


def _translated(export: Export, source: Original, step: Case) -> tuple[Case, Arrays, Arrays]:
    feeds, outputs = source.step(step)
    return step, export.feeds(feeds, step), export.expected(feeds, outputs, step)


def _rewritten_wrongly(proto: onnx.ModelProto, steps: Steps, tolerance: float) -> str:
    """How the rewritten model differs from what it should be, in plain onnxruntime; empty if it does not."""
    model = session(proto)
    names = [value.name for value in model.get_outputs()]
    wanted = {value.name for value in model.get_inputs()}
    for step, feeds, expected in steps:
        found = dict(zip(names, model.run(names, {n: a for n, a in feeds.items() if n in wanted}), strict=True))
        errors = {name: _error(found[name], array) for name, array in expected.items()}
        if max(errors.values()) > tolerance:
            return f"{step.name}: {errors}"
    return ""


def _error(found: Array, expected: Array) -> float:
    if (found.shape, found.dtype) != (expected.shape, expected.dtype):
        return float("inf")
    scale = float(np.abs(expected.astype(np.float64)).max(initial=0.0)) or 1.0
    return float(np.abs(found.astype(np.float64) - expected.astype(np.float64)).max(initial=0.0)) / scale


def _compared(artifact: Artifact, export: Export, steps: Steps, price: tuple[Price, float]) -> tuple[str, str]:
    """Compare numbers, states and price."""
    running = _Running(artifact)
    names = {info.name for info in artifact.manifest.inputs}
    for step, feeds, expected in steps:
        errors = running.errors(step, {name: array for name, array in feeds.items() if name in names}, expected)
        wrong = {name: error for name, error in errors.items() if not error < export.tolerance}
        if wrong:
            return "wrong", f"{step.name}: {wrong}"
    pairs = {(state.input, state.output) for state in artifact.manifest.states}
    lost = [pair for cache in export.caches if (pair := (cache.past.name, cache.present.name)) not in pairs]
    if lost and export.steps:
        return "state lost", str(lost)
    was, charge = price
    found = json.loads((artifact.folder / "manifest.json").read_text())["plan"]["price"]
    cost, usual = found["nbytes"] + charge * found["collectives"], was.total(charge)
    dearer = cost > (1 + PRICE) * usual and not (export.dearer and found["collectives"] <= was.collectives)
    if dearer or (cost < (1 - PRICE) * usual and not export.cheaper):
        return "price", f"{found}, the original's {was.nbytes:.0f} and {was.collectives}: {cost / usual:.2f} times"
    return "same", ""


class _Running:
    """An artifact, run with all ranks in one graph, or by the executor where its kernels take sequences one by one."""

    def __init__(self, artifact: Artifact) -> None:
        self._artifact = artifact
        self._split = SplitModel.of_artifact(artifact)
        self._session = self._split.session()

    def errors(self, step: Case, feeds: Arrays, expected: Arrays) -> Mapping[str, float]:
        """The errors of all outputs in a step."""
        if not (takes_chunks_singly(self._artifact.program) and is_chunk_of_many(step.sizes)):
            return self._split.greatest_error(self._split.run(self._session, feeds), expected)
        with Executor(self._artifact, threads=1, exact=True) as executor:
            found = executor.run(feeds)
        return {name: _error(found[name], array) for name, array in expected.items()}


def _generated(artifact: Path, source: Original, export: Export) -> tuple[str, str]:
    """Compare the engine's tokens with the original's; it may refuse an export, with the reason."""
    try:
        llm = LLM(artifact)
    except UnsupportedError as error:
        return "not generated", str(error)
    with llm:
        params = SamplingParams(max_tokens=4, temperature=0, ignore_eos=True)
        outputs = llm.generate(prompt_token_ids=[list(prompt) for prompt in PROMPTS], sampling_params=params)
    found = [list(output.outputs[0].token_ids) for output in outputs]
    wanted = [source.greedy(prompt, 4) for prompt in PROMPTS]
    if found == wanted or export.tolerance > SURE:
        return "same", ""
    return "other tokens", f"{found}, expected {wanted}"


def campaign(count: int, first_seed: int = 0) -> Iterator[Result]:
    """The outcome of `count` exports."""
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(first_seed, first_seed + count):
            yield case(seed, Path(folder))


def passes(kinds: Mapping[str, int]) -> bool:
    """Whether a campaign with so many exports of each kind has met the bar."""
    count = sum(kinds.values())
    bars = {"refused": 0.01, "price": 0.02}
    other = sum(number for kind, number in kinds.items() if kind not in FINE and kind not in bars)
    return not other and all(kinds.get(kind, 0) <= share * count for kind, share in bars.items())


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description="Rewrite decoders at random, build them, compare with the originals.")
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--first-seed", type=int, default=0)
    arguments = parser.parse_args()
    ort.set_default_logger_severity(4)
    kinds, started = collections.Counter[str](), time.process_time()
    for result in campaign(arguments.count, arguments.first_seed):
        kinds[result.kind] += 1
        if result.kind not in FINE:
            sys.stdout.write(f"{result}\n")
            sys.stdout.flush()
    shown = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
    seconds = time.process_time() - started
    sys.stdout.write(f"{arguments.count} exports: {shown}; {seconds:.0f} s of processor time\n")
    return 0 if passes(kinds) else 1


if __name__ == "__main__":
    sys.exit(main())
