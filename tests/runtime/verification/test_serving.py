"""An engine's steps in a comparison."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from furiosa_llm.runtime.artifact.layout import Mesh
from furiosa_llm.runtime.artifact.reader import open_artifact
from furiosa_llm.runtime.errors import StepTimeoutError
from furiosa_llm.runtime.verification.cases import Lengths
from furiosa_llm.runtime.verification.reference import ReferenceModel
from furiosa_llm.runtime.verification.serving import engine_errors
from tests.support.runtime.endless import make_endless
from tests.support.runtime.models import LlamaSize, llama


def test_a_step_that_never_ends_is_ended(tmp_path: Path) -> None:
    folder = llama(Mesh((2,)), LlamaSize(layers=1)).write(tmp_path / "artifact")
    make_endless(folder, "an endless Loop")
    whole = llama(Mesh((1,)), LlamaSize(layers=1))
    onnx.save(whole.model(), tmp_path / "model.onnx")
    reference = ReferenceModel(tmp_path / "model.onnx", inputs=whole.inputs, outputs=whole.outputs, states=whole.states)
    with pytest.raises(StepTimeoutError, match=r"a step of the engine was not done within 0\.05 s; give a greater"):
        engine_errors(
            open_artifact(folder),
            reference,
            Lengths(limit=16, past=16, new=16),
            threads=1,
            random=np.random.default_rng(0),
            step_timeout=0.05,
        )
