"""`POST /v1/embeddings`: texts in, an encoder's vectors out."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Sequence

from fastapi import APIRouter, Depends, Request
from starlette.responses import Response

from furiosa_llm.runtime.encoder import Vector
from furiosa_llm.runtime.requests.prompts import Prompt, listed
from furiosa_llm.server.body_route import BodyRoute
from furiosa_llm.server.encoder_requests import EmbeddingRequest
from furiosa_llm.server.errors import ApiError
from furiosa_llm.server.events import until_disconnect
from furiosa_llm.server.requests import as_prompt
from furiosa_llm.server.responses import EmbeddingData, EmbeddingResponse, EmbeddingUsage
from furiosa_llm.server.state import ServerState, State, require_json
from furiosa_llm.server.text_processes import SHORT_TEXT

router = APIRouter(route_class=BodyRoute)


@router.post("/v1/embeddings", response_model=EmbeddingResponse, dependencies=[Depends(require_json)])
async def create_embeddings(body: EmbeddingRequest, request: Request, state: State) -> Response:
    """Makes a vector of each text, given as text or as token ids."""
    state.check_model(body.model)
    embedder = state.embedder
    prompts = listed(body.input)
    if not prompts:
        raise ApiError(400, "input is empty; give at least one text", param="input")
    if embedder.encoder.scores_pairs:
        message = f"{state.model.names[0]} scores pairs of texts, and makes no embeddings; use /v1/score or /v1/rerank"
        raise ApiError(400, message)
    width = embedder.encoder.dimensions
    if body.dimensions not in (None, width):
        raise ApiError(400, f"the model's vectors have {width} dimensions, which cannot be cut", param="dimensions")
    with state.gate.admit(len(prompts)), state.metrics.counting(len(prompts)):
        prompts = [await _tokenized(prompt, body, state) for prompt in prompts]
        limit = body.truncate_prompt_tokens
        rows = await asyncio.to_thread(embedder.encoder.tokens, prompts, truncate_prompt_tokens=limit)
        vectors = await until_disconnect(request.receive, embedder.vectors(rows))
    num_tokens = sum(map(len, rows))
    state.metrics.prompt_tokens.inc(num_tokens)
    usage = EmbeddingUsage(prompt_tokens=num_tokens, total_tokens=num_tokens)
    return await asyncio.to_thread(_response, vectors, usage, body, state.model.names[0])


async def _tokenized(prompt: Prompt, body: EmbeddingRequest, state: ServerState) -> Prompt:
    """The `prompt`, a long text as the tokens that are taken of it."""
    if not isinstance(prompt, str) or len(prompt) <= SHORT_TEXT:
        return prompt
    limit = state.embedder.encoder.max_length if body.truncate_prompt_tokens == -1 else body.truncate_prompt_tokens
    return as_prompt(await state.encode(prompt, add_special_tokens=True, max_length=limit), None)


def _response(vectors: Sequence[Vector], usage: EmbeddingUsage, body: EmbeddingRequest, model: str) -> Response:
    """The answer, written vector by vector, so that a thousand of them do not stop other threads."""
    data = (EmbeddingData(index=index, embedding=_shown(one, body)) for index, one in enumerate(vectors))
    whole = EmbeddingResponse(model=model, data=[], usage=usage).model_dump_json()
    written = ",".join(one.model_dump_json() for one in data)
    return Response(whole.replace('"data":[]', f'"data":[{written}]', 1), media_type="application/json")


def _shown(vector: Vector, body: EmbeddingRequest) -> list[float] | str:
    if body.encoding_format == "float":
        numbers: list[float] = vector.tolist()
        return numbers
    return base64.b64encode(vector.astype("<f4").tobytes()).decode()
