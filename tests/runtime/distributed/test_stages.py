"""Stages behind sockets: the bits of stages in one process, what crosses, what is read, and every way to lose one."""

from __future__ import annotations

import dataclasses
import os
import shutil
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import pytest
import zmq

from benchmarks.cluster import server
from furiosa_llm.runtime.adapters.adapter import Adapter
from furiosa_llm.runtime.artifact.dtypes import Array
from furiosa_llm.runtime.artifact.errors import ArtifactError, FuriosaLLMError
from furiosa_llm.runtime.artifact.layout import Mesh
from furiosa_llm.runtime.artifact.reader import Artifact
from furiosa_llm.runtime.distributed import remote_runner, stage_server
from furiosa_llm.runtime.distributed.link import Link, receive
from furiosa_llm.runtime.distributed.remote_runner import RemoteRunner
from furiosa_llm.runtime.distributed.stage_server import StageServer
from furiosa_llm.runtime.distributed.wire import (
    Kind,
    batch_bytes,
    header,
    opening_json,
    parse_error,
    parse_message,
    tensor_frames,
)
from furiosa_llm.runtime.errors import ExecutionError, StageError, UnsupportedError, WireError, WorkerError
from furiosa_llm.runtime.execution.counters import stage_counts
from furiosa_llm.runtime.placement.stages import choose_stages
from furiosa_llm.runtime.runners.batch import Copy, Decode, Piece, Prefill, Row, Runner
from furiosa_llm.runtime.runners.loaded_model import load_model
from furiosa_llm.runtime.runners.local_runner import Host
from tests.support.runtime.blocks import llama_blocks
from tests.support.runtime.models import LlamaSize
from tests.support.runtime.stages import ANY_PORT, TOKEN, opening_of, running, serving_stages
from tests.support.tiers import tiered

SIZE = LlamaSize(layers=4)
PROMPTS = ((3, 1, 4), (1, 5, 9, 2, 6), (5,))
DEADLINE = 60


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return llama_blocks(Mesh((2, 2)), SIZE, tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def servers() -> Iterator[list[StageServer]]:
    with serving_stages(4) as found:
        yield found


@pytest.fixture
def two(artifact: Artifact, servers: list[StageServer]) -> Iterator[RemoteRunner]:
    with running(opening_of(artifact, addresses(servers, 2))) as runner:
        yield runner


def addresses(servers: list[StageServer], count: int) -> list[str]:
    return [server.address for server in servers[:count]]


def decode(token: int = 1, start: int = 0, group: int = 0) -> Decode:
    return Decode(group=group, copies=(), rows=(Row(sequence_id=0, start=start, token=token),))


def prefill(tokens: tuple[int, ...], *, slot: int = 0, start: int = 0, group: int = 0) -> Prefill:
    piece = Piece(sequence_id=slot, slot=slot, start=start, tokens=tokens, logits="all")
    return Prefill(group=group, copies=(), pieces=(piece,))


def results(runner: Runner, group: int) -> list[Array]:
    """Three prompts in pieces, steps of all three together, and one that begins with another one's cache."""
    found: list[Array] = []
    for slot, prompt in enumerate(PROMPTS):
        for start in range(0, len(prompt), 3):
            batch = prefill(prompt[start : start + 3], slot=slot, start=start, group=group)
            found.append(runner.submit(batch).result(DEADLINE).copy())
    for step in range(3):
        rows = tuple(Row(sequence_id=s, start=len(p) + step, token=step + s) for s, p in enumerate(PROMPTS))
        found.append(runner.submit(Decode(group=group, copies=(), rows=rows)).result(DEADLINE).copy())
    batch = dataclasses.replace(
        prefill((7, 8), slot=3, start=4, group=group), copies=(Copy(source=1, target=3, length=4),)
    )
    found.append(runner.submit(batch).result(DEADLINE).copy())
    return found


# -- the same as in one process ------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", tiered([1, 2, 3, 4], [3]))
def test_the_bits_of_stages_in_one_process(count: int, artifact: Artifact, servers: list[StageServer]) -> None:
    with Host(artifact, choose_stages(artifact, pipeline_parallel_size=count), threads=2) as host:
        local = host.runner(slots_per_group=4)
        expected = results(local, 0)
        local.close()
    with running(opening_of(artifact, addresses(servers, count))) as runner:
        assert runner.num_groups == count
        for group in range(count):
            found = results(runner, group)
            assert len(found) == len(expected)
            assert all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))


