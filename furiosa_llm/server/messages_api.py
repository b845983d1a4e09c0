"""`POST /v1/messages`: Anthropic's protocol for chats, in terms of OpenAI's."""

from __future__ import annotations

import json
from typing import Any

from fastapi import APIRouter, Depends, Request
from starlette.responses import Response

from furiosa_llm.runtime.requests.outputs import RequestOutput
from furiosa_llm.server.blocks import Block, Blocks
from furiosa_llm.server.body_route import BodyRoute
from furiosa_llm.server.chat_service import Chat, begin_chat
from furiosa_llm.server.errors import ApiError
from furiosa_llm.server.events import EventStream, events_of, json_answer, named_event, until_disconnect
from furiosa_llm.server.generation import collect
from furiosa_llm.server.openapi import NAMED_EVENTS
from furiosa_llm.server.requests import ChatCompletionRequest, MessagesRequest
from furiosa_llm.server.responses_api import as_chat_request
from furiosa_llm.server.state import State, require_json

router = APIRouter(route_class=BodyRoute)

_CHOICES = {"auto": "auto", "any": "required", "none": "none"}


@router.post("/v1/messages", response_model=None, responses=NAMED_EVENTS, dependencies=[Depends(require_json)])
async def create_message(body: MessagesRequest, request: Request, state: State) -> Response:
    """Answers a conversation."""
    chat = await begin_chat(_as_chat(body), state, "msg")
    answer = _Answer(chat, body)
    if not body.stream:
        [found] = await until_disconnect(request.receive, collect(chat.outputs, 1, 1))
        [completion] = found.completions
        list(answer.blocks.take(chat.reader(streams=False).read(completion.text, ended=True)))
        list(answer.blocks.end())
        answer.count(len(found.token_ids), len(completion.token_ids), found.cached)
        return json_answer(answer.message(completion.finish_reason, completion.stop_reason))
    first = await until_disconnect(request.receive, anext(chat.outputs))
    return EventStream(events_of(chat.outputs, first, answer.chunks, lambda: b"", end=b""))


def _as_chat(body: MessagesRequest) -> ChatCompletionRequest:
    system = [] if body.system is None else [{"role": "system", "content": _text(body.system)}]
    messages = [one for message in body.messages for one in _messages(message)]
    choice = body.tool_choice or {}
    named = {"type": "function", "function": {"name": choice.get("name")}}
    tools = [
        {"type": "function", "function": {"name": tool.get("name"), "description": tool.get("description"),
                                          "parameters": tool.get("input_schema")}}
        for tool in body.tools or ()
    ]  # fmt: skip
    prefilled = bool(messages) and messages[-1]["role"] == "assistant"
    return as_chat_request(
        {
            **body.model_dump(include={"model", "temperature", "top_p", "top_k", "stream", "max_tokens"}),
            "messages": [*system, *messages],
            "stop": body.stop_sequences,
            "tools": tools or None,
            "tool_choice": named if choice.get("type") == "tool" else _CHOICES.get(choice.get("type", "")),
            "parallel_tool_calls": False if choice.get("disable_parallel_tool_use") else None,
            "continue_final_message": prefilled,
            "chat_template_kwargs": {"enable_thinking": body.thinking.get("type") != "disabled"}
            if body.thinking
            else None,
        }
    )


def _messages(message: dict[str, Any]) -> list[dict[str, Any]]:
    """A message as those of OpenAI's: results of calls are messages of their own."""
    role, content = message.get("role"), message.get("content")
    if not isinstance(content, list):
        return [{"role": role, "content": content}]
    blocks = [block for block in content if isinstance(block, dict)]
    results = [
        {"role": "tool", "tool_call_id": block.get("tool_use_id"), "content": _text(block.get("content") or "")}
        for block in blocks
        if block.get("type") == "tool_result"
    ]
    calls = [
        {
            "id": block.get("id"),
            "type": "function",
            "function": {"name": block.get("name"), "arguments": block.get("input")},
        }
        for block in blocks
        if block.get("type") == "tool_use"
    ]
    text = _text(
        [one for one in blocks if one.get("type") not in ("tool_result", "tool_use", "thinking", "redacted_thinking")]
    )
    thought = "".join(str(block.get("thinking", "")) for block in blocks if block.get("type") == "thinking")
    more = {**({"tool_calls": calls} if calls else {}), **({"reasoning_content": thought} if thought else {})}
    said = [{"role": role, "content": text, **more}] if text or more or not results else []
    return [*results, *said]


