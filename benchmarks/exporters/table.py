"""docs/exporters.md: a row for each trial, read again to see whether one has become worse."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace

from benchmarks.exporters.trial import Outcome
from benchmarks.exporters.trials import EXPORTERS, Trial

_TITLES = {
    "genai": "onnxruntime-genai's model builder",
    "optimum": "Optimum ONNX",
    "dynamo": "torch.onnx (dynamo), as transformers' own exporter calls it",
    "mobius": "mobius-onnx",
}
_HEADINGS = ("architecture", "options", "builds", "equal", "tokens", "proof", "bytes", "note")
_YES, _NO, _NONE = "yes", "no", "-"
_LENGTH = 160
_MORE_BYTES = 0.02
_NOT_EXPORTED = "not exported"
_SKIPPED = re.compile(r"custom or unsupported|not currently supported|Unknown model_type|Unrecognized model identifier")
"""What an exporter says of an architecture that it does not have."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A line of the table; the columns are words."""

    exporter: str
    architecture: str
    options: str
    builds: str
    equal: str = _NONE
    tokens: str = _NONE
    proof: str = _NONE
    bytes: str = _NONE
    note: str = ""

    @property
    def key(self) -> tuple[str, str, str]:
        """Which trial it is."""
        return self.exporter, self.architecture, self.options

    @property
    def exported(self) -> bool:
        """Whether there is a model."""
        return self.builds != _NOT_EXPORTED

    @property
    def sound(self) -> bool:
        """Whether it builds, runs equal, generates the same tokens where it generates any, and proves completely."""
        return _NO not in (self.builds, self.equal, self.tokens, self.proof) and self.exported


def not_exported(trial: Trial, error: str) -> Row | None:
    """The row of a trial that the exporter ended with `error`; None if the exporter does not have the architecture."""
    if _SKIPPED.search(error) and not trial.options:
        return None
    return _row(trial, builds=_NOT_EXPORTED, note=_cell(error))


def row_of(trial: Trial, outcomes: Sequence[Outcome]) -> Row:
    """The row of what was exported: of each column the worst outcome, of bytes the greatest of each number of PEs."""
    built = all(one.builds for one in outcomes)
    shares = {one.tp: max(o.share for o in outcomes if o.tp == one.tp) for one in outcomes}
    reasons = [reason for one in sorted(outcomes, key=lambda one: (one.builds, one.sound)) for reason in one.reasons]
    tokens = [one.tokens for one in outcomes if one.tokens is not None]
    return _row(
        trial,
        builds=_word(built),
        equal=_word(all(one.equal for one in outcomes)) if built else _NONE,
        tokens=_word(all(tokens)) if tokens and built else _NONE,
        proof=_word(all(one.proof for one in outcomes)) if built else _NONE,
        bytes=", ".join(f"{share:.2f}" for share in shares.values()) if built else _NONE,
        note=_cell(reasons[0]) if reasons else "",
    )


def _row(trial: Trial, **columns: str) -> Row:
    return replace(
        Row(exporter=trial.exporter, architecture=trial.architecture, options=trial.spelt, builds=_NO), **columns
    )


def _word(good: bool) -> str:
    return _YES if good else _NO


def _cell(text: str) -> str:
    """`text` in one cell, without folders of this machine."""
    plain = re.sub(r"\S*/(?=[\w.-]+/|[\w.-]+\.onnx)", "", " ".join(text.split())).replace("|", "/")
    return plain if len(plain) <= _LENGTH else plain[:_LENGTH].rstrip() + " ..."


def markdown(rows: Iterable[Row], versions: Mapping[str, str]) -> str:
    """The whole page."""
    found = sorted(rows, key=lambda row: row.key)
    exported = [row for row in found if row.exported]
    sound = [row for row in exported if row.sound]
    names = {row.architecture for row in exported}
    share = f"{100 * len(sound) / max(len(exported), 1):.1f}"
    lines = [_PROSE.format(sound=len(sound), exported=len(exported), share=share, architectures=len(names)), ""]
    lines += [f"* {name} {version}" for name, version in sorted(versions.items())]
    for exporter in EXPORTERS:
        own = [row for row in found if row.exporter == exporter]
        if own:
            lines += ["", f"## {exporter}", "", f"{_TITLES[exporter]}.", "", _line(_HEADINGS), _line(["---"] * 8)]
            lines += [_line([getattr(row, name) for name in _HEADINGS]) for row in own]
    return "\n".join(lines) + "\n"


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def read(text: str) -> dict[tuple[str, str, str], Row]:
    """The rows of a page that `markdown` made."""
    found, exporter = {}, ""
    for line in text.splitlines():
        if line.startswith("## "):
            exporter = line[3:]
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("| ") and len(cells) == len(_HEADINGS) and cells[0] not in (_HEADINGS[0], "---"):
            row = Row(exporter=exporter, **dict(zip(_HEADINGS, cells, strict=True)))
            found[row.key] = row
    return found


def read_versions(text: str) -> dict[str, str]:
    """The versions of a page that `markdown` made."""
    pairs = (line[2:].split() for line in text.splitlines() if line.startswith("* "))
    return {pair[0]: pair[1] for pair in pairs if len(pair) == 2}


def worse(old: Row, new: Row) -> list[str]:
    """In what a row has become worse."""
    found = [
        f"{field.name} was {getattr(old, field.name)}, is {getattr(new, field.name)}"
        for field in fields(Row)
        if field.name in ("builds", "equal", "tokens", "proof")
        and getattr(old, field.name) == _YES != getattr(new, field.name)
    ]
    before, after = (
        [float(share) for share in row.bytes.split(", ")] if row.bytes != _NONE else [] for row in (old, new)
    )
    if any(b > a + _MORE_BYTES for a, b in zip(before, after, strict=False)):
        found.append(f"bytes were {old.bytes}, are {new.bytes}")
    return found


_PROSE = """# What exporters' models become

Made by `make exporters`, and not by hand: small models with random weights of many architectures of transformers, made
from configurations, exported by each exporter that has the architecture, and split over 4 and 8 PEs. The command fails
if a row becomes worse than it is here.

**{sound} of {exported} exports ({share} %) of {architectures} architectures build, run equal and prove completely.**

* *builds*: `furiosa-llm build`; a refusal's reason is in the note. "not exported": the exporter failed, with its words.
* *equal*: `furiosa-llm verify` finds every output and state of prefill, decode and chunks equal to the unsplit model's.
* *tokens*: an engine's greedy tokens are those of a loop over the unsplit model; "-" for what generates none by itself.
* *proof*: the static proof is complete.
* *bytes*: of weights on a PE, of an even split's over 4 and over 8 PEs. Two key heads over 8 PEs are on each of 4 of
  them, and tables by position are whole, which weighs more in models this small.

A row is the worst of its files, if an exporter makes several. Versions:"""
