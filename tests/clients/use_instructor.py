"""instructor: every mode that talks to OpenAI's protocols or Anthropic's, whole and in part, with retries."""

# /// script
# requires-python = ">=3.11"
# dependencies = ["instructor==1.17.0", "anthropic==2.14.0"]
# ///

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Annotated, Any

import anthropic
import instructor
import openai
from instructor import Mode
from pydantic import AfterValidator, BaseModel, Field

from tests.clients.client import Server, call, run


def _named(name: str) -> str:
    if name != name.title():
        raise ValueError(f"{name!r} has to be in title case")
    return name


class Person(BaseModel):
    """Somebody"""

    name: Annotated[str, AfterValidator(_named)]
    age: int = Field(ge=0, le=150)
    tags: list[str] = []


ASK: Any = [{"role": "user", "content": "Ada is 36."}]
JSON = '{"name":"Ada","age":36,"tags":["x"]}'
WRONG = '{"name":"ada","age":36,"tags":[]}'
ADA = Person(name="Ada", age=36, tags=["x"])
CALLED, IN_FENCE = call("Person", JSON), f"```json\n{JSON}\n```"
CHATS = {
    Mode.TOOLS: CALLED,
    Mode.TOOLS_STRICT: CALLED,
    Mode.FUNCTIONS: CALLED,
    Mode.JSON: JSON,
    Mode.JSON_O1: JSON,
    Mode.MD_JSON: IN_FENCE,
    Mode.JSON_SCHEMA: JSON,
}
RESPONSES = {Mode.RESPONSES_TOOLS: CALLED, Mode.RESPONSES_TOOLS_WITH_INBUILT_TOOLS: CALLED}
MESSAGES = {
    Mode.ANTHROPIC_TOOLS: CALLED,
    Mode.ANTHROPIC_REASONING_TOOLS: f"<think>\nHm.\n</think>\n\n{CALLED}",
    Mode.ANTHROPIC_JSON: IN_FENCE,
}


def of_openai(server: Server, mode: Mode) -> Any:
    return instructor.from_openai(openai.OpenAI(base_url=server.url, api_key="none", max_retries=0), mode=mode)


def of_anthropic(server: Server, mode: Mode) -> Any:
    return instructor.from_anthropic(
        anthropic.Anthropic(base_url=server.root, api_key="none", max_retries=0), mode=mode
    )


def connected(server: Server) -> Iterable[tuple[Mode, Any, str, dict[str, Any]]]:
    """Each mode with its client, what the model is to say, and what a request has to hold."""
    for modes, connect, more in (
        (CHATS, of_openai, {}),
        (RESPONSES, of_openai, {}),
        (MESSAGES, of_anthropic, {"max_tokens": 2000}),
    ):
        for mode, said in modes.items():
            thinks = {"thinking": {"type": "enabled", "budget_tokens": 1024}} if said.startswith("<think>") else {}
            yield mode, connect(server, mode), said, {"model": server.model, "messages": ASK, **more, **thinks}


def whole(server: Server) -> None:
    for mode, client, said, asked in connected(server):
        server.say(said)
        made = client.create(response_model=Person, max_retries=0, **asked)
        server.check()
        assert made.model_dump() == ADA.model_dump(), (mode, made)


def again_after_what_is_wrong(server: Server) -> None:
    for mode, client, said, asked in connected(server):
        server.say(said.replace(JSON, WRONG), said)
        made = client.create(response_model=Person, max_retries=2, **asked)
        server.check()
        assert made.model_dump() == ADA.model_dump(), (mode, made)


def in_part(server: Server) -> None:
    for mode, client, said, asked in connected(server):
        if mode in (Mode.JSON_O1, Mode.ANTHROPIC_REASONING_TOOLS) or mode in RESPONSES:
            continue  # instructor itself has no streams of these
        server.say(JSON if mode is Mode.ANTHROPIC_JSON else said.replace('"Person"', '"PartialPerson"'))
        parts = list(client.create_partial(response_model=Person, **asked))
        assert parts[-1].model_dump() == ADA.model_dump(), mode
        assert len(parts) > 3, mode
        server.check()


def several(server: Server) -> None:
    client = of_openai(server, Mode.PARALLEL_TOOLS)
    server.say(f"{CALLED}\n{CALLED}")
    made = client.create(model=server.model, messages=ASK, response_model=Iterable[Person], tool_choice="auto")
    assert list(made) == [ADA, ADA]
    client = of_anthropic(server, Mode.ANTHROPIC_PARALLEL_TOOLS)
    server.say(f"{CALLED}\n{CALLED}")
    made = client.create(model=server.model, messages=ASK, response_model=Iterable[Person], max_tokens=500)
    assert list(made) == [ADA, ADA]


def a_list(server: Server) -> None:
    for mode in (Mode.TOOLS, Mode.JSON, Mode.JSON_SCHEMA):
        tasks = f'{{"tasks":[{JSON},{JSON}]}}'
        server.say(call("IterablePerson", tasks) if mode is Mode.TOOLS else tasks)
        made = of_openai(server, mode).create_iterable(model=server.model, messages=ASK, response_model=Person)
        assert list(made) == [ADA, ADA], mode
        server.check()


if __name__ == "__main__":
    warnings.simplefilter("ignore", DeprecationWarning)
    run(whole, again_after_what_is_wrong, in_part, several, a_list)
