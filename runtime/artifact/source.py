"""source.onnx: the original graph, with the data of what the artifact does not store."""

from __future__ import annotations

from onnx import ModelProto, TensorProto, numpy_helper

from furiosa_llm.runtime.artifact.checks.model import parse_model
from furiosa_llm.runtime.artifact.checks.source import check_source
from furiosa_llm.runtime.artifact.errors import ArtifactError
from furiosa_llm.runtime.artifact.json_reader import REBUILD
from furiosa_llm.runtime.artifact.manifest import SOURCE_NAME
from furiosa_llm.runtime.artifact.reader import Artifact


def read_source(artifact: Artifact) -> ModelProto:
    """source.onnx of `artifact`; raises ArtifactError if it is not, or not any more, what the manifest says."""
    file = artifact.companion(SOURCE_NAME)
    assert file is not None, "a manifest that does not list it is refused"
    model = parse_model(file.read_bytes(), str(file))
    check_source(model, artifact.manifest)
    return model


def inline_bytes(initializer: TensorProto) -> bytes:
    """The data of an initializer of source.onnx, packed as raw data is; strings one after the other with lengths.

    Raises ArtifactError if its data is elsewhere or does not fit its shape.
    """
    if initializer.data_location == TensorProto.EXTERNAL:
        raise ArtifactError(
            f"{SOURCE_NAME}: initializer {initializer.name!r:.80} has no data, expected what manifest.json does not "
            f"store; {REBUILD}"
        )
    if initializer.data_type == TensorProto.STRING:
        return b"".join(len(text).to_bytes(8, "little") + text for text in initializer.string_data)
    try:
        return bytes(numpy_helper.from_array(numpy_helper.to_array(initializer)).raw_data)
    except (ValueError, TypeError) as error:
        raise ArtifactError(
            f"{SOURCE_NAME}: initializer {initializer.name!r:.80} has data that is not of its type and shape: {error}; "
            f"{REBUILD}"
        ) from error
