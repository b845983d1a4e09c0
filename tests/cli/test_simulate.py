"""`furiosa-llm simulate`: what it prints, and what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from furiosa_llm.simulate import this_machine
from tests.cli.conftest import OPTIMUM, Cli
from tests.simulate.conftest import small_machine

MODEL = "tiny-llama-genai-fp32"


def test_the_answer_has_its_error(cli: Cli, zoo: Path) -> None:
    result = cli("simulate", zoo / MODEL / "model.onnx", "--device", "rngd", "--input-len", 64, "--output-len", 32)
    assert result.code == 0
    assert "FuriosaAI RNGD with furiosa-llm: 64 tokens in, 32 out" in result.out
    assert "extrapolated, median error" in result.out
    assert "8 1 1" in result.out


def test_json_has_every_figure(cli: Cli, zoo: Path) -> None:
    run = ["simulate", zoo / MODEL / "model.onnx", "--device", "h100", "--cards", 2, "--search", "--json", "-"]
    result = cli(*run, "--concurrency", "1,4", "--request-rate", 2, "--goodput", "tpot:100")
    assert result.code == 0
    found = json.loads(result.out)
    assert found["tried"] == 9  # three placements, three loads
    assert found["fewest"]["cards"] == 1
    assert {"ttft", "tpot", "error", "causes"} <= found["answers"][0].keys()
    assert cli(*run, "--concurrency", "1,4", "--request-rate", 2, "--goodput", "tpot:100").out == result.out


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--device", "none"], "there is no device 'none'"),
        (["--device", "rngd", "--software", "none"], "rngd has no software 'none'; use one of furiosa-llm"),
        (["--device", "rngd", "--concurrency", "1,x"], "'1,x' is not a list of numbers above 0"),
        (["--device", "rngd", "--calibrate", "tpot=3"], "'tpot=3' is not tpot=MS@c=N"),
        (["--device", "rngd", "--goodput", "speed:3"], "'speed:3' is not a limit"),
    ],
)
def test_what_has_no_answer_is_refused(cli: Cli, zoo: Path, more: list[str], message: str) -> None:
    result = cli("simulate", zoo / MODEL / "model.onnx", *more)
    assert result.code != 0
    assert message in " ".join(result.err.split())


def test_a_model_that_does_not_decode_is_refused(cli: Cli, zoo: Path) -> None:
    result = cli("simulate", zoo / "tiny-vit-optimum" / "model.onnx", "--device", "rngd")
    assert result.code == 1
    assert "no steps that decode with a cache" in result.err


def test_requests_are_served_one_by_one(cli: Cli, zoo: Path, tmp_path: Path) -> None:
    line, trace = tmp_path / "line.json", tmp_path / "trace.jsonl"
    trace.write_text('{"arrival_time": 1, "input_toks": 20, "output_toks": 5}\n' * 4)
    odd = shutil.copytree(zoo / MODEL, tmp_path / "\x1b[31m\x9b")  # what would steer a terminal that shows the page
    run = ["simulate", odd / "model.onnx", "--device", "h100"]
    result = cli(*run, "--trace", trace, "--timeline", line, "--goodput", "ttft:1000", "--json", "-")
    assert result.code == 0
    found = json.loads(result.out)
    assert found["answers"] == []
    assert found["clocked"][0]["completed"] == 4
    assert found["clocked"][0]["goodput"] > 0
    assert json.loads(line.read_text())["traceEvents"]
    shown = tmp_path / "page.html"
    drawn = cli(
        *run, "--html", shown, "--concurrency", 2, "--request-rate", 3, "--requests", 5, "--lengths", "sharegpt"
    )
    assert drawn.code == 0
    assert "2 users" in drawn.out
    assert "3 req/s" in drawn.out
    assert shown.read_text().startswith("<!doctype html>")
    assert "/\\u001b[31m\\u009b/model.onnx" in shown.read_text()
    assert not {"\x1b", "\x9b"} & {*shown.read_text(), *drawn.out, *drawn.err}


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--timeline", "x"], "--timeline is of requests that are served one by one"),
        (["--shared-prefix", 3], "--shared-prefix is of requests that are served one by one"),
        (["--trace", "x", "--request-rate", 2], "--trace has its own requests and arrivals; leave out --request-rate"),
        (["--trace", "none"], "the trace none cannot be read"),
        (["--json", "none/none"], "none/none cannot be written"),
        (["--requests", 3, "--concurrency", 0.4], "--requests is served to whole users, and --concurrency has 0.4"),
        (["--cards", 3, "--hosts", 2], "3 cards are not spread evenly over 2 hosts"),
        (["--software", ""], "h100 has no software ''"),
    ],
)
def test_options_that_do_not_go_together_are_refused(cli: Cli, zoo: Path, more: list[object], message: str) -> None:
    result = cli("simulate", zoo / MODEL / "model.onnx", "--device", "h100", *more)
    assert result.code == 1
    assert message in " ".join(result.err.split())


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *(("--input-len", value) for value in ("nan", "inf", "0", "1e30")),
        *(("--price-per-hour", value) for value in ("nan", "inf", "0", "1e308")),
        *(("--cards", value) for value in ("0", "1000000")),
        ("--hosts", "0"),
    ],
)
def test_numbers_that_are_none_are_refused(cli: Cli, option: str, value: str) -> None:
    result = cli("simulate", "model.onnx", "--device", "rngd", option, value)
    assert result.code == 2
    assert f"Invalid value for '{option}'" in result.err


def test_an_artifact_is_simulated_as_its_model(cli: Cli, zoo: Path, built: Path) -> None:
    more = ["--device", "rngd", "--input-len", 64, "--output-len", 32, "--json", "-"]
    of_artifact, of_model = (
        json.loads(cli("simulate", path, *more).out) for path in (built, zoo / OPTIMUM / "model.onnx")
    )
    assert of_artifact["answers"] == of_model["answers"]


def test_this_machine_is_written_as_a_device(
    cli: Cli, zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(this_machine, "measure_this_machine", small_machine)
    file = tmp_path / "here.toml"
    assert cli("simulate", "--measure-this-machine", "--output", file).code == 0
    assert cli("simulate", "--measure-this-machine").out == file.read_text()
    result = cli("simulate", zoo / MODEL / "model.onnx", "--device", file, "-tp", 4, "-dp", 1, "--concurrency", "1,4")
    assert result.code == 0, result.err
    assert "furiosa-llm-onnx: 1024 tokens in" in result.out


@pytest.mark.parametrize(
    "arguments",
    [
        ("--device", "rngd"),
        ("model.onnx",),
        ("model.onnx", "--device", "rngd", "--output", "here.toml"),
        ("--measure-this-machine", "--device", "rngd"),
        ("model.onnx", "--measure-this-machine"),
    ],
)
def test_a_model_or_this_machine_is_asked_for(cli: Cli, arguments: tuple[str, ...]) -> None:
    result = cli("simulate", *arguments)
    assert result.code == 2
    assert "--measure-this-machine" in result.err
