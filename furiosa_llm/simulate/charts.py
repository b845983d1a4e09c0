"""Charts as SVG text: bars, points and spans in the colours of the page that they are in."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape

_WIDTH, _HEIGHT = 760, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 70, 16, 16, 44
_TICKS = 5
COLOURS = 10
"""How many series have a colour of their own: the classes c0, c1, ... of the page's style."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Axis:
    """One axis: what it shows, from where to where."""

    name: str
    low: float
    high: float
    logarithmic: bool = False

    def share(self, value: float) -> float:
        """Where a value lies, from 0 to 1."""
        if self.logarithmic:
            return (math.log(value) - math.log(self.low)) / ((math.log(self.high) - math.log(self.low)) or 1.0)
        return (value - self.low) / ((self.high - self.low) or 1.0)

    def ticks(self) -> Iterator[float]:
        """Some round values."""
        if self.logarithmic:
            first, last = math.ceil(math.log10(self.low) - 1e-9), math.floor(math.log10(self.high) + 1e-9)
            yield from (10.0**power for power in range(first, last + 1))
            return
        step = 10 ** math.floor(math.log10((self.high - self.low) / _TICKS or 1.0))
        step *= next(n for n in (1, 2, 5, 10) if (self.high - self.low) / (n * step) <= _TICKS)
        value = math.ceil(self.low / step) * step
        while value <= self.high * (1 + 1e-9):
            yield value
            value += step


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """A dot, with what it says when it is pointed at."""

    x: float
    y: float
    title: str
    kind: int = 0


def _x(axis: Axis, value: float) -> float:
    return round(_LEFT + axis.share(value) * (_WIDTH - _LEFT - _RIGHT), 1)


def _y(axis: Axis, value: float) -> float:
    return round(_HEIGHT - _BOTTOM - axis.share(value) * (_HEIGHT - _TOP - _BOTTOM), 1)


def chart(label: str, x: Axis, y: Axis, marks: Sequence[str], *, x_names: Sequence[tuple[float, str]] = ()) -> str:
    """The marks on their axes; `label` is what a screen reader says. `x_names` replace the ticks of x."""
    names = list(x_names) or [(value, _short(value)) for value in x.ticks()]
    lines = [
        f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{_y(y, v)}" y2="{_y(y, v)}"/>'
        f'<text x="{_LEFT - 6}" y="{_y(y, v) + 4}" text-anchor="end">{_short(v)}</text>'
        for v in y.ticks()
    ]
    under = [f'<text x="{_x(x, v)}" y="{_HEIGHT - 26}" text-anchor="middle">{escape(n)}</text>' for v, n in names]
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    titles = (
        f'<text x="{middle}" y="{_HEIGHT - 6}" text-anchor="middle">{escape(x.name)}</text>'
        f'<text transform="translate(14 {_HEIGHT / 2 - 14}) rotate(-90)" text-anchor="middle">{escape(y.name)}</text>'
    )
    body = "\n".join([*lines, *under, titles, *marks])
    return f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(label)}">\n{body}\n</svg>'


def dots(x: Axis, y: Axis, points: Sequence[Point]) -> list[str]:
    """A circle for each point."""
    return [
        f'<circle class="c{p.kind % COLOURS}" cx="{_x(x, p.x)}" cy="{_y(y, p.y)}" r="5">'
        f"<title>{escape(p.title)}</title></circle>"
        for p in points
    ]


def rings(x: Axis, y: Axis, points: Sequence[Point]) -> list[str]:
    """A ring for each point, of the same look everywhere."""
    return [
        f'<circle class="ring" cx="{_x(x, p.x)}" cy="{_y(y, p.y)}" r="5"><title>{escape(p.title)}</title></circle>'
        for p in points
    ]


def path(x: Axis, y: Axis, points: Sequence[tuple[float, float]]) -> str:
    """A line through points."""
    steps = " ".join(f"{_x(x, a)},{_y(y, b)}" for a, b in points)
    return f'<polyline class="line" points="{steps}"/>'


def stacks(x: Axis, y: Axis, columns: Sequence[tuple[float, Sequence[tuple[str, float]]]]) -> list[str]:
    """At each x the parts on top of each other: name and size, the same names in the same order everywhere."""
    width = 0.7 * (_WIDTH - _LEFT - _RIGHT) / max(len(columns), 1)
    found = []
    for at, parts in columns:
        below = 0.0
        for kind, (name, size) in enumerate(parts):
            top, bottom = _y(y, below + size), _y(y, below)
            below += size
            found.append(
                f'<rect class="c{kind % COLOURS}" x="{_x(x, at) - width / 2:.1f}" y="{top}" width="{width:.1f}" '
                f'height="{max(bottom - top, 0):.1f}"><title>{escape(name)}: {size:.3g}</title></rect>'
            )
    return found


def spans(x: Axis, rows: Sequence[str], bars: Sequence[tuple[int, float, float, int, str]]) -> str:
    """A row for each name, and bars in them: row, begin, end, colour, title."""
    height = 30 * len(rows) + _TOP + _BOTTOM
    body = [
        f'<text x="{_LEFT - 6}" y="{_TOP + 30 * i + 19}" text-anchor="end">{escape(n)}</text>'
        for i, n in enumerate(rows)
    ]
    for row, begin, end, kind, title in bars:
        left, width = _x(x, begin), max(_x(x, end) - _x(x, begin), 0.5)
        body.append(
            f'<rect class="c{kind}" x="{left}" y="{_TOP + 30 * row + 3}" width="{width:.1f}" height="24">'
            f"<title>{escape(title)}</title></rect>"
        )
    body += [f'<text x="{_x(x, v)}" y="{height - 26}" text-anchor="middle">{_short(v)}</text>' for v in x.ticks()]
    body.append(f'<text x="{_WIDTH / 2}" y="{height - 6}" text-anchor="middle">{escape(x.name)}</text>')
    inside = "\n".join(body)
    label = escape(f"{x.name} of {', '.join(rows)}")
    return f'<svg viewBox="0 0 {_WIDTH} {height}" role="img" aria-label="{label}">\n{inside}\n</svg>'


def legend(names: Sequence[str], *, ring: str | None = None) -> str:
    """The series by their colours, and what the rings are."""
    items = "".join(f'<li><span class="key k{i % COLOURS}"></span>{escape(name)}</li>' for i, name in enumerate(names))
    if ring is not None:
        items += f'<li><span class="key ring"></span>{escape(ring)}</li>'
    return f'<ul class="legend">{items}</ul>'


def _short(value: float) -> str:
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"
