"""A plugin of pytest for a run in a scratch copy: is the product imported from there, and what became of the tests?"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

PACKAGES = ("furiosa_llm", "furiosa_llm.builder", "furiosa_llm.runtime", "tests.seeded_faults.inside")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--outcomes", metavar="FILE", help="where to write which tests failed, as JSON")


def pytest_configure(config: pytest.Config) -> None:
    """Ends the run if a package comes from anywhere but the folder that is tested."""
    for package in PACKAGES:
        spec = importlib.util.find_spec(package)
        place = None if spec is None or spec.origin is None else Path(spec.origin)
        if place is None or not place.is_relative_to(config.rootpath):
            pytest.exit(f"{package} is imported from {place}, expected from {config.rootpath}", returncode=3)
    file = config.getoption("--outcomes")
    if file is not None and not hasattr(config, "workerinput"):  # with several processes the first one hears of all
        config.pluginmanager.register(_Outcomes(Path(file)))


class _Outcomes:
    """Tests that failed, by their own assertions or by what they call; and what failed around them."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._found: dict[str, list[str]] = {"failed": [], "errors": []}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self._found["failed" if report.when == "call" else "errors"].append(report.nodeid)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self._found["errors"].append(report.nodeid)

    def pytest_sessionfinish(self) -> None:
        self._file.write_text(json.dumps(self._found))
