"""Routes whose bodies are read where they cannot stop the server, and counted before they are validated."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request
from fastapi.routing import APIRoute
from starlette.responses import Response

from furiosa_llm.runtime.errors import InputError
from furiosa_llm.server.errors import api_error
from furiosa_llm.server.state import ServerState


class BodyRoute(APIRoute):
    """FastAPI's, but for how a body is read."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """What answers a request."""
        handler = super().get_route_handler()

        async def handle(request: Request) -> Response:
            return await handler(_CountedRequest(request.scope, request.receive))

        return handle


class _CountedRequest(Request):
    async def json(self) -> Any:
        state: ServerState = self.app.state.server
        try:
            return await state.text.read(await self.body())
        except InputError as error:
            raise api_error(error) from error
