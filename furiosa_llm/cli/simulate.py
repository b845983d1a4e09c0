"""`furiosa-llm simulate`: what a model will do on cards that are not here, with the error of every figure."""

from __future__ import annotations

import gc
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from furiosa_llm.cli.bench import Objective
from furiosa_llm.cli.command import command
from furiosa_llm.cli.options import PROGRESS
from furiosa_llm.runtime.artifact.errors import OutputFileError
from furiosa_llm.runtime.artifact.progress import shown, tell
from furiosa_llm.runtime.artifact.steering import ESCAPES
from furiosa_llm.simulate.errors import DeviceFileError, LoadError

if TYPE_CHECKING:
    from furiosa_llm.simulate.closed_form import Load
    from furiosa_llm.simulate.placement import Placement
    from furiosa_llm.simulate.question import Clocked, Report, Setting


class _Users(click.ParamType[tuple[float, ...]]):
    """`1,8,64`."""

    name = "N[,N...]"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> tuple[float, ...]:
        """The numbers."""
        if isinstance(value, tuple):
            return value
        try:
            found = tuple(float(part) for part in str(value).split(","))
        except ValueError:
            found = ()
        if not found or not all(0 < one < float("inf") for one in found):
            self.fail(f"{value!r} is not a list of numbers above 0, for instance 1,8,64", param, ctx)
        return found


