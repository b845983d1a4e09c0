"""The files that the peers read: for SmolLM2 made of one GGUF file, for each large model of its ONNX model."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import gguf
import numpy as np
from safetensors.numpy import save_file

from benchmarks.artifacts import artifact, model
from benchmarks.peers.contenders import LARGE, Files, sizes
from benchmarks.peers.onnx_as_gguf import write_gguf
from furiosa_llm.example.llama.weights import EMBEDDING, FINAL_NORM, layer_weight
from furiosa_llm.example.smollm2.gguf_weights import PARTS, GgufWeights
from furiosa_llm.example.smollm2.recipe import ensure, ensure_gguf

_FILE_TYPE_FLOAT32 = 0
_SHAPES = (*LARGE, "genai-fp32", "optimum-fp32", "int4")


def prepare(folder: Path) -> Files:
    """Writes what is missing below `folder`, builds the artifacts, and says where everything lies."""
    source = ensure_gguf()
    _once(folder / "model.f32.gguf", lambda path: write_float32_gguf(source, path))
    _once(folder / "safetensors", lambda path: write_safetensors(source, path))
    for shape in LARGE:
        _once(folder / f"{shape}.gguf", partial(write_gguf, model(shape)))
    return Files(
        models={shape: model(shape).parent.resolve() for shape in _SHAPES},
        artifacts={(shape, size): artifact(shape, size).folder.resolve() for shape in _SHAPES for size in sizes(shape)},
        gguf=source,
        float32_gguf=(folder / "model.f32.gguf").resolve(),
        requantised_gguf=(folder / "model.q4_0.gguf").resolve(),
        large_gguf={shape: (folder / f"{shape}.gguf").resolve() for shape in LARGE},
        safetensors=(folder / "safetensors").resolve(),
    )


def write_float32_gguf(source: Path, target: Path) -> None:
    """`source` with every tensor in float32, and all of its metadata but the type."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, arch=reader.fields["general.architecture"].contents())
    for name, field in reader.fields.items():
        if name == "general.file_type":
            writer.add_key_value(name, _FILE_TYPE_FLOAT32, field.types[0])
        elif not name.startswith("GGUF.") and name != "general.architecture":
            inner = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), field.types[0], sub_type=inner)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, np.ascontiguousarray(gguf.quants.dequantize(tensor.data, tensor.tensor_type)))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_safetensors(source: Path, folder: Path) -> None:
    """The float32 weights under Hugging Face's names, with the configuration that lies beside the ONNX model."""
    weights = GgufWeights(source)
    names = [EMBEDDING, FINAL_NORM]
    for layer in range(weights.config.num_hidden_layers):
        names += [layer_weight(layer, part) for part in PARTS]
    folder.mkdir()
    tensors = {name: np.ascontiguousarray(weights.tensor(name)) for name in names}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    beside = ensure("genai-fp32")
    for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(beside / name, folder / name)


def _once(path: Path, write: Callable[[Path], None]) -> None:
    """Has `write` make a file or folder, unless it is there: under another name until it is whole."""
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    if partial.is_dir():
        shutil.rmtree(partial)
    write(partial)
    partial.rename(path)
