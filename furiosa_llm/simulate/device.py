"""Device files: what a card does and has, each constant with its unit, its source and how much it is to be believed."""

from __future__ import annotations

import sys
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

from furiosa_llm.simulate.errors import DeviceFileError

Mark = Literal["published", "measured", "fitted", "assumed"]
"""By the vendor; by others, and published; to the measurements in benchmarks/simulate; neither."""
MARKS: tuple[str, ...] = get_args(Mark)
_ENTRY = {"value", "unit", "source", "mark"}
_MOST_NBYTES = 2**20
_MOST_COUNT = 4096
RATE_UNIT = "FLOP/s"


@dataclass(frozen=True, slots=True, kw_only=True)
class Constant:
    """A number of a device file."""

    value: float
    unit: str
    source: str
    mark: str


class Unit(NamedTuple):
    """What a file gives a constant in."""

    name: str
    may_be_zero: bool = False
    least: float = 1e-12
    """What it is if it is not zero: such that times are neither none nor without end."""
    most: float = 1e21


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """How fast products are, by their rows; between those that are listed it is interpolated."""

    nbytes_of_weight: float
    nbytes_read: float
    """Of all weights that the products went through in turn: few stay in caches."""
    rows: tuple[float, ...]
    values: tuple[float, ...]
    """FLOP/s of the machine."""
    source: str
    mark: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Cores:
    """What simulated PEs take of a machine whose cores they share: `--measure-this-machine` writes it."""

    count: Annotated[Constant, Unit("1")]
    step_time: Annotated[Constant, Unit("s", may_be_zero=True, most=3600)]
    """Of each step, whatever is in it: scheduler, bindings, threads."""
    op_time: Annotated[Constant, Unit("s", may_be_zero=True, most=3600)]
    """Of each node that a core runs, besides what it computes."""
    collective_time: Annotated[Constant, Unit("s", may_be_zero=True, most=3600)]
    """Of each collective: where threads wait for each other."""
    activation_bandwidth: Annotated[Constant, Unit("B/s")]
    """Of all cores, where values go from node to node."""
    cache_bandwidth: Annotated[Constant, Unit("B/s")]
    """Of all cores, where each sequence has one query."""
    attention_one: Annotated[Constant, Unit("FLOP/s")]
    """Of all cores, where each sequence has one query."""
    attention_many: Annotated[Constant, Unit("FLOP/s")]
    """Of all cores, where a sequence has many."""
    products: tuple[Rates, ...]
    """Of several types of weights, few and many."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Software:
    """What a serving software makes of a device. Times are of one PE group, efficiencies shares of the device's own."""

    memory_efficiency: Annotated[Constant, Unit("1", most=2)]
    """Of the memory's bandwidth, where weights are read."""
    attention_efficiency: Annotated[Constant, Unit("1", most=2)]
    """Of the memory's bandwidth, where attention reads the cache."""
    compute_efficiency: Annotated[Constant, Unit("1", most=2)]
    """Of the peak, in large products."""
    block_time: Annotated[Constant, Unit("s", may_be_zero=True, most=3600)]
    """Of each layer of a step, whatever it computes: launches, barriers, the latency of collectives."""
    block_time_spanning: Annotated[Constant, Unit("s", may_be_zero=True, most=3600)]
    """The same where the ranks of a stage are on several cards."""
    block_time_batched: Annotated[Constant, Unit("s", may_be_zero=True, most=3600)]
    """More of each layer where a step has more than one sequence, if one alone is computed otherwise."""
    sequence_time: Annotated[Constant, Unit("s", may_be_zero=True, most=3600)]
    """Of each sequence in a step: sampling, and what the host does for it."""
    request_time: Annotated[Constant, Unit("s", may_be_zero=True, most=3600)]
    """Of each request before its prompt is computed: server, tokenizer, queue."""
    memory_share: Annotated[Constant, Unit("1", most=1)]
    """Of the card's memory that the software uses."""
    memory_reserved: Annotated[Constant, Unit("B", may_be_zero=True)]
    """Of that share, what is neither weights nor cache, on each card."""
    max_sequences: Annotated[Constant, Unit("1", least=1)]
    """The most sequences that a replica runs at once."""
    chunk: Annotated[Constant, Unit("tokens", least=1)]
    """The most tokens of prompts in a step."""
    mixed: Annotated[Constant, Unit("1", may_be_zero=True, least=1, most=1)]
    """1 if a step has prompts and decoding sequences together, 0 if they take turns."""
    bucket: Annotated[Constant, Unit("tokens", least=1)]
    """Attention is computed for lengths rounded up to a multiple of this."""
    cores: Cores | None
    """None where PEs are processors of their own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """A card, and the hosts that cards are in."""

    name: str
    title: str
    units_per_card: int
    """Processing elements that are ranks of their own; 1 where the card is one."""
    cards_per_host: int
    memory: Annotated[Constant, Unit("B")]
    bandwidth: Annotated[Constant, Unit("B/s")]
    on_chip: Annotated[Constant, Unit("B", may_be_zero=True)]
    flops_16: Annotated[Constant, Unit("FLOP/s")]
    flops_8: Annotated[Constant, Unit("FLOP/s")]
    link_in_card: Annotated[Constant, Unit("B/s")]
    link_in_host: Annotated[Constant, Unit("B/s")]
    link_of_hosts: Annotated[Constant, Unit("B/s")]
    latency_of_hosts: Annotated[Constant, Unit("s", may_be_zero=True, most=3600)]
    """Of a message from one host to another, however small."""
    power_idle: Annotated[Constant, Unit("W", may_be_zero=True)]
    power_busy: Annotated[Constant, Unit("W", may_be_zero=True)]
    """0 if it is not known."""
    software: Mapping[str, Software]
    """The first is the default. `NAME-spanning` is taken for NAME where the ranks of a stage are on several cards."""

    def software_at(self, name: str, tensor_parallel_size: int) -> str:
        """The name of what is measured for so many ranks."""
        spanning = f"{name}-spanning"
        return spanning if tensor_parallel_size > self.units_per_card and spanning in self.software else name

    def constants(self, software: str) -> dict[str, Constant]:
        """All that a prediction with `software` rests on, by name."""
        used = self.software[software]
        parts = [self, used, *([] if used.cores is None else [used.cores])]
        return {name: getattr(part, name) for part in parts for name in _units(type(part))}


def _units(kind: type) -> dict[str, Unit]:
    """Of the constants of one of these classes."""
    hints = get_type_hints(kind, include_extras=True)
    return {name: hint.__metadata__[0] for name, hint in hints.items() if get_origin(hint) is Annotated}


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
        if path.exists() and not path.is_file():
            raise DeviceFileError(f"{given} is no file, and a device file is one")
        if path.stat().st_size > _MOST_NBYTES:
            raise DeviceFileError(f"{given} has more than {_MOST_NBYTES} bytes, which no device file has")
        text = path.read_text()
    except (OSError, ValueError) as error:  # a name with a NUL, and bytes that are no UTF-8
        raise DeviceFileError(f"the device file {given} cannot be read: {error}") from error
    return parse_device(text, given)


def parse_device(text: str, name: str) -> Device:
    """The device that the TOML document `text` describes. Raises DeviceFileError, which names the key."""
    try:
        found = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise DeviceFileError(f"{name} is not TOML: {error}") from error
    _check_keys(found, {field.name for field in fields(Device)}, name, "")
    software = found["software"]
    if not isinstance(software, dict) or not software:
        raise DeviceFileError(f"{name}: software has no entry; write at least one table [software.NAME]")
    made = {}
    for key, table in software.items():
        if not isinstance(table, dict):
            raise DeviceFileError(f"{name}: software.{key} is {table!r:.60}, expected a table")
        made[key] = _software(table, name, f"software.{key}.")
    return Device(
        name=_text(found["name"], name, "name"),
        title=_text(found["title"], name, "title"),
        units_per_card=_count(found["units_per_card"], name, "units_per_card"),
        cards_per_host=_count(found["cards_per_host"], name, "cards_per_host"),
        software=made,
        **_constants(found, Device, name, ""),
    )


def _software(table: Mapping[str, Any], name: str, where: str) -> Software:
    cores = table.get("cores")
    _check_keys({**table, "cores": cores}, {field.name for field in fields(Software)}, name, where)
    return Software(
        **_constants(table, Software, name, where),
        cores=None if cores is None else _cores(cores, name, f"{where}cores."),
    )


def _cores(table: Any, name: str, where: str) -> Cores:
    _check_table(table, {field.name for field in fields(Cores)}, name, where)
    products = table["products"]
    if not isinstance(products, list) or not products:
        raise DeviceFileError(f"{name}: {where}products is {products!r:.60}, expected tables [[{where}products]]")
    rates = tuple(_rates(entry, name, f"{where}products[{number}].") for number, entry in enumerate(products))
    return Cores(**_constants(table, Cores, name, where), products=rates)


def _rates(table: Any, name: str, where: str) -> Rates:
    _check_table(table, {*(field.name for field in fields(Rates)), "unit"}, name, where)
    if table["unit"] != RATE_UNIT:
        raise DeviceFileError(f"{name}: {where}unit is {table['unit']!r:.40}, expected {RATE_UNIT!r}")
    rows, values = (_numbers(table[key], name, where + key) for key in ("rows", "values"))
    if len(rows) != len(values) or list(rows) != sorted(set(rows)):
        raise DeviceFileError(f"{name}: {where}rows must grow, and have a value each; there are {len(values)} values")
    sizes = {key: _numbers([table[key]], name, where + key)[0] for key in ("nbytes_of_weight", "nbytes_read")}
    source, mark = _text(table["source"], name, f"{where}source"), _mark(table["mark"], name, f"{where}mark")
    return Rates(**sizes, rows=rows, values=values, source=source, mark=mark)


def _numbers(found: Any, name: str, key: str) -> tuple[float, ...]:
    if not isinstance(found, list) or not found or not all(_is_number(one) and one > 0 for one in found):
        raise DeviceFileError(f"{name}: {key} is {found!r:.60}, expected numbers above 0")
    return tuple(map(float, found))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _check_table(table: Any, expected: set[str], name: str, where: str) -> None:
    if not isinstance(table, dict):
        raise DeviceFileError(f"{name}: {where.removesuffix('.')} is {table!r:.60}, expected a table")
    _check_keys(table, expected, name, where)


def _check_keys(found: Mapping[str, Any], expected: set[str], name: str, where: str) -> None:
    if strange := sorted(found.keys() - expected):
        raise DeviceFileError(
            f"{name}: there is no key {where}{strange[0]}; the keys are {', '.join(sorted(expected))}"
        )
    if missing := sorted(expected - found.keys()):
        raise DeviceFileError(f"{name}: {where}{missing[0]} is missing; every constant is needed, assumed if not known")


def _constants(found: Mapping[str, Any], kind: type, name: str, where: str) -> dict[str, Any]:
    return {key: _constant(found[key], unit, name, where + key) for key, unit in _units(kind).items()}


def _constant(entry: Any, unit: Unit, name: str, key: str) -> Constant:
    if not isinstance(entry, dict) or set(entry) != _ENTRY:
        raise DeviceFileError(f"{name}: {key} is {entry!r:.60}, expected {{value, unit, source, mark}}")
    value = entry["value"]
    if not _is_number(value):
        raise DeviceFileError(f"{name}: {key} has the value {value!r:.60}, expected a number")
    if value < 0 or (value == 0 and not unit.may_be_zero):
        raise DeviceFileError(f"{name}: {key} is {value}, expected more than 0")
    if value and not unit.least <= value <= unit.most:
        zero = "0, or " if unit.may_be_zero else ""
        raise DeviceFileError(f"{name}: {key} is {value:g}, expected {zero}{unit.least:g} to {unit.most:g}")
    if entry["unit"] != unit.name:
        raise DeviceFileError(f"{name}: {key} has the unit {entry['unit']!r:.40}, expected {unit.name!r}")
    return Constant(
        value=float(value),
        unit=unit.name,
        source=_text(entry["source"], name, f"{key}.source"),
        mark=_mark(entry["mark"], name, key),
    )


def _mark(value: Any, name: str, key: str) -> str:
    if value not in MARKS:
        raise DeviceFileError(f"{name}: {key} has the mark {value!r:.40}, expected one of {', '.join(MARKS)}")
    return str(value)


def _text(value: Any, name: str, key: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise DeviceFileError(f"{name}: {key} is {value!r:.60}, expected a text")
    return value


def _count(value: Any, name: str, key: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= _MOST_COUNT:
        raise DeviceFileError(f"{name}: {key} is {value!r:.60}, expected an integer from 1 to {_MOST_COUNT}")
    return value


def _folder() -> Any:
    return resources.files("furiosa_llm.simulate") / "devices"
