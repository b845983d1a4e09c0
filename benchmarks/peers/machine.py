"""The machine that figures were measured on."""

from __future__ import annotations

import os
import platform
from pathlib import Path

_TOLD_FLAGS = ("avx2", "avx512f", "avx_vnni", "avx512_vnni", "avx512_bf16", "amx_tile", "amx_int8", "amx_bf16")
"""Of the instructions that a CPU may have, those that these engines have kernels for."""


def describe_machine() -> dict[str, str]:
    """Cores that this process may use, the CPU and its instructions, memory, system and Python."""
    fields = cpu_fields(Path("/proc/cpuinfo").read_text())
    flags = fields.get("flags", "").split()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cores": str(cores()),
        "cpu": fields.get("model name", platform.machine()),
        "instructions": " ".join(flag for flag in _TOLD_FLAGS if flag in flags) or "none of those looked for",
        "memory": f"{memory / 2**30:.0f} GiB",
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
    }


def cores() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0))


def cpu_fields(text: str) -> dict[str, str]:
    """What /proc/cpuinfo says of the first core."""
    first = text.strip().partition("\n\n")[0]
    parts = (line.partition(":") for line in first.splitlines())
    return {name.strip(): value.strip() for name, _, value in parts}
