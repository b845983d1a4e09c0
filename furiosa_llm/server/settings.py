"""`ServerSettings`: how the server behaves, whichever model it serves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated

from furiosa_llm.runtime.artifact.options import COUNT, COUNT_OR_NONE, POSITIVE, TEXT, Option, check_options
from furiosa_llm.runtime.errors import InputError

TOOL_CALL_PARSERS = (
    *(
        "hermes",
        "llama3_json",
        "pythonic",
        "mistral",
        "granite",
        "phi4",
        "qwen3_coder",
        "glm45",
        "minimax_m2",
        "kimi_k2",
    ),
    *("deepseek_v3", "deepseek_v31"),
)
REASONING_PARSERS = ("qwen3", "glm45", "deepseek_r1", "minimax_m2", "kimi_k2", "mistral", "granite")
"""The names of `call_formats`, which the command line knows without loading it."""
METRICS_NAMES = ("furiosa", "vllm", "both")
"""Whose names `/metrics` may have."""


def is_text(text: str) -> bool:
    """Whether it can be sent: bytes of a command line or file name that are not UTF-8 are no characters."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSettings:
    """How the server behaves."""

    served_model_names: Sequence[str] | None = None
    """What requests call the model; the first is what answers say. None: the artifact's own name."""
    api_keys: Sequence[str] = field(default=(), repr=False)
    """Each request has to come with one of them, as a bearer token; empty: none has to."""
    allowed_origins: Sequence[str] = ("*",)
    """For CORS; "*" allows all."""
    chat_template: str | None = None
    """Takes the place of the model's own."""
    response_role: Annotated[str, Option("Role of the answers in a chat.", TEXT)] = "assistant"
    tool_call_parser: str | None = None
    """How the model writes calls of tools; None: they are not looked for."""
    reasoning_parser: str | None = None
    """How the model marks what it thinks; None: that is a part of its answers."""
    runtime_lora_updating: bool = False
    """Whether clients may load and unload adapters, from paths on the server's machine."""
    payload_logging: bool = False
    """Whether what requests hold is logged."""
    metrics_names: str = "furiosa"
    """Whose names `/metrics` has: one of METRICS_NAMES."""
    log_stats: bool = True
    """Whether figures of what runs are logged every ten seconds."""
    max_body_nbytes: Annotated[int, Option("Greater bodies get the status 413.", COUNT, unit="B")] = 16 * 2**20
    max_concurrency: Annotated[
        int, Option("Sequences that may run and wait; requests beyond them get the status 429.", COUNT)
    ] = 1024
    max_stored_responses: Annotated[
        int, Option("Responses that are kept for /v1/responses to go on with; 0 for none.", COUNT_OR_NONE)
    ] = 256
    max_connections: Annotated[int, Option("Clients beyond them are turned away with the status 503.", COUNT)] = 2048
    head_timeout: Annotated[
        float, Option("Seconds within which the head of a request has to arrive.", POSITIVE, unit="s")
    ] = 10.0
    body_timeout: Annotated[float, Option("Seconds within which a body has to arrive.", POSITIVE, unit="s")] = 30.0
    send_timeout: Annotated[
        float, Option("Seconds after which a client that takes nothing of its answer is given up.", POSITIVE, unit="s")
    ] = 60.0
    idle_timeout: Annotated[
        int, Option("Seconds that a connection is kept without a request; whole ones.", COUNT, unit="s")
    ] = 15
    request_timeout: Annotated[
        float | None,
        Option("Seconds that a request may take, from its head to the end of its answer.", POSITIVE, "no limit"),
    ] = None
    text_timeout: Annotated[
        float,
        Option("Seconds that the chat template, or tokenizing a text, may take for one request.", POSITIVE, unit="s"),
    ] = 10.0
    text_max_nbytes: Annotated[
        int, Option("Memory that the same may take, beyond the tokenizer's.", COUNT, unit="B")
    ] = 2**30
    shutdown_timeout: Annotated[
        float, Option("Seconds that requests have to end in after SIGTERM.", POSITIVE, unit="s")
    ] = 30.0

    def __post_init__(self) -> None:
        check_options(self, InputError)
        if self.metrics_names not in METRICS_NAMES:
            raise InputError(f"metrics_names={self.metrics_names!r:.80} is unknown; give {', '.join(METRICS_NAMES)}")
        if any(not key.strip() or not key.isascii() or not key.isprintable() for key in self.api_keys):
            raise InputError("an API key is empty, or holds what a header cannot; give printable ASCII characters")
        for text in (*(self.served_model_names or ()), self.response_role):
            if not is_text(text):
                raise InputError(f"{text!r:.80} is not UTF-8, and cannot be sent in an answer; give another")
        if any(key != key.strip() for key in self.api_keys):
            raise InputError("an API key begins or ends with a space, which a header does not keep; leave it out")
