"""Compares an artifact with the unsplit model: outputs and states at many lengths, an engine's steps, greedy tokens.

The program is run in three ways: all ranks stitched into one onnxruntime graph, by the executor, and by an engine,
whose mistakes the first cannot share. All sides compute MatMulNBits at accuracy level 0, because level 4 rounds
activations to 8 bits, and a rounding that falls the other way is no error of the split.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Generic, TypeVar

import numpy as np
from onnx import ModelProto

from furiosa_llm.runtime.artifact.compute import computing
from furiosa_llm.runtime.artifact.dtypes import Array
from furiosa_llm.runtime.artifact.errors import ArtifactError, FuriosaLLMError
from furiosa_llm.runtime.artifact.manifest import Manifest, adapted_modules, fixed_inputs
from furiosa_llm.runtime.artifact.progress import tell
from furiosa_llm.runtime.artifact.reader import Artifact, open_artifact
from furiosa_llm.runtime.closing import Closing
from furiosa_llm.runtime.errors import ExecutionError, InputError, UnsupportedError
from furiosa_llm.runtime.execution.driver import cores_for
from furiosa_llm.runtime.execution.executor import Executor
from furiosa_llm.runtime.execution.one_by_one import batch_dim, is_chunk_of_many, takes_chunks_singly
from furiosa_llm.runtime.execution.ort import ORT_ERRORS, Session
from furiosa_llm.runtime.program.limits import LONGEST_STEP_SECONDS, WorkLimits, whole_limits
from furiosa_llm.runtime.tokens.tokenizer import Tokenizer
from furiosa_llm.runtime.verification.cases import (
    Case,
    ComparedStep,
    Inputs,
    Lengths,
    cases_of,
    configured_sizes,
    lengths_of,
    steps_of,
    within_limit,
)
from furiosa_llm.runtime.verification.errors import OutputDifference, TokenComparison, output_error
from furiosa_llm.runtime.verification.reference import ReferenceModel, set_accuracy_level
from furiosa_llm.runtime.verification.serving import SHORTEST, engine_errors, without_adapter
from furiosa_llm.runtime.verification.stitching import SplitModel
from furiosa_llm.runtime.verification.tokens import compare_tokens

DEFAULT_PROMPTS = (
    "The capital of France is",
    "Once upon a time there was",
    "def fibonacci(n):",
    "The three laws of motion are",
)

_MOST_ROWS = 3
"""Sequences of a step."""
UNFIT = (ArtifactError, ExecutionError, InputError)
"""The errors that running may raise for an artifact whose files are all there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Parity:
    """How far artifact and unsplit model are apart.

    All of it follows from `seed`.
    """

    stitched: tuple[OutputDifference, ...]
    """The errors of all ranks in one graph, each the greatest over the ranks' parts."""
    outputs: tuple[OutputDifference, ...]
    """The executor's errors."""
    engine: tuple[OutputDifference, ...]
    """The errors of an engine's steps."""
    tokens: tuple[TokenComparison, ...]
    cases: tuple[Case, ...]
    """The steps that `stitched` and `outputs` compare."""
    lengths: Lengths
    """The lengths of `cases`."""
    seed: int
    accuracy_level_replaced: bool
    """Whether MatMulNBits ran at level 0 instead of its own."""

    def within(self, tolerance: float) -> bool:
        """Whether every relative error is at most `tolerance`, and tokens differ only where they are ties within it."""
        found: list[OutputDifference | TokenComparison] = [*self.stitched, *self.outputs, *self.engine, *self.tokens]
        return all(one.within(tolerance) for one in found)


_T = TypeVar("_T")


@dataclass(slots=True)
class Found(Generic[_T]):
    """The result of one way of running: its errors up to the failure that ended it, if any."""

    errors: list[_T] = field(default_factory=list)
    failure: FuriosaLLMError | None = None

    def extend(self, compare: Callable[[], Iterable[_T]]) -> None:
        """Adds what `compare` finds, unless something failed before; a failure of its own is kept."""
        if self.failure is not None:
            return
        try:
            self.errors.extend(compare())
        except UNFIT as error:
            self.failure = error


