"""The published measurements: rows of measurements.csv, and which of them are usable."""

from __future__ import annotations

import csv
import dataclasses
import functools
from pathlib import Path
from typing import cast

from benchmarks.simulate.models import MODELS
from furiosa_llm.simulate.closed_form import Kind
from furiosa_llm.simulate.device import Device, device_names, load_device

_FOLDER = Path(__file__).parent
_DEVICES = {"h100-sxm": "h100", "h200-sxm": "h200", "a100-80g": "a100"}
_OWN = _FOLDER / "devices"
"""Devices that a user would describe: `--device FILE`."""
_SOFTWARE = (
    ("furiosa-llm", "furiosa-llm"),
    ("Furiosa", "furiosa-sdk-2025"),
    ("trt-llm 0.5", "trt-llm-2023"),
    ("trt-llm 0.6", "trt-llm-2023"),
    ("trt-llm 0.9", "trt-llm-2023"),
    ("trt-llm", "trt-llm"),
    ("NIM", "nim"),
    ("vllm 0.6.0", "vllm-2024"),
    ("vllm 2024", "vllm-2024"),
    ("vllm", "vllm"),
    ("optimum-habana", "optimum-habana"),
)
METRICS = ("tpot", "output_tps", "ttft", "e2e", "itl_mean", "tpot_p99", "kv_tokens")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """One figure of one run."""

    id: int
    device: str
    """A name or a file, as `--device` takes it."""
    software: str
    model: str
    tp: int
    pp: int
    dp: int
    weights: str
    kv: str
    mode: Kind
    amount: float
    input_len: float
    output_len: float
    metric: str
    value: float
    source: str

    @property
    def run(self) -> tuple[object, ...]:
        """What rows of one run share: they are held out together."""
        sizes = (self.model, self.tp, self.mode, self.amount, self.input_len, self.output_len)
        return (self.device, self.software, *sizes)

    @property
    def fitted(self) -> bool:
        """Whether the closed form gives such a figure; the rest is never fitted.

        Where the offered rate is more than a device does, the figure depends on how many requests there were.
        """
        return self.metric not in ("kv_tokens", "tpot_p99") and not (self.mode == "open" and "4090" in self.device)

    @property
    def group(self) -> tuple[str, str]:
        """What constants are fitted for."""
        return self.device, self.software


@functools.cache
def device_of(name: str) -> Device:
    """A row's device; its file is read once, for thousands of predictions."""
    return load_device(name)


@functools.cache
def measurements(name: str = "measurements") -> tuple[tuple[Measurement, ...], dict[int, str]]:
    """The usable rows of a file, and why the others are not.

    Those of `blind` were looked for when everything had been fitted, and nothing is.
    """
    found, refused = [], {}
    with (_FOLDER / f"{name}.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            reason = _reason(row)
            if reason is None:
                found.append(_read(row))
            else:
                refused[int(row["id"])] = reason
    return tuple(found), refused


def _reason(row: dict[str, str]) -> str | None:
    if "not used" in row["notes"]:
        return "its notes: " + row["notes"]
    if row["model"] not in MODELS:
        return f"no graph and no outline of {row['model']}"
    if row["metric"] not in METRICS:
        return f"the metric {row['metric']}"
    if not _file_of(row["device"]):
        return f"no device file of {row['device']}"
    return None


def _file_of(device: str) -> str | None:
    name = _DEVICES.get(device, device)
    if name in device_names():
        return name
    own = _OWN / f"{name}.toml"
    return str(own.relative_to(_FOLDER.parents[1])) if own.exists() else None


def _read(row: dict[str, str]) -> Measurement:
    device = _file_of(row["device"])
    assert device is not None  # it has no reason against it
    software = next(name for start, name in _SOFTWARE if row["stack"].startswith(start))
    known = device_of(device)
    if software not in known.software:
        software = next(iter(known.software))
    return Measurement(
        id=int(row["id"]),
        device=device,
        software=known.software_at(software, int(row["tp"])),
        model=row["model"],
        tp=int(row["tp"]),
        pp=int(row["pp"]),
        dp=int(row["dp"]),
        weights={"16": "bf16", "8": "fp8", "4": "int4"}[row["wbits"]],
        kv={"16": "bf16", "8": "fp8"}[row["kvbits"]],
        mode=cast(Kind, row["mode"]),
        amount=float(row["conc"] or 0),
        input_len=float(row["isl"]),
        output_len=float(row["osl"]),
        metric=row["metric"],
        value=float(row["value"]),
        source=row["source"],
    )
