"""`furiosa-llm bench`: throughput, latency and goodput of an artifact on this machine."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from furiosa_llm.bench.objectives import OBJECTIVES
from furiosa_llm.cli.command import ENGINE_GROUPS, command
from furiosa_llm.cli.options import CLUSTER, ENGINE, PROGRESS, Numbers, option, options, working
from furiosa_llm.cli.output import JSON, echo_json
from furiosa_llm.cli.terminal import Console, line
from furiosa_llm.runtime.artifact.errors import OutputFileError
from furiosa_llm.runtime.errors import InputError, ReplicaError

if TYPE_CHECKING:
    from furiosa_llm.bench.sweep import Run, Workload
    from furiosa_llm.bench.workload import Job
    from furiosa_llm.runtime.engine.engine_args import EngineArgs
    from furiosa_llm.runtime.engine.launch import Plan
    from furiosa_llm.simulate.predicted import Prediction

_DEFAULT_REQUESTS = 64
_DEFAULT_INPUT_LEN = 128
_DEFAULT_OUTPUT_LEN = 32


class Objective(click.ParamType[tuple[str, float]]):
    """`ttft:200`: a latency and its limit in milliseconds."""

    name = "NAME:MS"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, float]:
        """The name and the limit."""
        name, _, limit = str(value).partition(":")
        try:
            found = float(limit)
        except ValueError:
            found = math.nan
        if name not in OBJECTIVES or not (0 < found < math.inf):
            self.fail(f"{value!r} is not a limit in ms of one of {', '.join(OBJECTIVES)}, such as ttft:200", param, ctx)
        return name, found


@command(groups=ENGINE_GROUPS)
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option(
    "--input-len", type=click.IntRange(min=1), help=f"Tokens of each prompt.  [default: {_DEFAULT_INPUT_LEN}]"
)
@click.option(
    "--output-len", type=click.IntRange(min=1), help=f"Tokens of each completion.  [default: {_DEFAULT_OUTPUT_LEN}]"
)
@click.option("--range-ratio", type=click.FloatRange(0, 1, max_open=True), default=0.0, show_default=True,
              help="Draw lengths from (1 - RATIO) times these to these.")  # fmt: skip
@click.option(
    "--dataset",
    type=click.Path(path_type=Path),
    help="Prompts: JSON Lines; see docs/bench.md.  [default: random tokens]",
)
@click.option(
    "--num-requests", type=click.IntRange(min=1), help=f"[default: {_DEFAULT_REQUESTS}, or the dataset's rows]"
)
@click.option(
    "--concurrency", type=Numbers(int), metavar="N,...", help="Requests under way at most.  [default: no limit]"
)
@click.option("--request-rate", type=Numbers(float), metavar="R,...",
              help="Requests a second, as they arrive by chance; inf: all at once.  [default: inf]")  # fmt: skip
@click.option("--burstiness", type=click.FloatRange(min=0, min_open=True), default=1.0, show_default=True,
              help="Of the arrivals: 1 is a Poisson process, less has more bursts.")  # fmt: skip
@click.option("--num-warmups", type=click.IntRange(min=0), default=2, show_default=True,
              help="Requests that are run before, unmeasured.")  # fmt: skip
@click.option("--goodput", type=Objective(), multiple=True,
              help="Count requests that keep it: ttft:MS, tpot:MS or e2el:MS; repeatable.")  # fmt: skip
@click.option(
    "--temperature", type=float, default=0.0, show_default=True, help="0 takes the likeliest token each time."
)
@click.option("--ignore-eos/--no-ignore-eos", default=None,
              help="Go on after the end of the text.  [default: unless there is a dataset]")  # fmt: skip
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of prompts and arrivals.")
@options(ENGINE, "devices", "tensor_parallel_size")
@option("pipeline_parallel_size", ENGINE, type=Numbers(int), metavar="N,...",
        help="Pipeline stages; several are measured in turn.  [default: 1]")  # fmt: skip
@option("data_parallel_size", ENGINE, type=Numbers(int), metavar="N,...",
        help="Replicas; several are measured in turn.  [default: as many as the devices have PEs for]")  # fmt: skip
@options(ENGINE, "allow_subset", "max_batch_size", "max_model_len", "prefill_chunk_size")
@option("enable_prefix_caching", ENGINE, default=False, show_default="off",
        help="Off, lest a prompt that comes again be measured as if it were new.")  # fmt: skip
@options(ENGINE, *CLUSTER, "spin_us")
@options(
    ENGINE, "tokenizer", "workers", "threads", "full_verification", "batch_invariant", "mapped", "separate", "compute"
)
@click.option("--device", "device_file", type=click.Path(path_type=Path),
              help="Show beside it what `simulate` predicts from this file of --measure-this-machine.")  # fmt: skip
@JSON
@click.option("--plot", "plots", type=click.Path(path_type=Path), multiple=True,
              help="Write plots: .png, .svg, .pdf, or .html with tables; repeatable.")  # fmt: skip
@PROGRESS
def bench(
    artifact: Path,
    pipeline_parallel_size: Sequence[int] | None,
    data_parallel_size: Sequence[int] | None,
    request_rate: Sequence[float] | None,
    concurrency: Sequence[int] | None,
    as_json: bool,
    device_file: Path | None,
    plots: Sequence[Path],
    progress: bool | None,
    **options: Any,
) -> None:
    """Measure how ARTIFACT generates: all requests at once, so many at a time, or as they arrive.

    Lists such as -pp 1,2 --request-rate 1,2,4 are measured in every combination. docs/bench.md says what is measured.
    """
    sizes = [(pp, dp) for pp in pipeline_parallel_size or (None,) for dp in data_parallel_size or (None,)]
    runs: list[Run] = []
    with working(progress):
        from furiosa_llm.bench.report import report_json, show
        from furiosa_llm.bench.sweep import loads_of, machine, plans_of, sweep
        from furiosa_llm.runtime.engine.engine_args import EngineArgs

        _check_files(plots)
        names = {field.name for field in dataclasses.fields(EngineArgs)} - {"seed"}
        args = EngineArgs(artifact, **{name: value for name, value in options.items() if name in names})
        plans = plans_of(args, sizes)
        workload = _workload(plans, options)
        prediction = None if device_file is None else _prediction(device_file, args)
        for run in sweep(plans, loads_of(request_rate or (), concurrency or ()), workload):
            if prediction is not None:
                plan = next(plan for _, plan in plans if plan.topology == run.topology)
                run = dataclasses.replace(run, predicted=prediction.figures(plan, run.load, workload))
            runs.append(run)
            line(f"{run.label}: {run.figures.output_throughput:.1f} output tokens/s", err=True)
    if not as_json:
        show(runs, Console())
    report = report_json(
        runs, artifact=plans[0][1].artifact.manifest.model.name, workload=_asked(workload, options), machine=machine()
    )
    if as_json:
        echo_json(report)
    _write(runs, report, plots)
    if failed := sum(run.figures.failed for run in runs):
        raise ReplicaError(f"{failed} requests failed, and are in no figure but 'failed'; the log says why")


def _prediction(file: Path, args: EngineArgs) -> Prediction:
    from furiosa_llm.simulate.device import load_device
    from furiosa_llm.simulate.predicted import Prediction

    return Prediction(load_device(str(file)), args)


def _check_files(plots: Sequence[Path]) -> None:
    """What cannot be written is said before anything is measured."""
    if plots:
        from furiosa_llm.bench.plots import check_plot

        for path in plots:
            check_plot(path)
    for path in plots:
        folder = path.absolute().parent
        if not folder.is_dir():
            raise InputError(f"{path} cannot be written: the folder {folder} does not exist; make it")
        is_there = path.exists()
        try:
            path.open("a").close()
        except OSError as error:
            raise InputError(f"{path} cannot be written: {error.strerror}; give another file") from error
        if not is_there:
            path.unlink()


def _write(runs: Sequence[Run], report: dict[str, Any], plots: Sequence[Path]) -> None:
    """Writes what was asked for; raises OutputFileError."""
    try:
        if plots:
            from furiosa_llm.bench.plots import plot

            for path in plots:
                plot(runs, path, report)
    except OSError as error:
        raise OutputFileError(f"the figures cannot be written: {error}; those on the terminal are whole") from error


def _workload(plans: Sequence[tuple[EngineArgs, Plan]], options: dict[str, Any]) -> Workload:
    from furiosa_llm.bench.sweep import Workload
    from furiosa_llm.runtime.tokens.sampling_params import SamplingParams

    ignore_eos = options["dataset"] is None if options["ignore_eos"] is None else options["ignore_eos"]
    return Workload(
        jobs=_jobs(plans, options),
        params=SamplingParams(temperature=options["temperature"], ignore_eos=ignore_eos, seed=options["seed"]),
        burstiness=options["burstiness"],
        seed=options["seed"],
        warmups=options["num_warmups"],
        objectives=dict(options["goodput"]),
    )


def _jobs(plans: Sequence[tuple[EngineArgs, Plan]], options: dict[str, Any]) -> list[Job]:
    from furiosa_llm.bench.workload import Job, check_lengths, random_jobs, repeated
    from furiosa_llm.dataset import read_dataset

    plan = plans[0][1]
    output_len = options["output_len"] or _DEFAULT_OUTPUT_LEN
    vocab_size = plan.limits.vocab_size
    if options["dataset"] is not None:
        if options["input_len"] is not None or options["range_ratio"]:
            raise InputError("--dataset has prompts of its own; leave out --input-len and --range-ratio")
        rows = read_dataset(options["dataset"])
        jobs = [
            Job(
                prompt_token_ids=tuple(row.token_ids(plan.tokenizer, vocab_size)),
                max_tokens=row.max_tokens or output_len,
            )
            for row in rows
        ]
        jobs = repeated(jobs, options["num_requests"] or len(jobs))
    else:
        if vocab_size is None:
            raise InputError("the model does not say how many tokens it knows; give a --dataset")
        jobs = random_jobs(
            options["num_requests"] or _DEFAULT_REQUESTS,
            input_len=options["input_len"] or _DEFAULT_INPUT_LEN,
            output_len=output_len,
            range_ratio=options["range_ratio"],
            vocab_size=vocab_size,
            excluded=plan.limits.eos_token_ids,
            seed=options["seed"],
        )
    for _, one in plans:
        lengths = [length for length in (one.limits.max_length, one.limits.capacity) if length is not None]
        check_lengths(jobs, min(lengths))
    return jobs


def _asked(workload: Workload, options: dict[str, Any]) -> dict[str, Any]:
    """What was asked, for whoever reads the figures."""
    return {
        "dataset": None if options["dataset"] is None else str(options["dataset"]),
        "num_requests": len(workload.jobs),
        "input_tokens": sum(len(job.prompt_token_ids) for job in workload.jobs),
        "max_output_tokens": sum(job.max_tokens for job in workload.jobs),
        "temperature": workload.params.temperature,
        "ignore_eos": workload.params.ignore_eos,
        "burstiness": workload.burstiness,
        "seed": workload.seed,
        "num_warmups": workload.warmups,
        "goodput": dict(workload.objectives),
        "prefix_caching": options["enable_prefix_caching"],
    }
