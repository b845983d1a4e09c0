"""The server's fuzz: requests made from its OpenAPI document by schemathesis, each answer compared with the document.

    python -m tests.campaigns.fuzz_server --seconds 600

`furiosa-llm serve` runs in a process of its own, as each of SERVERS in turn; each gets its share of the time. The
checks are all of schemathesis' own, but for those in LEFT_OUT, and those of `schemathesis_hooks`. A finding is shown
with the request that repeats it, as is anything that the server logs as an error, and the campaign ends with status 1.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from furiosa_llm.builder import ArtifactBuilder

ROOT = Path(__file__).resolve().parents[2]
ZOO = ROOT / "fixtures" / "zoo"
KEY = "a-key-of-the-campaign"
LEFT_OUT: Mapping[str, str] = {
    "use_after_free": "nothing is deleted by a request",
    "ensure_resource_availability": "nothing is made by a request",
    "object_level_authorization": "no request belongs to a user",
}
"""The checks that are not made, each with the reason: they look at resources that requests make and delete."""

_LISTENING = re.compile(r"Uvicorn running on (http://127\.0\.0\.1:\d+) ")
_FAULT = re.compile(r"ERROR|Traceback|Exception")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """A server that is tried.

    artifact: which of the campaign's.
    options: of `furiosa-llm serve`.
    share: of the time.
    """

    artifact: str
    options: Sequence[str]
    share: float


_SMALL = ("--max-model-len", "160", "--max-batch-size", "8")
SERVERS: Mapping[str, Served] = {
    "decoder": Served(artifact="decoder", options=_SMALL, share=0.5),
    "tools and a key": Served(
        artifact="decoder",
        options=(
            *_SMALL,
            *("--enable-auto-tool-choice", "--tool-call-parser", "hermes", "--api-key", KEY),
            *("--served-model-name", "org/model", "--served-model-name", "short"),
        ),
        share=0.2,
    ),
    "no template": Served(artifact="bare", options=_SMALL, share=0.1),
    "encoder": Served(artifact="encoder", options=("--max-body-nbytes", "200000"), share=0.2),
}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What a server was found to do: how many requests it was sent, and what is wrong, as schemathesis shows it."""

    name: str
    requests: int
    finding: str | None


def write_artifacts(folder: Path) -> None:
    """A decoder with its tokenizer, one that has no chat template, and an encoder."""
    decoder, encoder = ZOO / "tiny-llama-optimum", ZOO / "tiny-bert-optimum"
    for name, model in (("decoder", decoder), ("bare", decoder), ("encoder", encoder)):
        source = folder / "sources" / name
        shutil.copytree(model, source)
        shutil.copy(decoder / "tokenizer.json", source)
        if name == "bare":
            (source / "chat_template.jinja").unlink()
            (source / "tokenizer_config.json").unlink()
        ArtifactBuilder(source / "model.onnx", tensor_parallel_size=4).build(folder / name)


@contextlib.contextmanager
def running(artifact: Path, options: Sequence[str], log: list[str]) -> Iterator[str]:
    """The URL of a server in a process of its own; `log` gets what it says."""
    main = "from furiosa_llm.cli.main import main; main()"
    command = [sys.executable, "-uc", main, "serve", str(artifact), "--host", "127.0.0.1", "--port", "0", *options]
    command += ["--uvicorn-log-level", "info", "--disable-uvicorn-access-log", "--disable-log-stats"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    try:
        url = None
        for line in process.stdout:
            log.append(line)
            if found := _LISTENING.search(line):
                url = found[1]
                break
        assert url is not None, "".join(log)
        reader = threading.Thread(target=log.extend, args=(process.stdout,))  # or its pipe would fill
        reader.start()
        yield url
        assert process.poll() is None, f"the server ended with {process.returncode}: {''.join(log[-50:])}"
    finally:
        process.terminate()
        process.wait()
        reader.join()
        process.stdout.close()


_READ_ONLY = "^/(health|version|metrics|machine|tokenizer_info|v1/models.*)$"
"""What a run by time leaves out: answers that are there at once would take most of it, and have nothing to vary."""

_MOST_EVENTS = 1_000_000
"""More than a stream has: schemathesis would else cut it behind 20, and its end would not be seen."""


def configuration(folder: Path) -> Path:
    """The file that schemathesis is told by what the command line cannot say."""
    own = Path(__file__).with_name("schemathesis_hooks.py")
    file = folder / "schemathesis.toml"
    # Requests that keep to the schema may be refused as the hooks have it, with their own check.
    file.write_text(
        f"hooks = {json.dumps(str(own))}\n"
        f"max-stream-events = {_MOST_EVENTS}\n"
        "[checks]\n"
        'positive_data_acceptance.expected-statuses = ["2xx", 400, 404, 413, 429]\n'
        "negative_data_rejection.expected-statuses = [400, 401, 404, 405, 408, 413, 415]\n"
        "[phases.stateful]\nenabled = true\n"
    )
    return file


def command_of(url: str, config: Path, seconds: float | None, seed: int) -> list[str]:
    """How schemathesis is run; without `seconds`, on a few examples that follow from the seed."""
    command = [sys.executable, "-m", "schemathesis.cli", "--config-file", str(config), "run", f"{url}/openapi.json"]
    command += ["--checks", "all", "--exclude-checks", ",".join(LEFT_OUT), "--seed", str(seed), "--no-color"]
    # How long an answer takes is not what is tested: one request may ask for hundreds of completions.
    command += ["--continue-on-failure", "--request-timeout", "60", "--max-response-time", "60"]
    command += ["--header", f"Authorization: Bearer {KEY}", "--warnings", "off"]
    if seconds is None:
        return [*command, "--max-examples", "3", "--generation-deterministic", "--phases", "examples,coverage,fuzzing"]
    command += ["--exclude-path-regex", _READ_ONLY]
    return [*command, "--generation-database", "none", "--max-time", str(max(1, round(seconds)))]


def try_server(folder: Path, name: str, seconds: float | None, seed: int) -> Result:
    """Sends requests to one of SERVERS for some time."""
    served = SERVERS[name]
    log: list[str] = []
    with running(folder / served.artifact, served.options, log) as url:
        ran = subprocess.run(
            command_of(url, configuration(folder), seconds, seed),
            capture_output=True,
            text=True,
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(ROOT)},  # the hooks import what lies beside them
        )
    count = re.search(r"^ +(\d+) generated", ran.stdout, re.MULTILINE)
    faults = [line for line in log if _FAULT.search(line)]
    finding = None
    if ran.returncode or count is None:
        finding = ran.stdout + ran.stderr
    elif faults:
        finding = "the server logs:\n" + "".join(log[-200:])
    return Result(name=name, requests=int(count[1]) if count else 0, finding=finding)


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description="Send the server what its schema allows, and what it does not.")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--server", choices=list(SERVERS), help="this one only, for all of the time")
    arguments = parser.parse_args()
    chosen = [arguments.server] if arguments.server else list(SERVERS)
    total = sum(SERVERS[name].share for name in chosen)
    findings = 0
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        write_artifacts(folder)
        for name in chosen:
            result = try_server(folder, name, arguments.seconds * SERVERS[name].share / total, arguments.seed)
            findings += result.finding is not None
            sys.stdout.write(f"{name}: {result.requests} requests, {'FINDINGS' if result.finding else 'none wrong'}\n")
            sys.stdout.write(result.finding or "")
            sys.stdout.flush()
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
