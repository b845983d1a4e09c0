"""Text to tokens and back, with the tokenizer and the chat template that lie in the artifact."""

from __future__ import annotations

import functools
import json
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, ParamSpec, TypeVar, overload

import tokenizers
from tokenizers.processors import TemplateProcessing

from furiosa_llm.runtime.artifact.errors import FuriosaLLMError
from furiosa_llm.runtime.errors import TokenizerError
from furiosa_llm.runtime.tokens.first_load import check_loads

if TYPE_CHECKING:  # processes that only tokenize do without what it imports
    from furiosa_llm.runtime.artifact.reader import Artifact, Companion
    from furiosa_llm.runtime.tokens.chat_template import Message, Templates

P = ParamSpec("P")
T = TypeVar("T")

_TOKENIZER = "tokenizer.json"
_CONFIG = "tokenizer_config.json"
_LONG = 4096
"""Characters or tokens, from which on encoding or decoding them takes milliseconds.

One text is encoded or decoded with the interpreter's lock held, which stops every other thread; a batch is not.
"""


_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


def _bytes_by_letter() -> dict[str, int]:
    """What stands for each byte in the names of byte-level tokens, by GPT-2's convention."""
    shown = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {**{chr(byte): byte for byte in shown}, **{chr(256 + place): byte for place, byte in enumerate(hidden)}}


_BYTES = _bytes_by_letter()


