"""`/v1/responses`: OpenAI's newer protocol for chats, in terms of the older one."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import APIRouter, Depends, Request
from starlette.responses import Response

from furiosa_llm.runtime.artifact.errors import FuriosaLLMError
from furiosa_llm.server.blocks import Block, BlockAnswer
from furiosa_llm.server.body_route import BodyRoute
from furiosa_llm.server.chat_service import Chat, as_chat_request, begin_chat
from furiosa_llm.server.errors import INTERNAL_ERROR, REQUEST_ID, ApiError, api_error
from furiosa_llm.server.events import json_answer, named_event
from furiosa_llm.server.notes import IGNORED, note
from furiosa_llm.server.openapi import NAMED_EVENTS
from furiosa_llm.server.requests import ChatCompletionRequest, ResponsesRequest
from furiosa_llm.server.response_store import Messages, ResponseStore
from furiosa_llm.server.state import State, require_json

logger = logging.getLogger(__name__)

router = APIRouter(route_class=BodyRoute)


@router.post("/v1/responses", response_model=None, responses=NAMED_EVENTS, dependencies=[Depends(require_json)])
async def create_response(body: ResponsesRequest, request: Request, state: State) -> Response:
    """Answers an input, or goes on with an earlier response."""
    if body.background and (body.stream or body.store is False or not state.settings.max_stored_responses):
        message = "background is for responses that are kept, and are not streamed; leave it out, or stream and store"
        raise ApiError(400, message, param="background")
    before = [] if body.previous_response_id is None else _before(body.previous_response_id, state.responses)
    messages = [*before, *_messages(body.input)]
    chat = await begin_chat(_as_chat(body, messages), state, "resp")
    answer = _Answer(chat, body, messages, state.responses)
    if not body.background:
        return await answer.respond(request)
    begun = answer.begin()
    state.background.begin(begun["id"], answer.run(state.settings.request_timeout))
    return json_answer(begun)


@router.get("/v1/responses/{response_id}", response_model=None)
async def retrieve_response(response_id: str, state: State) -> Response:
    """One that is kept."""
    return json_answer(state.responses.get(response_id)[0])


@router.post("/v1/responses/{response_id}/cancel", response_model=None)
async def cancel_response(response_id: str, state: State) -> Response:
    """Ends one that runs in the background; one that has ended is given as it is."""
    await state.background.cancel(response_id)
    return json_answer(state.responses.get(response_id)[0])


@router.delete("/v1/responses/{response_id}", response_model=None)
async def delete_response(response_id: str, state: State) -> Response:
    """Gives one up, and ends it if it runs."""
    await state.background.cancel(response_id)
    state.responses.forget(response_id)
    return json_answer({"id": response_id, "object": "response.deleted", "deleted": True})


def _before(response_id: str, store: ResponseStore) -> Messages:
    response, messages = store.get(response_id, "previous_response_id")
    if response["status"] not in ("completed", "incomplete"):
        message = f"the response {response_id[:100]!r} is {response['status']}, and cannot be gone on with"
        raise ApiError(400, message, param="previous_response_id")
    return messages


def _messages(given: str | list[dict[str, Any]]) -> Messages:
    """The input as messages: calls of one answer are one message."""
    if isinstance(given, str):
        return [{"role": "user", "content": given}]
    made: Messages = []
    thought = ""
    for item in given:
        kind = item.get("type", "message")
        if kind == "function_call":
            function = {"name": item.get("name"), "arguments": item.get("arguments")}
            call = {"id": item.get("call_id"), "type": "function", "function": function}
            if not (made and made[-1]["role"] == "assistant") or thought:
                made.append({"role": "assistant", "content": None})
            made[-1]["tool_calls"] = [*made[-1].get("tool_calls", ()), call]
        elif kind == "function_call_output":
            made.append({"role": "tool", "tool_call_id": item.get("call_id"), "content": item.get("output")})
        elif kind == "message":
            made.append({"role": item.get("role", "user"), "content": item.get("content")})
        elif kind == "reasoning":
            thought += _thought(item)
            continue
        else:
            raise ApiError(400, f"input: found an item of type {kind!r:.80}, which is not understood", param="input")
        if thought and made[-1]["role"] == "assistant":
            made[-1]["reasoning_content"] = thought
        thought = ""
    return made


def _thought(item: dict[str, Any]) -> str:
    """What a reasoning item says; nothing if it is encrypted."""
    parts = item.get("content") or item.get("summary") or ()
    return "".join(str(part.get("text") or "") for part in parts if isinstance(part, dict))


def _as_chat(body: ResponsesRequest, messages: Messages) -> ChatCompletionRequest:
    system = [] if body.instructions is None else [{"role": "system", "content": body.instructions}]
    given = {
        **body.model_dump(include={"model", "temperature", "top_p", "parallel_tool_calls", "stream", "user"}),
        "messages": [*system, *messages],
        "max_completion_tokens": body.max_output_tokens,
        "tools": _tools(body.tools or ()) or None,
        "tool_choice": _tool_choice(body.tool_choice),
        "response_format": _format((body.text or {}).get("format")),
        "reasoning_effort": (body.reasoning or {}).get("effort"),
        "chat_template_kwargs": body.chat_template_kwargs,
    }
    return as_chat_request(given)


def _tools(given: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The functions among them: what OpenAI's servers do themselves is not here."""
    found = []
    for place, tool in enumerate(given):
        if tool.get("type") == "function":
            function = {name: tool.get(name) for name in ("name", "description", "parameters", "strict")}
            found.append({"type": "function", "function": function})
        else:
            note(IGNORED, f"tools.{place}")
    return found