class _Finite(click.FloatRange):
    """Numbers of a range, none of which is infinite or none at all."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """The number."""
        found = float(super().convert(value, param, ctx))
        if not math.isfinite(found):
            self.fail(f"{value!r} is not a number that is finite", param, ctx)
        return found


class _Measured(click.ParamType[tuple[str, float, float]]):
    """`tpot=13.9@c=1`."""

    name = "NAME=MS@c=N"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, float, float]:
        """The latency, its milliseconds and the users."""
        figure, at, users = str(value).partition("@c=")
        name, _, milliseconds = figure.partition("=")
        try:
            found = float(milliseconds), float(users)
        except ValueError:
            found = 0.0, 0.0
        if name not in ("tpot", "ttft") or not at or not all(0 < one < float("inf") for one in found):
            self.fail(f"{value!r} is not tpot=MS@c=N or ttft=MS@c=N, for instance tpot=13.9@c=1", param, ctx)
        return name, *found


_USERS = (1.0, 8.0, 64.0)
_COUNT = click.IntRange(min=1)
_MOST_CARDS, _MOST_TOKENS, _MOST_PRICE = 4096, 2**24, 1e9
_GROUPS = {
    "Placement": ("cards", "hosts", "tp", "pp", "dp", "search"),
    "Load": (
        "concurrency",
        "request_rate",
        "input_len",
        "output_len",
        "trace",
        "requests",
        "lengths",
        "shared_prefix",
        "seed",
    ),
    "What-if": ("weights", "kv", "calibrate"),
    "Output": ("goodput", "price_per_hour", "json_file", "html_file", "timeline", "progress"),
}
_WIDTHS = click.Choice(["fp16", "bf16", "fp8", "int8", "int4"])


@command(groups=_GROUPS)
@click.argument("model", type=click.Path(path_type=Path), required=False)
@click.option("--device", "device_name", metavar="NAME|FILE",
              help="A device that comes with this program, or a file that describes one.")  # fmt: skip
@click.option("--measure-this-machine", "measure", is_flag=True,
              help="Take no MODEL, but measure this machine for a minute, and write it as a device file.")  # fmt: skip
@click.option("--output", type=click.Path(path_type=Path), help="The file of --measure-this-machine.  [default: print]")
@click.option("--software", help="What serves, of those in the device file.  [default: the first]")
@click.option("--cards", type=click.IntRange(1, _MOST_CARDS), default=1, show_default=True, help="How many there are.")
@click.option(
    "--hosts", type=_COUNT, help="Hosts that the cards are spread over evenly.  [default: as the device file says]"
)
@click.option("-tp", "tp", type=_COUNT, help="PEs that share each matrix.  [default: a card, or as many as it takes]")
@click.option("-pp", "pp", type=_COUNT, help="Pipeline stages.  [default: as few as fit]")
@click.option("-dp", "dp", type=_COUNT, help="Replicas.  [default: as many as there are PEs for]")
@click.option("--search", is_flag=True, help="Try every placement on the cards, and show which are best at what.")
@click.option("--concurrency", type=_Users(), help="Users with one request after the other.  [default: 1,8,64]")
@click.option("--request-rate", type=_Users(), help="Requests a second.")
@click.option(
    "--input-len", type=_Finite(min=1, max=_MOST_TOKENS), default=1024, show_default=True, help="Tokens of a prompt."
)
@click.option("--output-len", type=_Finite(min=1, max=_MOST_TOKENS), default=256, show_default=True,
              help="Tokens of a completion.")  # fmt: skip
@click.option("--trace", type=click.Path(path_type=Path),
              help="Serve the requests of this file one by one: JSON Lines, docs/simulation.md.")  # fmt: skip
@click.option("--requests", type=_COUNT,
              help="Serve so many requests of each load one by one, and show how they are spread.")  # fmt: skip
@click.option("--lengths", type=click.Choice(["sharegpt"]),
              help="Draw the lengths of --requests instead.")  # fmt: skip
@click.option("--shared-prefix", type=click.IntRange(min=0), default=0, show_default=True,
              help="Tokens with which all prompts of --trace or --requests begin.")  # fmt: skip
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of arrivals and lengths.")
@click.option("--weights", type=_WIDTHS, help="Type of the layers' weights.  [default: the model's own]")
@click.option("--kv", type=_WIDTHS, help="Type of the KV cache.  [default: the model's own]")
@click.option("--goodput", type=Objective(), multiple=True,
              help="Say what keeps it, on the mean: ttft:MS, tpot:MS or e2el:MS; repeatable.")  # fmt: skip
@click.option(
    "--price-per-hour", type=_Finite(min=0, min_open=True, max=_MOST_PRICE), help="Of a card: adds what tokens cost."
)
@click.option("--calibrate", type=_Measured(),
              help="A figure that you measured on these cards: tpot=13.9@c=1.")  # fmt: skip
@click.option("--json", "json_file", type=click.Path(path_type=Path, allow_dash=True),
              help="Write all figures to this file (-: print them). Other commands print theirs.")  # fmt: skip
@click.option("--html", "html_file", type=click.Path(path_type=Path),
              help="Write a page with charts: speeds, causes, memory, stages, roofline.")  # fmt: skip
@click.option("--timeline", type=click.Path(path_type=Path),
              help="Write every batch of the last load of --trace or --requests, for Perfetto.")  # fmt: skip
@PROGRESS
def simulate(model: Path | None, progress: bool | None, **options: Any) -> None:
    """Say what MODEL (an .onnx file, its folder, or an artifact) will do on cards, with the error of every figure.

    The weights are not read, and their files need not be there. Exits with 1 if --goodput is given and nothing keeps
    it.
    """
    if options["measure"]:
        _measure(model, progress, options)
        return
    if model is None or options["device_name"] is None or options["output"] is not None:
        raise click.UsageError(
            "give a MODEL and a --device; --output is of --measure-this-machine, which takes neither"
        )
    with shown(progress), _little_garbage():
        found = _asked(model, options)
    if options["json_file"] is not None:
        _write_json(options["json_file"], found.to_json(), "--json", indent=2)
    if options["html_file"] is not None:
        from furiosa_llm.simulate.page import page

        _write(options["html_file"], page(found), "--html")
    if options["timeline"] is not None:
        from furiosa_llm.simulate.timeline import chrome_trace

        _write_json(options["timeline"], chrome_trace(found.clocked[-1].run), "--timeline")
    if str(options["json_file"]) != "-":
        from furiosa_llm.simulate.tables import show_report

        show_report(found, price=options["price_per_hour"])
    if not found.keeps:
        click.get_current_context().exit(1)


@contextmanager
def _little_garbage() -> Iterator[None]:
    """Without looking for cycles in a graph of thousands of nodes again and again while it is lowered for each size."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _measure(model: Path | None, progress: bool | None, options: dict[str, Any]) -> None:
    """Write this machine as a device file."""
    if model is not None or options["device_name"] is not None:
        raise click.UsageError("--measure-this-machine takes no MODEL and no --device: it writes a device")
    with shown(progress):
        from furiosa_llm.simulate.this_machine import device_text, measure_this_machine

        text = device_text(measure_this_machine())
    if options["output"] is None:
        click.echo(text, nl=False)
    else:
        _write(options["output"], text, "--output")


