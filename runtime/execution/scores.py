"""Next-token scores in one form, whichever way round a model gives them."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from furiosa_llm.runtime.artifact.dimensions import vocabulary_dim
from furiosa_llm.runtime.artifact.dtypes import Array
from furiosa_llm.runtime.artifact.manifest import OutputInfo


def scores_output(outputs: Iterable[OutputInfo]) -> OutputInfo:
    """The output of a decoder that has the scores."""
    return next(info for info in outputs if info.role == "logits")


def by_position(info: OutputInfo, scores: Array, batch: int) -> Array:
    """`scores`, the output `info`, as `[batch, positions, vocabulary]`; the model may give the last position's only."""
    place = vocabulary_dim(info.shape)
    rest = [*info.shape[:place], *info.shape[place + 1 :]]
    moved = np.moveaxis(scores, place, -1)
    if len(rest) == 2 and (rest[0] == "sequence" or rest[1] == "batch"):
        moved = moved.swapaxes(0, 1)
    return moved.reshape(batch, -1, moved.shape[-1])