def test_groups_under_way_at_once_do_not_mix(two: RemoteRunner) -> None:
    apart = [two.submit(decode(token, group=0)).result(DEADLINE).copy() for token in (3, 4)]
    together = [two.submit(decode(token, group=group)) for group, token in enumerate((3, 4))]
    assert all(np.array_equal(a, b.result(DEADLINE)) for a, b in zip(apart, together, strict=True))


@pytest.mark.parametrize("picks", [(True, True, True), (False, True, False), (False, False, False)])
def test_of_a_greedy_row_the_likeliest_token_comes_back(picks: tuple[bool, ...], two: RemoteRunner) -> None:
    batch = Decode(group=0, copies=(), rows=tuple(Row(sequence_id=s, start=0, token=s + 3) for s in range(3)))
    logits = two.submit(batch).result(DEADLINE)
    found = two.submit_picking(batch, picks).result(DEADLINE)
    assert found.rows == picks
    assert len(found.tokens) == len(found.greatest) == sum(picks)
    for row, pick in enumerate(picks):
        place = found.place(row)
        if pick:
            assert found.tokens[place] == logits[row].argmax()
            assert found.greatest[place] == logits[row].max()
        else:
            assert np.array_equal(found.logits[place], logits[row])


def test_one_value_of_the_hidden_size_crosses(artifact: Artifact, servers: list[StageServer]) -> None:
    """In this export the addition is in one op with the norm, so that sum and residual cross: two values."""
    with running(opening_of(artifact, addresses(servers, 2))) as runner:
        for start in range(3):
            runner.submit_picking(decode(start=start), (True,)).result(DEADLINE)
        wait_for(lambda: stage_counts(runner.counts())[1].runs == 3)
        sent = stage_counts(runner.counts())[1].transfers[-1]
    assert (sent.kind, sent.calls, sent.nbytes) == ("Send", 3, 3 * 2 * SIZE.hidden * 4)


def test_a_stage_reads_its_own_windows_alone(artifact: Artifact, tmp_path: Path) -> None:
    """With other bytes in every window that only the other stage reads, a stage gives what it gave."""
    stages = choose_stages(artifact, pipeline_parallel_size=2)
    names = []
    for stage in range(2):
        (program,) = load_model(artifact, stages, lanes=1, threads=1, only=stage).programs
        stored = {tensor.name for tensor in program.graph.model.graph.initializer}
        names.append(stored & artifact.tensors.keys())
    own = sum(stage.weight_nbytes for stage in stages[1:])
    assert sum(artifact.tensors[name].local_nbytes for name in names[1]) <= 1.05 * own
    copies = []
    for stage in range(2):
        copies.append(tmp_path / str(stage))
        shutil.copytree(artifact.folder, copies[-1])
        for name in names[1 - stage] - names[stage]:
            window = artifact.window(name, 0)
            with (copies[-1] / window.file).open("r+b") as file:
                file.seek(window.offset)
                file.write(b"\xff" * window.nbytes * artifact.manifest.mesh.parts(artifact.tensors[name].shard_axes))
    with serving_stages(2) as servers:
        opening = opening_of(artifact, addresses(servers, 2))
        with running(opening) as runner:
            expected = results(runner, 0)
        with running(opening, folders=copies) as runner:
            found = results(runner, 0)
        with (
            pytest.raises(ArtifactError, match=r"stage (0 on host0|1 on host1): .* was altered in the tensor .*"),
            running(dataclasses.replace(opening, verify=True), folders=copies[::-1]),
        ):
            pass
        with running(dataclasses.replace(opening, verify=True), folders=copies) as runner:
            runner.submit(decode()).result(DEADLINE)
    assert all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


# -- faults --------------------------------------------------------------------------------------------------------


def noticed(runner: RemoteRunner, act: Callable[[], None]) -> tuple[Exception, float]:
    """The runner's failure by `act`, and the seconds until it is noticed."""
    failures: list[Exception] = []
    failed = threading.Event()

    def on_failure(error: Exception) -> None:
        failures.append(error)
        failed.set()

    runner.watch(on_failure)
    started = time.monotonic()
    act()
    assert failed.wait(DEADLINE)
    return failures[0], time.monotonic() - started


