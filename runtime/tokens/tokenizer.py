"""Text to tokens and back, with the tokenizer and the chat template that lie in the artifact."""

from __future__ import annotations

import datetime
import json
import os
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NoReturn, overload

import jinja2
import tokenizers
from jinja2.exceptions import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from furiosa_llm.runtime.artifact.reader import Artifact, Companion
from furiosa_llm.runtime.errors import InputError, TokenizerError

_TOKENIZER = "tokenizer.json"
_CONFIG = "tokenizer_config.json"
_TEMPLATE = "chat_template.jinja"
_LONG = 4096
"""Characters or tokens, from which on encoding or decoding them takes milliseconds.

One text is encoded or decoded with the interpreter's lock held, which stops every other thread; a batch is not.
"""

Message = Mapping[str, Any]


class Tokenizer:
    """A tokenizer.json, with what tokenizer_config.json and chat_template.jinja add to it.

    Text is encoded without special tokens unless they are asked for: chat templates write what a model wants.
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
    def _from_files(cls, where: Path, find: Callable[[str], Path | Companion | None]) -> Tokenizer:
        file = find(_TOKENIZER)
        if file is None:
            raise TokenizerError(
                f"{where} has no {_TOKENIZER}; put the tokenizer's files next to the model and build again, or give "
                f"the folder that has them as the tokenizer"
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

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """The tokens that are no text, such as the one that ends a sequence."""
        added = self._tokenizer.get_added_tokens_decoder()
        return frozenset(token for token, content in added.items() if content.special)

    @cached_property
    def tags(self) -> frozenset[str]:
        """The tokens of the form `<...>` that are not special: a model that knows them writes them as such."""
        added = self._tokenizer.get_added_tokens_decoder().values()
        return frozenset(
            one.content
            for one in added
            if not one.special and one.content.startswith("<") and one.content.endswith(">")
        )

    @cached_property
    def byte_ids(self) -> frozenset[int]:
        """The tokens of one byte each, of which a run is decoded as a whole; none for most kinds of tokenizers."""
        decoder = self._tokenizer.decoder
        if decoder is None or b'"ByteFallback"' not in decoder.__getstate__():
            return frozenset()
        names = (f"<0x{byte:{form}}>" for byte in range(256) for form in ("02X", "02x"))
        found = map(self._tokenizer.token_to_id, names)
        return frozenset(token for token in found if token is not None)

    def with_another_token(self) -> tuple[str, int]:
        """The tokenizer.json of this tokenizer with one special token more, and that token's number."""
        wider = tokenizers.Tokenizer.from_str(self._tokenizer.to_str())
        name = "<|another|>"
        while wider.token_to_id(name) is not None:
            name += ">"
        wider.add_special_tokens([name])
        number = wider.token_to_id(name)
        assert number is not None
        return str(wider.to_str()), number

    @cached_property
    def special_tokens(self) -> dict[str, str]:
        """What tokenizer_config.json has of `bos_token`, `eos_token` and the like, by these names."""
        return {name: text for name, text in self._named_tokens().items() if isinstance(text, str)}

    def encode(self, text: str, *, add_special_tokens: bool = False, max_length: int | None = None) -> list[int]:
        """The tokens of `text`, the first `max_length` of them; if wished with the special tokens around a sequence.

        Special tokens count, and are there however much of the text is not. Raises TokenizerError if `text` is not a
        string of Unicode characters, or has some that are no tokens.
        """
        if not isinstance(text, str):
            raise TokenizerError(f"found {text!r:.80} of type {type(text).__name__}, expected text")
        try:
            encoding = self._encoding(text)
            if max_length is not None:
                added = self._tokenizer.num_special_tokens_to_add(is_pair=False) if add_special_tokens else 0
                encoding.truncate(max(0, max_length - added))
            if add_special_tokens:
                encoding = self._tokenizer.post_process(encoding)
        except TypeError as error:  # Half of a surrogate pair is no character.
            raise TokenizerError(f"found {text!r:.80}, expected text of Unicode characters only") from error
        except Exception as error:  # tokenizers has no class of its own for what it refuses.
            raise TokenizerError(f"the tokenizer refuses {text!r:.80}: {error}") from error
        return list(encoding.ids)

    def _encoding(self, text: str) -> tokenizers.Encoding:
        if len(text) < _LONG:
            return self._tokenizer.encode(text, add_special_tokens=False)
        [encoding] = self._tokenizer.encode_batch_fast([text], add_special_tokens=False)
        return encoding

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of `token_ids`, with or without special tokens; unknown ones have none."""
        if len(token_ids) < _LONG:
            return str(self._tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens))
        [text] = self._tokenizer.decode_batch([token_ids], skip_special_tokens=skip_special_tokens)
        return str(text)

    def decode_each(self, token_ids: Sequence[int]) -> list[str]:
        """The text of each of `token_ids` by itself, special tokens among them."""
        return list(self._tokenizer.decode_batch([[token] for token in token_ids], skip_special_tokens=False))

    def id_to_token(self, token_id: int) -> str | None:
        """The token as the vocabulary writes it, None for an unknown one."""
        token: str | None = self._tokenizer.id_to_token(token_id)
        return token

    def has_text(self, token_id: int, *, skip_special_tokens: bool) -> bool:
        """Whether a token is part of what is decoded: known, and not special if those are left out."""
        return not (skip_special_tokens and token_id in self.special_ids) and self.id_to_token(token_id) is not None

    @overload
    def apply_chat_template(
        self, messages: Sequence[Message], tools: Sequence[Any] | None = ..., *, tokenize: Literal[True], **options: Any
    ) -> list[int]: ...

    @overload
    def apply_chat_template(
        self,
        messages: Sequence[Message],
        tools: Sequence[Any] | None = ...,
        *,
        tokenize: Literal[False] = False,
        **options: Any,
    ) -> str: ...

    def apply_chat_template(
        self,
        messages: Sequence[Message],
        tools: Sequence[Any] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tokenize: bool = False,
        **variables: Any,
    ) -> str | list[int]:
        """The prompt for `messages`, each with `role` and `content`, as the chat template writes it.

        `tools`, `documents` and `variables` are the template's, which may leave them out. With
        `continue_final_message` the prompt ends with the last message's own words, and `add_generation_prompt` must be
        False. With `tokenize` the prompt's tokens are given back. Raises TokenizerError if there is no template, or if
        it refuses the messages, and InputError if the last message cannot be continued.
        """
        template = chat_template or self.chat_template
        if template is None:
            raise TokenizerError(
                f"the artifact has no chat template; put {_TEMPLATE} next to the model and build, or give a prompt"
            )
        if add_generation_prompt and continue_final_message:
            raise InputError("add_generation_prompt and continue_final_message exclude each other; leave one False")
        names = {
            **self._named_tokens(),
            **variables,
            "messages": list(messages),
            "tools": list(tools) if tools else None,
            "documents": list(documents) if documents else None,
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            prompt = _environment().from_string(template).render(names)
        except (TemplateError, TypeError, ValueError) as error:
            raise TokenizerError(f"the chat template refuses the messages: {error}") from error
        if continue_final_message:
            prompt = _cut_behind(prompt, messages[-1].get("content"))
        return self.encode(prompt) if tokenize else prompt

    def _named_tokens(self) -> dict[str, Any]:
        return {key: _token_text(value) for key, value in self._config.items() if key.endswith("_token")}


def _cut_behind(prompt: str, final: object) -> str:
    """`prompt` to the end of the last message's own words, which the template may have stripped."""
    words = final.strip() if isinstance(final, str) else ""
    end = prompt.rfind(words)
    if not words or end < 0:
        raise InputError("continue_final_message: the chat template does not repeat the final message; give it another")
    return prompt[: end + len(words)]


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


def _read_config(path: Path | Companion | None) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        config = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise TokenizerError(f"{path} cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise TokenizerError(f"{path}: found a {type(config).__name__}, expected an object")
    return config


def _read_template(path: Path | Companion | None, config: Mapping[str, Any]) -> str | None:
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


def tokenizer_of(artifact: Artifact, given: str | os.PathLike[str] | Tokenizer | None) -> Tokenizer | None:
    """The tokenizer that was `given`, itself or by its folder, else the artifact's; None if it has none."""
    if isinstance(given, Tokenizer):
        return given
    if given is not None:
        return Tokenizer.from_folder(given)
    return None if artifact.companion("tokenizer.json") is None else Tokenizer.from_artifact(artifact)
