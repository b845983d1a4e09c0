"""guidellm: runs of its command against each protocol that it has, streamed and not; no request may fail."""

# /// script
# requires-python = ">=3.11"
# dependencies = ["guidellm==0.8.1"]
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


def measured(server: Server, form: str, profile: str, **backend: str) -> list[dict[str, Any]]:
    """The benchmarks of a run, of which no request failed."""
    options = {
        "--backend": f"kind=openai_http,target={server.root},model={server.model},request_format={form}"
        + "".join(f",{name}={value}" for name, value in backend.items()),
        "--profile": f"kind={profile}",
        "--constraint": f"kind=max_requests,count={_REQUESTS}",
        "--data": "kind=synthetic_text,prompt_tokens=24,output_tokens=12",
        "--tokenizer": f"kind=hf_auto,model={os.environ['TOKENIZER']}",
        "--output": f"kind=json,path={Path('report.json').absolute()}",
    }
    command = [str(Path(sys.executable).parent / "guidellm"), "run", "--disable-console"]
    done = subprocess.run(
        [*command, *(word for pair in options.items() for word in pair)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-1500:]
    found: list[dict[str, Any]] = json.loads(Path("report.json").read_text())["benchmarks"]
    for one in found:
        totals = one["metrics"]["request_totals"]
        assert totals["errored"] == 0, totals
        assert totals["successful"] == _REQUESTS, totals
        tokens = one["metrics"]["output_token_count"]["successful"]["mean"]
        assert tokens == 12, f"{tokens} tokens of output, expected 12"
    return found


def chats(server: Server) -> None:
    [found] = measured(server, "/v1/chat/completions", "concurrent,streams=3")
    assert found["metrics"]["time_to_first_token_ms"]["successful"]["mean"] > 0


def completions(server: Server) -> None:
    measured(server, "/v1/completions", "throughput,max_concurrency=4")


def whole_chats(server: Server) -> None:
    measured(server, "/v1/chat/completions", "synchronous", stream="false")


def responses(server: Server) -> None:
    measured(server, "/v1/responses", "concurrent,streams=2")


if __name__ == "__main__":
    run(chats, completions, whole_chats, responses)