def _text(content: str | list[Any]) -> str:
    """The text of a content; raises an ApiError for blocks that are something else."""
    if isinstance(content, str):
        return content
    texts = [
        block.get("text") if isinstance(block, dict) and block.get("type") == "text" else None for block in content
    ]
    if None in texts:
        raise ApiError(
            400, "messages: found a block that is no text; nothing else is understood here", param="messages"
        )
    return "\n".join(str(text) for text in texts)


class _Answer:
    """One message, whole or as it grows."""

    def __init__(self, chat: Chat, body: MessagesRequest) -> None:
        self._head = chat.head
        self._reader = chat.reader(streams=True) if body.stream else None
        self._usage = {"input_tokens": 0, "output_tokens": 0, "cache_read_input_tokens": 0}
        self._begun = False
        self.blocks = Blocks()

    def count(self, prompt: int, completion: int, cached: int) -> None:
        """Notes the counts of tokens, of which those in the cache are counted apart."""
        self._usage = {
            "input_tokens": prompt - cached,
            "output_tokens": self._usage["output_tokens"] + completion,
            "cache_read_input_tokens": cached,
        }

    def message(self, reason: str | None, stop: int | str | None) -> dict[str, Any]:
        """The whole message."""
        return {
            "id": self._head.id.replace("-", "_"),
            "type": "message",
            "role": "assistant",
            "model": self._head.model,
            "content": [_shown(block) for block in self.blocks.all],
            **self._end(reason, stop),
            "usage": self._usage,
        }

    def chunks(self, found: tuple[int, RequestOutput]) -> bytes:
        """The events of the next output."""
        assert self._reader is not None
        [part], output = found[1].outputs, found[1]
        self.count(len(output.prompt_token_ids), len(part.token_ids), output.num_cached_tokens or 0)
        made = []
        if not self._begun:
            self._begun = True
            made.append(_event("message_start", message=self.message(None, None)))
        ended = part.finish_reason is not None
        # Each change is told before the next one is made: a block is shown as it is then.
        made += [_change(*change) for change in self.blocks.take(self._reader.read(part.text, ended=ended))]
        if ended:
            made += [_change(*change) for change in self.blocks.end()]
            end = self._end(part.finish_reason, part.stop_reason)
            made += [_event("message_delta", delta=end, usage=self._usage), _event("message_stop")]
        return b"".join(made)

    def _end(self, reason: str | None, stop: int | str | None) -> dict[str, Any]:
        words = {"length": "max_tokens", "stop": "end_turn"}
        if reason == "stop" and any(block.kind == "call" for block in self.blocks.all):
            return {"stop_reason": "tool_use", "stop_sequence": None}
        if isinstance(stop, str):
            return {"stop_reason": "stop_sequence", "stop_sequence": stop}
        return {"stop_reason": None if reason is None else words.get(reason, reason), "stop_sequence": None}


def _event(name: str, **data: Any) -> bytes:
    return named_event(name, {"type": name, **data})


def _change(what: str, block: Block, piece: str) -> bytes:
    if what == "end":
        return _event("content_block_stop", index=block.index)
    if what == "begin":
        return _event("content_block_start", index=block.index, content_block=_shown(block))
    delta = {
        "thought": {"type": "thinking_delta", "thinking": piece},
        "text": {"type": "text_delta", "text": piece},
        "call": {"type": "input_json_delta", "partial_json": piece},
    }[block.kind]
    return _event("content_block_delta", index=block.index, delta=delta)


def _shown(block: Block) -> dict[str, Any]:
    match block.kind:
        case "thought":
            return {"type": "thinking", "thinking": block.text, "signature": ""}
        case "text":
            return {"type": "text", "text": block.text}
        case _:
            return {"type": "tool_use", "id": block.id, "name": block.name, "input": json.loads(block.text or "{}")}
