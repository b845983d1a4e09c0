"""What every handler has at hand: the model, the settings, the metrics, and checks that several of them make."""

from __future__ import annotations

import time
import uuid
from dataclasses import dataclass, field
from typing import Annotated, TypeVar

from fastapi import Depends, Request
from pydantic import BaseModel

from furiosa_llm.runtime.adapters.adapter import LoRARequest
from furiosa_llm.runtime.tokens.tokenizer import Tokenizer
from furiosa_llm.server.background import Background
from furiosa_llm.server.call_formats import CallFormat, ReasoningFormat
from furiosa_llm.server.embedder import Embedder
from furiosa_llm.server.errors import ApiError
from furiosa_llm.server.generation import Gate, Generator
from furiosa_llm.server.metrics import Metrics
from furiosa_llm.server.model import Decoder, ServedModel
from furiosa_llm.server.response_store import ResponseStore
from furiosa_llm.server.settings import ServerSettings
from furiosa_llm.server.text_processes import TextWork

T = TypeVar("T", bound=BaseModel)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerState:
    """The running server."""

    model: ServedModel
    """The model that is served."""
    settings: ServerSettings
    """How it is served."""
    gate: Gate
    """Counts the sequences under way, and refuses more than may be."""
    metrics: Metrics
    """What `/metrics` shows."""
    responses: ResponseStore
    """What `/v1/responses` keeps."""
    background: Background
    """What it makes while nobody waits."""
    text: TextWork
    """Reads, renders and tokenizes what clients send."""
    call_format: CallFormat | None
    """How calls of tools are written; None: they are not looked for."""
    reasoning_format: ReasoningFormat | None
    """How the model marks what it thinks; None: that is not looked for."""
    started: float = field(default_factory=time.monotonic)
    """When the server was made, by the monotonic clock."""

    @property
    def names(self) -> tuple[str, ...]:
        """What requests may ask for: the model by its names, and its adapters."""
        return *self.model.names, *self.model.adapters

    @property
    def generator(self) -> Generator:
        """What generates; raises an ApiError for an encoder."""
        kind = self.model.kind
        if isinstance(kind, Embedder):
            raise ApiError(400, f"{self.model.names[0]} makes embeddings and generates nothing; use /v1/embeddings")
        goes_on = isinstance(kind, Decoder)
        limit = kind.engine.core.limits.longest if isinstance(kind, Decoder) else kind.model.max_length
        return Generator(decoder=kind, gate=self.gate, metrics=self.metrics, max_length=limit, goes_on=goes_on)

    @property
    def embedder(self) -> Embedder:
        """What makes vectors; raises an ApiError for a decoder."""
        if not isinstance(self.model.kind, Embedder):
            raise ApiError(400, f"{self.model.names[0]} generates and makes no embeddings; use /v1/completions")
        return self.model.kind

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's; raises an ApiError if it has none."""
        if self.model.tokenizer is None:
            raise ApiError(400, "the model has no tokenizer; give token ids")
        return self.model.tokenizer

    def check_tokenizer(self) -> None:
        """Raises an ApiError if the model has no tokenizer: better before it generates than after."""
        _ = self.tokenizer

    def check_model(self, name: str) -> None:
        """Raises an ApiError unless the model, or one of its adapters, is called so."""
        if name not in self.names:
            raise ApiError(
                404,
                f"The model {name[:100]!r} does not exist; this server has {', '.join(map(repr, self.names))}",
                param="model",
                code="model_not_found",
            )

    async def encode(self, text: str, *, add_special_tokens: bool, max_length: int | None = None) -> list[int]:
        """The tokens of `text`, the first `max_length` of them; raises TokenizerError."""
        self.check_tokenizer()
        return await self.text.encode(text, add_special_tokens=add_special_tokens, max_length=max_length)


def _state_of(request: Request) -> ServerState:
    state: ServerState = request.app.state.server
    return state


State = Annotated[ServerState, Depends(_state_of)]


def require_json(request: Request) -> None:
    """Raises an ApiError unless the body says that it is JSON."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json" and not (kind.startswith("application/") and kind.endswith("+json")):
        raise ApiError(415, f"found the Content-Type {kind[:100]!r}, expected application/json")


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """What all parts of one answer begin with."""

    id: str
    """The answer's own."""
    created: int
    """When it was begun, in seconds since 1970."""
    model: str
    """The name of the model."""


def new_head(state: ServerState, prefix: str, adapter: LoRARequest | None) -> Head:
    """The head of an answer that begins now."""
    name = state.model.names[0] if adapter is None else adapter.lora_name
    return Head(id=f"{prefix}-{uuid.uuid4().hex}", created=int(time.time()), model=name)
