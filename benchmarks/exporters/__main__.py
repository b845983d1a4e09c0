"""`python -m benchmarks.exporters`: export, split, check, write docs/exporters.md; fail if a row got worse."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import click

from benchmarks.exporters.architectures import ARCHITECTURES
from benchmarks.exporters.install import ENVIRONMENTS, python_of
from benchmarks.exporters.table import Row, markdown, not_exported, read, read_versions, row_of, worse
from benchmarks.exporters.trial import Outcome, models_in, try_model
from benchmarks.exporters.trials import ENVIRONMENTS as ENVIRONMENT_OF
from benchmarks.exporters.trials import EXPORTERS, TRIALS, Trial

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "exporters.md"
MODELS = ENVIRONMENTS / "models"
_SIZES = (4, 8)


@click.command()
@click.option("--only", "names", multiple=True, help="Names of trials begin with this; may be repeated.")
@click.option("--again", is_flag=True, help="Export again what was exported before.")
def main(names: tuple[str, ...], again: bool) -> None:
    """Try exporters on small models; rows that are not tried stay as they are."""
    before = read(_page())
    chosen = [trial for trial in TRIALS if trial.name.startswith(names or ("",))]
    lost: list[str] = []
    for exporter in EXPORTERS:
        own = [trial for trial in chosen if trial.exporter == exporter]
        if not own:
            continue
        with _Exporter(exporter) as process:
            for trial in own:
                row = _tried(trial, process, again=again)
                if row is None:
                    continue
                lost += [f"{trial.name}: {text}" for text in worse(before.get(row.key, row), row)]
                print(trial.name, row.builds, row.equal, row.tokens, row.proof, row.bytes, row.note, flush=True)
                _write(row, process.versions)
    if lost:
        print("FAILED: worse than before:", *lost, sep="\n", file=sys.stderr)
        sys.exit(1)


def _write(row: Row, versions: Mapping[str, str]) -> None:
    """Puts the row in its place; other runs may write theirs at the same time."""
    with (ENVIRONMENTS / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        rows = {**read(_page()), row.key: row}
        PAGE.write_text(markdown(rows.values(), {**read_versions(_page()), **versions}))


def _page() -> str:
    return PAGE.read_text() if PAGE.exists() else ""


def _tried(trial: Trial, process: _Exporter, *, again: bool) -> Row | None:
    folder = MODELS.resolve() / trial.name
    error = process.export(trial, folder, again=again)
    if error is not None:
        return not_exported(trial, error)
    return row_of(trial, [_outcome(model, tp, trial) for model in models_in(folder) for tp in _SIZES])


def _outcome(model: Path, tp: int, trial: Trial) -> Outcome:
    """What becomes of the model, in a process of its own, so that whatever ends it is an outcome, too."""
    with ProcessPoolExecutor(1) as pool:
        try:
            return pool.submit(try_model, model, tp, dict(ARCHITECTURES[trial.architecture].dims)).result()
        except (BrokenProcessPool, Exception) as error:  # noqa: BLE001 - a crash is what the table is to show
            return Outcome(tp=tp, builds=False, reasons=(f"crash: {type(error).__name__}: {error}",))


class _Exporter(contextlib.AbstractContextManager["_Exporter"]):
    """A process in the environment of an exporter; see `benchmarks.exporters.export`."""

    def __init__(self, name: str) -> None:
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        self._process = subprocess.Popen(
            [python_of(ENVIRONMENT_OF[name]), "-m", "benchmarks.exporters.export", name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=environment,
        )
        self.versions: Mapping[str, str] = json.loads(next(self._lines()))

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def _lines(self) -> Iterator[str]:
        assert self._process.stdout is not None
        return iter(self._process.stdout)

    def export(self, trial: Trial, folder: Path, *, again: bool) -> str | None:
        """Exports into `folder`, unless the same versions did so before; returns what went wrong, if anything."""
        config = ARCHITECTURES[trial.architecture]
        asked = {"values": config.values, "options": trial.options, "versions": self.versions}
        noted = folder / "exported.json"
        if noted.exists() and not again:
            found = json.loads(noted.read_text())
            if found["asked"] == json.loads(json.dumps(asked)):
                return found["error"] and str(found["error"])
        shutil.rmtree(folder, ignore_errors=True)
        request = {"exporter": trial.exporter, "architecture": trial.architecture, "options": trial.options}
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({**request, "folder": str(folder)}) + "\n")
        self._process.stdin.flush()
        answer = json.loads(next(self._lines()))
        noted.write_text(json.dumps({"asked": asked, "error": answer["error"]}))
        return answer["error"] and str(answer["error"])


if __name__ == "__main__":
    main()
