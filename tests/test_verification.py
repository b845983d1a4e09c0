"""Verifying artifacts of the zoo: sound ones pass, and every kind of damage is caught by the check that is for it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from furiosa_llm import verification
from furiosa_llm.builder.errors import ModelLoadError
from furiosa_llm.builder.source.identity import check_identity
from furiosa_llm.parity_options import HALF_TOLERANCE, TOLERANCE, ParityOptions
from furiosa_llm.runtime.artifact.errors import ArtifactError
from furiosa_llm.runtime.artifact.layout import Mesh, axes_of, index_map
from furiosa_llm.runtime.artifact.manifest import StoredTensor
from furiosa_llm.runtime.artifact.reader import open_artifact
from furiosa_llm.runtime.artifact.tools.record import CHECKS, Verification, parse_verification
from furiosa_llm.runtime.errors import InputError, UnsupportedError
from furiosa_llm.runtime.program import lanes
from furiosa_llm.runtime.verification.errors import OutputDifference, TokenComparison
from furiosa_llm.runtime.verification.parity import Findings, Found, Subject
from furiosa_llm.verification import _tolerance, verify_artifact
from tests.runtime.verification.test_parity import image, save
from tests.support.artifacts import artifact_of
from tests.support.tampering import alter_tensor, flip_bit, reseal
from tests.support.tiers import tiered

LLAMA, UNEVEN, BERT = "tiny-llama-optimum", "tiny-llama-9-3-optimum", "tiny-bert-optimum"
FEW = ParityOptions(max_tokens=2, prompts=("hello",), threads=1, seed=0, max_length=48)

Build = Callable[..., Path]


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Build:
    """A fresh copy of the artifact of a model."""

    def copy(model: str = LLAMA, size: int = 4) -> Path:
        return Path(shutil.copytree(artifact_of(model, size), tmp_path_factory.mktemp("copy") / "artifact"))

    return copy


def verify(folder: Path, **options: Any) -> Verification:
    """The record, which is also readable and as it was."""
    record = verify_artifact(folder, options=FEW, **options).record
    again = parse_verification(record.to_bytes())
    assert again.to_bytes() == record.to_bytes()
    assert str(folder).encode() not in record.to_bytes()
    return record


def failed(record: Verification) -> list[str]:
    return [check.name for check in record.checks if not check.passed]


def faults(record: Verification, name: str) -> tuple[str, ...]:
    return next(check.faults for check in record.checks if check.name == name)


# -- sound artifacts -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "size"),
    tiered(
        [
            (LLAMA, 8),
            (UNEVEN, 4),
            (BERT, 4),
            ("tiny-phi3-optimum", 8),  # packed weights in parts
            ("tiny-llama-genai-int4", 4),
            ("tiny-llama-tied-genai-int4-shared", 8),
            ("tiny-llama-genai-fp16-cuda", 4),
        ],
        [(BERT, 4), ("tiny-phi3-optimum", 8), ("tiny-llama-genai-int4", 4)],
    ),
)
def test_a_sound_artifact_passes_everything(model: str, size: int, build: Build, zoo: Path) -> None:
    folder = build(model, size)
    record = verify(folder, full=True, against=zoo / model / "model.onnx")
    assert failed(record) == []
    decodes = (folder / "tokenizer.json").is_file() and model != BERT
    assert [check.name for check in record.checks] == [name for name in CHECKS if decodes or name != "tokens"][
        : None if decodes or model != BERT else -1
    ]
    assert all(check.checked for check in record.checks)
    measured = {check.name: check for check in record.checks if check.tolerance is not None}
    assert list(measured) == ["stitched", "executor", *(["engine"] if model != BERT else [])]
    tolerance = 5e-3 if "fp16" in model else 1e-4
    for check in measured.values():
        assert check.tolerance == tolerance
        assert check.greatest_error is not None
        assert 0 < check.greatest_error < tolerance / 10 if "fp16" not in model else check.greatest_error < tolerance


def test_full_needs_no_model(build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    folder = build()
    record = verify(folder, full=True)
    assert failed(record) == []
    assert [check.name for check in record.checks] == [name for name in CHECKS if name != "identity"]
    assert list(tmp_path.iterdir()) == []  # the rebuilt model
    originals = next(check for check in record.checks if check.name == "originals")
    stored = [entry for entry in open_artifact(folder).manifest.initializers if entry.stored]
    assert originals.checked >= len(stored) > 0


def test_a_record_is_the_same_every_time(build: Build) -> None:
    folder = build()
    first = verify(folder, full=True).to_bytes()
    assert verify(folder, full=True).to_bytes() == first
    assert json.loads((folder / "manifest.json").read_bytes())["digest"].encode() in first


def test_weights_are_read_by_themselves_if_they_are_small(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = build()
    assert [check.name for check in verify(folder).checks] == ["structure", "proof", "lowering", "weights"]
    alter_tensor(folder, "onnx::MatMul_733", flip_bit)
    record = verify(folder)
    assert failed(record) == ["weights"]
    tensor, file = faults(record, "weights")
    assert "stored tensor 'onnx::MatMul_733': found sha256" in tensor
    assert file.startswith("weights-00001.safetensors: found sha256")
    monkeypatch.setattr(verification, "FULL_BELOW_NBYTES", 1000)
    assert [check.name for check in verify(folder).checks] == ["structure", "proof", "lowering"]
    assert "weights" in failed(verify(folder, full=True))


# -- damage --------------------------------------------------------------------------------------------------------


def split_matrix(folder: Path) -> StoredTensor:
    """A matrix whose columns lie in four shards, so that the file has its elements in another order."""
    return next(
        tensor
        for tensor in open_artifact(folder).manifest.tensors
        if tensor.origin and tensor.layout and len(tensor.shard_axes) == 2 and axes_of(tensor.layout[-1])
    )


def swap_shards(data: bytearray) -> None:
    shard = len(data) // 4
    data[:shard], data[shard : 2 * shard] = data[shard : 2 * shard], data[:shard]


@pytest.mark.parametrize("change", [flip_bit, swap_shards])
def test_changed_weights_with_right_digests_are_not_the_originals(
    change: Callable[[bytearray], None], build: Build
) -> None:
    folder = build()
    name = split_matrix(folder).name
    alter_tensor(folder, name, change)
    reseal(folder)
    record = verify(folder, full=True)
    assert failed(record) == ["originals"]
    (fault,) = faults(record, "originals")
    assert f"original {name!r}: found sha256" in fault
    assert "stitched" not in [check.name for check in record.checks]  # there is nothing to run it beside


def test_changed_weights_and_originals_are_not_the_models(build: Build, zoo: Path) -> None:
    """Who changes every digest has made another sound artifact, but not of this model."""
    folder = build()
    name = split_matrix(folder).name
    alter_tensor(folder, name, swap_shards)
    reseal(folder, originals=True)
    assert failed(verify(folder, full=True)) == []
    record = verify(folder, against=zoo / LLAMA / "model.onnx")
    assert failed(record)[:3] == ["identity", "stitched", "executor"]
    (fault,) = faults(record, "identity")
    assert f"initializer {name!r} of the model is of sha256" in fault


def test_tokens_that_differ_by_more_than_the_error_are_faults(
    build: Build, zoo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def compared(gap: float) -> TokenComparison:
        return TokenComparison(prompt="p", tokens=3, first_difference=3, gap=gap, logit_error=1e-5, magnitude=5.0)

    def compare(*_: object) -> Findings:
        fine = OutputDifference(case="c", output="o", absolute=0.0, relative=0.0, mean=0.0, finite=True)
        outputs = Found(errors=[fine])
        tokens = Found(errors=[compared(1e-6), compared(0.5)])
        return Findings(stitched=outputs, executor=outputs, engine=outputs, tokens=tokens)

    monkeypatch.setattr(Subject, "compare", compare)
    record = verify(build(), against=zoo / LLAMA / "model.onnx")
    assert failed(record) == ["tokens"]
    assert faults(record, "tokens") == (
        "prompt 1: token 3 differs, where the best two logits are 5.0e-01 apart and the artifact's logits are 1.0e-05 "
        "off; 5.0e-04 is allowed",
    )


def test_padding_is_zero(build: Build) -> None:
    """9 heads over 4 ranks: three each, the last three padding."""
    folder = build(UNEVEN)
    artifact = open_artifact(folder)
    padded = next(t for t in artifact.manifest.tensors if _ends_with_padding(t))
    alter_tensor(folder, padded.name, lambda data: data.__setitem__(len(data) - 1, 1))
    reseal(folder)
    record = verify(folder, full=True)
    assert "padding" in failed(record)
    assert "originals" not in failed(record)
    assert faults(record, "padding") == (f"stored tensor {padded.name!r} has padding that is not zero",)


def _ends_with_padding(tensor: StoredTensor) -> bool:
    """Whether the last element of the last shard is padding."""
    if tensor.layout is None or not tensor.shard_axes:
        return False
    return any(index_map(dim, Mesh((2, 2)), 3)[-1] < 0 for dim in tensor.layout)


def test_a_program_that_computes_something_else(build: Build) -> None:
    folder = build()
    program = onnx.load_model(folder / "program.onnx", load_external_data=False)
    known = {tensor.name for tensor in program.graph.initializer}
    node = next(n for n in reversed(program.graph.node) if n.op_type == "Mul" and known.isdisjoint(n.input))
    node.op_type = "Add"
    (folder / "program.onnx").write_bytes(program.SerializeToString())
    reseal(folder)
    record = verify(folder, full=True)
    assert failed(record) == ["lowering", "stitched", "executor", "tokens", "engine"]
    assert any("'logits' is" in fault and " off in the mean, " in fault for fault in faults(record, "stitched"))
    (fault,) = faults(record, "lowering")
    assert fault.startswith(f'Add "{node.name}" comes from no node of source.onnx, and the lowering adds none like it')


def test_a_wrong_executor_is_told_from_a_wrong_program(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    summed = lanes._Laying._sum

    def forgetful(self: Any, call: Any, group: Any, sums: Any) -> Any:
        return summed(self, call, group[:3] if len(group) == 4 else group, sums)

    monkeypatch.setattr(lanes._Laying, "_sum", forgetful)
    record = verify(build(), full=True)
    assert failed(record)[0] == "executor"
    assert "stitched" not in failed(record)


def test_a_source_that_is_another_model(build: Build) -> None:
    """What the artifact is put back together to does not run, or gives something else."""
    folder = build()
    source = onnx.load_model(folder / "source.onnx", load_external_data=False)
    node = next(node for node in source.graph.node if node.op_type == "Softmax")
    node.op_type = "NoSuchOp"
    (folder / "source.onnx").write_bytes(source.SerializeToString())
    reseal(folder)
    record = verify(folder, full=True)
    assert failed(record) == ["lowering", "stitched"]
    assert faults(record, "lowering")[0].startswith("source.onnx cannot be lowered again: node ")
    assert faults(record, "stitched")[0].startswith("the model put back together from the artifact: onnxruntime has no")


@pytest.mark.parametrize("path", ["a", "."])
def test_faults_name_no_folder_and_are_otherwise_whole(
    path: str, build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build().rename(tmp_path / "a")
    monkeypatch.chdir(tmp_path if path == "a" else tmp_path / "a")
    Path(path, "tokenizer.json").unlink()
    record = verify_artifact(path).record
    assert faults(record, "structure")[0].startswith("tokenizer.json is missing; copy the artifact again or rebuild")
    assert str(tmp_path).encode() not in record.to_bytes()


@pytest.mark.parametrize("name", ["program.onnx", "tokenizer.json", "weights-00001.safetensors"])
def test_a_damaged_folder_is_recorded_as_one(name: str, build: Build) -> None:
    folder = build()
    digest = json.loads((folder / "manifest.json").read_bytes())["digest"]
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[:-1])
    record = verify(folder, full=True)
    assert failed(record) == ["structure"]
    assert record.manifest_digest == digest
    assert faults(record, "structure")[0].startswith(f"{name}: found {len(data) - 1} bytes, expected {len(data)}")
    (folder / name).unlink()
    assert faults(verify(folder), "structure")[0].startswith(f"{name} is missing")


def test_without_a_manifest_there_is_nothing_to_record(build: Build, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="no artifact at"):
        verify_artifact(tmp_path / "none")
    with pytest.raises(ArtifactError, match=r"it has no manifest\.json"):
        verify_artifact(tmp_path)
    folder = build()
    manifest = (folder / "manifest.json").read_bytes()
    (folder / "manifest.json").write_bytes(manifest.replace(b'"decoder"', b'"encoder"', 1))
    with pytest.raises(ArtifactError, match="digest"):
        verify_artifact(folder)


# -- models --------------------------------------------------------------------------------------------------------


def test_a_model_with_other_weights(build: Build, zoo: Path, tmp_path: Path) -> None:
    model = onnx.load(zoo / LLAMA / "model.onnx")
    largest = max(model.graph.initializer, key=lambda tensor: len(tensor.raw_data))
    largest.raw_data = (np.frombuffer(largest.raw_data, dtype=np.float32) * np.float32(1.01)).tobytes()
    onnx.save(model, tmp_path / "model.onnx")
    folder = build()
    record = verify(folder, against=tmp_path / "model.onnx")
    assert failed(record)[:3] == ["identity", "stitched", "executor"]
    assert [fault.split("'")[1] for fault in faults(record, "identity")] == [largest.name]
    entries = {entry.name: entry for entry in open_artifact(folder).manifest.initializers}
    small = next(t for t in model.graph.initializer if not entries[t.name].stored)  # source.onnx has its data
    assert small.raw_data
    small.raw_data = bytes([small.raw_data[0] ^ 1]) + small.raw_data[1:]
    extra = onnx.numpy_helper.from_array(np.ones(2, np.float32), "extra")
    model.graph.initializer.append(extra)
    largest.name = "renamed"
    found = _identity_faults(folder, model, tmp_path)
    assert any(small.name in fault and "of sha256" in fault for fault in found)
    assert any("the artifact has no initializer 'extra'" in fault for fault in found)
    assert any("the model has no initializer" in fault for fault in found)


def _identity_faults(folder: Path, model: onnx.ModelProto, tmp_path: Path) -> tuple[str, ...]:
    onnx.save(model, tmp_path / "other.onnx")
    return check_identity(open_artifact(folder), tmp_path / "other.onnx").faults


def test_a_model_of_another_kind_is_refused(build: Build, zoo: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="give the model that the artifact was built from"):
        verify_artifact(build(), against=zoo / BERT / "model.onnx", options=FEW)
    with pytest.raises(ModelLoadError, match="does not exist"):
        verify_artifact(build(), against=tmp_path / "none.onnx", options=FEW)


def test_dimensions_without_a_size_are_asked_for(tmp_path: Path) -> None:
    artifact = image(Mesh((2,))).write(tmp_path / "artifact")
    model = save(image(Mesh((1,))), tmp_path)
    with pytest.raises(UnsupportedError, match="dynamic dimensions"):
        verify_artifact(artifact, against=model)
    record = verify_artifact(artifact, against=model, options=ParityOptions(sizes={"height": 3})).record
    assert [check.name for check in record.checks if check.tolerance is not None and check.passed] == [
        "stitched",
        "executor",
    ]


def test_caches_of_integers_are_compared_as_halves_are(build: Build) -> None:
    """One rank's sums may round a key to the next level."""
    manifest = open_artifact(build("tiny-llama-genai-int4", 4)).manifest
    assert _tolerance(manifest, None) == TOLERANCE
    rounded = tuple(replace(one, dtype="INT8") if one.role == "state" else one for one in manifest.inputs)
    assert _tolerance(replace(manifest, inputs=rounded), None) == HALF_TOLERANCE
