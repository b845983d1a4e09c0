"""The kernels that tests run on, and what is measured of them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from benchmarks.kernels import PACKING, ROWS, differences, products
from fixtures.processor import kernels

pytestmark = pytest.mark.kernels

Array = npt.NDArray[Any]
ROOT = Path(__file__).resolve().parents[1]
CANNOT = 75
ROUNDING = {"float32": 2e-6, "float16": 2e-3}


def test_other_kernels_than_those_that_are_asked_for_are_refused(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    (plugin,) = [one for one in request.config.pluginmanager.get_plugins() if hasattr(one, "refuse_other_kernels")]
    monkeypatch.setenv("EXPECTED_KERNELS", kernels())
    plugin.refuse_other_kernels()
    monkeypatch.setenv("EXPECTED_KERNELS", "vax")
    with pytest.raises(pytest.UsageError, match=f"chooses {kernels()} here, and EXPECTED_KERNELS says vax"):
        plugin.refuse_other_kernels()


@pytest.mark.slow
@pytest.mark.parametrize("wanted", ["avx2", "sse"])
def test_instruction_sets_are_hidden(wanted: str) -> None:
    program = "from fixtures.processor import kernels; print(kernels())"
    command = ["scripts/with-kernels.sh", wanted, sys.executable, "-c", program]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if found.returncode == CANNOT:
        pytest.skip("this processor or kernel cannot fault on CPUID")
    assert (found.returncode, found.stdout, found.stderr) == (0, f"{wanted}\n", "")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda count: 0.0, (0.0, 0.0)),
        (lambda count: 0.5 if count == 1 else 0.0, (0.25, 0.0)),
        (lambda count: 1.0 if count == 3 else 0.0, (0.0, 0.5)),
    ],
)
def test_differences_are_relative_and_by_the_number_of_rows(
    change: Callable[[int], float], expected: tuple[float, float]
) -> None:
    rows = np.linspace(-2, 1, ROWS)[:, None]
    assert differences(lambda start, stop: rows[start:stop] + change(stop - start)) == expected


def test_a_row_of_every_product_is_the_same_but_for_rounding() -> None:
    """Alone and among others, whatever the processor's kernels."""
    kinds = dict(products(64))
    assert len(kinds) > 10
    for kind, product in kinds.items():
        for packing in PACKING:
            run = product.runner(packing)
            assert max(differences(run)) <= ROUNDING[run(0, 1).dtype.name], (kind, packing)
