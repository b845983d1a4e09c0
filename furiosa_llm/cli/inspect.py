"""`furiosa-llm inspect`: what an artifact holds, on one screen or as JSON."""

from __future__ import annotations

import dataclasses
import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import click
from rich.table import Table

from furiosa_llm.cli.command import command
from furiosa_llm.cli.options import ENGINE, option, working
from furiosa_llm.cli.output import JSON, echo_json
from furiosa_llm.cli.terminal import Console, cell, line
from furiosa_llm.runtime.artifact.units import counted, nbytes
from furiosa_llm.runtime.errors import InputError, UnsupportedError

if TYPE_CHECKING:
    from furiosa_llm.runtime.artifact.manifest import InputInfo, OutputInfo
    from furiosa_llm.runtime.artifact.tools.inspection import (
        BlockSummary,
        Inspection,
        ReplicatedTensor,
    )
    from furiosa_llm.runtime.runners.batch_invariance import BatchInvariance

T = TypeVar("T")

_SHOWN_SPLITS = 8
_SHOWN_BLOCKS = 5
_SHOWN_REPLICATED = 3
_SHOWN_FILES = 4
_SHOWN_DIGITS = 16
_SHOWN_LENGTH = 60


@command()
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option(
    "--this-machine", is_flag=True, help="Probe also whether bits depend on the batch, with this machine's kernels."
)
@click.option("--mapped", is_flag=True, help="With --this-machine: for weights that are left in their file.")
@option("compute", ENGINE, help="With --this-machine: the type to compute in, float32.  [default: the model's]")
@JSON
def inspect(artifact: Path, this_machine: bool, mapped: bool, compute: str | None, as_json: bool) -> None:
    """Show what ARTIFACT holds: the model, the split, memory, collectives, files, origin, and whether it is verified.

    Its structure is checked, its weights are not read, but for --this-machine, which runs one layer of each kind.
    """
    given = "--mapped" if mapped else "--compute"
    if (mapped or compute is not None) and not this_machine:
        raise InputError(f"{given} goes with --this-machine; give both, or none")
    from furiosa_llm.runtime.artifact.composite import is_composite

    if is_composite(artifact):
        if this_machine:
            raise UnsupportedError(
                f"--this-machine: {artifact} is an encoder-decoder, which runs one request at a time"
            )
        _inspect_composite(artifact, as_json=as_json)
        return
    with working():
        from furiosa_llm.runtime.artifact.tools.inspection import inspect_artifact

        found = inspect_artifact(artifact)
        probed = _probe(artifact, found, mapped, compute) if this_machine else None
    if as_json:
        shown = found.to_json()
        if probed is not None:
            shown["this_machine"] = dataclasses.asdict(probed) | {"invariant": probed.invariant}
        echo_json(shown)
    else:
        _print(found, probed)


def _probe(folder: Path, found: Inspection, mapped: bool, compute: str | None) -> BatchInvariance:
    if found.model.task != "decoder":
        raise UnsupportedError(f"--this-machine: {folder} is an encoder, which runs one request at a time")
    from furiosa_llm.runtime.artifact.compute import computing
    from furiosa_llm.runtime.artifact.reader import open_artifact
    from furiosa_llm.runtime.runners.batch_invariance import probe_batch_invariance

    return probe_batch_invariance(computing(open_artifact(folder), compute), mapped=mapped)


def _inspect_composite(folder: Path, *, as_json: bool) -> None:
    with working():
        from furiosa_llm.runtime.artifact.composite import open_composite
        from furiosa_llm.runtime.artifact.composite_manifest import KIND
        from furiosa_llm.runtime.artifact.tools.inspection import inspect_artifact

        composite = open_composite(folder, full=False)
        parts = {name: inspect_artifact(folder / name) for name in composite.parts}
    manifest = composite.manifest
    if as_json:
        shown = {"composite": manifest.to_json(), "digest": composite.digest}
        shown["parts"] = {name: found.to_json() for name, found in parts.items()}
        echo_json(shown)
        return
    line(
        f"{manifest.name}: {KIND}, begins with token {manifest.decoder_start_token_id}, ends at "
        f"{', '.join(map(str, manifest.eos_token_ids))}; {manifest.hidden.output} of the encoder is "
        f"{manifest.hidden.input}; {counted(len(manifest.states), 'state')}; digest {composite.digest[:16]}..."
    )
    for found in parts.values():
        _print(found)


