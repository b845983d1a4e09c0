"""The vendor's mesh rule, row by row of what its own code gave, and refusals whose suggestions are all accepted."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from furiosa_llm.runtime.artifact.errors import FuriosaLLMError
from furiosa_llm.runtime.errors import DeviceError, TopologyError
from furiosa_llm.runtime.placement.devices import PE, format_pes, parse_devices
from furiosa_llm.runtime.placement.topology import RefusedTopologyError, Topology, make_topology

FOUR = "npu:0,npu:1,npu:2,npu:3"
PP_ERROR = "Cannot form a proper pp group"
EIGHTS = "0:0-7", "1:0-7", "2:0-7", "3:0-7"


def drawn(topology: Topology) -> str:
    """`0:0-3>1:0-3 | 0:4-7>1:4-7`: replicas, stages in them."""

    def group(pes: tuple[PE, ...]) -> str:
        assert [pe.npu for pe in pes] == [pes[0].npu] * len(pes)
        assert [pe.index for pe in pes] == list(range(pes[0].index, pes[0].index + len(pes)))
        return f"{pes[0].npu}:{pes[0].index}-{pes[-1].index}"

    return " | ".join(">".join(group(stage) for stage in replica) for replica in topology.replicas)


# Devices; tp, pp, dp; what 2025.1.0 gave, and what 2025.3.4 gave where that is different. Errors begin with `!`.
ORACLE: list[tuple[str, tuple[int, int, int | None], str, str | None]] = [
    ("npu:0", (4, 1, None), "0:0-3 | 0:4-7", None),
    ("npu:0", (8, 1, None), "0:0-7", None),
    ("npu:0:*", (4, 1, 2), "0:0-3 | 0:4-7", None),
    ("npu:0", (4, 2, None), f"!{PP_ERROR}", None),
    ("npu:0,npu:1", (4, 2, None), "0:0-3>1:0-3 | 0:4-7>1:4-7", None),
    ("npu:0,npu:1", (8, 2, None), "0:0-7>1:0-7", None),
    ("npu:0,npu:1", (8, 1, None), "0:0-7 | 1:0-7", None),
    (FOUR, (8, 4, 1), ">".join(EIGHTS), None),
    (FOUR, (4, 2, 4), "0:0-3>1:0-3 | 0:4-7>1:4-7 | 2:0-3>3:0-3 | 2:4-7>3:4-7", None),
    (FOUR, (4, 4, 2), "0:0-3>1:0-3>2:0-3>3:0-3 | 0:4-7>1:4-7>2:4-7>3:4-7", None),
    (FOUR, (8, 2, 2), "0:0-7>1:0-7 | 2:0-7>3:0-7", None),
    (FOUR, (4, 2, 2), "!4 x 2 x 2 = 16, but", "0:0-3>1:0-3 | 0:4-7>1:4-7"),
    ("npu:0,npu:1,npu:2", (8, 2, None), "!8 x 2 x 1 = 16, but", "0:0-7>1:0-7"),
    ("npu:0,npu:1", (16, 1, None), "!Inter-chip TP is not implemented yet", None),
    ("npu:0:0,npu:0:1,npu:0:2,npu:0:3", (4, 1, None), "0:0-3", None),
    ("npu:0:1,npu:0:2,npu:0:3,npu:0:4", (4, 1, None), "!Invalid start pe index for fusion: 1", None),
    ("npu:0:0-3,npu:1:0-3", (4, 2, None), "0:0-3>1:0-3", None),
    ("npu:0:0-3,npu:1:0-3", (8, 1, None), "!Unexpected pe index. Expected: npu:0:4, actual: npu:1:0", None),
    ("npu:0", (3, 1, None), "!Tensor parallelism degree must be 1, 2, 4 or 8, got 3", None),
    ("npu:0:2-5", (4, 1, None), "!Invalid pe index range: 2-5", None),
    ("npu:0:0-2", (4, 1, None), "!Invalid pe index range: 0-2", None),
    ("npu:0:8", (1, 1, None), "!Invalid pe index: 8", None),
    ("npu1", (4, 1, None), "!Invalid device string: 'npu1'", None),
    ("gpu:0", (4, 1, None), "!Invalid device string: 'gpu:0'", None),
    ("", (4, 1, None), "!Invalid device string: ''", None),
    ("cpu", (1, 1, None), "!Invalid device string: 'cpu'", None),
    ("cpu:0,cpu:1", (1, 2, None), "!Invalid device string: 'cpu:0'", None),
    ("cpu", (4, 1, None), "!Invalid device string: 'cpu'", None),
]


@pytest.mark.parametrize("allow_subset", [False, True])
@pytest.mark.parametrize(("devices", "sizes", "strict", "subset"), ORACLE)
def test_the_vendor_s_table(
    devices: str, sizes: tuple[int, int, int | None], strict: str, subset: str | None, allow_subset: bool
) -> None:
    tensor, pipeline, data = sizes
    expected = subset if allow_subset and subset is not None else strict

    def make() -> Topology:
        return make_topology(
            tensor,
            pipeline_parallel_size=pipeline,
            data_parallel_size=data,
            devices=devices,
            allow_subset=allow_subset,
        )

    if expected.startswith("!"):
        with pytest.raises((TopologyError, DeviceError)) as refused:
            make()
        assert str(refused.value).startswith(expected[1:])
        assert isinstance(refused.value, ValueError)
        assert isinstance(refused.value, FuriosaLLMError)
        return
    topology = make()
    assert drawn(topology) == expected
    assert topology.tensor_parallel_size == tensor
    assert topology.pipeline_parallel_size == pipeline
    assert topology.data_parallel_size == len(topology.replicas)
    assert data in (None, topology.data_parallel_size)


def test_too_few_devices() -> None:
    text = "4 x 2 x 2 = 16, but npu:0:0-3,npu:1:0-3 have 8 PEs: use dp=1, pp=1, or --devices npu:0,npu:1"
    for allow_subset, beginning in ((False, ""), (True, "Not enough devices to run the model: ")):
        with pytest.raises(RefusedTopologyError) as refused:
            make_topology(
                4,
                pipeline_parallel_size=2,
                data_parallel_size=2,
                devices="npu:0:0-3,npu:1:0-3",
                allow_subset=allow_subset,
            )
        assert str(refused.value) == beginning + text


@pytest.mark.parametrize("allow_subset", [False, True])
def test_no_replica_at_all(allow_subset: bool) -> None:
    with pytest.raises(RefusedTopologyError, match=r"8 x 1 = 8, but npu:0:0-3 has 4 PEs: use --devices npu:0$"):
        make_topology(8, devices="npu:0:0-3", allow_subset=allow_subset)


@pytest.mark.parametrize(
    ("devices", "sizes", "message"),
    [
        (
            FOUR,
            (4, 2, 2),
            "4 x 2 x 2 = 16, but npu:0,npu:1,npu:2,npu:3 have 32 PEs: use dp=4, pp=4, or --devices npu:0,npu:1",
        ),
        (
            "npu:0,npu:1,npu:2",
            (8, 2, None),
            "8 x 2 x 1 = 16, but npu:0,npu:1,npu:2 have 24 PEs: use pp=1, pp=3, or --devices npu:0,npu:1",
        ),
        (
            "npu:3,npu:5,npu:7",
            (8, 2, 1),
            "8 x 2 x 1 = 16, but npu:3,npu:5,npu:7 have 24 PEs: use pp=3, or --devices npu:3,npu:5",
        ),
        (
            "npu:0",
            (4, 2, None),
            "Cannot form a proper pp group: pp=2 wants each stage on a later card than the one before, but of npu:0 "
            "nothing free is behind npu:0 for stage 1: use pp=1, or --devices npu:0:0-3,npu:1:0-3",
        ),
        (
            "npu:0,npu:1,npu:2",
            (4, 2, 3),
            "Cannot form a proper pp group: pp=2 wants each stage on a later card than the one before, but of "
            "npu:0,npu:1,npu:2 nothing free is behind npu:2 for stage 1: use pp=1 with dp=6, or --devices "
            "npu:0,npu:1,npu:2:0-3,npu:3:0-3",
        ),
        (
            "npu:0:1,npu:0:2,npu:0:3,npu:0:4",
            (4, 1, None),
            "Invalid start pe index for fusion: 1, but 4 PEs work as one from a multiple of 4 on, and "
            "npu:0:1,npu:0:2-3,npu:0:4 begin at npu:0:1: use --devices npu:0:0-3",
        ),
    ],
)
def test_refusals_in_full(devices: str, sizes: tuple[int, int, int | None], message: str) -> None:
    with pytest.raises(RefusedTopologyError) as refused:
        make_topology(sizes[0], pipeline_parallel_size=sizes[1], data_parallel_size=sizes[2], devices=devices)
    assert str(refused.value) == message


def test_no_more_stages_are_suggested_than_blocks() -> None:
    with pytest.raises(RefusedTopologyError) as refused:
        make_topology(4, pipeline_parallel_size=2, data_parallel_size=2, devices=FOUR, max_pipeline_parallel_size=3)
    assert "use dp=4, or --devices npu:0,npu:1" in str(refused.value)


@pytest.mark.parametrize(
    ("sizes", "machine"),
    [
        ((4, None, None), "0:0-3"),
        ((8, None, None), "0:0-7"),
        ((4, None, 3), "0:0-3 | 0:4-7 | 1:0-3"),
        ((4, 2, None), "0:0-3>1:0-3"),
        ((4, 2, 2), "0:0-3>1:0-3 | 0:4-7>1:4-7"),
        ((4, 2, 3), "0:0-3>1:0-3 | 0:4-7>1:4-7 | 2:0-3>3:0-3"),
        ((8, 2, 2), "0:0-7>1:0-7 | 2:0-7>3:0-7"),
        ((8, 4, 1), ">".join(EIGHTS)),
    ],
)
def test_the_machine_that_the_sizes_need(sizes: tuple[int, int | None, int | None], machine: str) -> None:
    tensor, pipeline, data = sizes
    topology = make_topology(tensor, pipeline_parallel_size=pipeline, data_parallel_size=data)
    assert drawn(topology) == machine


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((0, None, None), "Tensor parallelism degree must be 1, 2, 4 or 8, got 0"),
        ((-8, None, None), "Tensor parallelism degree must be 1, 2, 4 or 8, got -8"),
        ((4, 0, None), "pipeline_parallel_size must be at least 1, got 0"),
        ((4, None, 0), "data_parallel_size must be at least 1, got 0"),
        ((4, None, -2), "data_parallel_size must be at least 1, got -2"),
        ((4, 2000, None), "4 x 2000 x 1 PEs are more than the 1024 cards that can be simulated"),
        ((8, 2, 10**12), "are more than the 1024 cards that can be simulated"),
    ],
)
def test_sizes_that_are_none(sizes: tuple[int, int | None, int | None], message: str) -> None:
    with pytest.raises(TopologyError) as refused:
        make_topology(sizes[0], pipeline_parallel_size=sizes[1], data_parallel_size=sizes[2])
    assert message in str(refused.value)


RUNS = ["npu:{}", "npu:{}:0-3", "npu:{}:4-7", "npu:{}:0-1", "npu:{}:2", "npu:{}:2,npu:{}:3,npu:{}:4,npu:{}:5"]
MACHINES = st.lists(
    st.tuples(st.integers(0, 5), st.sampled_from(RUNS)), min_size=1, max_size=5, unique_by=lambda c: c[0]
)


@settings(max_examples=100)
@given(
    cards=st.one_of(MACHINES, st.integers(1, 4).map(lambda n: [(npu, "npu:{}") for npu in range(n)])),
    tensor=st.sampled_from([1, 2, 4, 8]),
    pipeline=st.one_of(st.none(), st.integers(1, 4)),
    data=st.one_of(st.none(), st.integers(1, 5)),
    allow_subset=st.booleans(),
)
def test_what_holds_on_any_machine(
    cards: list[tuple[int, str]], tensor: int, pipeline: int | None, data: int | None, allow_subset: bool
) -> None:
    devices = [run.replace("{}", str(npu)) for npu, run in cards]
    given_pes = parse_devices(devices)
    try:
        topology = make_topology(
            tensor,
            pipeline_parallel_size=pipeline,
            data_parallel_size=data,
            devices=devices,
            allow_subset=allow_subset,
        )
    except RefusedTopologyError as refusal:
        _check_suggestions(refusal, tensor, (pipeline or 1, data, given_pes), allow_subset)
        return
    assert topology.pipeline_parallel_size == (pipeline or 1)
    assert topology.data_parallel_size >= 1
    assert data in (None, topology.data_parallel_size)
    product = tensor * topology.pipeline_parallel_size * topology.data_parallel_size
    assert topology.pes == given_pes[:product]
    assert len(set(topology.pes)) == product
    assert allow_subset or product == len(given_pes)
    assert len(topology.replicas) == topology.data_parallel_size
    for replica in topology.replicas:
        assert len(replica) == topology.pipeline_parallel_size
        assert all(before[-1].npu < behind[0].npu for before, behind in pairwise(replica))
        for group in replica:
            assert group[0].index % tensor == 0
            assert group == tuple(PE(npu=group[0].npu, index=group[0].index + rank) for rank in range(tensor))


def _check_suggestions(
    refusal: RefusedTopologyError, tensor: int, asked: tuple[int, int | None, tuple[PE, ...]], allow_subset: bool
) -> None:
    assert refusal.choices
    for choice in refusal.choices:
        assert choice.text in str(refusal)
        accepted = make_topology(
            tensor,
            pipeline_parallel_size=choice.pipeline_parallel_size,
            data_parallel_size=choice.data_parallel_size,
            devices=choice.devices,
            allow_subset=allow_subset,
        )
        pipeline, data, pes = asked
        changed = []
        if choice.pipeline_parallel_size != pipeline:
            changed.append(f"pp={accepted.pipeline_parallel_size}")
        if choice.data_parallel_size != data:
            changed.append(f"dp={accepted.data_parallel_size}")
        if choice.devices != format_pes(pes):
            changed.append(f"--devices {choice.devices}")
        assert choice.text == " with ".join(changed)


@given(
    tensor=st.sampled_from([1, 2, 4, 8]),
    pipeline=st.integers(1, 6),
    data=st.integers(1, 20),
)
def test_the_made_machine_is_accepted_and_no_larger_than_needed(tensor: int, pipeline: int, data: int) -> None:
    assume(pipeline * -(-tensor * data // 8) <= 40)
    topology = make_topology(tensor, pipeline_parallel_size=pipeline, data_parallel_size=data)
    assert len(topology.pes) == tensor * pipeline * data
    assert len({pe.npu for pe in topology.pes}) == pipeline * -(-tensor * data // 8)
    again = make_topology(
        tensor, pipeline_parallel_size=pipeline, data_parallel_size=data, devices=format_pes(topology.pes)
    )
    assert again == topology
