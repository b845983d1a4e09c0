"""Options are declared once: signatures, command lines and the tables in docs/ agree with the declarations."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, get_type_hints

import click
import pytest

from furiosa_llm import LLM, EngineArgs
from furiosa_llm.builder import ArtifactBuilder, plan_model
from furiosa_llm.builder.errors import OptionError
from furiosa_llm.builder.options import BuildOptions
from furiosa_llm.cli.main import cli, command_of
from furiosa_llm.cli.options import ENGINE
from furiosa_llm.mlperf.cli import cli as mlperf
from furiosa_llm.runtime.artifact.errors import FuriosaLLMError
from furiosa_llm.runtime.artifact.options import Option, declared
from furiosa_llm.runtime.engine.engine_args import EngineOptions, SchedulerConfig
from furiosa_llm.runtime.errors import InputError
from furiosa_llm.server.settings import ServerSettings
from tests.test_packaging import ROOT

BUILD, SERVER = declared(BuildOptions), declared(ServerSettings)
ALL = {**ENGINE, **BUILD, **SERVER}
COMMANDS = {**{name: command_of(name) for name in cli.commands}, "furiosa-mlperf": mlperf.commands["llama-3.1-server"]}


def params(command: str) -> dict[str, click.Option]:
    """The options of a command that its help shows."""
    found = [param for param in COMMANDS[command].params if isinstance(param, click.Option) and not param.hidden]
    return {str(param.name): param for param in found}


def spellings(command: str) -> set[str]:
    return {name for param in params(command).values() for name in (*param.opts, *param.secondary_opts)}


def rows(path: str, heading: str) -> list[list[str]]:
    """The cells of the first table below a heading."""
    _, _, section = (ROOT / path).read_text().partition(f"\n## {heading}\n")
    table = re.search(r"(?:^\|.*\n)+", section, flags=re.MULTILINE)
    assert table is not None
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in table[0].splitlines()[2:]]


def check_rows(found: Iterable[list[str]], options: Mapping[str, Option], spell: Callable[[str], str]) -> None:
    """Each option has a row, with its default and, to begin with, its help; no other has one."""
    by_name = {name.strip("`"): (default, meaning) for name, default, meaning in found}
    assert sorted(by_name) == sorted(map(spell, options))
    for name, option in options.items():
        default, meaning = by_name[spell(name)]
        assert default == option.default_text
        assert meaning.startswith(option.help)


def test_the_engine_in_the_docs() -> None:
    objects = {name: declared(EngineArgs)[name] for name in ("bucket_config", "scheduler_config")}
    table = rows("docs/engine.md", "Options")
    assert [table.pop()[0] for _ in range(2)] == ["`use_tqdm_on_load` (`LLM` only)", "`skip_engine` (`LLM` only)"]
    check_rows(table, {**ENGINE, **objects}, str)


def test_a_build_in_the_docs() -> None:
    check_rows(rows("docs/partitioning.md", "Options"), BUILD, str)


def test_the_server_in_the_docs() -> None:
    given = {name: option for name, option in SERVER.items() if name in params("serve")}
    spelled = {f"`--{name.replace('_', '-')}`" for name in given}
    table = rows("docs/serving.md", "Running it")
    check_rows([row for row in table if row[0] in spelled], given, lambda name: f"--{name.replace('_', '-')}")


@pytest.mark.parametrize(
    ("path", "command"),
    [("docs/serving.md", "serve"), ("docs/mlperf.md", "furiosa-mlperf"), ("docs/bench.md", "bench")],
)
def test_commands_in_the_docs(path: str, command: str) -> None:
    """Every option of the command is named in its document, or in the engine's; every option in its tables is there."""
    text = (ROOT / path).read_text()
    named = set(re.findall(r"(?<![\w-])--?[a-z][\w-]*", text))
    for name, param in params(command).items():
        assert name in ENGINE or named & {*param.opts, *param.secondary_opts}, name
    cells = re.findall(r"^\| (`-.*?) \|", text, flags=re.MULTILINE)
    assert cells
    assert {name for cell in cells for name in re.findall(r"`(--?[\w-]+)", cell)} - spellings(command) == set()


@pytest.mark.parametrize(
    ("function", "others"),
    [
        (ArtifactBuilder, {"model", "name", "experimental_tp", "lora"}),
        (
            plan_model,
            {
                "model",
                "experimental_tp",
                "tensor_parallel_sizes",
                "context",
                "batch",
                "chunk",
                "cards",
                "compute",
                "lora",
                "costs",
            },
        ),
    ],
)
def test_signatures_of_builds(function: Callable[..., Any], others: set[str]) -> None:
    signature, text = inspect.signature(function).parameters, " ".join(str(function.__doc__).split())
    assert set(signature) - set(BUILD) == others
    for name in set(signature) - others:
        option, parameter = BUILD[name], signature[name]
        assert parameter.default == (None if option.default == {} else option.default)
        assert f"{name}: {option.help}" in text


@pytest.mark.parametrize("function", [LLM, LLM.load_artifact])
def test_signatures_of_loading(function: Callable[..., Any]) -> None:
    """Every option, typed, with its default and its text."""
    hints, engine = get_type_hints(EngineArgs), inspect.signature(EngineArgs).parameters
    assert get_type_hints(EngineOptions) == {name: hint for name, hint in hints.items() if name != "model"}
    shown = inspect.signature(function).parameters
    assert list(shown)[1:] == ["skip_engine", "use_tqdm_on_load", *EngineOptions.__annotations__]
    for name, hint in get_type_hints(EngineOptions).items():
        assert (shown[name].annotation, shown[name].default) == (hint, engine[name].default)
    text = inspect.getdoc(LLM.__init__ if function is LLM else function) or ""
    for name, option in ENGINE.items():
        assert name == "model" or f"    {name}: {option.help}" in text


REFUSED = [
    ("serve", EngineArgs, InputError, "max_batch_size", 0),
    ("serve", EngineArgs, InputError, "workers", "two"),
    ("serve", EngineArgs, InputError, "seed", -1),
    ("generate", EngineArgs, InputError, "threads", 0),
    ("serve", SchedulerConfig, InputError, "spare_blocks_ratio", 1.0),
    ("serve", SchedulerConfig, InputError, "npu_queue_limit", 0),
    ("serve", ServerSettings, InputError, "max_connections", 0),
    ("serve", ServerSettings, InputError, "request_timeout", 0),
    ("build", BuildOptions, OptionError, "max_padding", 0.5),
    ("plan", BuildOptions, OptionError, "max_padding", "much"),
    ("build", BuildOptions, OptionError, "max_seq_len_to_capture", 0),
]


def make(config: type, name: str, value: object) -> None:
    made = config(**({"model": "folder"} if config is EngineArgs else {}), **{name: value})
    if isinstance(made, BuildOptions):
        made.check(experimental_tp=False)


@pytest.mark.parametrize(("command", "config", "error", "name", "value"), REFUSED)
def test_refusals_are_worded_alike(
    command: str, config: type, error: type[FuriosaLLMError], name: str, value: object
) -> None:
    with pytest.raises(error) as in_python:
        make(config, name, value)
    assert str(in_python.value) == f"{name} must be {ALL[name].kind.expected}, got {value!r}"
    context = click.Context(COMMANDS[command])
    with pytest.raises(click.BadParameter) as on_the_command_line:
        params(command)[name].type_cast_value(context, str(value))
    assert on_the_command_line.value.message == f"must be {ALL[name].kind.expected}, got {value}"
