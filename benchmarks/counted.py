"""Count what one command reads: `python -m benchmarks.counted SOURCE_FOLDER RESULT furiosa-llm's arguments...`.

Bytes are what the kernel counts of this process, its threads and the processes it waited for (`rchar` of
/proc/self/io: read, pread, sendfile and their kin, from disk or page cache). What is read through a memory map is in
no such count, so every map of a file in SOURCE_FOLDER is noted too: those that Python makes, as it makes them, and
those of libraries, at 100 Hz.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

_INTERVAL = 0.01
_PATH_FIELD = 5
"""The sixth field of a line of /proc/self/maps; what maps no file has none."""


class Maps:
    """The files below a folder that this process has mapped."""

    def __init__(self, folder: Path) -> None:
        self._folder = str(folder.resolve()) + os.sep
        self.found: set[str] = set()
        self.nbytes_read = 0
        """By `watch` itself."""
        self._ended = threading.Event()

    def audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        """To be given to `sys.addaudithook`."""
        if event == "mmap.__new__" and arguments[0] >= 0:
            self._note(str(Path(f"/proc/self/fd/{arguments[0]}").readlink()))

    def watch(self) -> None:
        """Look at the process's maps until `end` is called."""
        while not self._ended.wait(_INTERVAL):
            text = Path("/proc/self/maps").read_text()
            self.nbytes_read += len(text)
            for line in text.splitlines():
                fields = line.split(maxsplit=_PATH_FIELD)
                if len(fields) > _PATH_FIELD:
                    self._note(fields[_PATH_FIELD])

    def end(self) -> None:
        """Stop looking."""
        self._ended.set()

    def _note(self, path: str) -> None:
        if path.startswith(self._folder):
            self.found.add(path.removeprefix(self._folder))


def bytes_read() -> int:
    """What this process has read so far."""
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(fields["rchar"])


def count(command: Callable[[], None], source: Path, result: Path) -> None:
    """Run `command`, and write what it read to `result`: `{"nbytes_read": bytes, "mapped": [files below source]}`."""
    maps = Maps(source)
    sys.addaudithook(maps.audit)
    watcher = threading.Thread(target=maps.watch)
    watcher.start()
    try:
        command()
    finally:
        maps.end()
        watcher.join()
        counted = {"nbytes_read": bytes_read() - maps.nbytes_read, "mapped": sorted(maps.found)}
        result.write_text(json.dumps(counted))


def main() -> None:
    """Count what furiosa-llm reads."""
    from furiosa_llm.cli.main import main as furiosa_llm  # slow to import, and wanted here alone

    source, result, *arguments = sys.argv[1:]
    sys.argv = ["furiosa-llm", *arguments]
    count(furiosa_llm, Path(source), Path(result))


if __name__ == "__main__":
    main()
