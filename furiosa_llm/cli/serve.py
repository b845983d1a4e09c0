"""`furiosa-llm serve`: an OpenAI-compatible server of one artifact."""

from __future__ import annotations

import dataclasses
import functools
import json
import time
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from furiosa_llm.cli.command import ENGINE_GROUPS, command
from furiosa_llm.cli.exit_code import end_at_once
from furiosa_llm.cli.options import CLUSTER, ENGINE, PLACEMENT, PROGRESS, NamedPath, options, working
from furiosa_llm.cli.refused_options import refused_options
from furiosa_llm.cli.terminal import line
from furiosa_llm.runtime.artifact.options import declared
from furiosa_llm.runtime.artifact.progress import shown
from furiosa_llm.runtime.errors import InputError, TokenizerError, UnsupportedError
from furiosa_llm.runtime.placement.workload import Workload
from furiosa_llm.server.settings import METRICS_NAMES, REASONING_PARSERS, TOOL_CALL_PARSERS, ServerSettings

if TYPE_CHECKING:
    from furiosa_llm.runtime.artifact.composite import Composite
    from furiosa_llm.runtime.artifact.reader import Artifact
    from furiosa_llm.runtime.engine.engine_args import EngineArgs
    from furiosa_llm.runtime.engine.launch import Plan
    from furiosa_llm.server.model import Decoder
    from furiosa_llm.server.recent_load import Expectation

_NEEDED = ("fastapi", "h11", "prometheus_client", "pydantic", "uvicorn")
_BACKENDS = ("auto", "guidance", "xgrammar")
_LOG_LEVELS = ("critical", "error", "warning", "info", "debug", "trace")
_UNLIMITED_LENGTH = 2048
SERVER = declared(ServerSettings)
_GROUPS = {
    "Address and keys": ("host", "port", "api_key", "api_key_file", "allowed_origins", "require_signature"),
    "Model and answers": (
        *("served_model_name", "lora_modules", "allow_runtime_lora_updating", "tokenizer", "chat_template"),
        *("response_role", "enable_auto_tool_choice", "tool_call_parser", "reasoning_parser"),
        *("structured_outputs_backend", "seed"),
    ),
    "Limits of requests": (
        *("max_concurrency", "max_body_nbytes", "max_connections", "request_timeout", "shutdown_timeout"),
        *("text_timeout", "text_max_nbytes", "max_stored_responses"),
    ),
    **ENGINE_GROUPS,
    "Prediction": ("device_file",),
    "What is logged": (
        *("uvicorn_log_level", "disable_uvicorn_access_log", "disable_log_stats", "enable_payload_logging"),
        *("metrics_names", "enable_metrics", "progress"),
    ),
}


class Origins(click.ParamType[tuple[str, ...]]):
    """A JSON list of strings."""

    name = "JSON"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, ...]:
        """The strings."""
        if isinstance(value, tuple):
            return value
        try:
            found = json.loads(str(value))
        except ValueError:
            found = None
        if not isinstance(found, list) or not all(isinstance(one, str) for one in found):
            self.fail(
                f"""{value!r} is not a JSON list of origins, for instance '["https://example.com"]'""", param, ctx
            )
        return tuple(found)


def _check_backend(_: click.Context, __: click.Parameter, value: str | None) -> None:
    if value == "xgrammar":
        raise UnsupportedError(
            "--structured-outputs-backend xgrammar is not supported: answers are constrained by llguidance, which has "
            "the same formats; give guidance or auto"
        )


