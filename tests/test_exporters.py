"""The table of exporters: rows of outcomes, read again as they were written, and what makes one worse."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from benchmarks.exporters.architectures import ARCHITECTURES
from benchmarks.exporters.table import Row, markdown, not_exported, read, read_versions, row_of, worse
from benchmarks.exporters.trial import Outcome, models_in, try_model
from benchmarks.exporters.trials import TRIALS, Trial

TRIAL = Trial(exporter="genai", architecture="llama", options={"precision": "int4"})
GOOD = Outcome(tp=4, builds=True, proof=True, equal=True, tokens=True, share=1.04)
SOUND = row_of(TRIAL, [GOOD, dataclasses.replace(GOOD, tp=8, share=1.2)])


def test_a_row_is_the_worst_of_its_outcomes() -> None:
    assert (SOUND.builds, SOUND.equal, SOUND.tokens, SOUND.proof, SOUND.bytes) == ("yes",) * 4 + ("1.04, 1.20",)
    assert SOUND.sound
    row = row_of(TRIAL, [GOOD, dataclasses.replace(GOOD, tp=8, equal=False, reasons=("executor: off | by 1",))])
    assert (row.equal, row.proof, row.note, row.sound) == ("no", "yes", "executor: off / by 1", False)
    row = row_of(TRIAL, [GOOD, Outcome(tp=8, builds=False, reasons=("no rule for it",))])
    assert (row.builds, row.equal, row.bytes, row.note) == ("no", "-", "-", "no rule for it")


def test_what_an_exporter_does_not_have_is_no_row() -> None:
    plain = Trial(exporter="genai", architecture="bert")
    assert not_exported(plain, "NotImplementedError: The model is not currently supported.") is None
    row = not_exported(plain, "KeyError: 'rope_type'")
    assert row is not None
    assert (row.builds, row.exported, row.sound) == ("not exported", False, False)


def test_a_page_is_read_as_it_was_written() -> None:
    other = Row(exporter="mobius", architecture="gpt2", options="", builds="not exported", note="KeyError: 1")
    page = markdown([other, SOUND], {"torch": "2.13.0"})
    assert read(page) == {SOUND.key: SOUND, other.key: other}
    assert read_versions(page) == {"torch": "2.13.0"}
    assert "1 of 1 exports (100.0 %) of 1 architectures" in page


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({}, []),
        ({"note": "other words", "bytes": "1.05, 1.19"}, []),
        ({"equal": "no"}, ["equal was yes, is no"]),
        ({"builds": "not exported"}, ["builds was yes, is not exported"]),
        ({"bytes": "1.04, 1.25"}, ["bytes were 1.04, 1.20, are 1.04, 1.25"]),
    ],
)
def test_what_is_worse(change: dict[str, str], found: list[str]) -> None:
    assert worse(SOUND, dataclasses.replace(SOUND, **change)) == found
    assert worse(dataclasses.replace(SOUND, **change), SOUND) == []


def test_the_committed_table_has_rows_of_trials_that_there_are() -> None:
    """Of at least 25 architectures that build, run equal and prove completely."""
    rows = read((Path(__file__).parents[1] / "docs" / "exporters.md").read_text())
    assert rows.keys() <= {(trial.exporter, trial.architecture, trial.spelt) for trial in TRIALS}
    assert len({row.architecture for row in rows.values() if row.sound}) >= 25
    assert len({trial.name for trial in TRIALS}) == len(TRIALS)
    assert {trial.architecture for trial in TRIALS} == ARCHITECTURES.keys()


def test_merged_decoders_are_left_to_the_files_beside_them(tmp_path: Path) -> None:
    for name in ("decoder_model.onnx", "decoder_model_merged.onnx"):
        (tmp_path / name).touch()
    assert [path.name for path in models_in(tmp_path)] == ["decoder_model.onnx"]


def test_a_model_that_is_none_is_an_outcome(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"none")
    found = try_model(tmp_path / "model.onnx", 4, {})
    assert not found.builds
    assert "is not an ONNX model" in found.reasons[0]
