"""Build the files of an encoder-decoder in a folder into one composite artifact, each file a part of it."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from furiosa_llm.builder.errors import ModelLoadError, OptionError, UnsupportedModelError
from furiosa_llm.builder.options import BuildOptions
from furiosa_llm.builder.source.generation_tokens import end_tokens, start_token
from furiosa_llm.builder.write.build_report import BuildReport
from furiosa_llm.builder.write.output_folder import output_folder
from furiosa_llm.runtime.artifact.composite import open_composite
from furiosa_llm.runtime.artifact.composite_manifest import (
    PART_NAMES,
    CompositeManifest,
    HiddenLink,
    PartEntry,
    PartName,
    StateLink,
)
from furiosa_llm.runtime.artifact.files import sync
from furiosa_llm.runtime.artifact.manifest import MANIFEST_NAME, Manifest, OutputInfo
from furiosa_llm.runtime.artifact.reader import Artifact, open_artifact

_SPELLINGS = (
    ("encoder_model.onnx", "decoder_model.onnx", "decoder_with_past_model.onnx"),
    ("encoder.onnx", "decoder.onnx", "decoder_with_past.onnx"),
)
"""The file names that exporters give to an encoder, to its decoder without a past, and to its decoder with a past."""

_STATE_PREFIX = re.compile(r"(past_key_values|past|present_key_values|present)[._]?")
_FLOATS = ("FLOAT", "FLOAT16", "BFLOAT16", "DOUBLE")

PartBuild = Callable[[Path, Path, str], BuildReport]
"""Builds a part from a model (or from whatever it is made of), into a folder, under a name."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class EncoderDecoder:
    """The files of an encoder-decoder."""

    folder: Path
    sources: Mapping[PartName, Path]
    """Part of the artifact -> the file that becomes it."""


def find_encoder_decoder(folder: Path) -> EncoderDecoder | None:
    """The encoder-decoder in `folder`; None if `folder` is not a folder with an encoder in it.

    Raises ModelLoadError for an encoder without the decoder that makes the first token.
    """
    for encoder, decoder, with_past in _SPELLINGS:
        if not (folder / encoder).is_file():
            continue
        if not (folder / decoder).is_file():
            raise ModelLoadError(
                f"{folder} has {encoder} but no {decoder}, the decoder that makes the first token; export it too (a "
                "merged decoder is one If node, which cannot be split), or give the path of one .onnx file."
            )
        sources: dict[PartName, Path] = {"encoder": folder / encoder, "decoder": folder / decoder}
        if (folder / with_past).is_file():
            sources["decoder_first"], sources["decoder"] = folder / decoder, folder / with_past
        return EncoderDecoder(folder=folder, sources={name: sources[name] for name in PART_NAMES if name in sources})
    return None


def check_options(options: BuildOptions, *, with_adapters: bool) -> None:
    """Raise OptionError for options that name values of one graph, because a folder has several graphs."""
    lora = with_adapters or options.lora_modules
    for given, name in ((options.dims, "--dim"), (options.tactics, "--tactics"), (lora, "--lora")):
        if given:
            raise OptionError(
                f"{name} is about one graph and does not go with a folder of several; build the .onnx files one by one."
            )


def build_composite(
    model: EncoderDecoder, destination: Path, *, name: str, build_part: PartBuild, force: bool
) -> BuildReport:
    """Write the composite artifact of `model` to `destination`, or nothing; the report contains its parts' reports."""
    decoder = model.sources["decoder"]
    start, ends = start_token(decoder), end_tokens(decoder)
    report = build_parts(
        model.sources, destination, name=name, start=start[0], ends=ends[0], build_part=build_part, force=force
    )
    guessed = tuple(
        f"no configuration beside the model: {what} {tokens} was taken from tokenizer.json"
        for what, (tokens, file) in (("the first token", start), ("the end of a completion", ends))
        if file == "tokenizer.json"
    )
    return dataclasses.replace(report, notes=(*guessed, *report.notes))


def build_parts(
    sources: Mapping[PartName, Path],
    destination: Path,
    *,
    name: str,
    start: int,
    ends: tuple[int, ...],
    build_part: PartBuild,
    force: bool,
) -> BuildReport:
    """Build each of `sources` into a part of one composite artifact at `destination`, or write nothing."""
    started = time.monotonic()
    reports: dict[PartName, BuildReport] = {}
    with output_folder(destination, force=force) as folder:
        for part, source in sources.items():
            reports[part] = build_part(source, folder / part, f"{name} {part}")
        write_composite(folder, name=name, start=start, ends=ends)
    return summary(reports, artifact=str(destination), seconds=time.monotonic() - started)


