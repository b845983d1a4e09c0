"""What is derived about a value: how its dimensions lie over the ranks, and what else differs between ranks."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from furiosa_llm.builder.proof import pieces
from furiosa_llm.builder.proof.pieces import Dim, Place, Size
from furiosa_llm.builder.rules.padding import Content

Axes = tuple[int, ...]
REBUILD = "build the artifact again, and report it if the new one has it, too"
Indices = npt.NDArray[np.int64]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """How the ranks hold a tensor of the unsplit model."""

    dims: tuple[Dim, ...]
    partial: frozenset[int] = frozenset()
    """The mesh axes over which the ranks' tensors are to be summed."""
    scale: int = 1
    """How many times too large the tensor is: means of parts are added up, then divided by the number of parts."""
    contents: Mapping[Place, Content] = dataclasses.field(default_factory=dict)
    """What is in the padding at each place."""

    @property
    def is_whole(self) -> bool:
        """Whether every rank holds all of the tensor, in order, and the placement has no `Copies`."""
        plain = all(isinstance(piece, pieces.Run) for dim in self.dims for piece in dim)
        return plain and not self.partial and self.scale == 1

    @property
    def is_equal(self) -> bool:
        """Whether every rank holds all of the tensor, in order, where copies are read as whole dimensions."""
        return all(map(pieces.is_whole, self.dims)) and not self.partial and self.scale == 1

    def __str__(self) -> str:
        partial = f" partial over axes {sorted(self.partial)}" if self.partial else ""
        scale = f" times {self.scale}" if self.scale != 1 else ""
        return f"[{', '.join(map(pieces.text, self.dims))}]{partial}{scale}"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RankConstant:
    """A constant that the builder made, different from rank to rank."""

    dims: tuple[Dim, ...]
    axes: Axes
    """The axes along which it differs."""

    def __str__(self) -> str:
        return f"constant of each rank over axes {list(self.axes)}"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RankFunction:
    """Integers or truth values computed, element by element, from equal ones and from constants of each rank."""

    dims: tuple[Dim, ...]

    def __str__(self) -> str:
        return "function of the rank"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """Rows of a split table, looked up at positions that differ from rank to rank; right only where a mask is true."""

    dims: tuple[Dim, ...]
    table: Dim
    indices: ir.Value
    trailing: int
    """How many dimensions follow the dimensions of the indices."""
    contents: Mapping[Place, Content]

    def __str__(self) -> str:
        return f"rows of a table split as {pieces.text(self.table)}"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LocalSizes:
    """A vector computed from local sizes, where the unsplit model has `expected` at both sets of sizes.

    A negative number stands for any multiple: the dimension has any number of copies.
    """

    dims: tuple[Dim, ...]
    expected: tuple[tuple[int, ...], tuple[int, ...]]

    def __str__(self) -> str:
        return f"local sizes for {list(self.expected[0])}"


@dataclasses.dataclass(frozen=True, slots=True)
class Unknown:
    """Nothing is known, because of a fault that has been reported."""

    def __str__(self) -> str:
        return "unknown"


Held = Placement | RankConstant | RankFunction | Rows | LocalSizes | Unknown


def whole(shape: Sequence[Size]) -> Placement:
    """A tensor that every rank holds."""
    return Placement(dims=tuple(pieces.run(size) for size in shape))


class ContradictionError(Exception):
    """A node that no unsplit model explains; the checker catches it and reports a `Fault`."""

    def __init__(self, found: str, expected: str, remedy: str) -> None:
        super().__init__(f"{found}; expected {expected}")
        self.found, self.expected, self.remedy = found, expected, remedy


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """Something in an artifact that contradicts the rest, or that cannot be decided."""

    node: str
    """The node, as `op type "name"`; or the entry of the manifest."""
    what: str
    expected: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.node}: found {self.what}, expected {self.expected}; {self.remedy}"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ProofReport:
    """What the checker found."""

    faults: tuple[Fault, ...]
    placements: Mapping[str, str]
    """How every value of the program lies over the ranks, by name, for people."""
    num_nodes: int

    @property
    def is_proved(self) -> bool:
        """Whether the program computes what one unsplit model computes."""
        return not self.faults
