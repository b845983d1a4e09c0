"""Device files: those of the package, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from furiosa_llm.simulate.device import device_names, load_device, parse_device
from furiosa_llm.simulate.errors import DeviceFileError

FOLDER = Path(__file__).parents[2] / "furiosa_llm" / "simulate" / "devices"
RNGD = (FOLDER / "rngd.toml").read_text()


def test_every_constant_of_the_package_has_a_source() -> None:
    assert device_names() == ["a100", "gaudi2", "gaudi3", "h100", "h200", "l40s", "mi300x", "rngd"]
    for name in device_names():
        device = load_device(name)
        assert device.name == name
        for software in device.software:
            assert all(constant.source for constant in device.constants(software).values())


def test_a_file_of_ones_own_is_read(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(RNGD.replace('name = "rngd"', 'name = "mine"'))
    assert load_device(str(file)).name == "mine"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("units_per_card", "pes_per_card", "there is no key pes_per_card"),
        ("cards_per_host = 8\n", "", "cards_per_host is missing"),
        ("units_per_card = 8", "units_per_card = 0", "units_per_card is 0, expected an integer from 1 to 4096"),
        ("cards_per_host = 8", "cards_per_host = 1000000000", "cards_per_host is 10*, expected an integer from 1 to 4"),
        ('unit = "B/s"', 'unit = "GB/s"', "bandwidth has the unit 'GB/s', expected 'B/s'"),
        ("value = 1500000000000.0", "value = -1", "bandwidth is -1, expected more than 0"),
        ("value = 1500000000000.0", "value = nan", "bandwidth has the value nan, expected a number"),
        ("value = 1500000000000.0", "value = inf", "bandwidth has the value inf, expected a number"),
        ("value = 1500000000000.0", f"value = 1{400 * '0'}", "bandwidth has the value 10*, expected a number"),
        ("value = 1500000000000.0", "value = 5e-324", "bandwidth is 4.94066e-324, expected 1e-12 to 1e.21"),
        ("value = 0.0575", "value = 1e308", "request_time is 1e.308, expected 0, or 1e-12 to 3600"),
        ("memory_share = { value = 1.0", "memory_share = { value = 1.5", "memory_share is 1.5, expected 1e-12 to 1$"),
        ("mixed = { value = 0", "mixed = { value = 0.5", "mixed is 0.5, expected 0, or 1 to 1$"),
        ("bucket = { value = 128", "bucket = { value = 0.5", r"bucket is 0.5, expected 1 to 1e\+21$"),
        ("value = 1500000000000.0", "value = true", "bandwidth has the value True, expected a number"),
        ('mark = "published"', 'mark = "known"', "has the mark 'known', expected one of published, measured, fitted"),
        ("value = 1500000000000.0, ", "", "bandwidth is {'unit': 'B/s'"),
        ("memory_share = ", "memory_part = ", "there is no key software.furiosa-llm.memory_part"),
        ("[software.furiosa-llm]", "[[software.furiosa-llm]]", "software.furiosa-llm is .*, expected a table"),
        ('name = "rngd"', "name = ", "is not TOML"),
    ],
)
def test_what_is_no_device_file_is_refused(old: str, new: str, message: str) -> None:
    assert old in RNGD
    with pytest.raises(DeviceFileError, match=message):
        parse_device(RNGD.replace(old, new, 1), "mine.toml")


def test_a_device_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DeviceFileError, match="there is no device 'rtx4090'; use one of a100, gaudi2"):
        load_device("rtx4090")
    with pytest.raises(DeviceFileError, match=r"none\.toml cannot be read"):
        load_device(str(tmp_path / "none.toml"))
    with pytest.raises(DeviceFileError, match="cannot be read"):
        load_device("a\0b.toml")
    endless = tmp_path / "endless.toml"
    endless.symlink_to("/dev/zero")
    with pytest.raises(DeviceFileError, match=r"endless\.toml is no file"):
        load_device(str(endless))
    with pytest.raises(DeviceFileError, match="deep is not TOML"):
        parse_device("a = " + 5000 * "[", "deep")
