"""The checker of programs: it derives how every value lies over the ranks, and finds what contradicts that."""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir

from furiosa_llm.builder.errors import BuildError
from furiosa_llm.builder.proof import collectives, stored
from furiosa_llm.builder.proof.by_rule import RuleTransfer
from furiosa_llm.builder.proof.interpretation import LocalFacts, fixed_steps
from furiosa_llm.builder.proof.movers import Movers
from furiosa_llm.builder.proof.pieces import Dim, concatenate, of_layout, places, run
from furiosa_llm.builder.proof.placement import (
    REBUILD,
    ContradictionError,
    Fault,
    Held,
    LocalSizes,
    Placement,
    ProofReport,
    RankConstant,
    RankFunction,
    Rows,
    Unknown,
    whole,
)
from furiosa_llm.builder.proof.ranks import Constants, RankTransfer, restored, sub_dimensions
from furiosa_llm.builder.rules import op_of
from furiosa_llm.builder.rules.padding import Content
from furiosa_llm.builder.shapes.closures import graphs_within, nodes_within
from furiosa_llm.runtime.artifact import layout
from furiosa_llm.runtime.artifact.dtypes import DTYPES
from furiosa_llm.runtime.artifact.errors import LayoutError
from furiosa_llm.runtime.artifact.graphs import COLLECTIVE_DOMAIN
from furiosa_llm.runtime.artifact.manifest import Manifest
from furiosa_llm.runtime.artifact.reader import Artifact, open_artifact

_MAX_RETRIES = 32
"""For how many faulty nodes other readings of the reshapes before them are tried."""
_MAX_KEYS = 6
"""How many different reshapes before a faulty node are given other readings, the nearest first."""
_MAX_WAYS = 3
"""How many other readings each of a pair of reshapes is given, the likeliest first; of one alone, before the rest."""


def prove(path: str | os.PathLike[str]) -> ProofReport:
    """Check the artifact in the folder `path`; ArtifactError if it is not even an artifact."""
    artifact = open_artifact(path, full=False)
    return check_program(artifact.program, artifact.manifest, constants_of(artifact))


def constants_of(artifact: Artifact) -> Constants:
    """A reader of stored tensors: a function of `(name, rank)` that returns the elements, in local shape."""

    def read(name: str, rank: int) -> npt.NDArray[Any]:
        tensor = artifact.tensors[name]
        data = artifact.read_window(artifact.window(name, rank))
        return data.view(DTYPES[tensor.dtype].numpy).reshape(tensor.local_shape)

    return read


def check_program(program: onnx.ModelProto, manifest: Manifest, constants: Constants) -> ProofReport:
    """Derive the placement of every value of `program` from it and `manifest` alone, and report what is wrong.

    `constants` returns the elements of a stored tensor that the builder made (its layout is None) on one rank; it is
    never called for big weights. No fault is raised as an error. A program that cannot be decided has a fault.
    """
    faults = [*stored.check_interface(manifest, program)]
    if faults:
        return ProofReport(faults=tuple(faults), placements={}, num_nodes=len(program.graph.node))
    faults += stored.check_tensors(manifest, program)
    if undecided := list(stored.check_layouts(manifest)):
        return ProofReport(faults=(*faults, *undecided), placements={}, num_nodes=len(program.graph.node))
    try:
        model = ir.from_proto(program)
    except ir.serde.SerdeError as error:
        faults.append(stored.fault("program.onnx", f"a malformed graph ({error.__cause__ or error})", "an ONNX graph"))
        return ProofReport(faults=tuple(faults), placements={}, num_nodes=len(program.graph.node))
    checker = _Checker(model, manifest, constants)
    report = checker.report(faults)
    others = [partial(_Checker, likeliest_first=True)] if checker.read_otherwise else []
    others += [partial(_Checker, steps=steps) for steps in fixed_steps(manifest)[1:]]
    again = () if report.is_proved else (other(model, manifest, constants).report(faults) for other in others)
    return next((one for one in again if one.is_proved), report)


