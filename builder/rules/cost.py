"""What an op costs at given sizes: floating point operations, and bytes read and written."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from furiosa_llm.builder.rules.view import NodeView


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What one run of a node takes."""

    flops: int
    nbytes_read: int
    nbytes_written: int


CostFunction = Callable[[NodeView], Cost]
