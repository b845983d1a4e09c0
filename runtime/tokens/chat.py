"""Conversations as prompts: what `LLM.chat` does before it generates."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

from furiosa_llm.runtime.errors import InputError
from furiosa_llm.runtime.tokens.chat_template import Message
from furiosa_llm.runtime.tokens.tokenizer import Tokenizer

Conversation = Sequence[Message]


_TAKEN = frozenset(
    (
        *("self", "messages", "tools", "documents", "chat_template"),
        *("add_generation_prompt", "continue_final_message", "join_parts"),
    )
)
"""What cannot be set as a variable of the chat template: parameters on the way to it."""


def conversations_of(messages: object) -> list[Conversation]:
    """`messages` as a list of conversations: it is one, or several; raises InputError for anything else."""
    single = _is_list(messages) and all(isinstance(one, Mapping) for one in messages)
    several: Any = [messages] if single else messages
    if not _is_list(several) or not all(_is_list(one) for one in several):
        raise InputError(
            "messages: expected a list of messages such as {'role': 'user', 'content': ...}, or a list of such lists"
        )
    for conversation in several:
        for message in conversation:
            _check_message(message)
    return list(several)


def _is_list(value: object) -> TypeGuard[Sequence[Any]]:
    return isinstance(value, list | tuple) and bool(value)


def render(tokenizer: Tokenizer, conversation: Conversation, **options: Any) -> str:
    """The prompt for a conversation; `options` are arguments of `Tokenizer.apply_chat_template`."""
    return tokenizer.apply_chat_template(for_template(conversation), tokenize=False, join_parts=True, **options)


def for_template(conversation: Conversation) -> list[Message]:
    """The messages as templates want them; raises InputError for a content that is no text and no parts of text.

    The arguments of calls are objects to a template, and text to OpenAI's clients.
    """
    return [{**message, **_content(message), **_calls(message)} for message in conversation]


def check_variables(variables: object) -> Mapping[str, Any]:
    """The variables of a template; raises InputError for names that the request has its own place for."""
    if variables is None:
        return {}
    if not isinstance(variables, Mapping):
        raise InputError(f"chat_template_kwargs: found {variables!r:.80}, expected a mapping of names to values")
    if taken := sorted(_TAKEN & set(variables)):
        raise InputError(f"chat_template_kwargs cannot hold {', '.join(taken)}: the request has its own place for that")
    return variables


def check_tools(tools: object) -> None:
    """Raises InputError unless `tools` is a list of objects, or None."""
    if tools is not None and not (isinstance(tools, list | tuple) and all(isinstance(tool, Mapping) for tool in tools)):
        raise InputError(f"tools: found {tools!r:.80}, expected a list of objects that each describe a function")


def _check_message(message: Any) -> None:
    # An assistant that calls tools may say nothing else.
    complete = isinstance(message, Mapping) and (message.get("content") is not None or message.get("tool_calls"))
    if not complete or not isinstance(message.get("role"), str):
        raise InputError(f"messages: found {message!r:.80}, expected an object with 'role' and 'content'")


def _content(message: Message) -> dict[str, Any]:
    """The content: text, parts of which each is text, or nothing."""
    content = message.get("content")
    if content is None or isinstance(content, str):
        return {}
    parts = content if isinstance(content, list) else [content]
    if not all(isinstance(part, Mapping) and isinstance(part.get("text"), str) for part in parts):
        raise InputError(f"messages: found the content {content!r:.80}, expected text: nothing else is understood here")
    return {"content": parts}


def _calls(message: Message) -> dict[str, Any]:
    calls = message.get("tool_calls")
    if not isinstance(calls, list | tuple) or not all(isinstance(call, Mapping) for call in calls):
        return {}
    return {"tool_calls": [{**call, "function": _function(call.get("function"))} for call in calls]}


def _function(function: Any) -> Any:
    """A function that is called, its arguments as an object; those that are no JSON stay text."""
    arguments = function.get("arguments") if isinstance(function, Mapping) else None
    if not isinstance(arguments, str):
        return function
    try:
        return {**function, "arguments": json.loads(arguments or "{}")}
    except (ValueError, RecursionError):
        return function
