"""docs/cluster.md: every message has its row, the manifests keep to Kubernetes' schema, and commands to ours."""

from __future__ import annotations

import ast
import copy
import json
import re
import shlex
from functools import cache
from pathlib import Path
from typing import Any

import click
import jsonschema_rs
import pytest
import yaml

from furiosa_llm.cli.main import command_of
from tests.support.guides import ROOT

BOOK = (ROOT / "docs" / "cluster.md").read_text(encoding="utf-8")
ROWS = re.findall(r"^\| `([^`]+(?:``[^`]+)*)` \|", BOOK.partition("## Messages")[2], flags=re.MULTILINE)
MANIFESTS = list(yaml.safe_load_all((ROOT / "docs" / "leaderworkerset.yaml").read_text(encoding="utf-8")))
SCHEMA = json.loads((Path(__file__).parent / "kubernetes.schema.json").read_text(encoding="utf-8"))


def template(node: ast.expr) -> str:
    """A text with its values as dots."""
    match node:
        case ast.Constant():
            return str(node.value)
        case ast.JoinedStr():
            return "".join(template(part) for part in node.values)
        case _:
            return "..."


@cache
def raised() -> list[str]:
    """The texts of errors that `runtime/distributed` raises, but of those that hand on another one's text."""
    found = []
    for path in (ROOT / "runtime" / "distributed").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            text = None
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.args:
                text = node.args[0] if re.fullmatch(r"(?!Wire)\w+Error", node.func.id) else None
            elif isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "self.lost":
                text = node.value
            if text is not None and re.search("[a-z]", template(text)):
                found.append(template(text).replace("None", ""))
    return [text for text in found if text]


def is_of(row: str, text: str) -> bool:
    return re.search(".*".join(map(re.escape, row.split("..."))), text) is not None


def test_every_message_has_its_row() -> None:
    texts = raised()
    assert len(texts) > 18
    assert [text for text in texts if not any(is_of(row, text) for row in ROWS)] == []
    assert "WireError" in ROWS


def test_every_row_is_of_a_message() -> None:
    elsewhere = (ROOT / "runtime" / "engine" / "launch.py").read_text(encoding="utf-8")
    for row in set(ROWS) - {"WireError"}:
        assert any(is_of(row, text) for text in raised()) or is_of(row, elsewhere), row


@pytest.mark.parametrize("manifest", MANIFESTS, ids=lambda manifest: manifest["kind"])
def test_manifests_keep_to_the_schema(manifest: dict[str, Any]) -> None:
    jsonschema_rs.validator_for(SCHEMA).validate(manifest)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("spec", "leaderWorkerTemplate", "restartPolicy"), "Never"),
        (("spec", "leaderWorkerTemplate", "workers"), {}),
        (("spec", "leaderWorkerTemplate", "workerTemplate", "spec", "containers", 0, "comand"), ["sh"]),
        (("spec", "leaderWorkerTemplate", "leaderTemplate", "spec", "containers", 0, "env", 1, "value"), 3),
        (("apiVersion",), "v1"),
    ],
)
def test_the_schema_refuses(path: tuple[str | int, ...], value: object) -> None:
    manifest = copy.deepcopy(MANIFESTS[0])
    at = manifest
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    assert not jsonschema_rs.validator_for(SCHEMA).is_valid(manifest)


def test_the_manifests_fit_together() -> None:
    """The server's options are options, mounts and labels are there, and the devices are on both pods."""
    workers = MANIFESTS[0]["spec"]["leaderWorkerTemplate"]
    cards = 0
    for name in ("leaderTemplate", "workerTemplate"):
        pod = workers[name]["spec"]
        (container,) = pod["containers"]
        assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
        cards += int(re.findall(r'"npu": (\d+)', container["args"][0])[0])
    script = workers["leaderTemplate"]["spec"]["containers"][0]["args"][0]
    arguments = shlex.split(script.replace("\\\n", " ").partition("furiosa-llm serve ")[2])
    command = command_of("serve")
    options, _, _ = command.make_parser(click.Context(command)).parse_args(arguments)
    assert options["distributed_executor_backend"] == "ray"
    assert [int(device.split(":")[1]) for device in options["devices"].split(",")] == [0, cards // workers["size"]]
    assert MANIFESTS[1]["spec"]["selector"] == workers["leaderTemplate"]["metadata"]["labels"]
    of_all = MANIFESTS[2]["spec"]["podSelector"]["matchLabels"].items()
    assert all(of_all <= workers[name]["metadata"]["labels"].items() for name in ("leaderTemplate", "workerTemplate"))
