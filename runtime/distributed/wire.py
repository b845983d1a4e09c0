"""What a head and its stages say to each other: headers of a fixed size, integers, raw tensors and checked JSON.

Nothing is ever unpickled. A message is a header and frames, whose number and sizes are compared with what the header
and the model say before anything is made of them.
"""

from __future__ import annotations

import itertools
import json
import math
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from enum import IntEnum
from importlib.metadata import version
from typing import TypeVar, get_args

import numpy as np
import numpy.typing as npt

from furiosa_llm.runtime.adapters.adapter import Adapter, key_of
from furiosa_llm.runtime.artifact.dtypes import DTYPES, Array
from furiosa_llm.runtime.artifact.errors import ArtifactError, FuriosaLLMError
from furiosa_llm.runtime.artifact.json_reader import REBUILD, Field, parse_json
from furiosa_llm.runtime.errors import ExecutionError, KernelError, StageError, UnsupportedError, WireError, WorkerError
from furiosa_llm.runtime.placement.stages import Stage
from furiosa_llm.runtime.runners.batch import Batch, Companions, Copy, Decode, Picked, Piece, Prefill, Row, WantedLogits

MAX_FRAME_NBYTES = 2**26
"""What a socket takes of one frame; a longer one is refused by its announced length, and the connection closed."""
MAX_FRAMES = 1024
"""What a message has at most: a tensor for each rank and value that crosses, and few values cross."""

_HEADER = struct.Struct("<4sHHQQII")
_MAGIC = b"fllm"
_VERSION = 1
_MAX_JSON_NBYTES = 2**20
_MAX_DIMS = 8
_WANTED: tuple[WantedLogits, ...] = get_args(WantedLogits)
_PIECE, _ROW = 7, 5
"""Integers of a piece, but for its tokens, and of a row."""

T = TypeVar("T")
Frames = list[bytes | memoryview]
"""What is sent as one message, or the end of one."""
Integers = npt.NDArray[np.int64]

_RAISED: Mapping[str, type[FuriosaLLMError]] = {
    kind.__name__: kind
    for kind in (ArtifactError, ExecutionError, KernelError, StageError, UnsupportedError, WireError, WorkerError)
}
"""The errors that a stage may raise, by name."""


class Kind(IntEnum):
    """The kinds of messages."""

    OPEN = 1
    """Head to stage: load a stage, for a session of its own. JSON."""
    READY = 2
    """Stage to head: the stage is loaded."""
    RUN = 3
    """Head to every stage: a batch. Integers."""
    TENSORS = 4
    """Stage to a later stage: what crosses for step `first` of a batch. Shapes, then a frame for each tensor."""
    RESULT = 5
    """Last stage to head: what became of a batch; `first` rows with all logits, of the type `second`."""
    ERROR = 6
    """Stage to head: the session is over, by an error. JSON."""
    PING = 7
    """Head to stage: it is still there."""
    PONG = 8
    """Stage to head: the same, with the stage's counters."""
    CLOSE = 9
    """Head to stage: the session is over."""
    ADAPTER = 10
    """Head to stage: an adapter, which batches then name by its key. JSON, then a frame for each array."""
    FORGET = 11
    """Head to stage: adapters of these keys are in no batch any more. Integers."""
    FETCH = 12
    """Stage to the head's files: bytes of one of them. Its name, then offset and length as integers."""
    DATA = 13
    """The head's files to a stage: these bytes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """A message that has arrived; `number` is a batch's."""

    kind: Kind
    session: int
    number: int = 0
    first: int = 0
    second: int = 0
    frames: tuple[memoryview, ...] = ()

    def frame(self, index: int = 0, *, count: int = 1) -> memoryview:
        """Frame `index` of exactly `count`."""
        if len(self.frames) != count:
            raise WireError(f"a message {self.kind.name} has {len(self.frames)} frames, expected {count}")
        return self.frames[index]


def header(kind: Kind, session: int, *, number: int = 0, first: int = 0, second: int = 0) -> bytes:
    """The first frame of a message."""
    return _HEADER.pack(_MAGIC, _VERSION, kind, session, number, first, second)


def parse_message(frames: Sequence[memoryview]) -> Message:
    """The message that `frames` are; raises WireError if they are none."""
    if not frames or frames[0].nbytes != _HEADER.size:
        raise WireError(f"a message begins with {frames[0].nbytes if frames else 0} bytes, expected {_HEADER.size}")
    magic, protocol, kind, session, number, first, second = _HEADER.unpack(frames[0])
    if magic != _MAGIC or protocol != _VERSION:
        raise WireError(f"a message of another protocol or version: {magic!r} {protocol}, expected {_VERSION}")
    try:
        known = Kind(kind)
    except ValueError:
        raise WireError(f"a message of the unknown kind {kind}") from None
    return Message(kind=known, session=session, number=number, first=first, second=second, frames=tuple(frames[1:]))


