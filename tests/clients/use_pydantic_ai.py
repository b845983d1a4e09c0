"""pydantic-ai by each protocol: three ways to typed results, with sets and decimals; tools, streams, thoughts."""

# /// script
# requires-python = ">=3.11"
# dependencies = ["pydantic-ai-slim[openai,anthropic]==2.66.0"]
# ///

from __future__ import annotations

import datetime
import uuid
from decimal import Decimal
from typing import Any, Literal

import anthropic
import openai
from pydantic import BaseModel, Field
from pydantic_ai import Agent, ModelRetry, NativeOutput, PromptedOutput, RunContext, ToolOutput
from pydantic_ai.models.anthropic import AnthropicModel
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.anthropic import AnthropicProvider
from pydantic_ai.providers.openai import OpenAIProvider

from tests.clients.client import Server, call, run


class Order(BaseModel):
    """What was bought"""

    id: uuid.UUID
    when: datetime.datetime
    price: Decimal = Field(gt=0, max_digits=8, decimal_places=2)
    tags: set[str]
    codes: frozenset[Literal["a", "b"]]
    pair: tuple[int, Decimal]
    by: dict[str, Decimal] = {}


JSON = (
    '{"id":"7f3c1c3e-6f0b-4d5e-9d5b-1c2d3e4f5a6b","when":"2026-01-02T03:04:05Z","price":"12.50","tags":["x","y"],'
    '"codes":["a"],"pair":[1,"2.5"],"by":{"k":"0.1"}}'
)
ORDER = Order.model_validate_json(JSON)


def models(server: Server) -> list[Any]:
    client = openai.AsyncOpenAI(base_url=server.url, api_key="none", max_retries=0)
    of_openai = OpenAIProvider(openai_client=client)
    other = anthropic.AsyncAnthropic(base_url=server.root, api_key="none", max_retries=0)
    return [
        OpenAIChatModel(server.model, provider=of_openai),
        OpenAIResponsesModel(server.model, provider=of_openai),
        AnthropicModel(server.model, provider=AnthropicProvider(anthropic_client=other)),
    ]


async def typed_by_a_tool(server: Server) -> None:
    for model in models(server):
        server.say(call("order", JSON))
        made = await Agent(model, output_type=ToolOutput(Order, name="order")).run("What was bought?")
        assert made.output == ORDER, model
        server.check()


async def typed_by_a_format(server: Server) -> None:
    for model in models(server)[:2]:  # of Anthropic's protocol, pydantic-ai takes it from Claude's models alone
        server.say(JSON)
        made = await Agent(model, output_type=NativeOutput(Order)).run("What was bought?")
        assert made.output == ORDER, model
        server.check()


async def typed_by_the_prompt(server: Server) -> None:
    for model in models(server):
        server.say(JSON)
        made = await Agent(model, output_type=PromptedOutput(Order)).run("What was bought?")
        assert made.output == ORDER, model
        server.check()


async def a_set_alone(server: Server) -> None:
    for model in models(server):
        server.say(call("final_result", '{"response":[1,2]}'), call("final_result", '{"response":"3.5"}'))
        assert (await Agent(model, output_type=set[int]).run("Which?")).output == {1, 2}
        assert (await Agent(model, output_type=Decimal).run("How much?")).output == Decimal("3.5")
        server.check()


def agent_with_tools(model: Any) -> Agent[int, str]:
    agent = Agent(model, deps_type=int, system_prompt="Be short.", retries=2)

    @agent.tool
    def price(context: RunContext[int], names: set[str], discount: Decimal = Decimal(0)) -> Decimal:
        """The price of all of them."""
        if "z" in names:
            raise ModelRetry("there is no z")
        return Decimal(context.deps * len(names)) - discount

    return agent


CHEAP = call("price", '{"names": ["x", "y"], "discount": "0.5"}')


async def tools(server: Server) -> None:
    for model in models(server):
        server.say(call("price", '{"names": ["z"]}'), CHEAP, "It is 9.5.")
        made = await agent_with_tools(model).run("How much?", deps=5)
        assert made.output == "It is 9.5.", model
        assert "9.5" in made.all_messages_json().decode()
        server.check()


async def streams(server: Server) -> None:
    for model in models(server):
        server.say(f"Let me see.\n{CHEAP}\n{CHEAP}", "It is ☀ 9.5.")
        events: list[Any] = []

        async def listen(_: Any, stream: Any, events: list[Any] = events) -> None:
            events += [event async for event in stream]

        made = await agent_with_tools(model).run("How much?", deps=5, event_stream_handler=listen)
        assert made.output == "It is ☀ 9.5.", model
        assert sum(type(event).__name__ == "FunctionToolResultEvent" for event in events) == 2
        server.check()
        server.say(call("order", JSON))
        async with Agent(model, output_type=ToolOutput(Order, name="order")).run_stream("What?") as stream:
            assert await stream.get_output() == ORDER
        server.check()


async def thoughts(server: Server) -> None:
    for model in models(server):
        server.say("<think>\nWell.\n</think>\n\nYes.", "As I said.")
        agent: Agent[None, str] = Agent(model)
        made = await agent.run("Is it so?")
        assert made.output.strip() == "Yes.", model
        assert "Well." in made.all_messages_json().decode()
        again = await agent.run("And now?", message_history=made.all_messages())
        assert again.output == "As I said."
        server.check()


if __name__ == "__main__":
    run(typed_by_a_tool, typed_by_a_format, typed_by_the_prompt, a_set_alone, tools, streams, thoughts)
