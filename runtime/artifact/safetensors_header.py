"""The header of a safetensors file, read with every field checked and without touching the data behind it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from furiosa_llm.runtime.artifact.errors import ArtifactError
from furiosa_llm.runtime.artifact.json_reader import REBUILD, Field, parse_json

_MAX_HEADER_NBYTES = 100_000_000
_METADATA = "__metadata__"


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredArray:
    """One array of a safetensors file: safetensors' dtype name, shape, and its bytes `[offset, offset + nbytes)`.

    `offset` counts from the start of the file.
    """

    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


def read_header(path: Path) -> dict[str, StoredArray]:
    """The arrays of the safetensors file at `path`, by name.

    Raises ArtifactError if the file ends inside its header, the header is not what safetensors says, or the arrays do
    not fill the rest of the file one after the other.
    """
    file_nbytes = path.stat().st_size
    with path.open("rb") as stream:
        header_nbytes = int.from_bytes(stream.read(8), "little")
        if file_nbytes < 8 or not 2 <= header_nbytes <= min(file_nbytes - 8, _MAX_HEADER_NBYTES):
            raise ArtifactError(
                f"{path.name}: found a safetensors header of {header_nbytes} bytes in a file of {file_nbytes} bytes, "
                f"expected one that ends within the file; {REBUILD}"
            )
        root = parse_json(stream.read(header_nbytes), f"{path.name} header")
    if not isinstance(root.value, dict):
        root.fail("an object")
    start = 8 + header_nbytes
    arrays = {name: _array(root.child(name), start) for name in root.value if name != _METADATA}
    _check_extent(path.name, arrays, start, file_nbytes)
    return arrays


def _array(field: Field, start: int) -> StoredArray:
    member = field.members(("dtype", "shape", "data_offsets"))
    offsets = member["data_offsets"].items(Field.integer)
    if len(offsets) != 2 or offsets[0] > offsets[1]:
        member["data_offsets"].fail("[begin, end] with begin at most end", f"{list(offsets)}")
    begin, end = offsets
    return StoredArray(
        dtype=member["dtype"].text(),
        shape=member["shape"].items(Field.integer),
        offset=start + begin,
        nbytes=end - begin,
    )


def _check_extent(name: str, arrays: dict[str, StoredArray], start: int, file_nbytes: int) -> None:
    position = start
    for array_name, array in sorted(arrays.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if array.offset != position:
            raise ArtifactError(
                f"{name}: tensor {array_name!r:.80} begins at byte {array.offset}, expected {position}, where the one "
                f"before it ends; {REBUILD}"
            )
        position += array.nbytes
    if position != file_nbytes:
        raise ArtifactError(
            f"{name}: found {file_nbytes} bytes, expected {position}, where the last tensor ends; {REBUILD}"
        )
