"""An adapter of modules that a model has packed, or apart, adds the same to the same columns."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from furiosa_llm.runtime.artifact.adapters.files import Factors
from furiosa_llm.runtime.artifact.adapters.names import Module
from furiosa_llm.runtime.artifact.adapters.packed import found_as, pack, unpack
from furiosa_llm.runtime.artifact.errors import AdapterError

QKV: Module = ("layers", "0", "qkv_proj")
WIDTHS = {"q_proj": 8, "k_proj": 2, "v_proj": 4}
PARTS: list[Module] = [("layers", "0", name) for name in WIDTHS]


def factors(rank: int, width: int) -> Factors:
    random = np.random.default_rng([rank, width])
    return Factors(a=random.standard_normal((6, rank)), b=random.standard_normal((rank, width)))


@pytest.mark.parametrize("names", [("q_proj", "k_proj", "v_proj"), ("q_proj",), ("v_proj",), ("k_proj", "v_proj")])
def test_parts_lie_in_their_columns(names: Sequence[str]) -> None:
    given = {part: factors(rank, WIDTHS[part[-1]]) for rank, part in enumerate(PARTS, 1) if part[-1] in names}
    packed = pack(QKV, given, 14, "adapter")
    whole = [given[p].a @ given[p].b if p in given else np.zeros((6, WIDTHS[p[-1]])) for p in PARTS]
    assert np.allclose(packed.a @ packed.b, np.concatenate(whole, axis=1))
    assert packed.rank == sum(one.rank for one in given.values())


def test_columns_of_the_parts_are_cut_out() -> None:
    packed = factors(3, 14)
    found = unpack(packed, PARTS, list(WIDTHS.values()), "adapter")
    assert np.allclose(np.concatenate([found[p].a @ found[p].b for p in PARTS], axis=1), packed.a @ packed.b)
    with pytest.raises(AdapterError, match="14 features out, the model has q_proj of 8 and k_proj of 8"):
        unpack(packed, PARTS, [8, 8, 4], "adapter")


@pytest.mark.parametrize(
    ("widths", "message"),
    [
        ({"k_proj": 2}, "adds to k_proj of 2.*'layers.0.qkv_proj' of 14 features out: their columns there are not"),
        ({"q_proj": 8, "k_proj": 4, "v_proj": 4}, "columns there are not known; train it with q_proj and k_proj"),
        ({"q_proj": 14}, "columns there are not known"),
    ],
)
def test_columns_that_are_not_known(widths: dict[str, int], message: str) -> None:
    given: dict[Module, Factors] = {("layers", "0", name): factors(2, width) for name, width in widths.items()}
    with pytest.raises(AdapterError, match=message):
        pack(QKV, given, 14, "adapter")


@pytest.mark.parametrize(
    ("module", "found"),
    [(PARTS[0], {PARTS[0]: 1}), (PARTS[1], {QKV: 2}), (("1", "gate_up_proj"), {}), (("1", "down_proj"), {})],
)
def test_a_module_is_found_by_itself_first(module: Module, found: dict[Module, int]) -> None:
    known: dict[Module, int] = {PARTS[0]: 1, QKV: 2, ("1", "gate_proj"): 3}
    assert found_as(module, lambda name: known.get(name)) == found
