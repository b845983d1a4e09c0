"""Cases to run a model at, and inputs for them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir

from furiosa_llm.runtime.artifact.dimensions import shape_of
from furiosa_llm.runtime.artifact.manifest import InputInfo

Array = npt.NDArray[Any]


@dataclasses.dataclass(frozen=True)
class Case:
    """One step of a model: `sequence` new positions after `past` ones."""

    name: str
    batch: int
    sequence: int
    past: int

    @property
    def sizes(self) -> Mapping[str, int]:
        return {
            "batch": self.batch,
            "sequence": self.sequence,
            "past": self.past,
            "total": self.past + self.sequence,
            "encoder": 6,
        }

    def with_batch(self, batch: int) -> Case:
        return dataclasses.replace(self, batch=batch)


PREFILL = Case("prefill", batch=2, sequence=9, past=0)
DECODE = Case("decode", batch=2, sequence=1, past=9)
CHUNK = Case("chunk", batch=3, sequence=5, past=7)
CASES = (PREFILL, DECODE, CHUNK)


def cases_of(program: onnx.ModelProto) -> tuple[Case, ...]:
    """The cases that a model's kernels accept: GroupQueryAttention takes a chunk of one sequence only."""
    if any(node.op_type == "GroupQueryAttention" for node in program.graph.node):
        return (PREFILL, DECODE, CHUNK.with_batch(1))
    return CASES


def feeds_of(inputs: Sequence[InputInfo], case: Case, vocab_size: int | None, seed: int = 0) -> dict[str, Array]:
    """Global inputs for one case."""
    rng = np.random.default_rng(seed)
    feeds: dict[str, Array] = {}
    for info in inputs:
        shape = shape_of(info.shape, case.sizes)
        array: Array
        match info.role:
            case "token_ids":
                array = rng.integers(0, vocab_size or 1000, shape)
            case "token_type_ids":
                array = rng.integers(0, 2, shape)
            case "attention_mask":
                array = np.ones(shape)
            case "position_ids":
                array = np.broadcast_to(np.arange(case.past, case.past + shape[-1]), shape)
            case _:
                array = rng.standard_normal(shape)
        feeds[info.name] = array.astype(ir.DataType[info.dtype].numpy())
    return feeds
