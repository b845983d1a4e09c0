"""pooling.json: how the vector of a text is made from the states of its tokens; one object, strictly read."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Literal, cast, get_args

from furiosa_llm.runtime.artifact.errors import ArtifactError
from furiosa_llm.runtime.artifact.json_reader import REBUILD, Field, parse_json

if TYPE_CHECKING:
    from furiosa_llm.runtime.artifact.reader import Artifact

POOLING_NAME = "pooling.json"

PoolingType = Literal["mean", "cls", "last"]

_MAX_NBYTES = 2**16


@dataclass(frozen=True, slots=True, kw_only=True)
class Pooling:
    """How the vector of a text is made.

    `pooling`: the mean over the text's tokens, or the state of the first (`cls`) or the last one. `normalize` gives it
    the length 1. `max_sequence_length` is the most tokens that the model is meant for, None if nothing is said.
    """

    pooling: PoolingType = "mean"
    normalize: bool = True
    max_sequence_length: int | None = None

    def to_bytes(self) -> bytes:
        """The bytes of pooling.json."""
        return (json.dumps(asdict(self), indent=1) + "\n").encode()


def pooling_of(artifact: Artifact) -> Pooling:
    """What the artifact's pooling.json says; the defaults if it has none. Raises ArtifactError for a malformed one."""
    file = artifact.companion(POOLING_NAME)
    if file is None:
        return Pooling()
    if file.entry.nbytes > _MAX_NBYTES:
        raise ArtifactError(f"{file} is longer than {_MAX_NBYTES} bytes, expected three short fields; {REBUILD}")
    return parse_pooling(file.read_bytes())


def parse_pooling(data: bytes) -> Pooling:
    """The pooling in `data`, the bytes of pooling.json; raises ArtifactError that names the field."""
    member = parse_json(data, POOLING_NAME).members(("pooling", "normalize", "max_sequence_length"))
    if not isinstance(member["normalize"].value, bool):
        member["normalize"].fail("true or false")
    return Pooling(
        pooling=cast(PoolingType, member["pooling"].choice(get_args(PoolingType))),
        normalize=member["normalize"].value,
        max_sequence_length=member["max_sequence_length"].optional(_positive),
    )


def _positive(field: Field) -> int:
    return field.integer(1)