def _asked(model: Path, options: dict[str, Any]) -> Report:
    from furiosa_llm.simulate.question import Report, answer, calibrated, fewest_cards, front, placed, search

    _check(options)
    setting, cards, limits = _setting(model, options), options["cards"], dict(options["goodput"])
    place = placed(setting, cards, options["tp"], options["pp"], options["dp"])
    if options["calibrate"] is not None:
        setting = calibrated(setting, place, *options["calibrate"])
    users, rates = options["concurrency"], options["request_rate"] or ()
    closed = users or (() if rates else _USERS)
    loads = [setting.load("closed", n) for n in closed] + [setting.load("open", rate) for rate in rates]
    one_by_one = _one_by_one(setting, place, options, loads)
    tell("trying placements")
    tried = list(search(setting, cards, loads if users or rates else None)) if options["search"] else []
    return Report(
        model=str(model),
        setting=setting,
        placement=place,
        tried_answers=tried,
        answers=front(tried) if tried else [] if one_by_one else [answer(setting, place, cards, n) for n in loads],
        limits=limits,
        last=loads[-1],
        cards=cards,
        searched=options["search"],
        fewest=fewest_cards(setting, loads[-1], limits, cards) if limits and options["search"] else None,
        clocked=one_by_one,
        calibrated=options["calibrate"] is not None,
    )


def _check(options: dict[str, Any]) -> None:
    """Refuse options that would have no effect."""
    if options["trace"] is not None:
        for name in ("requests", "lengths", "concurrency", "request_rate"):
            if options[name] is not None:
                raise LoadError(f"--trace has its own requests and arrivals; leave out --{name.replace('_', '-')}")
    elif options["requests"] is None:
        for name in ("lengths", "timeline"):
            if options[name] is not None:
                raise LoadError(f"--{name} is of requests that are served one by one; add --requests or --trace")
        if options["shared_prefix"]:
            raise LoadError("--shared-prefix is of requests that are served one by one; add --requests or --trace")


def _one_by_one(setting: Setting, place: Placement, options: dict[str, Any], loads: list[Load]) -> list[Clocked]:
    from furiosa_llm.simulate.question import clocked
    from furiosa_llm.simulate.requests import drawn, read_trace

    limits, spans = dict(options["goodput"]), options["timeline"] is not None
    shared = options["shared_prefix"]
    if options["trace"] is not None:
        requests = read_trace(options["trace"])
        name = options["trace"].name
        return [clocked(setting, place, name, requests, limits, shared_prefix=shared, spans=spans)]
    found = []
    for load in loads if options["requests"] is not None else []:
        if load.kind == "closed" and not load.amount.is_integer():
            raise LoadError(f"--requests is served to whole users, and --concurrency has {load.amount:g}; round it")
        users = int(load.amount) if load.kind == "closed" else None
        requests = drawn(
            options["requests"],
            input_len=setting.input_len,
            output_len=setting.output_len,
            lengths=options["lengths"],
            rate=load.amount if users is None else None,
            seed=options["seed"],
        )
        name = f"{users} users" if users else f"{load.amount:g} req/s"
        found.append(
            clocked(setting, place, name, requests, limits, concurrency=users, shared_prefix=shared, spans=spans)
        )
    return found


def _write_json(file: Path, document: dict[str, Any], option: str, *, indent: int | None = None) -> None:
    text = json.dumps(document, indent=indent, ensure_ascii=False) + "\n"
    if str(file) == "-":
        click.echo(text, nl=False)
    else:
        _write(file, text, option)


def _write(file: Path, text: str, option: str) -> None:
    try:
        file.write_text(text.translate(ESCAPES), encoding="utf-8")
    except OSError as error:
        raise OutputFileError(f"{file} cannot be written: {error}; choose another place for {option}") from error


def _setting(model: Path, options: dict[str, Any]) -> Setting:
    from furiosa_llm.simulate.device import load_device
    from furiosa_llm.simulate.hosts import on_hosts
    from furiosa_llm.simulate.model import costs_of_model
    from furiosa_llm.simulate.question import Setting

    device = load_device(options["device_name"])
    software = next(iter(device.software)) if options["software"] is None else options["software"]
    if software not in device.software:
        raise DeviceFileError(
            f"{device.name} has no software {software!r:.60}; use one of {', '.join(device.software)}"
        )
    if options["hosts"] is not None:
        device = on_hosts(device, options["cards"], options["hosts"])
    return Setting(
        costs=costs_of_model(model),
        device=device,
        software_name=software,
        software=device.software,
        weights=options["weights"],
        kv=options["kv"],
        input_len=options["input_len"],
        output_len=options["output_len"],
    )
