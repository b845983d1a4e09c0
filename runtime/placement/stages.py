"""Cuts an artifact's blocks into pipeline stages: so that the slowest is as fast as possible, or as the user says."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from furiosa_llm.runtime.artifact.reader import Artifact, SplitModel
from furiosa_llm.runtime.errors import InputError, TopologyError
from furiosa_llm.runtime.placement.block_reads import BlockReads, read_blocks


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """A run of blocks that one group of PEs computes: the nodes [`first_node`, `stop_node`) of program.onnx.

    Bytes are of one PE. A tensor that two stages read is kept in both.
    """

    index: int
    """The stage's number, counted from 0."""
    first_block: int
    num_blocks: int
    first_node: int
    stop_node: int
    cost_nbytes: int
    """The bytes of stored tensors that one decoded token reads; stages are balanced by it."""
    weight_nbytes: int
    """The bytes of stored tensors that are kept in memory, embedding tables included."""


def choose_stages(
    model: SplitModel,
    *,
    pipeline_parallel_size: int | None = None,
    num_blocks_per_pp_stage: Sequence[int] | None = None,
) -> tuple[Stage, ...]:
    """The stages of `model`: `pipeline_parallel_size` of them, or with the blocks that `num_blocks_per_pp_stage` gives.

    The largest `cost_nbytes` of a stage is as small as possible, and costs are as even as that allows. With neither
    argument there is one stage. Raises TopologyError if both are given, or do not fit the artifact's blocks.
    """
    return divide_blocks(
        read_blocks(model),
        pipeline_parallel_size=pipeline_parallel_size,
        num_blocks_per_pp_stage=num_blocks_per_pp_stage,
    )


def divide_blocks(
    blocks: Sequence[BlockReads],
    *,
    pipeline_parallel_size: int | None = None,
    num_blocks_per_pp_stage: Sequence[int] | None = None,
) -> tuple[Stage, ...]:
    """As `choose_stages`, for a model that has `blocks`."""
    costs = [sum(block.decoded.values()) for block in blocks]
    if num_blocks_per_pp_stage is not None:
        counts = _block_counts(num_blocks_per_pp_stage)
        _check_counts(counts, len(costs), pipeline_parallel_size)
    else:
        stages = 1 if pipeline_parallel_size is None else pipeline_parallel_size
        _check_stages(stages, len(costs))
        counts = balance(costs, stages)
    return tuple(
        Stage(
            index=index,
            first_block=first,
            num_blocks=stop - first,
            first_node=blocks[first].first_node,
            stop_node=blocks[stop - 1].stop_node,
            cost_nbytes=sum(costs[first:stop]),
            weight_nbytes=sum({name: n for block in blocks[first:stop] for name, n in block.kept.items()}.values()),
        )
        for index, (first, stop) in enumerate(pairwise(accumulate(counts, initial=0)))
    )


def balance(costs: Sequence[int], stages: int) -> tuple[int, ...]:
    """How many consecutive blocks each of `stages` stages gets, at least one; `costs` are the blocks' costs.

    The largest cost of a stage is minimal; among such cuts the sum of squares of the stages' costs is minimal (least
    where they are most even), and then the sum of squares of block counts.
    """
    sums = [0, *accumulate(costs)]
    limit = _least_limit(costs, stages)
    # best[i]: of the cuts of the first i blocks into so many stages, the one with the least squares.
    best: list[tuple[int, int, tuple[int, ...]] | None] = [(0, 0, ()), *([None] * len(costs))]
    for _ in range(stages):
        longer: list[tuple[int, int, tuple[int, ...]] | None] = [None] * (len(costs) + 1)
        for stop in range(1, len(costs) + 1):
            options = [
                (
                    before[0] + (sums[stop] - sums[start]) ** 2,
                    before[1] + (stop - start) ** 2,
                    (*before[2], stop - start),
                )
                for start in range(bisect_left(sums, sums[stop] - limit), stop)
                if (before := best[start]) is not None
            ]
            longer[stop] = min(options, default=None)
        best = longer
    found = best[-1]
    assert found is not None  # the limit can be kept
    return found[2]


def _least_limit(costs: Sequence[int], stages: int) -> int:
    """The least that the largest of `stages` stages can cost."""
    return bisect_left(range(sum(costs)), True, lo=max(costs), key=lambda limit: _num_stages(costs, limit) <= stages)


def _num_stages(costs: Sequence[int], limit: int) -> int:
    """How many stages are needed if each costs at most `limit`."""
    count, left = 0, -1
    for cost in costs:
        if cost > left:
            count, left = count + 1, limit
        left -= cost
    return count


def _check_stages(stages: int, blocks: int) -> None:
    if stages < 1:
        raise TopologyError(f"pipeline_parallel_size must be at least 1, got {stages}")
    if stages > blocks == 1:
        raise TopologyError(
            f"pp={stages}, but the artifact is one block: its program has no place where a stage could begin; use pp=1"
        )
    if stages > blocks:
        raise TopologyError(
            f"pp={stages}, but the artifact has {blocks} blocks and a stage is one or more; use at most that"
        )


def _block_counts(given: object) -> tuple[int, ...]:
    if not isinstance(given, Sequence) or not all(
        isinstance(count, int) and not isinstance(count, bool) for count in given
    ):
        raise TopologyError(f"num_blocks_per_pp_stage is a list of integers such as [10, 20], got {given!r:.80}")
    return tuple(given)


def _check_counts(counts: Sequence[int], blocks: int, stages: int | None) -> None:
    if stages is not None:
        raise TopologyError(
            "Only one of `pipeline_parallel_size` or `num_blocks_per_pp_stage` should be given as input, not both: got "
            f"pp={stages} and {len(counts)} stages of {list(counts)} blocks; leave one out"
        )
    if not counts or min(counts) < 1:
        raise TopologyError(f"num_blocks_per_pp_stage is one positive number for each stage, got {list(counts)}")
    if sum(counts) != blocks:
        raise TopologyError(
            f"num_blocks_per_pp_stage {list(counts)} has {sum(counts)} blocks in all, but the artifact has {blocks}; "
            f"give numbers that add up to {blocks}"
        )


def check_tensor_parallel_size(artifact: Artifact, wanted: int | None) -> None:
    """Raises InputError if `artifact` is split for another tensor parallel size than `wanted`, if one is."""
    size = artifact.manifest.mesh.size
    if wanted not in (None, size):
        raise InputError(
            f"tensor_parallel_size={wanted}, but {artifact.folder} is split for tp={size}; leave it out, or make the "
            f"other artifact: furiosa-llm reshard -tp {wanted}"
        )
