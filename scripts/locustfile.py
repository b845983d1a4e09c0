"""Users of the load tool locust: each streams completions, and compares them with the model's without a server.

Runs in an environment that has locust and nothing of ours; tests/campaigns/server_load.py starts it. The file that the
environment variable EXPECTED names has the model's name, the number of tokens, and for each prompt the text that has to
come.
"""

import json
import os
import random
from pathlib import Path

from locust import FastHttpUser, task

_ASKED = json.loads(Path(os.environ["EXPECTED"]).read_text())


class Streamer(FastHttpUser):
    """One stream after another, without a pause."""

    network_timeout = 600.0
    connection_timeout = 600.0

    @task
    def complete(self) -> None:
        """Streams one completion; a failure is counted by locust, which fails by the count."""
        prompt = random.choice(list(_ASKED["expected"]))
        body = {
            "model": _ASKED["model"],
            "prompt": prompt,
            "max_tokens": _ASKED["max_tokens"],
            "temperature": 0,
            "ignore_eos": True,
            "add_special_tokens": False,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        with self.client.post("/v1/completions", json=body, stream=True, catch_response=True) as answer:
            if answer.status_code != 200:
                answer.failure(f"the status {answer.status_code}")
                return
            events = b"".join(answer.iter_content(2**16, decode_content=False)).decode().split("\n\n")
            found = _completion(events)
            expected = _ASKED["expected"][prompt], _ASKED["max_tokens"]
            if events[-2:] != ["data: [DONE]", ""]:
                answer.failure(f"the stream broke off: {events[-2:]}")
            elif found != expected:
                answer.failure(f"{prompt!r} gave {found}, expected {expected}")
            else:
                answer.success()


def _completion(events: list[str]) -> tuple[str, int]:
    """The text of all chunks, and the number of tokens that the last of them says."""
    chunks = [json.loads(one.removeprefix("data: ")) for one in events if one.startswith("data: {")]
    text = "".join(choice["text"] for chunk in chunks for choice in chunk.get("choices", ()))
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks if chunk.get("usage")]
    return text, counts[-1] if counts else 0
