"""How a build grows with the graph: processor time of odd graphs of two sizes, each build in a process of its own.

    python -m tests.campaigns.fuzz_growth --nodes 4000

The exponent of each kind is between two sizes, the second four times the first. Whatever else a machine does adds to a
time and never takes from it: a kind above the bar is built anew, and the least time of each size counts. The campaign
ends with status 1 if one stays above the bar, or a build fails.
"""

from __future__ import annotations

import argparse
import gc
import math
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import onnx

from furiosa_llm import builder
from furiosa_llm.builder import ArtifactBuilder
from tests.support.builder.growing import KINDS

BAR = 1.1
"""The exponent, with which a graph of four times the size takes 4.6 times as long."""
_TIMES = 4
_MOST_BUILDS = 3
"""Of each size."""
_BUILDER = str(Path(builder.__file__).parent)
_OBJECTS_BETWEEN_COLLECTIONS = 100_000  # as the command line has it


def main(argv: Sequence[str] | None = None) -> int:
    """Print a line for each kind; returns the status of the process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nodes", type=int, default=4000, help="the smaller size (default: 4000)")
    parser.add_argument("--kinds", nargs="*", default=list(KINDS), help="of graphs (default: all)")
    arguments = parser.parse_args(argv)
    found = 0
    sys.stdout.write(f"{'kind':<24} {arguments.nodes:>9} {_TIMES * arguments.nodes:>9}  exponent\n")
    for kind in arguments.kinds:
        first = second = math.inf
        for _ in range(_MOST_BUILDS):
            first = min(first, seconds(kind, arguments.nodes))
            second = min(second, seconds(kind, _TIMES * arguments.nodes))
            exponent = math.log(second / first, _TIMES)
            if exponent <= BAR:
                break
        found += exponent > BAR
        above = "" if exponent <= BAR else "  above"
        sys.stdout.write(f"{kind:<24} {first:>7.2f} s {second:>7.2f} s  {exponent:.2f}{above}\n")
        sys.stdout.flush()
    return 1 if found else 0


def seconds(kind: str, size: int) -> float:
    """Processor time of a build in a new process."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_build, (kind, size))


def _build(kind: str, size: int) -> float:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        onnx.save(KINDS[kind](size), path)
        gc.freeze()
        gc.set_threshold(_OBJECTS_BETWEEN_COLLECTIONS)
        started = time.process_time()
        ArtifactBuilder(path).build(Path(folder) / "artifact")
        return time.process_time() - started


def count_lines(kind: str, size: int, folder: Path) -> int:
    """Lines of the builder that a build runs: a measure of time that is the same on any machine."""
    path = folder / "model.onnx"
    onnx.save(KINDS[kind](size), path)
    lines = 0

    def inside(_: FrameType, event: str, __: object) -> Any:
        nonlocal lines
        lines += event == "line"
        return inside

    def entered(frame: FrameType, _: str, __: object) -> Any:
        return inside if frame.f_code.co_filename.startswith(_BUILDER) else None

    before = sys.gettrace()
    sys.settrace(entered)
    try:
        ArtifactBuilder(path).build(folder / "artifact", force=True, workers=1)
    finally:
        sys.settrace(before)
    return lines


if __name__ == "__main__":
    sys.exit(main())
