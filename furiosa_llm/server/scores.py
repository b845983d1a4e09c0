"""`POST /v1/score` and `/v1/rerank`: how well texts go together, by a cross-encoder or by an encoder's vectors."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import numpy as np
from fastapi import APIRouter, Depends, Request

from furiosa_llm.server.body_route import BodyRoute
from furiosa_llm.server.embedder import Embedder
from furiosa_llm.server.encoder_requests import RerankRequest, ScoreRequest
from furiosa_llm.server.errors import ApiError
from furiosa_llm.server.events import until_disconnect
from furiosa_llm.server.responses import (
    EmbeddingUsage,
    RankedDocument,
    RankedResult,
    RerankResponse,
    ScoreData,
    ScoreResponse,
)
from furiosa_llm.server.state import ServerState, State, new_head, require_json

router = APIRouter(route_class=BodyRoute)

_LONG = 2**18
"""Characters of two texts, of which more are not tokenized: no encoder takes a tenth of it."""


@router.post("/score", include_in_schema=False, dependencies=[Depends(require_json)])
@router.post("/v1/score", dependencies=[Depends(require_json)])
async def create_score(body: ScoreRequest, request: Request, state: State) -> ScoreResponse:
    """Scores pairs of texts: one with each of several, or each with its own."""
    state.check_model(body.model)
    firsts, seconds = body.firsts, body.seconds
    if not firsts or not seconds:
        raise ApiError(400, "text_1 and text_2 need a text at least", param="text_2" if firsts else "text_1")
    if len(firsts) not in (1, len(seconds)):
        message = f"text_1 has {len(firsts)} texts for the {len(seconds)} of text_2; give one, or as many"
        raise ApiError(400, message, param="text_1")
    firsts = firsts * (len(seconds) if len(firsts) == 1 else 1)
    scores, num_tokens = await _scored(list(zip(firsts, seconds, strict=True)), body, request, state)
    head = new_head(state, "score", None)
    return ScoreResponse(
        id=head.id,
        created=head.created,
        model=head.model,
        data=[ScoreData(index=index, score=score) for index, score in enumerate(scores)],
        usage=EmbeddingUsage(prompt_tokens=num_tokens, total_tokens=num_tokens),
    )


@router.post("/rerank", include_in_schema=False, dependencies=[Depends(require_json)])
@router.post("/v2/rerank", include_in_schema=False, dependencies=[Depends(require_json)])
@router.post("/v1/rerank", dependencies=[Depends(require_json)])
async def rerank(body: RerankRequest, request: Request, state: State) -> RerankResponse:
    """Orders documents by how well they go with a query."""
    state.check_model(body.model)
    texts = body.texts
    if not texts:
        raise ApiError(400, "documents is empty; give at least one", param="documents")
    if body.top_n is not None and body.top_n < 0:
        raise ApiError(400, f"top_n must be at least 0, which is for all, got {body.top_n}", param="top_n")
    scores, num_tokens = await _scored([(body.query, text) for text in texts], body, request, state)
    order = sorted(range(len(texts)), key=lambda index: -scores[index])[: body.top_n or None]
    shown = body.return_documents is not False
    return RerankResponse(
        id=new_head(state, "rerank", None).id,
        model=state.model.names[0],
        results=[
            RankedResult(
                index=index,
                relevance_score=scores[index],
                document=RankedDocument(text=texts[index]) if shown else None,
            )
            for index in order
        ],
        usage=EmbeddingUsage(prompt_tokens=num_tokens, total_tokens=num_tokens),
    )


async def _scored(
    pairs: Sequence[tuple[str, str]], body: ScoreRequest | RerankRequest, request: Request, state: ServerState
) -> tuple[list[float], int]:
    """The scores of `pairs`, and how many tokens they took."""
    embedder, limit = state.embedder, body.truncate_prompt_tokens
    state.check_tokenizer()
    if max(len(one) + len(other) for one, other in pairs) > _LONG:
        raise ApiError(400, f"two texts have more than {_LONG} characters, which are not read; give shorter ones")
    score = _by_pairs if embedder.encoder.scores_pairs else _by_vectors
    with state.gate.admit(len(pairs)), state.metrics.counting(len(pairs)):
        scores, num_tokens = await until_disconnect(request.receive, score(embedder, pairs, limit))
    state.metrics.prompt_tokens.inc(num_tokens)
    return scores, num_tokens


async def _by_pairs(embedder: Embedder, pairs: Sequence[tuple[str, str]], limit: int | None) -> tuple[list[float], int]:
    read = embedder.encoder.pair
    made = await asyncio.to_thread(lambda: [read(*texts, truncate_prompt_tokens=limit) for texts in pairs])
    return await embedder.scores(made), sum(len(one.token_ids) for one in made)


async def _by_vectors(
    embedder: Embedder, pairs: Sequence[tuple[str, str]], limit: int | None
) -> tuple[list[float], int]:
    """The cosines of the texts' vectors, each text being read once."""
    places = {text: place for place, text in enumerate(dict.fromkeys(text for texts in pairs for text in texts))}
    rows = await asyncio.to_thread(embedder.encoder.tokens, list(places), truncate_prompt_tokens=limit)
    vectors = [vector.astype(np.float64) for vector in await embedder.vectors(rows)]
    directions = [vector / max(float(np.linalg.norm(vector)), np.finfo(np.float64).tiny) for vector in vectors]
    scores = [float(directions[places[one]] @ directions[places[other]]) for one, other in pairs]
    return scores, sum(map(len, rows))
