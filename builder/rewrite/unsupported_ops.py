"""Ops that no program for simulated PEs can hold because onnxruntime has no CPU kernel for them; each with a remedy."""

from __future__ import annotations

import onnx_ir as ir

from furiosa_llm.builder.errors import UnsupportedModelError
from furiosa_llm.builder.rules import op_of
from furiosa_llm.builder.source.load import Source


def refuse_unsupported_ops(model: ir.Model, source: Source) -> None:
    """Raise UnsupportedModelError for the first op that onnxruntime cannot run on a CPU at any shapes."""
    for node in model.graph:
        entry = op_of(node)
        if entry is not None and entry.remedy is not None:
            raise UnsupportedModelError(
                f'{source.path.name}: node {node.domain}::{node.op_type} "{node.name}" has no CPU kernel in '
                f"onnxruntime, expected ops that simulated PEs can run; {entry.remedy}."
            )
