"""Hand-made artifacts with blocks, as a build writes them into the manifest."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from furiosa_llm.runtime.artifact.graphs import COLLECTIVE_DOMAIN
from furiosa_llm.runtime.artifact.layout import Mesh
from furiosa_llm.runtime.artifact.manifest import Block
from furiosa_llm.runtime.artifact.reader import Artifact, open_artifact
from tests.support.runtime.models import LlamaSize, llama
from tests.support.runtime.spmd import Spmd


def with_blocks(program: Spmd, folder: Path, starts: Sequence[int], crossing: Sequence[Sequence[str]] = ()) -> Artifact:
    """The artifact of `program` with blocks at the nodes `starts`, of which all but the first receive `crossing`."""
    artifact = open_artifact(program.write(folder))
    nodes = artifact.program.graph.node
    stops = [*starts[1:], len(nodes)]
    blocks = tuple(
        Block(
            name=f"block.{index}",
            first_node=start,
            collectives=sum(node.domain == COLLECTIVE_DOMAIN for node in nodes[start:stop]),
            weight_nbytes=0,
            crossing=tuple(crossing[index - 1]) if index and crossing else (),
        )
        for index, (start, stop) in enumerate(zip(starts, stops, strict=True))
    )
    return dataclasses.replace(artifact, manifest=dataclasses.replace(artifact.manifest, blocks=blocks))


def llama_blocks(mesh: Mesh, size: LlamaSize, folder: Path) -> Artifact:
    """A decoder with a block for every layer: the embedding is in the first, the head in the last."""
    program = llama(mesh, size)
    sums = [at for at, node in enumerate(program.nodes) if node.op_type == "AllReduce"]
    starts = [0, *(sums[2 * layer - 1] + 1 for layer in range(1, size.layers))]
    crossing = [(f"a{layer}.sum", f"layer{layer}.mlp.sum") for layer in range(size.layers - 1)]
    return with_blocks(program, folder, starts, crossing)