@command(groups=_GROUPS)
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option("--host", default="0.0.0.0", show_default=True, help="Address to listen on.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0 takes a free one.")
@click.option("--served-model-name", multiple=True, help="What requests call it; repeatable.  [default: its own name]")
@click.option(
    "--lora-modules",
    type=NamedPath(),
    multiple=True,
    help="An adapter that requests may name as their model, beside the artifact's own; repeatable.",
)
@click.option(
    "--allow-runtime-lora-updating",
    is_flag=True,
    help="Let clients load and unload adapters, from paths on this machine.",
)
@click.option("--api-key", multiple=True, help="Bearer token that requests have to come with; repeatable.")
@click.option("--api-key-file", type=click.Path(path_type=Path), help="File with such tokens, one a line.")
@click.option("--allowed-origins", type=Origins(), default='["*"]', show_default=True, help="For CORS.")
@click.option(
    "--require-signature", type=click.Path(path_type=Path), metavar="KEY",
    help="Public key by which ARTIFACT must be signed, in PEM; all weights are compared with their digests, too.",
)  # fmt: skip
@click.option("--chat-template", type=click.Path(path_type=Path), help="File to use instead of the model's own.")
@options(SERVER, "response_role")
@click.option("--enable-auto-tool-choice", is_flag=True, help="Look for calls of tools in answers.")
@click.option("--tool-call-parser", type=click.Choice(TOOL_CALL_PARSERS), help="How the model writes them.")
@click.option("--reasoning-parser", type=click.Choice(REASONING_PARSERS), help="How the model marks what it thinks.")
@click.option(
    "--structured-outputs-backend", "--guided-decoding-backend", type=click.Choice(_BACKENDS), default="auto",
    show_default=True, expose_value=False, callback=_check_backend, help="No effect: it is llguidance; no xgrammar.",
)  # fmt: skip
@click.option(
    "--enable-payload-logging",
    is_flag=True,
    help="Log what requests hold: prompts may be private, and are then in the log.",
)
@options(SERVER, "max_stored_responses")
@options(SERVER, "max_concurrency", "max_body_nbytes", "max_connections", "request_timeout", "shutdown_timeout")
@options(SERVER, "text_timeout", "text_max_nbytes")
@click.option("--uvicorn-log-level", type=click.Choice(_LOG_LEVELS), default="info", show_default=True)
@click.option("--disable-uvicorn-access-log", is_flag=True, help="Log no line for each request.")
@options(ENGINE, *PLACEMENT, "tokenizer", "seed", "max_batch_size", "max_model_len", "max_prompt_len")
@options(ENGINE, "prefill_chunk_size", "enable_prefix_caching", "paged_attention_num_blocks", "npu_queue_limit")
@options(
    ENGINE,
    "max_processing_samples",
    "spare_blocks_ratio",
    "workers",
    "threads",
    "batch_invariant",
    "mapped",
    "separate",
)
@options(ENGINE, *CLUSTER, "full_verification", "step_timeout", "max_step_nbytes", "compute", "spin_us")
@click.option("--device", "device_file", type=click.Path(path_type=Path),
              help="Show on the page what `simulate` predicts from this file of --measure-this-machine.")  # fmt: skip
@click.option("--disable-log-stats", is_flag=True, help="Log no figures every ten seconds.")
@click.option(
    "--metrics-names", type=click.Choice(METRICS_NAMES), default="furiosa", show_default=True,
    help="Whose names /metrics has: vllm for dashboards that were made for it.",
)  # fmt: skip
@click.option("--enable-metrics", is_flag=True, help="No effect: /metrics is always there.")
@PROGRESS
@refused_options
def serve(
    artifact: Path,
    host: str,
    port: int,
    device_file: Path | None,
    enable_metrics: bool,  # noqa: ARG001 - the vendor's, without effect
    progress: bool | None,
    **options: Any,
) -> None:
    """Serve ARTIFACT at an OpenAI-compatible HTTP interface, until SIGTERM or Ctrl-C.

    docs/serving.md has the endpoints. Needs the extra `serve`: pip install 'furiosa-llm-onnx[serve]'.
    """
    _check_installed()
    with working(progress):  # the server's packages are an extra, and take a second to import
        from furiosa_llm import signing
        from furiosa_llm.runtime.engine.engine_args import EngineArgs
        from furiosa_llm.server.app import make_app
        from furiosa_llm.server.model import Decoder, load_served, open_served
        from furiosa_llm.server.run import check_address, make_server

        settings = _settings(options)
        log_level = options.pop("uvicorn_log_level")
        access_log = not options.pop("disable_uvicorn_access_log")
        require_signature = options.pop("require_signature")
        if require_signature is not None:
            signing.check_installed()
            options["full_verification"] = True
        lora_modules = [(name, str(path)) for name, path in options.pop("lora_modules")]
        args = EngineArgs(artifact, **options)
        check_address(host, port)
        opened, plan = open_served(args)
        if require_signature is not None:
            signing.check_signature(artifact, require_signature, digest=opened.digest)
        expected = None if device_file is None else _expected(device_file, args, plan)
    if plan is None:
        _show_without_plan(opened)
    else:
        _show_plan(plan)
    with shown(progress):
        model = load_served(args, opened, plan, settings.served_model_names, int(time.time()), lora_modules)
        model = dataclasses.replace(model, expected=expected)
    if isinstance(model.kind, Decoder):
        show_batch_invariance(model.kind)
    address = host if ":" not in host else f"[{host}]"
    if port:
        line(f"{', '.join((*model.names, *model.adapters))} at http://{address}:{port}/v1")
    app = make_app(model, settings)
    server = make_server(
        app, settings, host=host, port=port, log_level=log_level, access_log=access_log, ends_process=True
    )
    server.run()
    end_at_once(0 if server.started else 1)


