"""How not to write an artifact, for the kill campaign to find: file by file, in place, with a mark left beside it."""

from __future__ import annotations

import shutil
import sys
import time
from pathlib import Path

from tests.campaigns.killed_at import Killer

_PAUSE = 0.05
"""Seconds between two files, for a kill to fall into."""


def main() -> None:
    """Copy the folder SOURCE to DESTINATION: `python -m tests.campaigns.careless N FOLDER SOURCE DESTINATION ...`."""
    last, folder, source, destination, _ = sys.argv[1:]
    killer = Killer(Path(folder), int(last))
    sys.addaudithook(killer.audit)
    (Path(folder) / ".started").touch()
    Path(destination).mkdir(exist_ok=True)
    for file in sorted(Path(source).iterdir(), reverse=True):
        shutil.copyfile(file, Path(destination) / file.name)
        time.sleep(_PAUSE)
    sys.stderr.write(f"{killer.count}\n")


if __name__ == "__main__":
    main()
