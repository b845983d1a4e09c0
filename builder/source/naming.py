"""The name of an artifact where none is given."""

from __future__ import annotations

from pathlib import Path


def default_name(model: Path) -> str:
    """The artifact's name where none is given: the model's file name, or its folder's if the file is called `model`.

    A folder that holds a model of several files gives the name itself.
    """
    if model.is_dir():
        return model.resolve().name
    return model.stem if model.stem != "model" else model.parent.resolve().name
