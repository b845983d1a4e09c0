"""Messages between hosts: what was written is what is read, and of anything else a typed error."""

from __future__ import annotations

import random
import socket
from collections.abc import Callable

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest

from furiosa_llm.runtime.adapters.adapter import Adapter
from furiosa_llm.runtime.artifact.errors import ArtifactError
from furiosa_llm.runtime.distributed.link import split_address, unreachable
from furiosa_llm.runtime.distributed.wire import (
    Frames,
    Kind,
    adapter_frames,
    batch_bytes,
    error_json,
    error_of,
    header,
    num_rows,
    parse_adapter,
    parse_batch,
    parse_error,
    parse_message,
    parse_opening,
    parse_result,
    parse_tensors,
    result_message,
    tensor_frames,
)
from furiosa_llm.runtime.errors import ExecutionError, UnsupportedError, WireError, WorkerError
from furiosa_llm.runtime.runners.batch import Batch, Copy, Decode, Piece, Prefill, Row

ADAPTER = Adapter(
    key=7, name="a", arrays={"x": np.arange(6, dtype=np.float16).reshape(2, 3), "y": np.zeros((0, 4), np.float32)}
)
COPIES = (Copy(source=1, target=2, length=3), Copy(source=0, target=3, length=9))
BATCHES: tuple[Batch, ...] = (
    Decode(group=0, copies=(), rows=(Row(sequence_id=5, start=0, token=-3),)),
    Decode(
        group=3,
        copies=COPIES,
        rows=(Row(sequence_id=2**40, start=7, token=9, adapter=ADAPTER), Row(sequence_id=1, start=8, token=4)),
    ),
    *(
        Prefill(
            group=1,
            copies=COPIES,
            pieces=(
                Piece(sequence_id=4, slot=2, start=6, tokens=(1, 2, 3), logits=logits, adapter=ADAPTER),
                Piece(sequence_id=5, slot=1, start=0, tokens=(4,), logits="last"),
            ),
        )
        for logits in ("none", "last", "all")
    ),
)


def views(frames: Frames) -> list[memoryview]:
    return [memoryview(bytes(frame)) for frame in frames]


@pytest.mark.parametrize("batch", BATCHES)
def test_a_batch_arrives_as_it_was_sent(batch: Batch) -> None:
    picks = tuple(index == 0 for index in range(num_rows(batch)))
    if isinstance(batch, Prefill) and batch.pieces[0].logits == "all":
        picks = (False, False, False, True)
    assert parse_batch(memoryview(batch_bytes(batch, picks)), {7: ADAPTER}) == (batch, picks)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_tensors_arrive_as_they_were_sent(dtype: npt.DTypeLike) -> None:
    arrays = [np.arange(6).astype(dtype).reshape(1, 2, 3), np.ones((0, 5), dtype), np.array(3).astype(dtype)]
    found = parse_tensors(views(tensor_frames(arrays)), [dtype] * 3)
    assert [array.shape for array in found] == [(1, 2, 3), (0, 5), ()]
    assert all(np.array_equal(a, b) for a, b in zip(found, arrays, strict=True))


def test_an_adapter_arrives_as_it_was_sent() -> None:
    found = parse_adapter(views(adapter_frames(ADAPTER)))
    assert (found.key, found.name, list(found.arrays)) == (7, "a", ["x", "y"])
    assert all(np.array_equal(found.arrays[name], array) for name, array in ADAPTER.arrays.items())


def test_a_greedy_row_comes_back_in_64_bytes() -> None:
    """With the two bytes that ZeroMQ puts before each frame."""
    logits = np.linspace(0, 1, 50_000, dtype=np.float32)[None]
    frames = views(result_message(1, 2, logits, (True,), "FLOAT"))
    assert sum(frame.nbytes + 2 for frame in frames) <= 64
    found = parse_result(parse_message(frames), (True,))
    assert (found.tokens.tolist(), found.greatest.tolist()) == ([49_999], [1.0])


def test_not_a_number_is_the_greatest() -> None:
    """As it is to the sampler, which refuses it."""
    logits = np.array([[0, np.nan, 5]], np.float32)
    found = parse_result(parse_message(views(result_message(1, 2, logits, (True,), "FLOAT"))), (True,))
    assert found.tokens.tolist() == [1]
    assert np.isnan(found.greatest[0])


