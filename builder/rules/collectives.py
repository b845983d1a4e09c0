"""Shapes of the program's own ops: they depend on the mesh, and no model has them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx_ir as ir

from furiosa_llm.builder.rules.facts import Fact, present
from furiosa_llm.builder.rules.registry import as_input
from furiosa_llm.builder.rules.view import Inferred, ShapeRule
from furiosa_llm.runtime.artifact.graphs import COLLECTIVE_DOMAIN
from furiosa_llm.runtime.artifact.layout import Mesh


def collective_shapes(mesh: Mesh) -> Mapping[tuple[str, str], ShapeRule]:
    """The shape rules of collectives over `mesh`, as one rank sees them."""

    def all_gather(node: ir.Node, inputs: Sequence[Fact | None]) -> Inferred:
        data, dim = present(inputs[0]), node.attributes["dim"].as_int()
        parts = mesh.parts(node.attributes["axes"].as_ints())
        return [(data.dtype, tuple(n * parts if d == dim else n for d, n in enumerate(data.shape)))]

    return {(COLLECTIVE_DOMAIN, "AllReduce"): as_input, (COLLECTIVE_DOMAIN, "AllGather"): all_gather}
