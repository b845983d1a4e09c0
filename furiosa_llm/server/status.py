"""What the server says of itself: `/health`, `/version`, `/metrics`, `/v1/models`."""

from __future__ import annotations

from fastapi import APIRouter
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import Response

import furiosa_llm
from furiosa_llm.server.errors import ApiError
from furiosa_llm.server.model import ServedModel
from furiosa_llm.server.openapi import errors
from furiosa_llm.server.responses import ModelCard, ModelList, VersionResponse
from furiosa_llm.server.state import State

router = APIRouter()


@router.get("/health", response_class=Response, responses=errors(503))
async def health(state: State) -> Response:
    """Empty if the model can run requests; an error of status 503 if it cannot now, or cannot any more."""
    if state.model.dead:
        raise ApiError(503, "the engine is dead: every replica failed and could not be rebuilt", code="engine_dead")
    if not state.model.ready:
        raise ApiError(503, "no replica runs at the moment: each is built anew, or waits for a host", code="not_ready")
    return Response()


@router.get("/version")
async def version() -> VersionResponse:
    """The release that serves."""
    return VersionResponse(version=furiosa_llm.__version__)


@router.get(
    "/metrics", response_class=Response, responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}}
)
async def metrics(state: State) -> Response:
    """Counters, histograms and gauges, in the text format of Prometheus."""
    return Response(state.metrics.render(), media_type=CONTENT_TYPE_LATEST)


@router.get("/v1/models")
async def list_models(state: State) -> ModelList:
    """The names of the model that is served, and its adapters."""
    return ModelList(data=[_card(state.model, name) for name in state.names])


@router.get("/v1/models/{model:path}", responses=errors(404))
async def retrieve_model(model: str, state: State) -> ModelCard:
    """One of them; names may hold slashes."""
    state.check_model(model)
    return _card(state.model, model)


def _card(model: ServedModel, name: str) -> ModelCard:
    return ModelCard(
        id=name,
        created=model.created,
        root=model.names[0],
        parent=model.names[0] if name in model.adapters else None,
        artifact_id=model.artifact_id,
        max_prompt_len=model.max_prompt_length,
        max_context_len=model.max_length,
        max_model_len=model.max_length,
        runtime_config=dict(model.parallelism),
    )
