"""Cuts a program into pipeline stages: the nodes of each, what crosses between them, and what each computes anew.

A value that follows from the step's inputs alone (a mask, a rotary table) is computed anew in each stage that reads
it, unless that needs a large stored tensor, or a state that another stage keeps: then it is sent. The sizes of a state
can be taken from any other state of the same shape.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from onnx import GraphProto, ModelProto, NodeProto, ValueInfoProto, helper

from furiosa_llm.runtime.artifact.errors import ArtifactError
from furiosa_llm.runtime.artifact.graphs import COLLECTIVE_DOMAIN, following, used_names
from furiosa_llm.runtime.artifact.json_reader import REBUILD
from furiosa_llm.runtime.artifact.manifest import PROGRAM_NAME, Collective, State, StoredTensor
from furiosa_llm.runtime.artifact.reader import SplitModel
from furiosa_llm.runtime.errors import UnsupportedError

RECOMPUTED_NBYTES = 2**20
"""What follows from the inputs alone (masks, rotary tables) is computed again in every stage that reads it, unless a
stored tensor above this size is needed for it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StageGraph:
    """One stage of a program, as a model of its own."""

    index: int
    model: ModelProto
    collectives: tuple[Collective, ...]
    """The collectives of the collective nodes, in their order."""
    states: tuple[State, ...]
    """The states that this stage keeps."""
    received: Mapping[str, int]
    """Value that comes from an earlier stage -> that stage."""
    sent: tuple[str, ...]
    """The values that leave for later stages."""


def cut_stages(
    model: ModelProto,
    starts: Sequence[str | None],
    *,
    collectives: Sequence[Collective],
    states: Sequence[State],
    tensors: Mapping[str, StoredTensor],
) -> tuple[StageGraph, ...]:
    """The stages of `model`: the first begins at the first node, each other one after a collective, or soon behind it.

    `starts` gives for each stage the output of the collective that it begins after, None for the first. Raises
    ArtifactError if a value that must be sent has no type in the program.
    """
    return _Cutting(model, starts, collectives, states, tensors).run()


def received_values(model: SplitModel, first_nodes: Sequence[int]) -> tuple[tuple[str, ...], ...]:
    """What each stage of `model` receives of earlier ones; `first_nodes` are those of blocks that stages begin with."""
    starts = [str(model.program.graph.node[at - 1].output[0]) if at else None for at in first_nodes]
    manifest = model.manifest
    return _Cutting(model.program, starts, manifest.collectives, manifest.states, model.tensors).received()


