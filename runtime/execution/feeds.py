"""The step inputs of a decoder, found by their roles: token ids, attention mask, positions, token types."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from furiosa_llm.runtime.artifact.dtypes import DTYPES, Array
from furiosa_llm.runtime.artifact.manifest import LENGTH_ROLES, InputInfo
from furiosa_llm.runtime.errors import UnsupportedError

TokenIds = npt.NDArray[np.int64]


def is_fed(info: InputInfo) -> bool:
    """Whether an input can be made from token ids: its role says what of, and its dimensions are those of a step."""
    rows, positions = _dims(info.shape, ("batch",)), _dims(info.shape, ("sequence",))
    match info.role:
        case "token_ids" | "token_type_ids":
            return len(info.shape) == 2 and rows[0] and positions[1]
        case "position_ids" if len(info.shape) == 1:
            return info.shape[0] == "sequence"
        case "position_ids":
            front = all(isinstance(size, int) for size in info.shape[:-2])
            return len(info.shape) >= 2 and front and rows[-2] and positions[-1]
        case "attention_mask" if len(info.shape) > 1:
            added = len(info.shape) == 2 and np.issubdtype(DTYPES[info.dtype].numpy, np.floating)
            total = info.shape[-1] == "total" or (isinstance(info.shape[-1], int) and not added)
            front = all(rows[:-2][:1]) and all(isinstance(size, int) for size in info.shape[1:-2])
            return total and front and (positions[-2] or (len(info.shape) == 2 and rows[0]))
        case role:
            return role in LENGTH_ROLES and len(info.shape) <= 1 and all(rows)


def _dims(shape: Sequence[int | str], names: Sequence[str]) -> list[bool]:
    """Which dimensions have one of `names`, or a size of their own."""
    return [isinstance(size, int) or size in names for size in shape]


def is_of_each_row(info: InputInfo) -> bool:
    """Whether an input can say of each row of a step what is so of this row: where others are as long, it need not."""
    return info.role not in ("attention_mask", "position_ids") or "batch" in info.shape


class StepFeeds:
    """The arrays of a decoder's inputs other than states, kept between steps so that equal shapes reuse memory.

    Raises UnsupportedError for an input that a decoder cannot be fed from tokens alone.
    """

    def __init__(self, inputs: Sequence[InputInfo]) -> None:
        self._infos = [info for info in inputs if info.role != "state"]
        for info in self._infos:
            if not is_fed(info):
                counts = info.role == "other" and DTYPES[info.dtype].numpy in (np.int32, np.int64)
                role = f"--role {info.name}=past_length (sequence_length for new ones, total_length for all)"
                settled = f", or if it counts positions build with {role}" if counts else ""
                raise UnsupportedError(
                    f"input {info.name!r:.80} of role {info.role!r} and shape {list(info.shape)} cannot be made from "
                    f"token ids; use `furiosa-llm run` and give it as a tensor{settled}"
                )
        self._kept: dict[str, Array] = {}
        self._ones: dict[str, Array] = {}

    def update(
        self,
        token_ids: TokenIds,
        past: int | Sequence[int],
        *,
        lengths: Sequence[int] | None = None,
        cached: int | None = None,
    ) -> Iterator[tuple[str, Array]]:
        """Writes the inputs of the step that adds `token_ids` [batch, sequence] to `past` tokens, one number or by row.

        `lengths` are the new tokens of each row; what follows them in `token_ids` is padding. None: there is none.
        Yields name and array of those whose array is another than in the last step. Where rows have unequal lengths
        the mask of a shorter one ends in zeros. The mask is of `cached` earlier positions, if not of all of them.
        """
        batch, sequence = token_ids.shape
        starts = np.full(batch, past, dtype=np.int64)
        added = np.full(batch, sequence if lengths is None else lengths, dtype=np.int64)
        for info in self._infos:
            if info.role == "attention_mask":
                behind = starts if cached is None else np.full_like(starts, cached)
                yield info.name, self._mask(info, behind, added, sequence)
                continue
            if info.role in LENGTH_ROLES:
                number = {"past": starts, "sequence": added, "total": starts + added}
                found = number[LENGTH_ROLES[info.role]].astype(DTYPES[info.dtype].numpy)
                alike = np.full([1] * len(info.shape), found.max(), dtype=found.dtype)
                yield from self.keep(info.name, found if info.shape == ("batch",) else alike)
                continue
            array = self._kept.get(info.name)
            rows = batch if info.shape[-2:-1] != (1,) else 1
            shape = (*(int(size) for size in info.shape[:-2]), rows, sequence)[-len(info.shape) :]
            if array is None or array.shape != shape:
                array = self._kept[info.name] = np.zeros(shape, dtype=DTYPES[info.dtype].numpy)
                yield info.name, array
            if info.role == "token_ids":
                array[...] = token_ids
            elif info.role == "position_ids":
                array[...] = starts[: rows if array.ndim > 1 else 1, None] + np.arange(sequence)

    def keep(self, name: str, array: Array) -> Iterator[tuple[str, Array]]:
        """Writes `array` where the last one of this name is; yields it if that had another shape, or there was none."""
        kept = self._kept.get(name)
        if kept is None or kept.shape != array.shape:
            self._kept[name] = array
            yield name, array
        else:
            kept[...] = array

    def _mask(self, info: InputInfo, behind: TokenIds, added: TokenIds, sequence: int) -> Array:
        dtype, totals = DTYPES[info.dtype].numpy, behind + added
        batch, longest = totals.size, int(totals.max())
        size = info.shape[-1]
        total = size if isinstance(size, int) else longest
        if len(info.shape) > 2 or info.shape[0] == "sequence":
            return _square_mask(info, behind, sequence, total)
        if (totals == total).all():
            ones = self._ones.get(info.name)
            if ones is None or ones.size < batch * total:
                ones = self._ones[info.name] = np.ones(2 * batch * total, dtype=dtype)
            return ones[: batch * total].reshape(batch, total)
        return (np.arange(total) < totals[:, None]).astype(dtype)


def _square_mask(info: InputInfo, behind: TokenIds, sequence: int, total: int) -> Array:
    """A mask of new positions by all: true where one is seen, or what is added to scores."""
    dtype, front = DTYPES[info.dtype].numpy, info.shape[:-2]
    rows = behind if "batch" in front or (front and front[0] == len(behind)) else behind[:1]
    seen = np.arange(total) <= rows[:, None, None] + np.arange(sequence)[:, None]
    shape = [len(rows) if size == "batch" else int(size) for size in front]
    spread = seen.reshape(*(seen.shape[:1] if front else ()), *[1] * (len(front) - 1), sequence, total)
    found = np.broadcast_to(spread, (*shape, sequence, total))
    if not np.issubdtype(dtype, np.floating):
        return found.astype(dtype)
    return np.where(found, 0, np.finfo(dtype).min).astype(dtype)
