"""What every test may use."""

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# tests/wheel tests an installed wheel, from outside the checkout: `make test-wheel`.
collect_ignore = ["wheel"]


@pytest.fixture(scope="session")
def zoo() -> Path:
    """The folder of small exported models, one folder each."""
    return ROOT / "fixtures" / "zoo"


@pytest.fixture(scope="session")
def graphs() -> Path:
    """The folder of full-size graphs without weights, one folder each."""
    return ROOT / "fixtures" / "graphs"
