"""The bodies of requests: OpenAI's fields, and the vendor's. A field that is not known is refused."""

from __future__ import annotations

from typing import Annotated, Any, Literal, cast

from pydantic import Field

from furiosa_llm.runtime.requests.prompts import Prompt, listed
from furiosa_llm.runtime.tokens.sampling_params import SamplingParams
from furiosa_llm.runtime.tokens.structured_outputs import StructuredOutputsParams
from furiosa_llm.server import fields
from furiosa_llm.server.errors import ApiError
from furiosa_llm.server.fields import Body, refused
from furiosa_llm.server.forms import ResponseFormat, StructuredOutputs

TextOrTokens = str | list[int]

_SAMPLING = (
    *("n", "best_of", "presence_penalty", "frequency_penalty", "repetition_penalty", "temperature", "top_p", "top_k"),
    *("min_p", "use_beam_search", "length_penalty", "early_stopping", "min_tokens", "stop", "stop_token_ids"),
    *("ignore_eos", "include_stop_str_in_output", "logit_bias", "allowed_token_ids", "bad_words"),
    "skip_special_tokens",
)
_SEEDS = 2**64
"""Seeds count modulo this: some clients send negative ones."""


class StreamOptions(Body):
    """How a stream is told. `include_usage`: its last chunk counts the tokens."""

    include_usage: bool = False
    include_obfuscation: bool | None = None  # of OpenAI's; nothing is hidden here


