"""How every value of an analysed graph lies over the ranks under one assignment."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from furiosa_llm.builder.factors.analysis import Analysis
from furiosa_llm.builder.factors.factor import Factor, to_dim
from furiosa_llm.builder.plan.outcome import Assignment
from furiosa_llm.runtime.artifact.layout import Dim, Leaf, Mesh, axes_of, global_size, index_map, local_size, simplify


class Layouts:
    """Layouts of values, computed when asked for."""

    def __init__(self, analysis: Analysis, assignment: Assignment, mesh: Mesh) -> None:
        self.mesh = mesh
        self._analysis = analysis
        self._assignment = dict(assignment)
        self._found: dict[ir.Value, tuple[Dim, ...]] = {}

    def of(self, value: ir.Value) -> tuple[Dim, ...]:
        """A layout per dimension."""
        if value not in self._found:
            dims = (to_dim(factor, self._assignment) for factor in self._analysis.dims[value])
            self._found[value] = tuple(simplify(dim) for dim in dims)
        return self._found[value]

    def of_factor(self, factor: Factor) -> Dim:
        """The layout of a factor, not simplified: every segment that the analysis distinguishes is still there."""
        return to_dim(factor, self._assignment)

    def of_dimension(self, value: ir.Value, d: int) -> Dim:
        """The layout of one dimension, not simplified."""
        return self.of_factor(self._analysis.dims[value][d])

    def with_whole(self, value: ir.Value, whole: Collection[int]) -> tuple[Dim, ...]:
        """The layout of a value once some of its dimensions have been gathered."""
        return tuple(Leaf(global_size(dim)) if d in whole else dim for d, dim in enumerate(self.of(value)))

    def split_dims(self, value: ir.Value) -> list[int]:
        """The dimensions that are split."""
        return [d for d, dim in enumerate(self.of(value)) if axes_of(dim)]

    def local_shape(self, value: ir.Value, whole: Collection[int] = ()) -> tuple[int, ...]:
        """The local shape at the analysis' sizes, with some dimensions gathered."""
        return tuple(local_size(dim, self.mesh) for dim in self.with_whole(value, whole))

    def index_maps(self, dim: Dim) -> list[npt.NDArray[np.int64]]:
        """The global indices of `dim` (-1: padding) for every position along its axes, in order."""
        axes = axes_of(dim)
        ranks = {self.mesh.position(rank, axes): rank for rank in reversed(range(self.mesh.size))}
        return [index_map(dim, self.mesh, ranks[position]) for position in range(self.mesh.parts(axes))]

    def parts(self, dim: Dim) -> int:
        """Into how many equal parts a dimension without padding is split."""
        return global_size(dim) // local_size(dim, self.mesh)
