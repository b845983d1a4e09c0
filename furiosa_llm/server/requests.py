"""The bodies of requests: OpenAI's fields, the vendor's, and what vLLM's clients send beside them."""

from __future__ import annotations

from typing import Annotated, Any, Literal, cast

from pydantic import BeforeValidator, Field, WithJsonSchema, model_validator

from furiosa_llm.runtime.requests.prompts import Prompt, listed
from furiosa_llm.runtime.tokens.sampling_params import SamplingParams
from furiosa_llm.runtime.tokens.structured_outputs import StructuredOutputsParams
from furiosa_llm.server import fields
from furiosa_llm.server.errors import ApiError
from furiosa_llm.server.fields import Body, refused
from furiosa_llm.server.forms import ResponseFormat, StructuredOutputs
from furiosa_llm.server.unknown_fields import RequestBody

TextOrTokens = str | list[int]

_SAMPLING = (
    *("n", "best_of", "presence_penalty", "frequency_penalty", "repetition_penalty", "temperature", "top_p", "top_k"),
    *("min_p", "use_beam_search", "length_penalty", "early_stopping", "min_tokens", "stop", "stop_token_ids"),
    *("ignore_eos", "include_stop_str_in_output", "logit_bias", "allowed_token_ids", "bad_words"),
    "skip_special_tokens",
)
_GUIDED = ("json", "regex", "choice", "grammar", "json_object", "whitespace_pattern")
"""Fields of `structured_outputs` that have been fields of the request."""
_SEEDS = 2**64
"""Seeds count modulo this: some clients send negative ones."""


class StreamOptions(Body):
    """How a stream is told. `include_usage`: its last chunk counts the tokens; `continuous_usage_stats`: each one."""

    include_usage: bool = False
    continuous_usage_stats: bool = False
    include_obfuscation: bool | None = None  # of OpenAI's; nothing is hidden here


