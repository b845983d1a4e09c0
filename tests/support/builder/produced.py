"""What the builder would write for any assignment, without a file: for plans that the planner would never choose."""

from __future__ import annotations

import collections
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from furiosa_llm.builder.lower.build import Build
from furiosa_llm.builder.lower.emit import lower
from furiosa_llm.builder.lower.program_shapes import program_shapes
from furiosa_llm.builder.plan.outcome import Outcome
from furiosa_llm.builder.plan.plan import Plan
from furiosa_llm.builder.rewrite.fusion import Fusion
from furiosa_llm.builder.write import manifest as parts
from furiosa_llm.builder.write import onnx_files
from furiosa_llm.builder.write.shards import num_shards
from furiosa_llm.builder.write.streaming import FilePosition
from furiosa_llm.runtime.artifact.layout import Mesh
from furiosa_llm.runtime.artifact.manifest import Manifest, ModelInfo, Provenance
from tests.support.builder.faults import Subject
from tests.support.builder.plans import Assignment, Prepared

_FILE = "weights-00001.safetensors"


def produced(prepared: Prepared, mesh: Mesh, assignment: Assignment, outcome: Outcome) -> Subject:
    """Program and manifest of an assignment."""
    lowered = lower(prepared.analysis, mesh, assignment, outcome, prepared.source.model)
    build = Build(
        source=prepared.source,
        model=prepared.model,
        probes=prepared.probes,
        states=prepared.states,
        fusion=Fusion(),
        analysis=prepared.analysis,
        max_length=None,
        plan=cast(Plan, SimpleNamespace(mesh=mesh)),
        lowered=lowered,
    )
    shapes = program_shapes(build)
    placements: dict[str, FilePosition] = {}
    offset = 0
    for tensor in build.tensors():
        placements[tensor.name] = FilePosition(_FILE, offset, tensor.local_nbytes, sha256="0" * 64)
        offset += tensor.local_nbytes * num_shards(tensor, mesh)
    manifest = Manifest(
        provenance=Provenance(tool="test 0", libraries={}, options={}, source_sha256="0" * 64),
        model=ModelInfo(name="test", task="other", max_sequence_length=None, vocab_size=None, eos_token_ids=()),
        mesh=mesh,
        files=(),
        tensors=parts._tensors(build, placements),
        initializers=parts._initializers(build, collections.defaultdict(lambda: "0" * 64)),
        inputs=parts._inputs(build),
        outputs=parts._outputs(build),
        states=parts._states(build),
        collectives=parts._collectives(build, shapes),
        blocks=(),
        plan={},
    )

    def constants(name: str, rank: int) -> npt.NDArray[Any]:
        tensor = lowered.tensors[name]
        assert tensor.made is not None, "only what the builder made is read"
        return np.asarray(tensor.made()[mesh.position(rank, tensor.shard_axes)])

    program = onnx_files.program_proto(lowered.graph, placements, shapes, build.ir_version)
    return Subject.made_of(program, manifest, constants)
