"""What steps are given of the adapters of their rows."""

from __future__ import annotations

import gc

import numpy as np

from furiosa_llm.runtime.adapters.adapter import Adapter
from furiosa_llm.runtime.adapters.bank import AdapterBank
from furiosa_llm.runtime.artifact.adapters.graph import RANK, ROWS
from furiosa_llm.runtime.artifact.adapters.inputs import AdapterInputs
from furiosa_llm.runtime.artifact.manifest import InputInfo

_A = InputInfo(name="m.lora_A", dtype="FLOAT", shape=(3, RANK), layout=(None, None), role="other")
_B = InputInfo(name="m.lora_B", dtype="FLOAT", shape=(RANK, 2), layout=(None, None), role="other")
_ROWS = InputInfo(name=ROWS, dtype="FLOAT", shape=("batch", 1, RANK), layout=(None,) * 3, role="other")
INPUTS = AdapterInputs(
    infos=(_A, _B),
    base={"m.lora_A": np.zeros((3, 1), np.float32), "m.lora_B": np.zeros((1, 2), np.float32)},
    rows=_ROWS,
)
RANDOM = np.random.default_rng(0)


def adapter(key: int, rank: int) -> Adapter:
    arrays = {info.name: INPUTS.drawn(info, RANDOM, rank=rank) for info in (_A, _B)}
    return Adapter(key=key, name=str(key), arrays=arrays)


def test_each_row_gets_its_own() -> None:
    one, two = adapter(1, 2), adapter(2, 3)
    rows = [one, None, two, one]
    given = AdapterBank(INPUTS).of(rows)
    assert given.mask is not None
    assert given.beside.sizes == {RANK: 5}
    x = RANDOM.standard_normal((4, 1, 3)).astype(np.float32)
    found = (x @ given.beside.arrays["m.lora_A"] * given.mask) @ given.beside.arrays["m.lora_B"]
    for row, own in enumerate(rows):
        expected = 0 * found[row] if own is None else x[row] @ own.arrays["m.lora_A"] @ own.arrays["m.lora_B"]
        assert np.allclose(found[row], expected, atol=1e-6)


def test_adapters_stay_side_by_side_until_there_are_too_many_or_they_are_gone() -> None:
    bank, several = AdapterBank(INPUTS), [adapter(key, 1) for key in range(1, 10)]
    first = bank.of(several[:2]).beside
    assert bank.of(several[1:2]).beside is bank.of([None]).beside is first
    assert bank.of(several[2:9]).beside.spans.keys() == {2, 3, 4, 5, 6, 7, 8, 9}
    del several[2:8], first
    gc.collect()
    assert bank.of([adapter(10, 1)]).beside.spans.keys() == {2, 9, 10}


def test_apart_rows_have_what_they_have_alone() -> None:
    bank, one, two = AdapterBank(INPUTS, apart=True), adapter(1, 2), adapter(2, 3)
    bank.of([two])
    given = bank.of([one, one])
    assert not bank.mixes
    assert given.beside.arrays is one.arrays
    assert given.beside.sizes == {RANK: 2}
    assert given.mask is not None
    assert given.mask.tolist() == [[[1, 1]], [[1, 1]]]
    assert bank.of([None]).beside.arrays is INPUTS.base
