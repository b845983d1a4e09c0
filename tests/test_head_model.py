"""The model of a cluster's head: fitted to batches that it made, and what it says of more hosts."""

from __future__ import annotations

import pytest

from benchmarks.head import Model, fitted, on_paper

HEAD = Model(batch=3e-4, stage=4e-5, row=2e-5, idle=1e-3)


def test_the_parts_are_found_again() -> None:
    batches = {(stages, rows): HEAD.seconds(stages, rows) for stages in (1, 2, 4) for rows in (1, 4, 16)}
    found = fitted(batches, 1e-3)
    for name in ("batch", "stage", "row", "idle"):
        assert getattr(found, name) == pytest.approx(getattr(HEAD, name))


def test_no_part_is_below_zero() -> None:
    assert fitted({(1, 1): 1e-3, (2, 1): 9e-4, (1, 16): 1e-3}, 0.0).stage == 0


def test_replicas_share_a_core() -> None:
    assert HEAD.cores(16, 4) == pytest.approx(4 * (3e-4 + 3 * 4e-5 + 16 * 2e-5) / 20e-3 + 16e-3)
    assert HEAD.most_replicas(4) == pytest.approx(4 / HEAD.cores(16, 4))
    said = {bar.what.partition(":")[0]: bar for bar in on_paper(HEAD)}
    assert said["16 hosts as 16 replicas of 1 stages"].kept
    assert said["256 hosts as 64 replicas of 4 stages"].beside == "3 heads behind a router"
    slow = {bar.what.partition(":")[0]: bar for bar in on_paper(Model(batch=2e-3, stage=0.0, row=0.0, idle=0.0))}
    assert not slow["16 hosts as 16 replicas of 1 stages"].kept
