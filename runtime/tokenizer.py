"""Text to tokens and back, with the tokenizer and the chat template that lie in the artifact."""

from __future__ import annotations

import datetime
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import jinja2
import tokenizers
from jinja2.exceptions import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from furiosa_llm.runtime.artifact.reader import Artifact
from furiosa_llm.runtime.errors import TokenizerError

_TOKENIZER = "tokenizer.json"
_CONFIG = "tokenizer_config.json"
_TEMPLATE = "chat_template.jinja"

Message = Mapping[str, Any]


class Tokenizer:
    """A tokenizer.json with what tokenizer_config.json and chat_template.jinja say beside it.

    Text is encoded without special tokens unless they are asked for: chat templates write those that a model wants.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer, config: Mapping[str, Any], chat_template: str | None) -> None:
        self._tokenizer = tokenizer
        self._config = config
        self.chat_template = chat_template

    @classmethod
    def from_folder(cls, folder: str | os.PathLike[str]) -> Tokenizer:
        """The tokenizer in `folder`; raises TokenizerError if it has none or a malformed one."""
        path = Path(folder)
        return cls._from_files(path, lambda name: path / name if (path / name).is_file() else None)

    @classmethod
    def from_artifact(cls, artifact: Artifact) -> Tokenizer:
        """The tokenizer that came with the model, of the files that the manifest lists; raises TokenizerError."""
        return cls._from_files(artifact.folder, artifact.companion)

    @classmethod
    def _from_files(cls, where: Path, find: Callable[[str], Path | None]) -> Tokenizer:
        file = find(_TOKENIZER)
        if file is None:
            raise TokenizerError(
                f"{where} has no {_TOKENIZER}; put the tokenizer's files beside the model and build again, or give the "
                f"folder that has them as the tokenizer"
            )
        try:
            text = file.read_text("utf-8")
        except (OSError, ValueError) as error:
            raise TokenizerError(f"{file} cannot be read: {error}") from error
        try:
            tokenizer = tokenizers.Tokenizer.from_str(text)
        except Exception as error:
            raise TokenizerError(f"{file} is not a tokenizer: {error}") from error
        # Some files ask for prompts to be cut, or filled up to a fixed length, which no caller here expects.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        config = _read_config(find(_CONFIG))
        return cls(tokenizer, config, _read_template(find(_TEMPLATE), config))

    @property
    def vocab_size(self) -> int:
        """The number of tokens, added ones among them."""
        return int(self._tokenizer.get_vocab_size(with_added_tokens=True))

    def encode(self, text: str, *, add_special_tokens: bool = False, max_length: int | None = None) -> list[int]:
        """The tokens of `text`: the first `max_length`, special tokens among them.

        Special tokens are put around the text only if it is asked for.
        """
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        if max_length is not None:
            added = self._tokenizer.num_special_tokens_to_add(is_pair=False) if add_special_tokens else 0
            encoding.truncate(max(0, max_length - added))
        if add_special_tokens:
            encoding = self._tokenizer.post_process(encoding)
        return list(encoding.ids)

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of `token_ids`, special tokens left out."""
        return str(self._tokenizer.decode(list(token_ids), skip_special_tokens=True))

    def apply_chat_template(
        self, messages: Sequence[Message], *, chat_template: str | None = None, add_generation_prompt: bool = True
    ) -> str:
        """The prompt for `messages`, each with `role` and `content`, as the chat template writes it.

        Raises TokenizerError if there is no template, or if it refuses the messages.
        """
        template = chat_template or self.chat_template
        if template is None:
            raise TokenizerError(
                f"the artifact has no chat template; put {_TEMPLATE} beside the model and build again, or give a prompt"
            )
        special = {key: _token_text(value) for key, value in self._config.items() if key.endswith("_token")}
        try:
            compiled = _environment().from_string(template)
            return compiled.render(messages=list(messages), add_generation_prompt=add_generation_prompt, **special)
        except (TemplateError, TypeError, ValueError) as error:
            raise TokenizerError(f"the chat template refuses the messages: {error}") from error


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment


def _to_json(value: Any, indent: int | None = None) -> str:
    # jinja2's own filter escapes for HTML, which a prompt must not be.
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.exceptions.TemplateError(message)


def _read_config(path: Path | None) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        config = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise TokenizerError(f"{path} cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise TokenizerError(f"{path}: found a {type(config).__name__}, expected an object")
    return config


def _read_template(path: Path | None, config: Mapping[str, Any]) -> str | None:
    if path is not None:
        try:
            return path.read_text("utf-8")
        except (OSError, ValueError) as error:
            raise TokenizerError(f"{path} cannot be read: {error}") from error
    template = config.get("chat_template")
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None


def _token_text(value: Any) -> Any:
    return value.get("content") if isinstance(value, dict) else value
