"""The bodies of answers, in OpenAI's shapes; what only the vendor has is said at its field."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel


class CachedTokens(BaseModel):
    """How much of the prompts was not computed again."""

    cached_tokens: int


class Usage(BaseModel):
    """What a request took, in tokens."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens | None = None


class CompletionLogprobs(BaseModel):
    """The log probabilities of a text's tokens, each with its place in the text."""

    text_offset: list[int]
    token_logprobs: list[float | None]
    tokens: list[str]
    top_logprobs: list[dict[str, float] | None]

    def extend(self, other: CompletionLogprobs) -> None:
        """Adds those of the tokens that follow."""
        for name in CompletionLogprobs.model_fields:
            getattr(self, name).extend(getattr(other, name))


class PromptLogprob(BaseModel):
    """A token that could have been at a place of the prompt, in vLLM's shape."""

    logprob: float
    rank: int
    decoded_token: str | None


PromptLogprobs = list[dict[str, PromptLogprob] | None]
"""For each token of the prompt what is known of its place, by the tokens' ids; None for the first one."""


class CompletionChoice(BaseModel):
    """A completion. `stop_reason` is the stop string or token that ended it, if one that was asked for did.

    What is behind it is given if it is asked for.
    """

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: str | None
    stop_reason: int | str | None
    prompt_logprobs: PromptLogprobs | None = None
    prompt_token_ids: list[int] | None = None
    token_ids: list[int] | None = None


class CompletionResponse(BaseModel):
    """The completions of all prompts, `n` of the first one first."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage


class CompletionChunk(BaseModel):
    """A piece of the completions; the last one may have no choices but the usage."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None


class TopLogprob(BaseModel):
    """A token that could have been at a place."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    """A token with the likeliest ones at its place."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    """The log probabilities of an answer's tokens."""

    content: list[TokenLogprob]
    refusal: None = None


class CalledFunction(BaseModel):
    """The function that is called; `arguments` is JSON as text."""

    name: str
    arguments: str


class ToolCall(BaseModel):
    """A call of a tool."""

    id: str
    type: Literal["function"] = "function"
    function: CalledFunction


class AnswerMessage(BaseModel):
    """What the model said, and what it thought before."""

    role: str
    content: str | None
    reasoning_content: str | None = None
    refusal: None = None
    tool_calls: list[ToolCall] | None = None


class ChatChoice(BaseModel):
    """An answer; its tokens if they are asked for."""

    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: str | None
    stop_reason: int | str | None
    token_ids: list[int] | None = None


class ChatCompletionResponse(BaseModel):
    """The answers to a conversation; what is known of its prompt if it is asked for."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    prompt_logprobs: PromptLogprobs | None = None
    prompt_token_ids: list[int] | None = None


class CalledFunctionPiece(BaseModel):
    """The function's name, and then its arguments piece by piece."""

    name: str | None = None
    arguments: str


class ToolCallPiece(BaseModel):
    """What is new of a call of a tool, and which of the answer's calls it is; id and type come with the first piece."""

    index: int
    id: str | None = None
    type: Literal["function"] | None = None
    function: CalledFunctionPiece


class Delta(BaseModel):
    """What is new of an answer."""

    role: str | None = None
    content: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[ToolCallPiece] | None = None


class ChatChunkChoice(BaseModel):
    """A piece of one answer."""

    index: int
    delta: Delta
    logprobs: ChatLogprobs | None
    finish_reason: str | None
    stop_reason: int | str | None = None
    token_ids: list[int] | None = None


class ChatCompletionChunk(BaseModel):
    """A piece of the answers; the last one may have no choices but the usage."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = None
    prompt_token_ids: list[int] | None = None


class EmbeddingData(BaseModel):
    """A vector, as numbers or as the base64 text of little-endian float32."""

    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class EmbeddingUsage(BaseModel):
    """What the texts took, in tokens."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingResponse(BaseModel):
    """The vectors, in the order of the texts."""

    object: Literal["list"] = "list"
    model: str
    data: list[EmbeddingData]
    usage: EmbeddingUsage


class ScoreData(BaseModel):
    """How well two texts go together."""

    index: int
    object: Literal["score"] = "score"
    score: float


class ScoreResponse(BaseModel):
    """The scores of pairs, in their order, in vLLM's shape."""

    id: str
    object: Literal["list"] = "list"
    created: int
    model: str
    data: list[ScoreData]
    usage: EmbeddingUsage


class RankedDocument(BaseModel):
    """A document."""

    text: str


class RankedResult(BaseModel):
    """A document by its place in the request, and how well it goes with the query."""

    index: int
    relevance_score: float
    document: RankedDocument | None = None


class RerankResponse(BaseModel):
    """The documents that go best with a query, the best one first, in the shape of Jina and Cohere."""

    id: str
    model: str
    results: list[RankedResult]
    usage: EmbeddingUsage


class ModelCard(BaseModel):
    """A model that is served. The fields behind `owned_by` are the vendor's."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "furiosa-ai"
    root: str
    parent: str | None
    """Of an adapter the model that it is for."""
    artifact_id: str
    max_prompt_len: int | None
    max_context_len: int | None
    max_model_len: int | None
    runtime_config: dict[str, Any]


class ModelList(BaseModel):
    """All names of the model, and its adapters."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class VersionResponse(BaseModel):
    """The release that serves."""

    version: str


class TokenizeResponse(BaseModel):
    """The tokens of a text or a conversation."""

    tokens: list[int]
    count: int
    max_model_len: int | None
    token_strs: list[str | None] | None = None


class CountTokensResponse(BaseModel):
    """How many tokens a conversation is, in Anthropic's shape."""

    input_tokens: int


class DetokenizeResponse(BaseModel):
    """The text of tokens."""

    prompt: str


class TokenizerInfoResponse(BaseModel):
    """What clients need to know of a tokenizer; null is what it does not have."""

    bos_token: str | None
    eos_token: str | None
    pad_token: str | None
    unk_token: str | None
    chat_template: str | None
