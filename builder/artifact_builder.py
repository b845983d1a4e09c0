"""`ArtifactBuilder`: an ONNX model in, an artifact out."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from furiosa_llm.builder.composite import build_composite, check_options, find_encoder_decoder
from furiosa_llm.builder.options import BuildOptions
from furiosa_llm.builder.pipeline import Assembly
from furiosa_llm.builder.plan.mesh import MAX_PADDING
from furiosa_llm.builder.plan.tactics import Tactics
from furiosa_llm.builder.source.folder import default_name, find_model, models_folder, variants
from furiosa_llm.builder.source.from_artifact import load_with_weights
from furiosa_llm.builder.write.build_report import BuildReport
from furiosa_llm.runtime.artifact.adapters.stored import module_names, read_adapters
from furiosa_llm.runtime.artifact.progress import Progress, shown


class ArtifactBuilder:
    """Builds an artifact from an ONNX model.

    Args:
        model: Path of the .onnx file. What lies next to it (tokenizer, configuration) goes into the artifact. Or path
            of a folder with an encoder's and its decoder's files, which become one artifact (see docs/encoders.md).
        name: The artifact's name; the model's folder or file name if empty.
        tensor_parallel_size: How many PEs share each matrix: 4 or 8.
        max_seq_len_to_capture: Longest sequence to serve, in tokens, at most the model's limit.
        dims: Sizes of input dimensions that the model leaves open, by symbol or input.symbol.
        max_padding: By how much padding may enlarge a dimension (1.34: by a third).
        tactics: Choices to keep (see docs/planning.md).
        experimental_tp: Also allow a tensor parallel size of 1, 2 or 16.
        fuse_attention: Replace attention written out in small ops by one op with its cache in place. It is
            done where both give the same numbers.
        roles: What an input is for, where the graph does not say: INPUT=positions[3,batch,sequence].
        fixed: Makes an input a constant: one boolean or integer.
        lora_modules: Modules whose products get inputs for adapters, where the graph has none. Those that the
            adapters of `lora` name are among them.
        lora: Adapters that go into the artifact, by name: the folder or .safetensors file of each.
    """

    def __init__(
        self,
        model: str | os.PathLike[str],
        name: str = "",
        *,
        tensor_parallel_size: int = 4,
        max_seq_len_to_capture: int | None = None,
        dims: Mapping[str, int] | None = None,
        max_padding: float = MAX_PADDING,
        tactics: Tactics | None = None,
        experimental_tp: bool = False,
        fuse_attention: bool = True,
        roles: Mapping[str, str] | None = None,
        fixed: Mapping[str, int] | None = None,
        lora_modules: Sequence[str] = (),
        lora: Mapping[str, str | os.PathLike[str]] | None = None,
    ) -> None:
        self._adapters = read_adapters(lora or {})
        self._options = BuildOptions(
            tensor_parallel_size=tensor_parallel_size,
            max_seq_len_to_capture=max_seq_len_to_capture,
            dims=dict(dims or {}),
            max_padding=max_padding,
            tactics=tactics,
            fuse_attention=fuse_attention,
            roles=dict(roles or {}),
            fixed=dict(fixed or {}),
            lora_modules=sorted(module_names(self._adapters).union(lora_modules)),
        )
        self._options.check(experimental_tp=experimental_tp)
        self._model = Path(model)
        self._name = name or default_name(self._model)
        self._composite = find_encoder_decoder(models_folder(self._model))
        if self._composite is not None:
            check_options(self._options, with_adapters=bool(self._adapters))

    def build(
        self,
        save_dir: str | os.PathLike[str],
        *,
        force: bool = False,
        progress: bool | Progress | None = None,
        workers: int | None = None,
        allow_no_kernel: bool = False,
    ) -> BuildReport:
        """Write the artifact to `save_dir`; raises a BuildError and leaves nothing behind if that fails.

        Args:
            save_dir: The folder to write.
            force: Replace it if it is an artifact already.
            progress: Whether what is done is shown on standard error, by default on a terminal and in a notebook; or
                what is called with each stage, and with the bytes as they are written.
            workers: Threads that read, cut, hash and write weights, 1 to 5; by default 5. The artifact's bytes do not
                depend on their number.
            allow_no_kernel: Write what has no kernels on this machine, even if computing in float32 does not help.
        """
        with shown(progress):
            return self._build_any(Path(save_dir), force, workers, allow_no_kernel)

    def _build_any(self, save_dir: Path, force: bool, workers: int | None, allow_no_kernel: bool) -> BuildReport:
        if self._composite is None:
            return self._build(self._model, save_dir, self._name, force, workers, allow_no_kernel)
        return build_composite(
            self._composite,
            save_dir,
            name=self._name,
            build_part=lambda model, folder, name: self._build(model, folder, name, False, workers, allow_no_kernel),
            force=force,
        )

    def _build(
        self, model: Path, folder: Path, name: str, force: bool, workers: int | None, allow_no_kernel: bool
    ) -> BuildReport:
        model = find_model(model)
        assembly = Assembly(
            options=self._options,
            name=name,
            load=lambda: load_with_weights(model, self._options.fixed, self._options.lora_modules),
            adapters=self._adapters,
            check=lambda source, _: source.guard.check_unchanged(),
            allow_no_kernel=allow_no_kernel,
        )
        report = assembly.build(folder, force=force, workers=workers)
        others = variants(model) if self._model.is_dir() and self._composite is None else ()
        if not others:
            return report
        note = f"beside {model.name} lie {', '.join(others)}: give the path of one to build that instead"
        return dataclasses.replace(report, notes=(note, *report.notes))
