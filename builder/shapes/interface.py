"""What the graph's inputs and outputs are for, and the sizes to probe them with.

Exporters agree on the names of a transformer's inputs (Hugging Face's forward arguments); those names, or else the
symbols of the dimensions, tell the roles. Nothing else in the builder looks at a name.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping

import onnx_ir as ir

from furiosa_llm.builder.errors import OptionError, ShapeError

_ROLES = (
    ("token_ids", re.compile(r"(decoder_)?input_ids|tokens|token_ids")),
    ("attention_mask", re.compile(r"(encoder_|decoder_)?attention_mask")),
    ("position_ids", re.compile(r"position_ids|cache_position")),
    ("token_type_ids", re.compile(r"token_type_ids")),
    ("state", re.compile(r"(past|cache|present).*")),
)
_INTEGER_ROLES = {"token_ids", "attention_mask", "position_ids", "token_type_ids"}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SizeSet:
    """One choice of sizes for the dynamic dimensions."""

    batch: int
    sequence: int
    past: int
    encoder: int
    others: tuple[int, ...]
    """For dimensions of which nothing is known, in order of appearance."""

    @property
    def total(self) -> int:
        """Positions after the step."""
        return self.past + self.sequence


PROBE = SizeSet(batch=5, sequence=7, past=11, encoder=13, others=(19, 23, 29, 31, 37, 41, 43, 47))
SECOND_PROBE = SizeSet(batch=3, sequence=5, past=17, encoder=29, others=(53, 59, 61, 67, 71, 73, 79, 83))
"""Distinct primes: a product tells its factors, and what differs between the two is dynamic."""


def role_of(value: ir.Value) -> str:
    """The role of a graph input."""
    assert value.name is not None
    assert value.dtype is not None
    integer = value.dtype in (ir.DataType.INT64, ir.DataType.INT32, ir.DataType.BOOL)
    for role, pattern in _ROLES:
        if pattern.fullmatch(value.name) and integer == (role in _INTEGER_ROLES):
            return role
    return "other"


def dimension_kinds(
    graph: ir.Graph, given: Mapping[str, int], config: Mapping[str, object]
) -> dict[str, tuple[int | str, ...]]:
    """For each graph input its dimensions: a size, or one of batch, sequence, past, total, encoder, or another name.

    `given` are sizes that the user said for symbols or for `input.symbol`; `config` is the model's config.json, which
    tells the image size of vision models.
    """
    unused = set(given)
    has_state = any(role_of(value) == "state" for value in graph.inputs)
    kinds: dict[str, tuple[int | str, ...]] = {}
    for value in graph.inputs:
        assert value.name is not None
        if value.shape is None:
            raise ShapeError(
                f'input "{value.name}" has no shape, not even its number of dimensions; '
                "export the model with dynamic axes instead of unknown ones."
            )
        role, symbols_seen = role_of(value), 0
        dims: list[int | str] = []
        for position, dim in enumerate(value.shape):
            if isinstance(dim, int):
                dims.append(dim)
                continue
            symbol = str(dim)
            key = next((k for k in (f"{value.name}.{symbol}", symbol) if k in given), None)
            if key is not None:
                unused.discard(key)
                dims.append(given[key])
            else:
                dims.append(_kind(value.name, role, position, symbols_seen, symbol, config, has_state))
            symbols_seen += 1
        kinds[value.name] = tuple(dims)
    if unused:
        known = sorted({str(d) for v in graph.inputs if v.shape for d in v.shape if not isinstance(d, int)})
        raise OptionError(f"--dim names {sorted(unused)}, but the dynamic dimensions are {known}.")
    return kinds


def _kind(
    name: str, role: str, position: int, seen: int, symbol: str, config: Mapping[str, object], has_state: bool
) -> int | str:
    encoder = "encoder" in name and not name.startswith("decoder")
    if position == 0:
        return "batch"
    total = "total" if has_state else "sequence"
    if role in ("token_ids", "position_ids", "token_type_ids") and position == 1:
        return "sequence"
    if role == "attention_mask" and position == 1:
        return "encoder" if encoder else total
    if role == "state" and seen == 1:
        return "encoder" if encoder else "past"
    size = config.get({"num_channels": "num_channels", "height": "image_size", "width": "image_size"}.get(symbol, ""))
    if isinstance(size, int):
        return size
    if encoder and position == 1:
        return "encoder"
    return symbol


def concrete(kinds: Mapping[str, tuple[int | str, ...]], sizes: SizeSet) -> dict[str, tuple[int, ...]]:
    """Shapes of the graph inputs at one set of sizes."""
    names = dict.fromkeys(k for dims in kinds.values() for k in dims if isinstance(k, str) and not hasattr(sizes, k))
    unknown = {name: sizes.others[i % len(sizes.others)] for i, name in enumerate(names)}
    return {
        name: tuple(k if isinstance(k, int) else unknown[k] if k in unknown else getattr(sizes, k) for k in dims)
        for name, dims in kinds.items()
    }
