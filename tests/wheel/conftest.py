"""The wheel's tests run from a copy of this folder, so the checkout's models are given as a path."""

from pathlib import Path

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--zoo", type=Path, required=True, help="the checkout's fixtures/zoo")


@pytest.fixture(scope="session")
def zoo(pytestconfig: pytest.Config) -> Path:
    """The folder of small exported models, one folder each."""
    path: Path = pytestconfig.getoption("--zoo")
    return path
