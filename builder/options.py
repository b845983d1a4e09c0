"""The options of a build, as they are given and as the manifest's provenance records them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from furiosa_llm.builder.errors import OptionError
from furiosa_llm.builder.plan.mesh import check_tensor_parallel_size, mesh_of
from furiosa_llm.builder.plan.search import MAX_PADDING
from furiosa_llm.builder.plan.tactics import Tactic, Tactics
from furiosa_llm.runtime.artifact.errors import ArtifactError
from furiosa_llm.runtime.artifact.json_reader import Field
from furiosa_llm.runtime.artifact.layout import Mesh

_RARE = frozenset(("roles", "fixed"))
"""Options that are recorded only if they are given."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class BuildOptions:
    """What a build was asked for; see `ArtifactBuilder` for the meaning of each."""

    tensor_parallel_size: int = 4
    max_seq_len_to_capture: int | None = None
    dims: Mapping[str, int] = dataclasses.field(default_factory=dict)
    max_padding: float = MAX_PADDING
    tactics: Tactics | None = None
    fuse_attention: bool = True
    roles: Mapping[str, str] = dataclasses.field(default_factory=dict)
    fixed: Mapping[str, int] = dataclasses.field(default_factory=dict)

    def check(self, *, experimental_tp: bool) -> None:
        """Raise OptionError for a value out of range."""
        check_tensor_parallel_size(self.tensor_parallel_size, experimental=experimental_tp)
        if not self.max_padding >= 1:  # not a number is not, either
            raise OptionError(f"max_padding must be at least 1 (no padding), got {self.max_padding}.")
        if self.max_seq_len_to_capture is not None and self.max_seq_len_to_capture < 1:
            raise OptionError(f"max_seq_len_to_capture must be at least 1, got {self.max_seq_len_to_capture}.")

    @property
    def mesh(self) -> Mesh:
        """The ranks of that size."""
        return mesh_of(self.tensor_parallel_size)

    def to_json(self) -> dict[str, Any]:
        """Plain values, for the manifest's provenance."""
        return {
            "tensor_parallel_size": self.tensor_parallel_size,
            "max_seq_len_to_capture": self.max_seq_len_to_capture,
            "dims": dict(sorted(self.dims.items())),
            "max_padding": self.max_padding,
            "tactics": [] if self.tactics is None else self.tactics.to_json(),
            "fuse_attention": self.fuse_attention,
            **({"roles": dict(sorted(self.roles.items()))} if self.roles else {}),
            **({"fixed": dict(sorted(self.fixed.items()))} if self.fixed else {}),
        }


def recorded_options(options: Mapping[str, Any]) -> BuildOptions:
    """The options that `BuildOptions.to_json` recorded in a manifest; ArtifactError for anything else."""
    field = Field(options, "manifest.json $.provenance.options")
    given = field.mapping()
    member = field.members([f.name for f in dataclasses.fields(BuildOptions) if f.name in given or f.name not in _RARE])
    dims = member["dims"].mapping()
    tactics = member["tactics"].items(_tactic)
    max_padding = member["max_padding"].value
    if isinstance(max_padding, bool) or not isinstance(max_padding, int | float) or max_padding < 1:
        member["max_padding"].fail("a number of at least 1")
    if not isinstance(member["fuse_attention"].value, bool):
        member["fuse_attention"].fail("true or false")
    found = BuildOptions(
        tensor_parallel_size=member["tensor_parallel_size"].integer(minimum=1),
        max_seq_len_to_capture=member["max_seq_len_to_capture"].optional(lambda f: f.integer(minimum=1)),
        dims={name: member["dims"].child(name).integer(minimum=1) for name in dims},
        max_padding=float(max_padding),
        tactics=Tactics(tactics=tactics) if tactics else None,
        fuse_attention=member["fuse_attention"].value,
        roles={name: member["roles"].child(name).text() for name in given.get("roles", {})},
        fixed={name: _any_integer(member["fixed"].child(name)) for name in given.get("fixed", {})},
    )
    try:
        found.check(experimental_tp=True)
    except OptionError as error:
        raise ArtifactError(f"{member['tensor_parallel_size'].path}: {error}") from error
    return found


def _tactic(field: Field) -> Tactic:
    member = field.members([f.name for f in dataclasses.fields(Tactic)])
    layers = member["layers"].optional(lambda f: f.items(_any_integer))
    return Tactic(
        selector=member["selector"].choice(("role", "weight", "node")),
        pattern=member["pattern"].text(),
        parts=member["parts"].optional(lambda f: f.integer(minimum=1)),
        layers=layers,
        dim=member["dim"].optional(_any_integer),
        origin=member["origin"].text(),
    )


def _any_integer(field: Field) -> int:
    if isinstance(field.value, bool) or not isinstance(field.value, int):
        field.fail("an integer")
    return int(field.value)
