"""Checks of an artifact's weights against its digests: file by file, tensor by tensor, and original by original."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import BinaryIO

from furiosa_llm.runtime.artifact.errors import ArtifactError, FuriosaLLMError
from furiosa_llm.runtime.artifact.manifest import FileEntry
from furiosa_llm.runtime.artifact.progress import tell
from furiosa_llm.runtime.artifact.reader import Artifact
from furiosa_llm.runtime.artifact.tools.originals import padding_is_zero, read_original, read_whole
from furiosa_llm.runtime.artifact.tools.record import Check

Limit = Callable[[], None]
"""What is called before each piece of work: it raises once no more of it may be done."""
_WEIGHTS_SUFFIX = ".safetensors"
_CHUNK_NBYTES = 16 * 2**20


def check_weights(artifact: Artifact, limit: Limit) -> Check:
    """Compares the digest of every weights file and of every tensor in it; each file is read once.

    Raises ArtifactError if a file cannot be read, and whatever `limit` raises.
    """
    files = [entry for entry in artifact.manifest.files if entry.path.endswith(_WEIGHTS_SUFFIX)]
    faults: list[str] = []
    with _keeping(faults):
        for number, entry in enumerate(files):
            tell("reading all weights", number, len(files))
            faults += _file_faults(artifact, entry, limit)
    return Check(name="weights", checked=len(files) + len(artifact.manifest.tensors), faults=tuple(faults))


@contextmanager
def _keeping(faults: list[str]) -> Iterator[None]:
    """What ends the work is one more of `faults`, if there are any: it must not hide them."""
    try:
        yield
    except FuriosaLLMError as error:
        if not faults:
            raise
        faults.append(str(error))


def _file_faults(artifact: Artifact, entry: FileEntry, limit: Limit) -> Iterator[str]:
    tensors = [tensor for tensor in artifact.manifest.tensors if tensor.file == entry.path]
    tensors.sort(key=lambda tensor: (artifact.offsets[tensor.name], artifact.manifest.stored_nbytes(tensor)))
    whole = hashlib.sha256()
    try:
        with artifact.files.stream(entry.path) as file:
            for tensor in tensors:
                _update(file, entry.path, artifact.offsets[tensor.name] - file.tell(), [whole], limit)
                own = hashlib.sha256()
                _update(file, entry.path, artifact.manifest.stored_nbytes(tensor), [whole, own], limit)
                if own.hexdigest() != tensor.sha256:
                    yield _differs(f"{entry.path}: stored tensor {tensor.name!r:.80}", own.hexdigest(), tensor.sha256)
            _update(file, entry.path, entry.nbytes - file.tell(), [whole], limit)
    except OSError as error:
        raise ArtifactError(f"{artifact.folder / entry.path} cannot be read: {error.strerror}") from error
    if whole.hexdigest() != entry.sha256:
        yield _differs(entry.path, whole.hexdigest(), entry.sha256)


def _update(file: BinaryIO, name: str, nbytes: int, digests: Sequence[hashlib._Hash], limit: Limit) -> None:
    while nbytes > 0:
        limit()
        chunk = file.read(min(nbytes, _CHUNK_NBYTES))
        if not chunk:
            raise ArtifactError(f"{name} was cut short while it was read; copy the artifact again")
        for digest in digests:
            digest.update(chunk)
        nbytes -= len(chunk)


def check_originals(artifact: Artifact, limit: Limit) -> Check:
    """Puts every original together from its shards, in each layout that is stored, and compares its digest.

    `limit` is called before each, and what it raises comes through. It takes the memory of the largest original and
    some tens of megabytes.
    """
    found: dict[tuple[str, ...], str] = {}
    faults: list[str] = []
    checked = 0
    with _keeping(faults):
        for number, entry in enumerate(artifact.manifest.initializers):
            if not entry.stored:
                continue
            checked += 1
            limit()
            tell("putting the originals together", number, len(artifact.manifest.initializers))
            if entry.stored not in found:  # others may be made of the same tensors
                found[entry.stored] = hashlib.sha256(read_original(artifact, entry.name).data).hexdigest()
            if found[entry.stored] != entry.sha256:
                faults.append(_differs(f"original {entry.name!r:.80}", found[entry.stored], entry.sha256))
        digests = {entry.name: entry.sha256 for entry in artifact.manifest.initializers}
        for origin, stored in _other_layouts(artifact):
            checked += 1
            limit()
            digest = hashlib.sha256(read_whole(artifact, stored).data).hexdigest()
            if digest != digests[origin]:
                what = f"original {origin!r:.80} as {', '.join(stored)!r:.120} store it"
                faults.append(_differs(what, digest, digests[origin]))
    return Check(name="originals", checked=checked, faults=tuple(faults))


def _other_layouts(artifact: Artifact) -> Iterator[tuple[str, tuple[str, ...]]]:
    """The originals that are stored in more than one layout, and the tensors of each further one, parts in order."""
    named = {name for entry in artifact.manifest.initializers for name in entry.stored}
    parts: dict[str, list[str]] = {}
    for tensor in artifact.manifest.tensors:
        if tensor.origin is None or tensor.name in named:
            continue
        if tensor.part is None:
            yield tensor.origin, (tensor.name,)
            continue
        begun = parts.setdefault(tensor.origin, [])
        if tensor.part.start == 0 and begun:
            yield tensor.origin, tuple(begun)
            begun.clear()
        begun.append(tensor.name)
    yield from ((origin, tuple(names)) for origin, names in parts.items())


def check_padding(artifact: Artifact, limit: Limit) -> Check:
    """Whether the padding of every stored tensor is zero; `limit` is called before each, and may raise."""
    names = [tensor.name for tensor in artifact.manifest.tensors]
    faults: list[str] = []
    with _keeping(faults):
        for name in names:
            limit()
            if not padding_is_zero(artifact, name):
                faults.append(f"stored tensor {name!r:.80} has padding that is not zero")
    return Check(name="padding", checked=len(names), faults=tuple(faults))


def _differs(what: str, found: str, expected: str | None) -> str:
    return f"{what}: found sha256 {found[:16]}..., expected {(expected or 'none')[:16]}..."
