"""What an artifact is built from: a model file with its weights, or another artifact."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import onnx_ir as ir

from furiosa_llm.builder.source.companions import COMPANIONS, companions
from furiosa_llm.builder.source.load import Source, check_external_data, load
from furiosa_llm.builder.source.tensors import DeferredTensor, read_packed, tensor_of
from furiosa_llm.runtime.artifact.errors import ArtifactError
from furiosa_llm.runtime.artifact.json_reader import REBUILD
from furiosa_llm.runtime.artifact.manifest import SOURCE_NAME
from furiosa_llm.runtime.artifact.reader import Artifact
from furiosa_llm.runtime.artifact.source import read_source
from furiosa_llm.runtime.artifact.tools.originals import read_original

SMALL_NBYTES = 4096
"""Tensors up to this size are in memory, wherever the source has them, so that a build sees the same in both cases."""


def load_with_weights(
    path: Path, fixed: Mapping[str, int] = MappingProxyType({}), lora_modules: Sequence[str] = ()
) -> Source:
    """The model at `path`, changed as `load` does, and with every file of its weights checked.

    Raises ModelLoadError for a model that cannot be built.
    """
    source = load(path, fixed, lora_modules)
    check_external_data(source)
    source.guard.remember(companions(path))
    for value in source.model.graph.initializers.values():
        tensor = value.const_value
        if isinstance(tensor, ir.ExternalTensor) and tensor.nbytes <= SMALL_NBYTES:
            value.const_value = tensor_of(tensor, read_packed(tensor).tobytes())
    return source


def source_of(artifact: Artifact) -> Source:
    """The model that an artifact was built from: its graph from source.onnx, its weights from the stored tensors.

    Raises ArtifactError if the folder has files that a build would read but that the manifest does not list.
    """
    folder, manifest = artifact.folder, artifact.manifest
    listed = {entry.path for entry in manifest.files}
    strange = sorted(name for name in COMPANIONS if (folder / name).exists() and name not in listed)
    if strange:
        raise ArtifactError(f"{folder} has {strange[0]}, which its manifest does not list; remove it, or {REBUILD}.")
    proto = read_source(artifact)
    model = ir.serde.deserialize_model(proto)
    stored = {entry.name for entry in manifest.initializers if entry.stored}
    for name, value in model.graph.initializers.items():
        if name in stored:
            assert value.const_value is not None
            value.const_value = _stored(artifact, name, value.const_value)
    return Source(path=folder / SOURCE_NAME, model=model, proto=proto, sha256=manifest.provenance.source_sha256)


def _stored(artifact: Artifact, name: str, tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    if tensor.nbytes <= SMALL_NBYTES:
        return tensor_of(tensor, read_original(artifact, name).tobytes())
    return DeferredTensor(tensor, lambda: read_original(artifact, name))