# -- JSON ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Opening:
    """What a stage is to load and to keep to. `addresses` are those of all stages, `hosts` their names for messages."""

    head: int
    """A number that the head has chosen for itself: it may replace its own session, and nobody else's."""
    folder: str
    """Where the artifact is on the stage's host; or the cache that it is copied into, if there is a `source`."""
    source: str | None
    """The address of the head's files."""
    digest: str
    version: str
    stages: tuple[Stage, ...]
    stage: int
    addresses: tuple[str, ...]
    hosts: tuple[str, ...]
    slots_per_group: int
    max_length: int
    compute: str | None
    mapped: bool
    separate: bool
    verify: bool
    """Whether the digests of the tensors that the stage reads are compared."""
    companions: Companions
    max_step_nbytes: int | None


def opening_json(opening: Opening) -> bytes:
    """What `parse_opening` reads."""
    return json.dumps(asdict(opening)).encode()


def parse_opening(data: memoryview) -> Opening:
    """The opening in a frame; raises WireError for what is none."""

    def read(root: Field) -> Opening:
        member = root.members([field.name for field in fields(Opening)])
        return Opening(
            head=member["head"].integer(),
            folder=member["folder"].name(),
            source=member["source"].optional(Field.name),
            digest=member["digest"].name(),
            version=member["version"].name(),
            stages=member["stages"].items(_stage, most=1024),
            stage=member["stage"].integer(),
            addresses=member["addresses"].items(Field.name, most=1024),
            hosts=member["hosts"].items(Field.name, most=1024),
            slots_per_group=member["slots_per_group"].integer(1),
            max_length=member["max_length"].integer(1),
            compute=member["compute"].optional(Field.name),
            mapped=_switch(member["mapped"]),
            separate=_switch(member["separate"]),
            verify=_switch(member["verify"]),
            companions=_companions(member["companions"]),
            max_step_nbytes=member["max_step_nbytes"].optional(lambda field: field.integer(1)),
        )

    opening = _parsed(data, "an opening", read)
    count = len(opening.stages)
    if not opening.stage < count == len(opening.addresses) == len(opening.hosts):
        raise WireError(
            f"an opening of stage {opening.stage} has {count} stages, {len(opening.addresses)} addresses and "
            f"{len(opening.hosts)} hosts"
        )
    return opening


def stage_name(opening: Opening) -> str:
    """What messages call the stage."""
    return f"stage {opening.stage} on {opening.hosts[opening.stage]}"


def error_json(error: Exception) -> bytes:
    """What `parse_error` reads."""
    return json.dumps({"kind": type(error).__name__, "text": str(error)}).encode()[:_MAX_JSON_NBYTES]


def parse_error(data: memoryview) -> tuple[str, str]:
    """The name of an error's type, and its text."""

    def read(root: Field) -> tuple[str, str]:
        member = root.members(("kind", "text"))
        return member["kind"].name(), member["text"].text()

    return _parsed(data, "an error", read)


def _parsed(data: memoryview, what: str, read: Callable[[Field], T]) -> T:
    if data.nbytes > _MAX_JSON_NBYTES:
        raise WireError(f"{what} of {data.nbytes} bytes, expected at most {_MAX_JSON_NBYTES}")
    try:
        return read(parse_json(bytes(data), what))
    except ArtifactError as error:
        raise WireError(str(error).removesuffix(f"; {REBUILD}")) from error


def _stage(field: Field) -> Stage:
    names = [one.name for one in fields(Stage)]
    return Stage(**{name: member.integer() for name, member in field.members(names).items()})


def _companions(field: Field) -> Companions:
    member = field.members(("lone", "doubled", "apart"))
    return Companions(
        lone=_switch(member["lone"]), doubled=member["doubled"].items(Field.name), apart=_switch(member["apart"])
    )


def _switch(field: Field) -> bool:
    if not isinstance(field.value, bool):
        field.fail("true or false")
    return field.value is True


# -- batches -------------------------------------------------------------------------------------------------------


