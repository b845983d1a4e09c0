"""Device files: what a card does and has, each constant with its unit, its source and how much it is to be believed."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from importlib import resources
from pathlib import Path
from typing import Any, Literal, get_args

from furiosa_llm.simulate.errors import DeviceFileError

Mark = Literal["published", "measured", "fitted", "assumed"]
"""By the vendor; by others, and published; to the measurements in benchmarks/simulate; neither."""
MARKS: tuple[str, ...] = get_args(Mark)
_ENTRY = {"value", "unit", "source", "mark"}
_MOST_NBYTES = 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class Constant:
    """A number of a device file."""

    value: float
    unit: str
    source: str
    mark: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Software:
    """What a serving software makes of a device. Times are of one PE group, efficiencies shares of the device's own."""

    memory_efficiency: Constant
    """Of the memory's bandwidth, where weights are read."""
    attention_efficiency: Constant
    """Of the memory's bandwidth, where attention reads the cache."""
    compute_efficiency: Constant
    """Of the peak, in large products."""
    block_time: Constant
    """Of each layer of a step, whatever it computes: launches, barriers, the latency of collectives."""
    block_time_spanning: Constant
    """The same where the ranks of a stage are on several cards."""
    block_time_batched: Constant
    """More of each layer where a step has more than one sequence, if one alone is computed otherwise."""
    sequence_time: Constant
    """Of each sequence in a step: sampling, and what the host does for it."""
    request_time: Constant
    """Of each request before its prompt is computed: server, tokenizer, queue."""
    memory_share: Constant
    """Of the card's memory that the software uses."""
    memory_reserved: Constant
    """Of that share, what is neither weights nor cache, on each card."""
    max_sequences: Constant
    """The most sequences that a replica runs at once."""
    chunk: Constant
    """The most tokens of prompts in a step."""
    mixed: Constant
    """1 if a step has prompts and decoding sequences together, 0 if they take turns."""
    bucket: Constant
    """Attention is computed for lengths rounded up to a multiple of this."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """A card, and the hosts that cards are in."""

    name: str
    title: str
    units_per_card: int
    """Processing elements that are ranks of their own; 1 where the card is one."""
    cards_per_host: int
    memory: Constant
    bandwidth: Constant
    on_chip: Constant
    flops_16: Constant
    flops_8: Constant
    link_in_card: Constant
    link_in_host: Constant
    link_of_hosts: Constant
    power_idle: Constant
    power_busy: Constant
    software: Mapping[str, Software]
    """The first is the default. `NAME-spanning` is taken for NAME where the ranks of a stage are on several cards."""

    def software_at(self, name: str, tensor_parallel_size: int) -> str:
        """The name of what is measured for so many ranks."""
        spanning = f"{name}-spanning"
        return spanning if tensor_parallel_size > self.units_per_card and spanning in self.software else name

    def constants(self, software: str) -> dict[str, Constant]:
        """All that a prediction with `software` rests on, by name."""
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.name in _UNITS}
        return own | {f.name: getattr(self.software[software], f.name) for f in fields(Software)}


_UNITS = {
    "memory": "B",
    "bandwidth": "B/s",
    "on_chip": "B",
    "flops_16": "FLOP/s",
    "flops_8": "FLOP/s",
    "link_in_card": "B/s",
    "link_in_host": "B/s",
    "link_of_hosts": "B/s",
    "power_idle": "W",
    "power_busy": "W",
}
_SOFTWARE_UNITS = {
    "memory_efficiency": "1",
    "attention_efficiency": "1",
    "compute_efficiency": "1",
    "block_time": "s",
    "block_time_spanning": "s",
    "block_time_batched": "s",
    "sequence_time": "s",
    "request_time": "s",
    "memory_share": "1",
    "memory_reserved": "B",
    "max_sequences": "1",
    "chunk": "tokens",
    "mixed": "1",
    "bucket": "tokens",
}
_MAY_BE_ZERO = {
    *(name for name, unit in _SOFTWARE_UNITS.items() if unit == "s"),
    *("memory_reserved", "mixed", "power_idle", "on_chip"),
}


def device_names() -> list[str]:
    """The devices that come with the package."""
    return sorted(entry.name[:-5] for entry in _folder().iterdir() if entry.name.endswith(".toml"))


def load_device(given: str) -> Device:
    """The device of that name, or of the file `given`. Raises DeviceFileError."""
    if given in device_names():
        return parse_device((_folder() / f"{given}.toml").read_text(), given)
    path = Path(given)
    if path.suffix != ".toml":
        raise DeviceFileError(
            f"there is no device {given!r:.80}; use one of {', '.join(device_names())}, or a device file (.toml)"
        )
    try:
        if path.stat().st_size > _MOST_NBYTES:
            raise DeviceFileError(f"{given} has more than {_MOST_NBYTES} bytes, which no device file has")
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise DeviceFileError(f"the device file {given} cannot be read: {error}") from error
    return parse_device(text, given)


def parse_device(text: str, name: str) -> Device:
    """The device that the TOML document `text` describes. Raises DeviceFileError, which names the key."""
    try:
        found = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise DeviceFileError(f"{name} is not TOML: {error}") from error
    _check_keys(found, {field.name for field in fields(Device)}, name, "")
    software = found["software"]
    if not isinstance(software, dict) or not software:
        raise DeviceFileError(f"{name}: software has no entry; write at least one table [software.NAME]")
    made = {}
    for key, table in software.items():
        if not isinstance(table, dict):
            raise DeviceFileError(f"{name}: software.{key} is {table!r:.60}, expected a table")
        _check_keys(table, set(_SOFTWARE_UNITS), name, f"software.{key}.")
        made[key] = Software(**_constants(table, _SOFTWARE_UNITS, name, f"software.{key}."))
    return Device(
        name=_text(found["name"], name, "name"),
        title=_text(found["title"], name, "title"),
        units_per_card=_count(found["units_per_card"], name, "units_per_card"),
        cards_per_host=_count(found["cards_per_host"], name, "cards_per_host"),
        software=made,
        **_constants(found, _UNITS, name, ""),
    )


def _check_keys(found: Mapping[str, Any], expected: set[str], name: str, where: str) -> None:
    if strange := sorted(found.keys() - expected):
        raise DeviceFileError(
            f"{name}: there is no key {where}{strange[0]}; the keys are {', '.join(sorted(expected))}"
        )
    if missing := sorted(expected - found.keys()):
        raise DeviceFileError(f"{name}: {where}{missing[0]} is missing; every constant is needed, assumed if not known")


def _constants(found: Mapping[str, Any], units: Mapping[str, str], name: str, where: str) -> dict[str, Any]:
    return {key: _constant(found[key], unit, name, where + key, key in _MAY_BE_ZERO) for key, unit in units.items()}


def _constant(entry: Any, unit: str, name: str, key: str, may_be_zero: bool) -> Constant:
    if not isinstance(entry, dict) or set(entry) != _ENTRY:
        raise DeviceFileError(f"{name}: {key} is {entry!r:.60}, expected {{value, unit, source, mark}}")
    value = entry["value"]
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise DeviceFileError(f"{name}: {key} has the value {value!r:.60}, expected a number")
    if value < 0 or (value == 0 and not may_be_zero):
        raise DeviceFileError(f"{name}: {key} is {value}, expected more than 0")
    if entry["unit"] != unit:
        raise DeviceFileError(f"{name}: {key} has the unit {entry['unit']!r:.40}, expected {unit!r}")
    if entry["mark"] not in MARKS:
        raise DeviceFileError(f"{name}: {key} has the mark {entry['mark']!r:.40}, expected one of {', '.join(MARKS)}")
    return Constant(
        value=float(value), unit=unit, source=_text(entry["source"], name, f"{key}.source"), mark=entry["mark"]
    )


def _text(value: Any, name: str, key: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise DeviceFileError(f"{name}: {key} is {value!r:.60}, expected a text")
    return value


def _count(value: Any, name: str, key: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise DeviceFileError(f"{name}: {key} is {value!r:.60}, expected an integer of at least 1")
    return value


def _folder() -> Any:
    return resources.files("furiosa_llm.simulate") / "devices"
