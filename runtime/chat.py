"""Conversations as prompts: what `LLM.chat` does before it generates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

from furiosa_llm.runtime.errors import InputError
from furiosa_llm.runtime.tokenizer import Message, Tokenizer

Conversation = Sequence[Message]


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


def render(
    tokenizer: Tokenizer,
    conversation: Conversation,
    *,
    chat_template: str | None,
    add_generation_prompt: bool,
    continue_final_message: bool,
    variables: Mapping[str, Any] | None = None,
) -> str:
    """The prompt for a conversation; with `continue_final_message` it ends with the last message's own words.

    `variables` are what else the chat template may look at.
    """
    if add_generation_prompt and continue_final_message:
        raise InputError("add_generation_prompt and continue_final_message exclude each other; leave one False")
    plain = [{**message, "content": _text(message["content"])} for message in conversation]
    prompt = tokenizer.apply_chat_template(
        plain, chat_template=chat_template, add_generation_prompt=add_generation_prompt, variables=variables
    )
    if not continue_final_message:
        return prompt
    final = plain[-1]["content"].strip()
    end = prompt.rfind(final)
    if not final or end < 0:
        raise InputError("continue_final_message: the chat template does not repeat the final message; give it another")
    return prompt[: end + len(final)]


def _check_message(message: Any) -> None:
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str) or message.get("content") is None:
        raise InputError(f"messages: found {message!r:.80}, expected an object with 'role' and 'content'")


def _text(content: Any) -> str:
    """The content of a message: text, or parts of which each is text."""
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else [content]
    if not all(isinstance(part, Mapping) and isinstance(part.get("text"), str) for part in parts):
        raise InputError(f"messages: found the content {content!r:.80}, expected text: nothing else is understood here")
    return "\n".join(part["text"] for part in parts)
