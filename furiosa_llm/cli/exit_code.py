"""Runs a command line: a user's error is one paragraph on standard error and an exit code, never a traceback."""

from __future__ import annotations

import click

from furiosa_llm.cli.terminal import escaped_streams, line
from furiosa_llm.runtime.artifact.errors import FuriosaLLMError

_INTERRUPTED = 130


def exit_code_of(cli: click.Group) -> int:
    """The exit code of `cli` on the process's arguments, once the error is shown, if there is one."""
    with escaped_streams():
        try:
            return cli.main(standalone_mode=False) or 0
        except click.ClickException as error:
            error.show()
            return error.exit_code
        except (click.exceptions.Abort, KeyboardInterrupt):
            return _INTERRUPTED
        except FuriosaLLMError as error:
            line(f"error: {' '.join(str(error).split())}", err=True)
            return error.exit_code
