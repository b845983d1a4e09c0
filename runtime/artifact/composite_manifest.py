"""manifest.json of a composite artifact: its parts, and how one feeds the other."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from furiosa_llm.runtime.artifact.manifest import COMPOSITE_FORMAT_NAME, seal

COMPOSITE_VERSION = 1
KIND = "encoder-decoder"
PartName = Literal["encoder", "decoder_first", "decoder"]
PART_NAMES: tuple[PartName, ...] = get_args(PartName)
"""The parts, in the order of the manifest and of their work; `decoder_first` is there if `decoder` has a past."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PartEntry:
    """One part: the folder it lies in, and the digest of the manifest there."""

    name: PartName
    digest: str


@dataclass(frozen=True, slots=True, kw_only=True)
class HiddenLink:
    """The encoder's output that the decoders read as the input of this name, if they have it."""

    output: str
    input: str


@dataclass(frozen=True, slots=True, kw_only=True)
class StateLink:
    """A state of the decoder: its `input`, and the output of the first step's decoder that it begins with.

    `output` is the decoder's own output that it is in the next step; None: it stays as it is (what attention to the
    encoder's states takes from them).
    """

    input: str
    first: str
    output: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class CompositeManifest:
    """manifest.json of a composite artifact.

    A generation begins with `decoder_start_token_id` and ends with one of `eos_token_ids`. `states` is empty for a
    decoder without a past, which reads the whole completion again in every step.
    """

    name: str
    tool: str
    decoder_start_token_id: int
    eos_token_ids: tuple[int, ...]
    parts: tuple[PartEntry, ...]
    hidden: HiddenLink
    states: tuple[StateLink, ...]

    def to_json(self) -> dict[str, Any]:
        """The manifest as plain JSON values, without its digest, keys in the order of the specification."""
        head = {"format": {"name": COMPOSITE_FORMAT_NAME, "version": COMPOSITE_VERSION}, "kind": KIND}
        return head | {field.name: _plain(getattr(self, field.name)) for field in fields(self)}

    def to_bytes(self) -> bytes:
        """The bytes of manifest.json: equal manifests give equal bytes."""
        return seal(self.to_json())


def _plain(value: Any) -> Any:
    if isinstance(value, PartEntry | HiddenLink | StateLink):
        return {field.name: getattr(value, field.name) for field in fields(value)}
    return [_plain(item) for item in value] if isinstance(value, tuple) else value
