"""The figures of a plan, and what people are shown of them: the verdict and the rooms, or every figure and reason."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from rich import box
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from furiosa_llm.builder.lower.build import Build
from furiosa_llm.builder.lower.kernels import MissingKernel
from furiosa_llm.builder.lower.step_costs import StepCosts
from furiosa_llm.builder.lower.working_memory import WorkingMemory
from furiosa_llm.builder.plan.explain import Explained
from furiosa_llm.runtime.artifact.card import CARD_NBYTES, PE_NBYTES, PES_PER_CARD
from furiosa_llm.runtime.artifact.console import html, text
from furiosa_llm.runtime.artifact.units import counted, nbytes
from furiosa_llm.runtime.placement.deployments import Deployment
from furiosa_llm.runtime.placement.workload import Workload

SHOWN_CARDS = (1, 2, 3, 4, 8, 16, 32)
"""The numbers of cards in the table of rooms, beside the least that fits."""
SHOWN_BATCH = 16
_SHOWN_WEIGHTS = 3
_SHOWN_TYPES = 0.01
"""The least share of the bytes of a type that is named."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class CollectiveCost:
    """Equal collectives of one decoded token of one sequence."""

    kind: str
    parts: int
    """How many ranks take part."""
    nbytes: int
    """What the collective gives each rank."""
    count: int


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """How many sequences fit at once, with the number of stages that leaves the most room."""

    cards: int
    context: int
    sequences: int
    """All replicas together; 0 if the model does not fit."""
    pipeline_parallel_size: int
    data_parallel_size: int
    """Both are 0 if it does not."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SizePlan:
    """The plan for one tensor parallel size. Bytes are of one PE unless said otherwise."""

    tensor_parallel_size: int
    weight_nbytes: int
    replicated_nbytes: int
    """The weights that every PE holds alike."""
    padding_nbytes: int
    """The zeros that pad the weights, of all PEs together."""
    state_nbytes: int
    """KV cache at the workload's context and batch."""
    state_nbytes_per_token: int
    activation_nbytes: int | None
    """Values that wait between segments, in the larger of a decode and a prefill step; None if the program does not
    state their sizes."""
    working: WorkingMemory | None
    """The most bytes alive at once in those steps, also inside segments; None if the model does not take the workload's
    sizes. The engine does not admit requests by this number."""
    working_chunk: int | None
    """The largest of `CHUNKS`, up to the plan's, with which that is no more than a PE has; None if there is none."""
    collectives: tuple[CollectiveCost, ...]
    choices: tuple[Explained, ...]
    replicated: tuple[str, ...]
    """Ops that are replicated because no rule can split them, and why."""
    num_blocks: int
    """A pipeline stage is a run of blocks."""
    read_nbytes: tuple[int, int]
    """Weights that a decode step reads: at least, if all sequences choose the same experts, and at most."""
    floor_us: float
    """The time to read the least of them at the PE's memory bandwidth: with one stage no decode step is faster."""
    prefill_chunk_size: int
    """The chunk that was asked for, or else the largest of `CHUNKS` with which the fewest cards suffice."""
    fewest: Deployment | None
    """The deployment on the fewest cards that fits; None if none of those tried does."""
    longest: int
    """The most tokens of each of `SHOWN_BATCH` sequences on `fewest`, all replicas together; 0 without a cache. Where
    nothing fits, the most tokens with which the workload does on the most cards; 0 if it never does."""
    deployments: tuple[Deployment, ...]
    """One for each number of cards that was tried and that a topology takes."""
    rooms: tuple[Room, ...]
    """How many sequences fit at once, by cards and context; empty without a cache."""
    costs: StepCosts | None
    """What any step costs a PE, in the model's own types; None if not asked for, or for a model that takes no steps."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class ModelPlan:
    """What `furiosa-llm plan` shows; as text (`print`), and as tables in a notebook."""

    model: str
    num_nodes: int
    """Nodes of the normalised graph."""
    num_parameters: int
    """Elements of the model's floating point and quantised weights of two or more dimensions, and of vectors."""
    nbytes: int
    """Bytes of the model's weights."""
    dtypes: Mapping[str, int]
    """Bytes of the weights by their type, most first."""
    state_dtypes: tuple[str, ...]
    """The types of the caches."""
    max_sequence_length: int | None
    """The model's own limit; None if its files do not say."""
    workload: Workload
    plans: tuple[SizePlan, ...]
    compute: str | None
    """The type to compute in; None: the model's own."""
    missing_kernels: tuple[MissingKernel, ...]
    """What has no CPU kernel on this machine, computed in the model's own types."""

    builds: tuple[Build, ...] = dataclasses.field(compare=False)
    """The builds that `plans` describe, with plan and program; nothing of them is written."""

    def to_json(self) -> dict[str, Any]:
        """Plain values, for `--json`: all but the builds."""
        sizes = {"context": self.workload.max_model_len, "batch": self.workload.max_batch_size}
        values = dataclasses.asdict(dataclasses.replace(self, builds=()))
        del values["builds"]
        return {**values, "workload": sizes}

    def shown(self, *, explain: bool = False) -> Iterator[RenderableType]:
        """The verdict, then the rooms, or with `explain` everything, as rich shows it."""
        yield Text(_headline(self))
        yield from (Text(_verdict(self, size)) for size in self.plans)
        yield ""
        if explain:
            yield _figures(self)
            for size in self.plans:
                yield from ("", _choices(size))
            yield from ("", _deployments(self))
        else:
            yield _short_figures(self)
            for size in self.plans:
                if any(room.sequences for room in size.rooms):
                    yield from ("", _rooms(size))
        yield from (Text(warning) for size in self.plans if (warning := _working_warning(size)))

    def __repr__(self) -> str:
        sizes = ", ".join(f"tp {size.tensor_parallel_size}" for size in self.plans)
        work = self.workload
        return f"<ModelPlan of {self.model}: {sizes}, {work.max_batch_size} x {work.max_model_len} tokens>"

    def __str__(self) -> str:
        return text(*self.shown(), markup=False)

    def _repr_html_(self) -> str:
        return html(*self.shown(), markup=False)


