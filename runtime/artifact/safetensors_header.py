"""The header of a safetensors file, read with every field checked and without touching the data."""

from __future__ import annotations

from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path

from furiosa_llm.runtime.artifact.errors import ArtifactError
from furiosa_llm.runtime.artifact.files import open_regular, size_of
from furiosa_llm.runtime.artifact.json_reader import REBUILD, Field, parse_json

MAX_HEADER_NBYTES = 100_000_000
_METADATA = "__metadata__"
_MAX_DIMS = 65


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
    """The arrays of the safetensors file at `path`, by name; raises ArtifactError as `parse_header` does."""
    with open_regular(path) as stream:
        return parse_header(stream, path.name)


def parse_header(stream: BufferedReader, name: str, *, max_nbytes: int = MAX_HEADER_NBYTES) -> dict[str, StoredArray]:
    """The arrays of the safetensors file that is open as `stream`, by name; its header takes at most `max_nbytes`.

    Raises ArtifactError if the file ends inside its header, the header is longer than that or not what safetensors
    says, or the arrays do not fill the rest of the file one after the other.
    """
    file_nbytes = size_of(stream)
    header_nbytes = int.from_bytes(stream.read(8), "little")
    if file_nbytes < 8 or not 2 <= header_nbytes <= file_nbytes - 8:
        raise ArtifactError(
            f"{name}: found a safetensors header of {header_nbytes} bytes in a file of {file_nbytes} bytes, "
            f"expected one that ends within the file; {REBUILD}"
        )
    if header_nbytes > max_nbytes:
        raise ArtifactError(
            f"{name}: found a safetensors header of {header_nbytes} bytes, expected at most {max_nbytes} for the "
            f"tensors in it; {REBUILD}"
        )
    root = parse_json(stream.read(header_nbytes), f"{name} header")
    if not isinstance(root.value, dict):
        root.fail("an object")
    if _METADATA in root.value:
        metadata = root.child(_METADATA)
        for key in metadata.mapping():
            metadata.child(key).text()
    start = 8 + header_nbytes
    arrays = {key: _array(root.child(key), start) for key in root.value if key != _METADATA}
    _check_extent(name, arrays, start, file_nbytes)
    return arrays


def _array(field: Field, start: int) -> StoredArray:
    member = field.members(("dtype", "shape", "data_offsets"))
    offsets = member["data_offsets"].items(Field.integer)
    if len(offsets) != 2 or offsets[0] > offsets[1]:
        member["data_offsets"].fail("[begin, end] with begin at most end", f"{list(offsets)!r:.80}")
    begin, end = offsets
    return StoredArray(
        dtype=member["dtype"].text(),
        shape=member["shape"].items(Field.integer, most=_MAX_DIMS),
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
