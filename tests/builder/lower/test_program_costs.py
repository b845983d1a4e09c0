"""What whole models cost: two FLOPs a parameter and token, attention by its formula, on one PE or together on all."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import onnx_ir as ir
import pytest

from furiosa_llm.builder.errors import ShapeError
from furiosa_llm.builder.factors.probe import Probes
from furiosa_llm.builder.lower.program_costs import program_costs
from furiosa_llm.builder.options import BuildOptions
from furiosa_llm.builder.pipeline import Analysed, analyse_model
from furiosa_llm.builder.rules.cost import Cost
from furiosa_llm.builder.rules.registry import costs_of
from furiosa_llm.builder.shapes.interface import SizeSet, concrete
from furiosa_llm.builder.shapes.interpreter import Interpreter
from furiosa_llm.runtime.artifact.graphs import COLLECTIVE_DOMAIN


@functools.cache
def analysed(path: Path) -> Analysed:
    return analyse_model(path, BuildOptions())


def step(batch: int, new: int, past: int) -> SizeSet:
    return SizeSet(batch=batch, sequence=new, past=past, encoder=past + new, others=(batch,))


def whole_cost(path: Path, sizes: SizeSet) -> Cost:
    """Of the unsplit model."""
    model = analysed(path)
    return sum(costs(model.model, model.probes, sizes).values(), Cost())


def costs(model: ir.Model, probes: Probes, sizes: SizeSet) -> dict[ir.Node, Cost]:
    facts = Interpreter(model).run_inside(concrete(probes.kinds, sizes))
    return costs_of(model.graph, facts, model.graph.opset_imports[""])


def parameters_touched(config: dict[str, int]) -> int:
    """Elements of the matrices that one token is multiplied with, those of the router and of the head among them."""
    hidden, heads, kv = (config[name] for name in ("hidden_size", "num_attention_heads", "num_key_value_heads"))
    size = config.get("head_dim") or hidden // heads
    experts = config.get("num_experts") or config.get("num_local_experts") or 0
    inner = config.get("moe_intermediate_size") or config["intermediate_size"]
    layer = 2 * hidden * (heads + kv) * size + 3 * hidden * inner * config.get("num_experts_per_tok", 1)
    return config["num_hidden_layers"] * (layer + hidden * experts) + config["vocab_size"] * hidden


def attention_flops(config: dict[str, int], new: int, past: int) -> int:
    """Scores, softmax and values of all layers, for one sequence."""
    heads = config["num_attention_heads"]
    size = config.get("head_dim") or config["hidden_size"] // heads
    return config["num_hidden_layers"] * heads * new * (past + new) * (4 * size + 6)


def excess(path: Path, batch: int, new: int, past: int) -> float:
    """By how much a step takes more FLOPs than the matrices and attention: norms, activations, rotations."""
    config = json.loads((path.parent / "config.json").read_text(encoding="utf-8"))
    expected = 2 * batch * new * parameters_touched(config) + batch * attention_flops(config, new, past)
    return whole_cost(path, step(batch, new, past)).flops / expected - 1


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "phi3", "llama-9-3"])
@pytest.mark.parametrize("sizes", [(1, 1, 15), (3, 1, 15), (2, 8, 8)])
def test_a_small_decoder_takes_two_flops_a_parameter_and_its_attention(
    name: str, sizes: tuple[int, int, int], zoo: Path
) -> None:
    assert 0 < excess(zoo / f"tiny-{name}-optimum" / "model.onnx", *sizes) < 0.02


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "smollm2-135m-optimum-fp32",
        "qwen3-30b-a3b-dynamo-op21-bf16",
    ],
)
def test_a_decoder_of_published_size_takes_two_flops_a_parameter_and_its_attention(name: str, graphs: Path) -> None:
    """Of experts, those that a token goes through."""
    path = graphs / name / "model.onnx"
    most = 0.05 if name.startswith("qwen3") else 0.01  # scales keys, not scores
    assert all(0 < excess(path, *sizes) < most for sizes in ((1, 1, 511), (8, 1, 1500), (1, 128, 256)))


@pytest.mark.parametrize("other", ["dynamo-tf5", "dynamo-op23-tf5", "genai-fp32", "genai-fp16-cuda", "genai-int4"])
def test_exporters_agree_on_what_a_model_takes(other: str, zoo: Path) -> None:
    """Whatever its numbers are packed as."""
    one, two = (whole_cost(zoo / f"tiny-llama-{name}" / "model.onnx", step(1, 1, 15)) for name in ("optimum", other))
    assert one.flops == pytest.approx(two.flops, rel=0.02)


def test_weights_are_read_at_their_width(zoo: Path) -> None:
    single, half, four = (
        whole_cost(zoo / f"tiny-llama-genai-{kind}" / "model.onnx", step(1, 1, 1)).nbytes_read
        for kind in ("fp32", "fp16-cuda", "int4")
    )
    assert half == pytest.approx(single / 2, rel=0.01)
    assert four == pytest.approx(single * (0.5 + 4 / 32) / 4, rel=0.15)  # codes, and a scale for 32; activations whole


@pytest.mark.parametrize(
    ("name", "size", "most"),
    [
        ("tiny-llama-optimum", 4, 1.08),
        ("tiny-llama-optimum", 8, 1.33),  # two key heads and four query heads on eight ranks
        ("tiny-llama-9-3-optimum", 4, 1.08),
        ("tiny-t5-optimum/decoder_with_past_model.onnx", 4, 1.03),
        ("tiny-vit-optimum", 4, 1.34),
        pytest.param("llama-3.1-8b-dynamo-op21-fp16", 8, 1.002, marks=pytest.mark.slow),
    ],
)
def test_ranks_compute_the_model_together(name: str, size: int, most: float, zoo: Path, graphs: Path) -> None:
    path = (zoo if name.startswith("tiny") else graphs) / name
    model = path if path.suffix == ".onnx" else path / "model.onnx"
    build = analysed(model).lowered_for(BuildOptions(tensor_parallel_size=size))
    for sizes in (step(1, 1, 15), step(2, 8, 8)):
        found = program_costs(build, sizes)
        assert {node.domain for node in found}.isdisjoint({COLLECTIVE_DOMAIN})
        together = size * sum(found.values(), Cost()).flops
        assert 1 <= together / whole_cost(model, sizes).flops < most


def test_sizes_that_a_model_does_not_take_are_refused(zoo: Path) -> None:
    build = analysed(zoo / "tiny-gpt2-optimum" / "model.onnx").lowered_for(BuildOptions())
    with pytest.raises(ShapeError, match="does not fit its inputs"):
        program_costs(build, step(1, 0, 0))
