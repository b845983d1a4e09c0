"""Compares an artifact with the unsplit model: outputs on random inputs, and greedy tokens on prompts.

Both sides compute MatMulNBits at accuracy level 0, because level 4 rounds activations to 8 bits, and a rounding that
falls the other way is no error of the split.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np
from onnx import ModelProto

from furiosa_llm.runtime.artifact.dimensions import known_sizes, parse_dimension, shape_of
from furiosa_llm.runtime.artifact.dtypes import DTYPES
from furiosa_llm.runtime.artifact.errors import ArtifactError
from furiosa_llm.runtime.artifact.json_reader import REBUILD
from furiosa_llm.runtime.artifact.manifest import InputInfo, Manifest
from furiosa_llm.runtime.artifact.reader import Artifact, open_artifact
from furiosa_llm.runtime.decoder import DecoderModel, DecoderSession
from furiosa_llm.runtime.errors import ExecutionError, UnsupportedError
from furiosa_llm.runtime.executor import Executor
from furiosa_llm.runtime.ort import Array
from furiosa_llm.runtime.reference import ReferenceModel, set_accuracy_level
from furiosa_llm.runtime.tokenizer import Tokenizer

DEFAULT_PROMPTS = (
    "The capital of France is",
    "Once upon a time there was",
    "def fibonacci(n):",
    "The three laws of motion are",
)

_CASES = (("prefill", 2, 9, 0), ("decode", 2, 1, 9), ("chunk", 3, 5, 7))
"""Name, batch, sequence and past of the steps that a decoder is compared on."""

_CONFIGURED_SIZES = {"num_channels": "num_channels", "height": "image_size", "width": "image_size"}

_OTHER_SIZES = {"encoder": 7}

_OTHER_CASE = ("forward", 2, 9, 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputError:
    """The greatest difference between artifact and model in one output of one case.

    `absolute` is in the output's own units; `relative` is `absolute` over the greatest magnitude of the model's output.
    `finite` says that both sides have no NaN or infinity that the other has not.
    """

    case: str
    output: str
    absolute: float
    relative: float
    finite: bool


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
class Report:
    """What `verify_against` found. `accuracy_level_replaced`: MatMulNBits ran at level 0 instead of its own."""

    outputs: tuple[OutputError, ...]
    tokens: tuple[TokenComparison, ...]
    accuracy_level_replaced: bool

    def within(self, tolerance: float) -> bool:
        """Whether every relative error is at most `tolerance` and all tokens are identical."""
        return all(error.finite and error.relative <= tolerance for error in self.outputs) and all(
            comparison.identical for comparison in self.tokens
        )


class _Runner(Protocol):
    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]: ...


def verify_against(
    path: str | os.PathLike[str],
    model_path: str | os.PathLike[str],
    *,
    prompts: Sequence[str] = DEFAULT_PROMPTS,
    max_tokens: int = 32,
    sizes: Mapping[str, int] | None = None,
    threads: int | None = None,
    seed: int = 0,
) -> Report:
    """Runs the artifact in the folder `path` and the model it was built from on the same inputs.

    A decoder is compared in prefill, in decode and in a chunk behind a past, every state among the outputs; then
    `prompts` are completed greedily by `max_tokens` tokens each, if the artifact has a tokenizer. Another model is
    compared in one batch. `sizes` gives dynamic dimensions that have no size of their own here; those of an image are
    taken from the model's config.json if it lies in the artifact. Raises ArtifactError, InputError and ExecutionError
    as loading and running do, and UnsupportedError if a dimension has no size.
    """
    artifact, replaced = _at_level_0(open_artifact(path))
    manifest = artifact.manifest
    reference = ReferenceModel(
        model_path,
        inputs=manifest.inputs,
        outputs=manifest.outputs,
        states=manifest.states,
        threads=threads or len(os.sched_getaffinity(0)),
        accuracy_level=0,
    )
    random = np.random.default_rng(seed)
    with Executor(artifact, threads=threads, exact=True) as executor:
        known = _configured_sizes(artifact.companion("config.json")) | dict(sizes or {})
        outputs = tuple(_compare_outputs(executor, reference, manifest, known, random))
        tokens: tuple[TokenComparison, ...] = ()
        if manifest.model.task == "decoder" and artifact.companion("tokenizer.json") is not None:
            tokenizer = Tokenizer.from_artifact(artifact)
            tokens = tuple(_compare_tokens(executor, reference, tokenizer, prompts, max_tokens))
    return Report(outputs=outputs, tokens=tokens, accuracy_level_replaced=replaced)


def _configured_sizes(path: Path | None) -> dict[str, int]:
    """Sizes of dimensions besides batch and sequence: those of an image are in the model's configuration."""
    if path is None:
        return dict(_OTHER_SIZES)
    try:
        config = json.loads(path.read_bytes())
    except ValueError as error:
        raise ArtifactError(f"{path} is not JSON: {error}; {REBUILD}") from error
    found = {dim: config.get(key) for dim, key in _CONFIGURED_SIZES.items()} if isinstance(config, dict) else {}
    return _OTHER_SIZES | {dim: size for dim, size in found.items() if isinstance(size, int)}


