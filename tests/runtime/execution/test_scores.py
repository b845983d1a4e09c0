"""Scores in any order of their dimensions."""

from __future__ import annotations

import numpy as np
import pytest

from furiosa_llm.runtime.artifact.manifest import OutputInfo
from furiosa_llm.runtime.execution.scores import by_position

_SCORES = np.arange(2 * 3 * 16, dtype=np.float32).reshape(2, 3, 16)
_FORMS = {
    ("batch", "sequence", 16): _SCORES,
    ("batch", 16, "sequence"): _SCORES.transpose(0, 2, 1),
    ("sequence", "batch", 16): _SCORES.transpose(1, 0, 2),
    ("sequence", 2, 16): _SCORES.transpose(1, 0, 2),
    (3, "batch", 16): _SCORES.transpose(1, 0, 2),
    (16, "batch", "sequence"): _SCORES.transpose(2, 0, 1),
    ("sequence", 16, "batch"): _SCORES.transpose(1, 2, 0),
    ("batch*sequence", 16): _SCORES.reshape(-1, 16),
    (16, "batch*sequence"): _SCORES.reshape(-1, 16).T,
}


@pytest.mark.parametrize("shape", _FORMS)
def test_all_positions(shape: tuple[int | str, ...]) -> None:
    info = OutputInfo(name="y", role="logits", dtype="FLOAT", shape=shape, layout=(None,) * len(shape))
    assert (by_position(info, _FORMS[shape], 2) == _SCORES).all()


@pytest.mark.parametrize("shape", [("batch", 16), ("batch", 1, 16), (1, "batch", 16), (16, "batch")])
def test_the_last_position_alone(shape: tuple[int | str, ...]) -> None:
    info = OutputInfo(name="y", role="logits", dtype="FLOAT", shape=shape, layout=(None,) * len(shape))
    last = _SCORES[:, -1].T if shape[0] == 16 else _SCORES[:, -1]
    scores = last.reshape([16 if dim == 16 else 1 if dim == 1 else 2 for dim in shape])
    assert (by_position(info, scores, 2) == _SCORES[:, -1:]).all()
