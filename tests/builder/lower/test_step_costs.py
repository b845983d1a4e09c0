"""The costs of steps as polynomials, against the costs of ops at other sizes, and against what models are known for."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest

from furiosa_llm.builder.lower.build import Build
from furiosa_llm.builder.lower.program_costs import program_costs
from furiosa_llm.builder.lower.step_costs import StepCosts, step_costs
from furiosa_llm.builder.options import BuildOptions
from furiosa_llm.builder.pipeline import analyse_model
from furiosa_llm.builder.rules.cost import Cost
from furiosa_llm.builder.shapes.interface import SizeSet


@functools.cache
def lowered(path: Path, size: int) -> Build:
    analysed = analyse_model(path / "model.onnx", BuildOptions())
    return analysed.lowered_for(BuildOptions(tensor_parallel_size=size))


def costs_of(build: Build) -> StepCosts:
    found = step_costs(build)
    assert found is not None
    return found


@pytest.mark.parametrize("name", ["tiny-llama-genai-fp32", "tiny-gpt2-optimum", "tiny-mixtral-dynamo-tf5"])
def test_flops_are_those_of_the_ops(name: str, zoo: Path) -> None:
    build = lowered(zoo / name, 4)
    found = costs_of(build)
    batch, new, past = 4, 16, 40
    ops = sum(
        program_costs(build, SizeSet(batch=batch, sequence=new, past=past, encoder=past, others=(batch,))).values(),
        Cost(),
    ).flops
    pairs = sum(a.flops_per_pair for a in found.attention) * batch * new * (past + new)
    said = (found.flops_per_token + found.flops_per_row) * batch * new + pairs
    assert said == pytest.approx(ops, rel=0.01)
    assert found.residual < 0.001


def test_the_head_is_one_product(zoo: Path) -> None:
    for name in ("tiny-llama-genai-fp32", "tiny-gpt2-optimum"):
        found = costs_of(lowered(zoo / name, 4))
        head = sum(w.nbytes for w in found.weights if w.part == "head" and w.floating)
        assert found.flops_per_row == pytest.approx(2 * head / 4)  # float32
        assert [t.kind for t in found.traffic if t.head] == ["AllGather"]


def test_experts_are_read_by_their_share(zoo: Path) -> None:
    found = costs_of(lowered(zoo / "tiny-mixtral-dynamo-tf5", 4))
    experts = [w for w in found.weights if w.part == "block" and w.share == 0.5]  # two of four
    layers, matrices, hidden, inner, ranks = 2, 3, 64, 176, 4
    assert sum(w.nbytes for w in experts) == layers * 4 * matrices * hidden * inner // ranks * 4
    assert found.activation_nbytes_per_token < 64 * 1024  # their weights are not among what is handed on


@pytest.mark.slow
def test_windows_of_attention_are_found(graphs: Path) -> None:
    one = costs_of(lowered(graphs / "gemma-2-9b-genai-bf16-cuda", 8))
    assert sorted(a.window or 0 for a in one.attention) == [0, 4096]


def test_a_model_without_steps_has_no_costs_of_a_cache(zoo: Path) -> None:
    found = step_costs(lowered(zoo / "tiny-vit-optimum", 4))
    assert found is None or (found.state_nbytes_per_position == 0 and found.attention == ())
