"""Responses that are made while nobody waits for them."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine


class Background:
    """What runs, by the ids of the responses."""

    def __init__(self) -> None:
        self._running: dict[str, asyncio.Task[None]] = {}

    def begin(self, response_id: str, work: Coroutine[None, None, None]) -> None:
        """Runs `work`, which keeps its response itself, whatever becomes of it."""
        task = asyncio.create_task(work)
        self._running[response_id] = task
        task.add_done_callback(lambda _: self._running.pop(response_id))

    async def cancel(self, response_id: str) -> None:
        """Ends one, if it runs, and returns when it has ended."""
        if (task := self._running.get(response_id)) is not None:
            task.cancel()
            await asyncio.wait([task])

    async def close(self) -> None:
        """Ends all of them."""
        for response_id in list(self._running):
            await self.cancel(response_id)
