"""Which output becomes which input in the next step."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx

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
