"""Check the multi-device annotations of any model: against the standard, the model, each other, and the operators."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError

from furiosa_llm.builder.errors import BuildError
from furiosa_llm.builder.factors.analysis import Analysis, analyse
from furiosa_llm.builder.factors.probe import Probes
from furiosa_llm.builder.plan.annotations.check_neighbours import check_neighbours
from furiosa_llm.builder.plan.annotations.check_operators import check_operators
from furiosa_llm.builder.plan.annotations.check_specs import check_configurations, check_specs
from furiosa_llm.builder.plan.annotations.correspondence import Correspondence
from furiosa_llm.builder.plan.annotations.finding import Finding, warning
from furiosa_llm.builder.plan.annotations.nodes import DeclaredShape, annotations_of, declared_shapes, nodes_of
from furiosa_llm.builder.rewrite.normalize import normalize
from furiosa_llm.builder.rewrite.passes import rewrite
from furiosa_llm.builder.source import companions
from furiosa_llm.builder.source.external_data import bind_external_data
from furiosa_llm.builder.source.load import Source


def is_annotated(model: onnx.ModelProto) -> bool:
    """Whether there is anything to check."""
    return bool(model.configuration) or any(True for _ in annotations_of(model))


def check_sharding(model: onnx.ModelProto, path: Path) -> list[Finding]:
    """Everything that is wrong with the annotations of `model`, errors first; empty if nothing is, or there are none.

    `path` is the model's file; shapes may follow from what lies next to it (small external tensors, the configuration).
    Weights are not read. A model whose shapes cannot be inferred is checked as far as it declares them, with a warning.
    """
    if not is_annotated(model):
        return []
    findings = list(check_configurations(model))
    analysis: Analysis | None = None
    shapes = declared_shapes(model)
    try:
        analysis, inferred = _analysed(model, path)
        shapes |= dict(_combined(shapes, inferred))
    except BuildError as error:
        findings.append(
            warning(
                "",
                "",
                f"the shapes of the model cannot be inferred, so that only declared ones are checked: {error}",
                "mend the model, or add value_info to it",
            )
        )
    found, placed = check_specs(model, shapes)
    findings += found
    findings += check_neighbours(model, placed)
    if analysis is not None:
        findings += check_operators(model, placed, analysis, Correspondence(model.graph, analysis.graph))
    return sorted(findings, key=lambda finding: finding.severity != "error")


def _analysed(model: onnx.ModelProto, path: Path) -> tuple[Analysis, dict[str, DeclaredShape]]:
    """The model's factors, and the shapes of all values that could be inferred; BuildError if it cannot be analysed."""
    plain = onnx.ModelProto()
    plain.CopyFrom(model)
    for node, _ in nodes_of(plain):
        del node.device_configurations[:]  # damaged ones would be logged while the graph is read
    try:
        unsplit = ir.from_proto(plain)
    except (DecodeError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise BuildError(f"the graph is damaged: {error}") from error
    bind_external_data(unsplit, path)
    normalized = normalize(Source(path=path, model=unsplit, proto=plain))
    whole = Correspondence(model.graph, normalized.graph)
    rewritten = rewrite(normalized, {}, companions.read_json(path, "config.json"), fuse=False)
    probes = rewritten.probes
    shapes = dict(_inferred(model.graph, whole, rewritten.whole))
    return analyse(normalized.graph, probes.facts, probes.others), shapes


def _inferred(
    graph: onnx.GraphProto, correspondence: Correspondence, probes: Probes
) -> Iterator[tuple[str, DeclaredShape]]:
    """The inferred shapes of the graph's values; what differs between two sets of sizes is dynamic."""
    for node in graph.node:
        for name, _, _, value in correspondence.operands(node):
            if value in probes.facts and value in probes.others:
                pairs = zip(probes.facts[value].shape, probes.others[value].shape, strict=True)
                yield name, tuple(size if size == other else None for size, other in pairs)


def _combined(
    declared: Mapping[str, DeclaredShape], inferred: Mapping[str, DeclaredShape]
) -> Iterator[tuple[str, DeclaredShape]]:
    """The inferred shapes; where nothing is inferred, the symbols and sizes that the model declares."""
    for name, shape in inferred.items():
        known = declared.get(name, ())
        if len(known) == len(shape):
            shape = tuple(own if size is None else size for size, own in zip(shape, known, strict=True))
        yield name, shape
