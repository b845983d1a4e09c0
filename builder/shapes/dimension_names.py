"""Name the dynamic dimensions of the program by their sizes at two sets of input sizes."""

from __future__ import annotations

from collections.abc import Mapping

from furiosa_llm.builder.shapes.interface import PROBE, SECOND_PROBE, concrete, total_name

Sizes = tuple[int, int]


def names_of_sizes(kinds: Mapping[str, tuple[int | str, ...]]) -> dict[Sizes, str]:
    """(size at the first probe, size at the second) -> name, for the dynamic dimensions of the inputs."""
    first, second = concrete(kinds, PROBE), concrete(kinds, SECOND_PROBE)
    names = {
        (first[name][d], second[name][d]): total_name(kind)
        for name, dims in kinds.items()
        for d, kind in enumerate(dims)
        if isinstance(kind, str)
    }
    if "past" in names.values() and "total" not in names.values():
        names[PROBE.total, SECOND_PROBE.total] = "total"
    return names


def dimension(sizes: Sizes, names: Mapping[Sizes, str]) -> int | str | None:
    """A size, or an expression over `names`; None if the dimension has no known form."""
    if sizes[0] == sizes[1]:
        return sizes[0]
    if sizes in names:
        return names[sizes]
    for (a, b), name in names.items():
        if sizes[0] % a == 0 and sizes[0] // a * b == sizes[1]:
            return f"{name}*{sizes[0] // a}"
    items = list(names.items())
    for i, ((a, b), name) in enumerate(items):
        for (c, d), other in items[i:]:
            if (a + c, b + d) == sizes:
                return f"{name} + {other}"
            if (a * c, b * d) == sizes:
                return f"{name}*{other}"
    return None
