"""Compares an artifact with the unsplit model: outputs on random inputs, and greedy tokens on prompts.

The program is run twice: all ranks stitched into one onnxruntime graph, and by the executor, whose mistakes the first
cannot share. All sides compute MatMulNBits at accuracy level 0, because level 4 rounds activations to 8 bits, and a
rounding that falls the other way is no error of the split.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from onnx import ModelProto

from furiosa_llm.runtime.artifact.dtypes import Array
from furiosa_llm.runtime.artifact.manifest import Manifest, fixed_inputs
from furiosa_llm.runtime.artifact.reader import Artifact, open_artifact
from furiosa_llm.runtime.errors import ExecutionError
from furiosa_llm.runtime.execution.decoder import DecoderModel, DecoderSession
from furiosa_llm.runtime.execution.driver import cores_for
from furiosa_llm.runtime.execution.executor import Executor
from furiosa_llm.runtime.execution.one_by_one import is_chunk_of_many, takes_chunks_singly
from furiosa_llm.runtime.execution.ort import ORT_ERRORS
from furiosa_llm.runtime.tokens.tokenizer import Tokenizer
from furiosa_llm.runtime.verification.cases import Step, configured_sizes, steps_of
from furiosa_llm.runtime.verification.reference import ReferenceModel, set_accuracy_level
from furiosa_llm.runtime.verification.stitching import SplitModel

DEFAULT_PROMPTS = (
    "The capital of France is",
    "Once upon a time there was",
    "def fibonacci(n):",
    "The three laws of motion are",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputError:
    """The greatest difference between artifact and model in one output of one case.

    `absolute` is in the output's own units; `relative` is `absolute` over the greatest magnitude of the model's output.
    Both are of the elements that are finite on both sides; `finite` says that the others are equal, NaN to NaN.
    """

    case: str
    output: str
    absolute: float
    relative: float
    finite: bool

    def within(self, tolerance: float) -> bool:
        """Whether the relative error is at most `tolerance`."""
        return self.finite and self.relative <= tolerance


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenComparison:
    """The greedy tokens of one prompt on both sides.

    `first_difference` is the position of the first token that differs, None if none does; `gap` is the distance between
    the model's two best logits there, and `logit_error` the greatest difference in the logits up to there.
    """

    prompt: str
    tokens: int
    first_difference: int | None
    gap: float | None
    logit_error: float

    @property
    def identical(self) -> bool:
        """Whether all tokens are equal, or the first that is not is a choice closer than the logit error."""
        return self.first_difference is None or (self.gap is not None and self.gap < self.logit_error)


@dataclass(frozen=True, slots=True, kw_only=True)
class Parity:
    """How far artifact and unsplit model are apart.

    `stitched` are the errors of all ranks in one graph, each the greatest of any rank's part; `outputs` those of the
    executor. `accuracy_level_replaced`: MatMulNBits ran at level 0 instead of its own.
    """

    stitched: tuple[OutputError, ...]
    outputs: tuple[OutputError, ...]
    tokens: tuple[TokenComparison, ...]
    accuracy_level_replaced: bool

    def within(self, tolerance: float) -> bool:
        """Whether every relative error is at most `tolerance` and all tokens are identical."""
        return all(error.within(tolerance) for error in (*self.stitched, *self.outputs)) and all(
            comparison.identical for comparison in self.tokens
        )


def verify_against(
    path: str | os.PathLike[str],
    model_path: str | os.PathLike[str],
    *,
    prompts: Sequence[str] = DEFAULT_PROMPTS,
    max_tokens: int = 32,
    sizes: Mapping[str, int] | None = None,
    threads: int | None = None,
    seed: int = 0,
) -> Parity:
    """Runs the artifact in the folder `path` and the model it was built from on the same inputs.

    A decoder is compared in prefill, in decode and in a chunk behind a past, every state among the outputs; then
    `prompts` are completed greedily by `max_tokens` tokens each, if the artifact has a tokenizer. Another model is
    compared in one batch. `sizes` gives dynamic dimensions that have no size of their own here; those of an image are
    taken from the model's config.json if it lies in the artifact. Raises ArtifactError, InputError and ExecutionError
    as loading and running do, and UnsupportedError if a dimension has no size.
    """
    subject = Subject(open_artifact(path), model_path, sizes=sizes, threads=threads, seed=seed)
    outputs, tokens = subject.executed(prompts, max_tokens)
    return Parity(
        stitched=subject.stitched(),
        outputs=outputs,
        tokens=tokens,
        accuracy_level_replaced=subject.accuracy_level_replaced,
    )


class Subject:
    """An artifact beside its unsplit model, with the steps that they are compared on; see `verify_against`.

    The unsplit model is loaded and run here. Raises InputError if it has other inputs or outputs than the artifact,
    ExecutionError if onnxruntime refuses it, and UnsupportedError if a dimension has no size.
    """

    def __init__(
        self,
        artifact: Artifact,
        model_path: str | os.PathLike[str],
        *,
        sizes: Mapping[str, int] | None = None,
        threads: int | None = None,
        seed: int = 0,
    ) -> None:
        self._artifact, self.accuracy_level_replaced = _at_level_0(artifact)
        self._threads = cores_for(threads)
        manifest = artifact.manifest
        self._reference = ReferenceModel(
            model_path,
            inputs=manifest.inputs,
            outputs=manifest.outputs,
            states=manifest.states,
            threads=self._threads,
            accuracy_level=0,
            fixed=fixed_inputs(manifest),
        )
        known = configured_sizes(artifact.companion("config.json")) | dict(sizes or {})
        self._steps = list(steps_of(self._reference, manifest, known, np.random.default_rng(seed)))

    def stitched(self) -> tuple[OutputError, ...]:
        """The errors of all ranks in one onnxruntime graph; raises ExecutionError if it does not run."""
        split = SplitModel.of_artifact(self._artifact)
        singly = takes_chunks_singly(self._artifact.program)
        try:
            session = split.session(self._threads)
            steps = [self._first_row(step) if singly and is_chunk_of_many(step.sizes) else step for step in self._steps]
            runs = ((step, split.run(session, step.inputs)) for step in steps)
            return tuple(error for step, found in runs for error in _stitched_errors(split, step, found))
        except ORT_ERRORS as error:
            raise ExecutionError(f"onnxruntime cannot run the ranks of the program in one graph: {error}") from error

    def executed(
        self, prompts: Sequence[str] = DEFAULT_PROMPTS, max_tokens: int = 32
    ) -> tuple[tuple[OutputError, ...], tuple[TokenComparison, ...]]:
        """The errors of the executor, and its greedy tokens if the artifact is a decoder with a tokenizer."""
        manifest = self._artifact.manifest
        with Executor(self._artifact, threads=self._threads, exact=True) as executor:
            outputs = tuple(_executor_errors(executor, self._steps))
            if not _completes(manifest) or self._artifact.companion("tokenizer.json") is None:
                return outputs, ()
            tokenizer = Tokenizer.from_artifact(self._artifact)
            return outputs, tuple(_compare_tokens(executor, self._reference, tokenizer, prompts, max_tokens))

    def _first_row(self, step: Step) -> Step:
        """A step's first sequence: GroupQueryAttention takes several tokens behind a past in a batch of one only."""
        manifest = self._artifact.manifest
        shapes = {info.name: info.shape for info in manifest.inputs}
        shapes |= {info.name: info.shape for info in manifest.outputs}
        first = {
            name: array[(slice(None),) * shapes[name].index("batch") + (slice(0, 1),)]
            for name, array in (*step.inputs.items(), *step.expected.items())
            if "batch" in shapes[name]
        }
        return replace(
            step,
            sizes={**step.sizes, "batch": 1},
            inputs={name: first.get(name, array) for name, array in step.inputs.items()},
            expected={name: first.get(name, array) for name, array in step.expected.items()},
        )


