"""Takes streams and does little else: `python -m benchmarks.stream_client URL MODEL TOKENS`.

It asks for a completion of each of the benchmarks' prompts, all at once, and prints what that took as JSON. It runs in
a process of its own, so that what it costs is not taken for the server's.
"""

from __future__ import annotations

import json
import socket
import sys
import threading
import time
from urllib.parse import urlsplit

from benchmarks.parity import PROMPTS

_END = b"data: [DONE]\n\n"


def connect(url: str) -> socket.socket:
    """A connection to the server at `url`."""
    parts = urlsplit(url)
    assert parts.hostname is not None
    assert parts.port is not None
    connection = socket.create_connection((parts.hostname, parts.port), timeout=600)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


def request(model: str, prompt: str, tokens: int) -> bytes:
    """A streamed greedy completion of so many tokens."""
    asked = {
        "model": model,
        "prompt": prompt,
        "max_tokens": tokens,
        "temperature": 0,
        "ignore_eos": True,
        "add_special_tokens": False,
        "stream": True,
    }
    body = json.dumps(asked).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    return f"{head}\r\n\r\n".encode() + body


def read_stream(connection: socket.socket) -> bytes:
    """Everything up to the end of a stream, chunked as HTTP has it."""
    answer = bytearray()
    while _END not in answer[-64:]:
        piece = connection.recv(2**16)
        if not piece or not answer.startswith(b"HTTP/1.1 200"[: len(answer)]):
            raise ConnectionError(f"the server gave no stream: {bytes(answer[:500])!r}")
        answer += piece
    return bytes(answer)


def main() -> None:
    """Runs one stream for each prompt."""
    url, model, tokens = sys.argv[1], sys.argv[2], int(sys.argv[3])
    answers: list[bytes] = []

    def stream(prompt: str) -> None:
        with connect(url) as connection:
            connection.sendall(request(model, prompt, tokens))
            answers.append(read_stream(connection))

    threads = [threading.Thread(target=stream, args=(prompt,)) for prompt in PROMPTS]
    began, cpu_began = time.perf_counter(), time.process_time()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - cpu_began
    if len(answers) != len(PROMPTS):
        sys.exit(1)
    sys.stdout.write(json.dumps({"seconds": seconds, "cpu_seconds": cpu_seconds}))


if __name__ == "__main__":
    main()
