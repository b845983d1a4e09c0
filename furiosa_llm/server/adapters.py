"""`POST /v1/load_lora_adapter` and `/v1/unload_lora_adapter`: other adapters while the server runs, under vLLM's names.

Paths are of the server's machine, and whoever may call this learns whether they are there: it is behind an option.
"""

from __future__ import annotations

from fastapi import APIRouter, Depends
from starlette.responses import PlainTextResponse

from furiosa_llm.server.errors import ApiError
from furiosa_llm.server.fields import Body, Text
from furiosa_llm.server.model import load_adapter, unload_adapter
from furiosa_llm.server.openapi import errors
from furiosa_llm.server.state import State, require_json

router = APIRouter()


class LoadAdapter(Body):
    """What to load, and the name that requests will have for it."""

    lora_name: Text
    lora_path: Text


class UnloadAdapter(Body):
    """What to forget."""

    lora_name: Text


@router.post("/v1/load_lora_adapter", response_class=PlainTextResponse, dependencies=[Depends(require_json)])
async def load_lora_adapter(body: LoadAdapter, state: State) -> str:
    """Makes an adapter known; requests name it as their model."""
    await load_adapter(state.model, body.lora_name, body.lora_path)
    return f"Success: LoRA adapter '{body.lora_name}' added successfully."


@router.post(
    "/v1/unload_lora_adapter",
    response_class=PlainTextResponse,
    responses=errors(404),
    dependencies=[Depends(require_json)],
)
async def unload_lora_adapter(body: UnloadAdapter, state: State) -> str:
    """Forgets an adapter; requests that run with it end with it."""
    if not await unload_adapter(state.model, body.lora_name):
        raise ApiError(404, f"there is no adapter {body.lora_name[:100]!r}", param="lora_name", code="model_not_found")
    return f"Success: LoRA adapter '{body.lora_name}' removed successfully."