def _completes(manifest: Manifest) -> bool:
    """Whether the model goes on from tokens alone: a decoder whose states are all of its own making."""
    made = {state.input for state in manifest.states}
    return manifest.model.task == "decoder" and all(i.name in made for i in manifest.inputs if i.role == "state")


def _at_level_0(artifact: Artifact) -> tuple[Artifact, bool]:
    if not any(node.op_type == "MatMulNBits" for node in artifact.program.graph.node):
        return artifact, False
    program = ModelProto()
    program.CopyFrom(artifact.program)
    set_accuracy_level(program, 0)
    return replace(artifact, program=program), True


def _stitched_errors(split: SplitModel, step: Step, found: Mapping[str, Sequence[Array]]) -> Iterator[OutputError]:
    for name, parts in found.items():
        whole = step.expected[name]
        pairs = split.parts(name, parts, whole)
        if pairs is None:
            shapes = [list(part.shape) for part in parts]
            raise ExecutionError(
                f"{step.name}: output {name!r:.80} of the ranks is {shapes!s:.200}, which do not make up {whole.dtype} "
                f"{list(whole.shape)}, the model's"
            )
        yield _output_error(step.name, name, pairs, whole)


def _executor_errors(executor: Executor, steps: Iterable[Step]) -> Iterator[OutputError]:
    for step in steps:
        for name, found in executor.run(step.inputs).items():
            whole = step.expected[name]
            if found.shape != whole.shape:
                raise ExecutionError(
                    f"{step.name}: output {name!r:.80} of the artifact is {list(found.shape)}, of the model "
                    f"{list(whole.shape)}"
                )
            yield _output_error(step.name, name, [(found, whole)], whole)


