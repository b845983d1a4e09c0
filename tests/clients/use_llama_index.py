"""llama-index: chats, completions, streams, agents with tools, typed results."""

# /// script
# requires-python = ">=3.11"
# dependencies = ["llama-index-llms-openai-like==0.8.1"]
# ///

from __future__ import annotations

from typing import Any

from llama_index.core.agent.workflow import FunctionAgent
from llama_index.core.llms import ChatMessage
from llama_index.core.prompts import PromptTemplate
from llama_index.llms.openai_like import OpenAILike
from pydantic import BaseModel

from tests.clients.client import Server, call, run


class Report(BaseModel):
    """The weather of a city"""

    city: str
    degrees: float


def weather(city: str, days: int = 1) -> str:
    """The weather of a city."""
    return f"{city}: 21 degrees for {days} days"


def model(server: Server, **more: Any) -> Any:
    return OpenAILike(
        model=server.model,
        api_base=server.url,
        api_key="none",
        is_chat_model=True,
        is_function_calling_model=True,
        context_window=8192,
        max_retries=0,
        **more,
    )


ASK = [ChatMessage(role="system", content="Be short."), ChatMessage(role="user", content="How is the weather?")]


def chats(server: Server) -> None:
    server.say("It is ☀.", "It is ☀.")
    assert model(server).chat(ASK).message.content == "It is ☀."
    assert "".join(piece.delta for piece in model(server).stream_chat(ASK)) == "It is ☀."


def completions(server: Server) -> None:
    server.say(" the sea.", " the sea.", "It is so.")
    bare = OpenAILike(model=server.model, api_base=server.url, api_key="none", is_chat_model=False, max_tokens=20)
    assert bare.complete("Once upon").text == " the sea."
    assert "".join(piece.delta or "" for piece in bare.stream_complete("Once upon")) == " the sea."
    assert model(server).complete("Is it so?").text == "It is so."


async def agents(server: Server) -> None:
    server.say(call("weather", '{"city": "Seoul", "days": 2}'), "It is warm.")
    agent = FunctionAgent(tools=[weather], llm=model(server), system_prompt="Be short.", streaming=True)
    assert str(await agent.run("How is the weather in Seoul?")) == "It is warm."


def typed_results(server: Server) -> None:
    said = '{"city":"Seoul","degrees":21.5}'
    server.say(call("Report", said), said)
    prompt = PromptTemplate("The weather of {city}")
    made = model(server).structured_predict(Report, prompt, city="Seoul")
    assert made == Report(city="Seoul", degrees=21.5)
    native = model(server, should_use_structured_outputs=True)
    assert native.structured_predict(Report, prompt, city="Seoul") == Report(city="Seoul", degrees=21.5)


if __name__ == "__main__":
    run(chats, completions, agents, typed_results)
