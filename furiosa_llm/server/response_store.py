"""What `/v1/responses` keeps of conversations, in memory."""

from __future__ import annotations

import json
from collections import OrderedDict
from typing import Any

from furiosa_llm.server.errors import ApiError

Messages = list[dict[str, Any]]

MAX_NBYTES = 64 * 2**20
"""Of all conversations that are kept, as JSON."""


class ResponseStore:
    """The last `limit` responses, fewer of long conversations, with what they end, for requests that go on."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._kept: OrderedDict[str, tuple[dict[str, Any], Messages, int]] = OrderedDict()
        self._nbytes = 0

    def keep(self, response: dict[str, Any], messages: Messages) -> None:
        """Keeps one, and gives up the oldest beyond the limit. `messages` begin with those that it goes on from."""
        _, before, nbytes = self._kept.get(response.get("previous_response_id", ""), ({}, [], 0))
        nbytes += len(json.dumps(messages[len(before) :]))
        if response["id"] in self._kept:
            self.forget(response["id"])
        self._kept[response["id"]] = (response, messages, nbytes)
        self._nbytes += nbytes
        while len(self._kept) > self._limit or self._nbytes > MAX_NBYTES:
            self._nbytes -= self._kept.popitem(last=False)[1][2]

    def get(self, response_id: str, param: str | None = None) -> tuple[dict[str, Any], Messages]:
        """One of them; raises an ApiError if it is not there."""
        if response_id not in self._kept:
            message = f"no response {response_id[:100]!r} is kept: the last {self._limit} are, unless store is false"
            raise ApiError(404, message, param=param, code="response_not_found")
        response, messages, _ = self._kept[response_id]
        return response, messages

    def forget(self, response_id: str) -> None:
        """Gives one up; raises an ApiError if it is not there."""
        self.get(response_id)
        self._nbytes -= self._kept.pop(response_id)[2]
