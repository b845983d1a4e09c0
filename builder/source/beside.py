"""Which files next to a model belong to it: files in its folder, and files that a link in the folder may lead to."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from furiosa_llm.builder.errors import ModelLoadError


def folders_of(model: Path) -> tuple[Path, ...]:
    """The folders into which a link next to `model` may lead: the named folder, and the one that holds the real file.

    In a Hugging Face cache, the files of a model are links from one folder into another.
    """
    return tuple(dict.fromkeys((Path(os.path.realpath(model.parent)), Path(os.path.realpath(model)).parent)))


def find_beside(model: Path, name: str | Path, what: str, *, above: bool = False) -> Path | None:
    """The file `name` in the folder of `model`, or `above` that; None if it is absent.

    Raises ModelLoadError, whose message begins with `what`, if it is not a regular file, or is a link that leads
    elsewhere.
    """
    folder = model.absolute().parent.parent if above else model.parent
    path = folder / name
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise ModelLoadError(f"{what}, which cannot be looked at: {error.strerror}; put a file there.") from error
    allowed = (Path(os.path.realpath(folder)), *folders_of(model))
    if not any(Path(os.path.realpath(path)).is_relative_to(one) for one in allowed):
        raise ModelLoadError(
            f"{what}, a link that leads outside the model's folder to {os.path.realpath(path)}; "
            "links may only lead to files in the folder of the .onnx file or below it: put the file itself there."
        )
    if not stat.S_ISREG(mode):
        kind = "folder" if stat.S_ISDIR(mode) else "pipe, socket or device"
        raise ModelLoadError(f"{what}, which is a {kind}, expected a regular file; put the file there.")
    return path
