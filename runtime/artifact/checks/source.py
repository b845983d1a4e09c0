"""What source.onnx must be, given the manifest: the original graph, with data exactly where no tensor is stored."""

from __future__ import annotations

from onnx import ModelProto, TensorProto

from furiosa_llm.runtime.artifact.checks.functions import check_functions
from furiosa_llm.runtime.artifact.checks.model import check_inline, check_model, dtype_name, refuse
from furiosa_llm.runtime.artifact.manifest import SOURCE_NAME, Manifest, OriginalInitializer

STORED_LOCATION = "artifact"
"""The location of an initializer whose data is in stored tensors."""


def check_source(source: ModelProto, manifest: Manifest) -> None:
    """Raises ArtifactError for the first thing in which `source` is not what `manifest` says."""
    check_model(source, SOURCE_NAME)
    check_functions(source, SOURCE_NAME)
    originals = {original.name: original for original in manifest.initializers}
    found: set[str] = set()
    for initializer in source.graph.initializer:
        name = initializer.name
        original = originals.get(name)
        if original is None:
            refuse(SOURCE_NAME, f"found the initializer {name!r:.80}", "only initializers of $.initializers")
        if name in found:
            refuse(SOURCE_NAME, f"found the initializer {name!r:.80} twice", "it once")
        found.add(name)
        _check_initializer(initializer, original)
    for name in originals:
        if name not in found:
            refuse(SOURCE_NAME, f"found no initializer {name!r:.80}", "one, because $.initializers has an entry for it")
    for sparse in source.graph.sparse_initializer:
        for tensor in (sparse.values, sparse.indices):
            check_inline(SOURCE_NAME, f"sparse initializer {tensor.name!r:.80}", tensor)


def _check_initializer(initializer: TensorProto, original: OriginalInitializer) -> None:
    what = f"initializer {original.name!r:.80}"
    kind, dims = dtype_name(initializer.data_type), tuple(initializer.dims)
    if (kind, dims) != (original.dtype, original.shape):
        refuse(SOURCE_NAME, f"{what} is {kind} {list(dims)!r:.200}", f"{original.dtype} {list(original.shape)}")
    if not original.stored:
        check_inline(SOURCE_NAME, what, initializer)
        return
    place = {entry.key: entry.value for entry in initializer.external_data}
    expected = {"location": STORED_LOCATION}
    external = initializer.data_location == TensorProto.EXTERNAL
    if not external or place != expected or len(initializer.external_data) != len(expected):
        refuse(SOURCE_NAME, f"{what} lies at {place if external else 'its own data'}", f"{expected}")
    if initializer.HasField("raw_data"):
        refuse(SOURCE_NAME, f"{what} has data of its own", "none, because it is stored")
