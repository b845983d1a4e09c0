"""Check that the manifest agrees with itself and the program: stored tensors, windows, collectives, interface."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterator, Mapping, Sequence

import onnx
import onnx_ir as ir

from furiosa_llm.builder.proof import pieces
from furiosa_llm.builder.proof.interpretation import LocalFacts, sizes_of
from furiosa_llm.builder.proof.placement import REBUILD, ContradictionError, Fault, Held, Placement
from furiosa_llm.builder.rules.padding import Content
from furiosa_llm.builder.shapes.closures import nodes_within
from furiosa_llm.runtime.artifact.dimensions import parse_dimension
from furiosa_llm.runtime.artifact.errors import LayoutError
from furiosa_llm.runtime.artifact.graphs import COLLECTIVE_DOMAIN
from furiosa_llm.runtime.artifact.layout import Dim, Mesh, axes_of, global_size, local_size
from furiosa_llm.runtime.artifact.manifest import (
    Collective,
    Manifest,
    OriginalInitializer,
    OutputInfo,
    State,
    StoredTensor,
)


def fault(where: str, what: str, expected: str) -> Fault:
    """A fault of the manifest."""
    return Fault(node=where, what=what, expected=expected, remedy=REBUILD)


def check_interface(manifest: Manifest, program: onnx.ModelProto) -> Iterator[Fault]:
    """Check that the program's inputs and outputs are the manifest's, in its order."""
    for what, values, infos in (
        ("inputs", program.graph.input, manifest.inputs),
        ("outputs", program.graph.output, manifest.outputs),
    ):
        found, expected = [value.name for value in values], [info.name for info in infos]
        if found != expected:
            yield fault(f"$.{what}", f"a program with the {what} {found}", f"{expected}")


def check_layouts(manifest: Manifest) -> Iterator[Fault]:
    """Check that every layout has a normal form, without which nothing is known about tensors that have the layout."""
    named: list[tuple[str, Sequence[Dim | None]]] = []
    named += [(f'tensor "{tensor.name}"', tensor.layout or ()) for tensor in manifest.tensors]
    named += [(f'input "{info.name}"', info.layout) for info in manifest.inputs]
    named += [(f'output "{info.name}"', info.layout) for info in manifest.outputs]
    for where, layout in named:
        for dim in (dim for dim in layout if dim is not None):
            try:
                pieces.of_layout(dim, manifest.mesh)
            except LayoutError as error:
                yield fault(where, f"a layout that cannot be decided: {error}", "whole blocks, dealt out in order")


# -- stored tensors --------------------------------------------------------------------------------------------------


def check_tensors(manifest: Manifest, program: onnx.ModelProto) -> Iterator[Fault]:
    """Check every stored tensor: its layout, its local shape, its shards, its initializer and its window."""
    initializers = {tensor.name: tensor for tensor in program.graph.initializer}
    originals = {original.name: original for original in manifest.initializers}
    for tensor in manifest.tensors:
        where = f'tensor "{tensor.name}"'
        if tensor.layout is not None:
            yield from _check_layout(where, tensor, tensor.layout, manifest)
            yield from _check_origin(where, tensor, originals)
        found = initializers.get(tensor.name)
        if found is None:
            yield fault(where, "no initializer of that name", "one in program.onnx")
        elif tuple(found.dims) != tensor.local_shape or onnx.TensorProto.DataType.Name(found.data_type) != tensor.dtype:
            yield fault(
                where,
                f"an initializer of shape {list(found.dims)}",
                f"{tensor.dtype} {list(tensor.local_shape)}, as the manifest says",
            )
    stored = {tensor.name for tensor in manifest.tensors}
    for name, initializer in initializers.items():
        if initializer.data_location == onnx.TensorProto.EXTERNAL and name not in stored:
            yield fault(f'initializer "{name}"', "data outside of the program", "an entry of $.tensors for it")
        if initializer.data_location != onnx.TensorProto.EXTERNAL and name in stored:
            yield fault(f'tensor "{name}"', "an initializer with data of its own", "one in a weights file")
    yield from _check_windows(manifest, initializers)
    yield from _check_parts(manifest)


def _check_layout(where: str, tensor: StoredTensor, layout: Sequence[Dim], manifest: Manifest) -> Iterator[Fault]:
    local = tuple(local_size(dim, manifest.mesh) for dim in layout)
    if local != tensor.local_shape:
        yield fault(where, f"local shape {list(tensor.local_shape)}", f"{list(local)}, as its layout says")
    used = [axis for dim in layout for axis in axes_of(dim)]
    if len(used) != len(set(used)):
        yield fault(where, f"a layout that uses mesh axes {used}", "each axis once")
    if tuple(dict.fromkeys(used)) != tensor.shard_axes:
        yield fault(
            where, f"shards told apart by axes {list(tensor.shard_axes)}", f"{used}, in the order of its layout"
        )


def _check_origin(where: str, tensor: StoredTensor, originals: Mapping[str, OriginalInitializer]) -> Iterator[Fault]:
    origin = originals.get(tensor.origin) if tensor.origin is not None else None
    if origin is None or tensor.layout is None:
        return
    expected = list(origin.shape)
    if tensor.part is not None:
        expected[tensor.part.dim] = tensor.part.stop - tensor.part.start
    found = [global_size(dim) for dim in tensor.layout]
    if found != expected or tensor.dtype != origin.dtype:
        yield fault(where, f"a layout of {tensor.dtype} {found}", f"{origin.dtype} {expected}, as its origin is")


def _check_parts(manifest: Manifest) -> Iterator[Fault]:
    """Check that the parts of an original are all of it, in order, each index once."""
    tensors = {tensor.name: tensor for tensor in manifest.tensors}
    for original in manifest.initializers:
        parts = [tensors[name].part for name in original.stored if name in tensors]
        given = [part for part in parts if part is not None]
        if not given and len(parts) <= 1:
            continue
        where = f'initializer "{original.name}"'
        dims = {part.dim for part in given}
        if len(given) != len(parts) or len(dims) != 1:
            yield fault(where, "stored tensors that are parts of different dimensions", "parts of one dimension")
            continue
        bounds = [bound for part in given for bound in (part.start, part.stop)]
        expected = [0, *(b for part in given[:-1] for b in (part.stop, part.stop)), original.shape[dims.pop()]]
        if bounds != expected:
            yield fault(where, f"parts with the bounds {bounds}", f"{expected}, one behind the other")


def _check_windows(manifest: Manifest, initializers: Mapping[str, onnx.TensorProto]) -> Iterator[Fault]:
    """Check that stored tensors lie one after the other in their files, each as large as its shards."""
    ends: dict[str, int] = {}
    windows: list[tuple[str, int, int, StoredTensor]] = []
    for tensor in manifest.tensors:
        found = initializers.get(tensor.name)
        if found is None or found.data_location != onnx.TensorProto.EXTERNAL:
            continue
        entries = {entry.key: entry.value for entry in found.external_data}
        nbytes = tensor.local_nbytes
        place = entries.get("location"), entries.get("length")
        if place != (tensor.file, str(nbytes)) or not entries.get("offset", "").isdecimal():
            yield fault(f'tensor "{tensor.name}"', f"a window {entries}", f"{nbytes} bytes of {tensor.file}")
            continue
        windows.append((tensor.file, int(entries["offset"]), nbytes * manifest.mesh.parts(tensor.shard_axes), tensor))
    for file, offset, nbytes, tensor in sorted(windows, key=lambda window: window[:2]):
        expected = ends.get(file, offset)
        if offset != expected:
            yield fault(f'tensor "{tensor.name}"', f"shard 0 at byte {offset} of {file}", f"at byte {expected}")
        ends[file] = offset + nbytes


# -- collectives and interface ---------------------------------------------------------------------------------------


def check_collectives(manifest: Manifest, model: ir.Model, facts: LocalFacts) -> Iterator[Fault]:
    """Check that the manifest's list of collectives is the program's, in its order."""
    nodes = [node for node in model.graph if node.domain == COLLECTIVE_DOMAIN]
    names = [node.name for node in nodes]
    listed = [collective.id for collective in manifest.collectives]
    if names != listed:
        differs = next((i for i, (a, b) in enumerate(zip(names, listed, strict=False)) if a != b), None)
        where = f"number {differs} is {names[differs]!r}" if differs is not None else f"{len(names)} of them"
        yield fault("$.collectives", f"other collectives in the program: {where}", f"{len(listed)}, in their order")
        return
    both = sizes_of(manifest)
    for node, collective in zip(nodes, manifest.collectives, strict=True):
        yield from _check_collective(node, collective, facts, both)


def _check_collective(
    node: ir.Node, collective: Collective, facts: LocalFacts, both: tuple[dict[str, int], dict[str, int]]
) -> Iterator[Fault]:
    where = f'collective "{node.name}"'
    attributes = {name: attribute.value for name, attribute in node.attributes.items()}
    dim = attributes.get("dim")
    found = node.op_type, tuple(attributes.get("axes", ())), dim
    if found != (collective.kind, collective.axes, collective.dim):
        yield fault(where, f"{found}", f"{(collective.kind, collective.axes, collective.dim)}, as the manifest says")
    value = node.inputs[0]
    if value is None or value not in facts.second:
        return
    if facts.first[value].dtype.name != collective.dtype:
        yield fault(where, f"elements of {facts.first[value].dtype.name}", collective.dtype)
    for sizes, known in zip(both, (facts.first, facts.second), strict=True):
        shape = known[value].shape
        right = len(shape) == len(collective.shape) and all(
            _size(dim, sizes) in (None, size) for dim, size in zip(collective.shape, shape, strict=True)
        )
        if not right:
            yield fault(where, f"an input of local shape {list(shape)}", f"{list(collective.shape)}")
            return


def _size(dim: int | str, sizes: Mapping[str, int]) -> int | None:
    """A dimension's size; None for one without an expression over the inputs' names."""
    if isinstance(dim, int):
        return dim
    expression = parse_dimension(dim)
    return expression.value(sizes) if all(name in sizes for name in expression.names) else None


def check_output(one: Held, info: OutputInfo, mesh: Mesh) -> None:
    """Check that an output is whole, or a state with the manifest's layout; ContradictionError if not."""
    if not isinstance(one, Placement) or one.partial or one.scale != 1:
        raise ContradictionError(f"an output {info.name!r}: {one}", "a tensor that is summed up", REBUILD)
    if len(info.layout) != len(one.dims):
        raise ContradictionError(f"an output of {len(one.dims)} dimensions", f"{len(info.layout)}", REBUILD)
    for d, (dim, layout) in enumerate(zip(one.dims, info.layout, strict=True)):
        declared = None if layout is None else pieces.of_layout(layout, mesh)
        if not (pieces.is_whole(dim) if declared is None else pieces.unify(dim, declared) is not None):
            raise ContradictionError(
                f"an output {info.name!r} whose dimension {d} is split as ({pieces.text(dim)})",
                f"({'whole' if declared is None else pieces.text(declared)}), as the manifest says",
                REBUILD,
            )
    if info.role != "state" and any(pieces.axes_of(dim) for dim in one.dims):
        raise ContradictionError(f"an output {info.name!r} that is split", "whole, as it is no state", REBUILD)
    if any(content is Content.ANY for content in one.contents.values()):
        raise ContradictionError(
            f"an output {info.name!r} whose padding may hold anything", "numbers in the padding of a state", REBUILD
        )


