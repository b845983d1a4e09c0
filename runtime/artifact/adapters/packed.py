"""Modules that some models keep side by side in one product, and adapters for either form.

What an adapter adds to columns of a product is what it adds to a module of these columns alone, so that an adapter of
one form is one of the other form, too: exactly, with the ranks of the modules side by side.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import numpy as np

from furiosa_llm.runtime.artifact.adapters.files import Factors
from furiosa_llm.runtime.artifact.adapters.names import Module
from furiosa_llm.runtime.artifact.errors import AdapterError

_PARTS = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
"""Module -> the modules whose columns it has, in order."""
_PACKED = {part: packed for packed, parts in _PARTS.items() for part in parts}

_T = TypeVar("_T")


def found_as(module: Module, find: Callable[[Module], _T | None]) -> dict[Module, _T]:
    """What `find` knows of a module, else of the module that it is packed in, else of all modules packed in it."""
    for names in ((module,), packed_in(module), parts_of_packed(module)):
        found = {name: one for name in names if (one := find(name)) is not None}
        if found and len(found) == len(names):
            return found
    return {}


def packed_in(module: Module) -> tuple[Module, ...]:
    """The module that `module` may be packed in; none for most."""
    packed = _PACKED.get(module[-1]) if module else None
    return () if packed is None else ((*module[:-1], packed),)


def parts_of_packed(module: Module) -> tuple[Module, ...]:
    """The modules that may be apart in place of `module`, in their order; none for most."""
    return tuple((*module[:-1], part) for part in _PARTS.get(module[-1] if module else "", ()))


def pack(packed: Module, given: Mapping[Module, Factors], features: int, where: str) -> Factors:
    """The factors of a module of so many `features` out, by the factors of some of its parts.

    Raises AdapterError if these do not say in which columns they are.
    """
    parts = parts_of_packed(packed)
    widths = [given[part].b.shape[1] if part in given else None for part in parts]
    missing, rest = widths.count(None), features - sum(width or 0 for width in widths)
    ends = [at for at in (0, len(parts) - 1) if widths[at] is not None]
    if rest < 0 or (rest > 0) != (missing > 0) or (missing > 1 and not ends):
        shown = ", ".join(f"{part[-1]} of {width}" for part, width in zip(parts, widths, strict=True) if width)
        raise AdapterError(
            f"{where} adds to {shown}, which the model has in {'.'.join(packed)!r:.120} of {features} features out: "
            f"their columns there are not known; train it with {' and '.join(part[-1] for part in parts)}"
        )
    if missing:  # all that is missing lies between what is given and an end, or is one module
        first = widths.index(None)
        widths = [0 if width is None and at != first else width for at, width in enumerate(widths)]
        widths[first] = rest
    starts = itertools.accumulate((width or 0 for width in widths), initial=0)
    own = [(start, given[part]) for start, part in zip(starts, parts, strict=False) if part in given]
    return Factors(
        a=np.concatenate([factors.a for _, factors in own], axis=1),
        b=np.concatenate(
            [np.pad(f.b, ((0, 0), (start, features - start - f.b.shape[1]))) for start, f in own],
        ),
    )


def unpack(factors: Factors, parts: Sequence[Module], features: Sequence[int], where: str) -> dict[Module, Factors]:
    """The factors of each of `parts`, of so many `features` out; raises AdapterError if these are not all there are."""
    if sum(features) != factors.b.shape[1]:
        shown = " and ".join(f"{part[-1]} of {size}" for part, size in zip(parts, features, strict=True))
        raise AdapterError(
            f"{where} is of another base model: {factors.b.shape[1]} features out, the model has {shown}"
        )
    ends = list(itertools.accumulate(features, initial=0))
    return {
        part: Factors(a=factors.a, b=factors.b[:, start:stop])
        for part, (start, stop) in zip(parts, itertools.pairwise(ends), strict=True)
    }
