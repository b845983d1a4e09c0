"""The inputs of a model that reads whole prompts and keeps no state, found by their roles."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from furiosa_llm.runtime.artifact.dtypes import DTYPES, Array
from furiosa_llm.runtime.artifact.manifest import InputInfo


def prompt_feeds(
    infos: Sequence[InputInfo], rows: Sequence[Sequence[int]], type_ids: Sequence[Sequence[int]] | None = None
) -> dict[str, Array]:
    """The model's inputs for `rows`, filled up with zeros that the mask hides.

    `type_ids` say of which text each token is, where a row is of several.
    """
    longest = max(map(len, rows))
    tokens = np.zeros((len(rows), longest), dtype=np.int64)
    mask, types = np.zeros_like(tokens), np.zeros_like(tokens)
    for index, row in enumerate(type_ids or ()):
        types[index, : len(row)] = row
    for index, row in enumerate(rows):
        tokens[index, : len(row)] = row
        mask[index, : len(row)] = 1
    positions = np.broadcast_to(np.arange(longest), tokens.shape)
    arrays = {"token_ids": tokens, "attention_mask": mask, "position_ids": positions, "token_type_ids": types}
    feeds = {}
    for info in infos:
        array = arrays[info.role]
        feeds[info.name] = (array[:1] if info.shape[0] == 1 else array).astype(DTYPES[info.dtype].numpy)
    return feeds
