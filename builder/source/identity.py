"""Whether a model is the one that an artifact was built from: its inputs and outputs, and every weight's digest."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence

import onnx
import onnx_ir as ir

from furiosa_llm.builder.source.load import check_external_data, load
from furiosa_llm.builder.source.tensors import read_packed
from furiosa_llm.runtime.artifact.manifest import OriginalInitializer, adapted_modules, fixed_inputs
from furiosa_llm.runtime.artifact.reader import Artifact
from furiosa_llm.runtime.artifact.source import read_source
from furiosa_llm.runtime.artifact.tools.record import Check


def check_identity(artifact: Artifact, model: str | os.PathLike[str]) -> Check:
    """Compare the ONNX file `model`, weight by weight, with what the artifact says of its source.

    Weights are read one at a time. Raises ModelLoadError if the file is not a model, or if its weights do not lie
    where it says.
    """
    source = load(model, fixed_inputs(artifact.manifest), adapted_modules(artifact.manifest))
    check_external_data(source)
    graph = source.model.graph
    faults = [*_interface_faults("input", graph.inputs, [info.name for info in artifact.manifest.inputs])]
    faults += _interface_faults("output", graph.outputs, [info.name for info in artifact.manifest.outputs])
    entries = {entry.name: entry for entry in artifact.manifest.initializers}
    faults += [f"the model has no initializer {name!r:.80}" for name in entries if name not in graph.initializers]
    kept = _kept_in_source(artifact)
    for name, value in graph.initializers.items():
        tensor = value.const_value
        assert tensor is not None
        if name not in entries:
            faults.append(f"the artifact has no initializer {name!r:.80}, which the model has")
        elif fault := _difference(tensor, entries[name], kept.get(name)):
            faults.append(f"initializer {name!r:.80} of the model is {fault}")
    return Check(name="identity", checked=len(entries), faults=tuple(faults))


def _interface_faults(what: str, values: Sequence[ir.Value], expected: Sequence[str]) -> Iterator[str]:
    found = sorted(str(value.name) for value in values)
    if found != sorted(expected):
        yield f"the model has the {what}s {found!s:.200}, the artifact {sorted(expected)!s:.200}"


def _kept_in_source(artifact: Artifact) -> dict[str, str]:
    """The digests of the initializers whose data is in source.onnx."""
    kept = (
        tensor
        for tensor in read_source(artifact).graph.initializer
        if tensor.data_location != onnx.TensorProto.EXTERNAL
    )
    return {tensor.name: hashlib.sha256(ir.from_proto(tensor).tobytes()).hexdigest() for tensor in kept}


def _difference(tensor: ir.TensorProtocol, entry: OriginalInitializer, kept: str | None) -> str | None:
    """How `tensor` differs from the artifact's `entry`, if it does; `kept` is the digest of its data in source.onnx."""
    found = (tensor.dtype.name, tuple(tensor.shape.numpy()))
    if found != (entry.dtype, entry.shape):
        return f"{found[0]} {list(found[1])}, of the artifact {entry.dtype} {list(entry.shape)}"
    digest = hashlib.sha256(read_packed(tensor).data).hexdigest()
    expected = entry.sha256 if entry.stored else kept
    if digest != expected:
        return f"of sha256 {digest[:16]}..., of the artifact {(expected or 'none')[:16]}..."
    return None
