"""Runs a command line: a user's error is one paragraph on standard error and an exit code, never a traceback."""

from __future__ import annotations

import atexit
import contextlib
import gc
import logging
import os
import sys
import threading
from typing import NoReturn

import click

from furiosa_llm.cli.terminal import escaped_streams, line
from furiosa_llm.runtime.artifact.errors import FuriosaLLMError

_INTERRUPTED = 130
_NOBODY_READS = 1
"""As click and rich have it."""


def exit_code_of(cli: click.Group) -> int:
    """The exit code of `cli` on the process's arguments, once the error is shown, if there is one."""
    try:
        with escaped_streams():
            return _run(cli)
    except BrokenPipeError:
        # Whoever read has gone, as `head` does; what is still buffered goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _NOBODY_READS


def end(code: int) -> NoReturn:
    """Ends the process with `code`, at once if a thread does not come back from onnxruntime.

    The interpreter would take the ground from under such a thread as it ends, which aborts the process.
    """
    if any(thread.daemon and thread.name.startswith("furiosa-") for thread in threading.enumerate()):
        end_at_once(code)
    atexit.register(gc.freeze)  # the interpreter's end would look for cycles in whole graphs, for up to a second
    sys.exit(code)


def end_at_once(code: int) -> NoReturn:
    """Ends the process with `code`, without the interpreter's own end, which nothing bounds in time."""
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    os._exit(code)


def _run(cli: click.Group) -> int:
    try:
        code = _code(cli)
        sys.stdout.flush()
    except click.ClickException as error:
        with contextlib.suppress(OSError):
            error.show()
        return error.exit_code
    except (click.exceptions.Abort, KeyboardInterrupt):
        return _INTERRUPTED
    except FuriosaLLMError as error:
        with contextlib.suppress(OSError):
            line(f"error: {' '.join(str(error).split())}", err=True)
        return error.exit_code
    return code


def _code(cli: click.Group) -> int:
    try:
        return cli.main(standalone_mode=False) or 0
    except SystemExit as ended:
        return int(ended.code or 0)
