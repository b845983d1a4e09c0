"""Whether the parts of a composite artifact fit: split alike, and every input fed by an output of its kind."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NoReturn

from furiosa_llm.runtime.artifact.composite_manifest import CompositeManifest, PartName, StateLink
from furiosa_llm.runtime.artifact.dimensions import Shape
from furiosa_llm.runtime.artifact.errors import ArtifactError
from furiosa_llm.runtime.artifact.json_reader import REBUILD
from furiosa_llm.runtime.artifact.manifest import InputInfo, Manifest, OutputInfo

PROMPT_SHAPES: Mapping[str, tuple[Shape, ...]] = {
    "token_ids": (("batch", "sequence"),),
    "attention_mask": (("batch", "sequence"),),
    "position_ids": (("batch", "sequence"), (1, "sequence")),
    "token_type_ids": (("batch", "sequence"),),
}
"""Inputs that follow from token ids alone, by role, where there is no past."""

STEP_SHAPES: Mapping[str, tuple[Shape, ...]] = {
    "token_ids": (("batch", "sequence"),),
    "attention_mask": (("batch", "encoder"), ("batch", "sequence"), ("batch", "total")),
    "position_ids": (("batch", "sequence"), (1, "sequence")),
}
"""Inputs of a decoder that has an encoder, other than states and the encoder's output."""


def check_fit(composite: CompositeManifest, parts: Mapping[PartName, Manifest]) -> None:
    """Raises ArtifactError, naming part and value, unless the parts work together as the composite's manifest says."""
    encoder, decoder = parts["encoder"], parts["decoder"]
    first = parts.get("decoder_first", decoder)
    for name, part in parts.items():
        if part.mesh != encoder.mesh:
            _fail(name, f"is split over PEs {list(part.mesh.shape)}, the encoder over {list(encoder.mesh.shape)}")
    _check_inputs("encoder", encoder.inputs, PROMPT_SHAPES)
    hidden = composite.hidden
    given = _output("encoder", encoder, hidden.output)
    if hidden.input not in {info.name for info in first.inputs}:
        _fail(_first_name(parts), f"has no input {hidden.input!r:.80}, which the encoder's output is for")
    for name, part in parts.items():
        if name != "encoder":
            _check_decoder(name, part, hidden.input, given, composite)
    linked = [link.input for link in composite.states]
    states = [info.name for info in decoder.inputs if info.role == "state"]
    if sorted(linked) != sorted(states):
        _fail("decoder", f"has the states {sorted(states)!s:.200}, the composite's manifest {sorted(linked)!s:.200}")
    for link in composite.states:
        _check_state(link, first, decoder)
    own = {(state.input, state.output) for state in decoder.states}
    if own != {(link.input, link.output) for link in composite.states if link.output is not None}:
        _fail("decoder", "pairs states otherwise than the composite's manifest does")


def _first_name(parts: Mapping[PartName, Manifest]) -> str:
    return "decoder_first" if "decoder_first" in parts else "decoder"


def _check_decoder(name: str, part: Manifest, hidden: str, given: OutputInfo, composite: CompositeManifest) -> None:
    logits = [info for info in part.outputs if info.role == "logits"]
    if not logits:
        _fail(name, "has no output for logits")
    vocabulary = part.model.vocab_size
    if vocabulary is not None and composite.decoder_start_token_id >= vocabulary:
        _fail(name, f"has {vocabulary} tokens, but generation begins with {composite.decoder_start_token_id}")
    for info in part.inputs:
        if info.name == hidden:
            expected = ("batch", "encoder", *given.shape[2:])
            if (info.dtype, info.shape) != (given.dtype, expected):
                _fail(name, f"takes {_shown(info)}, the encoder gives {_shown(given)}")
    _check_inputs(name, [i for i in part.inputs if i.role != "state" and i.name != hidden], STEP_SHAPES)


def _check_inputs(part: str, infos: Sequence[InputInfo], known: Mapping[str, tuple[Shape, ...]]) -> None:
    for info in infos:
        if info.shape not in known.get(info.role, ()):
            _fail(part, f"has the input {_shown(info)} of role {info.role!r}, which nothing feeds")
    if not any(info.role == "token_ids" for info in infos):
        _fail(part, "has no input for token ids")


def _check_state(link: StateLink, first: Manifest, decoder: Manifest) -> None:
    given = _output("decoder_first", first, link.first)
    taken = next(info for info in decoder.inputs if info.name == link.input)
    fixed = [[dim if isinstance(dim, int) else None for dim in info.shape] for info in (given, taken)]
    if given.dtype != taken.dtype or fixed[0] != fixed[1]:
        _fail("decoder", f"takes the state {_shown(taken)}, decoder_first gives {_shown(given)}")


def _output(part: str, manifest: Manifest, name: str) -> OutputInfo:
    found = next((info for info in manifest.outputs if info.name == name), None)
    if found is None:
        _fail(part, f"has no output {name!r:.80}, which the composite's manifest names")
    return found


def _shown(info: InputInfo | OutputInfo) -> str:
    return f"{info.name!r:.80} {info.dtype} {list(info.shape)}"


def _fail(part: str, found: str) -> NoReturn:
    raise ArtifactError(f"the part {part!r} does not fit the others: it {found}; {REBUILD} from one export's files")
