"""The chat template of a model: a jinja program that makes a prompt of a conversation, run in a sandbox."""

from __future__ import annotations

import datetime
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import jinja2
from jinja2.exceptions import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from furiosa_llm.runtime.errors import InputError, TokenizerError

Message = Mapping[str, Any]

FILE = "chat_template.jinja"


class ChatTemplate:
    """What tokenizer_config.json and chat_template.jinja say of prompts: the template, and the tokens that it names.

    template: the model's own; None if it has none.
    """

    def __init__(self, config: Mapping[str, Any], template: str | None) -> None:
        self.template = template
        self.named_tokens = {key: _token_text(value) for key, value in config.items() if key.endswith("_token")}

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Any] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        **variables: Any,
    ) -> str:
        """The prompt for `messages`; see `Tokenizer.apply_chat_template`."""
        template = chat_template or self.template
        if template is None:
            raise TokenizerError(
                f"the artifact has no chat template; put {FILE} next to the model and build, or give a prompt"
            )
        if add_generation_prompt and continue_final_message:
            raise InputError("add_generation_prompt and continue_final_message exclude each other; leave one False")
        names = {
            **self.named_tokens,
            **variables,
            "messages": list(messages),
            "tools": list(tools) if tools else None,
            "documents": list(documents) if documents else None,
            "add_generation_prompt": add_generation_prompt,
        }
        prompt = _run(template, names)
        return _cut_behind(prompt, messages[-1].get("content")) if continue_final_message else prompt


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
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment.from_string(template)


def _cut_behind(prompt: str, final: object) -> str:
    """`prompt` to the end of the last message's own words, which the template may have stripped."""
    words = final.strip() if isinstance(final, str) else ""
    end = prompt.rfind(words)
    if not words or end < 0:
        raise InputError("continue_final_message: the chat template does not repeat the final message; give it another")
    return prompt[: end + len(words)]


def _to_json(value: Any, indent: int | None = None) -> str:
    # jinja2's own filter escapes for HTML, which a prompt must not be.
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _token_text(value: Any) -> Any:
    return value.get("content") if isinstance(value, dict) else value
