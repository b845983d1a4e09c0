"""Which output becomes which input in the next step."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx

from furiosa_llm.builder import ArtifactBuilder
from furiosa_llm.builder.factors.states import is_rolled
from furiosa_llm.builder.options import BuildOptions
from furiosa_llm.builder.pipeline import analyse_model
from tests.support.builder.graphs import model


def test_of_outputs_alike_that_is_a_state_which_depends_on_fewer_inputs(tmp_path: Path) -> None:
    """The other one, which also depends on a state of another size, comes later in the graph and first in its list."""
    nodes = """
        x = Gather(emb, ids) a = Add(past_a, x) present_a = Tanh(a) b = ReduceSum(past_b) c = Add(present_a, b)
        later = Tanh(c)
    """
    inputs = "int64[1] ids, float[1, 4] past_a, float[1, 3] past_b"
    emb = np.ones((5, 4), np.float32)
    onnx.save(model(inputs, "float[1, 4] later, float[1, 4] present_a", nodes, {"emb": emb}), tmp_path / "model.onnx")
    states = analyse_model(tmp_path / "model.onnx", BuildOptions()).states
    assert [(str(pair.input.name), str(pair.output.name)) for pair in states.pairs] == [("past_a", "present_a")]


def test_caches_that_roll_and_caches_that_are_written_into(tmp_path: Path) -> None:
    """A mask of the places of the first says nothing that the number of positions does."""
    nodes = """
        x = Gather(emb, ids) all = Concat<axis=1>(past_a, x) present_a = Slice(all, one, end, one)
        head = Slice(past_b, none, one, one) tail = Slice(past_b, two, end, one)
        present_b = Concat<axis=1>(head, x, tail)
    """
    inputs = "int64[1, 1] ids, float[1, 4, 4] past_a, float[1, 3, 4] past_b"
    outputs = "float[1, 4, 4] present_a, float[1, 3, 4] present_b"
    numbers = {"none": np.array([0]), "one": np.array([1]), "two": np.array([2]), "end": np.array([2**62])}
    onnx.save(model(inputs, outputs, nodes, {"emb": (5, 4), **numbers}), tmp_path / "model.onnx")
    states = analyse_model(tmp_path / "model.onnx", BuildOptions()).states
    assert {str(pair.input.name): is_rolled(pair) for pair in states.pairs} == {"past_a": True, "past_b": False}


def test_what_enters_a_layer_is_handed_to_the_same_layer(tmp_path: Path) -> None:
    """The last position of it, as RWKV has it: computed from the states of the layers before, and from no own state."""
    layer = """
        before{n} = Slice(x{n}, none, last, one) all{n} = Concat<axis=1>(shift_{n}, before{n})
        mixed{n} = Add(x{n}, all{n}) y{n} = MatMul(mixed{n}, w) x{m} = Add(x{n}, y{n})
        next_{n} = Slice(x{n}, last, end, one)
    """
    nodes = "x0 = Gather(emb, ids) " + "".join(layer.format(n=n, m=n + 1) for n in range(3)) + " y = MatMul(x3, head)"
    inputs = "int64[batch, seq] ids, " + ", ".join(f"float[batch, 1, 16] shift_{n}" for n in (1, 0, 2))
    outputs = "float[batch, seq, 32] y, " + ", ".join(f"float[batch, 1, 16] next_{n}" for n in range(3))
    numbers = {"none": np.array([0]), "one": np.array([1]), "last": np.array([-1]), "end": np.array([2**62])}
    weights = {"emb": (32, 16), "w": (16, 16), "head": (16, 32), **numbers}
    onnx.save(model(inputs, outputs, nodes, weights), tmp_path / "model.onnx")
    report = ArtifactBuilder(tmp_path / "model.onnx", tensor_parallel_size=4).build(tmp_path / "artifact")
    states = analyse_model(tmp_path / "model.onnx", BuildOptions()).states
    pairs = {(str(pair.input.name), str(pair.output.name), pair.named) for pair in states.pairs}
    assert pairs == {(f"shift_{n}", f"next_{n}", True) for n in range(3)}
    assert report.faults == ()
