"""What comes over a connection that no HTTP library would send: each has a clean answer, and nobody else notices."""

from __future__ import annotations

import contextlib
import gzip
import json
import re
import select
import socket
import threading
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import tokenizers
from starlette.responses import Response

from furiosa_llm import LLM
from furiosa_llm.runtime.errors import TokenizerError
from furiosa_llm.server.settings import ServerSettings
from tests.server.conftest import NAME, TIMEOUT, error_of, listen, load, metric, serving, wait_for

HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
BODY: dict[str, Any] = {"model": NAME, "prompt": "hello", "temperature": 0, "max_tokens": 2}
LONG: dict[str, Any] = {**BODY, "max_tokens": 500, "ignore_eos": True}
ZOO = Path(__file__).parents[2] / "fixtures" / "zoo"
HEALTH = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"


@pytest.fixture(scope="module")
def hasty(artifact: Path) -> Iterator[str]:
    """A server with short limits."""
    settings = ServerSettings(head_timeout=0.3, body_timeout=0.6, max_body_nbytes=3000, idle_timeout=1)
    with serving(load(artifact), settings) as url:
        yield url


@contextlib.contextmanager
def connection_to(url: str) -> Iterator[socket.socket]:
    host, _, port = url.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port)), timeout=30) as made:
        yield made


def exchange(url: str, data: bytes) -> bytes:
    """All that the server sends until it closes the connection."""
    with connection_to(url) as connection:
        connection.sendall(data)
        return everything(connection)


def everything(connection: socket.socket) -> bytes:
    answer = b""
    while piece := connection.recv(65536):
        answer += piece
    return answer


def one_answer(connection: socket.socket) -> bytes:
    """The next answer, of a connection that stays open."""
    answer = b""
    while (length := re.search(rb"content-length: (\d+)", answer)) is None or b"\r\n\r\n" not in answer:
        answer += connection.recv(1)
    return answer + connection.recv(int(length[1]), socket.MSG_WAITALL)


def closing(head: bytes) -> bytes:
    return head + b"Connection: close\r\n"


def with_body(head: bytes, body: bytes) -> bytes:
    return head + b"Content-Length: %d\r\n\r\n" % len(body) + body


def chunked(*pieces: bytes) -> bytes:
    return b"Transfer-Encoding: chunked\r\n\r\n" + b"".join(b"%x\r\n%s\r\n" % (len(one), one) for one in pieces)


def error_in(answer: bytes) -> tuple[int, dict[str, Any]]:
    """The status and the error of an answer, whose shape is checked."""
    head, _, body = answer.partition(b"\r\n\r\n")
    status = re.match(rb"HTTP/1.1 (\d+) ", head)
    assert status, answer
    assert b"content-type: application/json" in head.lower()
    error: dict[str, Any] = json.loads(body)["error"]
    assert list(error) == ["message", "type", "param", "code"]
    return int(status[1]), error


GARBAGE = {
    "no HTTP": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 400),
    "another protocol": (b"SSH-2.0-OpenSSH_9.6\r\n\r\n", 400),
    "no version": (b"GET /health\r\n\r\n", 400),
    "no host": (b"GET /health HTTP/1.1\r\n\r\n", 400),
    "space in the path": (b"GET /he alth HTTP/1.1\r\nHost: x\r\n\r\n", 400),
    "bytes in the path": (b"GET /h\xff HTTP/1.1\r\nHost: x\r\n\r\n", 400),
    "NUL in a header": (b"GET /health HTTP/1.1\r\nHost: x\r\nX: a\x00b\r\n\r\n", 400),
    "header without a colon": (b"GET /health HTTP/1.1\r\nHost: x\r\nnonsense\r\n\r\n", 400),
    "two lengths": (HEAD + b"Content-Length: 3\r\nContent-Length: 4\r\n\r\nabcd", 400),
    "negative length": (HEAD + b"Content-Length: -1\r\n\r\n", 400),
    "length in words": (HEAD + b"Content-Length: ten\r\n\r\n", 400),
    "huge length": (HEAD + b"Content-Length: " + b"9" * 30 + b"\r\n\r\n", 400),
    "unknown encoding": (HEAD + b"Transfer-Encoding: gzip\r\n\r\n", 501),
    "chunk without a size": (HEAD + b"Transfer-Encoding: chunked\r\n\r\nxyz\r\n", 400),
    "chunk with another size": (HEAD + b"Transfer-Encoding: chunked\r\n\r\n1\r\nabc\r\n", 400),
    "endless line": (b"GET /" + b"a" * 70_000, 431),
}


