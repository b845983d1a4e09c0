"""Random traces of the scheduler, each step checked: `python -m tests.campaigns.fuzz_scheduler --traces 10000`."""

from __future__ import annotations

import argparse
import sys
import time

from tests.support.runtime.scheduler_model import run_trace


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description="Run random traces of the scheduler against a simulated KV store.")
    parser.add_argument("--traces", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0, help="of the first trace; the others follow")
    arguments = parser.parse_args()
    started = time.monotonic()
    failures = batches = copies = preemptions = 0
    for seed in range(arguments.seed, arguments.seed + arguments.traces):
        try:
            machine = run_trace(seed)
        except (AssertionError, ValueError, LookupError) as error:
            failures += 1
            sys.stdout.write(f"--seed {seed} --traces 1: {type(error).__name__}: {error}\n")
            sys.stdout.flush()
            continue
        batches += len(machine.log)
        copies += sum(len(batch.copies) for batch in machine.log)
        preemptions += machine.scheduler.num_preemptions
    seconds = time.monotonic() - started
    sys.stdout.write(
        f"{arguments.traces} traces, {batches} batches, {copies} copies, {preemptions} preemptions: {failures} wrong,"
        f" {seconds:.0f} s\n"
    )
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
