"""verification.json: written whole or not at all, and read as strictly as a manifest."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from furiosa_llm.runtime.artifact.manifest import RECORD_NAME
from furiosa_llm.runtime.artifact.tools.record import (
    MAX_RECORD_NBYTES,
    Check,
    Compared,
    RecordError,
    Verification,
    parse_verification,
    read_verification,
    write_verification,
)

DIGEST = "0123456789abcdef" * 4
PASSED = Verification(
    manifest_digest=DIGEST,
    tool="tool 1",
    libraries={"numpy": "2"},
    checks=(
        Check(name="structure", checked=3),
        Check(name="stitched", checked=2, greatest_error=1e-6, tolerance=1e-4),
    ),
    compared=Compared(model="rebuilt", lengths=(9, 100, 512), limit=512, seed=7),
)
FAILED = Verification(
    manifest_digest=DIGEST,
    tool="tool 1",
    libraries={},
    checks=(Check(name="executor", checked=2, faults=("it is off",), greatest_error=0.5, tolerance=1e-4),),
)


@pytest.mark.parametrize("record", [PASSED, FAILED], ids=["passed", "failed"])
def test_what_is_written_is_what_is_read(record: Verification, tmp_path: Path) -> None:
    assert read_verification(tmp_path) is None
    assert write_verification(tmp_path, record) == tmp_path / RECORD_NAME
    assert read_verification(tmp_path) == record
    assert [path.name for path in tmp_path.iterdir()] == [RECORD_NAME]
    found = json.loads((tmp_path / RECORD_NAME).read_bytes())
    assert list(found) == ["format", "manifest_digest", "tool", "libraries", "passed", "compared", "checks"]
    assert found["passed"] is (record is PASSED)


def old(record: Verification) -> bytes:
    """The record as version 1 had it."""
    document = json.loads(record.to_bytes())
    del document["compared"]
    document["format"]["version"] = 1
    return json.dumps(document).encode()


def test_a_record_of_version_1_is_read() -> None:
    assert parse_verification(old(FAILED)) == FAILED
    found = parse_verification(old(PASSED))
    assert found.compared is None
    assert found.words == "weights were not read; outputs compared with the unsplit model's, at lengths not recorded"


@pytest.mark.parametrize(
    ("names", "compared", "words"),
    [
        (
            ("structure", "proof", "lowering", "weights"),
            None,
            "static proof that the ranks compute one model; program and manifest compared with source.onnx lowered "
            "again; weights compared with their digests; no output was compared",
        ),
        (
            ("structure", "proof"),
            None,
            "static proof that the ranks compute one model; weights were not read; no output was compared",
        ),
        (
            ("originals", "weights", "stitched"),
            Compared(model="rebuilt", lengths=(9, 512), limit=8192, seed=7),
            "weights compared with their digests; original weights put together from the shards; ranks, executor and "
            "engine compared with the unsplit model put back together from this artifact, at 2 lengths from 9 to 512 "
            "of 8192 (seed 7)",
        ),
        (
            ("identity", "stitched"),
            Compared(model="given", lengths=(9,), limit=None, seed=7),
            "weights were not read; graph and weights compared with the model given; ranks, executor and engine "
            "compared with the model given, at the length 9 (seed 7)",
        ),
    ],
)
def test_what_was_compared_in_words(names: tuple[str, ...], compared: Compared | None, words: str) -> None:
    checks = tuple(Check(name=name, checked=1) for name in names)
    record = Verification(manifest_digest=DIGEST, tool="t", libraries={}, checks=checks, compared=compared)
    assert record.words == words


def test_one_fault_is_enough() -> None:
    both = Verification(manifest_digest=DIGEST, tool="t", libraries={}, checks=(*PASSED.checks, *FAILED.checks))
    assert not both.passed
    assert PASSED.passed


@pytest.mark.slow
def test_many_faults_make_a_short_record() -> None:
    check = Check(name="weights", checked=1, faults=tuple("x" * 10_000 for _ in range(100_000)))
    record = Verification(manifest_digest=DIGEST, tool="t", libraries={}, checks=(check,))
    data = record.to_bytes()
    assert len(data) < 20_000
    (found,) = parse_verification(data).checks
    assert len(found.faults) == 21
    assert found.faults[-1] == "and 99980 more"


# -- malformed -----------------------------------------------------------------------------------------------------


def edited(change: Callable[[dict[str, Any]], None], record: Verification = PASSED) -> bytes:
    document = json.loads(record.to_bytes())
    change(document)
    return json.dumps(document).encode()


def setting(*path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(document: dict[str, Any]) -> None:
        for key in path[:-1]:
            document = document[key]
        document[path[-1]] = value

    return change


STITCHED = ("checks", "stitched")
MALFORMED: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "is not whole UTF-8 JSON"),
    "cut short": (PASSED.to_bytes()[:-20], "is not whole UTF-8 JSON"),
    "not UTF-8": (PASSED.to_bytes().replace(b"tool 1", b"tool \xff"), "is not whole UTF-8 JSON"),
    "a list": (b"[]", r"\$: found .*, expected an object"),
    "nested deeply": (b"[" * 200_000, "is nested too deeply"),
    "a key twice": (b'{"passed": true, "passed": false}', "more than once"),
    "another format": (edited(setting("format", "name", value="other")), r"\$\.format\.name: found \"other\""),
    "another version": (
        edited(setting("format", "version", value=3)),
        r"\$\.format\.version: found 3, expected version 1 to 2",
    ),
    "a newer one with other keys": (
        edited(lambda d: d.update(format={"name": "furiosa-llm-onnx-verification", "version": 9}, more=1)),
        r"\$\.format\.version: found 9, expected version 1 to 2",
    ),
    "an unknown key": (edited(setting("host", value="here")), "unknown key 'host'"),
    "a missing key": (edited(lambda d: d.pop("tool") and None), "expected the key 'tool'"),
    "a digest too short": (edited(setting("manifest_digest", value="ab")), r"\$\.manifest_digest.*64 lower-case"),
    "a digest of capitals": (edited(setting("manifest_digest", value=DIGEST.upper())), "64 lower-case"),
    "no tool": (edited(setting("tool", value="")), r"\$\.tool: .*not empty"),
    "a library's version a number": (edited(setting("libraries", "numpy", value=2)), r"\$\.libraries\.numpy"),
    "no checks": (edited(setting("checks", value={})), r"\$\.checks: found none, expected some of"),
    "compared with whatever": (edited(setting("compared", "model", value="x")), r"model: found \"x\", expected one of"),
    "compared at no length": (edited(setting("compared", "lengths", value=[])), "one length or more, ascending"),
    "lengths in disorder": (edited(setting("compared", "lengths", value=[9, 8])), "one length or more, ascending"),
    "an old one with a new key": (
        edited(setting("format", "version", value=1)),
        r"\$: found .*unknown key 'compared'",
    ),
    "checks a list": (edited(setting("checks", value=[])), r"\$\.checks: .*expected an object"),
    "an unknown check": (edited(setting("checks", "luck", value={})), r"\$\.checks: found 'luck'"),
    "a check without faults": (edited(lambda d: d["checks"]["stitched"].pop("faults") and None), "key 'faults'"),
    "a negative count": (edited(setting(*STITCHED, "checked", value=-1)), r"stitched\.checked: found -1"),
    "faults a string": (edited(setting(*STITCHED, "faults", value="x")), r"stitched\.faults: .*a list"),
    "an empty fault": (edited(setting(*STITCHED, "faults", value=[""])), r"faults\[0\]"),
    "an error of text": (edited(setting(*STITCHED, "greatest_error", value="0")), "a number of at least 0"),
    "a negative error": (edited(setting(*STITCHED, "greatest_error", value=-1e-9)), "a number of at least 0"),
    "true as an error": (edited(setting(*STITCHED, "greatest_error", value=True)), "a number of at least 0"),
    "an infinite error": (PASSED.to_bytes().replace(b"1e-06", b"Infinity"), "is not whole UTF-8 JSON"),
    "passed with a fault": (
        edited(setting(*STITCHED, "faults", value=["x"])),
        r"stitched\.passed: found true, expected false",
    ),
    "failed without a fault": (edited(setting(*STITCHED, "passed", value=False)), "stitched.passed: found false"),
    "passed as a number": (edited(setting("passed", value=1)), r"\$\.passed: found 1, expected true"),
    "a verdict of its own": (edited(setting("passed", value=True), FAILED), r"\$\.passed: found true, expected false"),
    "passed beyond the tolerance": (
        edited(setting(*STITCHED, "greatest_error", value=1e-3)),
        r"greatest_error: found 0\.001, expected at most 0\.0001, the tolerance",
    ),
    "passed with an error that is not finite": (
        edited(setting(*STITCHED, "greatest_error", value=None)),
        r"greatest_error: found .*, expected at most 0\.0001, the tolerance",
    ),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_record(name: str, tmp_path: Path) -> None:
    data, message = MALFORMED[name]
    (tmp_path / RECORD_NAME).write_bytes(data)
    with pytest.raises(RecordError, match=message) as caught:
        read_verification(tmp_path)
    assert str(caught.value).startswith(RECORD_NAME)
    assert str(caught.value).endswith("verify the artifact again with `furiosa-llm verify`, which writes it anew")


def test_what_is_no_file(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_bytes(PASSED.to_bytes())
    (tmp_path / RECORD_NAME).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(RecordError, match="is not a regular file; remove it"):
        read_verification(tmp_path)
    (tmp_path / RECORD_NAME).unlink()
    os.mkfifo(tmp_path / RECORD_NAME)  # reading it would wait for ever
    with pytest.raises(RecordError, match="is not a regular file"):
        read_verification(tmp_path)


def test_a_record_that_is_too_long_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / RECORD_NAME).open("wb") as file:
        file.truncate(MAX_RECORD_NBYTES + 1)
    with pytest.raises(RecordError, match=f"found {MAX_RECORD_NBYTES + 1} bytes, expected at most {MAX_RECORD_NBYTES}"):
        read_verification(tmp_path)


# -- writing -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_write_that_fails_leaves_the_old_record(call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_verification(tmp_path, FAILED)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os if call == "fsync" else Path, call, full)
    with pytest.raises(RecordError, match=r"verification\.json cannot be written: No space left.*--no-record"):
        write_verification(tmp_path, PASSED)
    monkeypatch.undo()
    assert read_verification(tmp_path) == FAILED
    assert [path.name for path in tmp_path.iterdir()] == [RECORD_NAME]


def test_a_link_is_replaced_not_followed(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_text("mine")
    (tmp_path / RECORD_NAME).symlink_to(tmp_path / "elsewhere")
    write_verification(tmp_path, PASSED)
    assert (tmp_path / "elsewhere").read_text() == "mine"
    assert read_verification(tmp_path) == PASSED


def test_a_folder_that_is_gone(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match="cannot be written: No such file"):
        write_verification(tmp_path / "none", PASSED)
