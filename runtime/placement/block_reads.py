"""Which stored tensors each block of a program reads, and how much of them for a decoded token."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum

from onnx import NodeProto

from furiosa_llm.runtime.artifact.compute import loaded_nbytes
from furiosa_llm.runtime.artifact.graphs import COLLECTIVE_DOMAIN, used_names
from furiosa_llm.runtime.artifact.layout import axes_of
from furiosa_llm.runtime.artifact.reader import SplitModel
from furiosa_llm.runtime.program.stage_graph import RECOMPUTED_NBYTES

_MICROSOFT = "com.microsoft"

# These facts about ops are repeated here because the runtime imports nothing from the builder, which has the ops'
# entries, and an artifact does not record what is read.
_LOOKED_UP: Mapping[tuple[str, str], tuple[tuple[int, ...], int]] = {
    ("", "Gather"): ((0,), 1),
    ("", "RotaryEmbedding"): ((1, 2), 3),
    (_MICROSOFT, "GatherBlockQuantized"): ((0, 2, 3), 1),
    (_MICROSOFT, "GroupQueryAttention"): ((7, 8), 5),
    (_MICROSOFT, "RotaryEmbedding"): ((2, 3), 1),
}
"""Op -> its inputs that are tables, of which a token reads some rows, and the input that says which."""

_EXPERTS = {(_MICROSOFT, "MoE"): 2, (_MICROSOFT, "QMoE"): 2}
"""Op -> its first input that has a part for each expert; a token reads the parts of `k` experts."""


class _Origin(IntEnum):
    """What a value follows from: initializers alone, graph inputs too, or what ranks have exchanged as well."""

    INITIALIZERS = 0
    INPUTS = 1
    COLLECTIVES = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockReads:
    """What a block, the nodes [`first_node`, `stop_node`) of program.onnx, reads on one rank."""

    first_node: int
    stop_node: int
    decoded: Mapping[str, int]
    """Stored tensor -> the bytes of it that a decoded token of one sequence reads: nothing of tables that are only
    looked up by token or position, and of experts the share that a token is routed to."""
    kept: Mapping[str, int]
    """Stored tensor that must be in memory -> its bytes, including tables and tensors for values computed again."""


def block_starts(model: SplitModel) -> tuple[int, ...]:
    """The positions of the nodes that blocks begin at; an artifact without blocks is one block."""
    return tuple(block.first_node for block in model.manifest.blocks) or (0,)


def read_blocks(model: SplitModel) -> tuple[BlockReads, ...]:
    """What each block of `model` reads, in order."""
    return _Reading(model).blocks()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Read:
    """How a node reads the value `name`."""

    name: str
    rows_only: bool = False
    """Whether a token reads some rows only."""
    experts: int | None = None
    """The number of experts whose parts a token reads; None if the value has no experts."""


class _Reading:
    """The reading of a model.

    `origin` is the origin of each value, `behind` the stored tensors that its elements follow from without collectives.
    """

    def __init__(self, model: SplitModel) -> None:
        self._model = model
        self._nodes: Sequence[NodeProto] = model.program.graph.node
        graph = model.program.graph
        self.origin = {value.name: _Origin.INPUTS for value in graph.input}
        self.origin |= {tensor.name: _Origin.INITIALIZERS for tensor in graph.initializer}
        self.behind = {name: frozenset((name,)) for name in model.tensors}
        self._made_at: dict[str, int] = {}
        for position, node in enumerate(self._nodes):
            self._follow(position, node)

    def _follow(self, position: int, node: NodeProto) -> None:
        used = list(used_names(node))
        origin = max((self.origin[name] for name in used), default=_Origin.INITIALIZERS)
        if node.domain == COLLECTIVE_DOMAIN:
            origin = _Origin.COLLECTIVES
        behind: frozenset[str] = frozenset()
        if origin is not _Origin.COLLECTIVES and node.op_type != "Shape":
            behind = behind.union(*(self.behind.get(name, frozenset()) for name in used))
        for name in filter(None, node.output):
            self.origin[name] = origin
            self.behind[name] = behind
            self._made_at[name] = position

    def blocks(self) -> tuple[BlockReads, ...]:
        starts = block_starts(self._model)
        stops = [*starts[1:], len(self._nodes)]
        return tuple(self._block(start, stop) for start, stop in zip(starts, stops, strict=True))

    def _block(self, start: int, stop: int) -> BlockReads:
        decoded: dict[str, int] = {}
        kept: set[str] = set()
        for node in self._nodes[start:stop]:
            # What follows from initializers alone is computed in the block that reads it, wherever its node is.
            if all(self.origin[name] is _Origin.INITIALIZERS for name in node.output if name):
                continue
            for read in self._reads(node):
                if self.origin[read.name] is _Origin.INITIALIZERS:
                    tensors = self.behind.get(read.name, frozenset())
                    kept |= tensors
                    for tensor in tensors:
                        decoded[tensor] = max(self._decoded_nbytes(tensor, read), decoded.get(tensor, 0))
                elif self.origin[read.name] is _Origin.INPUTS and self._made_at.get(read.name, start) < start:
                    kept |= self._for_recomputing(read.name)
        return BlockReads(
            first_node=start,
            stop_node=stop,
            decoded=decoded,
            kept={name: loaded_nbytes(self._model.tensors[name], self._model.compute) for name in sorted(kept)},
        )

    def _reads(self, node: NodeProto) -> Iterator[_Read]:
        """The values whose elements `node` reads."""
        if node.op_type == "Shape":
            return
        op = ("" if node.domain == "ai.onnx" else node.domain, node.op_type)
        tables, rows = _LOOKED_UP.get(op, ((), 0))
        looked_up = len(node.input) > rows and self.origin.get(node.input[rows]) is _Origin.INPUTS
        experts = _EXPERTS.get(op, len(node.input))
        for position, name in enumerate(node.input):
            if not name:
                continue
            if position in tables and looked_up:
                yield _Read(name=name, rows_only=True)
            elif position >= experts:
                yield _Read(name=name, experts=next((a.i for a in node.attribute if a.name == "k"), 1))
            else:
                yield _Read(name=name)
        inputs = set(node.input)
        yield from (_Read(name=name) for name in used_names(node) if name not in inputs)

    def _decoded_nbytes(self, name: str, read: _Read) -> int:
        if read.rows_only:
            return 0
        tensor = self._model.tensors[name]
        nbytes = loaded_nbytes(tensor, self._model.compute)
        if read.experts is None or not tensor.local_shape:
            return nbytes
        split = tensor.shard_axes if tensor.layout is None else axes_of(tensor.layout[0])
        experts = tensor.local_shape[0] * self._model.manifest.mesh.parts(split)
        return min(nbytes, -(-nbytes * read.experts // experts))

    def _for_recomputing(self, name: str) -> frozenset[str]:
        """The stored tensors needed to compute `name` again; none if it is sent."""
        tensors = self.behind[name]
        small = all(self._model.tensors[tensor].local_nbytes <= RECOMPUTED_NBYTES for tensor in tensors)
        return tensors if small else frozenset()
