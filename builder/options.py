"""The options of a build, as they are given and as the manifest's provenance records them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

from furiosa_llm.builder.errors import OptionError
from furiosa_llm.builder.plan.mesh import MAX_PADDING, check_tensor_parallel_size, mesh_of
from furiosa_llm.builder.plan.tactics import Tactic, Tactics
from furiosa_llm.runtime.artifact.errors import ArtifactError
from furiosa_llm.runtime.artifact.json_reader import Field
from furiosa_llm.runtime.artifact.options import (
    AT_LEAST_ONE,
    COUNT,
    INTEGER,
    SWITCH,
    TEXT,
    Kind,
    Option,
    check_options,
    declared,
    instance,
)

if TYPE_CHECKING:
    from furiosa_llm.runtime.artifact.layout import Mesh

SIZES = Kind(
    "integers of at least 1, by name",
    lambda value: isinstance(value, Mapping) and all(map(COUNT.accepts, value.values())),
)
ROLES = Kind(
    "roles by name, as texts", lambda value: isinstance(value, Mapping) and all(map(TEXT.accepts, value.values()))
)
CONSTANTS = Kind(
    "integers by name", lambda value: isinstance(value, Mapping) and all(map(INTEGER.accepts, value.values()))
)
NAMES = Kind("a list of names", lambda value: isinstance(value, list | tuple) and all(map(TEXT.accepts, value)))
_RARE = frozenset(("roles", "fixed", "lora_modules"))
"""Options that the manifest records only if they are given."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class BuildOptions:
    """The options of one build."""

    tensor_parallel_size: Annotated[int, Option("How many PEs share each matrix: 4 or 8.", INTEGER)] = 4
    max_seq_len_to_capture: Annotated[
        int | None, Option("Longest sequence to serve, in tokens, at most the model's limit.", COUNT, "the model's")
    ] = None
    dims: Annotated[
        Mapping[str, int],
        Option("Sizes of input dimensions that the model leaves open, by symbol or input.symbol.", SIZES),
    ] = dataclasses.field(default_factory=dict)
    max_padding: Annotated[
        float, Option("By how much padding may enlarge a dimension (1.34: by a third).", AT_LEAST_ONE)
    ] = MAX_PADDING
    tactics: Annotated[
        Tactics | None, Option("Choices to keep (see docs/planning.md).", instance("Tactics", Tactics))
    ] = None
    fuse_attention: Annotated[
        bool,
        Option(
            "Replace attention written out in small ops by one op with its cache in place.",
            SWITCH,
        ),
    ] = True
    roles: Annotated[
        Mapping[str, str],
        Option("What an input is for, where the graph does not say: INPUT=positions[3,batch,sequence].", ROLES),
    ] = dataclasses.field(default_factory=dict)
    fixed: Annotated[Mapping[str, int], Option("Makes an input a constant: one boolean or integer.", CONSTANTS)] = (
        dataclasses.field(default_factory=dict)
    )
    lora_modules: Annotated[
        Sequence[str],
        Option("Modules whose products get inputs for adapters, where the graph has none.", NAMES),
    ] = ()

    def check(self, *, experimental_tp: bool) -> None:
        """Raise OptionError for a value out of range."""
        check_options(self, OptionError)
        check_tensor_parallel_size(self.tensor_parallel_size, experimental=experimental_tp)

    @property
    def mesh(self) -> Mesh:
        """The mesh of `tensor_parallel_size` ranks."""
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
            **({"lora_modules": sorted(self.lora_modules)} if self.lora_modules else {}),
        }


def recorded_options(options: Mapping[str, Any]) -> BuildOptions:
    """The options that `BuildOptions.to_json` recorded in a manifest; ArtifactError for anything else."""
    field = Field(options, "manifest.json $.provenance.options")
    given = field.mapping()
    member = field.members([name for name in declared(BuildOptions) if name in given or name not in _RARE])
    tactics = member["tactics"].items(_tactic)
    values = {name: one.value for name, one in member.items()}
    values["tactics"] = Tactics(tactics=tactics) if tactics else None
    for name, option in declared(BuildOptions).items():
        if name in member and not option.takes(values[name]):
            member[name].fail(option.kind.expected)
    recorded = BuildOptions(**values)
    try:
        recorded.check(experimental_tp=True)
    except OptionError as error:
        raise ArtifactError(f"{member['tensor_parallel_size'].path}: {error}") from error
    return recorded


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
