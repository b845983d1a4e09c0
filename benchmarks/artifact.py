"""What an artifact costs to write and to check, on models of 2 to 16 GB: `python -m benchmarks.artifact --help`."""

from __future__ import annotations

import contextlib
import filecmp
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import click
from rich.console import Console

from benchmarks.artifacts import FOLDER, Finished, run_measured
from benchmarks.bars import Bar, show
from fixtures.filled import external_ranges, require_space
from fixtures.large import MODELS, write_twin
from furiosa_llm.example.errors import ExampleModelError

TENSOR_PARALLEL_SIZE = 8
ROUNDS = 3
_BASE_NBYTES, _TIMES_LARGEST = 300e6, 1.2
_SLOWDOWN = 1 / 0.6
_GROWTH = 0.02
"""Of peak memory, as a share of what the model is larger: the graph of more layers, and none of their weights."""
_BUILT_TWICE = 2
"""Gigabytes of the models whose artifacts are compared with a second build."""
_COUNTED_AT_LEAST = 0.99
"""Of a model's bytes; a few of a file pad its tensors."""
_LOADS = 5
_COMMAND = "import sys; from furiosa_llm.cli.main import main; main()"
_OPEN = """
import sys, time
from pathlib import Path
from furiosa_llm.runtime.artifact.reader import open_artifact
started, used = time.monotonic(), time.process_time()
open_artifact(Path(sys.argv[1]), full=sys.argv[2] == "full")
print(time.monotonic() - started, time.process_time() - used)
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """A model on disk, and what its bars are drawn from."""

    kind: str
    gigabytes: int
    model: Path
    nbytes: int
    """Of all its files."""
    largest_nbytes: int
    """Of one tensor."""

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.kind}, {self.gigabytes} GB"


def bars() -> Iterator[Bar]:
    """The bars of the smallest models, which take a few minutes."""
    yield from measured((2,), ("fp32", "int4"), rounds=ROUNDS)


def measured(sizes: Sequence[int], kinds: Sequence[str], *, rounds: int) -> Iterator[Bar]:
    """The bars of each model of these sizes and kinds; each is written, built and removed before the next.

    Raises fixtures.errors.SpaceError if the disk is too small for a model and two artifacts of it.
    """
    for kind in kinds:
        peaks: dict[int, float] = {}
        for gigabytes in sizes:
            if (kind, gigabytes) not in MODELS:
                continue
            twice = gigabytes == _BUILT_TWICE
            with _scratch(FOLDER / "artifact") as folder:
                require_space(folder, 3 * int(gigabytes * 1.05e9))  # the model and two artifacts
                subject = _subject(kind, gigabytes, folder / "model")
                yield from _memory_and_time(subject, folder, rounds, peaks)
                yield _reads(subject, folder)
                if twice:
                    yield _identical(subject, folder)
                shutil.rmtree(subject.model.parent)
                yield from _checks(subject, folder / "artifact", rounds)
        if len(peaks) > 1:
            beside = ", ".join(f"{size} GB: {peak / 1e6:.0f} MB" for size, peak in peaks.items())
            growth = (max(peaks.values()) - min(peaks.values())) / ((max(peaks) - min(peaks)) * 1e9)
            yield Bar(what=f"{kind}: growth of peak memory / of the model", figure=growth, limit=_GROWTH, beside=beside)


@contextlib.contextmanager
def _scratch(folder: Path) -> Iterator[Path]:
    """An empty folder, gone afterwards."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def _subject(kind: str, gigabytes: int, folder: Path) -> Subject:
    """Written by a process of its own: what starts a build must be small, or it counts as the build's memory."""
    run_measured([sys.executable, "-m", "fixtures.large", kind, str(gigabytes), str(folder)])
    return Subject(
        kind=kind,
        gigabytes=gigabytes,
        model=folder / "model.onnx",
        nbytes=sum(file.stat().st_size for file in folder.iterdir()),
        largest_nbytes=max(r.nbytes for r in external_ranges(folder / "model.onnx")),
    )


