"""`verify_composite`: the checks of `verify_artifact` for each part of a composite artifact, and how they make one."""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from furiosa_llm.builder.composite import composite_of, find_encoder_decoder
from furiosa_llm.builder.errors import BuildError
from furiosa_llm.builder.source.folder import models_folder
from furiosa_llm.builder.source.generation_tokens import end_tokens, start_token
from furiosa_llm.parity_options import ParityOptions
from furiosa_llm.runtime.artifact.composite import open_composite, parse_composite
from furiosa_llm.runtime.artifact.composite_manifest import PartName
from furiosa_llm.runtime.artifact.errors import ArtifactError
from furiosa_llm.runtime.artifact.manifest import SOURCE_NAME
from furiosa_llm.runtime.artifact.reader import manifest_bytes
from furiosa_llm.runtime.errors import InputError
from furiosa_llm.source_checks import manifest_faults
from furiosa_llm.verification import Report, verify_artifact

_MOST_FAULTS = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class CompositeReport:
    """What a verification found: of each part, and in `fault` why the parts do not make one whole; None: they do."""

    parts: Mapping[PartName, Report]
    fault: str | None

    @property
    def passed(self) -> bool:
        """Whether every check of every part passed, and the parts fit."""
        return self.fault is None and all(report.record.passed for report in self.parts.values())


def verify_composite(
    path: str | os.PathLike[str],
    *,
    against: str | os.PathLike[str] | None = None,
    full: bool = False,
    options: ParityOptions | None = None,
) -> CompositeReport:
    """Checks the composite artifact in the folder `path`, part by part; `against` is the folder that it was built from.

    What is wrong is reported, not raised, but for a manifest that does not even say what the parts are (ArtifactError),
    a part without a manifest, and an `against` that is no such folder (InputError).
    """
    folder = Path(path)
    names = [part.name for part in parse_composite(manifest_bytes(folder)).parts]
    sources = _sources(Path(against), names) if against is not None else {}
    parts = {
        name: verify_artifact(folder / name, against=sources.get(name), full=full, options=options) for name in names
    }
    return CompositeReport(parts=parts, fault=fault_of_whole(folder))


def fault_of_whole(folder: Path) -> str | None:
    """Why the parts are no whole, or are put together otherwise than a build does."""
    decoder = folder / "decoder" / SOURCE_NAME
    try:
        whole = open_composite(folder, full=False)
        (start, _), (ends, _) = start_token(decoder), end_tokens(decoder)
        expected = composite_of(whole.parts, name=whole.manifest.name, start=start, ends=ends)
    except (ArtifactError, BuildError) as error:
        return str(error)
    found = dataclasses.replace(whole.manifest, tool=expected.tool)
    return "; ".join(itertools.islice(manifest_faults(found, expected), _MOST_FAULTS)) or None


def _sources(folder: Path, names: list[PartName]) -> Mapping[PartName, Path]:
    model = find_encoder_decoder(models_folder(folder))
    if model is None or list(model.sources) != names:
        shown = "nothing of the kind" if model is None else ", ".join(path.name for path in model.sources.values())
        raise InputError(
            f"{folder} has {shown}, expected the files of {', '.join(names)}; give the folder that the artifact was "
            f"built from"
        )
    return model.sources
