"""Tables and plots of runs."""

from __future__ import annotations

import html.parser
import json
import math
from pathlib import Path

import pytest

from furiosa_llm.bench import plots
from furiosa_llm.bench.load import Observed, Record
from furiosa_llm.bench.metrics import figures_of, latencies
from furiosa_llm.bench.plots import check_plot, plot
from furiosa_llm.bench.report import latency_rows, legend, report_json, throughput_rows
from furiosa_llm.bench.sweep import Load, Run, loads_of
from furiosa_llm.runtime.errors import InputError, UnsupportedError
from furiosa_llm.runtime.placement.topology import make_topology

OBSERVED = Observed(
    records=(
        Record(due=0.0, num_prompt=8, token_times=[0.5, 0.75], ended=0.75),
        Record(due=0.5, num_prompt=8, token_times=[1.0], ended=1.0),
    ),
    duration=1.0,
    max_concurrency=2,
)


def _run(load: Load, **sizes: int) -> Run:
    return Run(
        topology=make_topology(4, pipeline_parallel_size=sizes.get("pp", 1), data_parallel_size=sizes.get("dp", 1)),
        load=load,
        figures=figures_of(OBSERVED, {"ttft": 500.0}),
        latencies=latencies(OBSERVED),
    )


RUNS = [_run(Load()), _run(Load(request_rate=2.5, concurrency=4), pp=2, dp=3)]


def test_the_tables_hold_the_figures() -> None:
    head, rows = throughput_rows(RUNS)
    assert dict(zip(head, rows[0], strict=True)) == {
        "run": "1",
        "done": "2",
        "failed": "0",
        "s": "1.00",
        "at once": "2",
        "req/s": "2.00",
        "good req/s": "2.00",
        "output tok/s": "3.0",
        "total tok/s": "19.0",
    }
    head, rows = latency_rows(RUNS)
    assert head == ["run", "ms", "mean", "p50", "p90", "p99", "max"]
    assert [row[:3] for row in rows[:4]] == [
        ["1", "TTFT", "500.00"],
        ["1", "TPOT", "250.00"],
        ["1", "ITL", "250.00"],
        ["1", "E2EL", "625.00"],
    ]
    assert len(rows) == 8


def test_the_legend_tells_the_runs_apart() -> None:
    assert legend(RUNS)[:2] == ["1: tp 4 pp 1 dp 1, all at once", "2: tp 4 pp 2 dp 3, 2.5/s, 4 at once"]


def test_every_rate_goes_with_every_limit() -> None:
    assert loads_of([1.0, math.inf], [2]) == [Load(request_rate=1.0, concurrency=2), Load(concurrency=2)]
    assert loads_of([], [1, 2]) == [Load(concurrency=1), Load(concurrency=2)]
    assert loads_of([], []) == [Load()]


class _Page(html.parser.HTMLParser):
    """What a page loads from elsewhere, and the JSON in it."""

    def __init__(self) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.cells: list[str] = []
        self.report = ""
        self._within = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._within = tag
        self.loaded += [
            value for name, value in attrs if name in ("src", "href", "xlink:href") and value and value[0] != "#"
        ]

    def handle_data(self, data: str) -> None:
        if self._within == "script":
            self.report += data
        elif self._within == "td":
            self.cells.append(data)


def test_a_page_has_everything_in_it(tmp_path: Path) -> None:
    report = report_json(RUNS, artifact="</script><b>\x1b[31m", workload={"seed": 0}, machine={"cores": 2})
    plot(RUNS, tmp_path / "page.html", report)
    text = (tmp_path / "page.html").read_text("utf-8")
    page = _Page()
    page.feed(text)
    assert page.loaded == []
    assert json.loads(page.report) == report
    assert page.cells[1:3] == ["2", "0"]
    assert text.count("<svg") == 1
    assert "<b>" not in text
    assert "\x1b" not in text


@pytest.mark.parametrize(("suffix", "begin"), [(".png", b"\x89PNG"), (".svg", b"<?xml"), (".pdf", b"%PDF")])
def test_pictures(tmp_path: Path, suffix: str, begin: bytes) -> None:
    plot(RUNS[:1], tmp_path / f"plot{suffix}", {})
    assert (tmp_path / f"plot{suffix}").read_bytes().startswith(begin)


def test_json_has_no_infinite_number() -> None:
    report = report_json(RUNS, artifact="a", workload={}, machine={})
    assert [run["request_rate"] for run in report["runs"]] == ["inf", 2.5]
    assert [run["ttft"]["mean"] for run in report["runs"]] == [500.0, 500.0]
    json.dumps(report, allow_nan=False)


def test_a_plot_of_no_known_kind() -> None:
    with pytest.raises(InputError, match=r"--plot a.gif: found the suffix '.gif', expected one of .png, .svg"):
        check_plot(Path("a.gif"))


def test_plots_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plots, "find_spec", lambda _: None)
    with pytest.raises(UnsupportedError, match=r"pip install 'furiosa-llm-onnx\[plots\]'"):
        check_plot(Path("a.png"))
