"""Run a command and kill it before one of its operations on files: `python -m tests.campaigns.killed_at N FOLDER ...`.

The rest of the arguments are furiosa-llm's. Operations are those that change what lies below FOLDER: files opened for
writing, made, renamed, removed. The process kills itself with SIGKILL before the N-th; with N = 0 it runs to its end
and its last line of standard error is their number.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

_CHANGES = {"os.chmod", "os.link", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.symlink", "os.truncate"}
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


class Killer:
    """Counts operations below `folder`, and ends the process before number `last` (never if it is 0)."""

    def __init__(self, folder: Path, last: int) -> None:
        self._folder = folder.absolute()
        self._last = last
        self.count = 0

    def audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        """To be given to `sys.addaudithook`."""
        if event not in _CHANGES and not (
            event == "open" and isinstance(arguments[2], int) and arguments[2] & _WRITING
        ):
            return
        if not isinstance(arguments[0], str | bytes | os.PathLike) or not self._is_inside(os.fsdecode(arguments[0])):
            return
        self.count += 1
        if self.count == self._last:
            os.kill(os.getpid(), signal.SIGKILL)

    def _is_inside(self, path: str) -> bool:
        """Names without a folder are those of `shutil.rmtree`, which removes relatively to open folders."""
        return os.sep not in path or Path(path).absolute().is_relative_to(self._folder)


def main() -> None:
    """See the module."""
    from furiosa_llm.cli.main import main as furiosa_llm  # slow to import, and wanted here alone

    last, folder, *arguments = sys.argv[1:]
    killer = Killer(Path(folder), int(last))
    sys.addaudithook(killer.audit)
    sys.argv = ["furiosa-llm", *arguments]
    try:
        furiosa_llm()
    finally:
        sys.stderr.write(f"{killer.count}\n")


if __name__ == "__main__":
    main()
