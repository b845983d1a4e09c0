"""Signatures of artifacts: Ed25519 over the manifest's digest, which covers every file, in a file beside the manifest.

Needs the extra `sign`.
"""

from __future__ import annotations

import base64
import binascii
import os
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from furiosa_llm.runtime.artifact.composite import is_composite, open_composite
from furiosa_llm.runtime.artifact.errors import ArtifactError, OutputFileError
from furiosa_llm.runtime.artifact.manifest import SIGNATURE_NAME
from furiosa_llm.runtime.artifact.reader import open_artifact
from furiosa_llm.runtime.artifact.temporary import replace_file
from furiosa_llm.runtime.errors import InputError, UnsupportedError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

_SIGNED = "furiosa-llm manifest sha256:"
"""What stands before the digest in what is signed: the key may sign other things, too."""
_MAX_NBYTES = 2**16
"""Of a key or signature."""


class SignatureError(ArtifactError):
    """An artifact has no signature by the key that it must have one by."""


def sign_artifact(path: str | os.PathLike[str], key: str | os.PathLike[str]) -> Path:
    """Sign the artifact in the folder `path` with the private key in a PEM file; returns the signature's path.

    All digests are compared first, those of the weights too. Raises ArtifactError for an artifact that is damaged,
    InputError for a key that is none, and OutputFileError if the signature cannot be written.
    """
    private = _private_key(Path(key))
    signature = base64.b64encode(private.sign(_message(_full_digest(Path(path)))))
    target = Path(path) / SIGNATURE_NAME
    try:
        replace_file(target, signature + b"\n")
    except OSError as error:
        raise OutputFileError(f"{target} cannot be written: {error.strerror}; check the folder's rights.") from error
    return target


def check_signature(path: str | os.PathLike[str], key: str | os.PathLike[str], *, digest: str | None = None) -> None:
    """Raise SignatureError unless the artifact in `path` is signed by the private key of the public one in a PEM file.

    `digest` is that of the manifest that was read, where the files were compared with it; else all are compared here.
    """
    from cryptography.exceptions import InvalidSignature

    public = _public_key(Path(key))
    folder = Path(path)
    try:
        signature = base64.b64decode(_read(folder / SIGNATURE_NAME), validate=False)
    except FileNotFoundError as error:
        raise SignatureError(
            f"{folder} is not signed (it has no {SIGNATURE_NAME}), expected a signature by the key {key}; sign it with "
            "`furiosa-llm sign`, or get it from whom you trust."
        ) from error
    except (OSError, binascii.Error) as error:
        raise SignatureError(
            f"{folder / SIGNATURE_NAME} is no signature ({error}); sign the artifact again."
        ) from error
    try:
        public.verify(signature, _message(digest or _full_digest(folder)))
    except InvalidSignature as error:
        raise SignatureError(
            f"{folder} is not signed by the key {key}: its {SIGNATURE_NAME} is of another key, or of another manifest; "
            "do not use it before you know why."
        ) from error


def _full_digest(folder: Path) -> str:
    """The digest of the manifest, once every file was compared with it."""
    if is_composite(folder):
        return open_composite(folder, full=True).digest
    return open_artifact(folder, full=True).digest


def _message(digest: str) -> bytes:
    return f"{_SIGNED}{digest}".encode()


def _read(path: Path) -> bytes:
    if path.exists() and not path.is_file():
        raise OSError("a folder, pipe or device, expected a file")
    with path.open("rb") as file:
        return file.read(_MAX_NBYTES)


def _private_key(path: Path) -> Ed25519PrivateKey:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    key = _key(path, public=False)
    if not isinstance(key, Ed25519PrivateKey):
        raise InputError(f"{path} has no private Ed25519 key; make one with `openssl genpkey -algorithm ed25519`.")
    return key


def _public_key(path: Path) -> Ed25519PublicKey:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    key = _key(path, public=True)
    if not isinstance(key, Ed25519PublicKey):
        raise InputError(f"{path} has no public Ed25519 key; write it with `openssl pkey -in PRIVATE -pubout`.")
    return key


def _key(path: Path, *, public: bool) -> object:
    """The key in a PEM file, of whatever kind."""
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.serialization import load_pem_private_key, load_pem_public_key

    try:
        data = _read(path)
        return load_pem_public_key(data) if public else load_pem_private_key(data, password=None)
    except OSError as error:
        raise InputError(
            f"the key {path} cannot be read: {error.strerror or error}; give the path of a PEM file."
        ) from error
    except (TypeError, ValueError, UnsupportedAlgorithm) as error:  # TypeError: it needs a password
        kind = "public" if public else "private"
        raise InputError(
            f"{path} is no {kind} key without a password, in PEM ({error}); see docs/artifact-tools.md."
        ) from error


def check_installed() -> None:
    """Raise UnsupportedError unless the extra `sign` is installed."""
    if find_spec("cryptography") is None:
        raise UnsupportedError("signatures need the extra `sign`: pip install 'furiosa-llm-onnx[sign]'")
