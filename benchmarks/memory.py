"""What processes have taken of memory, as the kernel counts it."""

from __future__ import annotations

from pathlib import Path


def peak_nbytes(process: int) -> int:
    """The most resident memory that a process has had, in bytes; 0 if it has ended."""
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    kilobytes = [line.split()[1] for line in status.splitlines() if line.startswith("VmHWM:")]
    return sum(int(one) for one in kilobytes) * 1024