def _headline(found: ModelPlan) -> str:
    count = found.num_parameters
    parameters = f"{count / 1e9:.2f} billion" if count > 1e9 else f"{count:,}"
    types = " and ".join(t for t, size in found.dtypes.items() if size >= _SHOWN_TYPES * found.nbytes)
    kept = f"; KV cache {' and '.join(found.state_dtypes)}" if found.state_dtypes else ""
    return f"{found.model}: {parameters} parameters, {nbytes(found.nbytes)} of {types}{kept}"


# -- the verdict ---------------------------------------------------------------------------------------------------


def _verdict(found: ModelPlan, size: SizePlan) -> str:
    tp, work = size.tensor_parallel_size, found.workload
    wanted = f"{counted(work.max_batch_size, 'sequence')} of {work.max_model_len:,} tokens"
    if not size.deployments:
        return f"Has no place at tp {tp}: the ranks of a stage share a card, which has {PES_PER_CARD} PEs."
    if size.fewest is None:
        most = size.deployments[-1]
        over = nbytes(most.pe_nbytes - PE_NBYTES)
        remedy = f"it fits with --context {size.longest}" if size.longest else "no context is short enough"
        return f"Does not fit on {_cards(most.cards)} at tp {tp}: {wanted} would need {over} more on a PE; {remedy}."
    where = f"Fits on {_cards(size.fewest.cards)} at tp {tp}"
    if not size.rooms:
        return f"{where}."
    full = max((r for r in size.rooms if r.cards == size.fewest.cards), key=lambda room: room.context)
    holds = f"{full.sequences:,} {'sequence' if full.sequences == 1 else 'sequences'} of {full.context:,} tokens"
    other = f", or {SHOWN_BATCH} of {size.longest:,}" if size.longest and full.sequences < SHOWN_BATCH else ""
    return f"{where}: {holds}{other}."


def _cards(count: int) -> str:
    return counted(count, "card")