class _Cutting:
    def __init__(
        self,
        model: ModelProto,
        starts: Sequence[str | None],
        collectives: Sequence[Collective],
        states: Sequence[State],
        tensors: Mapping[str, StoredTensor],
    ) -> None:
        graph = model.graph
        self._model = model
        self._states = states
        self._tensors = tensors
        self._nodes = list(graph.node)
        self._producer = {name: at for at, node in enumerate(self._nodes) for name in node.output if name}
        self._declared: dict[str, ValueInfoProto] = {
            value.name: value for value in (*graph.value_info, *graph.input, *graph.output)
        }
        known = {collective.id: collective for collective in collectives}  # serving may need only some of them
        self._collectives = {n.output[0]: known[n.name] for n in self._nodes if n.domain == COLLECTIVE_DOMAIN}
        self._waits = following(self._nodes)
        self._first = self._begin([0 if start is None else self._producer[start] + 1 for start in starts])
        inputs = {value.name: value.type.tensor_type.shape.SerializeToString() for value in graph.input}
        self._state_shapes = {state.input: inputs[state.input] for state in states}

    def run(self) -> tuple[StageGraph, ...]:
        """See `cut_stages`."""
        stages = range(len(self._first))
        parts = [self._part(stage) for stage in stages]
        made_by = {name: stage for stage in stages for at in self._own(stage) for name in self._nodes[at].output}
        sent: list[dict[str, None]] = [{} for _ in self._first]
        received: list[dict[str, int]] = []
        for _, names in parts:
            received.append({name: made_by[name] for name in names})
            for name in names:
                sent[made_by[name]][name] = None
        return tuple(
            self._stage(index, positions, received[index], tuple(sent[index]))
            for index, (positions, _) in enumerate(parts)
        )

    def received(self) -> tuple[tuple[str, ...], ...]:
        """See `received_values`."""
        return tuple(tuple(self._part(stage)[1]) for stage in range(len(self._first)))

    def _begin(self, starts: Sequence[int]) -> list[int]:
        """Where stages begin that may begin at `starts`, or before anything large is read or exchanged after these."""
        last_read = {name: at for at, node in enumerate(self._nodes) for name in used_names(node)}
        last_read |= {value.name: len(self._nodes) for value in self._model.graph.output}
        ends = [*starts[1:], len(self._nodes)]
        return [start and self._least_crossing(start, end, last_read) for start, end in zip(starts, ends, strict=True)]

    def _least_crossing(self, start: int, end: int, last_read: Mapping[str, int]) -> int:
        """The first of the positions from `start` on with the fewest bytes in front of it that are read behind it."""
        kept = {name for state in self._states for name in (state.input, state.output)}
        crossing = {n for n in self._waits - kept if self._producer[n] < start <= last_read.get(n, -1)}
        best, least = start, self._nbytes(crossing)
        for at in range(start, end - 1):
            node = self._nodes[at]
            read = used_names(node)
            large = any(n in self._tensors and self._tensors[n].local_nbytes > RECOMPUTED_NBYTES for n in read)
            if large or node.domain == COLLECTIVE_DOMAIN or kept.intersection((*read, *node.output)):
                break
            crossing = {n for n in (*crossing, *node.output) if n in self._waits and last_read.get(n, -1) > at}
            found = self._nbytes(crossing)
            if found < least:
                best, least = at + 1, found
        return best

    def _nbytes(self, names: set[str]) -> float:
        """What `names` take for a token; no number is as great as that of a value that has no type."""
        total = 0.0
        for name in names:
            kind = self._declared[name].type.tensor_type if name in self._declared else None
            if kind is None or not kind.HasField("shape"):
                return float("inf")
            itemsize = helper.tensor_dtype_to_np_dtype(kind.elem_type).itemsize
            total += itemsize * float(np.prod([dim.dim_value or 1 for dim in kind.shape.dim]))
        return total

    def _own(self, stage: int) -> range:
        ends = [*self._first[1:], len(self._nodes)]
        return range(self._first[stage], ends[stage])

    def _part(self, stage: int) -> tuple[list[int], list[str]]:
        """The positions of the nodes of a stage, including nodes that it computes anew, and the values it receives."""
        own = self._own(stage)
        positions = set(own)
        received: dict[str, None] = {}
        made = {name for at in own for name in self._nodes[at].output}
        states = {state.input for state in self._states if state.output in made}
        pending = [name for at in own for name in used_names(self._nodes[at])]
        seen: set[str] = set()
        while pending:
            name = pending.pop()
            if name in seen or name not in self._producer or self._producer[name] in own:
                continue
            seen.add(name)
            anew = None if name in self._waits else self._computed_anew(name, states)
            if anew is None:
                received[name] = None
            else:
                positions |= anew
        return sorted(positions), sorted(received, key=lambda name: self._producer[name])

    def _computed_anew(self, name: str, states: set[str]) -> set[int] | None:
        """The nodes that `name` follows from; None if they need a large stored tensor or a state not in `states`."""
        positions: set[int] = set()
        read: set[str] = set()
        pending = [name]
        while pending:
            value = pending.pop()
            if value in read:
                continue
            read.add(value)
            if value in self._producer:
                positions.add(self._producer[value])
                pending.extend(used_names(self._with_own_states(self._nodes[self._producer[value]], states)))
        if read & ({state.input for state in self._states} - states):
            return None
        largest = max((self._tensors[value].local_nbytes for value in read & self._tensors.keys()), default=0)
        return positions if largest <= RECOMPUTED_NBYTES else None

    def _stage(
        self, index: int, positions: Sequence[int], received: Mapping[str, int], sent: tuple[str, ...]
    ) -> StageGraph:
        source = self._model
        own = {name for at in self._own(index) for name in self._nodes[at].output}
        outputs = [value.name for value in source.graph.output if value.name in own]
        states = tuple(state for state in self._states if state.output in own)
        kept = {state.input for state in states}
        nodes = [self._with_own_states(node, kept) for node in self._needed(positions, {*outputs, *sent})]
        read = {name for node in nodes for name in used_names(node)}
        received = {name: stage for name, stage in received.items() if name in read}
        foreign = {state.input for state in self._states if state not in states} & read
        if foreign:
            raise UnsupportedError(
                f"stage {index} reads {min(foreign)!r:.80}, a state that another stage keeps; choose other stages"
            )
        graph = GraphProto(name=f"stage {index}", node=nodes)
        graph.input.extend(self._typed(name) for name in received)
        graph.input.extend(value for value in source.graph.input if value.name in read)
        graph.output.extend(self._typed(name) for name in outputs)
        graph.output.extend(self._typed(name) for name in sent if name not in outputs)
        graph.initializer.extend(tensor for tensor in source.graph.initializer if tensor.name in read)
        graph.value_info.extend(source.graph.value_info)
        model = ModelProto(ir_version=source.ir_version, graph=graph, functions=source.functions)
        model.opset_import.extend(source.opset_import)
        return StageGraph(
            index=index,
            model=model,
            collectives=tuple(self._collectives[n.output[0]] for n in nodes if n.domain == COLLECTIVE_DOMAIN),
            states=states,
            received=received,
            sent=sent,
        )

    def _needed(self, positions: Sequence[int], wanted: set[str]) -> list[NodeProto]:
        """The nodes that make the values `wanted`, and all collectives, because every rank takes part in these."""
        nodes: list[NodeProto] = []
        wanted = set(wanted)
        for at in reversed(positions):
            node = self._nodes[at]
            if node.domain == COLLECTIVE_DOMAIN or wanted.intersection(node.output):
                nodes.append(node)
                wanted.update(used_names(node))
        return nodes[::-1]

    def _with_own_states(self, node: NodeProto, kept: set[str]) -> NodeProto:
        """`node`; if it takes the shape of a state not in `kept`, it takes it of a state in `kept` of equal shape."""
        if node.op_type != "Shape" or node.input[0] in kept or node.input[0] not in self._state_shapes:
            return node
        shape = self._state_shapes[node.input[0]]
        twin = min((name for name in kept if self._state_shapes[name] == shape), default=None)
        if twin is None:
            return node
        own = NodeProto()
        own.CopyFrom(node)
        own.input[0] = twin
        return own

    def _typed(self, name: str) -> ValueInfoProto:
        if name not in self._declared:
            raise ArtifactError(
                f"{PROGRAM_NAME}: value_info has no type for {name!r:.80}, which crosses between stages; {REBUILD}"
            )
        return self._declared[name]