@pytest.mark.parametrize("kind", GARBAGE)
def test_what_is_no_http(url: str, kind: str) -> None:
    data, expected = GARBAGE[kind]
    status, error = error_in(exchange(url, data))
    assert status == expected
    assert error["message"].startswith("the request is not valid HTTP: ")
    assert error["type"] == ("server_error" if expected >= 500 else "invalid_request_error")
    assert httpx.get(f"{url}/health").status_code == 200


BODIES = {
    "NUL": b'{"model": "x\x00", "prompt": "a"}',
    "not UTF-8": b'{"model": "\xff\xfe", "prompt": "a"}',
    "UTF-16": '{"model": "x", "prompt": 1}'.encode("utf-16"),
    "nested": b'{"a":' * 50_000 + b"1" + b"}" * 50_000,
    "nested in a field": b'{"model": "x", "prompt": ' + b"[" * 900 + b"]" * 900 + b"}",
    "huge number": b'{"model": "%s", "prompt": "a", "max_tokens": ' % NAME.encode() + b"9" * 4000 + b"}",
    "huger number": b'{"model": "x", "prompt": "a", "max_tokens": ' + b"9" * 5000 + b"}",
    "huge exponent": b'{"model": "%s", "prompt": "a", "temperature": 1e999999}' % NAME.encode(),
    "two documents": b'{"model": "x"} {"model": "y"}',
    "unknown escape": b'{"model": "\\x00", "prompt": "a"}',
}


@pytest.mark.parametrize("kind", BODIES)
def test_bodies_that_json_can_be_made_of(url: str, kind: str) -> None:
    response = httpx.post(f"{url}/v1/completions", content=BODIES[kind], headers={"Content-Type": "application/json"})
    assert set(response.json()) == {"error"}
    assert response.status_code == 400


def test_the_last_of_two_equal_keys_counts(url: str) -> None:
    body = b'{"model": "other", "prompt": "a", "max_tokens": 1, "model": "' + NAME.encode() + b'"}'
    response = httpx.post(f"{url}/v1/completions", content=body, headers={"Content-Type": "application/json"})
    assert response.status_code == 200
    response = httpx.post(f"{url}/v1/completions", json={**BODY, "model": "\x00"})
    assert response.status_code == 404


def test_a_method_or_an_upgrade_that_nothing_takes(url: str) -> None:
    upgrade = (
        b"Connection: upgrade, close\r\nUpgrade: websocket\r\nSec-WebSocket-Key: eA==\r\nSec-WebSocket-Version: 13"
    )
    assert exchange(url, b"GET /health HTTP/1.1\r\nHost: x\r\n" + upgrade + b"\r\n\r\n").startswith(b"HTTP/1.1 200 ")
    for request, status in (
        (b"OPTIONS * HTTP/1.1\r\nHost: x\r\n", 404),
        (b"OPTIONS /v1/completions HTTP/1.1\r\nHost: x\r\n", 405),
        (b"GET http://[ HTTP/1.1\r\nHost: [\r\n", 404),
        (b"GET /%00%ff HTTP/1.1\r\nHost: x\r\n", 404),
        (b"CONNECT x:1 HTTP/1.1\r\nHost: x\r\n", 404),
        (b"TRACE /health HTTP/1.1\r\nHost: x\r\n", 405),
        (b"BREW /health HTTP/1.1\r\nHost: x\r\n", 405),
        (b"GET /v1/completions HTTP/1.1\r\nHost: x\r\n" + upgrade + b"\r\n", 405),
    ):
        assert error_in(exchange(url, closing(request) + b"\r\n"))[0] == status


def test_head_is_a_get_without_its_body(url: str) -> None:
    paths = ("/", "/health", "/version", "/metrics", "/machine", "/v1/models", f"/v1/models/{NAME}", "/tokenizer_info")
    with httpx.Client(base_url=url, timeout=TIMEOUT) as client:
        for path in paths:
            head, get = client.head(path), client.get(path)
            assert (head.status_code, head.content) == (200, b""), path
            assert head.headers.get("content-type") == get.headers.get("content-type")
        missing = client.head("/v1/models/nobody")
        assert (missing.status_code, missing.content) == (404, b"")
        refused = client.head("/v1/completions")
        assert (refused.status_code, refused.headers["allow"]) == (405, "POST")
        assert client.post("/health").headers["allow"] == "GET, HEAD"
    # No body was sent that would be taken for an answer.
    request = b"HEAD /version HTTP/1.1\r\nHost: x\r\n"
    answers = exchange(url, request + b"\r\n" + closing(request.replace(b"HEAD", b"GET")) + b"\r\n")
    assert (answers.count(b"HTTP/1.1 200 "), answers.count(b'{"version"')) == (2, 1)


