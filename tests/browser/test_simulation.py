"""The page that `simulate --html` writes, as readers have it: light and dark, wide and narrow."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import BrowserContext

from furiosa_llm.simulate.page import page
from furiosa_llm.simulate.placement import Placement
from tests.browser.conftest import DESKTOP, PHONE, Watched
from tests.simulate.conftest import llama_on_rngd, report_of

pytestmark = pytest.mark.browser

Contexts = Callable[..., tuple[BrowserContext, Watched]]


def written(folder: Path, stages: int = 2) -> str:
    file = folder / "page.html"
    place = Placement(tensor_parallel_size=8, pipeline_parallel_size=stages)
    report = dataclasses.replace(report_of(llama_on_rngd(), searched=True), placement=place)
    file.write_text(page(report), encoding="utf-8")
    return file.as_uri()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [DESKTOP, PHONE])
def test_everybody_can_read_it(context_of: Contexts, tmp_path: Path, scheme: str, size: tuple[int, int]) -> None:
    context, watched = context_of(size, color_scheme=scheme)
    shown = context.new_page()
    shown.goto(url := written(tmp_path, stages=1 if size == DESKTOP else 2))  # one stage has measured dots
    results = Axe().run(shown)
    assert results.violations_count == 0, results.generate_report()
    assert shown.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert watched.complaints == []
    assert watched.asked == [url]
