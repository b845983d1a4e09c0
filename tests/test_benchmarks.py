"""What the benchmarks count with, counted itself."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
_PROGRAM = """
import mmap, os, sys
from pathlib import Path
from benchmarks.counted import count
source, result, how, times = sys.argv[1:]
def command():
    with (Path(source) / "weights").open("rb", buffering=0) as file:
        if how == "mapped":
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ).close()
        for _ in range(int(times)):
            os.pread(file.fileno(), 10**7, 0)
count(command, Path(source), Path(result))
"""


def _counted(tmp_path: Path, how: str, times: int) -> tuple[int, list[str]]:
    source = tmp_path / "source"
    source.mkdir(exist_ok=True)
    (source / "weights").write_bytes(bytes(10**7))
    result = tmp_path / "result"
    arguments = [str(source), str(result), how, str(times)]
    subprocess.run([sys.executable, "-c", _PROGRAM, *arguments], check=True, cwd=ROOT)
    found = json.loads(result.read_text())
    return found["nbytes_read"], found["mapped"]


def test_every_byte_that_is_read_is_counted(tmp_path: Path) -> None:
    (without, _), (once, _), (twice, mapped) = (_counted(tmp_path, "read", times) for times in range(3))
    assert 0 <= once - without - 10**7 < 10**5
    assert 0 <= twice - without - 2 * 10**7 < 10**5
    assert mapped == []


def test_maps_are_noted(tmp_path: Path) -> None:
    assert _counted(tmp_path, "mapped", 0)[1] == ["weights"]