def _short_figures(found: ModelPlan) -> Table:
    """What decides, every size side by side."""
    work = found.workload
    kept = f"KV cache, {work.max_batch_size} x {work.max_model_len:,}"
    rows: list[tuple[str, Callable[[SizePlan], str]]] = [
        ("weights, one stage", lambda p: nbytes(p.weight_nbytes)),
        *([(kept, lambda p: nbytes(p.state_nbytes))] if found.state_dtypes else []),
        ("activations", lambda p: f"{_known(p.activation_nbytes)}, prefill by {p.prefill_chunk_size}"),
        ("on the fewest cards", _placed),
        ("weights read for a token", lambda p: f"{_range(p.read_nbytes)}, {_time(p.floor_us)}"),
        ("collectives for a token", lambda p: "\n".join(_kinds(p.collectives)) or "none"),
    ]
    table = _plain(f"a PE, of {nbytes(PE_NBYTES)}", *(f"tp {p.tensor_parallel_size}" for p in found.plans))
    for name, figure in rows:
        table.add_row(name, *map(figure, found.plans))
    return table


def _placed(size: SizePlan) -> str:
    one = size.fewest
    if one is None:
        return "does not fit"
    return f"pp {one.pipeline_parallel_size}, dp {one.data_parallel_size}: {nbytes(one.pe_nbytes)}"


def _range(counts: tuple[int, int]) -> str:
    least, most = map(nbytes, counts)
    return least if least == most else f"{least} to {most}"


def _time(us: float) -> str:
    return f"{us:.3g} us" if us < 1000 else f"{us / 1000:.3g} ms"


def _kinds(costs: tuple[CollectiveCost, ...]) -> Iterator[str]:
    counts: Counter[str] = Counter()
    received: Counter[str] = Counter()
    for cost in costs:
        counts[cost.kind] += cost.count
        received[cost.kind] += cost.count * cost.nbytes
    for kind, count in counts.items():
        yield f"{count} {kind}, {nbytes(received[kind])}"


def _rooms(size: SizePlan) -> Table:
    """How many sequences fit at once, by cards and context."""
    contexts = sorted({room.context for room in size.rooms})
    table = _plain("cards", *(f"{context:,}" for context in contexts))
    table.title = f"tp {size.tensor_parallel_size}: sequences at once, by cards and tokens of each"
    table.title_justify, table.title_style = "left", ""
    for cards in sorted({room.cards for room in size.rooms}):
        found = {room.context: room for room in size.rooms if room.cards == cards}
        if any(room.sequences for room in found.values()):
            table.add_row(f"{cards}", *(f"{found[c].sequences:,}" if found[c].sequences else "-" for c in contexts))
    return table


def _plain(first: str, *others: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, header_style="")
    table.add_column(first)
    for name in others:
        table.add_column(name, justify="right")
    return table


def _working_warning(size: SizePlan) -> str | None:
    working = size.working
    if working is None or working.nbytes <= PE_NBYTES:
        return None
    remedy = f"use --chunk {size.working_chunk}" if size.working_chunk else "use a smaller --batch or --context"
    return (
        f"tp {size.tensor_parallel_size}: {nbytes(working.nbytes)} are alive inside a step, most of them "
        f"{working.value} ({working.op}), which neither these figures nor the engine count: {remedy}."
    )


# -- everything ----------------------------------------------------------------------------------------------------