def _memory_and_time(subject: Subject, folder: Path, rounds: int, peaks: dict[int, float]) -> Iterator[Bar]:
    """Builds and copies of the same bytes, alternated, from a source that is not cached to files that do not exist.

    A build ends with everything on disk, so it is compared with a copy and a sync of that copy.
    """
    builds: list[Finished] = []
    copies, syncs = [], []
    for _ in range(rounds):
        copied, synced = _copy(subject.model.parent, folder / "copy")
        copies.append(copied)
        syncs.append(synced)
        shutil.rmtree(folder / "artifact", ignore_errors=True)
        _make_cold(subject.model.parent)
        builds.append(run_measured(build_command(subject.model, folder / "artifact")))
    peak = max(run.peak_rss_nbytes for run in builds)
    peaks[subject.gigabytes] = peak
    limit = (_BASE_NBYTES + _TIMES_LARGEST * subject.largest_nbytes) / 1e6
    beside = f"{rounds} builds; largest tensor {subject.largest_nbytes / 1e6:.0f} MB"
    yield Bar(what=f"{subject.name}: build's peak memory", figure=peak / 1e6, limit=limit, unit=" MB", beside=beside)
    seconds = statistics.median(run.seconds for run in builds)
    cpu = statistics.median(run.cpu_seconds for run in builds)
    on_disk, copied = statistics.median(syncs), statistics.median(copies)
    beside = (
        f"{rounds} rounds; build {seconds:.1f} s ({subject.nbytes / 1e6 / seconds:.0f} MB/s; {cpu:.1f} s on cores), "
        f"cp and sync {on_disk:.1f} s, cp alone {copied:.1f} s ({seconds / copied:.2f})"
    )
    what = f"{subject.name}: build time / cp and sync"
    yield Bar(what=what, figure=seconds / on_disk, limit=_SLOWDOWN, beside=beside)


def build_command(model: Path, output: Path, *options: str) -> list[str]:
    """A build in a process of its own."""
    return [sys.executable, "-c", _COMMAND, *_arguments(model, output), *options]


def _arguments(model: Path, output: Path) -> list[str]:
    return ["build", "-tp", str(TENSOR_PARALLEL_SIZE), str(model), str(output)]


def _copy(source: Path, target: Path) -> tuple[float, float]:
    """Seconds until `cp` ended, and until the copy was on disk too; the copy is removed."""
    _make_cold(source)
    started = time.monotonic()
    subprocess.run(["cp", "-r", str(source), str(target)], check=True)
    copied = time.monotonic() - started
    subprocess.run(["sync", *map(str, target.iterdir())], check=True)
    synced = time.monotonic() - started
    shutil.rmtree(target)
    return copied, synced


