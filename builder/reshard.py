"""Make an artifact for another tensor parallel size from an artifact, as a build of the original model would."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

from furiosa_llm.builder.composite import build_parts
from furiosa_llm.builder.options import recorded_options
from furiosa_llm.builder.pipeline import Assembly
from furiosa_llm.builder.source.from_artifact import source_of
from furiosa_llm.builder.write.build_report import BuildReport
from furiosa_llm.runtime.artifact.adapters.stored import own_adapters, read_own
from furiosa_llm.runtime.artifact.composite import is_composite, open_composite
from furiosa_llm.runtime.artifact.errors import ArtifactError
from furiosa_llm.runtime.artifact.manifest import Manifest
from furiosa_llm.runtime.artifact.progress import Progress, shown
from furiosa_llm.runtime.artifact.reader import Artifact, open_artifact


def reshard(
    artifact: str | os.PathLike[str],
    save_dir: str | os.PathLike[str],
    *,
    tensor_parallel_size: int,
    experimental_tp: bool = False,
    force: bool = False,
    progress: bool | Progress | None = None,
    workers: int | None = None,
) -> BuildReport:
    """Write, byte for byte, the artifact that a build of the same model with the same options but this size gives.

    The model itself is not needed. Every original is put together from its shards and compared with the digest that
    the first build recorded, so that damage is not copied. A composite artifact is made anew part by part.

    Args:
        artifact: Folder of the artifact to start from.
        save_dir: Folder to write.
        tensor_parallel_size: How many PEs are to share each matrix: 4 or 8.
        experimental_tp: Also allow 1, 2 and 16.
        force: Replace `save_dir` if it is an artifact already.
        progress: See `ArtifactBuilder.build`.
        workers: See `ArtifactBuilder.build`.

    Raises:
        ArtifactError: `artifact` is not one, or is damaged.
        BuildError: As a build of the model would, and OutputError if `save_dir` cannot be written.
    """

    def one(part: Path, folder: Path, *, replace: bool) -> BuildReport:
        return _reshard(part, folder, tensor_parallel_size, experimental_tp, replace, workers)

    with shown(progress):
        if not is_composite(artifact):
            return one(Path(artifact), Path(save_dir), replace=force)
        composite = open_composite(artifact, full=False)
        return build_parts(
            {name: part.folder for name, part in composite.parts.items()},
            Path(save_dir),
            name=composite.manifest.name,
            start=composite.manifest.decoder_start_token_id,
            ends=composite.manifest.eos_token_ids,
            build_part=lambda part, folder, _: one(part, folder, replace=False),
            force=force,
        )


def _reshard(
    artifact: Path,
    save_dir: Path,
    tensor_parallel_size: int,
    experimental_tp: bool,
    force: bool,
    workers: int | None,
) -> BuildReport:
    opened = open_artifact(artifact, full=False)
    recorded = recorded_options(opened.manifest.provenance.options)
    options = dataclasses.replace(recorded, tensor_parallel_size=tensor_parallel_size)
    options.check(experimental_tp=experimental_tp)

    assembly = Assembly(
        options=options,
        name=opened.manifest.model.name,
        load=lambda: source_of(opened),
        check=lambda _, manifest: _check_originals(opened, manifest),
        adapters={name: read_own(path) for name, path in own_adapters(opened).items()},
        allow_no_kernel=True,
    )
    return assembly.build(save_dir, force=force, workers=workers)


def _check_originals(before: Artifact, after: Manifest) -> None:
    """Raise ArtifactError if an original that both artifacts store differs from what the first build read."""
    found = {entry.name: entry.sha256 for entry in after.initializers}
    for entry in before.manifest.initializers:
        digest = found[entry.name]
        if entry.sha256 is not None and digest not in (None, entry.sha256):
            raise ArtifactError(
                f"{before.folder} is damaged: initializer {entry.name!r:.80}, put together from its shards, has sha256 "
                f"{digest[:16]}..., expected {entry.sha256[:16]}...; copy the artifact again or rebuild it."
            )