def _tool_choice(given: Any) -> Any:
    if not isinstance(given, dict):
        return given
    if given.get("type") == "allowed_tools":
        tools = [{"type": "function", "function": tool} for tool in given.get("tools", ()) if isinstance(tool, dict)]
        return {"type": "allowed_tools", "allowed_tools": {"mode": given.get("mode"), "tools": tools}}
    return {"type": "function", "function": {"name": given.get("name")}}


def _format(given: Any) -> Any:
    if isinstance(given, dict) and given.get("type") == "json_schema":
        return {"type": "json_schema", "json_schema": given}
    return given


class _Answer(BlockAnswer):
    """One response."""

    def __init__(self, chat: Chat, body: ResponsesRequest, messages: Messages, store: ResponseStore) -> None:
        super().__init__(chat)
        self._id = chat.head.id.replace("-", "_")
        self._body, self._messages, self._store = body, messages, store
        self._number = 0

    def _whole(self, reason: str | None, stop: int | str | None) -> dict[str, Any]:  # noqa: ARG002 - not in a response
        """It is kept if it may be."""
        response = self._response("incomplete" if reason == "length" else "completed")
        if self._body.store is not False:
            self._store.keep(response, [*self._messages, self._said()])
        return response

    def begin(self) -> dict[str, Any]:
        """The response before its answer, which is kept, too."""
        return self._keep("in_progress")

    async def run(self, seconds: float | None) -> None:
        """Makes the answer within so many seconds, and keeps it, or what prevented it."""
        try:
            async with asyncio.timeout(seconds):
                await self.finished()
        except asyncio.CancelledError:
            self._keep("cancelled")
            raise
        except TimeoutError:
            self._fail(ApiError(504, f"the response took longer than {seconds or 0:g} s", code="request_timeout"))
        except (FuriosaLLMError, ApiError) as error:
            self._fail(api_error(error))
        except Exception:  # whatever it is, who asks for the response learns that it failed, and the log has all of it
            logger.exception("request %s: the response failed in the background", REQUEST_ID.get())
            self._fail(INTERNAL_ERROR)

    def _fail(self, error: ApiError) -> None:
        self._keep("failed", error=_shown(error))

    def _failed(self, error: ApiError) -> bytes:
        return self._event("response.failed", response={**self._response("failed"), "error": _shown(error)})

    def _keep(self, status: str, error: dict[str, Any] | None = None) -> dict[str, Any]:
        response = {**self._response(status), "error": error}
        self._store.keep(response, self._messages)
        return response

    def _begin(self) -> bytes:
        response = self._response("in_progress")
        created = self._event("response.created", response=response)
        return created + self._event("response.in_progress", response=response)

    def _end(self, reason: str, stop: int | str | None) -> bytes:
        response = self._whole(reason, stop)
        return self._event(f"response.{response['status']}", response=response)

    def _usage(self) -> dict[str, Any]:
        return {
            "input_tokens": self._num_prompt,
            "input_tokens_details": {"cached_tokens": self._num_cached},
            "output_tokens": self._num_completion,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": self._num_prompt + self._num_completion,
        }

    def _change(self, what: str, block: Block, piece: str) -> bytes:
        is_call = block.kind == "call"
        place: dict[str, Any] = {"item_id": self._item_id(block), "output_index": block.index}
        part = place if is_call else {**place, "content_index": 0}
        kind = {"thought": "reasoning_text", "text": "output_text", "call": "function_call_arguments"}[block.kind]
        written = {**part, "logprobs": []} if block.kind == "text" else part
        if what == "grow":
            return self._event(f"response.{kind}.delta", **written, delta=piece)
        name, status = ("added", "in_progress") if what == "begin" else ("done", "completed")
        item = {"output_index": block.index, "item": self._item(block, status)}
        around = [(f"response.output_item.{name}", item)]
        if not is_call:
            around.append((f"response.content_part.{name}", {**part, "part": _part(block)}))
        if what == "end":
            words = {"arguments": block.text, "name": block.name} if is_call else {"text": block.text}
            around = [(f"response.{kind}.done", {**written, **words}), *reversed(around)]
        return b"".join(self._event(one, **data) for one, data in around)

    def _event(self, name: str, /, **data: Any) -> bytes:
        self._number += 1
        return named_event(name, {"type": name, "sequence_number": self._number - 1, **data})

    def _item_id(self, block: Block) -> str:
        kinds = {"thought": "rs", "text": "msg", "call": "fc"}
        return f"{kinds[block.kind]}_{self._id.removeprefix('resp_')}_{block.index}"

    def _item(self, block: Block, status: str) -> dict[str, Any]:
        begin = {"id": self._item_id(block), "status": status}
        parts = [_part(block)] if status != "in_progress" else []
        match block.kind:
            case "thought":
                return {**begin, "type": "reasoning", "summary": [], "content": parts}
            case "text":
                return {**begin, "type": "message", "role": "assistant", "content": parts}
            case _:
                call = {"call_id": block.id, "name": block.name, "arguments": block.text}
                return {**begin, "type": "function_call", **call}

    def _said(self) -> dict[str, Any]:
        """The answer as a message of the conversation that goes on."""
        texts = {kind: "".join(one.text for one in self.blocks.all if one.kind == kind) for kind in ("text", "thought")}
        calls = [
            {"id": one.id, "type": "function", "function": {"name": one.name, "arguments": one.text}}
            for one in self.blocks.all
            if one.kind == "call"
        ]
        thoughts = {"reasoning_content": texts["thought"]} if texts["thought"] else {}
        return {"role": "assistant", "content": texts["text"], **thoughts, **({"tool_calls": calls} if calls else {})}

    def _response(self, status: str) -> dict[str, Any]:
        body = self._body
        cut = {"reason": "max_output_tokens"} if status == "incomplete" else None
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._head.created,
            "status": status,
            "background": body.background is True,
            "error": None,
            "incomplete_details": cut,
            "model": self._head.model,
            "output": [self._item(block, "completed") for block in self.blocks.all],
            "usage": self._usage() if status in ("completed", "incomplete") else None,
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "tool_choice": body.tool_choice or "auto",
            "tools": body.tools or [],
            "text": body.text or {"format": {"type": "text"}},
            "truncation": "disabled",
            "metadata": body.metadata or {},
            **body.model_dump(include={"instructions", "previous_response_id", "max_output_tokens", "store"}),
            **body.model_dump(include={"temperature", "top_p", "reasoning", "user"}),
        }


def _shown(error: ApiError) -> dict[str, Any]:
    return {"code": error.info.code or error.info.type, "message": error.info.message}


def _part(block: Block) -> dict[str, Any]:
    if block.kind == "thought":
        return {"type": "reasoning_text", "text": block.text}
    return {"type": "output_text", "text": block.text, "annotations": [], "logprobs": []}