class _GenerationRequest(Body):
    """What completions and chats have in common; None stands for the default of `SamplingParams`."""

    model: str
    n: fields.Count | None = None
    best_of: fields.Count | None = None
    presence_penalty: fields.Penalty | None = None
    frequency_penalty: fields.Penalty | None = None
    repetition_penalty: fields.Repetition | None = None
    temperature: fields.Temperature | None = None
    top_p: fields.PositiveShare | None = None
    top_k: fields.TopK | None = None
    min_p: fields.Share | None = None
    use_beam_search: fields.No | None = None
    length_penalty: fields.NoLengthPenalty | None = None
    early_stopping: fields.No | None = None
    min_tokens: fields.LengthOrNone | None = None
    stop: fields.Word | fields.Words | None = None
    stop_token_ids: fields.TokenSet | None = None
    ignore_eos: bool | None = None
    include_stop_str_in_output: bool | None = None
    logit_bias: fields.Biases | None = None
    allowed_token_ids: fields.AllowedTokens | None = None
    bad_words: fields.Words | None = None
    skip_special_tokens: bool | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    seed: fields.Seed | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = Field(None, description="Accepted, and without effect.")

    @property
    def num_choices(self) -> int:
        """The completions of each prompt."""
        return 1 if self.n is None else self.n

    @property
    def form_field(self) -> str:
        """The field that says what the answers have to look like, if one does."""
        return "response_format" if self.structured_outputs is None else "structured_outputs"

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with a count of the tokens."""
        return self.stream_options is not None and self.stream_options.include_usage

    def _params(self, **others: Any) -> SamplingParams:
        if self.stream_options is not None and not self.stream:
            raise ApiError(400, "stream_options is only allowed when stream is true", param="stream_options")
        if self.stream and self.best_of is not None and self.best_of > self.num_choices:
            raise ApiError(
                400, "the best of several completions are known at the end only: leave out stream or best_of"
            )
        values = {name: getattr(self, name) for name in _SAMPLING}
        seed = None if self.seed is None else self.seed % _SEEDS
        return SamplingParams.from_optional(**values, seed=seed, **others)


class CompletionRequest(_GenerationRequest):
    """`POST /v1/completions`."""

    prompt: fields.TextsOrTokens
    max_tokens: fields.LengthOrNone | None = 16
    echo: bool | None = None
    logprobs: fields.Alternatives | None = None
    suffix: fields.NoSuffix | None = None
    add_special_tokens: bool = Field(True, description="Whether text gets the special tokens around a sequence.")

    @property
    def prompts(self) -> list[TextOrTokens]:
        """The prompts; a list of integers is one."""
        return cast("list[TextOrTokens]", listed(self.prompt))

    @property
    def only_echoes(self) -> bool:
        """Whether no token is to be generated."""
        return self.max_tokens == 0 and self.echo is True

    def params(self, structured: StructuredOutputsParams | None) -> SamplingParams:
        """How to sample; an echo without completion still takes a token, which is not shown."""
        if self.suffix:
            raise ApiError(400, "suffix is not supported; leave it out", param="suffix")
        if not self.prompt:
            raise ApiError(400, "prompt is an empty list or text; give at least one token", param="prompt")
        return self._params(
            structured_outputs=structured,
            max_tokens=1 if self.only_echoes else self.max_tokens,
            logprobs=self.logprobs,
            prompt_logprobs=self.logprobs if self.echo else None,
        )


class ContentPart(Body):
    """A part of a message. Only text is understood."""

    type: Literal["text"]
    text: str


class FunctionCall(Body):
    """A call as an earlier answer gave it; `arguments` is JSON as text."""

    name: str
    arguments: str


class ToolCallMessage(Body):
    """A call in a message of the assistant."""

    id: str
    type: Literal["function"] = "function"
    function: FunctionCall
    index: int | None = None


class ChatMessage(Body):
    """A message of a conversation."""

    role: str
    content: str | Annotated[list[ContentPart], Field(fail_fast=True)] | None = None
    name: str | None = None
    tool_calls: Annotated[list[ToolCallMessage], Field(fail_fast=True)] | None = None
    tool_call_id: str | None = None
    refusal: str | None = None
    annotations: list[Any] | None = Field(None, exclude=True, description="Accepted, and without effect.")
    audio: Annotated[None, refused("nothing but text is understood")] = None
    function_call: Annotated[None, refused("it has given way to tool_calls")] = None


class FunctionDefinition(Body):
    """A function that the model may call; `parameters` is its JSON schema."""

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None

    @property
    def parameters_schema(self) -> dict[str, Any]:
        """The schema of the arguments, which are an object; of none, if no parameters are given."""
        if self.parameters is None:
            return {"type": "object", "properties": {}, "additionalProperties": False}
        return {"type": "object", **self.parameters}


class Tool(Body):
    """A tool that the model may call."""

    type: Literal["function"]
    function: FunctionDefinition


class _ChosenFunction(Body):
    name: str


class NamedToolChoice(Body):
    """The tool that has to be called."""

    type: Literal["function"]
    function: _ChosenFunction


class ChatCompletionRequest(_GenerationRequest):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[ChatMessage], Field(fail_fast=True)] = Field(min_length=1)
    max_tokens: fields.Length | None = None
    max_completion_tokens: fields.Length | None = None
    logprobs: bool | None = None
    top_logprobs: fields.Alternatives | None = None
    tools: Annotated[list[Tool], Field(fail_fast=True)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedToolChoice | None = None
    parallel_tool_calls: bool | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, Any] | None = None
    metadata: dict[str, str] | None = Field(None, description="Accepted, and without effect.")
    store: bool | None = Field(None, description="Accepted, and without effect.")
    service_tier: str | None = Field(None, description="Accepted, and without effect.")
    safety_identifier: str | None = Field(None, description="Accepted, and without effect.")
    prompt_cache_key: str | None = Field(None, description="Accepted, and without effect.")
    prompt_cache_options: dict[str, Any] | None = Field(None, description="Accepted, and without effect.")
    prompt_cache_retention: str | None = Field(None, description="Accepted, and without effect.")
    modalities: Annotated[list[Literal["text"]], Field(fail_fast=True)] | None = Field(
        None, description="Text is what there is."
    )
    audio: Annotated[None, refused("the model writes nothing but text")] = None
    functions: Annotated[None, refused("it has given way to tools")] = None
    function_call: Annotated[None, refused("it has given way to tool_choice")] = None
    moderation: Annotated[None, refused("the server does not judge texts")] = None
    prediction: Annotated[None, refused("nothing is decoded ahead of time")] = None
    reasoning_effort: Annotated[None, refused("a template may have a variable for it, see chat_template_kwargs")] = None
    verbosity: Annotated[None, refused("say it in a message")] = None
    web_search_options: Annotated[None, refused("the server does not search")] = None

    def params(self, structured: StructuredOutputsParams | None) -> SamplingParams:
        """How to sample."""
        if self.top_logprobs is not None and not self.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs to be true", param="top_logprobs")
        limit = self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        return self._params(
            structured_outputs=structured,
            max_tokens=limit,
            logprobs=(self.top_logprobs or 0) if self.logprobs else None,
        )


class EmbeddingRequest(Body):
    """`POST /v1/embeddings`."""

    model: str
    input: fields.TextsOrTokens
    encoding_format: Literal["float", "base64"] | None = "float"
    dimensions: fields.Length | None = None
    truncate_prompt_tokens: fields.Truncation | None = None
    user: str | None = Field(None, description="Accepted, and without effect.")


class TokenizeRequest(Body):
    """`POST /tokenize`: a text, or a conversation."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[ChatMessage], Field(fail_fast=True)] | None = None
    tools: Annotated[list[Tool], Field(fail_fast=True)] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, Any] | None = None
    return_token_strs: bool = False


class DetokenizeRequest(Body):
    """`POST /detokenize`."""

    model: str | None = None
    tokens: fields.AnyTokens


def as_prompt(token_ids: list[int], text: str | None) -> Prompt:
    """What the engine takes."""
    return {"prompt_token_ids": token_ids} if text is None else {"prompt": text, "prompt_token_ids": token_ids}
