"""Signatures: by the key, of the manifest, which covers every file; in Python, and by the commands."""

from __future__ import annotations

import base64
import importlib.util
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    KeySerializationEncryption,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)

from furiosa_llm.runtime.artifact.errors import ArtifactError, OutputFileError
from furiosa_llm.runtime.artifact.reader import open_artifact
from furiosa_llm.runtime.errors import InputError
from furiosa_llm.signing import SignatureError, check_signature, sign_artifact
from tests.cli.conftest import OPTIMUM, Cli, cli, refused  # noqa: F401 - fixtures
from tests.support.artifacts import artifact_of
from tests.support.tampering import alter_tensor, edit_manifest, flip_bit


def private_pem(key: Ed25519PrivateKey, how: KeySerializationEncryption | None = None) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, how or NoEncryption())


def public_pem(key: Ed25519PrivateKey) -> bytes:
    return key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    return signable(OPTIMUM, tmp_path)


@pytest.fixture
def composite(tmp_path: Path) -> Path:
    return signable("tiny-t5-optimum", tmp_path)


def signable(name: str, tmp_path: Path) -> Path:
    """A copy of the artifact, beside keys."""
    shutil.copytree(artifact_of(name), tmp_path / "artifact")
    key, other = Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate()
    (tmp_path / "key").write_bytes(private_pem(key))
    (tmp_path / "key.pub").write_bytes(public_pem(key))
    (tmp_path / "other.pub").write_bytes(public_pem(other))
    return tmp_path / "artifact"


def test_what_is_signed_is_the_digest_of_the_manifest(artifact: Path, tmp_path: Path) -> None:
    path = sign_artifact(artifact, tmp_path / "key")
    digest = open_artifact(artifact, full=False).digest
    assert path == artifact / "manifest.sig"
    key = Ed25519PrivateKey.generate()
    assert len(base64.b64decode(path.read_bytes())) == len(key.sign(b""))
    check_signature(artifact, tmp_path / "key.pub")
    check_signature(artifact, tmp_path / "key.pub", digest=digest)
    with pytest.raises(SignatureError, match="of another manifest"):
        check_signature(artifact, tmp_path / "key.pub", digest="0" * 64)


def test_another_key(artifact: Path, tmp_path: Path) -> None:
    sign_artifact(artifact, tmp_path / "key")
    with pytest.raises(SignatureError, match=r"not signed by the key .*other.pub"):
        check_signature(artifact, tmp_path / "other.pub")


def test_a_change_that_makes_the_digests_right_again(artifact: Path, tmp_path: Path) -> None:
    sign_artifact(artifact, tmp_path / "key")
    edit_manifest(artifact, lambda manifest: manifest["model"].update(name="another"))
    open_artifact(artifact, full=True)
    with pytest.raises(SignatureError, match="of another manifest"):
        check_signature(artifact, tmp_path / "key.pub")


def test_changed_weights_are_neither_signed_nor_accepted(artifact: Path, tmp_path: Path) -> None:
    sign_artifact(artifact, tmp_path / "key")
    name = next(iter(open_artifact(artifact, full=False).tensors))
    alter_tensor(artifact, name, flip_bit)
    for refused_by in (lambda: check_signature(artifact, tmp_path / "key.pub"),
                       lambda: sign_artifact(artifact, tmp_path / "key")):  # fmt: skip
        with pytest.raises(ArtifactError, match="was altered in the tensor"):
            refused_by()


@pytest.mark.parametrize("signature", [b"", b"AAAA\n", b"\xff\x00", b"A"])
def test_what_is_no_signature(signature: bytes, artifact: Path, tmp_path: Path) -> None:
    (artifact / "manifest.sig").write_bytes(signature)
    with pytest.raises(SignatureError):
        check_signature(artifact, tmp_path / "key.pub")


def test_a_composite_is_signed_with_its_parts(composite: Path, tmp_path: Path) -> None:
    """One signature, of the manifest that has the parts' digests; the parts themselves have none."""
    assert sign_artifact(composite, tmp_path / "key") == composite / "manifest.sig"
    check_signature(composite, tmp_path / "key.pub")
    with pytest.raises(SignatureError, match="not signed by the key"):
        check_signature(composite, tmp_path / "other.pub")
    with pytest.raises(SignatureError, match="is not signed"):
        check_signature(composite / "encoder", tmp_path / "key.pub")


