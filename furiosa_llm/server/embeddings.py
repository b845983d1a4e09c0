"""`POST /v1/embeddings`: texts in, an encoder's vectors out."""

from __future__ import annotations

import base64

import numpy as np
from fastapi import APIRouter, Depends, Request

from furiosa_llm.runtime.requests.prompts import listed
from furiosa_llm.server.errors import ApiError
from furiosa_llm.server.events import until_disconnect
from furiosa_llm.server.model import EmbeddingResult
from furiosa_llm.server.requests import EmbeddingRequest
from furiosa_llm.server.responses import EmbeddingData, EmbeddingResponse, EmbeddingUsage
from furiosa_llm.server.state import State, require_json

router = APIRouter()


@router.post("/v1/embeddings", dependencies=[Depends(require_json)])
async def create_embeddings(body: EmbeddingRequest, request: Request, state: State) -> EmbeddingResponse:
    """Makes a vector of each text, given as text or as token ids."""
    state.check_model(body.model)
    embedder = state.embedder
    prompts = listed(body.input)
    if not prompts:
        raise ApiError(400, "input is empty; give at least one text", param="input")
    width = embedder.encoder.dimensions
    if body.dimensions not in (None, width):
        raise ApiError(400, f"the model's vectors have {width} dimensions, which cannot be cut", param="dimensions")
    with state.gate.admit(len(prompts)), state.metrics.counting(len(prompts)):
        work = embedder.embed(prompts, truncate_prompt_tokens=body.truncate_prompt_tokens)
        results = await until_disconnect(request.receive, work)
    num_tokens = sum(len(one.prompt_token_ids) for one in results)
    state.metrics.prompt_tokens.inc(num_tokens)
    return EmbeddingResponse(
        model=state.model.names[0],
        data=[EmbeddingData(index=index, embedding=_shown(one, body)) for index, one in enumerate(results)],
        usage=EmbeddingUsage(prompt_tokens=num_tokens, total_tokens=num_tokens),
    )


def _shown(result: EmbeddingResult, body: EmbeddingRequest) -> list[float] | str:
    vector = result.outputs.embedding
    if body.encoding_format == "float":
        return vector
    return base64.b64encode(np.asarray(vector, dtype="<f4").tobytes()).decode()
