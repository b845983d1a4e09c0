"""Kill builds with SIGKILL at random moments: nothing may be left that loads and is wrong, and the next build is right.

    python -m tests.campaigns.kill_campaign --kills 50 --seed 1 [--command build|reshard] [--moment ...]

Every other build replaces an artifact. A third of them are killed at any time of their run, a third while they write
weights or later, a third before one of their operations on files (renames and removals among them, which take too
little time to be hit by chance; each is hit once before any is again). Afterwards the destination must not exist, or
open with every digest right and be, byte for byte, the artifact that was there or the one that a build gives that
nobody interrupts; and the same command, given again, must give the latter and leave nothing beside it. Ends with
status 1 if that was not so.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import hashlib
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fixtures.filled import fill
from fixtures.outline import write_outline
from furiosa_llm.example.llama.config import LlamaConfig
from furiosa_llm.runtime.artifact.errors import ArtifactError
from furiosa_llm.runtime.artifact.reader import open_artifact

CONFIG = LlamaConfig(
    vocab_size=16384,
    hidden_size=512,
    intermediate_size=2048,
    num_hidden_layers=4,
    num_attention_heads=16,
    num_key_value_heads=16,
    head_dim=32,
    max_position_embeddings=512,
    rms_norm_eps=1e-5,
    rope_theta=1e4,
    tie_word_embeddings=False,
)
"""134 MB in float32."""
MOMENTS = ("any", "writing", "operation")
_ATTEMPTS = 8
"""To hit a run before its end; each takes half the time of the one before for the longest that a run may take."""
_LIMIT = 120
"""Seconds that a command may take."""
_POLL = 0.001

Command = Callable[[Path, bool], list[str]]
"""The arguments of furiosa-llm that write an artifact to a folder, and replace what is there if so told."""
Tree = dict[str, str]
"""File name -> SHA-256."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """Of a run that nobody interrupts: seconds in all and from the first weights file on; operations on files."""

    total: float
    writing: float
    operations: dict[bool, int]
    """By whether an artifact is replaced."""


@dataclass(slots=True, kw_only=True)
class Tally:
    """What the kills left."""

    kills: collections.Counter[str] = field(default_factory=collections.Counter)
    """By moment."""
    left: collections.Counter[str] = field(default_factory=collections.Counter)
    """`absent`, `old` or `new` at the destination; `old gone` if one was to be replaced and is in its place no more."""
    violations: list[str] = field(default_factory=list)


class Campaign:
    """Kills `command` in `folder`, where `old` is an artifact to be replaced.

    `program` runs a command's arguments, `python -m` style; it is told the operation to be killed at, and the folder.
    """

    def __init__(
        self, folder: Path, command: Command, old: Path, *, seed: int, program: str = "tests.campaigns.killed_at"
    ) -> None:
        self._command, self._old, self._program = command, old, program
        self._place = folder / "place"
        self.destination = self._place / "artifact"
        self._random = random.Random(seed)
        self._pending: dict[bool, list[int]] = {True: [], False: []}
        self.tally = Tally()
        self._old_tree = tree(old)
        self._timing = self._measure()
        self._new_tree = tree(self.destination)

    def run(self, kills: int, moments: Sequence[str] = MOMENTS, told: Callable[[str], None] = lambda _: None) -> Tally:
        """Kill so many runs, of each moment and over both states of the destination as many, and check what is left.

        `told` hears of each violation as it is found.
        """
        for number in range(kills):
            moment = moments[number % len(moments)]
            replacing = number // len(moments) % 2 == 1
            for violation in self._one(moment, replacing=replacing):
                told(violation)
                self.tally.violations.append(violation)
        return self.tally

    def _measure(self) -> Timing:
        operations = {}
        for replacing in (True, False):
            self._prepare(replacing=replacing)
            started = time.monotonic()
            process = self._start(0, replacing=replacing)
            wrote = self._await_weights(process)
            _, errors = process.communicate(timeout=_LIMIT)
            ended = time.monotonic()
            if process.returncode:
                raise subprocess.CalledProcessError(process.returncode, process.args, stderr=errors)
            operations[replacing] = int(errors.split()[-1])
        return Timing(total=ended - started, writing=ended - wrote, operations=operations)

    def _prepare(self, *, replacing: bool) -> None:
        shutil.rmtree(self._place, ignore_errors=True)
        self._place.mkdir(parents=True)
        if replacing:
            shutil.copytree(self._old, self.destination)

    def _start(self, operation: int, *, replacing: bool) -> subprocess.Popen[str]:
        arguments = [str(operation), str(self._place), *self._command(self.destination, replacing)]
        return subprocess.Popen(
            [sys.executable, "-m", self._program, *arguments],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )

    def _await_weights(self, process: subprocess.Popen[str]) -> float:
        """When the process began to write a weights file, or ended."""
        before = self._weights()
        while process.poll() is None and self._weights() <= before:
            time.sleep(_POLL)
        return time.monotonic()

    def _weights(self) -> set[tuple[Path, int]]:
        """The weights files, each with the time at which it was written."""
        found = set()
        for path in self._place.rglob("*.safetensors"):
            with contextlib.suppress(FileNotFoundError):  # removed, or renamed, just now
                found.add((path, path.stat().st_mtime_ns))
        return found

    def _one(self, moment: str, *, replacing: bool) -> list[str]:
        """Kill one run; says what was wrong afterwards."""
        for attempt in range(_ATTEMPTS):
            self._prepare(replacing=replacing)
            when = self._kill(moment, 0.5**attempt, replacing=replacing)
            if when is not None:
                break
        else:
            raise TimeoutError(f"{_ATTEMPTS} runs ended before they were killed ({moment})")
        self.tally.kills[moment] += 1
        case = f"{moment}, {when}, {'over an artifact' if replacing else 'to a new folder'}"
        return [f"{case}: {fault}" for fault in (*self.left(replacing=replacing), *self._next(replacing))]

    def _kill(self, moment: str, share: float, *, replacing: bool) -> str | None:
        """Kill a run at a random moment of a kind, in that share of its time; says when, or None if it ended before."""
        operation = self._operation(replacing) if moment == "operation" else 0
        delay = self._random.uniform(0, share * (self._timing.writing if moment == "writing" else self._timing.total))
        with self._start(operation, replacing=replacing) as process:
            if moment == "writing":
                self._await_weights(process)
            if moment != "operation":
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(delay)
                process.kill()
            _, errors = process.communicate(timeout=_LIMIT)
        if process.returncode not in (0, -signal.SIGKILL):
            raise subprocess.CalledProcessError(process.returncode, process.args, stderr=errors)
        if process.returncode == 0:
            return None
        return f"operation {operation}" if operation else f"{delay:.3f} s"

    def _operation(self, replacing: bool) -> int:
        """The next of the operations of a run, in random order."""
        pending = self._pending[replacing]
        if not pending:
            pending.extend(range(1, self._timing.operations[replacing] + 1))
            self._random.shuffle(pending)
        return pending.pop()

    def left(self, *, replacing: bool) -> list[str]:
        """What is wrong with what a killed run, which was to replace an artifact or not, left."""
        if not self.destination.exists():
            self.tally.left["old gone" if replacing else "absent"] += 1
            return []
        try:
            open_artifact(self.destination, full=True)
        except ArtifactError as error:
            return [f"left what does not open: {error}"]
        found = tree(self.destination)
        if found == self._new_tree:
            self.tally.left["new"] += 1
            return []
        if replacing and found == self._old_tree:
            self.tally.left["old"] += 1
            return []
        return [f"left an artifact that loads and is neither the old nor the new one: {sorted(found)}"]

    def _next(self, replacing: bool) -> list[str]:
        """What is wrong with the next run, and what is beside its artifact."""
        with self._start(0, replacing=replacing or self.destination.exists()) as process:
            _, errors = process.communicate(timeout=_LIMIT)
        if process.returncode:
            return [f"the next run failed: {errors.strip()}"]
        faults = []
        if tree(self.destination) != self._new_tree:
            faults.append("the next run gave other bytes than one that nobody interrupted")
        beside = sorted(path.name for path in self._place.iterdir() if path != self.destination)
        if beside:
            faults.append(f"the next run left {', '.join(beside)} beside the artifact")
        return faults


def tree(folder: Path) -> Tree:
    """Every file of a folder and its digest."""
    found = {}
    for path in sorted(folder.iterdir()):
        with path.open("rb") as file:
            found[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def campaign(folder: Path, name: str, *, seed: int) -> Campaign:
    """The campaign against `furiosa-llm build` or `furiosa-llm reshard`."""
    (folder / "model").mkdir()
    model = write_outline(folder / "model", CONFIG)
    fill(model, seed=seed)
    old = folder / "old"
    build = ["build", "-tp", "4", str(model)]
    _furiosa_llm([*build, str(old), "--name", "old"])
    arguments = [*build, "--name", "new"] if name == "build" else ["reshard", str(old), "-tp", "8"]

    def command(destination: Path, replacing: bool) -> list[str]:
        return [*arguments, str(destination), *(["--force"] if replacing else [])]

    return Campaign(folder, command, old, seed=seed)


def _furiosa_llm(arguments: Sequence[str]) -> None:
    program = "from furiosa_llm.cli.main import main; main()"
    subprocess.run([sys.executable, "-c", program, *arguments], check=True, stdout=subprocess.DEVNULL)


def _tell(violation: str) -> None:
    sys.stdout.write(f"{violation}\n")
    sys.stdout.flush()


def main() -> None:
    """Run the campaign; the last line has the counts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--command", choices=("build", "reshard"), default="build")
    parser.add_argument("--moment", choices=MOMENTS, help="all three in turn, if not given")
    options = parser.parse_args()
    moments = MOMENTS if options.moment is None else (options.moment,)
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        tally = campaign(Path(folder), options.command, seed=options.seed).run(options.kills, moments, _tell)
    kills = ", ".join(f"{count} {moment}" for moment, count in tally.kills.items())
    left = ", ".join(f"{count} {what}" for what, count in sorted(tally.left.items()))
    sys.stdout.write(
        f"{options.command}, seed {options.seed}: {tally.kills.total()} kills ({kills}), left {left}; "
        f"{len(tally.violations)} violations, {time.monotonic() - started:.0f} s\n"
    )
    sys.exit(1 if tally.violations else 0)


if __name__ == "__main__":
    main()
