"""A simulation as one page of HTML that asks nobody for anything: charts, and the figures in tables."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from furiosa_llm.simulate.believed import Published, published
from furiosa_llm.simulate.charts import COLOURS, Axis, Point, chart, dots, legend, path, rings, spans, stacks
from furiosa_llm.simulate.clock import run
from furiosa_llm.simulate.closed_form import Estimate, estimate, most_sequences
from furiosa_llm.simulate.placement import Placement
from furiosa_llm.simulate.question import Answer, Report
from furiosa_llm.simulate.requests import drawn
from furiosa_llm.simulate.steps import CAUSES, Steps

_USERS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
_SHOWN_REQUESTS, _SHOWN_TOKENS = 6, 12
_WORDS = {
    "weights": "reading weights",
    "products": "computing products",
    "cache": "reading the cache",
    "attention": "computing attention",
    "head": "the head",
    "collectives": "collectives",
    "layers": "what every layer takes besides",
    "sequences": "what every sequence takes besides",
    "links": "from host to host",
    "prefill": "prompts of others",
}
_ROOFS = {"products": ("weights", "products"), "attention": ("cache", "attention"), "head": ("head",)}
"""Kinds of ops, with the causes that are their time."""
_STYLE = """
:root { color-scheme: light dark; font: 16px/1.5 system-ui, sans-serif;
  --c0: #1f6fb4; --c1: #c2571a; --c2: #2b8a3e; --c3: #a4262c; --c4: #6741a5; --c5: #7a5230; --c6: #a8327f;
  --c7: #5c5f66; --c8: #7f7a12; --c9: #0f7d80; --ink: #1a1c20; --paper: #fff; --grid: #c9ccd2; }
@media (prefers-color-scheme: dark) { :root {
  --c0: #6cb2f2; --c1: #f29a62; --c2: #6cc780; --c3: #f28085; --c4: #b49af0; --c5: #cfa37d; --c6: #ec8cc8;
  --c7: #b3b7bf; --c8: #d3cd63; --c9: #5fc9cb; --ink: #e9ebee; --paper: #16181c; --grid: #474b53; } }
body { max-width: 60rem; margin: 0 auto; padding: 1rem; color: var(--ink); background: var(--paper); }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.5rem; }
svg { width: 100%; height: auto; } svg text { fill: var(--ink); font-size: 13px; }
.grid { stroke: var(--grid); } .line { fill: none; stroke: var(--ink); stroke-width: 2; }
.ring { fill: var(--paper); stroke: var(--ink); stroke-width: 2; }
.key.ring { border: 2px solid var(--ink); border-radius: 50%; }
.wide { overflow-x: auto; } .legend { display: flex; flex-wrap: wrap; gap: 0 1.2rem; list-style: none; padding: 0; }
.key { display: inline-block; width: .8rem; height: .8rem; margin-right: .4rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .8rem; text-align: right; border-bottom: 1px solid var(--grid); white-space: nowrap; }
th:first-child, td:first-child, .text { text-align: left; }
""" + "".join(f".c{i} {{ fill: var(--c{i}); }} .k{i} {{ background: var(--c{i}); }}\n" for i in range(COLOURS))


def page(found: Report) -> str:
    """The page of a report."""
    setting, place = found.setting, found.placement
    steps = setting.steps(place)
    most = most_sequences(steps, setting.input_len + setting.output_len) * place.data_parallel_size
    users = [n for n in _USERS if n <= most]
    curve = [(n, estimate(steps, setting.load("closed", n))) for n in users or [1]]
    title = f"{escape(found.model)} on {escape(setting.device.title)}"
    parts = [
        f"<h1>{title}</h1>",
        f"<p>{escape(setting.software_name)}; {setting.input_len:g} tokens in, {setting.output_len:g} out; "
        f"{place} on {found.cards} card{'s' * (found.cards > 1)}, unless another placement is named.</p>",
        "<h2>A user's speed against a card's</h2>",
        _speeds(found, curve),
        "<h2>Time per output token, by cause</h2>",
        _causes(curve, _published(found, steps)),
        "<h2>Memory of a PE</h2>",
        _memory(found, steps, most),
        "<h2>Stages over time</h2>",
        _stages(found, steps, place),
        "<h2>Roofline of a PE</h2>",
        _roofline(steps, users or [1], setting.input_len, setting.output_len),
        "<h2>What limits</h2>",
        _limits(curve),
        "<h2>How wrong this is</h2>",
        _beliefs(found),
    ]
    body = "\n".join(parts)
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>{title}</title>\n'
        f"<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], caption: str) -> str:
    numbers = [all(cell[:1].isdecimal() for cell in column) for column in zip(*rows, strict=True)]
    kinds = ["" if is_number else ' class="text"' for is_number in numbers]
    cells = "".join(f'<th scope="col"{k}>{escape(name)}</th>' for k, name in zip(kinds, head, strict=True))
    lines = "".join(
        "<tr>" + "".join(f"<td{k}>{escape(cell)}</td>" for k, cell in zip(kinds, row, strict=True)) + "</tr>"
        for row in rows
    )
    return (
        f'<div class="wide" tabindex="0" role="region" aria-label="{escape(caption)}"><table>'
        f"<thead><tr>{cells}</tr></thead><tbody>{lines}</tbody></table></div>"
    )


def _speeds(found: Report, curve: Sequence[tuple[int, Estimate]]) -> str:
    answers = found.tried_answers
    if answers:
        best = {id(one) for one in found.answers}
        points = [
            Point(x=one.card_tps, y=one.user_tps, title=_named(one), kind=0 if id(one) in best else 7)
            for one in answers
        ]
        names = legend(["no other beats it at both"])
    else:
        points = [
            Point(x=one.output_tps / found.cards, y=1 / one.tpot, title=f"{n} users") for n, one in curve if one.tpot
        ]
        names = ""
    x = Axis(name="tokens a second of a card", low=0, high=1.1 * max(p.x for p in points))
    y = Axis(name="tokens a second of a user", low=0, high=1.1 * max(p.y for p in points))
    return chart("Tokens a second of a user against tokens a second of a card", x, y, dots(x, y, points)) + names


def _named(one: Answer) -> str:
    return f"{one.placement}: {one.load.amount:g} {'req/s' if one.load.kind == 'open' else 'users'}"


def _published(found: Report, steps: Steps) -> list[Published]:
    """The TPOT that was measured of such a model, of requests of such lengths."""
    setting, place = found.setting, found.placement
    if place.units != place.tensor_parallel_size:
        return []
    return published(
        setting.device.name,
        setting.software_at(place),
        tp=place.tensor_parallel_size,
        flops=steps.costs.flops_per_token * place.tensor_parallel_size,
        bits=steps.bits,
        input_len=setting.input_len,
        output_len=setting.output_len,
    )


def _causes(curve: Sequence[tuple[int, Estimate]], measured: Sequence[Published]) -> str:
    names = [*CAUSES, "prefill"]
    columns = [(float(i), [(_WORDS[c], 1e3 * one.causes[c]) for c in names]) for i, (_, one) in enumerate(curve)]
    x = Axis(name="users", low=-0.6, high=len(curve) - 0.4)
    shown = [one for one in measured if one.users <= curve[-1][0]]
    highest = max([1e3 * one.tpot for _, one in curve] + [one.tpot for one in shown])
    y = Axis(name="milliseconds", low=0, high=1.1 * highest)
    points = [Point(x=math.log2(p.users), y=p.tpot, title=f"measured: {p.tpot:g} ms, {p.source}") for p in shown]
    marks = [*stacks(x, y, columns), *rings(x, y, points)]
    ticks = [(float(i), str(n)) for i, (n, _) in enumerate(curve)]
    drawn_ = chart("Time per output token by users, by cause", x, y, marks, x_names=ticks)
    rows = [[str(n), *(f"{1e3 * one.causes[c]:.2f}" for c in names), f"{1e3 * one.tpot:.2f}"] for n, one in curve]
    table = _table(["users", *(_WORDS[c] for c in names), "all"], rows, "Milliseconds by cause")
    return drawn_ + legend([_WORDS[c] for c in names], ring="measured, as published" if shown else None) + table


def _memory(found: Report, steps: Steps, most: float) -> str:
    setting = found.setting
    length = setting.input_len + setting.output_len
    weights = max(steps.weight_nbytes(stage) for stage in range(len(steps.counts)))
    room = steps.room_nbytes()
    each = length * steps.kv_nbytes * max(steps.counts) / steps.costs.layers / steps.placement.data_parallel_size
    knee = (room - weights) / each
    high = 1.2 * max(most, knee)
    x = Axis(name="requests at once, all replicas", low=0, high=high)
    y = Axis(name="bytes", low=0, high=1.25 * room)
    marks = [
        path(x, y, [(0, weights), (knee, room), (high, room)]),
        *dots(x, y, [Point(x=knee, y=room, title="the cache is full")]),
    ]
    text = (
        f"<p>Weights {weights / 1e9:.2f} GB of {room / 1e9:.2f} GB that a PE has for weights and cache; full at "
        f"{knee:,.0f} requests of {length:,.0f} tokens, and the software runs {most:,.0f} at once.</p>"
    )
    return chart("Memory of a PE by requests at once", x, y, marks) + text


def _stages(found: Report, steps: Steps, place: Placement) -> str:
    """The first requests, by the clock."""
    setting = found.setting
    requests = drawn(
        _SHOWN_REQUESTS * place.data_parallel_size * place.pipeline_parallel_size,
        input_len=setting.input_len,
        output_len=min(setting.output_len, _SHOWN_TOKENS),
        lengths=None,
        rate=None,
        seed=0,
    )
    done = [span for span in run(steps, requests, spans=True).spans if span.replica == 0]
    begin, end = min(s.begin for s in done), max(s.end for s in done)
    x = Axis(name="milliseconds", low=0, high=1e3 * (end - begin))
    bars = [
        (
            s.stage,
            1e3 * (s.begin - begin),
            1e3 * (s.end - begin),
            int(s.kind == "decode"),
            f"{s.kind} of {s.tokens} tokens",
        )
        for s in done
    ]
    busy = sum(s.end - s.begin for s in done) / ((end - begin) * len(steps.counts))
    rows = [f"stage {n}" for n in range(len(steps.counts))]
    text = (
        f"<p>{len(requests)} prompts at once, and up to {_SHOWN_TOKENS} tokens of each: stages are busy "
        f"{100 * busy:.0f} % of the time.</p>"
    )
    return spans(x, rows, bars) + legend(["prefill", "decode"]) + text


def _roofline(steps: Steps, users: Sequence[int], input_len: float, output_len: float) -> str:
    """What the ops of the last stage do, by what they are, in steps of few and of many sequences and of a prompt."""
    length, last = input_len + output_len / 2, len(steps.counts) - 1
    work = [(f"decode of {n}", steps.decode(n, length)) for n in dict.fromkeys((users[0], users[-1]))]
    work.append((f"prefill of {input_len:g}", steps.prefill(min(input_len, steps.software.chunk.value), 0)))
    points, rows = [], []
    for step, one in work:
        causes = steps.causes(one, last)
        for name, (flops, nbytes) in steps.demands(one, last).items():
            seconds = sum(causes[cause] for cause in _ROOFS[name])
            if flops and nbytes and seconds:
                title, kind = f"{name}, {step}", list(_ROOFS).index(name)
                points.append(Point(x=flops / nbytes, y=flops / seconds, title=title, kind=kind))
                figures = f"{flops / 1e9:.2f}", f"{nbytes / 1e9:.3f}", f"{flops / nbytes:.1f}", f"{1e3 * seconds:.2f}"
                rows.append([title, *figures])
    peak, bandwidth = steps.peak_flops(), steps.peak_bandwidth()
    ridge = peak / bandwidth
    low, high = min(p.x for p in points) / 3, max(ridge, *(p.x for p in points)) * 3
    x = Axis(name="FLOPs a byte", low=low, high=high, logarithmic=True)
    y = Axis(name="FLOP/s", low=min(min(p.y for p in points) / 3, low * bandwidth), high=2 * peak, logarithmic=True)
    roof = path(x, y, [(low, low * bandwidth), (ridge, peak), (high, peak)])
    table = _table(["ops", "GFLOPs", "GB", "FLOPs a byte", "ms"], rows, "Ops on one PE of the last stage")
    return (
        chart("Roofline of one PE, with the ops", x, y, [roof, *dots(x, y, points)])
        + legend([f"{name}{' of the layers' * (name != 'head')}" for name in _ROOFS])
        + table
    )


def _limits(curve: Sequence[tuple[int, Estimate]]) -> str:
    rows = []
    for n, one in curve:
        cause = max(one.causes, key=lambda name: one.causes[name])
        share = one.causes[cause] / one.tpot if one.tpot else 0.0
        rows.append([str(n), f"{1e3 * one.tpot:.2f}", _WORDS[cause], f"{100 * share:.0f} %"])
    return _table(["users", "TPOT, ms", "most of it", "share"], rows, "What limits, by users")


def _beliefs(found: Report) -> str:
    beliefs = found.setting.beliefs(found.placement)
    rows = [
        [
            name,
            "unknown" if one.error is None else f"{100 * one.error:.0f} %",
            "extrapolated" if one.extrapolated else "measured",
            one.basis,
        ]
        for name, one in beliefs.items()
    ]
    constants = found.setting.device.constants(found.setting.software_at(found.placement))
    sources = [[name, f"{c.value:.4g} {c.unit.removeprefix('1')}", c.mark, c.source] for name, c in constants.items()]
    return _table(["figure", "median error", "kind", "by"], rows, "Errors") + _table(
        ["constant", "value", "mark", "source"], sources, "Constants and their sources"
    )
