"""How a model lies on cards."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """The sizes of its parallelism."""

    tensor_parallel_size: int
    pipeline_parallel_size: int = 1
    data_parallel_size: int = 1

    @property
    def units(self) -> int:
        """PEs of all replicas."""
        return self.tensor_parallel_size * self.pipeline_parallel_size * self.data_parallel_size

    def __str__(self) -> str:
        return f"tp {self.tensor_parallel_size}, pp {self.pipeline_parallel_size}, dp {self.data_parallel_size}"
