"""Adapters as trainers save them, and models that have them merged into their weights."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

from furiosa_llm.runtime.artifact.adapters.stored import to_safetensors
from furiosa_llm.runtime.artifact.dtypes import Array
from furiosa_llm.runtime.artifact.reader import Artifact
from furiosa_llm.runtime.execution.decoder import DecoderSession
from furiosa_llm.runtime.verification.reference import ReferenceModel

Sizes = Mapping[str, tuple[int, int]]
"""The features in and out of modules, by a trainer's names."""
LORA: Sizes = {
    "layers.0.self_attn.q_proj": (64, 64),
    "layers.0.self_attn.v_proj": (64, 32),
    "layers.0.mlp.down_proj": (128, 64),
}
"""Of fixtures/exports/lora.onnx, whose inputs are named otherwise."""
PREFIX = "base_model.model.model."


def saved(folder: Path, sizes: Sizes, *, rank: int = 4, seed: int = 0, alpha: int = 8, **config: Any) -> Path:
    """An adapter in `folder` as PEFT saves it, of random numbers."""
    folder.mkdir(parents=True, exist_ok=True)
    random, tensors = np.random.default_rng(seed), {}
    for module, (features_in, features_out) in sizes.items():
        for half, shape in (("A", (rank, features_in)), ("B", (features_out, rank))):
            tensors[f"{PREFIX}{module}.lora_{half}.weight"] = (0.3 * random.standard_normal(shape)).astype(np.float32)
    return written(folder, tensors, r=rank, lora_alpha=alpha, **config)


def written(folder: Path, tensors: Mapping[str, Array], **config: Any) -> Path:
    """`tensors` and `config` in PEFT's files."""
    (folder / "adapter_model.safetensors").write_bytes(to_safetensors(tensors))
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", **config}))
    return folder


def deltas(folder: Path, scale: float) -> dict[str, Array]:
    """What an adapter that `saved` wrote adds to the weight [in, out] of each module, at that scale."""
    data = (folder / "adapter_model.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    found = {
        name: np.frombuffer(body[slice(*entry["data_offsets"])], np.float32).reshape(entry["shape"])
        for name, entry in header.items()
    }
    modules = {name.removeprefix(PREFIX).rpartition(".lora_")[0] for name in found}
    return {
        module: scale * (found[f"{PREFIX}{module}.lora_B.weight"] @ found[f"{PREFIX}{module}.lora_A.weight"]).T
        for module in modules
    }


def merged(model: Path, to: Path, weights: Mapping[str, str], added: Mapping[str, Array]) -> Path:
    """The model with `added` added to its weights, which `weights` names by module; inputs for adapters are zeros."""
    proto = onnx.load(model)
    tensors = {tensor.name: tensor for tensor in proto.graph.initializer}
    for module, delta in added.items():
        tensor = tensors[weights[module]]
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) + delta, tensor.name))
    for value in [value for value in proto.graph.input if ".lora_" in value.name]:
        shape = [dim.dim_value for dim in value.type.tensor_type.shape.dim]
        proto.graph.initializer.append(numpy_helper.from_array(np.zeros(shape, np.float32), value.name))
        proto.graph.input.remove(value)
    onnx.save(proto, to)
    return to


def greedy(model: Path, artifact: Artifact, prompts: Sequence[Sequence[int]], count: int) -> list[list[int]]:
    """The tokens that the unsplit `model` chooses after each prompt, alone, on plain onnxruntime."""
    manifest = artifact.manifest
    inputs = [info for info in manifest.inputs if info.role != "other"]
    reference = ReferenceModel(model, inputs=inputs, outputs=manifest.outputs, states=manifest.states)
    found: list[list[int]] = []
    for prompt in prompts:
        session, new = DecoderSession(reference), list(prompt)
        found.append([])
        for _ in range(count):
            found[-1].append(int(session.step(np.array([new], dtype=np.int64))[0].argmax()))
            new = found[-1][-1:]
    return found