def test_a_composite_of_other_parts(composite: Path, tmp_path: Path) -> None:
    """A part that is changed and made sound by itself, without and with the whole's manifest; or its signature."""
    sign_artifact(composite, tmp_path / "key")
    edit_manifest(composite / "encoder", lambda manifest: manifest["model"].update(name="another"))
    with pytest.raises(ArtifactError, match="is not the part that was built with the others"):
        check_signature(composite, tmp_path / "key.pub")
    digest = open_artifact(composite / "encoder", full=False).digest
    edit_manifest(composite, lambda manifest: manifest["parts"][0].update(digest=digest))
    with pytest.raises(SignatureError, match="of another manifest"):
        check_signature(composite, tmp_path / "key.pub")
    sign_artifact(composite / "encoder", tmp_path / "key")
    shutil.copy(composite / "encoder" / "manifest.sig", composite)
    with pytest.raises(SignatureError, match="of another manifest"):
        check_signature(composite, tmp_path / "key.pub")


def test_changed_weights_of_a_composite(composite: Path, tmp_path: Path) -> None:
    sign_artifact(composite, tmp_path / "key")
    alter_tensor(composite / "decoder", next(iter(open_artifact(composite / "decoder").tensors)), flip_bit)
    with pytest.raises(ArtifactError, match="was altered in the tensor"):
        check_signature(composite, tmp_path / "key.pub")


def test_none(artifact: Path, tmp_path: Path) -> None:
    with pytest.raises(SignatureError, match=r"is not signed \(it has no manifest.sig\)"):
        check_signature(artifact, tmp_path / "key.pub")


def of_another_kind() -> bytes:
    key = generate_private_key(SECP256R1())
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


@pytest.mark.parametrize(
    ("key", "message"),
    [
        (b"", "is no private key without a password, in PEM"),
        (private_pem(Ed25519PrivateKey.generate(), BestAvailableEncryption(b"secret")), "without a password"),
        (public_pem(Ed25519PrivateKey.generate()), "is no private key"),
        (of_another_kind(), "has no private Ed25519 key; make one with `openssl genpkey"),
    ],
)
def test_what_is_no_key(key: bytes, message: str, artifact: Path, tmp_path: Path) -> None:
    (tmp_path / "bad").write_bytes(key)
    with pytest.raises(InputError, match=message):
        sign_artifact(artifact, tmp_path / "bad")


def test_keys_that_cannot_be_read(artifact: Path, tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "absent"):
        with pytest.raises(InputError, match="cannot be read"):
            sign_artifact(artifact, path)
        with pytest.raises(InputError, match="cannot be read"):
            check_signature(artifact, path)


def test_a_signature_that_cannot_be_written(artifact: Path, tmp_path: Path) -> None:
    (artifact / "manifest.sig").mkdir()
    with pytest.raises(OutputFileError, match=r"manifest.sig cannot be written: .*; check the folder's rights"):
        sign_artifact(artifact, tmp_path / "key")
    assert not list(artifact.glob(".manifest.sig*"))


def test_commands(artifact: Path, tmp_path: Path, cli: Cli, refused: Callable[..., str]) -> None:  # noqa: F811
    assert "is not signed" in refused("verify", artifact, "--key", tmp_path / "key.pub")
    assert "is not signed" in refused("serve", artifact, "--require-signature", tmp_path / "key.pub")
    assert cli("sign", artifact, "--key", tmp_path / "key").out == f"signed: {artifact / 'manifest.sig'}\n"
    shown = cli("verify", artifact, "--key", tmp_path / "key.pub", "--no-record")
    assert shown.code == 0
    assert shown.out.startswith(f"signed by the key {tmp_path / 'key.pub'}, and every file has its digest\n")
    assert "not signed by the key" in refused("serve", artifact, "--require-signature", tmp_path / "other.pub")
    # Past the signature, nothing can listen there.
    listening = ("--host", "192.0.2.1", "--require-signature", tmp_path / "key.pub")
    assert "cannot listen on" in refused("serve", artifact, *listening)


def test_the_extra_is_named(artifact: Path, monkeypatch: pytest.MonkeyPatch, refused: Callable[..., str]) -> None:  # noqa: F811
    monkeypatch.setattr("furiosa_llm.signing.find_spec", lambda name: None if name == "cryptography" else importlib)
    assert "pip install 'furiosa-llm-onnx[sign]'" in refused("sign", artifact, "--key", "key")
