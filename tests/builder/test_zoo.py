"""Every model of the zoo, split over 4 and 8 ranks: results, KV caches and collectives."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import onnx
import pytest

from furiosa_llm.builder import ArtifactBuilder, UnsupportedModelError
from furiosa_llm.runtime.artifact.dimensions import shape_of
from furiosa_llm.runtime.artifact.reader import Artifact
from tests.conftest import Built
from tests.support.builder.parity import Case, cases_of, feeds_of
from tests.support.builder.plans import without_accuracy_level
from tests.support.builder.stitching import Array, SplitModel, session
from tests.support.tiers import MECHANISMS, tiered

EXACT = 1e-5
HALF = 5e-3
"""float16 has 11 bits, and a partial sum is rounded on every rank."""


@dataclasses.dataclass(frozen=True)
class Row:
    """A line of fixtures/zoo's table. All models have two layers."""

    path: str
    all_reduces: int
    all_gathers: int = 1
    tolerance: float = EXACT

    def file(self, zoo: Path) -> Path:
        return zoo / self.path if self.path.endswith(".onnx") else zoo / self.path / "model.onnx"


MODELS = [
    *(Row(f"tiny-{name}-optimum", 5) for name in ("llama", "qwen2", "qwen3", "gemma", "phi3", "qwen3moe")),
    *(Row(f"tiny-{name}-optimum", 5) for name in ("llama-mha-tied", "gpt2", "bloom")),
    *(Row(f"tiny-{name}-optimum", 5) for name in ("llama-9-3", "qwen2-14-2")),
    Row("tiny-neox-optimum", 3),
    Row("tiny-bert-optimum", 6),
    Row("tiny-vit-optimum", 4, 0),
    Row("tiny-t5-optimum/encoder_model.onnx", 5, 0),
    Row("tiny-t5-optimum/decoder_with_past_model.onnx", 7),
    Row("tiny-t5-optimum/decoder_model.onnx", 7),
    *(Row(f"tiny-{name}-dynamo-tf5", 5) for name in ("llama", "mistral", "gpt2", "mixtral")),
    Row("tiny-llama-dynamo-op23-tf5", 5),
    Row("tiny-llama-genai-fp32", 5),
    Row("tiny-gemma2-genai-fp32-fullkv", 5),
    Row("tiny-gptoss-genai-fp32-fullkv", 5),
    Row("tiny-llama-genai-fp16-cuda", 5, tolerance=HALF),
    # Feed-forward 176 is five and a half blocks of 32: the split is of whole blocks, the last of them padded.
    *(Row(f"tiny-{name}", 5) for name in ("llama-genai-int4", "qwen2-genai-int4", "llama-genai-int8")),
    *(Row(f"tiny-{name}", 5) for name in ("llama-genai-int4-qdq", "llama-tied-genai-int4-shared")),
]
"""The same number of collectives at 4 and 8: 2L+1 sums and one gathering of the logits, L+1 in parallel blocks."""

BY_PATH = {row.path: row for row in MODELS}
ROWS = [(path, tp) for path in BY_PATH for tp in (4, 8)]


FAST = [row for row in list(MECHANISMS)[1::2] if row in ROWS]
"""`tests/test_zoo.py` runs all of these rows on artifacts; every other one is run here on the program as well."""


@pytest.mark.parametrize(("path", "tp"), tiered(ROWS, FAST))
def test_split_model_gives_the_unsplit_models_results(path: str, tp: int, zoo: Path, built: Built) -> None:
    row = BY_PATH[path]
    _, artifact = built(row.path, tp)
    kinds = [collective.kind for collective in artifact.manifest.collectives]
    assert (kinds.count("AllReduce"), kinds.count("AllGather")) == (row.all_reduces, row.all_gathers)
    proto = without_accuracy_level(onnx.load(row.file(zoo)))
    split = SplitModel.of_artifact(dataclasses.replace(artifact, program=without_accuracy_level(artifact.program)))
    reference = session(proto)
    stitched = split.session()
    for case in cases_of(artifact.program):
        feeds = feeds_of(artifact.manifest.inputs, case, artifact.manifest.model.vocab_size)
        wanted = {value.name for value in reference.get_inputs()}
        names = [value.name for value in reference.get_outputs()]
        results = reference.run(names, {name: array for name, array in feeds.items() if name in wanted})
        expected = dict(zip(names, results, strict=True))
        check_reference(artifact, case, expected)
        errors = split.greatest_error(split.run(stitched, feeds), expected)
        assert {n: e for n, e in errors.items() if not e <= row.tolerance} == {}, case.name


def check_reference(artifact: Artifact, case: Case, expected: dict[str, Array]) -> None:
    """What is compared with must be worth comparing with: the right outputs and shapes, finite, and not all alike."""
    outputs = {info.name: info for info in artifact.manifest.outputs}
    assert expected.keys() == outputs.keys()
    for name, array in expected.items():
        assert array.shape == shape_of(outputs[name].shape, case.sizes), name
        assert np.isfinite(array).all(), name
        assert array.size > 1, name
        assert np.std(array.astype(np.float64)) > 1e-3, name
        if case.batch > 1:
            assert not np.allclose(array[0], array[1]), name


def test_merged_decoder_names_the_files_to_take(zoo: Path, tmp_path: Path) -> None:
    builder = ArtifactBuilder(zoo / "tiny-t5-optimum" / "decoder_model_merged.onnx")
    with pytest.raises(UnsupportedModelError) as caught:
        builder.build(tmp_path / "artifact")
    message = str(caught.value)
    assert "decoder_model.onnx" in message
    assert "decoder_with_past_model.onnx" in message
    assert "If" in message
    assert not (tmp_path / "artifact").exists()
