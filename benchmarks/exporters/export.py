"""Runs in an environment of exporters: exports what it is told to, each in a process of its own.

`python -m benchmarks.exporters.export` reads lines of JSON from stdin, each a trial's exporter, architecture, options
and folder, and answers each with a line: the versions of the packages that exported it, and what went wrong.
"""

from __future__ import annotations

import importlib.metadata
import json
import multiprocessing
import os
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.exporters.architectures import ARCHITECTURES, VOCABULARY, Architecture

SECONDS = 600.0
"""The most that one export may take."""
PACKAGES = {
    "genai": ("onnxruntime-genai", "transformers", "torch"),
    "optimum": ("optimum-onnx",),  # with a transformers of its own
    "dynamo": ("torch", "onnxscript", "transformers"),
    "mobius": ("mobius-onnx", "transformers"),
}
_TASKS = {
    "decoder": "text-generation-with-past",
    "encoder": "fill-mask",
    "seq2seq": "text2text-generation-with-past",
    "speech": "automatic-speech-recognition-with-past",
    "image": "image-classification",
}


def _genai(checkpoint: Path, folder: Path, _: Architecture, options: Mapping[str, Any]) -> None:
    from onnxruntime_genai.models import builder

    given = [f"{name}={value}" for name, value in options.items() if name != "precision"]
    target = (None, str(checkpoint), str(folder), options.get("precision", "fp32"), "cpu", str(folder / "cache"))
    builder.create_model(*target, **builder.parse_extra_options(*target, ["hf_token=false", *given]))


def _optimum(checkpoint: Path, folder: Path, architecture: Architecture, options: Mapping[str, Any]) -> None:
    from optimum.exporters.onnx import main_export

    main_export(str(checkpoint), str(folder), task=_TASKS[architecture.kind], do_validation=False, **options)


def _dynamo(_: Path, folder: Path, architecture: Architecture, options: Mapping[str, Any]) -> None:
    import torch
    from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter
    from transformers.exporters.utils import decompose_for_generation

    from benchmarks.exporters.checkpoints import model_of

    model = model_of(architecture)
    if "experts" in options:
        model.set_experts_implementation(options["experts"])
    settings = {name: value for name, value in options.items() if name != "experts"}
    tokens = torch.randint(3, VOCABULARY, (2, 5))
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    if architecture.kind == "image":
        inputs = {"pixel_values": torch.randn(2, 3, 32, 32)}
    elif architecture.kind == "speech":
        inputs = {"input_features": torch.randn(2, 8, 64)}
    parts = {"model": (model, inputs)}
    if architecture.kind not in ("encoder", "image"):
        parts = decompose_for_generation(model, inputs, multi_token_decode=True)
        parts = {"model": parts["decode"]}
    for name, (part, sample) in parts.items():
        exported = OnnxExporter().export(part, dict(sample), config=OnnxConfig(dynamic=True, **settings))
        OnnxExporter.save_program(exported.program, folder / f"{name}.onnx")


def _mobius(checkpoint: Path, folder: Path, _: Architecture, options: Mapping[str, Any]) -> None:
    from mobius.__main__ import main

    given = [word for name, value in options.items() for word in (f"--{name}", str(value)) if word != "True"]
    sys.argv = ["mobius", "build", "--config", str(checkpoint), str(folder), *given]
    main()


EXPORTERS: Mapping[str, Callable[[Path, Path, Architecture, Mapping[str, Any]], None]] = {
    "genai": _genai,
    "optimum": _optimum,
    "dynamo": _dynamo,
    "mobius": _mobius,
}


def _export(exporter: str, architecture: str, options: Mapping[str, Any], folder: Path) -> None:
    """In a process of its own: what it says goes to a file, its error's last line to another."""
    folder.mkdir(parents=True)
    with (folder / "export.log").open("w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        try:
            from benchmarks.exporters.checkpoints import model_of, save

            config = ARCHITECTURES[architecture]
            checkpoint = folder / "checkpoint"
            save(model_of(config), checkpoint)
            EXPORTERS[exporter](checkpoint, folder, config, options)
        except BaseException as error:
            traceback.print_exc()
            (folder / "error.txt").write_text(f"{type(error).__name__}: {error}")
            raise SystemExit(1) from error


def _answer(request: Mapping[str, Any]) -> Mapping[str, Any]:
    folder = Path(request["folder"])
    names = ("exporter", "architecture", "options")
    process = multiprocessing.get_context("fork").Process(target=_export, args=(*(request[n] for n in names), folder))
    process.start()
    process.join(SECONDS)
    if process.is_alive():
        process.kill()
        process.join()
        return {"error": f"took more than {SECONDS:.0f} s"}
    noted = folder / "error.txt"
    if process.exitcode:
        return {"error": noted.read_text() if noted.exists() else f"ended with exit code {process.exitcode}"}
    return {"error": None}


def main() -> None:
    """Answers until stdin ends."""
    _warm(sys.argv[1:])
    for line in sys.stdin:
        print(json.dumps(_answer(json.loads(line))), flush=True)


def versions(exporter: str) -> dict[str, str]:
    """Of the packages that `exporter` is made of."""
    return {name: importlib.metadata.version(name) for name in PACKAGES[exporter]}


def _warm(exporters: Sequence[str]) -> None:
    """Loads what each process forked from this one needs, once."""
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    print(json.dumps({k: v for name in exporters for k, v in versions(name).items()}), flush=True)


if __name__ == "__main__":
    main()
