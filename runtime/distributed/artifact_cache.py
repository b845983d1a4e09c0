"""An artifact where a stage runs: only the tensors that it reads, streamed from the head into a folder that is kept.

The folder has the name of the artifact's digest and of the stage's nodes, and weights files with holes where other
stages' tensors are. A tensor counts as copied once its digest was compared; what was copied before an interruption is
not copied again.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import zmq

from furiosa_llm.runtime.artifact.errors import ArtifactError
from furiosa_llm.runtime.artifact.manifest import MANIFEST_NAME, FileEntry, StoredTensor, manifest_digest
from furiosa_llm.runtime.artifact.parse import parse_manifest
from furiosa_llm.runtime.artifact.progress import tell
from furiosa_llm.runtime.artifact.reader import Artifact, open_artifact
from furiosa_llm.runtime.artifact.temporary import replace_file
from furiosa_llm.runtime.closing import Closing
from furiosa_llm.runtime.distributed.link import Context, Doorkeeper, Link, listen, receive
from furiosa_llm.runtime.distributed.wire import (
    MAX_FRAME_NBYTES,
    Kind,
    Message,
    error_json,
    error_of,
    header,
    integers,
    parse_error,
    parse_message,
)
from furiosa_llm.runtime.errors import StageError, WireError
from furiosa_llm.runtime.placement.stages import Stage

CHUNK_NBYTES = 2**22
_ANSWER_MS = 10_000
_POLL_MS = 200
_WEIGHTS = ".safetensors"


class ArtifactSource(Closing):
    """Serves the files of `artifact` at `address` to whoever has the `token`, and no others."""

    def __init__(self, artifact: Artifact, address: str, token: str) -> None:
        self._artifact = artifact
        self._sizes = {entry.path: entry.nbytes for entry in artifact.manifest.files}
        self._sizes[MANIFEST_NAME] = (artifact.folder / MANIFEST_NAME).stat().st_size
        self.sent_nbytes = 0
        self._context: Context = zmq.Context()
        self._doorkeeper = Doorkeeper(self._context, token)
        self._socket = listen(self._context, address)
        self.address = self._socket.getsockopt_string(zmq.LAST_ENDPOINT)
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._serve, name="furiosa-source", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Sends nothing any more."""
        self._ending.set()
        self._thread.join(timeout=5)

    def _serve(self) -> None:
        while not self._ending.is_set():
            if self._socket.poll(_POLL_MS):
                sender, *frames = receive(self._socket)
                try:
                    message = parse_message(frames)
                    answer = [header(Kind.DATA, message.session, number=message.number), self._read(message)]
                except (ArtifactError, WireError) as error:
                    answer = [header(Kind.ERROR, 0), error_json(error)]
                try:
                    self._socket.send_multipart([bytes(sender), *answer], flags=zmq.NOBLOCK)
                except zmq.ZMQError:  # who asked has gone, or takes nothing
                    continue
        self._socket.close(linger=0)
        self._context.term()

    def _read(self, message: Message) -> bytes:
        name = bytes(message.frame(0, count=2)).decode("utf-8", "replace")
        place = integers(message.frame(1, count=2)).tolist()
        if message.kind is not Kind.FETCH or len(place) != 2 or name not in self._sizes:
            raise WireError(f"{name!r:.80} is no file of the artifact")
        offset, nbytes = place
        nbytes = min(nbytes, self._sizes[name] - offset, MAX_FRAME_NBYTES)
        if offset < 0 or nbytes < 0:
            raise WireError(f"{name!r:.80} has {self._sizes[name]} bytes, and none at {offset}")
        self.sent_nbytes += nbytes
        return self._artifact.files.read(name, offset, nbytes).tobytes()


Fetch = Callable[[str, int, int], memoryview]
"""`fetch(file, offset, nbytes)`: so many bytes of a file of the head's, or as many as it has from there on."""


@contextmanager
def fetching(address: str, token: str) -> Iterator[Fetch]:
    """What reads of the `ArtifactSource` at `address`; raises StageError if it does not answer."""
    context: Context = zmq.Context()
    link = Link(context, address, token, "the head")

    def fetch(name: str, offset: int, nbytes: int) -> memoryview:
        place = np.array([offset, nbytes], dtype=np.int64).tobytes()
        link.send([header(Kind.FETCH, 0), name.encode(), place])
        if not link.socket.poll(_ANSWER_MS):
            raise StageError(
                f"the head sends nothing of {name} from {address}: {link.notice() or 'it does not answer'}"
            )
        message = parse_message(receive(link.socket))
        if message.kind is Kind.ERROR:
            raise error_of(*parse_error(message.frame()))
        return message.frame()

    try:
        yield fetch
    finally:
        link.close()
        context.term()