class _GenerationRequest(RequestBody):
    """What completions and chats have in common; None stands for the default of `SamplingParams`."""

    model: str
    n: fields.Count | None = None
    best_of: fields.Count | None = None
    presence_penalty: fields.Penalty | None = None
    frequency_penalty: fields.Penalty | None = None
    repetition_penalty: fields.Repetition | None = None
    temperature: fields.Temperature | None = None
    top_p: fields.Share | None = None
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
    guided_json: dict[str, Any] | str | None = None
    guided_regex: fields.Text | None = None
    guided_choice: Annotated[fields.Words, Field(json_schema_extra={"minItems": 1})] | None = None
    guided_grammar: fields.Text | None = None
    guided_json_object: bool | None = None
    guided_whitespace_pattern: fields.Text | None = None
    prompt_logprobs: fields.Alternatives | None = None
    truncate_prompt_tokens: fields.Truncation | None = Field(None, description="How many tokens of its end are kept.")
    return_token_ids: bool = False
    seed: fields.Seed | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = Field(None, description="Accepted, and without effect.")
    priority: fields.Seed | None = Field(None, description="Accepted, and without effect: first come, first served.")

    @property
    def num_choices(self) -> int:
        """The completions of each prompt."""
        return 1 if self.n is None else self.n

    @property
    def wanted_form(self) -> StructuredOutputs | None:
        """What the answers have to look like, as `structured_outputs` or vLLM's older fields say it."""
        if not self._guided or self.structured_outputs is not None:
            return self.structured_outputs
        return StructuredOutputs.model_validate({name: getattr(self, f"guided_{name}") for name in _GUIDED})

    @property
    def form_field(self) -> str:
        """The field that says what the answers have to look like, if one does."""
        if self.wanted_form is None:
            return "response_format"
        return "structured_outputs" if self.structured_outputs is not None else self._guided[0]

    @property
    def _guided(self) -> list[str]:
        return [f"guided_{name}" for name in _GUIDED if getattr(self, f"guided_{name}") is not None]

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with a count of the tokens."""
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def counts_always(self) -> bool:
        """Whether each chunk of a stream counts the tokens so far."""
        return self.include_usage and self.stream_options is not None and self.stream_options.continuous_usage_stats

    def kept(self, token_ids: list[int], limit: int | None) -> list[int]:
        """What is taken of a prompt, which may have `limit` tokens."""
        count = limit if self.truncate_prompt_tokens == -1 else self.truncate_prompt_tokens
        return token_ids if count is None else token_ids[-count:]

    def _params(self, **others: Any) -> SamplingParams:
        if self.stream_options is not None and not self.stream:
            raise ApiError(400, "stream_options is only allowed when stream is true", param="stream_options")
        if self.stream and self.best_of is not None and self.best_of > self.num_choices:
            raise ApiError(
                400, "the best of several completions are known at the end only: leave out stream or best_of"
            )
        values = {name: getattr(self, name) for name in _SAMPLING}
        if self.stream and self.prompt_logprobs is not None:
            message = "prompt_logprobs are given with the whole answer: leave out stream"
            raise ApiError(400, message, param="prompt_logprobs")
        if self.truncate_prompt_tokens is not None and (self.truncate_prompt_tokens or -2) < -1:
            raise ApiError(400, "truncate_prompt_tokens is -1, or at least 1", param="truncate_prompt_tokens")
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
        wanted = [one for one in (self.prompt_logprobs, self.logprobs if self.echo else None) if one is not None]
        return self._params(
            structured_outputs=structured,
            max_tokens=1 if self.only_echoes else self.max_tokens,
            logprobs=self.logprobs,
            prompt_logprobs=max(wanted, default=None),
        )


def _as_text_part(value: object) -> object:
    """The parts that are text under another name: of the Responses API, refusals, and plain text."""
    if isinstance(value, str):
        return {"type": "text", "text": value}
    if isinstance(value, dict) and value.get("type") in ("input_text", "output_text", "refusal"):
        return {"type": "text", "text": value.get("text", value.get("refusal"))}
    return value


class ContentPart(Body):
    """A part of a message. Only text is understood."""

    type: Literal["text"]
    text: str


_SPOKEN = {"type": {"enum": ["text", "input_text", "output_text"]}, "text": {"type": "string"}}
_REFUSED = {"type": {"const": "refusal"}, "refusal": {"type": "string"}}
_PARTS = [{"type": "object", "properties": one, "required": list(one)} for one in (_SPOKEN, _REFUSED)]
TextPart = Annotated[
    ContentPart, BeforeValidator(_as_text_part), WithJsonSchema({"anyOf": [{"type": "string"}, *_PARTS]})
]


class FunctionCall(Body):
    """A call as an earlier answer gave it; `arguments` is JSON as text, or the object."""

    name: str
    arguments: str | dict[str, Any] = "{}"


class ToolCallMessage(Body):
    """A call in a message of the assistant."""

    id: str | None = None
    type: Literal["function"] = "function"
    function: FunctionCall


class ChatMessage(Body):
    """A message of a conversation."""

    role: str
    content: str | Annotated[list[TextPart], Field(fail_fast=True)] | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    thinking: str | None = None
    name: str | None = None
    tool_calls: Annotated[list[ToolCallMessage], Field(fail_fast=True)] | None = None
    tool_call_id: str | None = None
    audio: Annotated[None, refused("nothing but text is understood")] = None
    function_call: Annotated[None, refused("it has given way to tool_calls")] = None

    @model_validator(mode="before")
    @classmethod
    def _thoughts_apart(cls, value: Any) -> Any:
        """What was thought is no part of the content to templates, where some clients have it."""
        content = value.get("content") if isinstance(value, dict) else None
        if not isinstance(content, list):
            return value
        thoughts: list[dict[str, Any]] = []
        said: list[object] = []
        for one in content:
            (thoughts if isinstance(one, dict) and one.get("type") in ("thinking", "reasoning") else said).append(one)
        if not thoughts:
            return value
        thought = "".join(str(one.get("thinking") or one.get("text") or "") for one in thoughts)
        return {"reasoning_content": thought, **value, "content": said}


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
        kind = self.parameters.get("type", "object")
        is_object = isinstance(kind, list) and "object" in kind  # arguments are one, whatever else there might be
        return {"type": "object", **self.parameters, **({"type": "object"} if is_object else {})}


class Tool(Body):
    """A tool that the model may call."""

    type: Literal["function"] = "function"
    function: FunctionDefinition


class _ChosenFunction(Body):
    name: str


class NamedToolChoice(Body):
    """The tool that has to be called."""

    type: Literal["function"] = "function"
    function: _ChosenFunction


class _AllowedTools(Body):
    mode: Literal["auto", "required"] = "auto"
    tools: Annotated[list[NamedToolChoice], Field(fail_fast=True)]


class AllowedToolChoice(Body):
    """Which of the tools may be called."""

    type: Literal["allowed_tools"]
    allowed_tools: _AllowedTools


class ChatCompletionRequest(_GenerationRequest):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[ChatMessage], Field(fail_fast=True)] = Field(min_length=1)
    max_tokens: fields.Length | None = None
    max_completion_tokens: fields.Length | None = None
    logprobs: bool | None = None
    top_logprobs: fields.Alternatives | None = None
    tools: Annotated[list[Tool], Field(fail_fast=True)] | None = None
    tool_choice: Literal["none", "auto", "required"] | AllowedToolChoice | NamedToolChoice | None = None
    parallel_tool_calls: bool | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, Any] | None = None
    documents: Annotated[list[dict[str, Any]], Field(fail_fast=True)] | None = None
    reasoning_effort: str | None = Field(None, description="A variable of the template; 'none' is no thinking there.")
    add_special_tokens: bool = False
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
    prediction: dict[str, Any] | None = Field(None, description="Accepted, and without effect.")
    verbosity: str | None = Field(None, description="Accepted, and without effect.")
    web_search_options: Annotated[None, refused("the server does not search")] = None

    def params(self, structured: StructuredOutputsParams | None) -> SamplingParams:
        """How to sample."""
        if self.top_logprobs and not self.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs to be true", param="top_logprobs")
        limit = self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        return self._params(
            structured_outputs=structured,
            max_tokens=limit,
            logprobs=(self.top_logprobs or 0) if self.logprobs else None,
            prompt_logprobs=self.prompt_logprobs,
        )


class ResponsesRequest(RequestBody):
    """`POST /v1/responses`."""

    model: str
    input: str | Annotated[list[dict[str, Any]], Field(fail_fast=True)]
    instructions: str | None = None
    previous_response_id: str | None = None
    max_output_tokens: fields.Length | None = None
    temperature: fields.Temperature | None = None
    top_p: fields.Share | None = None
    stream: bool | None = None
    store: bool | None = None
    tools: Annotated[list[dict[str, Any]], Field(fail_fast=True)] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    text: dict[str, Any] | None = Field(None, description="`format` says what the answer has to look like.")
    reasoning: dict[str, Any] | None = Field(None, description="`effort` is a variable of the chat template.")
    chat_template_kwargs: dict[str, Any] | None = None
    metadata: dict[str, str] | None = Field(None, description="Given back.")
    user: str | None = Field(None, description="Accepted, and without effect.")
    background: bool | None = None
    conversation: Annotated[None, refused("give previous_response_id")] = None
    prompt: Annotated[None, refused("there are no stored prompts")] = None


class CountTokensRequest(RequestBody):
    """`POST /v1/messages/count_tokens`."""

    model: str
    messages: Annotated[list[dict[str, Any]], Field(fail_fast=True)] = Field(min_length=1)
    system: str | list[dict[str, Any]] | None = None
    tools: Annotated[list[dict[str, Any]], Field(fail_fast=True)] | None = None
    tool_choice: dict[str, Any] | None = None
    thinking: dict[str, Any] | None = None
    output_config: dict[str, Any] | None = Field(None, description="`format`: a schema; `effort`: for the template.")


class MessagesRequest(CountTokensRequest):
    """`POST /v1/messages`."""

    max_tokens: fields.Length
    stop_sequences: fields.Words | None = None
    temperature: fields.Temperature | None = None
    top_p: fields.Share | None = None
    top_k: fields.TopK | None = None
    stream: bool | None = None
    metadata: dict[str, Any] | None = Field(None, description="Accepted, and without effect.")


class TokenizeRequest(RequestBody):
    """`POST /tokenize`: a text, or a conversation."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[ChatMessage], Field(fail_fast=True)] | None = None
    tools: Annotated[list[Tool], Field(fail_fast=True)] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, Any] | None = None
    documents: Annotated[list[dict[str, Any]], Field(fail_fast=True)] | None = None
    reasoning_effort: str | None = None
    return_token_strs: bool = False


class DetokenizeRequest(RequestBody):
    """`POST /detokenize`."""

    model: str | None = None
    tokens: fields.AnyTokens


def as_prompt(token_ids: list[int], text: str | None) -> Prompt:
    """What the engine takes."""
    return {"prompt_token_ids": token_ids} if text is None else {"prompt": text, "prompt_token_ids": token_ids}