def _output_error(case: str, name: str, pairs: Iterable[tuple[Array, Array]], whole: Array) -> OutputError:
    """The greatest error of pairs of what was found and what was expected, which is a part of `whole`."""
    absolute, same = 0.0, True
    for found, expected in pairs:
        ours, theirs = found.astype(np.float64), expected.astype(np.float64)
        finite = np.isfinite(theirs) & np.isfinite(ours)
        same &= bool(np.array_equal(ours[~finite], theirs[~finite], equal_nan=True))
        absolute = max(absolute, float(np.abs(ours[finite] - theirs[finite]).max(initial=0.0)))
    values = whole.astype(np.float64)
    magnitude = float(np.abs(values[np.isfinite(values)]).max(initial=0.0))
    relative = absolute / magnitude if magnitude else absolute
    return OutputError(case=case, output=name, absolute=absolute, relative=relative, finite=same)


def _compare_tokens(
    executor: DecoderModel,
    reference: DecoderModel,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    max_tokens: int,
) -> Iterator[TokenComparison]:
    ours, theirs = DecoderSession(executor), DecoderSession(reference)
    for prompt in prompts:
        token_ids = np.array([tokenizer.encode(prompt)], dtype=np.int64)
        ours.reset()
        theirs.reset()
        yield _compare_prompt(ours, theirs, prompt, token_ids, max_tokens)


def _compare_prompt(
    ours: DecoderSession, theirs: DecoderSession, prompt: str, token_ids: Array, max_tokens: int
) -> TokenComparison:
    error = 0.0
    for position in range(max_tokens):
        found, expected = (session.step(token_ids)[0].astype(np.float64) for session in (ours, theirs))
        error = max(error, float(np.abs(found - expected).max()))
        token = int(expected.argmax())
        if int(found.argmax()) != token:
            second, best = np.partition(expected, -2)[-2:]
            return TokenComparison(
                prompt=prompt, tokens=position, first_difference=position, gap=float(best - second), logit_error=error
            )
        token_ids = np.array([[token]], dtype=np.int64)
    return TokenComparison(prompt=prompt, tokens=max_tokens, first_difference=None, gap=None, logit_error=error)
