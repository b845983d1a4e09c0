"""An artifact to seed faults in, and the register of the kinds of faults."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy.typing as npt
import onnx
import onnx_ir as ir
from onnx import NodeProto, TensorProto, numpy_helper

from furiosa_llm.builder.proof import constants_of
from furiosa_llm.builder.proof.interpretation import LocalFacts
from furiosa_llm.runtime.artifact.dtypes import DTYPES
from furiosa_llm.runtime.artifact.graphs import COLLECTIVE_DOMAIN
from furiosa_llm.runtime.artifact.layout import Dim, Leaf, Mesh, Prefix
from furiosa_llm.runtime.artifact.manifest import Collective, Manifest, StoredTensor
from furiosa_llm.runtime.artifact.reader import Artifact

Array = npt.NDArray[Any]
Constants = Callable[[str, int], Array]


@dataclasses.dataclass
class Subject:
    """What the checker is given, to be altered."""

    program: onnx.ModelProto
    manifest: Manifest
    constants: Constants
    types: Mapping[str, tuple[str, int]]
    """The type and the number of dimensions of every value of the artifact as it was."""

    @classmethod
    def of(cls, artifact: Artifact) -> Subject:
        return cls.made_of(artifact.program, artifact.manifest, constants_of(artifact))

    @classmethod
    def made_of(cls, program: onnx.ModelProto, manifest: Manifest, constants: Constants) -> Subject:
        model = ir.from_proto(program)
        facts = LocalFacts(model, manifest)
        for node in model.graph:
            facts.visit(node)
        types = {str(value.name): (fact.dtype.name, len(fact.shape)) for value, fact in facts.first.items()}
        return cls(program, manifest, constants, types)

    def copy(self) -> Subject:
        program = onnx.ModelProto()
        program.CopyFrom(self.program)
        return Subject(program, self.manifest, self.constants, self.types)

    # -- looking ---------------------------------------------------------------------------------------------------

    @property
    def mesh(self) -> Mesh:
        return self.manifest.mesh

    def nodes(self, *op_types: str) -> list[int]:
        """Positions of the nodes of some op types."""
        return [i for i, node in enumerate(self.program.graph.node) if node.op_type in op_types]

    def node(self, position: int) -> NodeProto:
        found: NodeProto = self.program.graph.node[position]
        return found

    def producer(self, value: str) -> int | None:
        found = (i for i, node in enumerate(self.program.graph.node) if value in node.output)
        return next(found, None)

    def readers(self, value: str) -> list[int]:
        return [i for i, node in enumerate(self.program.graph.node) if value in node.input]

    def is_output(self, value: str) -> bool:
        return any(output.name == value for output in self.program.graph.output)

    def inline(self, name: str) -> Array | None:
        """The elements of an inline initializer."""
        for tensor in self.program.graph.initializer:
            if tensor.name == name and tensor.data_location != TensorProto.EXTERNAL:
                return numpy_helper.to_array(tensor)
        return None

    def tensor(self, name: str) -> StoredTensor | None:
        return next((tensor for tensor in self.manifest.tensors if tensor.name == name), None)

    def made(self, name: str) -> StoredTensor | None:
        """A stored tensor of the builder's own, different from rank to rank."""
        tensor = self.tensor(name)
        return tensor if tensor is not None and tensor.layout is None and tensor.shard_axes else None

    def shards(self, name: str) -> list[Array]:
        return [self.constants(name, rank) for rank in range(self.mesh.size)]

    # -- altering --------------------------------------------------------------------------------------------------

    def remove(self, position: int, instead: str) -> None:
        """Take a node out; who read its output reads `instead`."""
        (old,) = self.node(position).output
        del self.program.graph.node[position]
        self.redirect(old, instead)

    def redirect(self, old: str, new: str) -> None:
        for node in self.program.graph.node:
            node.input[:] = [new if name == old else name for name in node.input]
        if self.is_output(old):
            for node in self.program.graph.node:
                node.output[:] = [f"{old}/before" if name == old else name for name in node.output]
            self.program.graph.node.append(onnx.helper.make_node("Identity", [new], [old]))

    def insert(self, position: int, node: NodeProto) -> None:
        self.program.graph.node.insert(position, node)

    def constant(self, array: Array) -> str:
        name = f"seeded/{len(self.program.graph.initializer)}"
        self.program.graph.initializer.append(numpy_helper.from_array(array, name))
        return name

    def set_ints(self, position: int, name: str, value: int | Sequence[int]) -> None:
        node = self.node(position)
        kept = [attribute for attribute in node.attribute if attribute.name != name]
        del node.attribute[:]
        node.attribute.extend([*kept, onnx.helper.make_attribute(name, value)])

    def set_shards(self, name: str, shards: Sequence[Array]) -> None:
        before = self.constants
        self.constants = lambda wanted, rank: shards[rank] if wanted == name else before(wanted, rank)

    def set_tensor(self, changed: StoredTensor) -> None:
        """Another layout: the manifest, the initializer's shape and its window follow."""
        entries = tuple(changed if tensor.name == changed.name else tensor for tensor in self.manifest.tensors)
        self.manifest = dataclasses.replace(self.manifest, tensors=entries)
        offsets: dict[str, int] = {}
        for tensor in entries:
            nbytes = DTYPES[tensor.dtype].nbytes(tensor.local_shape)
            for initializer in self.program.graph.initializer:
                if initializer.name == tensor.name:
                    initializer.dims[:] = tensor.local_shape
                    place = {"location": tensor.file, "offset": offsets.get(tensor.file, 0), "length": nbytes}
                    del initializer.external_data[:]
                    for key, value in place.items():
                        initializer.external_data.add(key=key, value=str(value))
            offsets[tensor.file] = offsets.get(tensor.file, 0) + nbytes * self.mesh.parts(tensor.shard_axes)

    def relist_collectives(self) -> None:
        """Make the manifest's list that of the program: the lowering would have written both."""
        known = {collective.id: collective for collective in self.manifest.collectives}
        listed = []
        for node in self.program.graph.node:
            if node.domain != COLLECTIVE_DOMAIN:
                continue
            attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
            dtype, rank = self.types.get(node.input[0], ("FLOAT", 3))
            shape = known[node.name].shape if node.name in known else tuple(f"{node.name}.{d}" for d in range(rank))
            listed.append(
                Collective(
                    id=node.name,
                    kind=node.op_type,
                    axes=tuple(attributes["axes"]),
                    dim=attributes.get("dim"),
                    dtype=dtype,
                    shape=shape,
                )
            )
        self.manifest = dataclasses.replace(self.manifest, collectives=tuple(listed))