class _Checker:
    def __init__(
        self,
        model: ir.Model,
        manifest: Manifest,
        constants: Constants,
        *,
        likeliest_first: bool = False,
        steps: int | None = None,
    ) -> None:
        """`likeliest_first`: of other readings of reshapes that fit a node try the likeliest before the nearest.

        `steps`: how many new positions each step has, if it is not what is likeliest; see `fixed_steps`.
        """
        self._likeliest_first = likeliest_first
        self._model = model
        self._manifest = manifest
        self._constants = constants
        self._nodes = list(model.graph)
        self._held: dict[ir.Value, Held] = {}
        self._faults: list[Fault] = []
        self._facts = LocalFacts(model, manifest, steps)
        self._choices: dict[object, int] = {}
        self._ways: dict[object, tuple[int, tuple[float, ...]]] = {}
        self._keys: dict[ir.Node, object] = {}
        self._position = {node: position for position, node in enumerate(self._nodes)}
        self._declared = {info.name: info for info in manifest.outputs}
        self._retries = 0
        mesh = manifest.mesh
        self._rules = RuleTransfer(self._facts, mesh, model.graph.opset_imports.get("", 1))
        self._movers = Movers(self._facts, self._choose)
        self._ranks = RankTransfer(self._facts, mesh, constants, sub_dimensions(self._described()))

    @property
    def read_otherwise(self) -> bool:
        """Whether some reshape has another reading than its likeliest one, so that other readings may fit, too."""
        return any(self._choices.values())

    def report(self, faults: Sequence[Fault]) -> ProofReport:
        """The report of the faults given and of the program's faults."""
        self._start()
        for position, node in enumerate(self._nodes):
            self._visit(position, node)
        found = [*faults, *self._faults]
        found += stored.check_collectives(self._manifest, self._model, self._facts)
        found += stored.check_states(self._manifest, self._model)
        placements = {str(value.name): str(held) for value, held in self._held.items() if value.name}
        return ProofReport(faults=tuple(found), placements=placements, num_nodes=len(self._nodes))

    def _described(self) -> list[Dim]:
        """Every dimension that the manifest describes, and those of weights that are stored in parts."""
        manifest = self._manifest
        parts: dict[str, list[tuple[int, Dim]]] = {}
        for tensor in manifest.tensors:
            if tensor.part is not None and tensor.layout is not None and tensor.origin is not None:
                dim = of_layout(tensor.layout[tensor.part.dim], manifest.mesh)
                parts.setdefault(tensor.origin, []).append((tensor.part.start, dim))
        cut = [concatenate([dim for _, dim in sorted(own, key=lambda one: one[0])]) for own in parts.values()]
        layouts: list[Sequence[layout.Dim | None]] = [t.layout for t in manifest.tensors if t.layout is not None]
        layouts += [info.layout for info in manifest.inputs]
        layouts += [info.layout for info in manifest.outputs]
        return cut + [of_layout(dim, manifest.mesh) for dims in layouts for dim in dims if dim is not None]

    def _start(self) -> None:
        """Placements of inputs and initializers."""
        mesh = self._manifest.mesh
        infos = {info.name: info for info in self._manifest.inputs}
        for value in self._model.graph.inputs:
            pairs = zip(infos[str(value.name)].layout, self._facts.shape(value), strict=True)
            dims = [run(size) if dim is None else of_layout(dim, mesh) for dim, size in pairs]
            self._held[value] = _known(tuple(dims), Content.FINITE)
        tensors = {tensor.name: tensor for tensor in self._manifest.tensors}
        for name, value in self._model.graph.initializers.items():
            tensor = tensors.get(name)
            if tensor is not None and tensor.layout is not None:
                self._held[value] = _known(tuple(of_layout(dim, mesh) for dim in tensor.layout), Content.ZERO)
            elif tensor is not None and tensor.shard_axes:
                dims_of_rank = tuple(run((size, size)) for size in tensor.local_shape)
                self._held[value] = RankConstant(dims=dims_of_rank, axes=tensor.shard_axes)
            else:
                self._held[value] = whole(self._facts.shape(value))

    # -- nodes ---------------------------------------------------------------------------------------------------

    def _visit(self, position: int, node: ir.Node) -> None:
        try:
            self._step(node)
        except ContradictionError as error:
            if not self._read_otherwise(position):
                self._faults.append(_fault(node, error))
                self._held.update(dict.fromkeys(node.outputs, Unknown()))

    def _step(self, node: ir.Node) -> None:
        """Derive one node's outputs."""
        held = [None if value is None else self._held.get(value, Unknown()) for value in node.inputs]
        if any(isinstance(one, Unknown) for one in held):
            self._held.update(dict.fromkeys(node.outputs, Unknown()))
            return
        self._check_alike(node)
        if any(value not in self._facts.second for value in node.outputs):
            try:
                self._facts.visit(node)
            except BuildError as error:
                raise ContradictionError(str(error), "operands that fit on one rank", REBUILD) from error
        try:
            outputs = self._outputs(node, held)
        except LayoutError as error:
            raise ContradictionError(str(error), "a dimension that can be decided", REBUILD) from error
        for value, one in zip(node.outputs, outputs, strict=True):
            self._held[value] = one
            if value.is_graph_output():
                stored.check_output(one, self._declared[str(value.name)], self._manifest.mesh)

    def _outputs(self, node: ir.Node, held: Sequence[Held | None]) -> Sequence[Held]:
        if node.domain == COLLECTIVE_DOMAIN:
            return collectives.transfer(node, held[0], self._manifest.mesh)
        if any(isinstance(one, LocalSizes) for one in held):
            return restored(node, held, self._facts)
        in_table = node.op_type.startswith("Gather") and len(held) > 1 and isinstance(held[1], RankFunction)
        if any(isinstance(one, RankConstant | RankFunction | Rows) for one in held) and not in_table:
            return self._ranks.outputs(node, held)
        if all(isinstance(one, Placement) and one.is_whole for one in held if one is not None):
            entry = op_of(node)
            copies = entry is not None and entry.moves == "copies" and not self._are_integers(node)
            if not copies and not node.domain:  # only the rules know what onnxruntime's own ops need
                return [whole(self._facts.shape(value)) for value in node.outputs]
        if node.op_type == "Mul" and any(isinstance(one, Placement) and one.scale != 1 for one in held):
            return self._divided(node, held)
        if collectives.is_ordering(node, held[0]):
            assert isinstance(held[0], Placement)
            return collectives.put_in_order(node, held[0], self._facts, self._whole_constant(node.inputs[1]))
        if node.domain == "" and node.op_type in self._movers.table:
            return self._movers.outputs(node, held)
        return self._rules.outputs(node, held)

    def _check_alike(self, node: ir.Node) -> None:
        """Check that equal operands give equal results, and that graphs inside a node read only whole values."""
        inner = list(nodes_within(node))
        if any((entry := op_of(one)) is not None and entry.random for one in (node, *inner)):
            raise ContradictionError("numbers drawn at random on each rank", "the same numbers on all ranks", REBUILD)
        results = (value for graph in graphs_within(node) for value in graph.outputs)
        if any(value.producer() is None and not value.is_graph_input() for value in results):
            raise ContradictionError("a graph inside a node that does not compute its outputs", "its own", REBUILD)
        for value in (value for one in inner for value in one.inputs if value is not None):
            held = self._held.get(value)
            if held is not None and not (isinstance(held, Placement) and held.is_whole):
                raise ContradictionError(
                    f"a graph inside a node that reads {value.name!r}: {held}",
                    "a tensor that every rank holds",
                    REBUILD,
                )

    def _are_integers(self, node: ir.Node) -> bool:
        """Whether a node gives a list of integers that are known: sizes, not a tensor that may be split."""
        fact = self._facts.first[node.outputs[0]]
        known = fact.dtype.is_integer() and self._facts.values(node.outputs[0]) is not None
        return known and len(fact.shape) < 2

    def _whole_constant(self, value: ir.Value | None) -> npt.NDArray[Any] | None:
        """The elements of a constant that is the same on all ranks, inline or stored."""
        if value is None or not value.is_initializer():
            return None
        tensor = value.const_value
        if isinstance(tensor, ir.ExternalTensor) or tensor is None:
            return self._constants(str(value.name), 0)
        return np.asarray(tensor.numpy())

    def _divided(self, node: ir.Node, held: Sequence[Held | None]) -> list[Held]:
        """The product that divides a mean of parts by their number."""
        port = next(p for p, one in enumerate(held) if isinstance(one, Placement) and one.scale != 1)
        data, other = held[port], node.inputs[1 - port]
        values = self._facts.values(other)
        assert isinstance(data, Placement)
        factor = float(values[0].reshape(-1)[0]) if values is not None and values[0].size == 1 else None
        if factor is None or factor * data.scale != 1:
            raise ContradictionError(
                f"a mean of {data.scale} parts that is multiplied by {factor}", f"1/{data.scale}", REBUILD
            )
        return [Placement(dims=data.dims, partial=data.partial, contents=data.contents)]

    # -- readings ------------------------------------------------------------------------------------------------

    def _choose(self, node: ir.Node, key: object, ways: Mapping[tuple[Dim, ...], float]) -> tuple[Dim, ...]:
        """One of several readings of a node, the same for all nodes in the same situation."""
        first, _ = self._ways.get(key, (self._position[node], ()))
        self._ways[key] = (min(first, self._position[node]), tuple(ways.values()))
        self._keys[node] = key
        return list(ways)[self._choices.get(key, 0)]

    def _read_otherwise(self, position: int) -> bool:
        """Whether everything up to a faulty node is right with another reading of one or two reshapes before it.

        The few likeliest readings of each reshape are tried first, those of the nearest before others.
        """
        self._retries += 1
        if self._retries > _MAX_RETRIES:
            return False
        keys = self._readable(self._nodes[position])
        others = {key: [n for n in range(len(self._ways[key][1])) if n != self._choices.get(key, 0)] for key in keys}
        trials = [{key: n} for key in keys for n in others[key]]
        trials.sort(key=lambda trial: max(self._lateness(key, n) for key, n in trial.items()))
        trials += [
            dict(zip(pair, numbers, strict=True))
            for pair in itertools.combinations(keys, 2)
            for numbers in itertools.product(*(others[key][:_MAX_WAYS] for key in pair))
        ]
        return any(self._fits(trial, position) for trial in trials)

    def _lateness(self, key: object, reading: int) -> tuple[bool, float]:
        return reading >= _MAX_WAYS, self._ways[key][1][reading] if self._likeliest_first else 0.0

    def _fits(self, trial: Mapping[object, int], position: int) -> bool:
        """Whether everything up to a node is right with the readings of a `trial`; if so, they are kept."""
        before, kept = dict(self._held), {key: self._choices.get(key, 0) for key in trial}
        self._choices.update(trial)
        if self._redo(min(self._ways[key][0] for key in trial), position):
            return True
        self._held = before
        self._choices.update(kept)
        return False

    def _readable(self, node: ir.Node) -> list[object]:
        """The nearest reshapes before a node that can be read in several ways."""
        found: dict[object, None] = {}
        seen, queue = {node}, [node]
        while queue and len(found) < _MAX_KEYS:
            current = queue.pop(0)
            key = self._keys.get(current)
            if key is not None and len(self._ways[key][1]) > 1:
                found[key] = None
            for value in current.inputs:
                producer = value.producer() if value is not None else None
                if producer is not None and producer not in seen:
                    seen.add(producer)
                    queue.append(producer)
        return list(found)

    def _redo(self, first: int, last: int) -> bool:
        try:
            for node in self._nodes[first : last + 1]:
                known = all(value in self._held and isinstance(self._held[value], Unknown) for value in node.outputs)
                if not known or node is self._nodes[last]:
                    self._step(node)
        except ContradictionError:
            return False
        return True


def _known(dims: tuple[Dim, ...], content: Content) -> Placement:
    contents = {place: content for dim in dims for place in places(dim)}
    return Placement(dims=dims, contents=contents)


def _fault(node: ir.Node, error: ContradictionError) -> Fault:
    return Fault(node=f'{node.op_type} "{node.name}"', what=error.found, expected=error.expected, remedy=error.remedy)
