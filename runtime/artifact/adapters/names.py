"""Which module of a model a name speaks of, and which half of an adapter it is.

Exporters and trainers name the same module differently: `layers.0.q_proj`, `base_model.model.model.layers.0.self_attn.
q_proj`, `/model/layers.0/attn/q_proj/MatMul`. What they agree on is the last part and the numbers, hence these decide.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Literal

from furiosa_llm.runtime.artifact.errors import AdapterError

Half = Literal["A", "B"]
Module = tuple[str, ...]
"""The parts of a module's name."""

_HALVES: dict[str, Half] = {"lora_a": "A", "lora_down": "A", "lora_b": "B", "lora_up": "B"}
_ENDINGS = re.compile(r"(fused)?matmul\w*|gemm|q?weight\w*|kernel|base_layer", re.IGNORECASE)
"""What stands behind a module's name in the names of its weight and of its product."""


def parts_of(name: str) -> Module:
    """The parts of a dotted name, or of a path."""
    return tuple(part for part in re.split(r"[./]", name) if part)


def half_of(name: str) -> tuple[Module, Half] | None:
    """The module and the half that `name` speaks of; None for a name of no adapter."""
    parts = parts_of(name)
    for place, part in enumerate(parts):
        if place and part.lower() in _HALVES:
            return parts[:place], _HALVES[part.lower()]
    return None


def module_of(name: str) -> Module:
    """The module that a weight or a product belongs to, by its name."""
    parts = parts_of(name)
    while parts and _ENDINGS.fullmatch(parts[-1]):
        parts = parts[:-1]
    return parts


def same_module(module: Module, others: Iterable[Module]) -> Module | None:
    """The one of `others` that is `module` under another exporter's name; None if there is none.

    Raises AdapterError if several could be.
    """
    alike = [other for other in others if _key(other) == _key(module)]
    common = [len(set(other) & set(module)) for other in alike]
    best = [other for other, count in zip(alike, common, strict=True) if count == max(common)]
    if len(best) > 1:
        raise AdapterError(
            f"module {'.'.join(module)!r:.120} may be {' or '.join('.'.join(one) for one in best[:3])!s:.300}; give "
            f"the adapter as a safetensors file whose tensors are named as the inputs"
        )
    return best[0] if best else None


def _key(module: Module) -> tuple[str, tuple[str, ...]]:
    return module[-1] if module else "", tuple(part for part in module if part.isdecimal())