def test_a_stage_that_answers_no_more_and_one_that_ends(artifact: Artifact, servers: list[StageServer]) -> None:
    """Stopped, it is a host behind a cut cable; then it comes back, and then it is killed."""
    with server(os.sched_getaffinity(0), TOKEN) as (process, address):
        opening = opening_of(artifact, [servers[0].address, address])
        with running(opening) as runner:
            waiting = [Future[Array]()]

            def stop() -> None:
                process.send_signal(signal.SIGSTOP)
                waiting[0] = runner.submit(decode())

            error, seconds = noticed(runner, stop)
            assert isinstance(error, StageError)
            assert str(error).startswith("stage 1 on host1 is lost")
            assert seconds < 3.5  # 2.5 on a quiet machine
            with pytest.raises(StageError, match="stage 1 on host1 is lost"):
                waiting[0].result(DEADLINE)
            with pytest.raises(StageError, match="stage 1 on host1 is lost"):
                runner.submit(decode()).result(DEADLINE)
        process.send_signal(signal.SIGCONT)
        with running(opening) as runner:
            runner.submit(decode()).result(DEADLINE)
            error, seconds = noticed(runner, process.kill)
            assert isinstance(error, StageError)
            assert "stage 1 on host1" in str(error)
            assert seconds < 1


def test_a_stage_that_is_not_there(
    artifact: Artifact, servers: list[StageServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote_runner, "CONNECT_SECONDS", 0.3)
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        opening = opening_of(artifact, [servers[0].address, f"tcp://127.0.0.1:{bound.getsockname()[1]}"])
        with pytest.raises(StageError, match=r"stage 1 on host1 does not answer at tcp://127\.0\.0\.1:\d+; is it"):
            RemoteRunner([opening, dataclasses.replace(opening, stage=1)], TOKEN, load_seconds=60)


def test_another_token_is_refused_in_the_handshake(artifact: Artifact, servers: list[StageServer]) -> None:
    with (
        pytest.raises(StageError, match="stage 0 on host0 refuses the token: it was started with another one"),
        running(opening_of(artifact, addresses(servers, 1)), token=TOKEN + "!"),
    ):
        pass


def test_a_refusal_that_comes_before_anything_is_sent(
    artifact: Artifact, servers: list[StageServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = RemoteRunner._open

    def late(runner: RemoteRunner, load_seconds: float) -> None:
        for link in runner._links:
            link.socket.sndtimeo = 5000
            while link.socket.poll(10, zmq.POLLOUT):
                pass
        opened(runner, load_seconds)

    monkeypatch.setattr(RemoteRunner, "_open", late)
    with (
        pytest.raises(StageError, match="stage 0 on host0 refuses the token"),
        running(opening_of(artifact, addresses(servers, 1)), token=TOKEN + "!"),
    ):
        pass


@pytest.mark.parametrize("token", ["short", "x" * 256])
def test_a_token_has_a_length(token: str) -> None:
    with pytest.raises(UnsupportedError, match=f"a token of {len(token)} bytes; give one of 16 to 255"):
        StageServer(ANY_PORT, token)


def test_an_address_of_another_host() -> None:
    with pytest.raises(StageError, match=r"nothing can be bound to tcp://192\.0\.2\.1:0: .*; give an address of this"):
        StageServer("tcp://192.0.2.1:0", TOKEN)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"digest": "0" * 64}, ArtifactError, r"stage 0 on host0: .* is another artifact than the head's: digest"),
        ({"version": "0.0.1"}, StageError, r"stage 0 on host0 has furiosa-llm-onnx .*, and its head 0\.0\.1; install"),
        ({"folder": "/nowhere"}, ArtifactError, "no artifact at /nowhere"),
        ({"slots_per_group": 0}, WireError, "slots_per_group: found 0, expected an integer of at least 1"),
        ({"hosts": ()}, WireError, "an opening of stage 0 has 1 stages, 1 addresses and 0 hosts"),
    ],
)
def test_what_a_stage_does_not_load(
    changed: dict[str, object],
    error: type[FuriosaLLMError],
    message: str,
    artifact: Artifact,
    servers: list[StageServer],
) -> None:
    opening = opening_of(artifact, addresses(servers, 1))
    if "hosts" in changed:
        found = answer(servers[0], [header(Kind.OPEN, 5), opening_json(dataclasses.replace(opening, hosts=()))])
        assert found[0] is Kind.ERROR
        assert found[1][0] == "WireError"
        assert message in found[1][1]
        return
    with pytest.raises(error, match=message), running(opening_of(artifact, addresses(servers, 1), **changed)):
        pass