@dataclass(frozen=True, slots=True, kw_only=True)
class Findings:
    """The same as `Parity`, where each way of running may have failed."""

    stitched: Found[OutputDifference] = field(default_factory=Found)
    executor: Found[OutputDifference] = field(default_factory=Found)
    engine: Found[OutputDifference] = field(default_factory=Found)
    tokens: Found[TokenComparison] = field(default_factory=Found)


def verify_against(
    path: str | os.PathLike[str],
    model_path: str | os.PathLike[str],
    *,
    prompts: Sequence[str] = DEFAULT_PROMPTS,
    max_tokens: int = 32,
    sizes: Mapping[str, int] | None = None,
    threads: int | None = None,
    compute: str | None = None,
    seed: int = 0,
    max_length: int | None = None,
) -> Parity:
    """Runs the artifact in the folder `path` and the model it was built from on the same inputs.

    A decoder is compared in prefill, in decode and in a chunk after a past, every state among the outputs, at lengths
    drawn by `seed` up to `max_length` (None: what is affordable), and in the steps of an engine; then `prompts` are
    completed greedily by `max_tokens` tokens each, if the artifact has a tokenizer. Another model is compared in whole
    runs. `sizes` are the sizes of other dynamic dimensions; an image's sizes are taken from the model's config.json if
    it lies in the artifact. `compute` is the type that both compute in. Raises ArtifactError, InputError and
    ExecutionError as loading and running do, and UnsupportedError if a dimension has no size.
    """
    artifact = open_artifact(path)
    subject = Subject(
        artifact, model_path, sizes=sizes, threads=threads, compute=compute, seed=seed, max_length=max_length
    )
    findings = subject.compare(prompts, max_tokens)
    for found in (findings.stitched, findings.executor, findings.engine, findings.tokens):
        if found.failure is not None:
            raise found.failure
    return subject.parity(findings)


