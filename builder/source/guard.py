"""Detect that a model's files change while a build reads them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from furiosa_llm.builder.errors import ModelLoadError

_Identity = tuple[int, int, int, int]


class SourceGuard:
    """Remembers the identity of a model's files when the model was loaded."""

    def __init__(self) -> None:
        self._found: dict[Path, _Identity] = {}

    def remember(self, paths: Iterable[Path]) -> None:
        """Remember files as they are now; a file that is known already stays as it was, an absent one is left out."""
        for path in paths:
            identity = _identity(path)
            if identity is not None:
                self._found.setdefault(path, identity)

    @property
    def paths(self) -> tuple[Path, ...]:
        """The remembered files, by the paths that were given."""
        return tuple(self._found)

    def check_unchanged(self) -> None:
        """Raise ModelLoadError if a file is not the one that was remembered, or has been written to since."""
        for path, before in self._found.items():
            now = _identity(path)
            if now != before:
                what = "is gone" if now is None else f"has {now[0]} bytes" if now[0] != before[0] else "was replaced"
                if now is not None and now[0] == before[0] and now[2:] == before[2:]:
                    what = "was written to"
                raise ModelLoadError(
                    f"{path} was changed while the build was reading it (it had {before[0]} bytes, and {what} since); "
                    "leave the model's files alone during a build, and build again."
                )


def _identity(path: Path) -> _Identity | None:
    """Size, time of the last change, inode and device of a file, through links; None if it is absent."""
    try:
        found = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise ModelLoadError(f"{path} cannot be looked at: {error.strerror}; check the folder's rights.") from error
    return found.st_size, found.st_mtime_ns, found.st_ino, found.st_dev
