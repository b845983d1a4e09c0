"""The program as an engine runs it: which logits it makes, and where rows may be of unequal lengths."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import ModelProto, NodeProto, helper

from furiosa_llm.runtime.artifact.layout import Mesh
from furiosa_llm.runtime.artifact.manifest import StateMode
from furiosa_llm.runtime.artifact.reader import Artifact, open_artifact
from furiosa_llm.runtime.errors import ExecutionError, KernelError, StepTimeoutError
from furiosa_llm.runtime.execution.graph_parts import rows_are_alone
from furiosa_llm.runtime.placement.stages import choose_stages
from furiosa_llm.runtime.program import limits
from furiosa_llm.runtime.program.serving_graph import (
    LAST_POSITIONS,
    WANTED,
    ServingGraph,
    serving_graph,
)
from furiosa_llm.runtime.runners.loaded_model import load_model
from tests.support.runtime.models import LlamaSize, llama
from tests.support.runtime.spmd import Spmd

MESH = Mesh((2,))
SIZE = LlamaSize(layers=1, max_length=64)

# -- logits of wanted positions ------------------------------------------------------------------------------------


def served(program: Spmd, folder: Path) -> tuple[Artifact, ServingGraph]:
    artifact = open_artifact(program.write(folder))
    return artifact, serving_graph(artifact.program, artifact.manifest)


def end_with(program: Spmd, change: Callable[[Spmd], None]) -> Spmd:
    """A decoder with other nodes behind its last product; `change` adds them between `logits_part` and `behind`."""
    product = next(node for node in program.nodes if node.output[0] == "logits_part")
    product.output[0] = "product"
    gather = program.nodes.pop()
    change(program)
    program.nodes.append(gather)
    return program


def softcap(program: Spmd) -> None:
    program.constant("cap", np.array(30, dtype=np.float32))
    program.node("Div", ["product", "cap"], "divided")
    program.node("Tanh", ["divided"], "bent")
    program.node("Mul", ["bent", "cap"], "logits_part")


def normalized(program: Spmd) -> None:
    program.node("Softmax", ["product"], "logits_part", axis=1)


def read_twice(program: Spmd) -> None:
    program.node("Neg", ["product"], "minus")
    program.node("Sub", ["product", "minus"], "logits_part")


def read_elsewhere(program: Spmd) -> None:
    untouched(program)
    program.node("ReduceMean", ["product"], "mean", keepdims=0)
    program.output("mean", [])


def scaled_by_another_value(program: Spmd) -> None:
    program.node("Cast", ["total32"], "total.float", to=1)
    program.node("Mul", ["product", "total.float"], "logits_part")


def untouched(program: Spmd) -> None:
    program.node("Identity", ["product"], "logits_part")


@pytest.mark.parametrize(
    ("change", "selects"),
    [
        (untouched, True),
        (softcap, True),
        (normalized, False),
        (read_twice, False),
        (read_elsewhere, False),
        (scaled_by_another_value, False),
    ],
)
def test_positions_are_chosen_in_front_of_the_last_product(
    change: Callable[[Spmd], None], selects: bool, tmp_path: Path
) -> None:
    artifact, serving = served(end_with(llama(MESH, SIZE), change), tmp_path)
    assert serving.selects is selects
    inputs = {value.name for value in serving.model.graph.input}
    assert (WANTED in inputs) is selects
    (product,) = [node for node in serving.model.graph.node if node.output[0] == "product"]
    chosen = [node for node in serving.model.graph.node if WANTED in node.input]
    if not selects:
        assert chosen == []
        return
    assert [(node.op_type, node.attribute[0].i) for node in chosen] == [("Gather", 1)]
    assert list(product.input) == [chosen[0].output[0], "head"]
    shapes = {v.name: [d.dim_param for d in v.type.tensor_type.shape.dim][:2] for v in serving.model.graph.value_info}
    shapes |= {v.name: [d.dim_param for d in v.type.tensor_type.shape.dim][:2] for v in serving.model.graph.output}
    assert shapes["logits_part"] == shapes["logits"] == ["", "wanted"]
    assert shapes["layer0.mlp.sum"] == ["batch", "sequence"]
    assert WANTED not in {value.name for value in artifact.program.graph.input}


def with_product(program: Spmd, **attributes: Any) -> Spmd:
    product = next(node for node in program.nodes if node.output[0] == "logits_part")
    product.op_type, product.domain = "FusedMatMul", "com.microsoft"
    product.attribute.extend(helper.make_attribute(name, value) for name, value in attributes.items())
    return program


def test_a_product_that_turns_its_operand_keeps_all_positions(tmp_path: Path) -> None:
    assert served(with_product(llama(MESH, SIZE), alpha=2.0, transB=0), tmp_path / "a")[1].selects
    assert not served(with_product(llama(MESH, SIZE), transA=1), tmp_path / "b")[1].selects


# -- rows of unequal lengths ---------------------------------------------------------------------------------------


def attention_of(program: Spmd | ModelProto) -> NodeProto:
    nodes = program.nodes if isinstance(program, Spmd) else program.graph.node
    (node,) = [node for node in nodes if node.op_type == "GroupQueryAttention"]
    return node


def insert(program: Spmd, nodes: Sequence[NodeProto]) -> None:
    """Puts `nodes` in front of attention."""
    at = program.nodes.index(attention_of(program))
    program.nodes[at:at] = nodes


def test_attention_is_told_each_rows_last_position(tmp_path: Path) -> None:
    _, serving = served(llama(MESH, SIZE), tmp_path)
    assert (serving.ragged, serving.biases) == (True, ())
    node = attention_of(serving.model)
    assert list(node.input[5:7]) == [LAST_POSITIONS, "total32"]
    made = {name for one in serving.model.graph.node for name in one.output}
    # What only made the lengths is gone; the length of the longest row is still told.
    assert {"mask_sum", "seqlens"}.isdisjoint(made)
    assert "total32" in made


def test_ragged_rows_can_be_declined(tmp_path: Path) -> None:
    artifact = open_artifact(llama(MESH, SIZE).write(tmp_path))
    before = artifact.program.SerializeToString()
    serving = serving_graph(artifact.program, artifact.manifest, ragged=False)
    assert not serving.ragged
    assert attention_of(serving.model).input[5] == "seqlens"
    assert serving_graph(artifact.program, artifact.manifest).ragged
    assert artifact.program.SerializeToString() == before


def appended(program: Spmd) -> None:
    program.states[:] = [dataclasses.replace(state, mode="append") for state in program.states]


def length_in_the_logits(program: Spmd) -> None:
    end_with(program, scaled_by_another_value)


def length_behind_the_last_collective(program: Spmd) -> None:
    program.nodes[-1].output[0] = "gathered"
    program.declare("gathered", ["batch", "sequence", SIZE.vocab])
    program.node("Cast", ["total32"], "total.float", to=1)
    program.node("Mul", ["gathered", "total.float"], "logits")


def length_in_the_query(program: Spmd) -> None:
    node = attention_of(program)
    program_nodes = [
        helper.make_node("Cast", ["total32"], ["total.float"], to=1),
        helper.make_node("Mul", [node.input[0], "total.float"], ["scaled"]),
    ]
    insert(program, program_nodes)
    node.input[0] = "scaled"


def size_of_the_cache_in_the_query(program: Spmd) -> None:
    node = attention_of(program)
    insert(
        program,
        [
            helper.make_node("Shape", ["past.0.key"], ["past.shape"], start=2, end=3),
            helper.make_node("Cast", ["past.shape"], ["past.float"], to=1),
            helper.make_node("Mul", [node.input[0], "past.float"], ["scaled"]),
        ],
    )
    node.input[0] = "scaled"


def heads_of_the_cache_in_the_query(program: Spmd) -> None:
    size_of_the_cache_in_the_query(program)
    (shape,) = [node for node in program.nodes if node.output[0] == "past.shape"]
    shape.attribute[0].i, shape.attribute[1].i = 1, 2


@pytest.mark.parametrize(
    ("change", "ragged"),
    [
        (appended, False),
        (length_in_the_logits, False),
        (length_behind_the_last_collective, False),
        (length_in_the_query, False),
        (size_of_the_cache_in_the_query, False),
        (heads_of_the_cache_in_the_query, True),
    ],
)
def test_the_length_of_the_longest_row_matters_nowhere_else(
    change: Callable[[Spmd], None], ragged: bool, tmp_path: Path
) -> None:
    program = llama(MESH, SIZE)
    change(program)
    assert served(program, tmp_path)[1].ragged is ragged


# -- the bias of each row ------------------------------------------------------------------------------------------

LOWEST = np.float32(-1e30)


def biased(nodes: Sequence[NodeProto], mode: StateMode = "in_place") -> Spmd:
    """A decoder whose attention adds `bias` to its scores; it has `places`, the numbers of all cached positions."""
    program = llama(MESH, SIZE, mode)
    constants: dict[str, Any] = {
        "none": np.array(0, dtype=np.int64),
        "step": np.array(1, dtype=np.int64),
        "dims": np.array([0, 1, 2], dtype=np.int64),
        "lowest": LOWEST,
        "nothing": np.float32(0),
        "slope": np.float32(0.25),
        "window": np.array(8, dtype=np.int64),
        "middle_dims": np.array([1, 2], dtype=np.int64),
    }
    for name, value in constants.items():
        program.constant(name, np.asarray(value))
    places = [
        helper.make_node("Cast", ["total_length"], ["total64"], to=7),
        helper.make_node("Range", ["none", "total64", "step"], ["places"]),
    ]
    insert(program, [*places, *nodes])
    attention_of(program).input.extend(["", "bias"])
    return program


def by_condition() -> list[NodeProto]:
    """A bias of `slope` where `seen` is true and of the lowest number elsewhere."""
    return [
        helper.make_node("Where", ["seen", "slope", "lowest"], ["flat"]),
        helper.make_node("Unsqueeze", ["flat", "dims"], ["bias"]),
    ]


def masked() -> list[NodeProto]:
    return [
        helper.make_node("Equal", ["attention_mask", "none"], ["hidden"]),
        helper.make_node("Where", ["hidden", "lowest", "nothing"], ["flat"]),
        helper.make_node("Unsqueeze", ["flat", "middle_dims"], ["bias"]),
    ]


def from_the_start() -> list[NodeProto]:
    return [
        helper.make_node("Cast", ["places"], ["places.float"], to=1),
        helper.make_node("Mul", ["places.float", "slope"], ["flat"]),
        helper.make_node("Unsqueeze", ["flat", "dims"], ["bias"]),
    ]


def from_a_table() -> list[NodeProto]:
    """For as many places as the table has, which are fewer than are asked for."""
    return [
        helper.make_node("Constant", [], ["table"], value_floats=[0.25 * i for i in range(40)]),
        helper.make_node("Constant", [], ["start"], value_ints=[0]),
        helper.make_node("Unsqueeze", ["total64", "start"], ["end"]),
        helper.make_node("Slice", ["table", "start", "end"], ["first"]),
        helper.make_node("Cast", ["places"], ["places.float"], to=1),
        helper.make_node("Mul", ["places.float", "first"], ["flat"]),
        helper.make_node("Unsqueeze", ["flat", "dims"], ["bias"]),
    ]


def window_from_the_end() -> list[NodeProto]:
    return [
        helper.make_node("Sub", ["total64", "window"], ["begin"]),
        helper.make_node("GreaterOrEqual", ["places", "begin"], ["seen"]),
        *by_condition(),
    ]


def window_of_each_row() -> list[NodeProto]:
    """The same window, counted from the end that the mask gives for each row."""
    return [
        helper.make_node("ReduceSum", ["attention_mask", "one"], ["lengths"], keepdims=1),
        helper.make_node("Sub", ["lengths", "window"], ["begin"]),
        helper.make_node("GreaterOrEqual", ["places", "begin"], ["seen"]),
        helper.make_node("Where", ["seen", "slope", "lowest"], ["flat"]),
        helper.make_node("Unsqueeze", ["flat", "middle_dims"], ["bias"]),
    ]


def distance_to_the_end() -> list[NodeProto]:
    return [
        helper.make_node("Sub", ["places", "total64"], ["distance"]),
        helper.make_node("Cast", ["distance"], ["distance.float"], to=1),
        helper.make_node("Mul", ["distance.float", "slope"], ["flat"]),
        helper.make_node("Unsqueeze", ["flat", "dims"], ["bias"]),
    ]


def mark_on_the_last() -> list[NodeProto]:
    return [
        helper.make_node("Sub", ["total64", "step"], ["end"]),
        helper.make_node("Equal", ["places", "end"], ["seen"]),
        helper.make_node("Where", ["seen", "slope", "nothing"], ["flat"]),
        helper.make_node("Unsqueeze", ["flat", "dims"], ["bias"]),
    ]


@pytest.mark.parametrize(
    ("nodes", "alone"),
    [
        (masked, True),
        (from_the_start, True),
        (from_a_table, True),
        (window_of_each_row, True),
        (window_from_the_end, False),
        (distance_to_the_end, False),
        (mark_on_the_last, False),
    ],
)
def test_what_is_added_to_scores_is_each_rows_own(
    nodes: Callable[[], list[NodeProto]], alone: bool, tmp_path: Path
) -> None:
    artifact, serving = served(biased(nodes()), tmp_path)
    assert (serving.ragged, serving.biases) == (True, ("bias",))
    assert rows_are_alone(serving, artifact, longest=SIZE.max_length) is alone
    traits = load_model(artifact, choose_stages(artifact), lanes=1, threads=1).traits
    assert traits.rows == ("ragged" if alone else "equal")


def test_a_window_that_no_row_is_longer_than_does_no_harm(tmp_path: Path) -> None:
    artifact, serving = served(biased(window_from_the_end()), tmp_path)
    assert rows_are_alone(serving, artifact, longest=8)
    assert not rows_are_alone(serving, artifact, longest=9)


def test_a_bias_that_ranks_exchange_is_not_judged(tmp_path: Path) -> None:
    """What the ranks add up has no value on rank 0 alone."""
    program = biased([])
    program.constant("ones", np.ones((1, 1, 1, 1), dtype=np.float32))
    program.all_reduce("ones", "bias", (0,), [1, 1, 1, 1])
    reduce = program.nodes.pop()
    program.collectives.insert(0, program.collectives.pop())
    insert(program, [reduce])
    artifact, serving = served(program, tmp_path)
    assert serving.biases == ("bias",)
    assert not rows_are_alone(serving, artifact, longest=SIZE.max_length)


def endless() -> list[NodeProto]:
    """A bias behind a Loop that never ends."""
    flags = [helper.make_tensor_value_info(name, 9, []) for name in ("go", "on")]
    values = [helper.make_tensor_value_info(name, 1, None) for name in ("before", "after")]
    turn = helper.make_tensor_value_info("turn", 7, [])
    body = [helper.make_node("Identity", [a], [b]) for a, b in (("go", "on"), ("before", "after"))]
    graph = helper.make_graph(body, "body", [turn, flags[0], values[0]], [flags[1], values[1]])
    first, *others = from_the_start()
    return [
        first,
        helper.make_node("Equal", ["none", "none"], ["true"]),
        helper.make_node("Loop", ["", "true", "places.float"], ["looped"], body=graph),
        helper.make_node("Mul", ["looped", "slope"], ["flat"]),
        others[-1],
    ]


def test_a_bias_that_is_never_made_ends_the_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    artifact, serving = served(biased(endless()), tmp_path)
    monkeypatch.setattr(limits, "STEP_SECONDS", 0.2)
    with pytest.raises(StepTimeoutError, match="a run was not done within"):
        rows_are_alone(serving, artifact, longest=8)


def test_a_bias_that_takes_all_memory(tmp_path: Path) -> None:
    many = helper.make_node("ConstantOfShape", ["huge"], ["much"])
    program = biased([many, helper.make_node("Expand", ["slope", "huge"], ["bias"])])
    program.constant("huge", np.array([1, 1, 2**20, 2**20], dtype=np.int64))
    artifact, serving = served(program, tmp_path)
    with pytest.raises(ExecutionError, match="cannot run the part before the first collective that makes 'bias' in"):
        rows_are_alone(serving, artifact, longest=2)


@pytest.mark.parametrize(
    ("domain", "op", "said"),
    [
        (
            "foreign",
            "Cast",
            r"no operator 'Cast' of the domain 'foreign' \(node 'n'\), which the part before the first",
        ),
        (
            "",
            "NoSuchOp",
            r"no operator 'NoSuchOp' of the domain 'ai.onnx' \(node 'n'\), which the part before the first",
        ),
    ],
)
def test_a_bias_by_a_foreign_operator(domain: str, op: str, said: str, tmp_path: Path) -> None:
    artifact, serving = served(biased(from_the_start()), tmp_path)
    node = next(node for node in serving.model.graph.node if node.output[0] == "places.float")
    node.domain, node.op_type, node.name = domain, op, "n"
    serving.model.opset_import.add(domain=domain, version=1)
    with pytest.raises(KernelError, match=said):
        rows_are_alone(serving, artifact, longest=8)
