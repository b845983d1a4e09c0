"""A composite artifact: a folder with an encoder and a decoder, each an artifact of its own, and how they fit together.

docs/artifact-format.md is the specification. Opening one opens every part, and checks that the parts are those that
were built together and that each can be fed what the others give.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import cast

from furiosa_llm.runtime.artifact.checks.composite import check_fit
from furiosa_llm.runtime.artifact.composite_manifest import (
    COMPOSITE_VERSION,
    KIND,
    PART_NAMES,
    CompositeManifest,
    HiddenLink,
    PartEntry,
    PartName,
    StateLink,
)
from furiosa_llm.runtime.artifact.compute import computing
from furiosa_llm.runtime.artifact.errors import ArtifactError
from furiosa_llm.runtime.artifact.json_reader import REBUILD, Field, check_unique, parse_json
from furiosa_llm.runtime.artifact.manifest import COMPOSITE_FORMAT_NAME, MANIFEST_NAME, manifest_digest
from furiosa_llm.runtime.artifact.parse import MAX_EOS_TOKENS, check_digest, digest_of
from furiosa_llm.runtime.artifact.reader import Artifact, manifest_bytes, open_artifact


@dataclass(frozen=True, slots=True, kw_only=True)
class Composite:
    """An open composite artifact: `folder`, its `manifest`, the `digest` that names it, and its open parts by name."""

    folder: Path
    digest: str
    manifest: CompositeManifest
    parts: Mapping[PartName, Artifact]

    @property
    def encoder(self) -> Artifact:
        """What reads the prompt."""
        return self.parts["encoder"]

    @property
    def decoder(self) -> Artifact:
        """What makes the tokens: the later ones, if it has a past."""
        return self.parts["decoder"]

    @property
    def decoder_first(self) -> Artifact | None:
        """What makes the first token and the states that the decoder goes on from; None if that has no past."""
        return self.parts.get("decoder_first")


def is_composite(path: str | os.PathLike[str]) -> bool:
    """Whether the folder `path` says that it is a composite artifact, of whatever version, sound or not."""
    folder = Path(path)
    if not (folder / MANIFEST_NAME).is_file():
        return False
    try:
        root = parse_json(manifest_bytes(folder), MANIFEST_NAME).value
    except ArtifactError:
        return False
    stated = root.get("format") if isinstance(root, dict) else None
    return isinstance(stated, dict) and stated.get("name") == COMPOSITE_FORMAT_NAME


def whole_of_part(path: str | os.PathLike[str]) -> Path | None:
    """The composite artifact that the folder `path` is a part of; None if it is no part."""
    folder = Path(path).absolute()
    return folder.parent if folder.name in PART_NAMES and is_composite(folder.parent) else None


def open_composite(path: str | os.PathLike[str], *, full: bool | None = None, compute: str | None = None) -> Composite:
    """The composite artifact in the folder `path`, all of its parts opened; `full` is as for `open_artifact`.

    The parts compute in `compute`, see `computing`, and give each other what they computed, not the declared types.

    Raises ArtifactError for a part that is missing, damaged, another one than was built with the others, split
    differently, or that cannot be fed what the others give.
    """
    folder = Path(path)
    data = manifest_bytes(folder)
    manifest = parse_composite(data)
    parts: dict[PartName, Artifact] = {}
    for entry in manifest.parts:
        if (folder / entry.name).is_symlink():
            raise ArtifactError(
                f"{folder / entry.name} is a link; copy the artifact with its links followed (`cp -rL`)"
            )
        artifact = open_artifact(folder / entry.name, full=full)
        if artifact.digest != entry.digest:
            raise ArtifactError(
                f"{folder / entry.name} is not the part that was built with the others: its manifest has the digest "
                f"{artifact.digest[:16]}..., expected {entry.digest[:16]}...; copy the whole artifact again or "
                f"{REBUILD}"
            )
        parts[entry.name] = replace(computing(artifact, compute), declared={})
    check_fit(manifest, {name: part.manifest for name, part in parts.items()})
    return Composite(folder=folder, digest=manifest_digest(data), manifest=manifest, parts=parts)


def parse_composite(data: bytes) -> CompositeManifest:
    """The manifest in `data`, the bytes of manifest.json; raises ArtifactError that names the JSON path."""
    root = parse_json(data, MANIFEST_NAME)
    _check_format(root)
    keys = ("digest", "format", "kind", *(field.name for field in fields(CompositeManifest)))
    section = root.members(keys)
    check_digest(section["digest"], data)
    section["kind"].choice((KIND,))
    hidden = section["hidden"].members(("output", "input"))
    manifest = CompositeManifest(
        name=section["name"].name(),
        tool=section["tool"].text(),
        decoder_start_token_id=section["decoder_start_token_id"].integer(),
        eos_token_ids=section["eos_token_ids"].items(Field.integer, most=MAX_EOS_TOKENS),
        parts=section["parts"].items(_part, most=len(PART_NAMES)),
        hidden=HiddenLink(output=hidden["output"].name(), input=hidden["input"].name()),
        states=section["states"].items(_state),
    )
    _check_parts(section["parts"], [part.name for part in manifest.parts], has_states=bool(manifest.states))
    check_unique(section["states"], [state.input for state in manifest.states], "an input")
    return manifest


def _check_format(root: Field) -> None:
    if not isinstance(root.value, dict) or "format" not in root.value:
        root.fail(f"an object with the key 'format' (this is how a {COMPOSITE_FORMAT_NAME} artifact says what it is)")
    members = root.child("format").members(("name", "version"))
    name, version = members["name"].text(), members["version"].integer()
    if name != COMPOSITE_FORMAT_NAME or version != COMPOSITE_VERSION:
        raise ArtifactError(
            f"manifest.json is of format {name!r:.80} version {version}; expected {COMPOSITE_FORMAT_NAME!r} version "
            f"{COMPOSITE_VERSION}, a composite artifact of this release; {REBUILD} of this release"
        )


def _part(field: Field) -> PartEntry:
    member = field.members(("name", "digest"))
    return PartEntry(name=cast(PartName, member["name"].choice(PART_NAMES)), digest=digest_of(member["digest"]))


def _state(field: Field) -> StateLink:
    member = field.members(("input", "first", "output"))
    return StateLink(
        input=member["input"].name(), first=member["first"].name(), output=member["output"].optional(Field.name)
    )


def _check_parts(field: Field, found: Sequence[str], *, has_states: bool) -> None:
    expected = [name for name in PART_NAMES if name != "decoder_first" or has_states]
    if list(found) != expected:
        field.fail(f"the parts {', '.join(expected)}, in this order", f"{', '.join(found) or 'none'}")
