"""The `openai` package: both of its protocols, streams, tools, parsed answers, embeddings refused."""

# /// script
# requires-python = ">=3.11"
# dependencies = ["openai==3.57.0"]
# ///

from __future__ import annotations

from typing import Any, Literal

import openai
from pydantic import BaseModel

from tests.clients.client import Server, call, refusal, run


class Weather(BaseModel):
    """The weather of a city"""

    city: str
    unit: Literal["C", "F"] = "C"


class Steps(BaseModel):
    steps: list[str]
    answer: float | None


TOOL: Any = openai.pydantic_function_tool(Weather, name="weather")
ASK: Any = [{"role": "user", "content": "How is the weather in Seoul?"}]


def connect(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=server.url, api_key="none", max_retries=0)


def chat(server: Server) -> None:
    server.say("It is sunny.")
    made = connect(server).chat.completions.create(model=server.model, messages=ASK, seed=1, user="x", store=False)
    assert made.choices[0].message.content == "It is sunny."
    assert made.choices[0].finish_reason == "stop"


def streamed_chat(server: Server) -> None:
    server.say("It is sunny. ☀")
    with connect(server).chat.completions.stream(
        model=server.model, messages=ASK, stream_options={"include_usage": True}
    ) as stream:
        said = "".join(event.delta for event in stream if event.type == "content.delta")
        assert said == stream.get_final_completion().choices[0].message.content == "It is sunny. ☀"


def tools_and_back(server: Server) -> None:
    client = connect(server)
    server.say(call("weather", '{"city": "Seoul", "unit": "C"}'), "21 degrees.")
    made = client.chat.completions.parse(model=server.model, messages=ASK, tools=[TOOL])
    [asked] = made.choices[0].message.tool_calls or []
    assert asked.function.parsed_arguments == Weather(city="Seoul")
    assert made.choices[0].finish_reason == "tool_calls"
    told = [*ASK, made.choices[0].message, {"role": "tool", "tool_call_id": asked.id, "content": "21"}]
    again = client.chat.completions.create(model=server.model, messages=told, tools=[TOOL])
    assert again.choices[0].message.content == "21 degrees."


def streamed_calls(server: Server) -> None:
    one, two = '{"city": "Seoul", "unit": "C"}', '{"city": "Busan", "unit": "F"}'
    server.say(f"Let me see.\n{call('weather', one)}\n{call('weather', two)}")
    with connect(server).chat.completions.stream(model=server.model, messages=ASK, tools=[TOOL]) as stream:
        pieces = sum(event.type == "tool_calls.function.arguments.delta" for event in stream)
        message = stream.get_final_completion().choices[0].message
    assert [found.function.arguments for found in message.tool_calls or []] == [one, two]
    assert pieces > 4
    assert (message.content or "").strip() == "Let me see."


def parsed_answer(server: Server) -> None:
    server.say('{"steps":["add"],"answer":4}')
    made = connect(server).chat.completions.parse(model=server.model, messages=ASK, response_format=Steps)
    assert made.choices[0].message.parsed == Steps(steps=["add"], answer=4)


def responses(server: Server) -> None:
    client = connect(server)
    server.say("Sunny.", "Still sunny.")
    first = client.responses.create(model=server.model, input="How is it?", instructions="Be short.")
    again = client.responses.create(model=server.model, input="And now?", previous_response_id=first.id)
    assert (first.output_text, again.output_text) == ("Sunny.", "Still sunny.")
    server.say('{"steps":[],"answer":null}')
    parsed = client.responses.parse(model=server.model, input="x", text_format=Steps)
    assert parsed.output_parsed == Steps(steps=[], answer=None)


def streamed_responses(server: Server) -> None:
    tool: Any = {"type": "function", "name": "weather", "parameters": TOOL["function"]["parameters"], "strict": True}
    server.say("<think>\nWhich city?\n</think>\n" + call("weather", '{"city": "Seoul", "unit": "C"}'))
    with connect(server).responses.stream(model=server.model, input="How is it?", tools=[tool]) as stream:
        kinds = {event.type for event in stream}
        made = stream.get_final_response()
    assert {"response.reasoning_text.delta", "response.function_call_arguments.delta"} <= kinds
    assert [item.type for item in made.output] == ["reasoning", "function_call"]


def others(server: Server) -> None:
    client = connect(server)
    server.say(" there was a sea.")
    made = client.completions.create(model=server.model, prompt="Once", max_tokens=50)
    assert made.choices[0].text == " there was a sea."
    assert [one.id for one in client.models.list()] == [server.model]
    error = refusal(openai.BadRequestError, client.embeddings.create, model=server.model, input="x")
    assert "makes no embeddings" in str(error) or "generates" in str(error)


async def at_once(server: Server) -> None:
    import asyncio

    async with openai.AsyncOpenAI(base_url=server.url, api_key="none") as client:
        server.say(*(f"{number}" for number in range(12)))
        made = await asyncio.gather(
            *(client.chat.completions.create(model=server.model, messages=ASK) for _ in range(12))
        )
    assert sorted(int(one.choices[0].message.content or "") for one in made) == list(range(12))


if __name__ == "__main__":
    run(
        *(chat, streamed_chat, tools_and_back, streamed_calls, parsed_answer, responses, streamed_responses),
        *(others, at_once),
    )