def _in_library(method: Callable[P, T]) -> Callable[P, T]:
    """Makes a TokenizerError of whatever the library raises in `method`.

    It has no class of its own for what it refuses, and its panics are no Exception.
    """

    @functools.wraps(method)
    def call(*args: P.args, **options: P.kwargs) -> T:
        try:
            return method(*args, **options)
        except (TokenizerError, KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:
            given = args[1] if len(args) > 1 else args[0] if isinstance(args[0], str) else None
            shown = given[:80] if isinstance(given, str | list | tuple) else given
            raise TokenizerError(f"the tokenizer refuses {shown!r:.80}: {error}") from error

    return call


class Tokenizer:
    """A tokenizer.json, with what tokenizer_config.json and chat_template.jinja add to it.

    Text is encoded without special tokens unless they are asked for: chat templates write what a model wants.
    """

    def __init__(
        self,
        tokenizer: tokenizers.Tokenizer | Future[tokenizers.Tokenizer],
        config: Mapping[str, Any],
        chat_template: Templates,
    ) -> None:
        # jinja2 takes 40 ms to import, which a command line that only names this class need not.
        from furiosa_llm.runtime.tokens.chat_template import ChatTemplate

        self._made = tokenizer
        self.config = config
        self._template = ChatTemplate(config, chat_template)

    @classmethod
    def from_folder(cls, folder: str | os.PathLike[str], *, wait: bool = True) -> Tokenizer:
        """The tokenizer in `folder`; raises TokenizerError if it has none or a malformed one.

        Without `wait`, what is malformed in tokenizer.json is said by `wait_until_loaded`.
        """
        path = Path(folder)
        return cls._from_files(path, lambda name: path / name if (path / name).is_file() else None, wait)

    @classmethod
    def from_artifact(cls, artifact: Artifact, *, wait: bool = True) -> Tokenizer:
        """The tokenizer that came with the model, of the files that the manifest lists; see `from_folder`."""
        return cls._from_files(artifact.folder, artifact.companion, wait)

    @classmethod
    def _from_files(cls, where: Path, find: Callable[[str], Path | Companion | None], wait: bool) -> Tokenizer:
        from furiosa_llm.runtime.tokens.chat_template import FILE

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
        config = _read_config(find(_CONFIG))
        loading = _in_thread(lambda: _loaded(text, str(file), config))
        made = cls(loading, config, _read_template(find(FILE), config))
        if wait:
            made.wait_until_loaded()
        return made

    @classmethod
    def of_text(cls, text: str, config: Mapping[str, Any], chat_template: Templates) -> Tokenizer:
        """The tokenizer of a tokenizer.json that is known to be one."""
        return cls(_of_text(text, config), config, chat_template)

    def wait_until_loaded(self) -> None:
        """Raises TokenizerError if tokenizer.json is malformed."""
        _ = self._tokenizer

    @cached_property
    def _tokenizer(self) -> tokenizers.Tokenizer:
        return self._made.result() if isinstance(self._made, Future) else self._made

    @_in_library
    def to_text(self) -> str:
        """The tokenizer.json of which `of_text` makes the same."""
        return str(self._tokenizer.to_str())

    @property
    def chat_template(self) -> str | None:
        """The model's own; None if it has none."""
        return self._template.default

    @property
    def chat_templates(self) -> Templates:
        """All of the model's own: one, or several by their names."""
        return self._template.templates

    @property
    @_in_library
    def vocab_size(self) -> int:
        """The number of tokens, added ones among them."""
        return int(self._tokenizer.get_vocab_size(with_added_tokens=True))

    @cached_property
    @_in_library
    def special_ids(self) -> frozenset[int]:
        """The tokens that are no text, such as the one that ends a sequence."""
        added = self._tokenizer.get_added_tokens_decoder()
        return frozenset(token for token, content in added.items() if content.special)

    @cached_property
    @_in_library
    def tags(self) -> frozenset[str]:
        """The tokens of the form `<...>` that are not special: a model that knows them writes them as such."""
        added = self._tokenizer.get_added_tokens_decoder().values()
        return frozenset(
            one.content
            for one in added
            if not one.special and one.content.startswith("<") and one.content.endswith(">")
        )

    @cached_property
    @_in_library
    def byte_ids(self) -> frozenset[int]:
        """The tokens of one byte each, of which a run is decoded as a whole; none for most kinds of tokenizers."""
        decoder = self._tokenizer.decoder
        if decoder is None or b'"ByteFallback"' not in decoder.__getstate__():
            return frozenset()
        names = (f"<0x{byte:{form}}>" for byte in range(256) for form in ("02X", "02x"))
        found = map(self._tokenizer.token_to_id, names)
        return frozenset(token for token in found if token is not None)

    @_in_library
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
        return self._template.named_tokens

    @_in_library
    def encode(self, text: str, *, add_special_tokens: bool = False, max_length: int | None = None) -> list[int]:
        """The tokens of `text`, the first `max_length` of them; if wished with the special tokens around a sequence.

        Special tokens count, and are there however much of the text is not. Raises TokenizerError if `text` is not a
        string of Unicode characters, or has some that are no tokens.
        """
        encoding = self._read(text)
        if max_length is not None:
            added = self._tokenizer.num_special_tokens_to_add(is_pair=False) if add_special_tokens else 0
            encoding.truncate(max(0, max_length - added))
        if add_special_tokens:
            encoding = self._tokenizer.post_process(encoding)
        return list(encoding.ids)

    @_in_library
    def encode_pair(self, text: str, other: str, *, max_length: int | None = None) -> tuple[list[int], list[int]]:
        """The tokens of two texts with the special tokens around and between them, and of which text each one is.

        At most `max_length` of them: what is too much is cut from the end of `other`, and then of `text`.
        """
        first, second = self._read(text), self._read(other)
        if max_length is not None:
            room = max(0, max_length - self._tokenizer.num_special_tokens_to_add(is_pair=True))
            first.truncate(min(room, len(first)))
            second.truncate(max(0, room - len(first)))
        made = self._tokenizer.post_process(first, second)
        return list(made.ids), list(made.type_ids)

    def _read(self, text: str) -> tokenizers.Encoding:
        """What a text is, without special tokens; raises TokenizerError if it is none."""
        if not isinstance(text, str):
            raise TokenizerError(f"found {text!r:.80} of type {type(text).__name__}, expected text")
        try:
            return self._encoding(text)
        except TypeError as error:  # Half of a surrogate pair is no character.
            raise TokenizerError(f"found {text[:80]!r:.80}, expected text of Unicode characters only") from error

    def _encoding(self, text: str) -> tokenizers.Encoding:
        if len(text) < _LONG:
            return self._tokenizer.encode(text, add_special_tokens=False)
        [encoding] = self._tokenizer.encode_batch_fast([text], add_special_tokens=False)
        return encoding

    @_in_library
    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of `token_ids`, with or without special tokens; unknown ones have none."""
        if len(token_ids) < _LONG:
            return str(self._tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens))
        [text] = self._tokenizer.decode_batch([token_ids], skip_special_tokens=skip_special_tokens)
        return str(text)

    @_in_library
    def decode_each(self, token_ids: Sequence[int]) -> list[str]:
        """The text of each of `token_ids` by itself, special tokens among them."""
        return list(self._tokenizer.decode_batch([[token] for token in token_ids], skip_special_tokens=False))

    def bytes_of(self, token_id: int, text: str) -> bytes:
        """The bytes of a token whose `text` by itself is known: it may be a part of a character."""
        name = self.id_to_token(token_id)
        if name is None or _REPLACEMENT not in text:
            return text.encode()
        if token_id in self.byte_ids:
            return bytes.fromhex(name[3:5])
        found = [_BYTES.get(one) for one in name]
        return text.encode() if None in found else bytes(one for one in found if one is not None)

    @_in_library
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
        *,
        tokenize: bool = False,
        **options: Any,
    ) -> str | list[int]:
        """The prompt for `messages`, each with `role` and `content`, as the chat template writes it.

        `options` are `documents`, `chat_template` in place of the model's own, `add_generation_prompt` (True),
        `continue_final_message`, with which the prompt ends with the last message's own words, and the one before must
        be False, and variables of the template, which may leave them and `tools` out. With `tokenize` the prompt's
        tokens are given back. Raises TokenizerError if there is no template, or if it fails or refuses the messages,
        and InputError if the last message cannot be continued.
        """
        prompt = self._template.render(messages, tools, **options)
        return self.encode(prompt) if tokenize else prompt


def _read_config(path: Path | Companion | None) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        config = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise TokenizerError(f"{path} cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise TokenizerError(f"{path}: found a {type(config).__name__}, expected an object")
    return config


def _read_template(path: Path | Companion | None, config: Mapping[str, Any]) -> Templates:
    if path is not None:
        try:
            return path.read_text("utf-8")
        except (OSError, ValueError) as error:
            raise TokenizerError(f"{path} cannot be read: {error}") from error
    template = config.get("chat_template")
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        return {name: text for name, text in named.items() if isinstance(name, str) and isinstance(text, str)}
    return template if isinstance(template, str) else None


def _in_thread(work: Callable[[], T]) -> Future[T]:
    """What `work` gives or raises, on a thread that ends with it."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except (FuriosaLLMError, OSError) as error:  # OSError: no process can be started
            future.set_exception(error)

    threading.Thread(target=run, name="furiosa-tokenizer").start()
    return future


def _loaded(text: str, file: str, config: Mapping[str, Any]) -> tokenizers.Tokenizer:
    check_loads(text, file)
    return _of_text(text, config)


_MARKS = (
    *("<tool_call>", "</tool_call>", "<|tool_call|>", "<|/tool_call|>", "<think>", "</think>", "[THINK]", "[/THINK]"),
    *("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]", "<|python_tag|>", "<minimax:tool_call>", "</minimax:tool_call>"),
    *("<|tool_calls_section_begin|>", "<|tool_calls_section_end|>", "<|tool_call_begin|>", "<|tool_call_end|>"),
    *("<|tool_call_argument_begin|>", "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>", "<｜tool▁call▁begin｜>"),
    *(
        "<｜tool▁call▁end｜>",
        "<｜tool▁sep｜>",
        "<arg_key>",
        "</arg_key>",
        "<arg_value>",
        "</arg_value>",
        "◁think▷",
        "◁/think▷",
    ),
)
"""What models write around calls of tools and thoughts: text to who reads them, special in some files."""


def _with_marks_as_text(text: str) -> str:
    """A tokenizer.json in which marks are no special tokens, which texts are without."""
    if not any(json.dumps(mark, ensure_ascii=False)[1:-1] in text for mark in _MARKS):
        return text
    written = json.loads(text)
    for token in written.get("added_tokens", ()):
        if token.get("content") in _MARKS:
            token["special"] = False
    return json.dumps(written, ensure_ascii=False)


@_in_library
def _of_text(text: str, config: Mapping[str, Any]) -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer.from_str(_with_marks_as_text(text))
    # Some files ask for prompts to be cut, or filled up to a fixed length, which no caller here expects.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    if any(f"add_{name}_token" in config for name in ("bos", "eos")):
        _add_around(tokenizer, config)
    return tokenizer


def _add_around(tokenizer: tokenizers.Tokenizer, config: Mapping[str, Any]) -> None:
    """Puts the tokens around a sequence that `add_bos_token` and `add_eos_token` say, whatever tokenizer.json does."""
    from furiosa_llm.runtime.tokens.chat_template import ChatTemplate

    named = ChatTemplate(config, None).named_tokens
    special: list[tuple[str, int]] = []
    order = {"bos": "", "": "$A:0", "eos": ""}
    for name in ("bos", "eos"):
        token = named.get(f"{name}_token")
        number = None if token is None else tokenizer.token_to_id(token)
        if config.get(f"add_{name}_token") and token is not None and number is not None:
            special.append((token, number))
            order[name] = f"{token}:0"
    single = [piece for piece in order.values() if piece]
    tokenizer.post_processor = TemplateProcessing(single=single, pair=[*single, "$B:1"], special_tokens=special)


def tokenizer_of(
    artifact: Artifact, given: str | os.PathLike[str] | Tokenizer | None, *, wait: bool = True
) -> Tokenizer | None:
    """The tokenizer that was `given`, itself or by its folder, else the artifact's; None if it has none."""
    if isinstance(given, Tokenizer):
        return given
    if given is not None:
        return Tokenizer.from_folder(given, wait=wait)
    return None if artifact.companion(_TOKENIZER) is None else Tokenizer.from_artifact(artifact, wait=wait)
