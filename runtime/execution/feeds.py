"""The step inputs of a decoder, found by their roles: token ids, attention mask, positions, token types."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from furiosa_llm.runtime.artifact.dtypes import DTYPES, Array
from furiosa_llm.runtime.artifact.manifest import InputInfo
from furiosa_llm.runtime.errors import UnsupportedError

TokenIds = npt.NDArray[np.int64]

_SHAPES: dict[str, tuple[str, str]] = {
    "token_ids": ("batch", "sequence"),
    "attention_mask": ("batch", "total"),
    "position_ids": ("batch", "sequence"),
    "token_type_ids": ("batch", "sequence"),
}


class StepFeeds:
    """The arrays of a decoder's inputs other than states, kept between steps so that equal shapes reuse memory.

    Raises UnsupportedError for an input that a decoder cannot be fed from tokens alone.
    """

    def __init__(self, inputs: Sequence[InputInfo]) -> None:
        self._infos = [info for info in inputs if info.role != "state"]
        for info in self._infos:
            if _SHAPES.get(info.role) != info.shape:
                raise UnsupportedError(
                    f"input {info.name!r:.80} of role {info.role!r} and shape {list(info.shape)} cannot be made from "
                    f"token ids; use `furiosa-llm run` and give it as a tensor"
                )
        self._kept: dict[str, Array] = {}
        self._ones: dict[str, Array] = {}

    def update(
        self, token_ids: TokenIds, past: int | Sequence[int], *, cached: int | None = None
    ) -> Iterator[tuple[str, Array]]:
        """Writes the inputs of the step that adds `token_ids` [batch, sequence] to `past` tokens, one number or by row.

        Yields name and array of those whose array is another than in the last step. Where rows have unequal lengths
        the mask of a shorter one ends in zeros. The mask is of `cached` earlier positions, if not of all of them.
        """
        batch, sequence = token_ids.shape
        starts = np.broadcast_to(np.asarray(past, dtype=np.int64), (batch,))
        for info in self._infos:
            if info.role == "attention_mask":
                behind = starts if cached is None else np.full_like(starts, cached)
                yield info.name, self._mask(info, behind + sequence)
                continue
            array = self._kept.get(info.name)
            if array is None or array.shape != token_ids.shape:
                array = self._kept[info.name] = np.zeros(token_ids.shape, dtype=DTYPES[info.dtype].numpy)
                yield info.name, array
            if info.role == "token_ids":
                array[...] = token_ids
            elif info.role == "position_ids":
                array[...] = starts[:, None] + np.arange(sequence)

    def _mask(self, info: InputInfo, totals: TokenIds) -> Array:
        batch, total = totals.size, int(totals.max())
        if (totals == total).all():
            ones = self._ones.get(info.name)
            if ones is None or ones.size < batch * total:
                ones = self._ones[info.name] = np.ones(2 * batch * total, dtype=DTYPES[info.dtype].numpy)
            return ones[: batch * total].reshape(batch, total)
        return (np.arange(total) < totals[:, None]).astype(DTYPES[info.dtype].numpy)