def _figures(found: ModelPlan) -> Table:
    """Every size side by side."""
    work = found.workload
    table = Table(
        title=f"{found.num_nodes} nodes; context {work.max_model_len}, batch {work.max_batch_size}",
        title_justify="left",
    )
    table.add_column("one PE of tp")
    for plan_ in found.plans:
        table.add_column(str(plan_.tensor_parallel_size), justify="right")
    rows: list[tuple[str, Callable[[SizePlan], str]]] = [
        ("weights", lambda p: f"{nbytes(p.weight_nbytes)} ({p.weight_nbytes / max(found.nbytes, 1):.1%})"),
        ("  of them on every PE alike", lambda p: nbytes(p.replicated_nbytes)),
        ("  padding, all PEs together", lambda p: nbytes(p.padding_nbytes)),
        ("KV cache", lambda p: f"{nbytes(p.state_nbytes)} ({nbytes(p.state_nbytes_per_token)} a position)"),
        ("prefill by", lambda p: str(p.prefill_chunk_size)),
        ("activations", lambda p: _known(p.activation_nbytes)),
        ("most alive inside a step", lambda p: _known(None if p.working is None else p.working.nbytes)),
        ("all of it", lambda p: f"{nbytes(_all_nbytes(p))} of {nbytes(PE_NBYTES)}"),
        ("collectives per token", lambda p: "\n".join(map(_collective, p.collectives)) or "none"),
        ("weights read for a token", lambda p: _range(p.read_nbytes)),
        ("  at the PE's memory bandwidth", lambda p: f"{p.floor_us / 1000:.2f} ms"),
        ("blocks (pp is at most)", lambda p: str(p.num_blocks)),
    ]
    for name, figure in rows:
        table.add_row(name, *(figure(plan_) for plan_ in found.plans))
    return table


def _known(count: int | None) -> str:
    return "unknown" if count is None else nbytes(count)


def _all_nbytes(plan_: SizePlan) -> int:
    return plan_.weight_nbytes + plan_.state_nbytes + (plan_.activation_nbytes or 0)


def _collective(cost: CollectiveCost) -> str:
    return f"{cost.count} {cost.kind} over {cost.parts}, {nbytes(cost.nbytes)} each"


def _choices(plan_: SizePlan) -> Table:
    """Every group of dimensions: what, how and why."""
    size = plan_.tensor_parallel_size
    table = Table(title=f"tp {size}: what is split, and why", title_justify="left", show_lines=True)
    for name in ("dimension", "split", "why, and what was not taken"):
        table.add_column(name, overflow="fold")
    for choice in plan_.choices:
        table.add_row(_what(choice), _split(choice), _why(choice))
    for note in plan_.replicated:
        table.add_row("ops", "on every PE", note)
    return table


def _what(choice: Explained) -> str:
    shown = ", ".join(choice.weights[:_SHOWN_WEIGHTS])
    more = len(choice.weights) - _SHOWN_WEIGHTS
    names = f"{shown} and {more} more" if more > 0 else shown
    return f"{choice.role}: {choice.size} ({choice.count}x)\n{nbytes(choice.nbytes)}: {names}"


def _split(choice: Explained) -> str:
    if not choice.axes:
        return "whole"
    axes = ",".join(map(str, choice.axes))
    padded = f"\npadded to {choice.padded_size}" if choice.padded_size != choice.size else ""
    return f"over {choice.parts} PEs\n(mesh axes {axes}){padded}"


def _why(choice: Explained) -> str:
    lines = [choice.why]
    if choice.replicated_nbytes:
        lines.append(f"more than an even share of these weights: +{nbytes(choice.replicated_nbytes)} per PE")
    if choice.padding_nbytes:
        lines.append(f"padding: +{nbytes(choice.padding_nbytes)} per PE")
    refused: dict[str, list[int]] = {}
    for other in choice.alternatives:
        if other.parts > choice.parts:
            refused.setdefault(other.reason, []).append(other.parts)
    lines += [f"not over {', '.join(map(str, parts))}: {reason}" for reason, parts in refused.items()]
    return "\n".join(lines)


def _deployments(found: ModelPlan) -> Table:
    """What fits on how many cards."""
    table = Table(
        title=f"where it fits (RNGD: {PES_PER_CARD} PEs and {CARD_NBYTES // 10**9} GB a card)", title_justify="left"
    )
    for name in ("cards", "tp", "pp", "dp", "fullest PE", "fits", "room for more KV positions, each replica"):
        table.add_column(name, justify="right")
    for plan_ in found.plans:
        for d in plan_.deployments:
            over = "" if d.fits else f"no, {nbytes(d.pe_nbytes - PE_NBYTES)} too much"
            table.add_row(
                str(d.cards),
                str(plan_.tensor_parallel_size),
                str(d.pipeline_parallel_size),
                str(d.data_parallel_size),
                nbytes(d.pe_nbytes),
                "yes" if d.fits else over,
                f"{d.free_tokens:,}",
            )
        table.add_section()
    return table