def compressed(url: str, body: bytes, encoding: str = "gzip") -> httpx.Response:
    headers = {"content-type": "application/json", "content-encoding": encoding}
    return httpx.post(f"{url}/v1/completions", content=body, headers=headers, timeout=TIMEOUT)


def test_compressed_bodies(url: str) -> None:
    plain = json.dumps(BODY).encode()
    expected = httpx.post(f"{url}/v1/completions", json=BODY).json()["choices"]
    for encoding, body in (("gzip", gzip.compress(plain)), ("X-GZIP", gzip.compress(plain)), ("identity", plain),
                           ("deflate", zlib.compress(plain))):  # fmt: skip
        assert compressed(url, body, encoding).json()["choices"] == expected, encoding
    pieces = [gzip.compress(plain)[place : place + 1] for place in range(len(gzip.compress(plain)))]
    sent = HEAD.replace(b"\r\n", b"\r\nContent-Encoding: gzip\r\nConnection: close\r\n", 1) + chunked(*pieces, b"")
    assert exchange(url, sent).startswith(b"HTTP/1.1 200 ")


def test_bodies_that_are_not_what_they_say(url: str) -> None:
    body = gzip.compress(json.dumps(BODY).encode())
    for broken, reason in (
        (b"{}", "incorrect header check"),
        (body[:-3], "its end is missing"),
        (b"", "its end is missing"),
        (body + body, "something follows its end"),
        (body[:-8] + b"\0" * 8, "incorrect data check"),
    ):
        answer = compressed(url, broken)
        assert answer.status_code == 400
        assert reason in error_of(answer)["message"]
    for encoding in ("br", "zstd", "gzip, gzip", "compress"):
        answer = compressed(url, body, encoding)
        assert (answer.status_code, answer.headers["accept-encoding"]) == (415, "gzip, deflate")
        assert encoding in error_of(answer)["message"]


def test_a_small_body_cannot_say_too_much(hasty: str) -> None:
    bomb = gzip.compress(b" " * 2_500_000)
    assert len(bomb) < 3000
    answer = compressed(hasty, bomb)
    assert answer.status_code == 413
    assert "says more than the 3000 bytes" in error_of(answer)["message"]
    spaces = gzip.compress(json.dumps(BODY).encode() + b" " * (3000 - len(json.dumps(BODY))))
    assert compressed(hasty, spaces).status_code == 200