def _at_level_0(artifact: Artifact) -> tuple[Artifact, bool]:
    if not any(node.op_type == "MatMulNBits" for node in artifact.program.graph.node):
        return artifact, False
    program = ModelProto()
    program.CopyFrom(artifact.program)
    set_accuracy_level(program, 0)
    return replace(artifact, program=program), True


def _compare_outputs(
    executor: Executor,
    reference: ReferenceModel,
    manifest: Manifest,
    sizes: Mapping[str, int],
    random: np.random.Generator,
) -> Iterator[OutputError]:
    for case, batch, sequence, past in _CASES if manifest.states else (_OTHER_CASE,):
        inputs = _case_inputs(reference, manifest, {**sizes, "batch": batch, "sequence": sequence}, past, random)
        try:
            expected = reference.run(inputs)
        except ExecutionError:
            # GroupQueryAttention takes several tokens behind a past in a batch of one only.
            inputs = _case_inputs(reference, manifest, {**sizes, "batch": 1, "sequence": sequence}, past, random)
            expected = reference.run(inputs)
        found = executor.run(inputs)
        for info in manifest.outputs:
            yield _output_error(case, info.name, found[info.name], expected[info.name])


def _case_inputs(
    reference: _Runner, manifest: Manifest, sizes: Mapping[str, int], past: int, random: np.random.Generator
) -> dict[str, Array]:
    """The inputs of a step behind `past` tokens; the states are those the reference has after a prefill of them."""
    inputs = _random_inputs(manifest, {**sizes, "past": 0, "sequence": past or sizes["sequence"]}, random)
    if not past:
        return inputs
    presents = reference.run(inputs)
    step = _random_inputs(manifest, {**sizes, "past": past}, random)
    return step | {state.input: presents[state.output] for state in manifest.states}


def _random_inputs(manifest: Manifest, sizes: Mapping[str, int], random: np.random.Generator) -> dict[str, Array]:
    complete = known_sizes(sizes)
    return {info.name: _random_input(info, manifest, complete, random) for info in manifest.inputs}


def _random_input(info: InputInfo, manifest: Manifest, sizes: Mapping[str, int], random: np.random.Generator) -> Array:
    names = {name for dim in info.shape if isinstance(dim, str) for name in parse_dimension(dim).names}
    missing = sorted(names - sizes.keys())
    if missing:
        raise UnsupportedError(f"input {info.name!r:.80} has the dynamic dimensions {missing}; give their sizes")
    shape = shape_of(info.shape, sizes)
    dtype = np.dtype(DTYPES[info.dtype].numpy)
    if info.role == "state":
        return np.zeros(shape, dtype=dtype)
    if info.role == "token_ids":
        return random.integers(0, manifest.model.vocab_size or 2, shape).astype(dtype)
    if info.role == "attention_mask":
        return np.ones(shape, dtype=dtype)
    if info.role == "position_ids":
        positions = np.arange(sizes["past"], sizes["past"] + sizes["sequence"])
        return np.broadcast_to(positions, shape).astype(dtype)
    if dtype.kind in "iub":
        return random.integers(0, 2, shape).astype(dtype)
    return random.standard_normal(shape).astype(dtype)


def _output_error(case: str, name: str, found: Array, expected: Array) -> OutputError:
    if found.shape != expected.shape:
        raise ExecutionError(
            f"{case}: output {name!r:.80} of the artifact is {list(found.shape)}, of the model {list(expected.shape)}"
        )
    ours, theirs = found.astype(np.float64), expected.astype(np.float64)
    finite = np.isfinite(theirs)
    differences = np.abs(ours - theirs)[finite]
    magnitude = float(np.abs(theirs[finite]).max(initial=0.0))
    absolute = float(differences.max(initial=0.0))
    return OutputError(
        case=case,
        output=name,
        absolute=absolute,
        relative=absolute / magnitude if magnitude else absolute,
        finite=bool(np.array_equal(finite, np.isfinite(ours))),
    )


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
