"""How far an answer is to be believed: the errors that benchmarks/simulate measured, and where they were measured."""

from __future__ import annotations

import functools
import json
import statistics
from dataclasses import dataclass
from importlib import resources
from typing import Any

_METRICS = {"tpot": ("tpot", "itl_mean"), "ttft": ("ttft",), "output_tps": ("output_tps",), "tpot_p99": ("tpot_p99",)}

_SLACK = 1.25
"""By this factor a question may be beyond what was measured."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Belief:
    """The error of a figure."""

    error: float | None
    """The median of absolute relative errors; None if nothing of the kind was ever compared."""
    basis: str
    """What was compared."""
    extrapolated: bool
    """The question is not like those that were."""


def belief(device: str, software: str, metric: str, *, outside: str | None) -> Belief:
    """The error of `metric`; `outside` says in what the question is beyond what was measured, None if in nothing.

    Without measurements of its own a figure has the error that it has where the constants of another device or
    software were used.
    """
    found = _validation()
    groups = [g for g in found["groups"] if "model" not in g and g.get("metric") in _METRICS[metric]]
    own = [g for g in groups if g["device"] == device and g["software"] == software]
    held_out = [g["held_out_median"] if g["held_out_median"] is not None else g["before_median"] for g in own]
    errors = [error for error in held_out if error is not None]
    if outside is None and errors:
        rows = sum(g["rows"] for g in own)
        return Belief(error=max(errors), basis=f"held out, {rows} published rows", extrapolated=False)
    near = {name: error for name, error in found["transfer"].items() if name.startswith(f"{device} ")}
    transfers = list((near or found["transfer"]).values())
    worst = max([statistics.median(transfers), *errors])
    reason = outside or "no measurement of this device and software"
    return Belief(
        error=worst, basis=f"{reason}; {len(transfers)} transfers to other models or software", extrapolated=True
    )


def outside(device: str, software: str, *, tp: int, pp: int, input_len: float, output_len: float) -> str | None:
    """In what a question is beyond the measurements of a device and software."""
    domain = _validation()["domain"].get(f"{device} {software}")
    if domain is None:
        return "no measurement of this device and software"
    asked = {"tp": tp, "pp": pp, "input_len": input_len, "output_len": output_len}
    for name, value in asked.items():
        low, high = domain[name]
        if not low / _SLACK <= value <= high * _SLACK:
            within = f"{low:g} to {high:g}" if low < high else f"{low:g}"
            return f"{name} {value:g}, measured at {within}"
    return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """A TPOT that somebody measured, in milliseconds."""

    users: float
    tpot: float
    source: str


def published(
    device: str, software: str, *, tp: int, flops: float, bits: float, input_len: float, output_len: float
) -> list[Published]:
    """What was measured of a model of so many FLOPs a token and such weights, of requests of about these lengths."""

    def alike(one: dict[str, Any]) -> bool:
        near = {"input_len": input_len, "output_len": output_len, "flops": flops}
        same = (one["device"], one["software"], one["tp"], one["bits"]) == (device, software, tp, bits)
        return same and all(1 / _SLACK <= one[name] / value <= _SLACK for name, value in near.items())

    found = [one for one in _validation()["points"] if alike(one)]
    return [Published(users=one["users"], tpot=one["tpot"], source=one["source"]) for one in found]


@functools.cache
def _validation() -> dict[str, Any]:
    text = (resources.files("furiosa_llm.simulate") / "validation.json").read_text()
    found: dict[str, Any] = json.loads(text)
    return found