def batch_bytes(batch: Batch, picks: Sequence[bool]) -> bytes:
    """What `parse_batch` reads; `picks` says for each row of logits whether its likeliest token is enough."""
    copies = [number for copy in batch.copies for number in (copy.source, copy.target, copy.length)]
    if isinstance(batch, Prefill):
        left = iter(picks)
        numbers = []
        for one in batch.pieces:
            pick = any(itertools.islice(left, len(one.wanted)))
            numbers += [one.sequence_id, one.slot, one.start, _WANTED.index(one.logits), key_of(one.adapter), pick]
            numbers.append(len(one.tokens))
        tokens = [token for piece in batch.pieces for token in piece.tokens]
        body = [0, batch.group, len(batch.copies), len(batch.pieces), *copies, *numbers, *tokens]
    else:
        rows = zip(batch.rows, picks, strict=True)
        numbers = [n for row, pick in rows for n in (row.sequence_id, row.start, row.token, key_of(row.adapter), pick)]
        body = [1, batch.group, len(batch.copies), len(batch.rows), *copies, *numbers]
    return np.array(body, dtype=np.int64).tobytes()


def parse_batch(data: memoryview, adapters: Mapping[int, Adapter]) -> tuple[Batch, tuple[bool, ...]]:
    """The batch in a frame, and its picks; raises WireError for what is none."""
    numbers = integers(data).tolist()
    if len(numbers) < 4:
        raise WireError(f"a batch of {len(numbers)} integers")
    kind, group, num_copies, count = numbers[:4]
    is_prefill = kind == 0
    start = 4 + 3 * num_copies
    tokens = start + (_PIECE if is_prefill else _ROW) * count  # where those of a prefill begin
    if kind not in (0, 1) or min(numbers[:4]) < 0 or count < 1 or len(numbers) < tokens:
        raise WireError(f"a batch of kind {kind} with {num_copies} copies and {count} parts in {len(numbers)} integers")
    parts = [numbers[at : at + (tokens - start) // count] for at in range(start, tokens, (tokens - start) // count)]
    sizes = [part[-1] for part in parts] if is_prefill else []
    if (is_prefill and min(sizes) < 1) or len(numbers) != tokens + sum(sizes):
        raise WireError(f"a batch of kind {kind} with {count} parts and {sizes} tokens in {len(numbers)} integers")
    triples = [numbers[at : at + 3] for at in range(4, start, 3)]
    copies = tuple(Copy(source=source, target=target, length=length) for source, target, length in triples)
    if is_prefill:
        return _prefill(group, copies, parts, numbers[tokens:], adapters)
    rows = tuple(
        Row(sequence_id=sequence, start=past, token=token, adapter=_adapter(key, adapters))
        for sequence, past, token, key, _ in parts
    )
    return Decode(group=group, copies=copies, rows=rows), tuple(bool(part[4]) for part in parts)


def _prefill(
    group: int,
    copies: tuple[Copy, ...],
    parts: Sequence[Sequence[int]],
    tokens: Sequence[int],
    adapters: Mapping[int, Adapter],
) -> tuple[Prefill, tuple[bool, ...]]:
    pieces: list[Piece] = []
    picks: list[bool] = []
    end = 0
    for sequence, slot, past, wanted, key, pick, size in parts:
        if wanted not in range(len(_WANTED)):
            raise WireError(f"a prefill that wants the logits {wanted}")
        first, end = end, end + size
        piece = Piece(
            sequence_id=sequence,
            slot=slot,
            start=past,
            tokens=tuple(tokens[first:end]),
            logits=_WANTED[wanted],
            adapter=_adapter(key, adapters),
        )
        pieces.append(piece)
        picks += [bool(pick)] * len(piece.wanted)
    return Prefill(group=group, copies=copies, pieces=tuple(pieces)), tuple(picks)


def num_rows(batch: Batch) -> int:
    """The rows of logits that `batch` gives."""
    if isinstance(batch, Decode):
        return len(batch.rows)
    return sum(len(piece.wanted) for piece in batch.pieces)


def integers(data: memoryview) -> Integers:
    """The integers in a frame."""
    if data.nbytes % 8:
        raise WireError(f"{data.nbytes} bytes are no integers of 8 bytes")
    return np.frombuffer(data, dtype=np.int64)


def _adapter(key: int, adapters: Mapping[int, Adapter]) -> Adapter | None:
    if key and key not in adapters:
        raise WireError(f"a batch names the adapter {key}, which was not sent")
    return adapters[key] if key else None


# -- tensors -------------------------------------------------------------------------------------------------------


def tensor_frames(arrays: Sequence[Array]) -> Frames:
    """Shapes, then the tensors."""
    shapes = [number for array in arrays for number in (array.ndim, *array.shape)]
    return [np.array(shapes, dtype=np.int64).tobytes(), *(_raw(array) for array in map(np.atleast_1d, arrays))]


def parse_tensors(frames: Sequence[memoryview], types: Sequence[npt.DTypeLike]) -> list[Array]:
    """As many arrays as there are `types`, over the frames' memory; raises WireError if the frames are not these."""
    if len(frames) != len(types) + 1:
        raise WireError(f"{len(frames) - 1} tensors, expected {len(types)}")
    shapes = iter(integers(frames[0]).tolist())
    found = []
    for data, kind in zip(frames[1:], types, strict=True):
        dims = next(shapes, -1)
        shape = tuple(itertools.islice(shapes, dims)) if 0 <= dims <= _MAX_DIMS else ()
        nbytes = math.prod(shape) * np.dtype(kind).itemsize
        if len(shape) != dims or min(shape, default=0) < 0 or nbytes != data.nbytes:
            raise WireError(f"a tensor of {data.nbytes} bytes with the shape {shape}, expected {nbytes} bytes")
        found.append(np.frombuffer(data, dtype=kind).reshape(shape))
    return found


def result_message(session: int, number: int, logits: Array, picks: Sequence[bool], dtype: str) -> Frames:
    """A message RESULT: of rows of `picks` the likeliest token and its logit, of others all logits."""
    picked = np.array(picks, dtype=np.bool_)
    kept = logits if not picked.any() else np.ascontiguousarray(logits[~picked])
    frames: Frames = [header(Kind.RESULT, session, number=number, first=len(kept), second=list(DTYPES).index(dtype))]
    if picked.any():
        rows = logits[picked].astype(np.float32)
        tokens = rows.argmax(axis=1).astype(np.int32)
        frames.append(tokens.tobytes() + np.take_along_axis(rows, tokens[:, None], axis=1).tobytes())
    if len(kept):
        frames.append(_raw(kept))
    return frames


def _raw(array: Array) -> memoryview:
    return np.ascontiguousarray(array).view(np.uint8).reshape(-1).data


def parse_result(message: Message, picks: Sequence[bool]) -> Picked:
    """What `result_message` has made of a batch with these `picks`; raises WireError if it cannot be that."""
    picked, kept = sum(picks), len(picks) - sum(picks)
    if message.first != kept or message.second >= len(DTYPES):
        raise WireError(f"a result with the logits of {message.first} rows, expected {kept}")
    frames = [message.frame(index, count=(picked > 0) + (kept > 0)) for index in range((picked > 0) + (kept > 0))]
    tokens = frames.pop(0) if picked else memoryview(b"")
    if tokens.nbytes != 8 * picked:
        raise WireError(f"{tokens.nbytes} bytes for the likeliest tokens of {picked} rows, expected {8 * picked}")
    dtype = np.dtype(list(DTYPES.values())[message.second].numpy)
    width, left = divmod(frames[0].nbytes, kept * dtype.itemsize) if kept else (0, 0)
    if left:
        raise WireError(f"{frames[0].nbytes} bytes are no logits of {kept} rows")
    return Picked(
        rows=tuple(picks),
        tokens=np.frombuffer(tokens[: 4 * picked], dtype=np.int32),
        greatest=np.frombuffer(tokens[4 * picked :], dtype=np.float32),
        logits=np.frombuffer(frames[0] if kept else b"", dtype=dtype).reshape(kept, width),
    )


# -- adapters ------------------------------------------------------------------------------------------------------


def adapter_frames(adapter: Adapter) -> Frames:
    """What `parse_adapter` reads."""
    arrays = {name: np.ascontiguousarray(array) for name, array in adapter.arrays.items()}
    kinds = {np.dtype(kind.numpy): name for name, kind in DTYPES.items()}
    types = {name: kinds[array.dtype] for name, array in arrays.items()}
    description = json.dumps({"key": adapter.key, "name": adapter.name, "types": types}).encode()
    return [description, *tensor_frames(list(arrays.values()))]


def parse_adapter(frames: Sequence[memoryview]) -> Adapter:
    """The adapter in frames; raises WireError if they are none."""

    def read(root: Field) -> tuple[int, str, dict[str, str]]:
        member = root.members(("key", "name", "types"))
        types = {name: member["types"].child(name).choice(list(DTYPES)) for name in member["types"].mapping()}
        return member["key"].integer(1), member["name"].name(), types

    key, name, types = _parsed(frames[0] if frames else memoryview(b""), "an adapter", read)
    arrays = parse_tensors(frames[1:], [DTYPES[kind].numpy for kind in types.values()])
    return Adapter(key=key, name=name, arrays=dict(zip(types, arrays, strict=True)))


def package_version() -> str:
    """What both ends must have alike: this package, and what decides which bits a stage computes."""
    return f"{version('furiosa-llm-onnx')}+onnxruntime.{version('onnxruntime')}"


def error_of(kind: str, text: str) -> FuriosaLLMError:
    """The error that a stage has sent: of its own type if that is one that a stage may raise."""
    return _RAISED.get(kind, WorkerError)(text if kind in _RAISED else f"{kind}: {text}")