class Subject:
    """An artifact and its unsplit model; see `verify_against`.

    The unsplit model is loaded here. Raises InputError if it has other inputs or outputs than the artifact, and
    ExecutionError if onnxruntime refuses it. `check` is called before each step, and may raise ExecutionError.
    `step_timeout` are the seconds that a step of any way of running may take; None: what docs/limits.md says.
    """

    def __init__(
        self,
        artifact: Artifact,
        model_path: str | os.PathLike[str],
        *,
        sizes: Mapping[str, int] | None = None,
        threads: int | None = None,
        compute: str | None = None,
        seed: int = 0,
        max_length: int | None = None,
        step_timeout: float | None = None,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        # Its inputs and outputs are compared as it computes them, not rounded to the types that are declared.
        artifact = replace(computing(artifact, compute), declared={})
        self._artifact, self._accuracy_level_replaced = _at_level_0(artifact)
        self._threads = cores_for(threads)
        self._check = check
        self._seed = seed
        manifest = artifact.manifest
        self._logits = {info.name for info in manifest.outputs if info.role == "logits"}
        self._step_timeout = step_timeout
        self._lengths = lengths_of(manifest, max_length)
        self._reference = ReferenceModel(
            model_path,
            inputs=manifest.inputs,
            outputs=manifest.outputs,
            states=manifest.states,
            threads=self._threads,
            accuracy_level=0,
            compute=compute,
            fixed=fixed_inputs(manifest),
            lora_modules=adapted_modules(manifest),
            limits=self._limits(),
        )
        known = configured_sizes(artifact.companion("config.json")) | dict(sizes or {})
        self._inputs = Inputs(self._reference, manifest, known, np.random.default_rng(seed + 1))
        self._lengths = within_limit(self._inputs, self._lengths)
        self._cases = cases_of(manifest, self._lengths, np.random.default_rng(seed))

    def parity(self, findings: Findings) -> Parity:
        """The findings without the failures."""
        return Parity(
            stitched=tuple(findings.stitched.errors),
            outputs=tuple(findings.executor.errors),
            engine=tuple(findings.engine.errors),
            tokens=tuple(findings.tokens.errors),
            cases=tuple(self._cases),
            lengths=self._lengths,
            seed=self._seed,
            accuracy_level_replaced=self._accuracy_level_replaced,
        )

    def compare(self, prompts: Sequence[str] = DEFAULT_PROMPTS, max_tokens: int = 32) -> Findings:
        """Makes all comparisons; raises UnsupportedError if a dimension has no size, and the unsplit model's errors."""
        findings = Findings()
        manifest = self._artifact.manifest
        stitched = _Stitched(self._artifact, self._threads, self._limits(ranks=manifest.mesh.size))
        with _Executed(self._artifact, self._threads, self._step_timeout) as executed:
            for number, step in enumerate(steps_of(self._inputs, self._cases)):
                tell("comparing outputs with the model's", number, len(self._cases))
                findings.stitched.extend(self._in_time(partial(stitched.errors, step, self._logits)))
                findings.executor.extend(self._in_time(partial(executed.errors, step, self._logits)))
                if findings.stitched.failure is not None and findings.executor.failure is not None:
                    break
            if _completes(manifest) and findings.executor.failure is None:
                findings.tokens.extend(partial(self._tokens, executed.executor, prompts, max_tokens))
        if _completes(manifest) and self._lengths.new >= SHORTEST:
            findings.engine.extend(self._in_time(self._engine))
        return findings

    def _in_time(self, compare: Callable[[], Iterable[OutputDifference]]) -> Callable[[], Iterable[OutputDifference]]:
        """`compare`, begun only if `check` allows it."""

        def run() -> Iterable[OutputDifference]:
            self._check()
            return compare()

        return run

    def _tokens(self, executor: Executor, prompts: Sequence[str], max_tokens: int) -> Iterator[TokenComparison]:
        if self._artifact.companion("tokenizer.json") is None:
            return
        tokenizer = Tokenizer.from_artifact(self._artifact)
        for number, prompt in enumerate(prompts):
            tell("comparing greedy tokens with the model's", number, len(prompts))
            self._check()
            tokens = tokenizer.encode(prompt)
            yield compare_tokens(executor, self._reference, tokens, prompt, max_tokens, without_adapter(self._artifact))

    def _engine(self) -> tuple[OutputDifference, ...]:
        """The errors of an engine's steps; none if an engine does not run models of this kind."""
        random = np.random.default_rng(self._seed + 2)
        tell("comparing the engine's steps with the model's")
        try:
            return engine_errors(
                self._artifact,
                self._reference,
                self._lengths,
                threads=self._threads,
                random=random,
                step_timeout=self._limits().step_seconds,
            )
        except UnsupportedError:
            return ()

    def _limits(self, ranks: int = 1) -> WorkLimits:
        """What one session of the whole model may take, as so many ranks have it."""
        manifest, lengths = self._artifact.manifest, self._lengths
        found = whole_limits(
            manifest,
            nodes=len(self._artifact.program.graph.node),
            tokens=_MOST_ROWS * lengths.new,
            length=lengths.past,
            ranks=ranks,
        )
        seconds = self._step_timeout or (found.step_seconds if manifest.states else LONGEST_STEP_SECONDS)
        return replace(found, step_seconds=seconds)


def _completes(manifest: Manifest) -> bool:
    """Whether the model continues from tokens alone: a decoder that makes all of its states itself."""
    made = {state.input for state in manifest.states}
    return manifest.model.task == "decoder" and all(i.name in made for i in manifest.inputs if i.role == "state")


def _at_level_0(artifact: Artifact) -> tuple[Artifact, bool]:
    if not any(node.op_type == "MatMulNBits" for node in artifact.program.graph.node):
        return artifact, False
    program = ModelProto()
    program.CopyFrom(artifact.program)
    set_accuracy_level(program, 0)
    return replace(artifact, program=program), True


# -- all ranks in one graph ----------------------------------------------------------------------------------------


class _Stitched:
    """The session of all ranks, made when the first step comes."""

    def __init__(self, artifact: Artifact, threads: int, limits: WorkLimits) -> None:
        self._manifest = artifact.manifest
        self._split = SplitModel.of_artifact(artifact)
        self._singly = takes_chunks_singly(artifact.program)
        self._threads = threads
        self._limits = limits
        self._session: Session | None = None

    def errors(self, step: ComparedStep, logits: Collection[str]) -> list[OutputDifference]:
        """The errors of a step; raises ExecutionError if it does not run."""
        if self._singly and is_chunk_of_many(step.sizes):
            step = self._first_row(step)
        try:
            if self._session is None:
                self._session = self._split.session(self._threads, self._limits)
            found = self._split.run(self._session, step.inputs)
        except ORT_ERRORS as error:
            raise ExecutionError(f"onnxruntime cannot run the ranks of the program in one graph: {error}") from error
        return [self._error(step, name, parts, logits=name in logits) for name, parts in found.items()]

    def _error(self, step: ComparedStep, name: str, parts: Sequence[Array], *, logits: bool) -> OutputDifference:
        whole = step.expected[name]
        pairs = self._split.parts(name, parts, whole)
        if pairs is None:
            raise ExecutionError(
                f"{step.case}: the ranks' parts of output {name!r:.80} have other shapes or types than the model's "
                f"{whole.dtype} {list(whole.shape)}, or are not all of it"
            )
        return output_error(str(step.case), name, pairs, whole, logits=logits)

    def _first_row(self, step: ComparedStep) -> ComparedStep:
        """A step's first sequence: GroupQueryAttention takes several tokens after a past only in a batch of one."""
        manifest = self._manifest
        shapes = {info.name: info.shape for info in manifest.inputs}
        shapes |= {info.name: info.shape for info in manifest.outputs}
        first = {
            name: np.split(array, step.sizes["batch"], axis=d)[0]
            for name, array in (*step.inputs.items(), *step.expected.items())
            if (d := batch_dim(shapes[name])) is not None
        }
        return replace(
            step,
            sizes={**step.sizes, "batch": 1},
            inputs={name: first.get(name, array) for name, array in step.inputs.items()},
            expected={name: first.get(name, array) for name, array in step.expected.items()},
        )


# -- the executor --------------------------------------------------------------------------------------------------


class _Executed(Closing):
    """The executor, made when the first step comes."""

    def __init__(self, artifact: Artifact, threads: int, step_timeout: float | None) -> None:
        self._artifact = artifact
        self._threads = threads
        self._step_timeout = step_timeout
        self._executor: Executor | None = None

    @property
    def executor(self) -> Executor:
        """The executor; raises as loading does."""
        if self._executor is None:
            self._executor = Executor(
                self._artifact, threads=self._threads, exact=True, step_timeout=self._step_timeout
            )
        return self._executor

    def errors(self, step: ComparedStep, logits: Collection[str]) -> list[OutputDifference]:
        """The errors of a step; raises as running does."""
        errors = []
        for name, found in self.executor.run(step.inputs).items():
            whole = step.expected[name]
            if found.shape != whole.shape:
                raise ExecutionError(
                    f"{step.case}: output {name!r:.80} of the artifact is {list(found.shape)}, of the model "
                    f"{list(whole.shape)}"
                )
            errors.append(output_error(str(step.case), name, [(found, whole)], whole, logits=name in logits))
        return errors

    def close(self) -> None:
        """Ends the executor's threads, if it was made."""
        if self._executor is not None:
            self._executor.close()
