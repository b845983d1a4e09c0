"""Placements, the search over them, calibration, and the errors that answers are given with."""

from __future__ import annotations

import dataclasses

import pytest

from furiosa_llm.simulate.believed import belief, outside
from furiosa_llm.simulate.errors import LoadError, PlacementError
from furiosa_llm.simulate.placement import Placement
from furiosa_llm.simulate.question import (
    Setting,
    answer,
    calibrated,
    fewest_cards,
    front,
    placed,
    placements,
    search,
)


def test_every_placement_uses_all_cards(setting: Setting) -> None:
    found = list(placements(setting.device, 4, 32))
    assert len(found) == len(set(found)) == 21
    assert all(place.units == 32 for place in found)


def test_a_card_is_taken_whole(setting: Setting) -> None:
    assert placed(setting, 2, None, None, None) == Placement(tensor_parallel_size=8, data_parallel_size=2)
    assert placed(setting, 1, 4, None, None) == Placement(tensor_parallel_size=4, data_parallel_size=2)


def test_numbers_that_contradict_are_refused(setting: Setting) -> None:
    with pytest.raises(PlacementError, match="tp 8 x pp 2 x dp 1 is more than the 8 PEs of 1 card"):
        placed(setting, 1, 8, 2, None)
    with pytest.raises(PlacementError, match="no placement uses the 8 PEs of 1 card with tensor 3"):
        placed(setting, 1, 3, None, None)


def test_what_has_no_place_says_what_would(setting: Setting) -> None:
    long = dataclasses.replace(setting, input_len=400_000)
    with pytest.raises(PlacementError, match=r"one sequence has 400,652; it fits on 2 cards"):
        placed(long, 1, None, None, None)
    with pytest.raises(PlacementError, match="fits on no number of cards to 64: use smaller weights or shorter"):
        placed(dataclasses.replace(setting, input_len=1e12), 1, None, None, None)


def test_the_front_has_what_no_other_beats(setting: Setting) -> None:
    tried = list(search(setting, 2, None))
    best = front(tried)
    for one in best:
        assert not any(other.user_tps > one.user_tps and other.card_tps > one.card_tps for other in tried)
    assert {a.card_tps for a in best} >= {max(a.card_tps for a in tried)}


def test_the_fewest_cards_are_found(setting: Setting) -> None:
    found = fewest_cards(setting, setting.load("closed", 64), {"tpot": 40.0}, 4)
    assert found is not None
    assert found.cards == 2
    assert 1000 * found.estimate.tpot <= 40
    assert not any(one.keeps({"tpot": 40.0}) for one in search(setting, 1, [setting.load("closed", 64)]))
    assert fewest_cards(setting, setting.load("closed", 64), {"tpot": 1.0}, 2) is None


def test_calibration_gives_the_figure_back(setting: Setting) -> None:
    place = Placement(tensor_parallel_size=8)
    for metric, value in (("tpot", 20.0), ("ttft", 300.0)):
        found = answer(calibrated(setting, place, metric, value, 4), place, 1, setting.load("closed", 4)).estimate
        assert 1000 * getattr(found, metric) == pytest.approx(value, rel=1e-6)
    with pytest.raises(LoadError, match="no time of layers makes tpot 1 ms at 4 users: it is"):
        calibrated(setting, place, "tpot", 1.0, 4)


def test_figures_have_the_errors_that_were_measured() -> None:
    assert outside("rngd", "furiosa-llm", tp=8, pp=1, input_len=857, output_len=652) is None
    own = belief("rngd", "furiosa-llm", "tpot", outside=None)
    assert own.error is not None
    assert own.error < 0.05
    assert not own.extrapolated


def test_beyond_the_measurements_an_answer_is_extrapolated(setting: Setting) -> None:
    assert (
        outside("rngd", "furiosa-llm", tp=8, pp=1, input_len=9000, output_len=652)
        == "input_len 9000, measured at 857 to 1220"
    )
    assert (
        outside("l40s", "vllm", tp=1, pp=1, input_len=1, output_len=1) == "no measurement of this device and software"
    )
    for device, software in (("l40s", "vllm"), ("mine", "mine")):
        found = belief(device, software, "tpot", outside="no measurement of this device and software")
        assert found.extrapolated
        assert found.error is not None
        assert found.error > 0.05
    assert setting.beliefs(Placement(tensor_parallel_size=4))["tpot"].extrapolated
