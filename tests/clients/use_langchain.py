"""langchain: by OpenAI's protocols and Anthropic's; tools, typed results, streams, reasoning effort."""

# /// script
# requires-python = ">=3.11"
# dependencies = ["langchain-openai==1.7.4", "langchain-anthropic==1.7.10"]
# ///

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

os.environ["ANTHROPIC_API_KEY"] = "none"

from langchain_anthropic import ChatAnthropic
from langchain_core.messages import HumanMessage, SystemMessage, ToolMessage
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAI
from pydantic import BaseModel, Field

from tests.clients.client import Server, call, run


class Report(BaseModel):
    """The weather of a city"""

    city: str
    degrees: float = Field(description="Celsius")


@tool
def weather(city: str, days: list[int] | None = None) -> str:
    """The weather of a city."""
    return f"{city}: 21 degrees on {days}"


SEOUL = call("weather", '{"city": "Seoul", "days": [1, 2]}')
REPORT = '{"city":"Seoul","degrees":21.5}'
ASK: list[Any] = [SystemMessage("Be short."), HumanMessage("How is the weather in Seoul?")]


def models(server: Server, **more: Any) -> Iterable[Any]:
    openai: Any = {"base_url": server.url, "api_key": "none", "max_retries": 0, "model": server.model}
    yield ChatOpenAI(stream_usage=True, **openai, **more)
    yield ChatOpenAI(use_responses_api=True, **openai, **more)
    if "reasoning_effort" not in more:
        yield ChatAnthropic(base_url=server.root, api_key="none", max_retries=0, model=server.model, max_tokens=500)


def chains(server: Server) -> None:
    for model in models(server, temperature=0.5, stop=None):
        server.say("A fjord is a bay.", "☀ Rhine")
        chain = ChatPromptTemplate.from_messages([("system", "Be short."), ("human", "{ask}")]) | model
        assert (chain | StrOutputParser()).invoke({"ask": "What is a fjord?"}) == "A fjord is a bay."
        assert "".join((chain | StrOutputParser()).stream({"ask": "Name a river."})) == "☀ Rhine"


def tools(server: Server) -> None:
    for model in models(server):
        bound = model.bind_tools([weather])
        server.say(f"Let me see.\n{SEOUL}\n{SEOUL}", "It is warm.")
        asked = bound.invoke(ASK)
        assert [one["args"] for one in asked.tool_calls] == [{"city": "Seoul", "days": [1, 2]}] * 2
        results = [weather.invoke(one) for one in asked.tool_calls]
        assert all(isinstance(one, ToolMessage) for one in results)
        assert bound.invoke([*ASK, asked, *results]).text == "It is warm."


def streamed_tools(server: Server) -> None:
    for model in models(server):
        server.say(SEOUL)
        pieces = list(model.bind_tools([weather], tool_choice="auto").stream(ASK))
        whole = pieces[0]
        for piece in pieces[1:]:
            whole += piece
        assert [one["args"] for one in whole.tool_calls] == [{"city": "Seoul", "days": [1, 2]}], whole
        assert sum(bool(piece.tool_call_chunks) for piece in pieces) > 4
        assert whole.usage_metadata["output_tokens"] > 9


def forced_tools(server: Server) -> None:
    for choice in ("weather", "any"):
        for model in models(server):
            server.say(SEOUL)
            [asked] = model.bind_tools([weather], tool_choice=choice, strict=None).invoke(ASK).tool_calls
            assert asked["name"] == "weather"


def typed_results(server: Server) -> None:
    for model in models(server):
        for method in ("function_calling", "json_schema", "json_mode"):
            if isinstance(model, ChatAnthropic) and method != "function_calling":
                continue  # langchain asks these of Claude's models alone
            server.say(call("Report", REPORT) if method == "function_calling" else REPORT)
            made = model.with_structured_output(Report, method=method).invoke("Give JSON: how is the weather?")
            assert made == Report(city="Seoul", degrees=21.5), (model, method)


def reasoning_effort(server: Server) -> None:
    for model in models(server, reasoning_effort="low"):
        server.say(f"Which city?\n</think>\n\n{SEOUL}", "Hm.\n</think>\n\nIt is warm.")
        bound = model.bind_tools([weather])
        asked = bound.invoke(ASK)
        [one] = asked.tool_calls
        assert bound.invoke([*ASK, asked, weather.invoke(one)]).text.strip() == "It is warm."


async def at_once(server: Server) -> None:
    for model in models(server):
        server.say(*"abc")
        assert sorted(one.text for one in await model.abatch([ASK, ASK, ASK])) == ["a", "b", "c"]


def completions(server: Server) -> None:
    model = OpenAI(base_url=server.url, api_key="none", model=server.model, max_tokens=20, best_of=1, n=1)
    server.say(" the sea.")
    assert model.invoke("Once upon") == " the sea."


if __name__ == "__main__":
    run(
        *(chains, tools, streamed_tools, forced_tools, typed_results, reasoning_effort, at_once, completions),
    )
