"""What the guides quote is what the code says."""

from __future__ import annotations

import ast
import re
import shlex
from pathlib import Path

import click
import pytest

from furiosa_llm.cli.main import command_of
from tests.support.guides import GUIDES, ROOT, commands

GUIDE = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
QUOTED = re.findall(r"^\| `([^`]+)` \|", GUIDE, flags=re.MULTILINE)


def texts() -> str:
    """Every piece of text in the code that does not depend on values, the parts of a string with values apart."""
    found: list[str] = []
    for folder in ("builder", "runtime", "furiosa_llm"):
        for path in (ROOT / folder).rglob("*.py"):
            tree = ast.parse(path.read_text(encoding="utf-8"))
            found += [n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)]
    return "\0".join(found)


def test_the_guide_quotes_messages() -> None:
    assert len(QUOTED) > 20
    written = texts()
    assert [message for message in QUOTED if message not in written] == []


@pytest.mark.parametrize("path", GUIDES, ids=lambda path: path.name)
def test_links_lead_somewhere(path: Path) -> None:
    """To a file, and where a link names a heading, to one that is there."""
    for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text(encoding="utf-8")):
        file, _, anchor = target.partition("#")
        if "://" in target:
            continue
        found = path.parent / file if file else path
        assert found.exists(), target
        if anchor and found.suffix == ".md":
            headings = re.findall(r"^#+ (.+)$", found.read_text(encoding="utf-8"), flags=re.MULTILINE)
            anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor in anchors, target


def test_commands_in_the_guides_are_commands() -> None:
    """With the options that they have; what they are about need not be here."""
    seen = set()
    for guide, (name, *arguments) in [(path.name, command) for path in GUIDES for command in commands(path)]:
        command = command_of(name)
        context = click.Context(command)
        try:
            command.make_parser(context).parse_args([one for one in arguments if one != "..."])
        except click.UsageError as error:
            pytest.fail(f"{guide}: furiosa-llm {name} {shlex.join(arguments)}: {error}")
        seen.add(name)
    assert len(seen) > 12
