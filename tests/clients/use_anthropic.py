"""The `anthropic` package: messages, streams, tools and their results, thinking, parsed answers."""

# /// script
# requires-python = ">=3.11"
# dependencies = ["anthropic==2.14.0"]
# ///

from __future__ import annotations

from typing import Any

import anthropic

from tests.clients.client import Server, call, refusal, run

TOOL: Any = {
    "name": "weather",
    "description": "The weather of a city",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
ASK: Any = [{"role": "user", "content": "How is the weather in Seoul?"}]
SEOUL = call("weather", '{"city": "Seoul"}')


def connect(server: Server) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=server.root, api_key="none", max_retries=0)


def message(server: Server) -> None:
    server.say("It is sunny.")
    made = connect(server).messages.create(
        model=server.model,
        max_tokens=100,
        system=[{"type": "text", "text": "Be short.", "cache_control": {"type": "ephemeral"}}],
        messages=ASK,
        metadata={"user_id": "x"},
        stop_sequences=["END"],
    )
    assert [(block.type, getattr(block, "text", "")) for block in made.content] == [("text", "It is sunny.")]
    assert made.stop_reason == "end_turn"
    assert made.usage.output_tokens > 2


def stop_sequence(server: Server) -> None:
    server.say("It is END of it")
    made = connect(server).messages.create(
        model=server.model, max_tokens=100, messages=ASK, stop_sequences=["END"], extra_body={"top_k": 5}
    )
    assert (made.stop_reason, made.stop_sequence) == ("stop_sequence", "END")


def streamed(server: Server) -> None:
    server.say("It is sunny. ☀")
    with connect(server).messages.stream(model=server.model, max_tokens=100, messages=ASK) as stream:
        assert "".join(stream.text_stream) == "It is sunny. ☀"
        made = stream.get_final_message()
    assert made.usage.input_tokens > 0
    assert made.usage.output_tokens > 2


def tools_and_back(server: Server) -> None:
    server.say(f"Let me see.\n{SEOUL}", "21 degrees.")
    client = connect(server)
    asked: dict[str, Any] = {"model": server.model, "max_tokens": 200, "tools": [TOOL]}
    made = client.messages.create(messages=ASK, **asked)
    assert made.stop_reason == "tool_use"
    [used] = [block for block in made.content if block.type == "tool_use"]
    assert used.input == {"city": "Seoul"}
    result: Any = {"type": "tool_result", "tool_use_id": used.id, "content": "21", "is_error": False}
    told: Any = [*ASK, {"role": "assistant", "content": made.content}, {"role": "user", "content": [result]}]
    again = client.messages.create(messages=told, **asked)
    assert again.stop_reason == "end_turn"


def streamed_tools_with_thoughts(server: Server) -> None:
    busan = call("weather", '{"city": "Busan"}')
    server.say(f"<think>\nWhich city?\n</think>\n\n{SEOUL}\n{busan}")
    with connect(server).messages.stream(
        model=server.model,
        max_tokens=1100,
        messages=ASK,
        tools=[TOOL],
        tool_choice={"type": "auto"},
        thinking={"type": "enabled", "budget_tokens": 1024},
    ) as stream:
        kinds = [event.type for event in stream]
        made = stream.get_final_message()
    assert "thinking" in kinds
    assert kinds.count("input_json") > 4
    found = [getattr(block, "input", None) for block in made.content if block.type == "tool_use"]
    assert found == [{"city": "Seoul"}, {"city": "Busan"}]
    assert made.content[0].type == "thinking"


def forced_tool(server: Server) -> None:
    server.say(SEOUL)
    made = connect(server).messages.create(
        model=server.model,
        max_tokens=200,
        messages=ASK,
        tools=[TOOL],
        tool_choice={"type": "tool", "name": "weather", "disable_parallel_tool_use": True},
    )
    assert [block.type for block in made.content] == ["tool_use"]
    assert made.stop_reason == "tool_use"


def refused(server: Server) -> None:
    error = refusal(anthropic.NotFoundError, connect(server).messages.create, model="other", max_tokens=5, messages=ASK)
    assert "other" in str(error)


if __name__ == "__main__":
    run(message, stop_sequence, streamed, tools_and_back, streamed_tools_with_thoughts, forced_tool, refused)
