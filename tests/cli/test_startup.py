"""What the command line does not import before it needs it; `benchmarks/startup.py` has the times."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence

import pytest

from furiosa_llm.cli.main import cli, command_of

HEAVY = (
    *("asyncio", "fastapi", "google.protobuf", "jinja2", "llguidance", "matplotlib", "ml_dtypes", "multiprocessing"),
    *("numpy", "onnx", "onnx_ir", "onnxruntime", "pydantic", "sympy"),
)
"""What takes tens or hundreds of milliseconds to import, and no help has a use for."""
PROGRAM = """
import json, os, sys
from furiosa_llm.cli.main import cli
loaded = {}
for name, arguments, words in json.loads(sys.argv[1]):
    os.environ.update(COMP_WORDS=words, COMP_CWORD=str(words.count(" ")))
    try:
        cli.main(arguments, prog_name="furiosa-llm", complete_var="_COMPLETE", standalone_mode=not words)
    except SystemExit as ended:
        assert not ended.code, (name, ended.code)
    loaded[name] = sorted(set(json.loads(sys.argv[2])) & set(sys.modules))
sys.stderr.write(json.dumps(loaded))
"""


def loaded_by(*steps: tuple[str, Sequence[str], str], of: tuple[str, ...], **env: str) -> dict[str, list[str]]:
    """Which of `of` were imported after each of the steps: a name, arguments, and the words to complete."""
    ended = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(steps), json.dumps(of)],
        env={"PATH": "", **env},
        capture_output=True,
        text=True,
        check=True,
    )
    found: dict[str, list[str]] = json.loads(ended.stderr)
    return found


def test_help_and_version_import_little() -> None:
    found = loaded_by(("--help", ["--help"], ""), ("--version", ["--version"], ""), of=HEAVY)
    assert found == {"--help": [], "--version": []}


def test_help_of_commands_imports_little() -> None:
    steps = [(name, [name, "--help"], "") for name in cli.commands]
    assert loaded_by(*steps, of=HEAVY) == {name: [] for name, _, _ in steps}


def test_completion_imports_little() -> None:
    found = loaded_by(
        ("a command", [], "furiosa-llm pl"),
        ("an option", [], "furiosa-llm plan --ba"),
        of=HEAVY,
        _COMPLETE="bash_complete",
    )
    assert found == {"a command": [], "an option": []}


def test_public_names_are_imported_when_asked_for() -> None:
    program = (
        "import sys, furiosa_llm\n"
        f"heavy = {HEAVY}\n"
        "assert not set(heavy) & set(sys.modules)\n"
        "furiosa_llm.SamplingParams, furiosa_llm.FuriosaLLMError, furiosa_llm.EngineArgs\n"
        "assert not {'onnx_ir', 'sympy', 'onnxruntime'} & set(sys.modules)\n"
        "assert furiosa_llm.LLM.__module__ == 'furiosa_llm.runtime.llm'\n"
        "assert 'sympy' not in sys.modules, 'to run a model takes no builder'\n"
        "import furiosa_llm.builder.reshard as module\n"  # of the same name
        "from furiosa_llm.builder import reshard\n"
        "assert callable(reshard) and furiosa_llm.builder.reshard is reshard\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize("name", cli.commands)
def test_summaries(name: str) -> None:
    """Whole on a line of 80 columns, and what is behind it is the command."""
    summary = cli.commands[name].short_help
    assert summary is not None
    assert summary.endswith(".")
    assert len(summary) <= 80 - 18
    assert command_of(name).name == name
