"""The page at `/`: the live machine and a box to try the model, as files next to this one that need nothing else."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from importlib.resources import files
from typing import Literal

from fastapi import APIRouter, Request
from pydantic import BaseModel
from starlette.responses import Response

from furiosa_llm.server.embedder import Embedder
from furiosa_llm.server.errors import ApiError
from furiosa_llm.server.model import Decoder
from furiosa_llm.server.state import ServerState, State

router = APIRouter(include_in_schema=False)

INDEX = "index.html"
_CONFIG = "/page/config.json"
_TYPES = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
_HEADERS = {
    # A browser asks each time, and a status alone says that nothing changed: a new release is seen at once.
    "Cache-Control": "no-cache",
    "Content-Security-Policy": (
        "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; object-src 'none'"
    ),
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
_METHODS = ["GET", "HEAD"]

Box = Literal["chat", "completion", "embedding"]


class PageConfig(BaseModel):
    """What the page has to know before it may ask for more.

    api_key_required: whether `/machine` and the model need a key.
    box: what the model can be tried with; None: it has no tokenizer.
    """

    api_key_required: bool
    box: Box | None


@dataclass(frozen=True, slots=True, kw_only=True)
class _File:
    """A file of the page, read once."""

    body: bytes
    """Its bytes."""
    media_type: str
    """Its type."""
    etag: str
    """Changes with the bytes."""


def _read_files() -> dict[str, _File]:
    found = {}
    for entry in files("furiosa_llm.server").joinpath("page").iterdir():
        suffix = entry.name[entry.name.rfind(".") :]
        if suffix in _TYPES:
            body = entry.read_bytes()
            etag = f'"{hashlib.sha256(body).hexdigest()[:32]}"'
            found[entry.name] = _File(body=body, media_type=_TYPES[suffix], etag=etag)
    return found


_FILES = _read_files()

OPEN_PATHS = frozenset({"/", _CONFIG, *(f"/page/{name}" for name in _FILES if name != INDEX)})
"""What needs no API key: the page asks its reader for one."""


@router.api_route("/", methods=_METHODS)
async def index(request: Request) -> Response:
    """The page."""
    return _answer(request, _FILES[INDEX])


@router.get(_CONFIG)
async def config(state: State) -> PageConfig:
    """What the page asks first."""
    return PageConfig(api_key_required=bool(state.settings.api_keys), box=_box(state))


@router.api_route("/page/{name}", methods=_METHODS)
async def part(name: str, request: Request) -> Response:
    """A file that the page loads."""
    file = _FILES.get(name)
    if file is None or name == INDEX:
        raise ApiError(404, f"the page has no file {name[:100]!r}")
    return _answer(request, file)


def _answer(request: Request, file: _File) -> Response:
    headers = {**_HEADERS, "ETag": file.etag}
    # A proxy that compresses makes the tag a weak one.
    known = [tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(",")]
    if file.etag in known:
        return Response(status_code=304, headers=headers)
    return Response(file.body, headers=headers, media_type=file.media_type)


def _box(state: ServerState) -> Box | None:
    tokenizer = state.model.tokenizer
    if tokenizer is None:
        return None
    if not isinstance(state.model.kind, Decoder):
        return "embedding" if isinstance(state.model.kind, Embedder) else "completion"
    return "chat" if state.settings.chat_template or tokenizer.chat_template else "completion"
