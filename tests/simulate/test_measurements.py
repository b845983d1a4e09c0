"""The published figures that predictions are compared with, and the picture of it."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from benchmarks.simulate.measurements import measurements
from benchmarks.simulate.parity import draw_parity


def test_blind_figures_are_none_of_those_that_were_fitted_to() -> None:
    known, blind = measurements()[0], measurements("blind")[0]
    assert len(blind) == 146
    assert all(row.source for row in blind)
    asked = {(*row.run, row.metric) for row in known}
    assert not [row.id for row in blind if (*row.run, row.metric) in asked]
    assert not {row.id for row in known} & {row.id for row in blind}


@pytest.mark.parametrize(
    ("group", "fitted", "left"),
    [(("mi300x", "vllm"), 4, 4), (("gaudi2", "optimum-habana"), 8, 8), (("l40s", "trt-llm-2023"), 19, 19)],
)
def test_a_group_that_is_fitted_to_half_of_the_blind_figures_keeps_the_other_half_of_each_model(
    group: tuple[str, str], fitted: int, left: int
) -> None:
    found_later = [row for row in measurements()[0] if row.group == group and row.id > 1000]
    blind = [row for row in measurements("blind")[0] if row.group == group]
    assert (len(found_later), len(blind)) == (fitted, left)
    assert {row.model for row in found_later} == {row.model for row in blind}
    assert not {row.run for row in found_later} & {row.run for row in blind}


def test_a_software_that_no_file_knows_is_the_device_files_first() -> None:
    assert {row.id: row.software for row in measurements("blind")[0]}[1040] == "vllm"  # TensorRT-LLM 0.15 on an L40S


def test_the_parity_plot_is_drawn(tmp_path: Path) -> None:
    rows = [row for row in measurements()[0] if row.fitted]
    held_out = {row.id: [0.1, math.nan] for row in rows[:20]}
    draw_parity(rows, held_out, tmp_path / "parity.png")
    assert (tmp_path / "parity.png").read_bytes().startswith(b"\x89PNG")
