"""A tokenizer.json is first loaded in a process of its own: a bad one may end a process, hang it, or fill memory.

That takes as long as loading it here, and an interpreter's start; so what has passed is remembered in the user's cache,
by its digest, and is not tried again.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
import subprocess
import sys
from pathlib import Path

import tokenizers

from furiosa_llm.runtime.artifact.cache import cache_home
from furiosa_llm.runtime.errors import TokenizerError
from furiosa_llm.runtime.tokens.lean_process import lean_process, limit_memory

_SECONDS = 120.0
_MAX_NBYTES = 4 * 2**30
_REFUSED = 3
_OF_OTHERS = stat.S_IWGRP | stat.S_IWOTH
_PROBE = "Aé 1\n"
_TRIAL = f"{tokenizers.__version__}, {_PROBE!r} within {_SECONDS:g} s and {_MAX_NBYTES} bytes\n".encode()
"""What a tokenizer has passed that is remembered."""
_LOADED: set[str] = set()
"""Digests of what has passed in this process, for users without a cache."""


def check_loads(text: str, file: str) -> None:
    """Raises TokenizerError unless another process can make a tokenizer of `text`, the content of `file`."""
    content = text.encode("utf-8", "surrogatepass")
    digest = hashlib.blake2b(content, key=hashlib.blake2b(_TRIAL).digest(), digest_size=32).hexdigest()
    if digest not in _LOADED and not _is_remembered(digest):
        _try_in_process(content, file)
        _remember(digest)
    _LOADED.add(digest)


def _is_remembered(digest: str) -> bool:
    """Whether this user has had it pass before; nobody else's word is taken.

    Whoever the folder belongs to may give the user's files other names: what has passed is what the file says.
    """
    try:
        with os.fdopen(os.open(_verdicts() / digest, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as file:
            status = os.fstat(file.fileno())
            own = status.st_uid == os.geteuid() and stat.S_ISREG(status.st_mode) and not status.st_mode & _OF_OTHERS
            return own and file.read(len(digest) + 1) == digest.encode()
    except (OSError, RuntimeError):
        return False


def _remember(digest: str) -> None:
    """Leaves a new file of that name that says so; without a folder to write into, the next process tries again."""
    with contextlib.suppress(OSError, RuntimeError):
        verdict = _verdicts() / digest
        verdict.parent.mkdir(parents=True, exist_ok=True)
        verdict.unlink(missing_ok=True)
        with os.fdopen(os.open(verdict, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(digest.encode())


def _verdicts() -> Path:
    return cache_home() / "tokenizers"


def _try_in_process(content: bytes, file: str) -> None:
    process = lean_process(__name__, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    with process:
        try:
            said, _ = process.communicate(content, timeout=_SECONDS)
        except subprocess.TimeoutExpired:
            raise TokenizerError(f"{file} is not a tokenizer: loading it takes more than {_SECONDS:g} s") from None
        finally:
            process.kill()
    if process.returncode == _REFUSED:
        raise TokenizerError(f"{file} is not a tokenizer: {said.decode(errors='replace')}")
    if process.returncode:
        raise TokenizerError(
            f"{file} is not a tokenizer: the process that loaded it ended with {process.returncode}, where it may take "
            f"{_MAX_NBYTES >> 30} GiB"
        )


def main() -> None:
    """What that process does: says what is wrong, if something is."""
    limit_memory(_MAX_NBYTES)
    content = sys.stdin.buffer.read()
    try:
        tokenizer = tokenizers.Tokenizer.from_str(content.decode("utf-8", "surrogatepass"))
        _try_out(tokenizer)
    except BaseException as error:  # noqa: BLE001 - a panic of the library is no Exception
        sys.stdout.write(f"{error}"[:1000])
        sys.stdout.flush()
        os._exit(_REFUSED)
    os._exit(0)  # without the seconds that freeing a large vocabulary may take


def _try_out(tokenizer: tokenizers.Tokenizer) -> None:
    """Lets pass what the library refuses: not every tokenizer has tokens for every character."""
    try:
        tokenizer.decode(tokenizer.encode(_PROBE).ids)
    except Exception:  # noqa: BLE001 - the library has no class of its own; a panic is none of these
        return
