"""Semantic changes of what is no plain decoder: encoders, encoder-decoders, recurrent states, adapters, other types.

They are registered beside those of `mutations.py`.
"""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from onnx import NodeProto, TensorProto

from furiosa_llm.builder import ArtifactBuilder
from tests.support.artifacts import ZOO, artifact_of
from tests.support.builder.exported import EXPORTS, exported
from tests.support.runtime.mutations import (
    LLAMA,
    MUTATIONS,
    Mutation,
    compared,
    mutation,
    negated,
    negated_if,
    scaled,
    size,
    total,
)
from tests.support.runtime.program_edits import Program
from tests.support.tampering import edit_manifest

BERT, T5, HALF = "tiny-bert-optimum", "tiny-t5-optimum", "tiny-llama-genai-fp16-cuda"
HYBRID, CONVOLUTION, RECURRENT, LORA = "genai-qwen35", "genai-lfm2", "mobius-mamba", "lora"
"""Exports: a hybrid with linear attention, one with short convolutions, no attention at all, inputs for adapters."""
ADAPTED = "tiny-llama-optimum with inputs for adapters"


def base(model: str) -> Path:
    """The artifact that kinds of `model` are made on; not to be changed."""
    if model == ADAPTED or (EXPORTS / f"{model}.onnx").exists():
        return _made(model)
    return artifact_of(model)


@functools.cache
def _scratch() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="furiosa-llm-mutations-")


@functools.cache
def _made(model: str) -> Path:
    folder = Path(_scratch().name) / model
    folder.mkdir()
    modules = [f"layers.{i}.self_attn.{name}" for i in (0, 1) for name in ("q_proj", "v_proj")]
    if model == ADAPTED:
        builder = ArtifactBuilder(ZOO / LLAMA / "model.onnx", lora_modules=modules)
    else:
        builder = ArtifactBuilder(exported(model, folder))
    builder.build(folder / "artifact")
    return folder / "artifact"


def kinds() -> dict[str, Mutation]:
    """All kinds by name, those of `mutations.py` among them."""
    return MUTATIONS


def _exchanged_outputs(p: Program, one: str, other: str) -> None:
    """Each of two outputs gives what the other one gave."""
    inner = {one: p.value(), other: p.value()}
    nodes = p.nodes
    for node in nodes:
        node.input[:] = [inner.get(name, name) for name in node.input]
        node.output[:] = [inner.get(name, name) for name in node.output]
    added = [p.node("Identity", [inner[one]]), p.node("Identity", [inner[other]])]
    added[0].output[0], added[1].output[0] = other, one
    p.replace([*nodes, *added])


def _exchanged_inputs(p: Program, one: str, other: str) -> None:
    """Whoever reads one of two inputs reads the other one."""
    names = {one: other, other: one}
    nodes = p.nodes
    for node in nodes:
        node.input[:] = [names.get(name, name) for name in node.input]
    p.replace(nodes)


# -- recurrent states -----------------------------------------------------------------------------------------------


def _recurrent(p: Program) -> str:
    """The last state that is replaced, as an output."""
    return str([state for state in p.manifest["states"] if state["mode"] == "replace"][-1]["output"])


mutation("a recurrent state that decays by 1e-3", HYBRID, CONVOLUTION, RECURRENT)(
    lambda p: scaled(p, _recurrent(p), 0.999)
)
mutation("a recurrent state that decays by 1e-6", HYBRID, RECURRENT)(lambda p: scaled(p, _recurrent(p), 1 - 1e-6))
mutation("a recurrent state negated", HYBRID, CONVOLUTION, RECURRENT)(lambda p: negated(p, _recurrent(p)))


@mutation("a recurrent state negated in decode steps", HYBRID, CONVOLUTION)
def _(p: Program) -> None:
    negated_if(p, _recurrent(p), *compared(p, "Equal", size(p, 1), 1))


@mutation("a recurrent state negated behind a sequence longer than 24", HYBRID, CONVOLUTION)
def _(p: Program) -> None:
    negated_if(p, _recurrent(p), *compared(p, "Greater", total(p), 24))


@mutation("recurrent states of a batch exchanged", HYBRID, CONVOLUTION)
def _(p: Program) -> None:
    start, stop, axis, step = (p.constant([bound], np.int64) for bound in (2**31, -(2**31), 0, -1))
    p.through(_recurrent(p), lambda x: [p.node("Slice", [x, start, stop, axis, step])])


@mutation("recurrent states of two layers exchanged", RECURRENT)
def _(p: Program) -> None:
    states = [state["output"] for state in p.manifest["states"]]
    _exchanged_outputs(p, states[1], states[3])


@mutation("recurrent states of two layers exchanged as inputs", RECURRENT)
def _(p: Program) -> None:
    states = [state["input"] for state in p.manifest["states"]]
    _exchanged_inputs(p, states[1], states[3])


@mutation("recurrent states of two layers exchanged in the manifest", RECURRENT)
def _(p: Program) -> None:
    first, second = p.manifest["states"][1], p.manifest["states"][3]
    first["output"], second["output"] = second["output"], first["output"]


# -- encoders -------------------------------------------------------------------------------------------------------


