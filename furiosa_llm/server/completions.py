"""`POST /v1/completions`: prompts in, their completions out, at once or as they come."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import APIRouter, Depends, Request
from starlette.responses import Response

from furiosa_llm.runtime.requests.outputs import RequestOutput
from furiosa_llm.runtime.requests.prompts import Prompt
from furiosa_llm.server.body_route import BodyRoute
from furiosa_llm.server.errors import ApiError
from furiosa_llm.server.events import EventStream, event, events_of, until_disconnect
from furiosa_llm.server.generation import Answered, Completed, collect
from furiosa_llm.server.logprobs import CompletionLogprobsMaker, prompt_logprobs
from furiosa_llm.server.openapi import stream_of
from furiosa_llm.server.requests import CompletionRequest, as_prompt
from furiosa_llm.server.responses import (
    CachedTokens,
    CompletionChoice,
    CompletionChunk,
    CompletionLogprobs,
    CompletionResponse,
    Usage,
)
from furiosa_llm.server.state import Head, ServerState, State, new_head, require_json
from furiosa_llm.server.structured import structured_outputs

router = APIRouter(route_class=BodyRoute)


@router.post(
    "/v1/completions",
    response_model=CompletionResponse,
    responses=stream_of(CompletionChunk),
    dependencies=[Depends(require_json)],
)
async def create_completion(body: CompletionRequest, request: Request, state: State) -> Response | CompletionResponse:
    """Completes one prompt or several, given as text or as token ids."""
    state.check_model(body.model)
    generator = state.generator
    if body.echo and not generator.goes_on:
        raise ApiError(400, "echo: the model does not go on with its prompt, which is its encoder's", param="echo")
    params = body.params(await structured_outputs(body))
    if body.echo or body.logprobs is not None or body.prompt_logprobs is not None:
        state.check_tokenizer()
    state.gate.check(len(body.prompts) * params.num_sequences)
    prompts = await _prompts(body, state)
    adapter = state.model.adapters.get(body.model)
    head = new_head(state, "cmpl", adapter)
    outputs = generator.run(head.id, prompts, params, adapter=adapter, form_field=body.form_field)
    if not body.stream:
        answers = await until_disconnect(request.receive, collect(outputs, len(prompts), params.n))
        return _response(body, state, head, prompts, answers)
    # The first output is waited for, so that what is refused, or fails until then, has a status of its own.
    first = await until_disconnect(request.receive, anext(outputs))
    stream = _Stream(body, state, head, prompts)
    return EventStream(events_of(outputs, first, stream.chunks, stream.usage))


async def _prompts(body: CompletionRequest, state: ServerState) -> list[Prompt]:
    prompts = []
    for prompt in body.prompts:
        if isinstance(prompt, str):
            token_ids = await state.encode(prompt, add_special_tokens=body.add_special_tokens)
        else:
            token_ids = prompt
        kept = body.kept(token_ids, state.model.max_prompt_length)
        prompts.append(as_prompt(kept, prompt if isinstance(prompt, str) and len(kept) == len(token_ids) else None))
    return prompts


def usage_of(prompt: int, completion: int, cached: int) -> Usage:
    """The counts of tokens."""
    return Usage(
        prompt_tokens=prompt,
        completion_tokens=completion,
        total_tokens=prompt + completion,
        prompt_tokens_details=CachedTokens(cached_tokens=cached),
    )


def _response(
    body: CompletionRequest, state: ServerState, head: Head, prompts: Sequence[Prompt], answers: Sequence[Answered]
) -> CompletionResponse:
    choices: list[CompletionChoice] = []
    for prompt, answer in zip(prompts, answers, strict=True):
        for completion in answer.completions:
            choices.append(_choice(body, state, len(choices), prompt, answer, completion))
    shown = 0 if body.only_echoes else sum(len(one.token_ids) for answer in answers for one in answer.completions)
    return CompletionResponse(
        id=head.id,
        created=head.created,
        model=head.model,
        choices=choices,
        usage=usage_of(
            sum(len(answer.token_ids) for answer in answers), shown, sum(answer.cached for answer in answers)
        ),
    )


def _choice(
    body: CompletionRequest, state: ServerState, index: int, prompt: Prompt, answer: Answered, completion: Completed
) -> CompletionChoice:
    before = prompt_text(state, prompt) if body.echo else ""
    made = None
    if body.logprobs is not None:
        maker = _maker(body, state)
        made = maker.make(list(zip(answer.token_ids, answer.logprobs or (), strict=True)) if body.echo else [])
        if not body.only_echoes:
            maker.begin(len(before))
            made.extend(maker.make(list(zip(completion.token_ids, completion.logprobs or (), strict=True))))
    return CompletionChoice(
        index=index,
        text=before if body.only_echoes else before + completion.text,
        logprobs=made,
        finish_reason="length" if body.only_echoes else completion.finish_reason,
        stop_reason=None if body.only_echoes else completion.stop_reason,
        prompt_logprobs=prompt_logprobs(answer.logprobs or ()) if body.prompt_logprobs is not None else None,
        prompt_token_ids=list(answer.token_ids) if body.return_token_ids else None,
        token_ids=completion.token_ids if body.return_token_ids else None,
    )


def _maker(body: CompletionRequest, state: ServerState) -> CompletionLogprobsMaker:
    skips = body.skip_special_tokens is not False
    return CompletionLogprobsMaker(body.logprobs or 0, state.tokenizer, skip_special_tokens=skips)


def prompt_text(state: ServerState, prompt: Prompt) -> str:
    """The text of a prompt, whatever it was given as."""
    assert isinstance(prompt, Mapping)
    text: str | None = prompt.get("prompt")
    return state.tokenizer.decode(prompt["prompt_token_ids"]) if text is None else text


class _Stream:
    """One answer in chunks."""

    def __init__(self, body: CompletionRequest, state: ServerState, head: Head, prompts: Sequence[Prompt]) -> None:
        self._body = body
        self._state = state
        self._prompts = prompts
        self._head = {"id": head.id, "object": "text_completion", "created": head.created, "model": head.model}
        self._makers: dict[int, CompletionLogprobsMaker] = {}
        self._num_prompt, self._num_completion, self._num_cached = 0, 0, 0
        self._begun: set[int] = set()

    def usage(self) -> bytes:
        """The last chunk, if it was asked for."""
        if not self._body.include_usage:
            return b""
        return event({**self._head, "choices": [], "usage": self._counts()})

    def _counts(self) -> dict[str, Any]:
        return usage_of(self._num_prompt, self._num_completion, self._num_cached).model_dump()

    def chunks(self, found: tuple[int, RequestOutput]) -> bytes:
        """The chunks of the next output."""
        prompt_index, output = found
        choices: list[dict[str, Any]] = []
        is_first = prompt_index not in self._begun
        if is_first:
            self._begun.add(prompt_index)
            self._num_prompt += len(output.prompt_token_ids)
            self._num_cached += output.num_cached_tokens or 0
            if self._body.echo:
                choices += self._echo(prompt_index, output)
        for part in output.outputs if not self._body.only_echoes else ():
            index = prompt_index * self._body.num_choices + part.index
            self._num_completion += len(part.token_ids)
            made = None
            if part.logprobs is not None:
                made = self._maker(index).make(list(zip(part.token_ids, part.logprobs, strict=True)))
            choice = _chunk_choice(index, part.text, made, part.finish_reason, part.stop_reason)
            if self._body.return_token_ids:
                choice |= {
                    "token_ids": part.token_ids,
                    "prompt_token_ids": output.prompt_token_ids if is_first else None,
                }
            choices.append(choice)
        usage = {"usage": self._counts() if self._body.counts_always else None} if self._body.include_usage else {}
        return b"".join(event({**self._head, "choices": [choice], **usage}) for choice in choices)

    def _echo(self, prompt_index: int, output: RequestOutput) -> list[dict[str, Any]]:
        text = prompt_text(self._state, self._prompts[prompt_index])
        finish_reason = "length" if self._body.only_echoes else None
        choices = []
        for number in range(self._body.num_choices):
            index = prompt_index * self._body.num_choices + number
            made = None
            if output.prompt_logprobs is not None:
                maker = self._maker(index)
                made = maker.make(list(zip(output.prompt_token_ids, output.prompt_logprobs, strict=True)))
                maker.begin(len(text))
            choices.append(_chunk_choice(index, text, made, finish_reason, None))
        return choices

    def _maker(self, index: int) -> CompletionLogprobsMaker:
        if index not in self._makers:
            self._makers[index] = _maker(self._body, self._state)
        return self._makers[index]


def _chunk_choice(
    index: int, text: str, logprobs: CompletionLogprobs | None, finish_reason: str | None, stop_reason: Any
) -> dict[str, Any]:
    return {
        "index": index,
        "text": text,
        "logprobs": None if logprobs is None else logprobs.model_dump(),
        "finish_reason": finish_reason,
        "stop_reason": stop_reason,
    }