def test_a_stage_has_one_head_at_a_time(
    artifact: Artifact, servers: list[StageServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    opening = opening_of(artifact, addresses(servers, 1))
    with running(opening) as runner:
        runner.submit(decode()).result(DEADLINE)
        other = dataclasses.replace(opening, head=2)
        with pytest.raises(StageError, match="stage 0 on host0 has another head; end that one, or wait 10 s"):
            RemoteRunner([other], TOKEN, load_seconds=60)
        runner.submit(decode(start=1)).result(DEADLINE)
        monkeypatch.setattr(remote_runner, "_PING_SECONDS", 60.0)
        time.sleep(0.1)
        monkeypatch.setattr(stage_server, "HEAD_SECONDS", 0.0)  # its head has ended
        time.sleep(1.0)
        with running(other) as second:
            second.submit(decode()).result(DEADLINE)


def test_a_step_that_fails_ends_the_session_alone(two: RemoteRunner, artifact: Artifact) -> None:
    with pytest.raises(ExecutionError, match=r"^stage 0 on host0: segment \d+ failed on rank"):
        two.submit(decode(token=10**6)).result(DEADLINE)
    with pytest.raises(ExecutionError):
        two.submit(decode()).result(DEADLINE)


def test_a_closed_runner_runs_nothing(artifact: Artifact, servers: list[StageServer]) -> None:
    with running(opening_of(artifact, addresses(servers, 1))) as runner:
        assert "stage 0 on host0 answered" in runner.progress()
    with pytest.raises(WorkerError, match="the runner is closed"):
        runner.submit(decode()).result(DEADLINE)


# -- what is no message --------------------------------------------------------------------------------------------


def answer(server: StageServer, *messages: Sequence[bytes | memoryview]) -> tuple[Kind, tuple[str, str]]:
    """What `server` answers to the last of `messages` of a peer that has the token, if that is an error."""
    context = zmq.Context()
    link = Link(context, server.address, TOKEN, "the server")
    try:
        for message in messages:
            link.socket.send_multipart(message)
            assert link.socket.poll(10_000)
            found = parse_message(receive(link.socket))
        return found.kind, parse_error(found.frame()) if found.kind is Kind.ERROR else ("", "")
    finally:
        link.close()
        context.term()


RUN = header(Kind.RUN, 9, number=1)


@pytest.mark.parametrize(
    ("message", "error"),
    [
        ([RUN], "a message RUN has 0 frames, expected 1"),
        ([RUN, b"", b""], "a message RUN has 2 frames, expected 1"),
        ([RUN, b"123"], "3 bytes are no integers of 8 bytes"),
        ([RUN, b"12345678"], "a batch of 1 integers"),
        ([RUN, np.array([1, 0, 0, 2**62], np.int64).tobytes()], "a batch of kind 1 with 0 copies and 4611"),
        ([RUN, np.array([1, 0, -1, 1], np.int64).tobytes()], "a batch of kind 1 with -1 copies and 1 parts"),
        ([RUN, batch_bytes(decode(group=1), (True,))], "a batch of group 1, slots 0 to 0 and 1 positions, of 1 groups"),
        (
            [RUN, batch_bytes(decode(start=2**40), (True,))],
            "and 1099511627777 positions, of 1 groups of 4 slots with 64",
        ),
        ([RUN, batch_bytes(prefill((1,), slot=4), (False,))], "slots 4 to 4 and 1 positions"),
        ([RUN, batch_bytes(prefill((1,), start=-1), (False,))], "slots 0 to 0 and 0 positions"),
        (
            [RUN, batch_bytes(dataclasses.replace(prefill((1,)), pieces=prefill((1,)).pieces * 9), (False,) * 9)],
            "slots 0 to 0",
        ),
        (
            [RUN, batch_bytes(dataclasses.replace(decode(), copies=(Copy(source=9, target=0, length=1),)), (True,))],
            "slots 0 to 9",
        ),
        (
            [
                RUN,
                batch_bytes(Decode(group=0, copies=(), rows=(Row(sequence_id=0, start=0, token=1),) * 5), (True,) * 5),
            ],
            "slots 0 to 4",
        ),
        (
            [
                RUN,
                batch_bytes(prefill((1,)), (False,)).replace(np.int64(2).tobytes(), np.int64(7).tobytes(), 1),
            ],
            "a prefill that wants the logits 7",
        ),
        ([header(Kind.TENSORS, 9), *tensor_frames([])], "tensors of stage 0, of which stage 0 gets none"),
        ([header(Kind.RESULT, 9)], "a stage takes no message RESULT"),
        ([header(Kind.ADAPTER, 9), b"[]"], "an adapter $: found a list, expected an object"),
        ([header(Kind.ADAPTER, 9), b"{" * 2000], "an adapter is not whole UTF-8 JSON"),
        ([header(Kind.FORGET, 9), b"1"], "1 bytes are no integers of 8 bytes"),
        ([header(Kind.OPEN, 5), b"x" * (2**20 + 1)], "an opening of 1048577 bytes, expected at most 1048576"),
    ],
)
def test_a_message_that_is_none_is_refused(
    message: Sequence[bytes | memoryview], error: str, artifact: Artifact, servers: list[StageServer]
) -> None:
    opening = opening_of(artifact, addresses(servers, 1))
    kind, found = answer(servers[0], [header(Kind.OPEN, 9), opening_json(opening)], message)
    assert (kind, found[0]) == (Kind.ERROR, "WireError")
    assert error in found[1]
    with running(opening) as runner:
        runner.submit(decode()).result(DEADLINE)


def test_a_batch_names_an_adapter_that_was_not_sent(artifact: Artifact, servers: list[StageServer]) -> None:
    adapted = Decode(
        group=0, copies=(), rows=(Row(sequence_id=0, start=0, token=1, adapter=Adapter(key=3, name="a", arrays={})),)
    )
    opening = opening_of(artifact, addresses(servers, 1))
    found = answer(servers[0], [header(Kind.OPEN, 9), opening_json(opening)], [RUN, batch_bytes(adapted, (True,))])
    assert found == (Kind.ERROR, ("WireError", "a batch names the adapter 3, which was not sent"))


def test_tensors_of_other_shapes_are_refused(artifact: Artifact, servers: list[StageServer]) -> None:
    opening = dataclasses.replace(opening_of(artifact, addresses(servers, 2)), stage=1)
    opened = [header(Kind.OPEN, 9), opening_json(opening)]
    right = np.zeros((1, 1, SIZE.hidden), np.float32)
    for arrays, message in (
        ([right], "1 tensors, expected 2"),
        (
            [right, right[..., 1:]],
            f"has the shape (1, 1, {SIZE.hidden - 1}), expected ('batch', 'sequence', {SIZE.hidden})",
        ),
        ([right, right[0]], f"has the shape (1, {SIZE.hidden}), expected"),
    ):
        _, (kind, text) = answer(servers[0], opened, [header(Kind.TENSORS, 9), *tensor_frames(arrays)])
        assert kind == "WireError"
        assert message in text
    frames = tensor_frames([right, right])
    for shapes in ([], [3, 1, 1], [3, 1, 1, 64, 3, 1, 1, -64], [3, 1, 1, 64, 3, 1, 1, 65], [99, *[1] * 99]):
        wrong = [header(Kind.TENSORS, 9), np.array(shapes, np.int64).tobytes(), *frames[1:]]
        assert "a tensor of 256 bytes with the shape" in answer(servers[0], opened, wrong)[1][1]


def test_a_peer_without_the_token_is_not_listened_to(artifact: Artifact, servers: list[StageServer]) -> None:
    """Neither what is no ZeroMQ at all, nor a message of one that has another token or none, nor one without an end."""
    host, port = servers[0].address.removeprefix("tcp://").split(":")
    greeting = b"\xff" + bytes(8) + b"\x7f\x03\x00NULL" + bytes(16 + 1 + 31)
    for data in (b"GET / HTTP/1.1\r\n\r\n", bytes(64), b"\xff" * 4096, greeting + b"\x02" + b"\xff" * 8 + b"x" * 4096):
        with socket.create_connection((host, int(port)), timeout=10) as peer:
            peer.sendall(data)
    context = zmq.Context()
    plain = context.socket(zmq.DEALER)
    plain.linger = 0
    plain.connect(servers[0].address)
    plain.send_multipart([header(Kind.OPEN, 1), b"{}"])
    assert not plain.poll(200)
    plain.close()
    context.term()
    with running(opening_of(artifact, addresses(servers, 1))) as runner:
        runner.submit(decode()).result(DEADLINE)


def test_a_frame_that_is_too_long_closes_its_connection(artifact: Artifact, servers: list[StageServer]) -> None:
    opening = opening_of(artifact, addresses(servers, 1))
    with running(opening) as runner:
        context = zmq.Context()
        link = Link(context, servers[0].address, TOKEN, "the server")
        link.socket.send_multipart([RUN, bytes(2**26 + 1)])
        assert link.monitor.poll(10_000)
        wait_for(lambda: link.notice() is not None)
        link.socket.send_multipart([RUN, *[b""] * 5000])
        link.close(linger_ms=1000)
        context.term()
        runner.submit(decode()).result(DEADLINE)
