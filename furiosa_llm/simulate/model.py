"""A model's costs at every tensor parallel size: the graph is analysed once, and lowered for each size asked for."""

from __future__ import annotations

import functools
from pathlib import Path

from furiosa_llm.builder.lower.step_costs import StepCosts, step_costs
from furiosa_llm.builder.options import BuildOptions, recorded_options
from furiosa_llm.builder.pipeline import Analysed, analyse_model, analyse_source
from furiosa_llm.builder.source.folder import find_model
from furiosa_llm.builder.source.from_artifact import source_of
from furiosa_llm.runtime.artifact.composite import is_composite
from furiosa_llm.runtime.artifact.manifest import MANIFEST_NAME
from furiosa_llm.runtime.artifact.reader import open_artifact
from furiosa_llm.simulate.errors import PlacementError

LARGEST = 16
"""The largest size that the builder plans for."""
_DIVIDED = 8
"""The size whose costs are divided evenly for larger ones than that."""


def planned_size(size: int) -> int:
    """The size at which the costs for `size` are found."""
    return size if size <= LARGEST else _DIVIDED


class Costs:
    """The costs of one model."""

    def __init__(self, analysed: Analysed) -> None:
        self._analysed = analysed
        self._at = functools.cache(self._lowered)

    def at(self, size: int) -> StepCosts:
        """On one of `planned_size(size)` ranks. Raises PlacementError for a model that does not decode with a cache."""
        return self._at(planned_size(size))

    def _lowered(self, size: int) -> StepCosts:
        options = BuildOptions(tensor_parallel_size=size)
        options.check(experimental_tp=True)
        found = step_costs(self._analysed.lowered_for(options))
        if found is None or not found.state_nbytes_per_position:
            raise PlacementError(
                "the model has no steps that decode with a cache, so that there is nothing to simulate"
            )
        return found


def costs_of_model(path: Path) -> Costs:
    """The costs of an .onnx file, whose weights need not be there, or of an artifact."""
    if (path / MANIFEST_NAME).is_file():
        if is_composite(path):
            raise PlacementError(f"{path} is an artifact of several parts; simulate takes a decoder")
        artifact = open_artifact(path, full=False)
        options = recorded_options(artifact.manifest.provenance.options)
        return Costs(analyse_source(source_of(artifact), options))
    return Costs(analyse_model(find_model(path), BuildOptions()))
