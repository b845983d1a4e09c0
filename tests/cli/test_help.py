"""The words of the command line: help in groups and one style, suggestions, and readers that go."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import click
import pytest

from furiosa_llm.cli.command import Command
from furiosa_llm.cli.main import cli as group
from furiosa_llm.cli.main import command_of
from tests.cli.conftest import Cli


def help_of(name: str) -> str:
    command = command_of(name)
    context = click.Context(command, info_name=name, max_content_width=400, terminal_width=400)
    return command.get_help(context)


@pytest.mark.parametrize("name", group.commands)
def test_defaults_and_ranges_have_one_style(name: str) -> None:
    text = help_of(name)
    assert "RANGE" not in text
    assert "INTEGER" not in text
    assert "]  [" not in text
    for bracket in re.findall(r"\[default: (.*?)\]\n", text):
        assert not re.search(r"^-?\d+\.0\b(?!\.)|no-|x>=[01]\b", bracket), bracket


def test_every_option_of_serve_is_in_a_group() -> None:
    serve = command_of("serve")
    assert isinstance(serve, Command)
    grouped = [name for names in serve.groups.values() for name in names]
    shown = {str(param.name) for param in serve.params if isinstance(param, click.Option) and not param.hidden}
    assert len(grouped) == len(set(grouped))
    assert set(grouped) == shown
    titles = re.findall(r"^(\w.*):$", help_of("serve"), flags=re.MULTILINE)
    assert titles == ["Options", *serve.groups]


def test_units(cli: Cli) -> None:
    text = " ".join(cli("serve", "--help").out.split())
    for part in ("[default: 16 MiB]", "[default: 30 s; x>0]", "[default: 0; 0<=x<1]", "[default: 0.0.0.0]"):
        assert part in text


def test_what_is_mistyped(cli: Cli) -> None:
    assert "Did you mean one of: 'build', 'unbuild'?" in cli("bulid").err
    assert "'--max-tokens'" in cli("generate", "--max-token", 1).err


def test_as_a_module() -> None:
    command = [sys.executable, "-m", "furiosa_llm", "--version"]
    ended = subprocess.run(command, capture_output=True, text=True, check=True)
    assert ended.stdout.startswith("furiosa-llm ")


def without_a_reader(*arguments: object) -> tuple[int, str]:
    """The exit code and the errors of a Python program whose output nobody reads."""
    reader, writer = os.pipe()
    os.close(reader)
    try:
        command = [sys.executable, *map(str, arguments)]
        ended = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    finally:
        os.close(writer)
    return ended.returncode, ended.stderr


def test_a_reader_that_goes(built: Path) -> None:
    for arguments in (("build", "--help"), ("inspect", built, "--json"), ("inspect", built)):
        assert without_a_reader("-m", "furiosa_llm", *arguments) == (1, "")


def test_a_reader_that_goes_before_the_last_words() -> None:
    """What is still buffered when the command has ended."""
    program = (
        "import sys, click\n"
        "from furiosa_llm.cli.exit_code import exit_code_of\n"
        "cli = click.Group('cli', commands=[click.Command('say', callback=lambda: sys.stdout.write('words'))])\n"
        "sys.exit(exit_code_of(cli))\n"
    )
    assert without_a_reader("-c", program, "say") == (1, "")