class ArtifactCache:
    """The artifact of that `digest` in a folder below `root`, for one `stage`, of any number of replicas.

    Other stages have folders of their own: files must not be written to while a stage is loaded from them.
    """

    def __init__(self, root: Path, digest: str, stage: Stage) -> None:
        if not re.fullmatch(r"[0-9a-f]{64}", digest):
            raise WireError(f"{digest!r:.80} is no digest")
        name = f"{digest}-{stage.first_node}-{stage.stop_node}"
        self.folder = root / name
        self._journal = root / f"{name}.copied"
        self._lock = root / f"{name}.lock"
        self._digest = digest

    def fill(self, fetch: Fetch, wanted: Callable[[Artifact], Collection[str]], *, verify: bool) -> None:
        """Copies what is missing of the files and of the tensors that are `wanted`; `verify`: or was altered since.

        Raises ArtifactError for what has not its digest, and if the disk is full.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with self._lock.open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                self._copy_files(fetch)
                artifact = open_artifact(self.folder, full=False)
                self._copy_tensors(artifact, sorted(wanted(artifact)), fetch, verify)
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            what = "free some of it, or give another folder" if full else "give a folder that can be written to"
            raise ArtifactError(f"the artifact cannot be copied to {self.folder}: {error.strerror}; {what}") from error

    def _copy_files(self, fetch: Fetch) -> None:
        manifest = self.folder / MANIFEST_NAME
        if not manifest.exists() or manifest_digest(manifest.read_bytes()) != self._digest:
            data = b"".join(_chunks(fetch, MANIFEST_NAME, 0, None))
            if manifest_digest(data) != self._digest:
                raise ArtifactError(f"the head's {MANIFEST_NAME} was altered since it was opened; load it again")
            replace_file(manifest, data)
            self._journal.unlink(missing_ok=True)
        for entry in parse_manifest(manifest.read_bytes()).files:
            path = self.folder / entry.path
            if path.exists() and path.stat().st_size == entry.nbytes:
                continue
            if entry.path.endswith(_WEIGHTS):
                self._make_sparse(path, entry, fetch)
            else:
                data = b"".join(_chunks(fetch, entry.path, 0, entry.nbytes))
                _check(hashlib.sha256(data).hexdigest(), entry.sha256, entry.path)
                replace_file(path, data)

    def _make_sparse(self, path: Path, entry: FileEntry, fetch: Fetch) -> None:
        """A weights file with its header, and nothing else."""
        length = int.from_bytes(fetch(entry.path, 0, 8), "little")
        if not 0 < length <= entry.nbytes - 8:
            raise ArtifactError(f"{entry.path} of the head has a header of {length} bytes; load it again there")
        part = path.with_name(f"{path.name}.part")
        with part.open("wb") as file:
            for chunk in _chunks(fetch, entry.path, 0, length + 8):
                file.write(chunk)
            file.truncate(entry.nbytes)
        part.replace(path)
        self._journal.unlink(missing_ok=True)

    def _copy_tensors(self, artifact: Artifact, names: list[str], fetch: Fetch, verify: bool) -> None:
        copied = self._copied()
        for number, name in enumerate(names, start=1):
            tell("copying the weights", number, len(names))
            if name not in copied or (verify and not _is_whole(artifact, name)):
                self._copy_tensor(artifact, artifact.tensors[name], fetch)

    def _copied(self) -> set[str]:
        """The names in the journal, without lines that an interruption has cut off."""
        names: set[str] = set()
        for line in self._journal.read_text(encoding="utf-8").splitlines() if self._journal.exists() else ():
            with suppress(ValueError):
                names.add(str(json.loads(line)))
        return names

    def _copy_tensor(self, artifact: Artifact, tensor: StoredTensor, fetch: Fetch) -> None:
        at = artifact.offsets[tensor.name]
        nbytes = artifact.manifest.stored_nbytes(tensor)
        digest = hashlib.sha256()
        with (self.folder / tensor.file).open("r+b") as file:
            file.seek(at)
            for chunk in _chunks(fetch, tensor.file, at, nbytes):
                digest.update(chunk)
                file.write(chunk)
            file.flush()
            os.fdatasync(file.fileno())
        _check(digest.hexdigest(), tensor.sha256, f"the tensor {tensor.name!r:.80} of {tensor.file}")
        with self._journal.open("a", encoding="utf-8") as journal:
            journal.write(f"\n{json.dumps(tensor.name)}\n")  # on a line of its own, whatever was before


def _chunks(fetch: Fetch, name: str, offset: int, nbytes: int | None) -> Iterator[memoryview]:
    """`nbytes` of a file, or all of it, piece by piece; raises ArtifactError if the head has not so many."""
    done = 0
    while nbytes is None or done < nbytes:
        chunk = fetch(name, offset + done, CHUNK_NBYTES if nbytes is None else min(CHUNK_NBYTES, nbytes - done))
        if not chunk.nbytes and nbytes is not None:
            raise ArtifactError(f"{name} of the head ends after {offset + done} bytes; load it again there")
        if not chunk.nbytes:
            return
        done += chunk.nbytes
        yield chunk


def _check(found: str, expected: str, what: str) -> None:
    if found != expected:
        raise ArtifactError(
            f"{what} comes from the head with the sha256 {found[:16]}..., expected {expected[:16]}...; it was altered "
            f"there, copy the artifact again"
        )


def _is_whole(artifact: Artifact, name: str) -> bool:
    try:
        artifact.check_tensor(name)
    except ArtifactError:
        return False
    return True