mutation("sign of an encoder's hidden value", BERT)(lambda p: negated(p, p.hidden()))
mutation("scale of an encoder's output by 1e-6", BERT)(lambda p: scaled(p, "logits", 1 + 1e-6))


@mutation("an encoder's output negated for texts longer than 24", BERT)
def _(p: Program) -> None:
    negated_if(p, "logits", *compared(p, "Greater", size(p, 1), 24))


@mutation("an encoder's output negated in batches", BERT)
def _(p: Program) -> None:
    negated_if(p, "logits", *compared(p, "Greater", size(p, 0), 1))


def _replaced_input(p: Program, name: str, nodes: list[NodeProto]) -> None:
    """Whoever reads an input reads what the last of `nodes`, which read it, gives."""
    kept = p.nodes
    for node in kept:
        node.input[:] = [nodes[-1].output[0] if one == name else one for one in node.input]
    p.replace([*nodes, *kept])


@mutation("types of tokens ignored", BERT)
def _(p: Program) -> None:
    types = p.input("token_type_ids")
    _replaced_input(p, types, [p.node("Mul", [types, p.constant(0, np.int64)])])


@mutation("padding read", BERT, T5, part="encoder")
def _(p: Program) -> None:
    mask = p.input("attention_mask")
    _replaced_input(p, mask, [p.node("Max", [mask, p.constant(1, np.int64)])])


# -- encoder-decoders -----------------------------------------------------------------------------------------------


mutation("scale of what an encoder gives by 1 %", T5, part="encoder")(lambda p: scaled(p, "last_hidden_state", 1.01))
mutation("sign of the first step's logits", T5, part="decoder_first")(lambda p: negated(p, "logits"))


@mutation("logits negated behind a past longer than 24", T5, part="decoder")
def _(p: Program) -> None:
    shape = p.node("Shape", [p.manifest["states"][0]["input"]])
    past = p.node("Gather", [shape.output[0], p.constant(2, np.int64)])
    negated_if(p, "logits", *compared(p, "Greater", ([shape, past], past.output[0]), 24))


@mutation("an encoder's keys and values exchanged as inputs", T5, part="decoder")
def _(p: Program) -> None:
    _exchanged_inputs(p, "past_key_values.0.encoder.key", "past_key_values.0.encoder.value")


@mutation("an encoder's states of two layers exchanged", T5, part="decoder_first")
def _(p: Program) -> None:
    _exchanged_outputs(p, "present.0.encoder.key", "present.1.encoder.key")


def _whole(p: Program, change: Any) -> None:
    edit_manifest(p.folder.parent, change)


@mutation("states exchanged between an encoder-decoder's parts", T5, part="decoder")
def _(p: Program) -> None:
    def change(root: Any) -> None:
        one, other = (next(s for s in root["states"] if s["first"] == f"present.{i}.encoder.value") for i in (0, 1))
        one["first"], other["first"] = other["first"], one["first"]

    _whole(p, change)


mutation("another first token", T5, part="decoder")(lambda p: _whole(p, lambda m: m.update(decoder_start_token_id=7)))
mutation("another last token", T5, part="decoder")(lambda p: _whole(p, lambda m: m.update(eos_token_ids=[7])))


# -- adapters -------------------------------------------------------------------------------------------------------


def _factors(p: Program) -> list[str]:
    """The inputs for adapters, in pairs."""
    return [str(info["name"]) for info in p.manifest["inputs"] if ".lora_" in info["name"]]


@mutation("an adapter dropped", LORA, ADAPTED)
def _(p: Program) -> None:
    name = _factors(p)[0]
    _replaced_input(p, name, [p.node("Mul", [name, p.constant(0.0)])])


@mutation("an adapter doubled", LORA, ADAPTED)
def _(p: Program) -> None:
    name = _factors(p)[1]
    _replaced_input(p, name, [p.node("Add", [name, name])])


@mutation("adapters of two modules exchanged", LORA, ADAPTED)
def _(p: Program) -> None:
    names = [name for name in _factors(p) if name.endswith("lora_A")]
    _exchanged_inputs(p, names[0], names[1])


@mutation("the rows of a batch share their adapters", ADAPTED)
def _(p: Program) -> None:
    rows = p.node("Max", ["lora_rows", p.constant(1.0)])
    rank = next(info["shape"][2] for info in p.manifest["inputs"] if info["name"] == "lora_rows")
    p.declare(rows.output[0], TensorProto.FLOAT, ["batch", 1, rank])
    _replaced_input(p, "lora_rows", [rows])


# -- other types, stages --------------------------------------------------------------------------------------------


mutation("sign of the logits, in float32", HALF, compute="float32")(lambda p: negated(p, "logits"))


@mutation("negated where a sequence is longer than 24, in float32", HALF, compute="float32")
def _(p: Program) -> None:
    negated_if(p, "logits", *compared(p, "Greater", total(p), 24))


@mutation("a value between stages left out of the manifest")
def _(p: Program) -> None:
    block = next(block for block in p.manifest["blocks"] if block["crossing"])
    block["crossing"] = block["crossing"][1:]


@mutation("a stage's weights said to be smaller")
def _(p: Program) -> None:
    p.manifest["blocks"][1]["weight_nbytes"] //= 2