Kind = Callable[[Subject], Iterator[Subject]]
KINDS: dict[str, Kind] = {}


def kind(name: str) -> Callable[[Kind], Kind]:
    def register(function: Kind) -> Kind:
        KINDS[name] = function
        return function

    return register


def attribute_of(node: NodeProto, name: str) -> Any:
    found = [onnx.helper.get_attribute_value(a) for a in node.attribute if a.name == name]
    return found[0] if found else None


def in_front(subject: Subject, position: int, make: Callable[[str], NodeProto]) -> Subject:
    """A node between another one and its first operand."""
    found = subject.copy()
    extra = make(found.node(position).input[0])
    found.node(position).input[0] = extra.output[0]
    found.insert(position, extra)
    return found


def lookups(subject: Subject, suffix: str) -> list[int]:
    """Nodes of lookups in split tables by the end of their names."""
    return [i for i, node in enumerate(subject.program.graph.node) if node.name.endswith(suffix)]


def each_leaf(dim: Dim, change: Callable[[Leaf], Leaf]) -> Dim:
    if isinstance(dim, Leaf):
        return change(dim) if dim.axes else dim
    if isinstance(dim, Prefix):
        return Prefix(dim.size, each_leaf(dim.part, change))
    return type(dim)(tuple(each_leaf(part, change) for part in dim.parts))
