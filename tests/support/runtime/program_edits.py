"""Changes of an artifact's program by someone who knows the format and makes everything else agree with them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper

from furiosa_llm.runtime.artifact.graphs import COLLECTIVE_DOMAIN
from furiosa_llm.runtime.artifact.manifest import seal
from tests.support.tampering import reseal


class NotThereError(Exception):
    """The program has not what is to be changed."""


class Program:
    """The program of a copy of an artifact, and its manifest; `save` writes both, with the digests that they then have.

    Nodes that are put in have no names, so that whoever traces them has no more than what they compute.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model = onnx.load_model(folder / "program.onnx", load_external_data=False)
        self.manifest: Any = json.loads((folder / "manifest.json").read_bytes())
        self._starts = [self.nodes[block["first_node"]].name for block in self.manifest["blocks"]]
        self._made = 0

    @property
    def nodes(self) -> list[NodeProto]:
        """All nodes, in order."""
        return list(self.model.graph.node)

    # -- finding ---------------------------------------------------------------------------------------------------

    def find(self, op: str, number: int = 0, where: Callable[[NodeProto], bool] = lambda _: True) -> NodeProto:
        """The node of a type with that number, counted from the end if it is negative."""
        found = [node for node in self.nodes if node.op_type == op and where(node)]
        if not -len(found) <= number < len(found):
            raise NotThereError(op)
        return found[number]

    def hidden(self) -> str:
        """What every rank has behind the first layer's attention."""
        return str(self.find("AllReduce", 1).output[0])

    def input(self, role: str) -> str:
        """The input of a role."""
        for info in self.manifest["inputs"]:
            if info["role"] == role:
                return str(info["name"])
        raise NotThereError(role)

    def floats(self, node: NodeProto) -> bool:
        """Whether a node works on hidden values: it is behind the first sum over the ranks, and no mask or size."""
        first = self.nodes.index(self.find("AllReduce"))
        return self.nodes.index(node) > first and not any(
            word in name for name in (*node.input, *node.output) for word in ("fused/", "sizes/", "Constant", "index/")
        )

    def array(self, name: str) -> Any:
        """The elements of an initializer whose data is in the program."""
        for tensor in self.model.graph.initializer:
            if tensor.name == name and tensor.data_location != TensorProto.EXTERNAL:
                return numpy_helper.to_array(tensor)
        raise NotThereError(name)

    # -- changing --------------------------------------------------------------------------------------------------

    def constant(self, value: Any, dtype: type = np.float32) -> str:
        """A new initializer."""
        self._made += 1
        name = f"made/{self._made}"
        self.model.graph.initializer.append(numpy_helper.from_array(np.asarray(value, dtype), name))
        return name

    def declare(self, name: str, dtype: int, shape: Sequence[int | str] = ()) -> None:
        """Says the type of a value, without which it may not cross a collective."""
        self.model.graph.value_info.append(helper.make_tensor_value_info(name, dtype, list(shape)))

    def value(self) -> str:
        """A new name."""
        self._made += 1
        return f"made/{self._made}"

    def through(self, value: str, make: Callable[[str], Sequence[NodeProto]]) -> None:
        """Puts the nodes that `make` gives behind what computes `value`: the last one gives it to whoever reads it.

        `make` is told the name of what was `value`.
        """
        nodes = self.nodes
        place = next(i for i, node in enumerate(nodes) if value in node.output)
        before = self.value()
        for i, name in enumerate(nodes[place].output):
            if name == value:
                nodes[place].output[i] = before
        known = {info.name: info for info in (*self.model.graph.value_info, *self.model.graph.output)}
        if value in known:
            info = self.model.graph.value_info.add()
            info.CopyFrom(known[value])
            info.name = before
        added = list(make(before))
        added[-1].output[0] = value
        self.replace(nodes[: place + 1] + added + nodes[place + 1 :])

    def before(self, node: NodeProto, port: int, make: Callable[[str], Sequence[NodeProto]]) -> None:
        """Puts the nodes that `make` gives before one input of `node`; it is told what that is."""
        nodes = self.nodes
        place = next(i for i, one in enumerate(nodes) if one.output == node.output)
        added = list(make(node.input[port]))
        nodes[place].input[port] = added[-1].output[0]
        self.replace(nodes[:place] + added + nodes[place:])

    def node(self, op: str, inputs: Sequence[str], **attributes: Any) -> NodeProto:
        """A node with an output of its own."""
        return helper.make_node(op, list(inputs), [self.value()], **attributes)

    def replace(self, nodes: Sequence[NodeProto]) -> None:
        """All nodes anew."""
        kept = [NodeProto.FromString(node.SerializeToString()) for node in nodes]
        del self.model.graph.node[:]
        self.model.graph.node.extend(kept)

    def write(self, name: str, array: Any) -> None:
        """Other elements of an initializer."""
        tensor = next(tensor for tensor in self.model.graph.initializer if tensor.name == name)
        tensor.CopyFrom(numpy_helper.from_array(np.asarray(array, self.array(name).dtype), name))

    def set(self, node: NodeProto, **attributes: Any) -> None:
        """Other attributes of a node."""
        kept = [attribute for attribute in node.attribute if attribute.name not in attributes]
        del node.attribute[:]
        node.attribute.extend([*kept, *(helper.make_attribute(name, value) for name, value in attributes.items())])

    # -- writing ---------------------------------------------------------------------------------------------------

    def save(self) -> None:
        """Writes program and manifest; blocks begin at the nodes that they began at."""
        places = {node.name: place for place, node in enumerate(self.nodes) if node.name}
        starts = [places[name] for name in self._starts]
        stops = [*starts[1:], len(self.nodes)][: len(starts)]
        for block, start, stop in zip(self.manifest["blocks"], starts, stops, strict=True):
            block["first_node"] = start
            block["collectives"] = sum(node.domain == COLLECTIVE_DOMAIN for node in self.nodes[start:stop])
        (self.folder / "program.onnx").write_bytes(self.model.SerializeToString())
        (self.folder / "manifest.json").write_bytes(seal(self.manifest))
        reseal(self.folder)
