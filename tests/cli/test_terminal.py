"""No name from a model, an artifact or a folder steers the terminal: control characters in all, all commands."""

from __future__ import annotations

import hashlib
import io
import json
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import onnx
import pytest
from google.protobuf.message import Message
from onnx import ModelProto
from prometheus_client.parser import text_string_to_metric_families
from rich.markup import escape

from furiosa_llm.cli.terminal import Console, cell, escaped_streams
from furiosa_llm.mlperf.cli import main as mlperf
from furiosa_llm.runtime.artifact.manifest import seal
from furiosa_llm.runtime.artifact.progress import shown, tell
from furiosa_llm.server.notes import on_one_line
from tests.cli.conftest import Cli
from tests.support.artifacts import artifact_of
from tests.support.builder.graphs import model
from tests.support.server.process import started
from tests.support.tampering import edit_manifest

Patch = pytest.MonkeyPatch
NASTY = "\x1b]0;owned\x07\x1b[2J\x9b\r\u200f\u202e\x7f"
STEERING = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u206f\ufff9-\ufffb\U000e0000-\U000e007f]"
)

READING = (
    ("inspect",), ("inspect", "--json"), ("topology",), ("topology", "--json"), ("verify", "--no-record"),
)  # fmt: skip


def assert_clean(cli: Cli, *arguments: object) -> str:
    result = cli(*arguments)
    shown = result.out + result.err
    assert STEERING.search(shown) is None, (arguments, shown)
    return shown


# -- artifacts -----------------------------------------------------------------------------------------------------


def strings(value: Any, path: tuple[object, ...] = ()) -> Iterator[tuple[tuple[object, ...], str]]:
    """Every string in a JSON document, with its keys and indices."""
    if isinstance(value, str):
        yield path, value
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in entries:
        yield from strings(inner, (*path, key))


def places(document: Any) -> list[tuple[object, ...]]:
    """One string of each kind: those of a list's entries are of one kind."""
    kinds = {tuple("*" if isinstance(key, int) else key for key in path): path for path, _ in strings(document)}
    return list(kinds.values())


def changed(document: Any, path: tuple[object, ...]) -> Any:
    copy = json.loads(json.dumps(document))
    inner = copy
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] += NASTY
    return copy


@pytest.mark.slow
def test_every_string_of_a_manifest(built: Path, tmp_path: Path, cli: Cli) -> None:
    folder = tmp_path / "artifact"
    shutil.copytree(built, folder)
    manifest = json.loads((folder / "manifest.json").read_bytes())
    kinds = places(manifest)
    assert len(kinds) > 30
    for path in kinds:
        (folder / "manifest.json").write_bytes(seal(changed(manifest, path)))
        assert_clean(cli, "inspect", folder)
        assert_clean(cli, "topology", folder)
    (folder / "manifest.json").write_bytes(seal(changed(manifest, ("model", "name"))))
    for command, *options in READING:
        assert_clean(cli, command, folder, *options)
    assert "\\u001b" in assert_clean(cli, "inspect", folder)


def rename_nodes(proto: ModelProto) -> None:
    for node in proto.graph.node:
        node.name += NASTY


def foreign_domain(proto: ModelProto) -> None:
    proto.graph.node[0].domain = NASTY
    proto.opset_import.append(onnx.helper.make_opsetid(NASTY, 1))


def rename_values(proto: ModelProto) -> None:
    outputs = {value.name for value in proto.graph.output}
    made = {name for node in proto.graph.node for name in node.output} - outputs
    for node in proto.graph.node:
        for names in (node.input, node.output):
            names[:] = [name + NASTY if name in made else name for name in names]


def unknown_op(proto: ModelProto) -> None:
    proto.graph.node[0].op_type += NASTY


