"""aiperf: runs of its command against each endpoint type that it has for texts; no request may fail."""

# /// script
# requires-python = ">=3.11"
# dependencies = ["aiperf==0.13.0"]
# ///

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.clients.client import Server, run

_REQUESTS = 8


def measured(server: Server, kind: str, *options: str) -> dict[str, Any]:
    """The figures of a run, of which no request failed."""
    folder = Path(f"aiperf-{kind}-{len(options)}").absolute()
    command = [str(Path(sys.executable).parent / "aiperf"), "profile", "--ui", "none", "--url", server.root]
    command += ["--model", server.model, "--endpoint-type", kind, "--tokenizer", os.environ["TOKENIZER"]]
    command += ["--isl", "24", "--osl", "12", "--request-count", str(_REQUESTS), "--concurrency", "3"]
    command += ["--extra-inputs", "ignore_eos:true", "--artifact-dir", str(folder), *options]
    # Offline it takes names of tokenizers that it has fetched before, and no path.
    env = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    said = done.stdout[-1500:] + done.stderr[-1500:]
    assert done.returncode == 0, said
    [file] = folder.rglob("profile_export_aiperf.json")
    found: dict[str, Any] = json.loads(file.read_text())
    assert found["request_count"]["avg"] == _REQUESTS, said
    assert not found.get("error_request_count"), said
    return found


def streamed_chats(server: Server) -> None:
    found = measured(server, "chat", "--streaming", "--use-server-token-count")
    assert found["time_to_first_token"]["avg"] > 0
    assert found["output_sequence_length"]["avg"] == 12


def chats(server: Server) -> None:
    measured(server, "chat")


def completions(server: Server) -> None:
    assert measured(server, "completions", "--streaming")["time_to_first_token"]["avg"] > 0


def responses(server: Server) -> None:
    measured(server, "responses", "--streaming")


if __name__ == "__main__":
    run(streamed_chats, chats, completions, responses)
