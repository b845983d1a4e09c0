"""outlines: its kinds of output types as vLLM's structured outputs and as OpenAI's formats."""

# /// script
# requires-python = ">=3.11"
# dependencies = ["outlines[openai]==1.3.3"]
# ///

from __future__ import annotations

import json
from typing import Any, Literal

import openai
import outlines
from outlines.types import CFG, Regex
from pydantic import BaseModel

from tests.clients.client import Server, run


class Report(BaseModel):
    city: str
    degrees: float


REPORT = '{"city":"Seoul","degrees":21.5}'


def connect(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=server.url, api_key="none", max_retries=0)


def as_vllm_s(server: Server) -> None:
    model: Any = outlines.from_vllm(connect(server), server.model)
    server.say("It is ☀.", REPORT, "Yes", "2026-01", "((1))")
    assert model("How is it?", max_tokens=50) == "It is ☀."
    assert json.loads(model("How is it?", Report, max_tokens=50)) == json.loads(REPORT)
    assert model("Is it?", Literal["Yes", "No"]) == "Yes"
    assert model("When?", Regex(r"[0-9]{4}-[0-9]{2}")) == "2026-01"
    assert model("What?", CFG('start: "(" start ")" | "1"')) == "((1))"


def streamed(server: Server) -> None:
    model: Any = outlines.from_vllm(connect(server), server.model)
    server.say(REPORT)
    assert json.loads("".join(model.stream("How is it?", Report, max_tokens=50))) == json.loads(REPORT)


def as_openai_s(server: Server) -> None:
    model: Any = outlines.from_openai(connect(server), server.model)
    server.say("It is ☀.", REPORT, REPORT)
    assert model("How is it?") == "It is ☀."
    assert json.loads(model("How is it?", Report)) == json.loads(REPORT)
    assert json.loads(model("How is it?", dict)) == json.loads(REPORT)


if __name__ == "__main__":
    run(as_vllm_s, streamed, as_openai_s)
