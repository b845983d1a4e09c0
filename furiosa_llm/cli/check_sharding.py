"""`furiosa-llm check-sharding`: the multi-device annotations of any model, checked."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.table import Table
from rich.text import Text

from furiosa_llm.cli.command import command
from furiosa_llm.cli.options import working
from furiosa_llm.cli.output import JSON, echo_json
from furiosa_llm.cli.terminal import Console, line
from furiosa_llm.runtime.artifact.progress import tell

if TYPE_CHECKING:
    import onnx

    from furiosa_llm.builder.plan.annotations import Finding

_MOST_ROWS = 50


@command()
@click.argument("model", type=click.Path(path_type=Path))
@JSON
def check_sharding(model: Path, as_json: bool) -> None:
    """Check the multi-device annotations (ONNX IR version 11) of MODEL, whoever wrote them.

    Devices, axes, shapes, neighbouring nodes, pipeline stages, and what each operator allows. Weights are not read.
    Exit code 0 if there are no errors, 1 otherwise; warnings alone do not count.
    """
    with working():
        from furiosa_llm.builder.plan import annotations
        from furiosa_llm.builder.source.folder import find_model

        tell("load")
        model = find_model(model)
        proto = _read(model)
        tell("checking the annotations")
        findings = annotations.check_sharding(proto, model)
    annotated = annotations.is_annotated(proto)
    errors = sum(finding.severity == "error" for finding in findings)
    if as_json:
        echo_json({"annotated": annotated, **_to_json(proto, findings)})
    else:
        _print(proto, findings, errors, annotated=annotated)
    sys.exit(1 if errors else 0)


def _read(path: Path) -> onnx.ModelProto:
    import onnx
    from google.protobuf.message import DecodeError

    from furiosa_llm.builder.source.load import load

    try:
        proto = onnx.load(path, load_external_data=False)
    except (OSError, DecodeError):
        load(path)  # says what is wrong
        raise
    if not proto.graph.node:
        load(path)
    return proto


def _to_json(proto: onnx.ModelProto, findings: Sequence[Finding]) -> dict[str, object]:
    return {
        "configurations": [{"name": c.name, "num_devices": c.num_devices} for c in proto.configuration],
        "annotated_nodes": _count_annotated(proto),
        "errors": sum(finding.severity == "error" for finding in findings),
        "warnings": sum(finding.severity == "warning" for finding in findings),
        "findings": [dataclasses.asdict(finding) for finding in findings],
    }


def _count_annotated(proto: onnx.ModelProto) -> int:
    return sum(bool(node.device_configurations) for node in proto.graph.node)


def _print(proto: onnx.ModelProto, findings: Sequence[Finding], errors: int, *, annotated: bool) -> None:
    console = Console()
    if not annotated:
        line(
            "The model has no multi-device annotations: there is nothing to check. "
            "`furiosa-llm plan MODEL --emit-onnx OUT` writes a model with them."
        )
        return
    if findings:
        table = Table(title="multi-device annotations", title_justify="left")
        table.add_column("")
        for column in ("where", "what", "remedy"):
            table.add_column(column, overflow="fold")
        for finding in findings[:_MOST_ROWS]:
            where = "\n".join(part for part in (finding.node, finding.tensor) if part) or "the model"
            # As Text: what is in brackets, a shape for instance, is no markup.
            table.add_row(*map(Text, (finding.severity, where, finding.what, finding.remedy)))
        console.print(table)
    if len(findings) > _MOST_ROWS:
        line(f"... and {len(findings) - _MOST_ROWS} more; --json lists them all.")
    names = ", ".join(f'"{c.name}" ({c.num_devices} devices)' for c in proto.configuration) or "none"
    line(f"configurations: {names}; {_count_annotated(proto)} of {len(proto.graph.node)} nodes annotated")
    line(f"errors: {errors}, warnings: {len(findings) - errors}")
