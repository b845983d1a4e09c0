"""openai-agents: the Responses API, which is its default, and chat completions; tools, hand-offs, typed results."""

# /// script
# requires-python = ">=3.11"
# dependencies = ["openai-agents==0.24.0"]
# ///

from __future__ import annotations

from typing import Any

import openai
from agents import (
    Agent,
    ModelSettings,
    OpenAIChatCompletionsModel,
    OpenAIResponsesModel,
    Runner,
    SQLiteSession,
    function_tool,
    set_tracing_disabled,
)
from openai.types.shared import Reasoning
from pydantic import BaseModel

from tests.clients.client import Server, call, run


class Report(BaseModel):
    city: str
    degrees: float


@function_tool
def weather(city: str, days: int = 1) -> str:
    """The weather of a city."""
    return f"{city}: 21 degrees for {days} days"


def models(server: Server) -> list[Any]:
    client = openai.AsyncOpenAI(base_url=server.url, api_key="none", max_retries=0)
    kinds: list[Any] = [OpenAIResponsesModel, OpenAIChatCompletionsModel]
    return [kind(model=server.model, openai_client=client) for kind in kinds]


SEOUL = call("weather", '{"city": "Seoul", "days": 2}')


async def tools(server: Server) -> None:
    for model in models(server):
        server.say(SEOUL, "It is warm.")
        agent = Agent(name="x", instructions="Be short.", model=model, tools=[weather])
        made = await Runner.run(agent, "How is the weather in Seoul?")
        assert made.final_output == "It is warm."
        assert any("21 degrees for 2 days" in str(item.to_input_item()) for item in made.new_items)


async def streamed_tools(server: Server) -> None:
    for model in models(server):
        server.say(f"Let me see.\n{SEOUL}\n{SEOUL}", "It is warm.")
        agent = Agent(name="x", instructions="Be short.", model=model, tools=[weather])
        made = Runner.run_streamed(agent, "How is the weather in Seoul?")
        kinds = [event.type async for event in made.stream_events()]
        assert made.final_output == "It is warm."
        assert kinds.count("run_item_stream_event") >= 5


async def typed_results(server: Server) -> None:
    for model in models(server):
        server.say(SEOUL, '{"city":"Seoul","degrees":21.5}')
        agent = Agent(name="x", model=model, tools=[weather], output_type=Report)
        made = await Runner.run(agent, "How is the weather in Seoul?")
        assert made.final_output == Report(city="Seoul", degrees=21.5)


async def hand_offs(server: Server) -> None:
    for model in models(server):
        other = Agent(name="Korean speaker", model=model, instructions="Speak Korean.")
        server.say(call("transfer_to_korean_speaker", "{}"), "안녕하세요")
        made = await Runner.run(Agent(name="x", model=model, handoffs=[other]), "Speak Korean to me.")
        assert (made.final_output, made.last_agent.name) == ("안녕하세요", "Korean speaker")


async def sessions(server: Server) -> None:
    for model in models(server):
        session = SQLiteSession(f"{type(model)}")
        agent = Agent(name="x", model=model, tools=[weather])
        server.say(SEOUL, "It is warm.", "As I said.")
        await Runner.run(agent, "How is the weather?", session=session)
        assert (await Runner.run(agent, "And now?", session=session)).final_output == "As I said."


async def settings(server: Server) -> None:
    for model in models(server):
        server.say("<think>\nWell.\n</think>\n\nYes.", SEOUL)
        thinking = ModelSettings(reasoning=Reasoning(effort="low"), temperature=0.5, max_tokens=200, store=False)
        agent = Agent(name="x", model=model, model_settings=thinking)
        assert (await Runner.run(agent, "Is it so?")).final_output.strip() == "Yes."
        forced = ModelSettings(tool_choice="weather", parallel_tool_calls=False)
        agent = Agent(
            name="x", model=model, tools=[weather], model_settings=forced, tool_use_behavior="stop_on_first_tool"
        )
        assert (await Runner.run(agent, "How is it?")).final_output == "Seoul: 21 degrees for 2 days"


async def earlier_responses(server: Server) -> None:
    agent = Agent(name="x", model=models(server)[0], tools=[weather])
    server.say("Hello.", SEOUL, "Warm.")
    first = await Runner.run(agent, "Hi")
    again = await Runner.run(agent, "How is the weather?", previous_response_id=first.last_response_id)
    assert again.final_output == "Warm."


if __name__ == "__main__":
    set_tracing_disabled(True)
    run(tools, streamed_tools, typed_results, hand_offs, sessions, settings, earlier_responses)
