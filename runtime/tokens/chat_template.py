"""The chat template of a model: a jinja program that makes a prompt of a conversation, run in a sandbox."""

from __future__ import annotations

import datetime
import functools
import json
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.exceptions import TemplateError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from furiosa_llm.runtime.errors import InputError, TokenizerError

Message = Mapping[str, Any]
Templates = str | Mapping[str, str] | None

FILE = "chat_template.jinja"
_REASONING = ("reasoning_content", "thinking", "reasoning")
"""Names of what a model thought before its answer; the first is the usual one."""


class ChatTemplate:
    """What tokenizer_config.json and chat_template.jinja say of prompts: templates, and the tokens that they name.

    `templates` is the model's own, or several by their names. What is rendered is what transformers renders.
    """

    def __init__(self, config: Mapping[str, Any], templates: Templates) -> None:
        self.templates = templates
        named = {key: _token_text(value) for key, value in config.items() if key.endswith("_token")}
        self.named_tokens = {key: text for key, text in named.items() if isinstance(text, str)}

    @property
    def default(self) -> str | None:
        """The one for conversations without tools; None if there is none."""
        return self.templates if isinstance(self.templates, str | None) else self.templates.get("default")

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Any] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        join_parts: bool = False,
        **variables: Any,
    ) -> str:
        """The prompt for `messages`; see `Tokenizer.apply_chat_template`.

        With `join_parts`, contents that are lists of texts are joined to one text for a template that takes no lists.
        """
        if add_generation_prompt and continue_final_message:
            raise InputError("add_generation_prompt and continue_final_message exclude each other; leave one False")
        template = self._chosen(chat_template, tools)
        given = [_as_template_sees_it(message) for message in messages]
        if join_parts and not _takes_parts(template):
            given = [_with_joined_parts(message) for message in given]
        mark = f"CONTINUES{uuid.uuid4().hex} "
        names = {
            **self.named_tokens,
            **variables,
            "messages": [*given[:-1], _marked(given[-1], mark)] if continue_final_message else given,
            "tools": None if tools is None else list(tools),
            "documents": None if documents is None else list(documents),
            "add_generation_prompt": add_generation_prompt,
        }
        prompt = _run(template, names)
        return _cut_at(prompt, mark) if continue_final_message else prompt

    def _chosen(self, given: str | None, tools: object) -> str:
        """The template itself: `given` may be the name of one."""
        if isinstance(self.templates, str | None):
            found = given or self.templates
        elif given is None:
            name = "tool_use" if tools is not None and "tool_use" in self.templates else "default"
            found = self.templates.get(name)
        else:
            found = self.templates.get(given, given)
        if found is not None:
            return found
        if self.templates is None:
            raise TokenizerError(
                f"the artifact has no chat template; put {FILE} next to the model and build, or give a prompt"
            )
        raise TokenizerError(
            f"the model has the chat templates {', '.join(sorted(self.templates))}, and no default; give one's name as "
            f"chat_template"
        )


def _as_template_sees_it(message: Message) -> dict[str, Any]:
    """`message` without what is None, and with its reasoning under the names that templates have for it."""
    found = {key: value for key, value in message.items() if value is not None}
    reasoning = next((found[key] for key in _REASONING if key in found), None)
    return found if reasoning is None else {"thinking": reasoning, **found, "reasoning_content": reasoning}


def _with_joined_parts(message: dict[str, Any]) -> dict[str, Any]:
    content = message.get("content")
    if not isinstance(content, list):
        return message
    return {**message, "content": "\n".join(part["text"] for part in content)}


@functools.lru_cache(8)
def _takes_parts(template: str) -> bool:
    """Whether it writes the text of a content that is a list, and not the list."""
    probe = f"PART{uuid.uuid4().hex}"
    message = {"role": "user", "content": [{"type": "text", "text": probe}]}
    names = {"messages": [message], "tools": None, "documents": None, "add_generation_prompt": False}
    try:
        prompt = _run(template, names)
    except TokenizerError:
        return False
    return probe in prompt and f"'{probe}'" not in prompt and f'"{probe}"' not in prompt


def _marked(message: dict[str, Any], mark: str) -> dict[str, Any]:
    """`message` with `mark` behind its last text; raises InputError if it has none."""
    content = message.get("content")
    if isinstance(content, str):
        return {**message, "content": content + mark}
    parts: list[Any] = list(content) if isinstance(content, list | tuple) else []
    for place, part in reversed(list(enumerate(parts))):
        if isinstance(part, Mapping) and isinstance(part.get("text"), str):
            parts[place] = {**part, "text": part["text"] + mark}
            return {**message, "content": parts}
    raise InputError("continue_final_message: the final message has no text to continue; give it one")


def _cut_at(prompt: str, mark: str) -> str:
    """`prompt` to the mark; a template that has stripped the blank at its end strips those of the message, too."""
    place = prompt.rfind(mark.strip())
    if place < 0:
        raise InputError("continue_final_message: the chat template does not repeat the final message; give it another")
    return prompt[:place] if prompt.startswith(mark, place) else prompt[:place].rstrip()


def _run(template: str, names: Mapping[str, Any]) -> str:
    """What the program `template` makes of `names`; whatever it raises is a TokenizerError.

    A program may divide by zero, call itself without end, or fill the memory.
    """
    try:
        return _compiled(template).render(names)
    except TemplateError as error:
        raise TokenizerError(f"the chat template refuses the messages: {error}") from error
    except Exception as error:
        raise TokenizerError(f"the chat template refuses the messages: {type(error).__name__}: {error}") from error


@functools.lru_cache(8)
def _compiled(template: str) -> jinja2.Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment.from_string(template)


class _Generation(Extension):
    """`{% generation %}`: what lies within is written as if the tags were not there.

    They mark what a model said, for training.
    """

    tags = {"generation"}  # noqa: RUF012 - as jinja2 declares it

    def parse(self, parser: Parser) -> nodes.Node:
        """What stands for the block in the program: a scope of its own, as in transformers."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_written"), [], [], body).set_lineno(line)

    @staticmethod
    def _written(caller: Callable[[], str]) -> str:
        return caller()


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # jinja2's own filter escapes for HTML, which a prompt must not be.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _token_text(value: Any) -> Any:
    return value.get("content") if isinstance(value, dict) else value