def write_composite(folder: Path, *, name: str, start: int, ends: tuple[int, ...]) -> None:
    """Write the manifest that makes the parts in `folder` one, and open it, which checks that they fit."""
    found = [part for part in PART_NAMES if (folder / part).is_dir()]
    artifacts = {part: open_artifact(folder / part, full=False) for part in found}
    (folder / MANIFEST_NAME).write_bytes(composite_of(artifacts, name=name, start=start, ends=ends).to_bytes())
    for path in (folder / MANIFEST_NAME, folder):
        sync(path)
    open_composite(folder, full=False)


def composite_of(
    artifacts: Mapping[PartName, Artifact], *, name: str, start: int, ends: tuple[int, ...]
) -> CompositeManifest:
    """The manifest that makes one of these parts; raises UnsupportedModelError if they do not feed each other."""
    manifests = {part: artifact.manifest for part, artifact in artifacts.items()}
    first = manifests.get("decoder_first", manifests["decoder"])
    return CompositeManifest(
        name=name,
        tool=f"furiosa-llm-onnx {importlib.metadata.version('furiosa-llm-onnx')}",
        decoder_start_token_id=start,
        eos_token_ids=ends,
        parts=tuple(PartEntry(name=part, digest=artifact.digest) for part, artifact in artifacts.items()),
        hidden=_hidden_link(manifests["encoder"], first),
        states=_state_links(first, manifests["decoder"]) if "decoder_first" in manifests else (),
    )


def summary(reports: Mapping[PartName, BuildReport], *, artifact: str, seconds: float) -> BuildReport:
    """One report of all parts: it adds up their memory, and takes the costs of a token from the decoder's report."""
    parts = tuple(reports.values())
    return dataclasses.replace(
        reports["decoder"],
        artifact=artifact,
        weight_nbytes=sum(part.weight_nbytes for part in parts),
        replicated_nbytes=sum(part.replicated_nbytes for part in parts),
        padding_nbytes=sum(part.padding_nbytes for part in parts),
        model_nbytes=sum(part.model_nbytes for part in parts),
        stored_nbytes=sum(part.stored_nbytes for part in parts),
        decisions=tuple(decision for part in parts for decision in part.decisions),
        replicated=tuple(line for part in parts for line in part.replicated),
        notes=tuple(note for part in parts for note in part.notes),
        warnings=reports["encoder"].warnings,
        fused_attentions=sum(part.fused_attentions for part in parts),
        attentions_left=tuple(line for part in parts for line in part.attentions_left),
        shortfalls=tuple(line for part in parts for line in part.shortfalls),
        faults=tuple(fault for part in parts for fault in part.faults),
        missing_kernels=tuple(missing for part in parts for missing in part.missing_kernels),
        float32=None,
        num_nodes=sum(part.num_nodes for part in parts),
        seconds=seconds,
        peak_rss_nbytes=max(part.peak_rss_nbytes for part in parts),
        parts=parts,
    )


def _hidden_link(encoder: Manifest, decoder: Manifest) -> HiddenLink:
    """The encoder's output with a vector for each token, and the decoder's input that takes vectors of that width."""
    outputs = [o for o in encoder.outputs if o.dtype in _FLOATS and o.shape[:2] == ("batch", "sequence")]
    inputs = [i for i in decoder.inputs if i.role == "other" and i.shape[:2] == ("batch", "encoder")]
    pairs = [(o, i) for o in outputs for i in inputs if (o.dtype, o.shape[2:]) == (i.dtype, i.shape[2:])]
    if len(pairs) != 1:
        raise UnsupportedModelError(
            f"the encoder gives {_shown(outputs)}, the decoder takes {[i.name for i in inputs]!s:.200} of the encoder: "
            "expected one output that fits one input; export both from one model."
        )
    return HiddenLink(output=pairs[0][0].name, input=pairs[0][1].name)


def _shown(outputs: list[OutputInfo]) -> str:
    return f"{[f'{info.name} {list(info.shape)}' for info in outputs]!s:.200}"


def _state_links(first: Manifest, decoder: Manifest) -> tuple[StateLink, ...]:
    """For each state of the decoder the output of the first step's decoder that has the same name after its prefix."""
    becomes = {state.input: state.output for state in decoder.states}
    outputs = {_STATE_PREFIX.sub("", info.name, count=1): info.name for info in first.outputs if info.role == "state"}
    links = []
    for info in decoder.inputs:
        if info.role != "state":
            continue
        name = becomes.get(info.name)
        given = name if name in outputs.values() else outputs.get(_STATE_PREFIX.sub("", info.name, count=1))
        if given is None:
            raise UnsupportedModelError(
                f"the decoder with a past takes the state {info.name!r:.80}, which the decoder without one does not "
                f"give; its states are {sorted(outputs.values())!s:.200}: export both from one model."
            )
        links.append(StateLink(input=info.name, first=given, output=name))
    return tuple(links)
