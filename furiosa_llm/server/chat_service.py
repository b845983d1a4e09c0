"""A conversation from its messages to what its answers are: what every endpoint for chats has in common."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, replace
from typing import Any

from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError

from furiosa_llm.runtime.errors import InputError
from furiosa_llm.runtime.tokens.chat import check_variables, conversations_of, for_template
from furiosa_llm.server.call_formats import ReasoningFormat
from furiosa_llm.server.errors import ApiError
from furiosa_llm.server.generation import Outputs
from furiosa_llm.server.reasoning import ReasoningFinder, behind_thoughts
from furiosa_llm.server.requests import ChatCompletionRequest, TokenizeRequest, as_prompt
from furiosa_llm.server.responses import ToolCall
from furiosa_llm.server.state import Head, ServerState, new_head
from furiosa_llm.server.tool_choice import Tools
from furiosa_llm.server.tools import Found, whole_calls


@dataclass(frozen=True, slots=True, kw_only=True)
class Said:
    """A whole answer."""

    content: str | None
    reasoning: str | None
    calls: list[ToolCall]
    finish_reason: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Chat:
    """A conversation that is being answered."""

    body: ChatCompletionRequest
    """What was asked for."""
    head: Head
    """What the answer begins with."""
    tools: Tools
    """What may be called."""
    outputs: Outputs
    """What the model writes."""
    prompt: str
    """What it was given."""
    thinks: ReasoningFormat | None
    """How it marks what it thinks."""

    def reader(self, *, streams: bool) -> Reader:
        """Reads one of the answers, in pieces or as a whole."""
        return Reader(self, streams=streams)

    def read_whole(self, text: str, finish_reason: str | None) -> Said:
        """What an answer says."""
        reader = self.reader(streams=False)
        found = reader.read(text, ended=True)
        calls = whole_calls(found.calls)
        return Said(
            content=(found.content.strip() or None) if calls else found.content,
            reasoning=found.reasoning or None,
            calls=calls,
            finish_reason=reader.finish_reason(finish_reason),
        )


class Reader:
    """Reads one answer: which of it is text, which is thought, and which are calls."""

    def __init__(self, chat: Chat, *, streams: bool) -> None:
        self._finder = chat.tools.finder(streams=streams)
        self._thoughts = None if chat.thinks is None else ReasoningFinder(chat.thinks, chat.prompt)
        self._only_one = chat.tools.only_one
        self._is_named = chat.tools.chosen is not None  # OpenAI's answers end with "stop" then
        self.num_calls = 0

    def read(self, text: str, *, ended: bool) -> Found:
        """What `text` adds; `ended`: nothing follows."""
        thought, said = ("", text) if self._thoughts is None else self._thoughts.push(text)
        if ended and self._thoughts is not None:
            last = self._thoughts.flush()
            thought, said = thought + last[0], said + last[1]
        found = Found(content=said) if self._finder is None else self._finder.push(said)
        if ended and self._finder is not None:
            found.add(self._finder.flush())
        found.reasoning = thought
        if self._only_one:
            found.calls = [piece for piece in found.calls if piece.index == 0]
        self.num_calls += sum(piece.id is not None for piece in found.calls)
        return found

    def finish_reason(self, reason: str | None) -> str | None:
        """Why the answer ended, in the words that clients get."""
        return "tool_calls" if reason == "stop" and self.num_calls and not self._is_named else reason


def as_chat_request(given: dict[str, Any]) -> ChatCompletionRequest:
    """A request for a chat, of which what is wrong is told as of any other."""
    try:
        return ChatCompletionRequest.model_validate(given)
    except ValidationError as error:
        raise RequestValidationError(error.errors()) from error


async def begin_chat(body: ChatCompletionRequest, state: ServerState, prefix: str) -> Chat:
    """Starts the answers to a conversation, whose id begins with `prefix`; raises what is wrong with the request."""
    state.check_model(body.model)
    generator = state.generator
    if not generator.goes_on:
        raise ApiError(400, f"{state.model.names[0]} is an encoder-decoder, and holds no chats; use /v1/completions")
    tools = Tools(body, state.call_format, state.tokenizer.tags)
    params = body.params(await tools.constraint())
    text = await prompt_of(body, state, with_tools=tools.shown)
    if params.structured_outputs is not None and state.reasoning_format is not None:
        form, tags = state.reasoning_format, state.tokenizer.tags
        answer = await asyncio.to_thread(behind_thoughts, params.structured_outputs, form, text, tags)
        params = replace(params, structured_outputs=answer)
    token_ids = await state.encode(text, add_special_tokens=body.add_special_tokens)
    token_ids = body.kept(token_ids, state.model.max_prompt_length)
    adapter = state.model.adapters.get(body.model)
    head = new_head(state, prefix, adapter)
    prompts = [as_prompt(token_ids, text)]
    outputs = generator.run(head.id, prompts, params, adapter=adapter, form_field=tools.form_field)
    return Chat(body=body, head=head, tools=tools, outputs=outputs, prompt=text, thinks=state.reasoning_format)


async def prompt_of(body: ChatCompletionRequest | TokenizeRequest, state: ServerState, *, with_tools: bool) -> str:
    """The prompt for the messages of `body`, as the chat template writes it."""
    assert body.messages is not None
    conversation = [{"content": "", **message.model_dump(exclude_none=True)} for message in body.messages]
    try:
        variables = {**_effort(body.reasoning_effort), **check_variables(body.chat_template_kwargs)}
    except InputError as error:
        raise ApiError(400, str(error), param="chat_template_kwargs") from error
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