@pytest.mark.parametrize(
    ("picks", "message"),
    [
        ((True, False), "a result with the logits of 2 rows, expected 1"),
        ((False,), "a result with the logits of 2 rows, expected 1"),
        ((False, False, True), "a message RESULT has 1 frames, expected 2"),
    ],
)
def test_a_result_of_another_batch(picks: tuple[bool, ...], message: str) -> None:
    frames = views(result_message(1, 2, np.zeros((2, 4), np.float32), (False, False), "FLOAT"))
    with pytest.raises(WireError, match=message):
        parse_result(parse_message(frames), picks)


@pytest.mark.parametrize(
    ("first", "message"),
    [
        (b"", "a message begins with 0 bytes, expected 32"),
        (header(Kind.RUN, 1)[:-1], "a message begins with 31 bytes"),
        (b"http" + header(Kind.RUN, 1)[4:], r"a message of another protocol or version: b'http' 1, expected 1"),
        (
            header(Kind.RUN, 1).replace(b"\x01\x00", b"\x02\x00", 1),
            "another protocol or version: b'fllm' 2, expected 1",
        ),
        (header(99, 1), "a message of the unknown kind 99"),  # type: ignore[arg-type]
    ],
)
def test_what_does_not_begin_as_a_message(first: bytes, message: str) -> None:
    with pytest.raises(WireError, match=message):
        parse_message([memoryview(first)])


def test_an_error_keeps_its_type_if_a_stage_may_raise_it() -> None:
    for error, expected in (
        (ExecutionError("a"), ExecutionError("a")),
        (ArtifactError("b"), ArtifactError("b")),
        (KeyError("c"), WorkerError("KeyError: 'c'")),
        (SystemExit("d"), WorkerError("SystemExit: d")),
    ):
        found = error_of(*parse_error(memoryview(error_json(error))))  # type: ignore[arg-type]
        assert (type(found), str(found)) == (type(expected), str(expected))


def test_of_damaged_frames_nothing_but_a_typed_error_comes() -> None:
    """Bytes of every kind of frame changed, cut off and added at random."""
    rng = random.Random(0)
    logits = np.zeros((2, 3), np.float32)
    read: list[Callable[[list[memoryview]], object]] = [
        lambda frames: parse_batch(frames[0], {7: ADAPTER}),
        lambda frames: parse_tensors(frames, [np.float32, np.float32]),
        lambda frames: parse_adapter(frames),
        lambda frames: parse_result(parse_message(frames), (True, False)),
        lambda frames: parse_opening(frames[0]),
        lambda frames: parse_error(frames[0]),
    ]
    whole: list[Frames] = [
        [batch_bytes(BATCHES[1], (True, False))],
        tensor_frames([logits, logits]),
        adapter_frames(ADAPTER),
        result_message(1, 2, logits, (True, False), "FLOAT"),
        [b'{"head": 1, "folder": "x"}'],
        [error_json(KeyError("x"))],
    ]
    refused = 0
    for _ in range(600):
        kind = rng.randrange(len(read))
        frames = [bytearray(frame) for frame in views(whole[kind])]
        frame = rng.choice(frames)
        match rng.randrange(4):
            case 0 if frame:
                frame[rng.randrange(len(frame))] = rng.randrange(256)
            case 1 if frame:
                del frame[rng.randrange(len(frame)) :]
            case 2:
                frame += rng.randbytes(rng.randrange(1, 17))
            case _:
                frames = frames[: rng.randrange(1, len(frames) + 1)] + [frame] * rng.randrange(2)
        try:
            read[kind]([memoryview(bytes(one)) for one in frames])
        except WireError:
            refused += 1
    assert refused > 200


# -- addresses -----------------------------------------------------------------------------------------------------


def test_an_address_that_nothing_listens_at() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        assert unreachable(server.getsockname(), 5.0) is None
    assert "refused" in str(unreachable(("127.0.0.1", 1), 5.0))


@pytest.mark.parametrize(
    "address", ["auto", "10.0.0.1", ":6379", "10.0.0.1:", "10.0.0.1:99999", "ray://10.0.0.1:10001"]
)
def test_what_is_no_address(address: str) -> None:
    with pytest.raises(UnsupportedError, match=rf"'{address}' is no address; give HOST:PORT, such as 10\.0\.0\.1:6379"):
        split_address(address)


def test_an_address_has_a_host_and_a_port() -> None:
    assert split_address("head.local:6379") == ("head.local", 6379)
    assert split_address("[fd00::1]:6379") == ("fd00::1", 6379)