def _make_cold(folder: Path) -> None:
    """Nothing left to write, and no file of `folder` in the page cache."""
    os.sync()
    for file in folder.iterdir():
        descriptor = os.open(file, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def _reads(subject: Subject, folder: Path) -> Bar:
    """What a build reads, less what the build of a model of a few megabytes and as many layers reads besides it.

    Infinite if the weights were mapped, or if less was read than there is: then what was read was not counted.
    """
    small = write_twin(subject.kind, subject.gigabytes, folder / "twin")
    small_nbytes = sum(file.stat().st_size for file in small.parent.iterdir())
    besides = _counted(small, folder).nbytes_read - small_nbytes
    found = _counted(subject.model, folder)
    ratio = (found.nbytes_read - besides) / subject.nbytes
    beside = f"read {found.nbytes_read / 1e6:.1f} MB, of which {besides / 1e6:.1f} MB are not the model's"
    if found.mapped:
        ratio, beside = float("inf"), f"{', '.join(found.mapped)} mapped, its reads cannot be counted"
    elif ratio < _COUNTED_AT_LEAST:
        ratio, beside = float("inf"), f"{beside}: less than the model has, so not all was counted"
    return Bar(what=f"{subject.name}: bytes read / model bytes", figure=ratio, limit=1.01, beside=beside)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Counted:
    nbytes_read: int
    mapped: list[str]


def _counted(model: Path, folder: Path) -> _Counted:
    output, result = folder / "counted", folder / "counted.json"
    command = [sys.executable, "-m", "benchmarks.counted", str(model.parent), str(result)]
    run_measured([*command, *_arguments(model, output)])
    shutil.rmtree(output)
    return _Counted(**json.loads(result.read_text()))


def _identical(subject: Subject, folder: Path) -> Bar:
    """Files that differ between two builds with other numbers of workers, hash seeds, places and times."""
    one, other = outputs = (folder / "one" / "artifact", folder / "another-place")
    shutil.rmtree(folder / "artifact")
    for output, workers, seed in zip(outputs, ("1", "4"), ("1", "2"), strict=True):
        command = build_command(subject.model, output, "--workers", workers)
        run_measured(["env", f"PYTHONHASHSEED={seed}", *command])
    names = sorted({file.name for output in outputs for file in output.iterdir()})
    _, different, missing = filecmp.cmpfiles(one, other, names, shallow=False)
    shutil.rmtree(one)
    other.rename(folder / "artifact")
    what = f"{subject.name}: files that differ between two builds"
    beside = f"of {len(names)}; 1 and 4 workers, two hash seeds, two places"
    return Bar(what=what, figure=len(different) + len(missing), limit=0, beside=beside)


def _checks(subject: Subject, artifact: Path, rounds: int) -> Iterator[Bar]:
    """What the reader's checks take, in processes of their own, imports left out."""
    seconds, used = zip(*(_open(artifact, "structure") for _ in range(_LOADS)), strict=True)
    cpu = statistics.median(used)
    beside = f"{_LOADS} processes, {min(seconds):.3f} to {max(seconds):.3f}; {cpu:.3f} s on a core"
    what = f"{subject.name}: structural check"
    yield Bar(what=what, figure=statistics.median(seconds), limit=0.2, unit=" s", beside=beside)
    files = [str(file) for file in artifact.iterdir()]
    nbytes = sum(file.stat().st_size for file in artifact.iterdir())
    _open(artifact, "full")  # whatever fits is in the page cache then, for both
    pairs = [(_open(artifact, "full")[0], run_measured(["sha256sum", *files]).seconds) for _ in range(rounds)]
    ours, theirs = map(statistics.median, zip(*pairs, strict=True))
    beside = f"{rounds} rounds; {nbytes / 1e6 / ours:.0f} MB/s, sha256sum {nbytes / 1e6 / theirs:.0f} MB/s"
    yield Bar(what=f"{subject.name}: full check / sha256sum", figure=ours / theirs, limit=2, beside=beside)


def _open(artifact: Path, how: str) -> tuple[float, float]:
    """Seconds, and seconds on a core."""
    seconds, used = run_measured([sys.executable, "-c", _OPEN, str(artifact), how]).output.split()
    return float(seconds), float(used)


@click.command()
@click.option("--sizes", default="2,8,16", show_default=True, help="Gigabytes, of 2, 8 and 16.")
@click.option("--kinds", default="fp32,int4,exported", show_default=True, help="Of fp32, int4 and exported.")
@click.option("--rounds", default=ROUNDS, show_default=True, help="Builds and copies of each model, alternated.")
def main(sizes: str, kinds: str, rounds: int) -> None:
    """Measure every bar of the artifact on models of the given sizes and kinds, one after the other.

    Takes disk for a model and its artifact, three times the largest size, and leaves nothing.
    """
    known_kinds, known_sizes = ({str(part) for part in parts} for parts in zip(*MODELS, strict=True))
    if not set(kinds.split(",")) <= known_kinds or not set(sizes.split(",")) <= known_sizes:
        raise click.BadParameter(f"got sizes {sizes} and kinds {kinds}; see --help for those there are")
    found = measured([int(size) for size in sizes.split(",")], kinds.split(","), rounds=rounds)
    try:
        kept = show(_told(found), Console(width=180))
    except ExampleModelError as error:
        click.echo(f"error: {error}", err=True)
        kept = False
    sys.exit(0 if kept else 1)


def _told(found: Iterable[Bar]) -> Iterator[Bar]:
    """The bars, each told as it comes: the table is an hour away."""
    for bar in found:
        click.echo(f"{bar.what}: {bar.figure:.4g}{bar.unit} ({bar.beside})", err=True)
        yield bar


if __name__ == "__main__":
    main(prog_name="python -m benchmarks.artifact")
