"""`POST /v1/chat/completions`: a conversation in, the model's answers out, at once or as they come."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Depends, Request
from starlette.responses import Response

from furiosa_llm.runtime.requests.outputs import CompletionOutput, RequestOutput
from furiosa_llm.runtime.tokens.chat import conversations_of, for_template
from furiosa_llm.server.body_route import BodyRoute
from furiosa_llm.server.completions import usage_of
from furiosa_llm.server.errors import ApiError
from furiosa_llm.server.events import EventStream, event, events_of, until_disconnect
from furiosa_llm.server.generation import Answered, Completed, collect
from furiosa_llm.server.logprobs import chat_logprobs, prompt_logprobs
from furiosa_llm.server.openapi import stream_of
from furiosa_llm.server.requests import ChatCompletionRequest, TokenizeRequest, as_prompt
from furiosa_llm.server.responses import (
    AnswerMessage,
    ChatChoice,
    ChatCompletionChunk,
    ChatCompletionResponse,
    ChatLogprobs,
)
from furiosa_llm.server.state import Head, ServerState, State, new_head, require_json
from furiosa_llm.server.tool_choice import Tools
from furiosa_llm.server.tools import Found

router = APIRouter(route_class=BodyRoute)

_TAKEN = frozenset(
    (
        *("self", "messages", "tools", "documents", "chat_template"),
        *("add_generation_prompt", "continue_final_message", "join_parts"),
    )
)
"""What a request cannot set as a variable of the chat template: parameters on the way to it."""


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
    state.check_model(body.model)
    generator, tools = state.generator, Tools(body, state.tool_parser, state.tokenizer.tags)
    params = body.params(await tools.constraint())
    text = await prompt_of(body, state, with_tools=tools.shown)
    token_ids = await state.encode(text, add_special_tokens=body.add_special_tokens)
    token_ids = body.kept(token_ids, state.model.max_prompt_length)
    adapter = state.model.adapters.get(body.model)
    head = new_head(state, "chat", adapter)
    prompts = [as_prompt(token_ids, text)]
    outputs = generator.run(head.id, prompts, params, adapter=adapter, form_field=tools.form_field)
    if not body.stream:
        [answer] = await until_disconnect(request.receive, collect(outputs, 1, params.n))
        return _response(body, state, head, tools, answer)
    # The first output is waited for, so that what is refused, or fails until then, has a status of its own.
    first = await until_disconnect(request.receive, anext(outputs))
    stream = _Stream(body, state, head, tools)
    return EventStream(events_of(outputs, first, stream.chunks, stream.usage))


async def prompt_of(body: ChatCompletionRequest | TokenizeRequest, state: ServerState, *, with_tools: bool) -> str:
    """The prompt for the messages of `body`, as the chat template writes it."""
    assert body.messages is not None
    conversation = [{"content": "", **message.model_dump(exclude_none=True)} for message in body.messages]
    variables = {**_effort(body.reasoning_effort), **(body.chat_template_kwargs or {})}
    if taken := sorted(_TAKEN & set(variables)):
        raise ApiError(
            400,
            f"chat_template_kwargs cannot hold {', '.join(taken)}: the request has its own place for that",
            param="chat_template_kwargs",
        )
    tools = [tool.model_dump(exclude_none=True) for tool in body.tools or ()]
    state.check_tokenizer()
    return await state.text.render(
        for_template(conversations_of(conversation)[0]),
        join_parts=True,
        chat_template=state.settings.chat_template,
        add_generation_prompt=body.add_generation_prompt and not body.continue_final_message,
        continue_final_message=body.continue_final_message,
        tools=(tools or None) if with_tools else None,
        documents=body.documents,
        **variables,
    )


def _effort(effort: str | None) -> dict[str, Any]:
    """The variables that templates have for how much a model shall think."""
    if effort is None:
        return {}
    return {"reasoning_effort": effort, **({"enable_thinking": False} if effort == "none" else {})}


def _response(
    body: ChatCompletionRequest, state: ServerState, head: Head, tools: Tools, answer: Answered
) -> ChatCompletionResponse:
    choices = [_choice(body, state, tools, index, one) for index, one in enumerate(answer.completions)]
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


def _choice(
    body: ChatCompletionRequest, state: ServerState, tools: Tools, index: int, completion: Completed
) -> ChatChoice:
    content: str | None = completion.text
    reader = _Reader(tools)
    found = reader.read(completion.text, ended=True)
    if found.calls:
        content = found.content.strip() or None
    logprobs: ChatLogprobs | None = None
    if completion.logprobs is not None:
        logprobs = chat_logprobs(completion.token_ids, completion.logprobs, body.top_logprobs or 0, state.tokenizer)
    return ChatChoice(
        index=index,
        message=AnswerMessage(role=state.settings.response_role, content=content, tool_calls=found.calls or None),
        logprobs=logprobs,
        finish_reason=reader.finish_reason(completion.finish_reason),
        stop_reason=completion.stop_reason,
        token_ids=completion.token_ids if body.return_token_ids else None,
    )


class _Reader:
    """Reads one answer, in pieces or whole: which of it is text, and which are calls."""

    def __init__(self, tools: Tools) -> None:
        self._finder = tools.finder()
        self._only_one = tools.only_one
        self._is_named = tools.chosen is not None  # OpenAI's answers end with "stop" then
        self.num_calls = 0

    def read(self, text: str, *, ended: bool) -> Found:
        """What `text` adds; `ended`: nothing follows."""
        if self._finder is None:
            return Found(content=text)
        found = self._finder.push(text)
        if ended:
            rest = self._finder.flush()
            found = Found(content=found.content + rest.content, calls=found.calls + rest.calls)
        if self._only_one:
            found.calls = found.calls[: 1 - self.num_calls]
        self.num_calls += len(found.calls)
        return found

    def finish_reason(self, reason: str | None) -> str | None:
        """Why the answer ended, in the words that clients get."""
        return "tool_calls" if reason == "stop" and self.num_calls and not self._is_named else reason


class _Stream:
    """One answer in chunks."""

    def __init__(self, body: ChatCompletionRequest, state: ServerState, head: Head, tools: Tools) -> None:
        self._body = body
        self._tokenizer = state.tokenizer
        self._role = state.settings.response_role
        self._head = {"id": head.id, "object": "chat.completion.chunk", "created": head.created, "model": head.model}
        self._readers = [_Reader(tools) for _ in range(body.num_choices)]
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
        before = reader.num_calls
        found = reader.read(part.text, ended=part.finish_reason is not None)
        chunks = []
        if found.content or logprobs is not None:
            chunks.append(self._chunk(part.index, {"content": found.content}, logprobs))
        for number, call in enumerate(found.calls, before):
            chunks.append(self._chunk(part.index, {"tool_calls": [{"index": number, **call.model_dump()}]}))
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
