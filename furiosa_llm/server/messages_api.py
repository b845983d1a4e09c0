"""`POST /v1/messages`: Anthropic's protocol for chats, in terms of OpenAI's."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Depends, Request
from starlette.responses import Response

from furiosa_llm.server.blocks import Block, BlockAnswer
from furiosa_llm.server.body_route import BodyRoute
from furiosa_llm.server.chat_service import as_chat_request, begin_chat, prompt_of
from furiosa_llm.server.errors import ApiError
from furiosa_llm.server.events import named_event
from furiosa_llm.server.notes import IGNORED, note
from furiosa_llm.server.openapi import NAMED_EVENTS
from furiosa_llm.server.requests import ChatCompletionRequest, CountTokensRequest, MessagesRequest
from furiosa_llm.server.responses import CountTokensResponse
from furiosa_llm.server.state import State, require_json
from furiosa_llm.server.tool_choice import Tools

router = APIRouter(route_class=BodyRoute)

_NO_TEXTS = ("tool_result", "tool_use", "thinking", "redacted_thinking")
_CHOICES = {"auto": "auto", "any": "required", "none": "none"}


@router.post("/v1/messages", response_model=None, responses=NAMED_EVENTS, dependencies=[Depends(require_json)])
async def create_message(body: MessagesRequest, request: Request, state: State) -> Response:
    """Answers a conversation."""
    chat = await begin_chat(_as_chat(body), state, "msg")
    return await _Answer(chat).respond(request)


@router.post("/v1/messages/count_tokens", dependencies=[Depends(require_json)])
async def count_tokens(body: CountTokensRequest, state: State) -> CountTokensResponse:
    """How many tokens the conversation is to the model."""
    chat = _as_chat(body)
    state.check_model(chat.model)
    shown = Tools(chat, state.call_format, state.tokenizer.tags).shown
    text = await prompt_of(chat, state, with_tools=shown)
    return CountTokensResponse(input_tokens=len(await state.encode(text, add_special_tokens=False)))


def _as_chat(body: CountTokensRequest) -> ChatCompletionRequest:
    system = [] if body.system is None else [{"role": "system", "content": _text(body.system)}]
    messages = [one for message in body.messages for one in _messages(message)]
    choice = body.tool_choice or {}
    named = {"type": "function", "function": {"name": choice.get("name")}}
    config = body.output_config or {}
    prefilled = bool(messages) and messages[-1]["role"] == "assistant"
    return as_chat_request(
        {
            **body.model_dump(include={"model", "temperature", "top_p", "top_k", "stream", "max_tokens"}),
            "messages": [*system, *messages],
            "stop": body.stop_sequences if isinstance(body, MessagesRequest) else None,
            "tools": _tools(body.tools or ()) or None,
            "tool_choice": named if choice.get("type") == "tool" else _CHOICES.get(choice.get("type", "")),
            "parallel_tool_calls": False if choice.get("disable_parallel_tool_use") else None,
            "continue_final_message": prefilled,
            "reasoning_effort": config.get("effort"),
            "response_format": _format(config.get("format")),
            "chat_template_kwargs": {"enable_thinking": body.thinking.get("type") != "disabled"}
            if body.thinking
            else None,
        }
    )


def _tools(given: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those of the client's own: what Anthropic's servers and models bring along is not here."""
    found = []
    for place, tool in enumerate(given):
        if tool.get("type", "custom") == "custom":
            function = {"name": tool.get("name"), "description": tool.get("description"),
                        "parameters": tool.get("input_schema"), "strict": tool.get("strict")}  # fmt: skip
            found.append({"type": "function", "function": function})
        else:
            note(IGNORED, f"tools.{place}")
    return found


def _format(given: Any) -> Any:
    if not isinstance(given, dict):
        return given
    schema = {"name": "output", "schema": given.get("schema"), "strict": True}
    return {"type": given.get("type"), "json_schema": schema}


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
    text = _text([one for one in content if not (isinstance(one, dict) and one.get("type") in _NO_TEXTS)])
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


class _Answer(BlockAnswer):
    """One message."""

    def _usage(self) -> dict[str, int]:
        """The counts of tokens, of which those in the cache are counted apart."""
        return {
            "input_tokens": self._num_prompt - self._num_cached,
            "output_tokens": self._num_completion,
            "cache_read_input_tokens": self._num_cached,
        }

    def _whole(self, reason: str | None, stop: int | str | None) -> dict[str, Any]:
        return {
            "id": self._head.id.replace("-", "_"),
            "type": "message",
            "role": "assistant",
            "model": self._head.model,
            "content": [_shown(block) for block in self.blocks.all],
            **self._reason(reason, stop),
            "usage": self._usage(),
        }

    def _begin(self) -> bytes:
        return _event("message_start", message=self._whole(None, None))

    def _end(self, reason: str, stop: int | str | None) -> bytes:
        delta = _event("message_delta", delta=self._reason(reason, stop), usage=self._usage())
        return delta + _event("message_stop")

    def _reason(self, reason: str | None, stop: int | str | None) -> dict[str, Any]:
        words = {"length": "max_tokens", "stop": "end_turn"}
        if reason == "stop" and any(block.kind == "call" for block in self.blocks.all):
            return {"stop_reason": "tool_use", "stop_sequence": None}
        if isinstance(stop, str):
            return {"stop_reason": "stop_sequence", "stop_sequence": stop}
        return {"stop_reason": None if reason is None else words.get(reason, reason), "stop_sequence": None}

    def _change(self, what: str, block: Block, piece: str) -> bytes:
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


def _event(name: str, **data: Any) -> bytes:
    return named_event(name, {"type": name, **data})


def _shown(block: Block) -> dict[str, Any]:
    match block.kind:
        case "thought":
            return {"type": "thinking", "thinking": block.text, "signature": ""}
        case "text":
            return {"type": "text", "text": block.text}
        case _:
            return {"type": "tool_use", "id": block.id, "name": block.name, "input": json.loads(block.text or "{}")}
