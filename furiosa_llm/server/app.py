"""The application: every endpoint, every error in one shape, and what stands around a request."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import APIRouter, Depends, FastAPI, Request
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response

import furiosa_llm
from furiosa_llm.server import (
    adapters,
    chat,
    completions,
    embeddings,
    machine,
    messages_api,
    page,
    responses_api,
    scores,
    status,
    tokens,
)
from furiosa_llm.server.background import Background
from furiosa_llm.server.encodings import ContentEncodings
from furiosa_llm.server.errors import install_handlers
from furiosa_llm.server.events import ClientGoneError
from furiosa_llm.server.generation import Gate
from furiosa_llm.server.machine_metrics import watch
from furiosa_llm.server.metrics import Metrics
from furiosa_llm.server.middleware import ApiKeys, BodyLimits, Heads, RequestIds, TimeLimits
from furiosa_llm.server.model import Decoder, ServedModel
from furiosa_llm.server.notes import HEADERS, on_one_line
from furiosa_llm.server.openapi import ANTHROPICS, GENERATING, READING, Responses, describe, errors
from furiosa_llm.server.reasoning import reasoning_format
from furiosa_llm.server.response_store import ResponseStore
from furiosa_llm.server.settings import ServerSettings
from furiosa_llm.server.state import ServerState
from furiosa_llm.server.stats_log import log_stats
from furiosa_llm.server.text_processes import TextWork
from furiosa_llm.server.tools import call_format

logger = logging.getLogger(__name__)
_payloads = logging.getLogger("furiosa_llm.server.payloads")

_CLIENT_GONE = 499
"""What other servers log for a client that did not wait; nobody receives it."""


def make_app(model: ServedModel, settings: ServerSettings) -> FastAPI:
    """The application that serves `model`, which it closes when it ends."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        tasks = [asyncio.create_task(watch(metrics.busy, model.kind.machine))]
        if settings.log_stats and isinstance(model.kind, Decoder):
            tasks.append(asyncio.create_task(log_stats(metrics, model.kind)))
        for task in tasks:
            task.add_done_callback(_log_end)
        await text.start()
        yield
        await background.close()
        await text.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.to_thread(model.close)

    background = Background()
    metrics, text = Metrics(model, settings.metrics_names), TextWork(model.tokenizer, settings)
    # The pages of documentation that FastAPI would make load scripts from elsewhere.
    app = FastAPI(
        title="furiosa-llm", version=furiosa_llm.__version__, docs_url=None, redoc_url=None, lifespan=lifespan
    )
    app.state.server = ServerState(
        model=model,
        settings=settings,
        gate=Gate(settings.max_concurrency),
        metrics=metrics,
        text=text,
        responses=ResponseStore(settings.max_stored_responses),
        background=background,
        call_format=call_format(settings.tool_call_parser),
        reasoning_format=reasoning_format(settings.reasoning_parser),
    )
    routers: tuple[tuple[APIRouter, Responses], ...] = (
        (completions.router, GENERATING),
        (chat.router, GENERATING),
        (responses_api.router, GENERATING),
        (messages_api.router, ANTHROPICS),
        (embeddings.router, GENERATING),
        (scores.router, GENERATING),
        (tokens.router, READING),
        (status.router, errors(413, 500)),
        (machine.router, errors(413, 500)),
        (page.router, {}),
        *(((adapters.router, READING),) if settings.runtime_lora_updating else ()),
    )
    for router, answers in routers:
        dependencies = [Depends(_log_payload)] if settings.payload_logging else []
        app.include_router(router, responses=answers, dependencies=dependencies)
    names = () if settings.runtime_lora_updating else (*model.names, *model.adapters)
    describe(app, names=names, needs_key=bool(settings.api_keys))
    install_handlers(app)
    app.add_exception_handler(ClientGoneError, _nobody_there)
    _surround(app, settings)
    return app


def _surround(app: FastAPI, settings: ServerSettings) -> None:
    """Adds the middleware; the last one is the outermost."""
    app.add_middleware(ContentEncodings, max_nbytes=settings.max_body_nbytes)
    app.add_middleware(Heads)
    if settings.api_keys:
        app.add_middleware(ApiKeys, keys=settings.api_keys)
    app.add_middleware(BodyLimits, max_nbytes=settings.max_body_nbytes, timeout=settings.body_timeout)
    app.add_middleware(TimeLimits, seconds=settings.request_timeout)
    app.add_middleware(RequestIds)
    app.add_middleware(
        CORSMiddleware,
        allow_origins=settings.allowed_origins,
        allow_methods=["*"],
        allow_headers=["*"],
        expose_headers=["x-request-id", *HEADERS],
    )


def _log_end(task: asyncio.Task[None]) -> None:
    """Tasks other than requests run until they are cancelled."""
    if not task.cancelled() and (error := task.exception()) is not None:
        logger.error("a task of the server has ended; its figures stay as they are", exc_info=error)


async def _nobody_there(_: Request, __: Exception) -> Response:
    return Response(status_code=_CLIENT_GONE)


async def _log_payload(request: Request) -> None:
    body = await request.body()
    if body:
        shown = on_one_line(f"{request.url.path}: {body.decode(errors='replace')}")
        _payloads.info("%s %s", request.method, shown)
