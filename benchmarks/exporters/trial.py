"""One exported model: split over so many PEs, compared with the unsplit one, and asked for tokens."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx

from furiosa_llm import LLM, SamplingParams
from furiosa_llm.builder import ArtifactBuilder, BuildReport, ShapeError
from furiosa_llm.parity_options import ParityOptions
from furiosa_llm.runtime.artifact.errors import FuriosaLLMError
from furiosa_llm.runtime.artifact.reader import open_artifact
from furiosa_llm.runtime.artifact.tools.record import Check
from furiosa_llm.runtime.errors import UnsupportedError
from furiosa_llm.runtime.execution.decoder import DecoderSession
from furiosa_llm.runtime.verification.reference import ReferenceModel
from furiosa_llm.verification import verify_artifact

PROMPTS = ([3, 17, 5, 60, 9, 800, 4], [1, 2], [9])
_TOKENS = 8
_LENGTH = 96
"""The longest sequence that is compared: longer than any window here."""
_SEED = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What became of a model over `tp` PEs; `reasons` say why what is not so is not so."""

    tp: int
    builds: bool
    proof: bool = False
    equal: bool = False
    tokens: bool | None = None
    """Whether greedy tokens are the unsplit model's; None: it generates none."""
    share: float = 0.0
    """Bytes of weights on a PE, of an even split's."""
    reasons: tuple[str, ...] = ()

    @property
    def sound(self) -> bool:
        """Whether it builds, runs equal and proves completely."""
        return self.builds and self.proof and self.equal and self.tokens is not False


def try_model(model: Path, tp: int, dims: Mapping[str, int]) -> Outcome:
    """Builds `model` over `tp` PEs and checks the artifact; nothing that is wrong with either is raised.

    `dims` are sizes of dimensions, where the model has them.
    """
    with tempfile.TemporaryDirectory(dir=model.parent) as temporary:
        artifact = Path(temporary) / "artifact"
        try:
            report = _built(model, artifact, tp, dims)
        except FuriosaLLMError as error:
            return Outcome(tp=tp, builds=False, reasons=(_line(error),))
        return _checked(model, artifact, report, dims)


def _built(model: Path, artifact: Path, tp: int, dims: Mapping[str, int]) -> BuildReport:
    try:
        return ArtifactBuilder(model, tensor_parallel_size=tp).build(artifact)
    except ShapeError:
        inputs = onnx.load(model, load_external_data=False).graph.input
        own = {dim.dim_param for value in inputs for dim in value.type.tensor_type.shape.dim} & dims.keys()
        if not own:
            raise
        given = {name: dims[name] for name in own}
        return ArtifactBuilder(model, tensor_parallel_size=tp, dims=given).build(artifact)


def _checked(model: Path, artifact: Path, report: BuildReport, dims: Mapping[str, int]) -> Outcome:
    options = ParityOptions(threads=1, max_tokens=_TOKENS, max_length=_LENGTH, seed=_SEED, sizes=dims)
    reasons = list(report.faults[:1])
    try:
        checks: Sequence[Check] = verify_artifact(artifact, against=model, options=options).record.checks
    except FuriosaLLMError as error:
        checks = (Check(name="executor", checked=0, faults=(_line(error),)),)
    failed = [check for check in checks if not check.passed and check.name != "proof"]
    reasons += [f"{check.name}: {check.faults[0]}" for check in failed]
    tokens, reason = _tokens(model, artifact)
    return Outcome(
        tp=report.tensor_parallel_size,
        builds=True,
        proof=not report.faults,
        equal=not failed,
        tokens=tokens,
        share=report.weight_nbytes * report.tensor_parallel_size / report.model_nbytes,
        reasons=(*reasons, *reason, *report.shortfalls),
    )


def _tokens(model: Path, artifact: Path) -> tuple[bool | None, Sequence[str]]:
    """Whether an engine's tokens are those of the unsplit model's greedy loop, one prompt after the other."""
    manifest = open_artifact(artifact).manifest
    if manifest.model.task != "decoder":
        return None, ()
    params = SamplingParams(max_tokens=_TOKENS, temperature=0, ignore_eos=True)
    try:
        with LLM(artifact) as llm:
            found = llm.generate(prompt_token_ids=PROMPTS, sampling_params=params)
        reference = ReferenceModel(model, inputs=manifest.inputs, outputs=manifest.outputs, states=manifest.states)
        expected = [_greedy(reference, prompt) for prompt in PROMPTS]
    except UnsupportedError as error:
        return None, (f"no tokens: {_line(error)}",)
    except FuriosaLLMError as error:
        return False, (f"tokens: {_line(error)}",)
    if [list(one.outputs[0].token_ids) for one in found] == expected:
        return True, ()
    return False, ("tokens: others than the unsplit model's",)


def _greedy(model: ReferenceModel, prompt: Sequence[int]) -> list[int]:
    session, found, new = DecoderSession(model), list[int](), list(prompt)
    while len(found) < _TOKENS:
        found.append(int(session.step(np.array([new], dtype=np.int64))[0].argmax()))
        new = found[-1:]
    return found


def _line(error: FuriosaLLMError) -> str:
    return " ".join(str(error).split())


def models_in(folder: Path) -> list[Path]:
    """The graphs that an exporter left in `folder`: of a merged decoder, the two files that it is made of."""
    found = sorted(folder.rglob("*.onnx"))
    return [path for path in found if len(found) == 1 or "merged" not in path.name]
