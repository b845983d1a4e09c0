"""`POST /v1/chat/completions`: a conversation in, the model's answers out, at once or as they come."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Depends, Request
from starlette.responses import Response

from furiosa_llm.runtime.requests.outputs import CompletionOutput, RequestOutput
from furiosa_llm.server.body_route import BodyRoute
from furiosa_llm.server.chat_service import Chat, begin_chat
from furiosa_llm.server.completions import usage_of
from furiosa_llm.server.events import EventStream, event, events_of, until_disconnect
from furiosa_llm.server.generation import Answered, Completed, collect
from furiosa_llm.server.logprobs import chat_logprobs, prompt_logprobs
from furiosa_llm.server.openapi import stream_of
from furiosa_llm.server.requests import ChatCompletionRequest
from furiosa_llm.server.responses import (
    AnswerMessage,
    ChatChoice,
    ChatCompletionChunk,
    ChatCompletionResponse,
    ChatLogprobs,
)
from furiosa_llm.server.state import ServerState, State, require_json
from furiosa_llm.server.tools import CallPiece

router = APIRouter(route_class=BodyRoute)


@router.post(
    "/v1/chat/completions",
    response_model=ChatCompletionResponse,
    responses=stream_of(ChatCompletionChunk),
    dependencies=[Depends(require_json)],
)
async def create_chat_completion(
    body: ChatCompletionRequest, request: Request, state: State
) -> Response | ChatCompletionResponse:
    """Answers a conversation."""
    chat = await begin_chat(body, state, "chat")
    if not body.stream:
        [answer] = await until_disconnect(request.receive, collect(chat.outputs, 1, body.num_choices))
        return _response(chat, state, answer)
    # The first output is waited for, so that what is refused, or fails until then, has a status of its own.
    first = await until_disconnect(request.receive, anext(chat.outputs))
    stream = _Stream(chat, state)
    return EventStream(events_of(chat.outputs, first, stream.chunks, stream.usage))


def _response(chat: Chat, state: ServerState, answer: Answered) -> ChatCompletionResponse:
    body, head = chat.body, chat.head
    choices = [_choice(chat, state, index, one) for index, one in enumerate(answer.completions)]
    num_tokens = sum(len(one.token_ids) for one in answer.completions)
    return ChatCompletionResponse(
        id=head.id,
        created=head.created,
        model=head.model,
        choices=choices,
        usage=usage_of(len(answer.token_ids), num_tokens, answer.cached),
        prompt_logprobs=prompt_logprobs(answer.logprobs or ()) if body.prompt_logprobs is not None else None,
        prompt_token_ids=list(answer.token_ids) if body.return_token_ids else None,
    )


def _choice(chat: Chat, state: ServerState, index: int, completion: Completed) -> ChatChoice:
    body, said = chat.body, chat.read_whole(completion.text, completion.finish_reason)
    logprobs: ChatLogprobs | None = None
    if completion.logprobs is not None:
        logprobs = chat_logprobs(completion.token_ids, completion.logprobs, body.top_logprobs or 0, state.tokenizer)
    return ChatChoice(
        index=index,
        message=AnswerMessage(
            role=state.settings.response_role,
            content=said.content,
            reasoning_content=said.reasoning,
            tool_calls=said.calls or None,
        ),
        logprobs=logprobs,
        finish_reason=said.finish_reason,
        stop_reason=completion.stop_reason,
        token_ids=completion.token_ids if body.return_token_ids else None,
    )


class _Stream:
    """One answer in chunks."""

    def __init__(self, chat: Chat, state: ServerState) -> None:
        body, head = chat.body, chat.head
        self._body = body
        self._tokenizer = state.tokenizer
        self._role = state.settings.response_role
        self._head = {"id": head.id, "object": "chat.completion.chunk", "created": head.created, "model": head.model}
        self._readers = [chat.reader(streams=True) for _ in range(body.num_choices)]
        self._num_prompt, self._num_completion, self._num_cached = 0, 0, 0

    def chunks(self, found: tuple[int, RequestOutput]) -> bytes:
        """The chunks of the next output."""
        output = found[1]
        chunks: list[bytes] = []
        if not self._num_prompt:
            self._num_prompt, self._num_cached = len(output.prompt_token_ids), output.num_cached_tokens or 0
            begin = {"role": self._role, "content": ""}
            chunks += (self._chunk(index, begin) for index in range(self._body.num_choices))
            if self._body.return_token_ids:
                chunks.append(self._event([], prompt_token_ids=output.prompt_token_ids))
        return b"".join([*chunks, *(chunk for part in output.outputs for chunk in self._chunks_of(part))])

    def usage(self) -> bytes:
        """The last chunk, if it was asked for."""
        if not self._body.include_usage:
            return b""
        return self._event([], usage=self._counts())

    def _counts(self) -> dict[str, Any]:
        return usage_of(self._num_prompt, self._num_completion, self._num_cached).model_dump()

    def _chunks_of(self, part: CompletionOutput) -> Sequence[bytes]:
        reader = self._readers[part.index]
        self._num_completion += len(part.token_ids)
        logprobs = None
        if part.logprobs is not None:
            count = self._body.top_logprobs or 0
            logprobs = chat_logprobs(part.token_ids, part.logprobs, count, self._tokenizer).model_dump()
        found = reader.read(part.text, ended=part.finish_reason is not None)
        chunks = []
        if found.reasoning:
            chunks.append(self._chunk(part.index, {"reasoning_content": found.reasoning}))
        if found.content or logprobs is not None:
            chunks.append(self._chunk(part.index, {"content": found.content}, logprobs))
        if found.calls:
            chunks.append(self._chunk(part.index, {"tool_calls": [_delta(piece) for piece in found.calls]}))
        if part.finish_reason is not None:
            reason = reader.finish_reason(part.finish_reason)
            chunks.append(self._chunk(part.index, {}, finish_reason=reason, stop_reason=part.stop_reason))
        if self._body.return_token_ids and part.token_ids:
            chunks.insert(0, self._chunk(part.index, {}, token_ids=part.token_ids))
        return chunks

    def _chunk(
        self, index: int, delta: dict[str, Any], logprobs: Any = None, finish_reason: str | None = None, **end: Any
    ) -> bytes:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason, **end}
        return self._event([choice])

    def _event(self, choices: list[Any], **more: Any) -> bytes:
        if self._body.include_usage:
            more.setdefault("usage", self._counts() if self._body.counts_always else None)
        return event({**self._head, "choices": choices, **more})


def _delta(piece: CallPiece) -> dict[str, Any]:
    begin = {} if piece.id is None else {"id": piece.id, "type": "function"}
    name = {} if piece.name is None else {"name": piece.name}
    return {"index": piece.index, **begin, "function": {**name, "arguments": piece.arguments}}
