"""What a build did, and what people are shown of it: the closing table."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path

from rich.markup import escape
from rich.table import Table
from rich.text import Text

from furiosa_llm.builder.lower.kernels import MissingKernel
from furiosa_llm.runtime.artifact.compute import Float32Memory
from furiosa_llm.runtime.artifact.console import html, text
from furiosa_llm.runtime.artifact.units import nbytes

_SHOWN_REPLICATED = 3
_SHOWN_LEFT = 6
_MOSTLY_WHOLE = 1.3
"""Times what an even split would leave on a PE."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """How one group of factors is split."""

    role: str
    """The factors' name for people, as in `furiosa-llm plan`."""
    size: int
    count: int
    """How many factors (usually one per layer) play this part."""
    axes: tuple[int, ...]
    parts: int
    padded_size: int
    where: str
    """The weights that the factors occur in."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class BuildReport:
    """The result of a build, as text (`print`), and as tables in a notebook.

    Bytes are of one rank and one decoded token unless said otherwise.
    """

    artifact: str
    """Path of the folder that was written."""
    tensor_parallel_size: int
    weight_nbytes: int
    """Bytes of weights that each rank reads."""
    replicated_nbytes: int
    """The part of `weight_nbytes` that is the same on every rank."""
    padding_nbytes: int
    """Bytes of zeros that are stored for padding, of all ranks together."""
    model_nbytes: int
    """Bytes of the original model's weights."""
    stored_nbytes: int
    """Bytes of the weights files."""
    state_nbytes_per_token: int
    """KV cache, per rank and position."""
    collectives: Mapping[str, int]
    collective_nbytes: int
    """Payload that one rank receives for a decoded token."""
    decisions: tuple[Decision, ...]
    replicated: tuple[str, ...]
    """Weights that are on every rank, largest first, and why."""
    notes: tuple[str, ...]
    """Ops that were replicated because they have no better rule."""
    fused_attentions: int
    """How many attentions became one op with its cache."""
    attentions_left: tuple[str, ...]
    """A line for each attention that was left as it is, and why."""
    shortfalls: tuple[str, ...]
    """A line for each large weight that is whole, and for each split that takes many collectives, with the cause."""
    warnings: tuple[str, ...]
    """What will not work for want of a file beside the model."""
    faults: tuple[str, ...]
    """Where program and manifest alone do not prove that the split model computes the unsplit one; empty: they do."""
    missing_kernels: tuple[MissingKernel, ...]
    """What the program has no CPU kernels for on this machine; it may have them where it computes in float32."""
    float32: Float32Memory | None
    """What computing in float32 converts and takes; None if nothing is narrower."""
    num_nodes: int
    seconds: float
    peak_rss_nbytes: int
    parts: tuple[BuildReport, ...] = ()
    """For a composite artifact, the reports of its parts, which this report sums up."""

    def shown(self) -> Iterator[Table | Text]:
        """The closing table, or one for each part and what the parts have in common; all but the warnings."""
        yield from map(_closing_table, self.parts or (self,))
        if self.parts:
            num_own_notes = len(self.notes) - sum(len(part.notes) for part in self.parts)
            yield from (Text(f"note: {note}") for note in self.notes[:num_own_notes])
            names = ", ".join(Path(part.artifact).name for part in self.parts)
            stored = f"{nbytes(self.stored_nbytes)} of weights, {self.seconds:.1f} s"
            yield Text(f"{self.artifact}: {names} in one artifact, {stored}")

    def __repr__(self) -> str:
        each = f"{nbytes(self.weight_nbytes)} of {nbytes(self.model_nbytes)} on each PE"
        return f"<BuildReport of {self.artifact}: tp {self.tensor_parallel_size}, {each}>"

    def __str__(self) -> str:
        return text(*self._all())

    def _repr_html_(self) -> str:
        return html(*self._all())

    def _all(self) -> Iterator[Table | Text]:
        yield from self.shown()
        yield from (Text(f"warning: {warning}") for warning in self.warnings)


def _closing_table(report: BuildReport) -> Table:
    """What was built, per PE and per token."""
    table = Table(
        title=f"{report.artifact}: tensor parallel over {report.tensor_parallel_size} PEs", title_justify="left"
    )
    table.add_column("per PE")
    table.add_column("", overflow="fold")
    share = report.weight_nbytes / report.model_nbytes if report.model_nbytes else 0.0
    if share * report.tensor_parallel_size > _MOSTLY_WHOLE:
        cause = f": {report.shortfalls[0]}" if report.shortfalls else ""
        table.add_row("not well split", f"each PE has {share:.1%} of the weights{escape(cause)}")
    table.add_row("weights", f"{nbytes(report.weight_nbytes)} of {nbytes(report.model_nbytes)} ({share:.1%})")
    table.add_row("KV cache per token", nbytes(report.state_nbytes_per_token))
    counts = ", ".join(f"{count} {kind}" for kind, count in report.collectives.items()) or "none"
    table.add_row("collectives per token", f"{counts}: {nbytes(report.collective_nbytes)}")
    for decision in report.decisions:
        padded = f", padded to {decision.padded_size}" if decision.padded_size != decision.size else ""
        what = f"{decision.role}, {decision.size} over {decision.parts} PEs{padded} ({decision.count}x)"
        table.add_row(f"split: {what}", decision.where)
    shown = "; ".join(report.replicated[:_SHOWN_REPLICATED])
    more = len(report.replicated) - _SHOWN_REPLICATED
    rest = f"; {more} smaller" if more > 0 else ""
    table.add_row("replicated", f"{nbytes(report.replicated_nbytes)}: {shown}{rest}" if shown else "nothing")
    left = report.attentions_left
    if report.fused_attentions or left:
        table.add_row("attention", f"{report.fused_attentions} fused, {len(left)} left as they are")
    for reason in left[:_SHOWN_LEFT]:
        table.add_row("attention left", reason)
    if len(left) > _SHOWN_LEFT:
        table.add_row("attention left", f"{len(left) - _SHOWN_LEFT} more, see plan.attention in manifest.json")
    for missing in report.missing_kernels:
        table.add_row("no kernel here", escape(str(missing)))
    if report.float32 is not None:
        table.add_row("in float32", f"{report.float32} (--compute float32)")
    for note in (*report.notes, *map(escape, report.shortfalls[:_SHOWN_LEFT])):
        table.add_row("note", note)
    table.add_row("static proof", _proof(report))
    padding = f", {nbytes(report.padding_nbytes)} of them padding" if report.padding_nbytes else ""
    table.add_row("stored, all PEs", f"{nbytes(report.stored_nbytes)}{padding}")
    table.add_row("build", f"{report.seconds:.1f} s, peak memory {nbytes(report.peak_rss_nbytes)}")
    return table


def _proof(report: BuildReport) -> str:
    """Whether the program that was written proves itself."""
    if not report.faults:
        return "complete: program and manifest alone show where every value lies"
    return f"INCOMPLETE in {len(report.faults)} places, use `furiosa-llm verify`; the first: {report.faults[0]}"
