"""`ServerSettings`: what the server is told beside which model to run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from furiosa_llm.runtime.errors import InputError

_POSITIVE = (
    *("max_body_nbytes", "max_concurrency", "max_connections", "head_timeout", "body_timeout", "send_timeout"),
    *("idle_timeout", "request_timeout", "shutdown_timeout"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSettings:
    """How the server behaves.

    served_model_names: what requests call the model; the first is what answers say. None: the artifact's own name.
    api_keys: one of them has to come with each request, as a bearer token; empty: none has to.
    allowed_origins: for CORS; "*" allows all.
    chat_template: takes the place of the model's own.
    response_role: the role of answers in a chat.
    tool_call_parser: how the model writes calls of tools; None: they are not looked for.
    payload_logging: whether what requests hold is logged.
    log_stats: whether figures of what runs are logged every ten seconds.
    max_body_nbytes: greater bodies are refused.
    max_concurrency: sequences that may run and wait at once; what is beyond them is refused.
    max_connections: clients beyond them are turned away.
    head_timeout: seconds within which the head of a request has to arrive.
    body_timeout: seconds within which a body has to arrive.
    send_timeout: seconds after which a client that takes nothing of its answer is given up.
    idle_timeout: seconds that a connection is kept without a request; whole ones.
    request_timeout: seconds that a request may take, from its head to the end of its answer; None: any number.
    shutdown_timeout: seconds that requests have to end in after SIGTERM.
    """

    served_model_names: Sequence[str] | None = None
    api_keys: Sequence[str] = field(default=(), repr=False)
    allowed_origins: Sequence[str] = ("*",)
    chat_template: str | None = None
    response_role: str = "assistant"
    tool_call_parser: str | None = None
    payload_logging: bool = False
    log_stats: bool = True
    max_body_nbytes: int = 16 * 2**20
    max_concurrency: int = 1024
    max_connections: int = 2048
    head_timeout: float = 10.0
    body_timeout: float = 30.0
    send_timeout: float = 60.0
    idle_timeout: int = 15
    request_timeout: float | None = None
    shutdown_timeout: float = 30.0

    def __post_init__(self) -> None:
        if any(not key.strip() or not key.isascii() or not key.isprintable() for key in self.api_keys):
            raise InputError("an API key is empty, or holds what a header cannot; give printable ASCII characters")
        if any(key != key.strip() for key in self.api_keys):
            raise InputError("an API key begins or ends with a space, which a header does not keep; leave it out")
        for name in _POSITIVE:
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise InputError(f"{name} must be positive, got {value}")