def _expected(file: Path, args: EngineArgs, plan: Plan | None) -> Expectation:
    """What a measured machine should do under the server's load."""
    from furiosa_llm.server.recent_load import Expectation
    from furiosa_llm.simulate.device import load_device
    from furiosa_llm.simulate.predicted import Prediction

    if plan is None:
        raise InputError("--device predicts how tokens are generated, and an encoder runs without an engine; leave it")
    prediction = Prediction(load_device(str(file)), args)
    return Expectation(str(file), functools.partial(prediction.steady, plan))


def show_batch_invariance(model: Decoder) -> None:
    """Says what this machine's kernels make of a batch, and what can be done about it."""
    probed = model.probe()
    if probed.invariant:
        remedy = ""
    elif model.batch_invariant:
        remedy = "; --batch-invariant keeps it the same"
    else:
        remedy = "; --batch-invariant would keep it the same" if probed.companions is not None else ""
    line(f"Bits on this machine: {probed}{remedy}.")


def _check_installed() -> None:
    missing = [name for name in _NEEDED if find_spec(name) is None]
    if missing:
        raise UnsupportedError(
            f"serve needs {', '.join(missing)}, which is not installed; run: pip install 'furiosa-llm-onnx[serve]'"
        )


def _settings(options: dict[str, Any]) -> ServerSettings:
    """Takes what is not the engine's out of `options`."""
    parser, enabled = options.pop("tool_call_parser"), options.pop("enable_auto_tool_choice")
    if enabled != (parser is not None):
        raise InputError("--enable-auto-tool-choice and --tool-call-parser go together; give both, or none")
    template, key_file = options.pop("chat_template"), options.pop("api_key_file")
    keys = options.pop("api_key")
    if key_file is not None:
        keys = (*keys, *_keys_of(key_file))
    return ServerSettings(
        served_model_names=options.pop("served_model_name") or None,
        api_keys=keys,
        chat_template=None if template is None else _read(template),
        tool_call_parser=parser,
        reasoning_parser=options.pop("reasoning_parser"),
        runtime_lora_updating=options.pop("allow_runtime_lora_updating"),
        payload_logging=options.pop("enable_payload_logging"),
        log_stats=not options.pop("disable_log_stats"),
        metrics_names=options.pop("metrics_names"),
        **{name: options.pop(name) for name in ("allowed_origins", *SERVER) if name in options},
    )


def _keys_of(path: Path) -> list[str]:
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise InputError(f"--api-key-file: {path} cannot be read: {error}") from error
    keys = [key for line in lines if (key := line.strip())]
    if not keys:
        raise InputError(f"--api-key-file: {path} has no keys, expected one a line; leave it out to serve everybody")
    return keys


def _read(template: Path) -> str:
    try:
        return template.read_text("utf-8")
    except (OSError, ValueError) as error:
        raise TokenizerError(f"Error in reading chat template file: {error}") from error


def _show_without_plan(opened: Artifact | Composite) -> None:
    from furiosa_llm.runtime.artifact.composite import Composite

    if isinstance(opened, Composite):
        line(f"{opened.manifest.name}: an encoder-decoder, tp {opened.encoder.manifest.mesh.size}, one replica")
    else:
        line(f"{opened.manifest.model.name}: an encoder, tp {opened.manifest.mesh.size}, one replica")


def _show_plan(plan: Plan) -> None:
    workload = Workload(
        max_batch_size=plan.scheduling.num_groups * plan.scheduling.slots_per_group,
        max_model_len=plan.limits.max_length or _UNLIMITED_LENGTH,
        prefill_chunk_size=plan.scheduling.prefill_chunk_size,
    )
    from furiosa_llm.cli.topology import show_topology

    show_topology(plan.artifact, plan.topology, plan.stages, workload)
    if plan.tokenizer is None:
        line("The model has no tokenizer: requests have to give token ids, unless --tokenizer gives one.")
    elif plan.tokenizer.chat_template is None:
        line("The model has no chat template: /v1/chat/completions is refused, unless --chat-template gives one.")