def _print(found: Inspection, probed: BatchInvariance | None = None) -> None:
    title = f"{found.model.name}: {found.model.task}, over {math.prod(found.mesh)} PEs {list(found.mesh)}"
    table = Table(title=cell(title), title_justify="left", show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for key, value in _rows(found):
        table.add_row(cell(key), cell(value))
    for key, value in _on_this_machine(probed) if probed is not None else ():
        table.add_row(cell(key), cell(value))
    Console().print(table, crop=False)


def _on_this_machine(probed: BatchInvariance) -> Iterator[tuple[str, str]]:
    yield "bits here", str(probed)
    for one in probed.differences:
        rows = ", ".join(map(str, one.rows))
        yield "differs", f"{one.op}, {counted(one.nodes, 'node')}, most in {_shortened(one.node)}: rows {rows}"
    cut = "as the whole" if probed.chunks else "not quite as the whole: prefix caching may change last bits"
    yield "chunks here", f"a prompt that is cut is computed {cut}"
    if not probed.invariant:
        yield "remedy", "none" if probed.companions is None else "batch_invariant=True, --batch-invariant"


def _rows(found: Inspection) -> Iterator[tuple[str, str]]:
    """The lines of the table: what each is about, and what is to be said."""
    yield "limits", _limits(found)
    yield "inputs", _values(found.inputs)
    yield "outputs", _values(found.outputs)
    if found.states:
        yield "states", _states(found)
    yield from _memory(found)
    yield "collectives", _collectives(found)
    for split in found.splits[:_SHOWN_SPLITS]:
        padded = f", padded to {split.padded_size}" if split.padded_size != split.size else ""
        what = f"{split.role}, {split.size} over {split.parts} PEs{padded} ({split.count}x)"
        yield "split", f"{what}: {_shortened(split.where)}"
    yield from _more(found.splits, _SHOWN_SPLITS, "split")
    yield "replicated", _replicated(found.replicated)
    if found.attention is not None and (found.attention.fused or found.attention.left):
        yield "attention", f"{found.attention.fused} fused, {len(found.attention.left)} left as they are"
    for note in found.notes[:1]:
        yield "note", note
    yield from _more(found.notes, 1, "note")
    yield from _blocks(found)
    for file in sorted(found.files, key=lambda file: -file.nbytes)[:_SHOWN_FILES]:
        yield "file", f"{file.path}, {nbytes(file.nbytes)}"
    yield from _more(found.files, _SHOWN_FILES, "file", lambda file: file.nbytes)
    yield from _origin(found)
    yield "verification", str(found.verification)


def _more(
    items: Sequence[T], shown: int, noun: str, size: Callable[[T], int] | None = None
) -> Iterator[tuple[str, str]]:
    """A line for the items that are not shown."""
    left = len(items) - shown
    if left > 0:
        total = "" if size is None else f", {nbytes(sum(sorted(map(size, items))[:left]))}"
        yield noun, f"{left} more{total}; --json has all"


def _limits(found: Inspection) -> str:
    model = found.model
    length = "unknown length" if model.max_sequence_length is None else f"{model.max_sequence_length} tokens"
    vocabulary = "" if model.vocab_size is None else f", vocabulary of {model.vocab_size}"
    ends = f", ends at {', '.join(map(str, model.eos_token_ids))}" if model.eos_token_ids else ""
    return f"{length}{vocabulary}{ends}"


def _values(infos: Sequence[InputInfo | OutputInfo]) -> str:
    shown = [f"{info.name} {info.dtype} [{', '.join(map(str, info.shape))}]" for info in infos if info.role != "state"]
    return "; ".join(shown) or "states only"


def _states(found: Inspection) -> str:
    shapes = {info.name: f"{info.dtype} [{', '.join(map(str, info.shape))}]" for info in found.inputs}
    kinds = Counter((shapes[state.input], state.mode) for state in found.states)
    return "; ".join(f"{count} of {shape}, {mode.replace('_', ' ')}" for (shape, mode), count in kinds.items())


def _memory(found: Inspection) -> Iterator[tuple[str, str]]:
    weights, state = found.weights, found.state
    share = f" ({weights.pe_nbytes / weights.original_nbytes:.1%})" if weights.original_nbytes else ""
    whole = "nothing" if not weights.replicated_nbytes else nbytes(weights.replicated_nbytes)
    yield (
        "weights per PE",
        f"{nbytes(weights.pe_nbytes)} of {nbytes(weights.original_nbytes)}{share}, {whole} replicated",
    )
    padding = f", {nbytes(weights.padding_nbytes)} of them padding" if weights.padding_nbytes else ""
    yield "stored, all PEs", f"{nbytes(weights.stored_nbytes)}{padding}"
    if found.states:
        limit = "no limit known" if state.nbytes_at_limit is None else f"{nbytes(state.nbytes_at_limit)} at the limit"
        yield "state per PE", f"{nbytes(state.nbytes_per_token)} per token, {limit}"

    if found.float32 is not None:
        yield "in float32", f"{found.float32} (--compute float32)"


def _collectives(found: Inspection) -> str:
    lines = [
        f"{group.count} {group.kind} over {_over(found, group.axes)} PEs, {nbytes(group.nbytes_per_token)} a token"
        for group in found.collectives
    ]
    return "; ".join(lines) or "none"


def _over(found: Inspection, axes: Sequence[int]) -> int:
    return math.prod(found.mesh[axis] for axis in axes)


def _shortened(text: str) -> str:
    return text if len(text) <= _SHOWN_LENGTH else f"{text[: _SHOWN_LENGTH - 3]}..."


def _replicated(tensors: Sequence[ReplicatedTensor]) -> str:
    if not tensors:
        return "nothing"
    shown = [
        f"{_shortened(tensor.name)} {list(tensor.shape)} (read by {', '.join(tensor.readers) or 'nothing'})"
        for tensor in tensors[:_SHOWN_REPLICATED]
    ]
    left = len(tensors) - _SHOWN_REPLICATED
    return "; ".join(shown) + (f"; {left} smaller" if left > 0 else "")


def _blocks(found: Inspection) -> Iterator[tuple[str, str]]:
    from furiosa_llm.runtime.artifact.tools.inspection import alike

    runs = alike(found.blocks)
    for run in runs[:_SHOWN_BLOCKS]:
        yield "block" if len(run) == 1 else "blocks", f"{_block_names(run)}: {_block(run[0])}"
    left = sum(map(len, runs[_SHOWN_BLOCKS:]))
    if left:
        yield "blocks", f"{left} more; --json has all"


def _block_names(run: Sequence[BlockSummary]) -> str:
    return run[0].name if len(run) == 1 else f"{run[0].name} .. {run[-1].name}, {len(run)} alike"


def _block(block: BlockSummary) -> str:
    counts = f"{counted(block.nodes, 'node')}, {counted(block.collectives, 'collective')}"
    return f"{counts}, {nbytes(block.weight_nbytes)} of weights per PE"


def _origin(found: Inspection) -> Iterator[tuple[str, str]]:
    made = found.provenance
    libraries = ", ".join(f"{name} {version}" for name, version in made.libraries.items())
    yield "made by", f"{made.tool}" + (f" with {libraries}" if libraries else "")
    options = ", ".join(
        f"{name}={json.dumps(value)}" for name, value in made.options.items() if value not in (None, {}, [])
    )
    yield "options", options or "none"
    yield "source", f"sha256 {made.source_sha256[:_SHOWN_DIGITS]}..."
    yield "manifest", f"digest {found.digest[:_SHOWN_DIGITS]}..., {counted(found.num_nodes, 'node')}"
