"""Numbers for people."""

_UNITS = ("B", "kB", "MB", "GB", "TB")


def counted(count: int, noun: str) -> str:
    """A number of things: 1 -> `1 collective`, 2 -> `2 collectives`."""
    return f"{count} {noun}" + ("" if count == 1 else "s")


def nbytes(count: float) -> str:
    """A number of bytes in decimal units: 1536 -> `1.5 kB`."""
    unit = 0
    while abs(count) >= 1000 and unit < len(_UNITS) - 1:
        count /= 1000
        unit += 1
    return f"{count:.0f} {_UNITS[unit]}" if unit == 0 or abs(count) >= 100 else f"{count:.1f} {_UNITS[unit]}"
