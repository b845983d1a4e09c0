"""Names that nothing has yet, found without trying all that are taken."""

from __future__ import annotations

from collections.abc import Iterable


class FreeNames:
    """Gives out names, each once: the name that is wanted, or with the least number behind it that makes it free."""

    def __init__(self, taken: Iterable[str] = ()) -> None:
        self._taken = set(taken)
        self._numbers: dict[str, int] = {}
        """Wanted name -> the first number that has not been tried behind it."""

    def take(self, name: str) -> str:
        """`name`, or `name.1`, `name.2` and so on; it is taken from now on."""
        candidate, number = name, self._numbers.get(name, 1)
        while candidate in self._taken:
            candidate, number = f"{name}.{number}", number + 1
        self._numbers[name] = number
        self._taken.add(candidate)
        return candidate