def check_states(manifest: Manifest, model: ir.Model) -> Iterator[Fault]:
    """Check that a state's output is split as its input is, and is computed from it."""
    inputs = {info.name: info for info in manifest.inputs}
    outputs = {info.name: info for info in manifest.outputs}
    values = {str(value.name): value for value in model.graph.outputs}
    for state in manifest.states:
        where = f'state "{state.input}"'
        before, after = inputs.get(state.input), outputs.get(state.output)
        if before is None or after is None or state.output not in values:
            yield fault(where, "no such input or output", f"{state.input} and {state.output}")
            continue
        kept = [d for d in range(len(before.shape)) if d != state.sequence_dim]
        if len(before.shape) != len(after.shape) or any(before.layout[d] != after.layout[d] for d in kept):
            yield fault(where, "an output that is split differently from the input", "the same layout")
        if not (_is_computed_from(values[state.output], {state.input}) or _enters(manifest, state, values)):
            yield fault(where, f"an output {state.output!r} that is not computed from it", "its successor")


def _enters(manifest: Manifest, state: State, values: Mapping[str, ir.Value]) -> bool:
    """Whether a state that is replaced may be what entered its layer, so that its successor is not computed from it.

    Then this is so of all states of its shape: what enters the first layer is computed from none of them.
    """
    shapes = {info.name: info.shape for info in manifest.inputs}
    alike = [o for o in manifest.states if o.mode == "replace" and shapes.get(o.input) == shapes[state.input]]
    names = {one.input for one in alike}
    ends = [values[one.output] for one in alike if one.output in values]
    return state.mode == "replace" and not all(_is_computed_from(end, names) for end in ends)


def _is_computed_from(value: ir.Value, names: Collection[str]) -> bool:
    """Whether a value depends on one of those names; the nearest are looked at first, as states are near."""
    seen, queue = {value}, deque([value])
    while queue:
        found = queue.popleft()
        if found.name in names:
            return True
        node = found.producer()
        within = () if node is None else (node, *nodes_within(node))  # branches read values around them
        fresh = dict.fromkeys(v for inner in within for v in inner.inputs if v is not None and v not in seen)
        seen.update(fresh)
        queue.extend(fresh)
    return False