@pytest.mark.parametrize(
    "change",
    [rename_nodes, rename_values, *(pytest.param(one, marks=pytest.mark.slow) for one in (foreign_domain, unknown_op))],
)
def test_names_in_a_program(change: Callable[[ModelProto], None], built: Path, tmp_path: Path, cli: Cli) -> None:
    folder = tmp_path / NASTY
    shutil.copytree(built, folder)
    proto = onnx.load(folder / "program.onnx", load_external_data=False)
    change(proto)
    data = proto.SerializeToString()
    (folder / "program.onnx").write_bytes(data)

    def sealed(manifest: dict[str, Any]) -> None:
        (entry,) = (one for one in manifest["files"] if one["path"] == "program.onnx")
        entry |= {"nbytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}

    edit_manifest(folder, sealed)
    for command, *options in READING:
        assert_clean(cli, command, folder, *options)
    if change in (rename_nodes, rename_values):
        assert_clean(cli, "generate", folder, "--prompt", "a", "--max-tokens", 1)
    assert_clean(cli, "diff", folder, built)
    assert_clean(cli, "unbuild", folder, tmp_path / f"{NASTY}.onnx")
    assert_clean(cli, "reshard", "-tp", 8, folder, tmp_path / f"{NASTY}.artifact")


def test_files_and_templates(built: Path, tmp_path: Path, cli: Cli) -> None:
    folder = tmp_path / "artifact"
    shutil.copytree(built, folder)
    (folder / f"more{NASTY}").write_text("?")
    template = f"{{{{ raise_exception('{NASTY}') }}}}"
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    edit_manifest(folder, lambda manifest: manifest["model"].update(name=NASTY))
    for command, *options in (*READING, ("generate", "--prompt", "a", "--chat")):
        assert_clean(cli, command, folder, *options)
    assert_clean(cli, "inspect", tmp_path / NASTY)
    assert_clean(cli, "run", folder, "--inputs", tmp_path / NASTY, "--outputs", tmp_path / NASTY)
    assert_clean(cli, "bench", folder, "--dataset", tmp_path / NASTY)
    assert_clean(cli, NASTY)
    assert_clean(cli, "plan", f"--{NASTY}")


def test_an_encoder_and_its_texts(tmp_path: Path, cli: Cli) -> None:
    folder = shutil.copytree(artifact_of("tiny-bert-optimum"), tmp_path / NASTY)
    edit_manifest(folder, lambda manifest: manifest["model"].update(name=NASTY))
    assert_clean(cli, "embed", folder, "--text", NASTY)
    assert_clean(cli, "embed", folder, "--text", "a", "--tokenizer", tmp_path / f"{NASTY}.json")
    assert_clean(cli, "embed", tmp_path / f"{NASTY}2", "--text", NASTY)
    assert_clean(cli, "serve", folder, "--api-key-file", tmp_path / NASTY)


def test_mlperf(built: Path, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.cli.conftest.main", mlperf)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    folder = shutil.copytree(built, tmp_path / NASTY)
    edit_manifest(folder, lambda manifest: manifest["model"].update(name=NASTY))
    for name, artifact, *options in (
        (NASTY, folder),
        ("bert-offline", folder),
        ("gpt-j-offline", tmp_path / f"{NASTY}2"),
        ("gpt-j-offline", folder, "--user-conf", tmp_path / NASTY),
        ("gpt-j-offline", folder, "--dataset", tmp_path / NASTY),
    ):
        assert_clean(cli, name, *options, artifact, tmp_path / f"logs{NASTY}")


@pytest.mark.slow
def test_a_server(built: Path, tmp_path: Path) -> None:
    """Its model, adapters and clients have such names: in answers they are as they are, in metrics on one line."""
    name = f"{NASTY}\n\t\"'\\</script>=cmd|"
    folder = shutil.copytree(built, tmp_path / NASTY)
    edit_manifest(folder, lambda manifest: manifest["model"].update(name=name))
    options = ("--allow-runtime-lora-updating", "--enable-payload-logging")
    with started(folder, *options) as server, httpx.Client(base_url=server.url) as client:
        assert client.get("/v1/models").json()["data"][0]["id"] == name
        for model, status in ((name, 200), (f"other{name}", 404)):
            asked = {"model": model, "prompt": "a", "max_tokens": 1, "user": name}
            assert client.post("/v1/completions", json=asked).status_code == status
        adapter = {"lora_name": f"a{name}", "lora_path": f"/nowhere{name}"}
        assert client.post("/v1/load_lora_adapter", json=adapter).status_code == 400
        assert client.get("/x%0a%1b[2J").status_code == 404
        metrics = text_string_to_metric_families(client.get("/metrics").text)
        labels = [sample.labels for family in metrics for sample in family.samples]
        server.process.send_signal(signal.SIGTERM)
        assert server.wait() == 0
    assert {label["model_name"] for label in labels if "model_name" in label} == {on_one_line(name)}
    assert STEERING.search(server.output) is None
    lines = [line for line in server.output.splitlines() if "</script>" in line and not line.startswith("INFO: ")]
    assert all(NASTY[4:9] in line for line in lines), "the name has not made a line of its own"


# -- models --------------------------------------------------------------------------------------------------------


def text_fields(message: Message, path: str = "") -> Iterator[tuple[str, Callable[[], None]]]:
    """Every text of a message: where it is, and what makes it nasty."""
    for field, value in message.ListFields():
        where = f"{path}.{field.name}"
        repeated = not isinstance(value, str | bytes | int | float | Message)
        if field.message_type is not None:
            for inner in value if repeated else [value]:
                yield from text_fields(inner, where)
        elif field.type == field.TYPE_STRING and repeated:
            yield where, partial(value.__setitem__, 0, value[0] + NASTY)
        elif field.type == field.TYPE_STRING:
            yield where, partial(setattr, message, field.name, value + NASTY)


def test_every_text_of_a_model(tmp_path: Path, cli: Cli) -> None:
    nodes = "h = MatMul(past_x, w) r = Reshape<allowzero=1>(h, t) y = Relu(r)"
    made = model("float[batch, 6] past_x", "float[batch, 5] y", nodes, {"w": (6, 5), "t": (2,)})
    made.producer_name, made.domain, made.doc_string = "producer", "domain", "text"
    path = tmp_path / f"{NASTY}.onnx"
    kinds = dict(text_fields(made))
    assert len(kinds) > 12
    for where in kinds:
        proto = ModelProto.FromString(made.SerializeToString())
        dict(text_fields(proto))[where]()
        onnx.save(proto, path)
        assert_clean(cli, "plan", path)
        assert_clean(cli, "check-sharding", path)
    assert_clean(cli, "build", path, tmp_path / f"{NASTY}.artifact")


# -- the writer ----------------------------------------------------------------------------------------------------


def test_colours_are_left_and_foreign_ones_are_not(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(force_terminal=True, color_system="standard")
    console.print(f"[bold red]{escape(NASTY)}[/]", highlight=False)
    console.print(cell(f"{NASTY}\n"))
    shown = capsys.readouterr().out
    assert shown.startswith("\x1b[1;31m\\u001b]0;owned\\u001b[2J")
    assert STEERING.search(re.sub("\x1b\\[[0-9;]*m", "", shown)) is None
    assert shown.endswith("\\n\n")


def test_what_ends_the_process_is_escaped_too() -> None:
    """An error that nobody foresaw, and text that the encoding of the terminal lacks."""
    program = f"""
import click, sys
from furiosa_llm.cli.exit_code import exit_code_of
@click.group()
def cli(): ...
@cli.command()
def fail():
    click.echo("\\u00fc")
    raise ValueError({NASTY!r})
sys.exit(exit_code_of(cli))
"""
    environment = {"PYTHONIOENCODING": "ascii"}
    ended = subprocess.run([sys.executable, "-c", program, "fail"], capture_output=True, text=True, env=environment)
    assert ended.stdout == "\\xfc\n"
    assert "ValueError: \\u001b]0;owned" in ended.stderr
    assert STEERING.search(ended.stderr) is None
    assert ended.returncode == 1


@pytest.mark.parametrize("command", [("inspect",), ("inspect", "--json"), ("topology",)])
def test_a_terminal_that_takes_no_more(command: tuple[str, ...], built: Path, cli: Cli, monkeypatch: Patch) -> None:
    with Path("/dev/full").open("w") as full:
        monkeypatch.setattr("sys.stdout", full)
        result = cli(command[0], built, *command[1:])
        with suppress(OSError):
            full.close()
    assert result.code == 1
    assert result.err == (
        "error: /dev/full cannot be written: No space left on device; free some space, or send it elsewhere\n"
    )


def test_errors_that_cannot_be_shown_have_their_exit_code(cli: Cli, monkeypatch: Patch) -> None:
    with Path("/dev/full").open("w", buffering=1) as full:
        monkeypatch.setattr("sys.stderr", full)
        assert cli("inspect").code == 2
        assert cli("diff", "/nowhere", "/nowhere").code == 2
        with suppress(OSError):
            full.close()


def test_a_bar_steers_the_terminal_and_what_it_shows_does_not(monkeypatch: Patch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    for name in ("NO_COLOR", "TERM"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COLUMNS", "200")
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with escaped_streams(), shown():
        tell(f"loading {NASTY}", 1, 3)
        sys.stderr.write(f"meanwhile {NASTY}\n")
    written = terminal.getvalue()
    assert "\x1b[2K" in written  # how the bar clears its line
    assert "\\u001b[2K" not in written
    assert "loading \\u001b]0;" in written
    for steering in ("\x1b]0", "\x1b[2J", "\x9b", "\u202e"):
        assert steering not in written


def test_consoles_are_ours() -> None:
    made = [
        path
        for package in ("builder", "furiosa_llm", "runtime")
        for path in Path(package).rglob("*.py")
        if " Console(" in path.read_text() and path.name != "console.py"
    ]
    ours = re.compile(r"from furiosa_llm\.(cli\.terminal|runtime\.artifact\.console) import Console")
    assert len(made) > 5
    assert [path for path in made if ours.search(path.read_text()) is None] == []
