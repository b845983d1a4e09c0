"""The proof that stored tensors are complete: each index of each original on some rank, and on one rank only.

Nothing is proved by looking at indices, whose number a hostile manifest could make any: a layout is judged by its tree.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence

from furiosa_llm.runtime.artifact.dtypes import DTYPES
from furiosa_llm.runtime.artifact.json_reader import Field
from furiosa_llm.runtime.artifact.layout import Cat, Dim, Leaf, Mesh, Prod, axes_of, global_size, parts_of
from furiosa_llm.runtime.artifact.manifest import Manifest, OriginalInitializer, Part, StoredTensor

MAX_EMPTY_DIM = 2**20
"""The longest dimension that a tensor without elements may have: nothing that is stored bounds it."""


def check_coverage(section: Mapping[str, Field], manifest: Manifest) -> None:
    """Raises ArtifactError unless the stored tensors hold every original once, padding and replicas aside.

    `section` has the manifest's sections as JSON; the manifest's names are unique and its layouts fit its mesh.
    """
    for index, tensor in enumerate(manifest.tensors):
        if tensor.layout is not None:
            _check_layout(section["tensors"].child(index), tensor, tensor.layout)
    tensors = {tensor.name: tensor for tensor in manifest.tensors}
    originals = {original.name: original for original in manifest.initializers}
    named: set[str] = set()
    for index, original in enumerate(manifest.initializers):
        field = section["initializers"].child(index)
        _check_original(field, original, tensors, originals)
        named.update(original.stored)
    second: dict[str, list[int]] = defaultdict(list)
    for index, tensor in enumerate(manifest.tensors):
        if tensor.origin is None:
            continue
        field, origin = section["tensors"].child(index), originals.get(tensor.origin)
        if origin is None:
            field.child("origin").fail("null or the name of an entry of $.initializers")
        _check_shape(field, tensor, origin)
        if tensor.part is not None and tensor.name not in named:
            second[tensor.origin].append(index)
    for index, original in enumerate(manifest.initializers):
        parts = [tensors[name] for name in original.stored]
        _check_same_bytes(section["initializers"].child(index), original, parts, manifest.mesh)
    for name, indices in second.items():
        _check_second_layouts(section["tensors"], manifest.tensors, indices, originals[name])


def fault_of(dim: Dim, *, once: bool = True) -> str | None:
    """Why the ranks do not hold every index of `dim`, and if it is to be `once`, exactly once; None if they do.

    A leaf deals out its indices. A concatenation is covered if its parts are and lie over the same axes: a part with
    fewer axes would lie on several ranks. A product is covered if its parts are and lie over different axes: a rank has
    one position on a shared axis, which pairs the pieces of one part with some pieces of the other only. States may lie
    on several ranks, as a cache does where there are more ranks than heads: each computes the same.
    """
    return _judged(dim, once)[0]


def _judged(dim: Dim, once: bool) -> tuple[str | None, frozenset[int]]:
    """The fault of a layout, and its axes."""
    if isinstance(dim, Leaf):
        return None, frozenset(dim.axes)
    axes: frozenset[int] = frozenset()
    for position, part in enumerate(parts_of(dim)):
        fault, own = _judged(part, once)
        if fault is not None:
            return fault, own
        if isinstance(dim, Prod) and axes & own:
            return f"two parts of a product are split over mesh axis {min(axes & own)}: some indices lie nowhere", own
        if isinstance(dim, Cat) and once and position and axes != own:
            shown = f"{sorted(axes)} and {sorted(own)}"
            return f"parts of a concatenation are split over mesh axes {shown}: some indices lie on several ranks", own
        axes |= own
    return None, axes


def _check_layout(field: Field, tensor: StoredTensor, layout: Sequence[Dim]) -> None:
    taken: dict[int, int] = {}
    order: list[int] = []
    for d, dim in enumerate(layout):
        fault = fault_of(dim)
        if fault is not None:
            field.child("layout", d).fail("a layout with each index on one rank", f"one in which {fault}")
        for axis in axes_of(dim):
            if axis in taken:
                dims = f"dimensions {taken[axis]} and {d}"
                field.child("layout").fail("each mesh axis in one dimension", f"mesh axis {axis} in {dims}")
            taken[axis] = d
            order.append(axis)
    if tuple(order) != tensor.shard_axes:
        field.child("shard_axes").fail(f"{order}, the axes of its layout in their order", f"{list(tensor.shard_axes)}")
    sizes = [global_size(dim) for dim in layout]
    if 0 in sizes and max(sizes) > MAX_EMPTY_DIM:
        field.child("layout").fail(f"at most {MAX_EMPTY_DIM} indices next to a dimension without any", f"{sizes}")


def _check_shape(field: Field, tensor: StoredTensor, origin: OriginalInitializer) -> None:
    expected = list(origin.shape)
    part = tensor.part
    if part is not None:
        if part.dim >= len(expected) or part.stop > expected[part.dim]:
            field.child("part").fail(f"a part of the original's shape {expected}", _shown(part))
        expected[part.dim] = part.stop - part.start
    found = [global_size(dim) for dim in tensor.layout or ()]
    if (found, tensor.dtype) != (expected, origin.dtype):
        field.child("layout").fail(f"one of {origin.dtype} {expected}, as its origin is", f"{tensor.dtype} {found}")


def _check_original(
    field: Field,
    original: OriginalInitializer,
    tensors: Mapping[str, StoredTensor],
    originals: Mapping[str, OriginalInitializer],
) -> None:
    stored = field.child("stored")
    if not tensors.keys() >= set(original.stored):
        stored.fail("names of entries of $.tensors")
    parts = [tensors[name] for name in original.stored]
    compared: set[str | None] = set()
    for index, tensor in enumerate(parts):
        if tensor.origin in compared:
            continue  # comparing long lists once for each of their items would take its time
        compared.add(tensor.origin)
        origin = originals.get(tensor.origin or "")
        if origin is None or origin.stored != original.stored:
            stored.child(index).fail(
                f"tensors of {original.name!r:.80}, or all tensors of its alias",
                f"{tensor.name!r:.80}, whose origin is {tensor.origin!r:.80}",
            )
        if _identity(origin) != _identity(original):
            field.fail(f"the dtype, shape and digest of its alias {origin.name!r:.80}", "others")
    if not parts or (len(parts) == 1 and parts[0].part is None):
        return
    bounds = [(tensor.part.start, tensor.part.stop) for tensor in parts if tensor.part is not None]
    dims = {tensor.part.dim for tensor in parts if tensor.part is not None}
    if len(bounds) != len(parts) or len(dims) != 1:
        stored.fail(
            "one whole tensor, or parts of one dimension", "several whole tensors or parts of several dimensions"
        )
    dim = dims.pop()
    if len({_beside(tensor, dim) for tensor in parts}) != 1:
        stored.fail(f"parts that are laid out alike but for dimension {dim}", "parts with other layouts")
    size = original.shape[dim] if dim < len(original.shape) else 0
    if [0, *(stop for _, stop in bounds)] != [*(start for start, _ in bounds), size]:
        stored.fail(f"parts that make up [0, {size}) of dimension {dim} in their order", f"the parts {bounds!r:.200}")


def _identity(original: OriginalInitializer) -> tuple[object, ...]:
    return original.dtype, original.shape, original.sha256


def _beside(tensor: StoredTensor, dim: int) -> tuple[Dim, ...]:
    layout = tensor.layout or ()
    return (*layout[:dim], *layout[dim + 1 :])


def _check_same_bytes(field: Field, original: OriginalInitializer, parts: Sequence[StoredTensor], mesh: Mesh) -> None:
    """Where shards follow each other as the original's bytes do, the two digests are of the same bytes."""
    for tensor in parts:
        if _stored_as_it_was(tensor, mesh) and tensor.sha256 != original.sha256:
            field.child("sha256").fail(
                f"{tensor.sha256[:16]}..., as the tensor {tensor.name!r:.80} is stored as it was",
                f"{(original.sha256 or '')[:16]}...",
            )


