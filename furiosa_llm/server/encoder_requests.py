"""What may be asked of encoders: vectors of texts, and how well texts go together."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from furiosa_llm.server import fields
from furiosa_llm.server.fields import Body
from furiosa_llm.server.unknown_fields import RequestBody


class EmbeddingRequest(RequestBody):
    """`POST /v1/embeddings`."""

    model: str
    input: fields.TextsOrTokens
    encoding_format: Literal["float", "base64"] | None = "float"
    dimensions: fields.Length | None = None
    truncate_prompt_tokens: fields.Truncation | None = None
    user: str | None = Field(None, description="Accepted, and without effect.")


_SomeTexts = str | Annotated[list[str], Field(fail_fast=True)]


class ScoreRequest(RequestBody):
    """`POST /v1/score`: `text_1` with each of `text_2`, or each with its own; vLLM has the other names, too."""

    model: str
    text_1: _SomeTexts | None = None
    text_2: _SomeTexts | None = None
    queries: _SomeTexts | None = None
    documents: _SomeTexts | None = None
    truncate_prompt_tokens: fields.Truncation | None = None
    user: str | None = Field(None, description="Accepted, and without effect.")

    @property
    def firsts(self) -> list[str]:
        """What is scored."""
        return _texts(self.text_1 or self.queries)

    @property
    def seconds(self) -> list[str]:
        """What that is scored with."""
        return _texts(self.text_2 or self.documents)


class Document(Body):
    """A document, as Cohere's and Jina's clients may write it."""

    text: fields.Text


class RerankRequest(RequestBody):
    """`POST /v1/rerank`, as Jina and Cohere have it."""

    model: str
    query: fields.Text
    documents: Annotated[list[fields.Text | Document], Field(json_schema_extra={"minItems": 1}, fail_fast=True)]
    top_n: fields.LengthOrNone | None = Field(None, description="How many are given; 0 for all.")
    return_documents: bool | None = None
    truncate_prompt_tokens: fields.Truncation | None = None
    user: str | None = Field(None, description="Accepted, and without effect.")

    @property
    def texts(self) -> list[str]:
        """The documents."""
        return [one if isinstance(one, str) else one.text for one in self.documents]


def _texts(given: str | list[str] | None) -> list[str]:
    return [given] if isinstance(given, str) else given or []