def test_a_body_may_say_more_than_a_piece_at_a_time(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    plain = json.dumps(BODY).encode() + b" " * 300
    monkeypatch.setattr("furiosa_llm.server.encodings._PIECE", 1)
    assert compressed(url, gzip.compress(plain)).status_code == 200


def test_http_1_0(url: str) -> None:
    body = json.dumps({**BODY, "stream": True}).encode()
    answer = exchange(url, with_body(HEAD.replace(b"HTTP/1.1", b"HTTP/1.0"), body))
    head, _, rest = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 ")
    assert b"chunked" not in head
    assert rest.startswith(b"data: {")
    assert rest.endswith(b"data: [DONE]\n\n")


def test_pipelined_requests_are_answered_in_order(url: str) -> None:
    one = with_body(HEAD, json.dumps(BODY).encode())
    answer = exchange(url, one + HEALTH + with_body(closing(HEAD), b"{}"))
    statuses = re.findall(rb"HTTP/1.1 (\d+) ", answer)
    assert statuses == [b"200", b"200", b"400"]


def test_a_body_that_is_waited_for(url: str) -> None:
    body = json.dumps(BODY).encode()
    with connection_to(url) as connection:
        head = closing(HEAD) + b"Expect: 100-continue\r\nContent-Length: %d\r\n\r\n" % len(body)
        connection.sendall(head)
        assert connection.recv(65536) == b"HTTP/1.1 100 Continue\r\n\r\n"
        connection.sendall(body)
        assert everything(connection).startswith(b"HTTP/1.1 200 ")
        # What is refused by its head is not asked for.
    with connection_to(url) as connection:
        connection.sendall(closing(HEAD) + b"Expect: 100-continue\r\nContent-Length: 99999999\r\n\r\n")
        assert error_in(everything(connection))[0] == 413


def test_a_length_that_is_too_small(url: str) -> None:
    body = json.dumps(BODY).encode()
    answer = exchange(url, HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body + b"and more\r\n\r\n")
    assert re.findall(rb"HTTP/1.1 (\d+) ", answer) == [b"200", b"400"]


@pytest.mark.parametrize("body", [b"Content-Length: 100\r\n\r\n{", chunked(b"{")], ids=["length", "chunked"])
def test_a_body_without_an_end(hasty: str, body: bytes) -> None:
    status, error = error_in(exchange(hasty, HEAD + body))
    assert (status, error["message"]) == (408, "the body did not arrive within 0.6 s")


def test_a_head_that_trickles(hasty: str) -> None:
    with connection_to(hasty) as connection:
        answer = b""
        connection.settimeout(0.02)
        for byte in HEAD * 10:  # a byte in 20 ms, far more of them than there is time for
            try:
                connection.sendall(bytes([byte]))
                if answer := connection.recv(65536):
                    break
            except TimeoutError:
                continue
    status, error = error_in(answer)
    assert (status, error["message"]) == (408, "the head of the request did not arrive within 0.3 s")


def test_connections_without_a_request_are_closed(hasty: str) -> None:
    with connection_to(hasty) as silent:
        assert everything(silent) == b""
    assert exchange(hasty, HEALTH).startswith(b"HTTP/1.1 200 ")  # until the server closes it
    with connection_to(hasty) as second:
        second.sendall(HEALTH)
        assert second.recv(65536).startswith(b"HTTP/1.1 200 ")
        second.sendall(b"GET /hea")
        assert error_in(everything(second))[0] == 408


def test_a_body_that_nobody_reads_is_taken_for_a_while(hasty: str) -> None:
    # The client is told while it sends, it may go on, and use the connection again.
    with connection_to(hasty) as connection:
        connection.sendall(HEAD + b"Content-Length: 1000000\r\n\r\n")
        connection.sendall(b" " * 500_000)
        assert error_in(one_answer(connection))[0] == 413
        connection.sendall(b" " * 500_000 + HEALTH)
        assert connection.recv(65536).startswith(b"HTTP/1.1 200 ")
    with connection_to(hasty) as connection:  # nor is it reset if it is to be closed
        connection.sendall(closing(HEAD) + b"Content-Length: 1000000\r\n\r\n")
        connection.sendall(b" " * 500_000)
        assert error_in(one_answer(connection))[0] == 413
        connection.sendall(b" " * 500_000)
        assert everything(connection) == b""
    with connection_to(hasty) as connection:
        connection.sendall(HEAD.replace(b"completions", b"nothing") + b"Transfer-Encoding: chunked\r\n\r\n")
        assert error_in(one_answer(connection))[0] == 404
        wait_for(lambda: cannot_send(connection, b"1\r\n \r\n"))
    with connection_to(hasty) as connection:  # what follows an answer is no chunk
        connection.sendall(HEAD.replace(b"completions", b"nothing") + b"Transfer-Encoding: chunked\r\n\r\n")
        assert error_in(one_answer(connection))[0] == 404
        connection.sendall(b"nonsense\r\n")
        assert everything(connection) == b""


def cannot_send(connection: socket.socket, data: bytes) -> bool:
    try:
        connection.sendall(data)
    except ConnectionError:
        return True
    return False


def test_there_is_a_limit_of_connections(artifact: Path) -> None:
    with serving(load(artifact), ServerSettings(max_connections=3, head_timeout=60)) as url:
        with contextlib.ExitStack() as stack:
            held = [stack.enter_context(connection_to(url)) for _ in range(3)]
            for one in held:
                one.sendall(b"GET /")
            with connection_to(url) as refused:
                refused.sendall(HEALTH)
                answer = everything(refused)
            status, error = error_in(answer)
            assert (status, error["code"]) == (503, "too_many_connections")
            assert b"\r\nRetry-After: 1\r\n" in answer
            held[0].sendall(HEALTH.removeprefix(b"GET /"))  # those that were there go on
            assert held[0].recv(65536).startswith(b"HTTP/1.1 200 ")
        wait_for(lambda: exchange(url, closing(HEALTH[:-2]) + b"\r\n").startswith(b"HTTP/1.1 200 "))


def test_clients_that_were_turned_away_take_nobodys_place(artifact: Path) -> None:
    with serving(load(artifact), ServerSettings(max_connections=2)) as url, contextlib.ExitStack() as stack:
        staying, going = (stack.enter_context(connection_to(url)) for _ in range(2))
        for one in (staying, going):
            one.sendall(HEALTH)
            assert one.recv(65536).startswith(b"HTTP/1.1 200 ")
        refused = stack.enter_context(connection_to(url))
        assert everything(refused).startswith(b"HTTP/1.1 503 ")
        going.sendall(closing(HEALTH[:-2]) + b"\r\n")
        everything(going)
        # The refused one has not closed its end, and is still there.
        assert exchange(url, closing(HEALTH[:-2]) + b"\r\n").startswith(b"HTTP/1.1 200 ")


def test_a_client_that_takes_nothing_of_a_whole_answer_is_given_up(artifact: Path) -> None:
    """The answer is larger than what the kernel keeps of it, and nothing else would notice."""
    nbytes = 24 * 2**20
    request = closing(b"GET /big HTTP/1.1\r\nHost: x\r\n") + b"\r\n"

    async def big() -> Response:
        return Response(bytes(nbytes))

    with serving(load(artifact), ServerSettings(send_timeout=0.3), lambda app: app.add_api_route("/big", big)) as url:
        with connection_to(url) as connection:
            connection.sendall(request)
            wait_for(lambda: has_broken(connection))
        with connection_to(url) as connection:  # one that takes it slowly gets all of it
            connection.sendall(request)
            received = 0
            while piece := connection.recv(2**20):
                received += len(piece)
                time.sleep(0.05)
        assert received > nbytes


def has_broken(connection: socket.socket) -> bool:
    """Whether the other side has reset it."""
    poll = select.poll()
    poll.register(connection, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def test_a_request_has_a_time_limit(artifact: Path, caplog: pytest.LogCaptureFixture) -> None:
    with serving(load(artifact), ServerSettings(request_timeout=1)) as url:
        listen(caplog)
        body = {**LONG, "temperature": 1, "n": 128}
        response = httpx.post(f"{url}/v1/completions", json=body, timeout=30)
        assert response.status_code == 504
        assert response.json()["error"]["code"] == "request_timeout"
        assert response.headers["x-should-retry"] == "false"
        assert response.headers["x-request-id"]
        for path, change in (
            ("completions", {}),
            ("chat/completions", {"messages": [{"role": "user", "content": "x"}]}),
        ):
            sent = {**body, **change, "stream": True}
            if change:
                del sent["prompt"]
            lines = httpx.post(f"{url}/v1/{path}", json=sent, timeout=30).text.split("\n\n")
            assert lines.pop() == ""
            assert "choices" in lines[0]
            assert (
                "the request took longer than 1 s" in json.loads(lines[-1].removeprefix("data: "))["error"]["message"]
            )
            assert "error" not in json.loads(lines[-2].removeprefix("data: "))
        wait_for(lambda: metric(url, "num_requests_running") == metric(url, "num_requests_waiting") == 0)
        assert metric(url, "request_failure_total") == 3
        assert httpx.post(f"{url}/v1/completions", json=BODY).status_code == 200
    assert [record.message for record in caplog.records if record.levelname in ("WARNING", "ERROR")] == []


@pytest.mark.parametrize("work", ["encode", "decode"])
def test_a_long_text_stops_no_other_thread(llm: LLM, work: str) -> None:
    tokenizer = llm.core.tokenizer
    assert tokenizer is not None
    ticks, stop = 0, threading.Event()

    def tick() -> None:
        nonlocal ticks
        while not stop.wait(0.001):
            ticks += 1

    thread = threading.Thread(target=tick)
    thread.start()
    before = ticks
    if work == "encode":
        tokenizer.encode("The quick brown fox jumps. " * 40_000)
    else:
        tokenizer.decode([300 + index % 700 for index in range(1_000_000)])
    during = ticks - before
    stop.set()
    thread.join()
    assert during > 20  # with the interpreter's lock held there would be one or two, at the call's ends


def test_many_tokens_are_decoded_as_few_are(llm: LLM) -> None:
    tokenizer = llm.core.tokenizer
    assert tokenizer is not None
    bare = tokenizers.Tokenizer.from_file(str(ZOO / NAME / "tokenizer.json"))
    token_ids = [index % 1000 for index in range(5000)]
    for skipped in (False, True):
        expected = bare.decode(token_ids, skip_special_tokens=skipped)
        assert tokenizer.decode(token_ids, skip_special_tokens=skipped) == expected


def test_long_texts_are_encoded_as_short_ones_are(llm: LLM) -> None:
    tokenizer = llm.core.tokenizer
    assert tokenizer is not None
    text = "Wörter, 你好 and <s> tokens. " * 400
    bare = tokenizers.Tokenizer.from_file(str(ZOO / NAME / "tokenizer.json"))
    for special in (False, True):
        expected = bare.encode(text, add_special_tokens=special).ids
        assert tokenizer.encode(text, add_special_tokens=special) == expected
    assert tokenizer.encode(text, max_length=7) == tokenizer.encode(text)[:7]
    with pytest.raises(TokenizerError, match="Unicode characters only"):
        tokenizer.encode(text + "\ud800")