def _stored_as_it_was(tensor: StoredTensor, mesh: Mesh) -> bool:
    if tensor.part is not None:
        return False
    if not tensor.shard_axes:
        return True
    split = [d for d, dim in enumerate(tensor.layout or ()) if axes_of(dim)]
    dim = (tensor.layout or ())[split[0]]
    return (
        len(split) == 1
        and isinstance(dim, Leaf)
        and dim.size % mesh.parts(dim.axes) == 0
        and math.prod(tensor.local_shape[: split[0]]) == 1
        and math.prod(tensor.local_shape) * DTYPES[tensor.dtype].bits % 8 == 0
    )


def _check_second_layouts(
    field: Field, tensors: Sequence[StoredTensor], indices: Sequence[int], origin: OriginalInitializer
) -> None:
    """Parts that no `stored` names make up the original as often as they begin it, each time laid out alike."""
    alike: dict[object, list[tuple[int, Part]]] = defaultdict(list)
    for index in indices:
        part = tensors[index].part
        assert part is not None
        alike[part.dim, _beside(tensors[index], part.dim)].append((index, part))
    for members in alike.values():
        begun = sum(part.start == 0 for _, part in members)
        starts = Counter(part.start for _, part in members) + Counter({origin.shape[members[0][1].dim]: begun})
        stops = Counter(part.stop for _, part in members) + Counter({0: begun})
        if starts != stops:
            index, part = next((index, part) for index, part in members if starts[part.stop] != stops[part.stop])
            field.child(index, "part").fail(
                f"parts of {origin.name!r:.80} that make up all of it, one beginning where another ends", _shown(part)
            )


def _shown(part: Part) -> str:
    return f"[{part.start}, {part.stop}) of dimension {part.dim}"
