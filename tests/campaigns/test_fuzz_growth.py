"""A share of the campaign of growing graphs, by counting lines: the time of a small graph tells nothing."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
from onnx import helper

from furiosa_llm.builder import plan_model
from furiosa_llm.builder.errors import UnsupportedModelError
from furiosa_llm.builder.source.validate_nodes import MAX_INPUTS
from tests.campaigns.fuzz_growth import count_lines
from tests.support.builder.growing import KINDS, chain

ONCE_QUADRATIC = ("products_of_one_input", "states", "one_name", "nested_functions")
SMALL, LARGE = 50, 200


@pytest.mark.slow
@pytest.mark.parametrize("kind", ONCE_QUADRATIC)
def test_work_grows_with_the_graph(kind: str, tmp_path: Path) -> None:
    """What every build does, whatever its size, counts for none of it: the least one is taken off."""
    least = count_lines("chain", 1, tmp_path)
    small, large = (count_lines(kind, size, tmp_path) - least for size in (SMALL, LARGE))
    assert large / small <= LARGE / SMALL


def test_kinds_are_models() -> None:
    """The campaign's graphs are what they are called, but for the one whose nodes stand the other way round."""
    for kind in KINDS.values():
        if kind.__name__ != "backwards":
            onnx.checker.check_model(kind(24))


def test_a_node_has_a_limit_of_inputs(tmp_path: Path) -> None:
    proto = chain(1)
    proto.graph.node[0].CopyFrom(helper.make_node("Sum", ["x"] * (MAX_INPUTS + 1), ["y"], name="all"))
    onnx.save(proto, tmp_path / "model.onnx")
    with pytest.raises(UnsupportedModelError, match='node Sum "all" has 4097 inputs, expected at most 4096; combine'):
        plan_model(tmp_path / "model.onnx")
