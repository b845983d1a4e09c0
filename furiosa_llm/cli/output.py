"""How commands print what programs read."""

from __future__ import annotations

import json
from typing import Any

import click

JSON = click.option("--json", "as_json", is_flag=True, help="Print everything as one JSON object, and nothing else.")


def echo_json(value: Any) -> None:
    """Prints `value`, whose keys stay in their order."""
    click.echo(json.dumps(value, indent=2, ensure_ascii=False))
