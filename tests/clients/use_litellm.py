"""litellm: chats, responses, Anthropic's messages, and its bridges; streams of messages need its proxy's packages."""

# /// script
# requires-python = ">=3.11"
# dependencies = ["litellm==1.110.2", "fastapi", "orjson", "soundfile", "backoff", "redis"]
# ///

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # or it asks GitHub for prices

import litellm
from pydantic import BaseModel

from tests.clients.client import Server, call, run


class Report(BaseModel):
    city: str
    degrees: float


PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOL = {"type": "function", "function": {"name": "weather", "description": "It", "parameters": PARAMETERS}}
FLAT = {"type": "function", "name": "weather", "description": "It", "parameters": PARAMETERS, "strict": False}
CLAUDE = {"name": "weather", "description": "It", "input_schema": PARAMETERS}
ASK: list[Any] = [{"role": "user", "content": "How is the weather in Seoul?"}]
SEOUL = call("weather", '{"city": "Seoul"}')


def ways(server: Server) -> Iterable[dict[str, Any]]:
    """How litellm reaches the server: as OpenAI's, as vLLM's, by the Responses API under a chat, as Anthropic's."""
    for provider in ("openai", "hosted_vllm", "openai/responses"):
        yield {"model": f"{provider}/{server.model}", "api_base": server.url, "api_key": "none"}
    yield {"model": f"anthropic/{server.model}", "api_base": server.root, "api_key": "none", "max_tokens": 500}


def chats(server: Server) -> None:
    for way in ways(server):
        server.say("It is ☀.", "It is ☀.")
        assert litellm.completion(messages=ASK, **way).choices[0].message.content == "It is ☀.", way
        pieces = list(litellm.completion(messages=ASK, stream=True, stream_options={"include_usage": True}, **way))
        assert "".join(one.choices[0].delta.content or "" for one in pieces if one.choices) == "It is ☀.", way
        assert pieces[-1].usage.completion_tokens > 2, way


def tools(server: Server) -> None:
    for way in ways(server):
        server.say(f"Let me see.\n{SEOUL}\n{SEOUL}", "It is warm.")
        asked = litellm.completion(messages=ASK, tools=[TOOL], **way).choices[0].message
        results = [{"role": "tool", "tool_call_id": one.id, "content": "21"} for one in asked.tool_calls]
        assert len(results) == 2, way
        again = litellm.completion(messages=[*ASK, asked, *results], tools=[TOOL], **way)
        assert again.choices[0].message.content == "It is warm.", way
        server.say(SEOUL)
        pieces = list(litellm.completion(messages=ASK, tools=[TOOL], tool_choice="required", stream=True, **way))
        whole = litellm.stream_chunk_builder(pieces)
        assert whole is not None
        assert whole.choices[0].message.tool_calls[0].function.arguments == '{"city": "Seoul"}', way


def typed_results(server: Server) -> None:
    said = '{"city":"Seoul","degrees":21.5}'
    for way in list(ways(server))[:3]:
        server.say(said, said)
        made = litellm.completion(messages=ASK, response_format=Report, **way)
        assert Report.model_validate_json(made.choices[0].message.content).degrees == 21.5, way
        made = litellm.completion(messages=ASK, response_format={"type": "json_object"}, **way)
        assert Report.model_validate_json(made.choices[0].message.content).degrees == 21.5, way


def thoughts(server: Server) -> None:
    for way in ways(server):
        server.say("<think>\nHm.\n</think>\n\nYes.")
        said = litellm.completion(messages=ASK, **way).choices[0].message
        assert said.content.strip() == "Yes.", way
        if "responses" not in way["model"]:  # there litellm reads summaries alone, and there are none
            assert said.reasoning_content.strip() == "Hm.", way
        server.say("Hm.\n</think>\n\nYes." if "anthropic" not in way["model"] else "Yes.")
        more = {} if "anthropic" in way["model"] else {"reasoning_effort": "low"}
        allowed = ["reasoning_effort"] if more else []
        said = litellm.completion(messages=ASK, allowed_openai_params=allowed, **more, **way).choices[0].message
        assert said.content.strip() == "Yes.", way


def responses(server: Server) -> None:
    for way in ways(server):
        if "responses" in way["model"]:
            continue
        server.say(SEOUL, "It is warm.")
        first = litellm.responses(input=ASK[0]["content"], tools=[FLAT], instructions="Be short.", **way)
        [asked] = [item for item in first.output if item.type == "function_call"]
        assert asked.arguments == '{"city": "Seoul"}', way
        result = {"type": "function_call_output", "call_id": asked.call_id, "output": "21"}
        told = [*ASK, asked.model_dump(), result]
        again = litellm.responses(input=told, tools=[FLAT], **way)
        assert "It is warm." in str(again.output), way
        server.say("It is ☀.")
        events = list(litellm.responses(input="x", stream=True, **way))
        assert "It is ☀." in str(events[-1].response.output), way


async def messages(server: Server) -> None:
    for way in ways(server):
        way = {"max_tokens": 500, **way}
        server.say(SEOUL, "It is warm.")
        asked: Any = await litellm.anthropic.messages.acreate(messages=ASK, tools=[CLAUDE], **way)
        [block] = [one for one in asked["content"] if one["type"] == "tool_use"]
        assert block["input"] == {"city": "Seoul"}, way
        result = {"type": "tool_result", "tool_use_id": block["id"], "content": "21"}
        told = [*ASK, {"role": "assistant", "content": [block]}, {"role": "user", "content": [result]}]
        again: Any = await litellm.anthropic.messages.acreate(messages=told, tools=[CLAUDE], **way)
        assert again["content"][0]["text"] == "It is warm.", way
        server.say("It is ☀.")
        stream: Any = await litellm.anthropic.messages.acreate(messages=ASK, stream=True, **way)
        said = b"".join([one if isinstance(one, bytes) else str(one).encode() async for one in stream])
        assert b"message_stop" in said, (way, said)


def completions(server: Server) -> None:
    server.say(" the sea.")
    made = litellm.text_completion(
        model=f"text-completion-openai/{server.model}", prompt="Once", api_base=server.url, api_key="none"
    )
    assert made.choices[0].text == " the sea."


if __name__ == "__main__":
    litellm.suppress_debug_info = True
    run(chats, tools, typed_results, thoughts, responses, messages, completions)
