"""The simulated machine: cards of eight PEs each, and the vendor's strings for them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from furiosa_llm.runtime.artifact.card import FUSIBLE, PES_PER_CARD
from furiosa_llm.runtime.errors import DeviceError

MAX_CARDS = 1024
"""The most cards of a machine; their numbers are below it."""

_FORMS = "npu:0, npu:0:*, npu:0:3 or npu:0:0-3, several separated by commas"


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class PE:
    """One processing element: `index` (0 to 7) on the card `npu`."""

    npu: int
    index: int

    def __str__(self) -> str:
        return f"npu:{self.npu}:{self.index}"


def first_pes(count: int) -> tuple[PE, ...]:
    """The first `count` PEs, card after card."""
    return tuple(PE(npu=number // PES_PER_CARD, index=number % PES_PER_CARD) for number in range(count))


def parse_devices(devices: str | Sequence[str]) -> tuple[PE, ...]:
    """The PEs that device strings name, sorted by card and PE.

    `npu:0` and `npu:0:*` are all PEs of a card, `npu:0:3` one, and `npu:0:0-3` 1, 2, 4 or 8 aligned ones; several are
    separated by commas or are items of the sequence, in any order. Raises DeviceError for anything else, and for a PE
    that is named twice.
    """
    named_by: dict[PE, str] = {}
    for text in _items(devices):
        for pe in _parse(text):
            if pe in named_by:
                raise DeviceError(
                    f"Invalid device string: {pe} is given twice, by {named_by[pe]!r} and {text!r}; name each PE once"
                )
            named_by[pe] = text
    if not named_by:
        raise DeviceError(f"Invalid device string: no device in an empty list; give {_FORMS}")
    return tuple(sorted(named_by))


def format_pes(pes: Iterable[PE]) -> str:
    """The shortest string that `parse_devices` reads as `pes`, which are all different: `npu:0:0-3,npu:1`."""
    texts: list[str] = []
    for npu, group in groupby(sorted(pes), key=lambda pe: pe.npu):
        left = {pe.index for pe in group}
        while left:
            first = min(left)
            count = max(n for n in FUSIBLE if first % n == 0 and left.issuperset(range(first, first + n)))
            left.difference_update(range(first, first + count))
            texts.append(_run_text(npu, first, count))
    return ",".join(texts)


def _run_text(npu: int, first: int, count: int) -> str:
    if count == PES_PER_CARD:
        return f"npu:{npu}"
    return f"npu:{npu}:{first}" if count == 1 else f"npu:{npu}:{first}-{first + count - 1}"


def _items(devices: str | Sequence[str]) -> Iterator[str]:
    if not isinstance(devices, Sequence):
        raise DeviceError(
            f"Invalid device string: {devices!r:.80} is {type(devices).__name__}, not text or a list; give {_FORMS}"
        )
    for text in [devices] if isinstance(devices, str) else devices:
        if not isinstance(text, str):
            raise DeviceError(f"Invalid device string: {text!r:.80} is {type(text).__name__}, not text; give {_FORMS}")
        yield from (part.strip() for part in text.split(","))


def _parse(text: str) -> Iterator[PE]:
    kind, *places = (part.strip() for part in text.split(":"))
    if kind in ("cpu", "cuda"):
        raise DeviceError(
            f"Invalid device string: {text!r:.80}; the PEs of npus are simulated, on any machine: give {_FORMS}"
        )
    if kind != "npu" or not 1 <= len(places) <= 2:
        raise DeviceError(f"Invalid device string: {text!r:.80}; expected {_FORMS}")
    npu = _npu(places[0], text)
    for index in _indices(places[1] if len(places) == 2 else "*", text):
        yield PE(npu=npu, index=index)


def _npu(place: str, text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,4}", place) or int(place) >= MAX_CARDS:
        raise DeviceError(
            f"Invalid npu index: {place:.80} in {text!r:.80}; cards are numbered from 0 to {MAX_CARDS - 1}"
        )
    return int(place)


def _indices(place: str, text: str) -> range:
    if place == "*":
        return range(PES_PER_CARD)
    first, dash, last = (part.strip() for part in place.partition("-"))
    if not dash:
        index = _index(first, place, text)
        return range(index, index + 1)
    if not first:
        raise _invalid_index(place, text)
    start, stop = _index(first, first, text), _index(last, last, text) + 1
    if stop - start not in FUSIBLE or start % (stop - start):
        raise DeviceError(
            f"Invalid pe index range: {place:.80} in {text!r:.80}; a range is of 1, 2, 4 or 8 PEs and begins at a "
            f"multiple of that: 0-1, 4-7 or 0-7"
        )
    return range(start, stop)


def _index(digits: str, shown: str, text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,4}", digits) or int(digits) >= PES_PER_CARD:
        raise _invalid_index(shown, text)
    return int(digits)


def _invalid_index(place: str, text: str) -> DeviceError:
    return DeviceError(f"Invalid pe index: {place:.80} in {text!r:.80}; a card has {PES_PER_CARD} PEs, numbered from 0")
