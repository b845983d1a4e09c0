"""Comparing an artifact with the model it came from."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from furiosa_llm.runtime import verify_against
from furiosa_llm.runtime.artifact.errors import ArtifactError
from furiosa_llm.runtime.artifact.layout import Leaf, Mesh
from furiosa_llm.runtime.errors import InputError, UnsupportedError
from furiosa_llm.runtime.verification.errors import OutputDifference
from tests.runtime.test_llm import ZOO
from tests.support.runtime.models import LlamaSize, llama, mlp
from tests.support.runtime.spmd import Spmd

SIZE = LlamaSize(layers=1, vocab=1024, max_length=128)
ONE = Mesh((1,))


def save(program: Spmd, folder: Path) -> Path:
    onnx.save(program.model(), folder / "model.onnx")
    return folder / "model.onnx"


def decoder(folder: Path, **changes: Any) -> Path:
    program = llama(Mesh((2, 2)), SIZE)
    program.files = {name: (ZOO / name).read_bytes() for name in ("tokenizer.json", "tokenizer_config.json")}
    for name, array in changes.items():
        program.weights[name].array = array
    return program.write(folder)


def test_a_decoder_is_compared_in_every_kind_of_step(tmp_path: Path) -> None:
    report = verify_against(decoder(tmp_path / "a"), save(llama(ONE, SIZE), tmp_path), max_tokens=8)
    outputs = {"logits", "present.0.key", "present.0.value"}
    for errors in (report.stitched, report.outputs):
        assert {error.output for error in errors} == outputs
        assert len(errors) == len(outputs) * len(report.cases)
    assert {case.kind for case in report.cases} == {"prefill", "decode", "chunk"}
    assert {error.case for error in report.engine} == {
        *("prompt", "chunk of a prompt"),
        *("decode of three", "decode from a moved slot"),
    }
    assert [comparison.tokens for comparison in report.tokens] == [8, 8, 8, 8]
    assert all(comparison.first_difference is None for comparison in report.tokens)
    assert report.within(1e-4)
    assert not report.accuracy_level_replaced
    assert max(error.absolute for error in report.outputs) > 0


def test_a_wrong_weight_is_found(tmp_path: Path) -> None:
    wrong = llama(Mesh((2, 2)), SIZE).weights["head"].array.copy()
    wrong[:, 3] += 1
    report = verify_against(decoder(tmp_path / "a", head=wrong), save(llama(ONE, SIZE), tmp_path), max_tokens=4)
    assert not report.within(1e-4)
    logits = [error for error in (*report.stitched, *report.outputs) if error.output == "logits"]
    assert not any(error.within(1e-4) for error in (*logits, *report.engine))
    assert all(error.relative < 1e-4 for error in report.outputs if error.output != "logits")
    assert not any(one.within(1e-4) for one in report.tokens)


def test_a_model_without_states_is_compared_once(tmp_path: Path) -> None:
    report = verify_against(mlp(Mesh((2,))).write(tmp_path / "a"), save(mlp(ONE), tmp_path), threads=1)
    assert [(error.case, error.output) for error in report.outputs] == [("forward 2x9", "y")]
    assert report.tokens == ()
    assert report.within(1e-5)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_must_be_the_same(value: float, tmp_path: Path) -> None:
    broken = mlp(Mesh((2,)))
    broken.weights["B"].array[:, 3] = value
    artifact = broken.write(tmp_path / "a")
    report = verify_against(artifact, save(mlp(ONE), tmp_path))
    assert [error.finite for error in (*report.stitched, *report.outputs)] == [False, False]
    assert not report.within(1e9)
    assert max(error.relative for error in (*report.stitched, *report.outputs)) < 1e-5  # of the rest
    same = mlp(ONE)
    same.weights["B"].array[:, 3] = value
    assert verify_against(artifact, save(same, tmp_path)).within(1e-5)


def test_both_ways_of_running_are_compared(tmp_path: Path) -> None:
    report = verify_against(mlp(Mesh((2,))).write(tmp_path / "a"), save(mlp(ONE), tmp_path))
    assert [(error.case, error.output) for error in report.stitched] == [("forward 2x9", "y")]
    far = OutputDifference(case="c", output="o", absolute=1.0, relative=1.0, mean=1.0, finite=True)
    assert report.within(1e-5)
    assert not dataclasses.replace(report, stitched=(far,)).within(1e-5)
    assert not dataclasses.replace(report, outputs=(far,)).within(1e-5)


def image(mesh: Mesh, dimension: str = "height") -> Spmd:
    """One addition, over a dynamic dimension that is neither batch nor sequence."""
    program = Spmd(mesh)
    program.weight("w", np.ones((4,), dtype=np.float32))
    program.input("pixels", [dimension, 4])
    program.node("Add", ["pixels", "w"], "y")
    program.output("y", [dimension, 4])
    return program


def test_an_encoders_length_has_a_size(tmp_path: Path) -> None:
    artifact = image(Mesh((2,)), "encoder").write(tmp_path / "a")
    assert verify_against(artifact, save(image(ONE, "encoder"), tmp_path)).within(0)


def test_dimensions_without_a_size_are_asked_for(tmp_path: Path) -> None:
    artifact, model = image(Mesh((2,))).write(tmp_path / "a"), save(image(ONE), tmp_path)
    with pytest.raises(UnsupportedError, match=r"input 'pixels' has the dynamic dimensions \['height'\]"):
        verify_against(artifact, model)
    assert verify_against(artifact, model, sizes={"height": 3}).outputs[0].absolute == 0


def test_sizes_of_the_configuration_that_came_with_the_model(tmp_path: Path) -> None:
    program, model = image(Mesh((2,))), save(image(ONE), tmp_path)
    bare = program.write(tmp_path / "bare")
    (bare / "config.json").write_text('{"image_size": 5}')
    with pytest.raises(UnsupportedError, match="has the dynamic dimensions"):
        verify_against(bare, model)  # which lies there, but is not listed
    program.files = {"config.json": b'{"image_size": 5}'}
    assert verify_against(program.write(tmp_path / "listed"), model).outputs[0].absolute == 0
    program.files = {"config.json": b'{"image_size"'}
    with pytest.raises(ArtifactError, match=r"config\.json is not JSON"):
        verify_against(program.write(tmp_path / "malformed"), model)


def test_another_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="give the model that the artifact was built from"):
        verify_against(decoder(tmp_path / "a"), save(mlp(ONE), tmp_path))


def quantized(mesh: Mesh) -> Spmd:
    """A MatMulNBits over columns at accuracy level 4, and a MatMul over rows."""
    rng = np.random.default_rng(0)
    program = mlp(mesh, hidden=64, inner=64)
    del program.weights["A"]
    axes = program.weights["B"].axes
    program.weight("q", rng.integers(0, 256, (64, 2, 16)).astype(np.uint8), Leaf(64, axes), 2, 16)
    program.weight("s", rng.standard_normal((64, 2)).astype(np.float32) / 50, Leaf(64, axes), 2)
    node = onnx.helper.make_node(
        "MatMulNBits",
        ["x", "q", "s"],
        ["h"],
        domain="com.microsoft",
        K=64,
        N=64 // mesh.parts(axes),
        bits=4,
        block_size=32,
        accuracy_level=4,
    )
    program.nodes[0].CopyFrom(node)
    return program


def test_quantized_products_are_compared_without_rounding_activations(tmp_path: Path) -> None:
    report = verify_against(quantized(Mesh((2,))).write(tmp_path / "a"), save(quantized(ONE), tmp_path))
    assert report.accuracy_level_replaced
    assert report.within(1e-5)
    assert json.loads((tmp_path / "a" / "manifest.json").read_bytes())["mesh"] == {"shape": [2]}
