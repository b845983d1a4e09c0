"""The tensor parallel sizes that are supported, the mesh of each, and how much padding a split may take."""

from __future__ import annotations

from typing import TYPE_CHECKING

from furiosa_llm.builder.errors import OptionError
from furiosa_llm.runtime.artifact.card import PES_PER_CARD

if TYPE_CHECKING:
    from furiosa_llm.runtime.artifact.layout import Mesh

SUPPORTED_SIZES = (4, 8)
EXPERIMENTAL_SIZES = (1, 2, 16)
MAX_PADDING = 1.34
"""How much larger padding may make one factor. A factor of blocks counts whole blocks: 5.5 blocks are stored as 6
before any split, so that 6 blocks over 8 ranks are 1.33 times as large; the price counts the bytes."""


def check_tensor_parallel_size(size: int, *, experimental: bool) -> None:
    """Raise OptionError unless `size` is a size that artifacts can be built for."""
    allowed = (*SUPPORTED_SIZES, *EXPERIMENTAL_SIZES) if experimental else SUPPORTED_SIZES
    if size in allowed:
        return
    message = (
        f"tensor parallel size {size} is not supported; a card has {PES_PER_CARD} PEs, fused by 4 or 8, so use 4 or 8"
    )
    if size in EXPERIMENTAL_SIZES:
        message += f" (or say --experimental-tp, experimental_tp=True, to build for {size} all the same)"
    raise OptionError(message + ".")


def mesh_of(size: int) -> Mesh:
    """The mesh of `size` ranks: one axis for each factor of two, so that a dimension may be split in part."""
    from furiosa_llm.runtime.artifact.layout import Mesh  # with numpy, 0.1 s that help has no use for

    return Mesh((2,) * (size.bit_length() - 1) or (1,))
