"""`furiosa-llm serve` in a process of its own, on a free port."""

from __future__ import annotations

import contextlib
import re
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

TIMEOUT = 60
MAIN = "from furiosa_llm.cli.main import main; main()"


class Process:
    """A server in a process, with the environment `env`, by default its parent's; `program` is what Python runs."""

    def __init__(
        self,
        *arguments: object,
        env: Mapping[str, str] | None = None,
        program: Sequence[str] = ("-uc", MAIN, "serve"),
    ) -> None:
        everything = [sys.executable, *program, *map(str, arguments), "--host", "127.0.0.1", "--port", "0"]
        self.process = subprocess.Popen(
            everything, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, encoding="utf-8"
        )
        self._lines: list[str] = []
        self.url = ""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._lines.append(line)
            if found := re.search(r"Uvicorn running on (http://127\.0\.0\.1:\d+) \(Press CTRL\+C to quit\)", line):
                self.url = found.group(1)
                break
        assert self.url, self.output
        # What it says later has to be read, or its pipe would fill.
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    @property
    def output(self) -> str:
        """What it has said so far."""
        return "".join(self._lines)

    def _read(self) -> None:
        assert self.process.stdout is not None
        self._lines.extend(self.process.stdout)

    def wait(self) -> int:
        """Its exit code."""
        code = self.process.wait(TIMEOUT)
        self._reader.join(TIMEOUT)
        return code

    def close(self) -> None:
        """Kills it, if it has not ended."""
        self.process.kill()
        self.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()


@contextlib.contextmanager
def started(*arguments: object, **options: Any) -> Iterator[Process]:
    """A server that takes requests."""
    process = Process(*arguments, **options)
    try:
        yield process
    finally:
        process.close()
