"""The page of a simulation: whole by itself, and what its charts show. `tests/browser/` looks at it in a browser."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import pytest

from furiosa_llm.simulate.charts import Axis
from furiosa_llm.simulate.page import page
from furiosa_llm.simulate.question import Setting
from tests.simulate.conftest import report_of

SVG = re.compile(r"<svg.*?</svg>", re.DOTALL)


def test_the_page_needs_nobody(setting: Setting) -> None:
    text = page(report_of(setting, model="<b>&"))
    assert "&lt;b&gt;&amp; on FuriosaAI RNGD" in text
    assert "<b>" not in text
    assert not re.search(r"https?://|<script|<link|url\(|@import", text)
    assert text == page(report_of(setting, model="<b>&"))


def test_every_chart_is_drawn(setting: Setting) -> None:
    charts = [ElementTree.fromstring(found) for found in SVG.findall(page(report_of(setting, searched=True)))]
    assert len(charts) == 5
    assert all(chart.get("aria-label") for chart in charts)
    numbers = [
        float(n) for chart in charts for e in chart.iter() for k, n in e.attrib.items() if k in ("cx", "cy", "y")
    ]
    assert all(-1 <= number <= 800 for number in numbers)


def test_the_causes_are_stacked_to_the_time(setting: Setting) -> None:
    text = page(report_of(setting))
    causes = ElementTree.fromstring(SVG.findall(text)[1])
    titles = [element.text or "" for element in causes.iter("title")]
    assert any(title.startswith("prompts of others: ") for title in titles)
    assert len(titles) % 9 == 0  # eight causes and prompts, for each number of users
    assert "of the time" in text  # how busy stages are


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (0.0, 71.3), (0.0, 6.6e9), (-0.6, 7.6), (0.0, 3e-4)])
def test_ticks_are_few_and_inside(low: float, high: float) -> None:
    ticks = list(Axis(name="x", low=low, high=high).ticks())
    assert 2 <= len(ticks) <= 7
    assert all(low <= tick <= high * (1 + 1e-9) for tick in ticks)
