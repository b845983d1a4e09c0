"""The page of a simulation: whole by itself, and what its charts show. `tests/browser/` looks at it in a browser."""

from __future__ import annotations

import dataclasses
import re
from xml.etree import ElementTree

import pytest

from furiosa_llm.simulate.charts import Axis
from furiosa_llm.simulate.page import page
from furiosa_llm.simulate.placement import Placement
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
    assert len(titles) % 10 == 0  # nine causes and prompts, for each number of users
    assert "of the time" in text  # how busy stages are


def test_what_was_measured_is_shown_beside_what_is_like_it(setting: Setting) -> None:
    def rings(asked: Setting) -> list[str]:
        place = Placement(tensor_parallel_size=8)
        report = dataclasses.replace(report_of(asked), placement=place, answers=[])
        causes = ElementTree.fromstring(SVG.findall(page(report))[1])
        return [e[0].text or "" for e in causes.iter("circle")]

    assert len(rings(setting)) == 8  # published TPOT of 1 to 107 users
    assert rings(setting)[0].startswith("measured: 15.71 ms, github.com/swsok/heteropilot")
    assert rings(dataclasses.replace(setting, input_len=4000)) == []
    assert rings(dataclasses.replace(setting, weights="fp8")) == []


def test_the_roofline_has_the_ops_below_it(setting: Setting) -> None:
    roofline = ElementTree.fromstring(SVG.findall(page(report_of(setting)))[4])
    names = {(e[0].text or "").partition(",")[0] for e in roofline.iter("circle")}
    assert names == {"products", "attention", "head"}
    steps = setting.steps(Placement(tensor_parallel_size=8))
    work, causes = steps.decode(16, 1000), steps.causes(steps.decode(16, 1000), 0)
    for flops, nbytes in steps.demands(work, 0).values():
        assert max(flops / steps.peak_flops(), nbytes / steps.peak_bandwidth()) < sum(causes.values())


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (0.0, 71.3), (0.0, 6.6e9), (-0.6, 7.6), (0.0, 3e-4)])
def test_ticks_are_few_and_inside(low: float, high: float) -> None:
    ticks = list(Axis(name="x", low=low, high=high).ticks())
    assert 2 <= len(ticks) <= 7
    assert all(low <= tick <= high * (1 + 1e-9) for tick in ticks)
