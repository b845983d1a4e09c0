"""What lies in the memory of PEs and cards: weights, KV cache and activations of every stage, and how many pages fit.

Everything follows from manifest and program, and nothing is measured: it is the simulated cards' memory, not the
host's. The PEs of a card share its memory, so replicas on one card keep each shard once; replicas on different cards
keep a copy each. Each replica has its own KV caches and activations.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from furiosa_llm.runtime.artifact.card import PE_NBYTES
from furiosa_llm.runtime.artifact.dimensions import known_sizes, parse_dimension, shape_of
from furiosa_llm.runtime.artifact.graphs import used_names
from furiosa_llm.runtime.artifact.reader import SplitModel
from furiosa_llm.runtime.artifact.units import nbytes as shown
from furiosa_llm.runtime.errors import CapacityError
from furiosa_llm.runtime.execution.memory import Lifetime, array_nbytes, padded, place
from furiosa_llm.runtime.placement.block_reads import BlockReads, read_blocks
from furiosa_llm.runtime.placement.stages import Stage, divide_blocks
from furiosa_llm.runtime.placement.topology import Topology
from furiosa_llm.runtime.placement.workload import Workload
from furiosa_llm.runtime.program.segments import Program, ValueType, cut_program, size_names


@dataclass(frozen=True, slots=True, kw_only=True)
class StageMemory:
    """What one stage of one replica keeps on each of its PEs, in bytes."""

    weight_nbytes: int
    kv_nbytes_per_token: int
    """The KV cache of one position of one sequence."""
    activation_nbytes: int | None
    """The block that values between the segments take in the larger of a decode and a prefill step, without kernels'
    scratch memory, which is not known; None if it does not follow from the model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CardMemory:
    """What the used PEs of the card `npu` keep, in bytes."""

    npu: int
    num_pes: int
    capacity_nbytes: int
    """The used PEs' share of the card's memory."""
    weight_nbytes: int
    kv_nbytes: int
    """The KV cache for the workload."""
    activation_nbytes: int
    """The activations; activations that are not known count as 0."""

    @property
    def pe_nbytes(self) -> int:
        """What each PE would hold if the card's memory were divided."""
        return -(-(self.capacity_nbytes - self.free_nbytes) // self.num_pes)

    @property
    def free_nbytes(self) -> int:
        """What is left; negative if it does not fit."""
        return self.capacity_nbytes - self.weight_nbytes - self.kv_nbytes - self.activation_nbytes


def stage_memory(model: SplitModel, stages: Sequence[Stage], workload: Workload) -> tuple[StageMemory, ...]:
    """What each of `stages`, which are all of `model`, keeps on each PE."""
    return Memory(model).of_stages(stages, workload)


def received_nbytes_per_token(model: SplitModel, received: Sequence[Sequence[str]]) -> tuple[int | None, ...]:
    """What each stage receives of earlier ones for one position, which is the values that `received` names for it.

    None where the program does not declare the size of one.
    """
    program = cut_program(model.program, model.manifest.collectives, size_names(model.manifest))
    return tuple(_received_nbytes(program, names) for names in received)


def kv_nbytes_per_token(model: SplitModel, stages: Sequence[Stage]) -> tuple[int, ...]:
    """What each of `stages` keeps in the KV cache of one position of one sequence."""
    states = _states_kept_at(model)
    return tuple(_kept_nbytes(states, stage) for stage in stages)


class Memory:
    """What the stages of a model keep, for any cut into stages and any workload."""

    def __init__(self, model: SplitModel) -> None:
        self._model = model
        self._program = cut_program(model.program, model.manifest.collectives, size_names(model.manifest))
        states = {state.output for state in model.manifest.states}
        self._life = {name: life for name, life in _lifetimes(self._program).items() if name not in states}
        self._touched = [self._life.keys() & {*used_names(node), *node.output} for node in model.program.graph.node]
        self._states = _states_kept_at(model)
        self._values: dict[tuple[int, int], list[tuple[str, ValueType, Lifetime]]] = {}
        self._kinds: dict[tuple[int, int], tuple[ValueType, ...]] = {}
        self._places: dict[tuple[tuple[int, int], tuple[int, ...]], Counter[int]] = {}
        self._peaks: dict[tuple[int, int, tuple[tuple[str, int], ...]], int | None] = {}

    def of_stages(self, stages: Sequence[Stage], workload: Workload) -> tuple[StageMemory, ...]:
        """What each of `stages`, which are all of the model, keeps on each PE."""
        return tuple(
            replace(bare, activation_nbytes=self._activation_nbytes(stage, workload))
            for stage, bare in zip(stages, self.without_activations(stages), strict=True)
        )

    def without_activations(self, stages: Sequence[Stage]) -> tuple[StageMemory, ...]:
        """The same with no activations."""
        return tuple(
            StageMemory(
                weight_nbytes=stage.weight_nbytes,
                kv_nbytes_per_token=_kept_nbytes(self._states, stage),
                activation_nbytes=0,
            )
            for stage in stages
        )

    def _activation_nbytes(self, stage: Stage, workload: Workload) -> int | None:
        peaks = [self._peak_nbytes(stage, sizes) for sizes in _steps(workload)]
        known = [peak for peak in peaks if peak is not None]
        return max(known) if len(known) == len(peaks) else None

    def _peak_nbytes(self, stage: Stage, sizes: Mapping[str, int]) -> int | None:
        key = (stage.first_node, stage.stop_node, tuple(sizes.items()))
        if key not in self._peaks:
            self._peaks[key] = self._placed_nbytes(stage, sizes)
        return self._peaks[key]

    def _placed_nbytes(self, stage: Stage, sizes: Mapping[str, int]) -> int | None:
        """What `place` needs, which gives as many places at any sizes as long as the same values are equally large."""
        nodes = (stage.first_node, stage.stop_node)
        if nodes not in self._values:
            touched = set().union(*self._touched[slice(*nodes)])
            lives = [(name, alive) for name, alive in self._life.items() if name in touched]
            self._values[nodes] = [(name, self._program.types[name], alive) for name, alive in lives]
            self._kinds[nodes] = tuple(dict.fromkeys(kind for _, kind, _ in self._values[nodes]))
        nbytes = [None if (size := _nbytes(kind, sizes)) is None else padded(size) for kind in self._kinds[nodes]]
        known = [size for size in nbytes if size is not None]
        if len(known) != len(nbytes):
            return None
        alike = tuple(map(known.index, known))
        if (nodes, alike) not in self._places:
            size_of = dict(zip(self._kinds[nodes], known, strict=True))
            offsets, _ = place([(name, size_of[kind], alive) for name, kind, alive in self._values[nodes]])
            places = {(size_of[kind], offsets[name]) for name, kind, _ in self._values[nodes]}
            self._places[nodes, alike] = Counter(known.index(size) for size, _ in places)
        return sum(count * known[first] for first, count in self._places[nodes, alike].items())


def _kept_nbytes(states: Sequence[tuple[int, int]], stage: Stage) -> int:
    return sum(nbytes for kept_at, nbytes in states if stage.first_node <= kept_at < stage.stop_node)


def _states_kept_at(model: SplitModel) -> list[tuple[int, int]]:
    """For each state the node whose stage keeps it (it makes the next value or is the first reader), and the bytes."""
    nodes = model.program.graph.node
    read_at = {name: at for at in reversed(range(len(nodes))) for name in used_names(nodes[at])}
    made_at = {name: at for at, node in enumerate(nodes) for name in node.output}
    kept_at = read_at | {s.input: made_at[s.output] for s in model.manifest.states if s.output in made_at}
    return [(kept_at.get(name, 0), nbytes) for name, nbytes in model.manifest.state_nbytes.items()]


def _lifetimes(program: Program) -> dict[str, Lifetime]:
    """The lifetime of every value that a segment or a collective makes, as one rank has it; outputs live to the end."""
    first: dict[str, int] = {}
    last: dict[str, int] = {}
    for index, step in enumerate(program.sections):
        made = [call.output for call in step.collectives]
        read = [call.input for call in step.collectives]
        if step.segment is not None:
            made.extend(step.segment.outputs)
            read.extend(step.segment.inputs)
        first.update(dict.fromkeys(made, index))
        last.update({name: index for name in (*made, *read) if name in first})
    last.update(dict.fromkeys(program.outputs, len(program.sections)))
    return {name: Lifetime(first=first[name], last=last[name]) for name in first}


def card_memory(
    topology: Topology, stages: Sequence[StageMemory], workload: Workload, *, pe_nbytes: int = PE_NBYTES
) -> tuple[CardMemory, ...]:
    """What every used card keeps for `workload`; `stages` are a replica's stages, `pe_nbytes` is the memory of a PE."""
    tokens = workload.max_batch_size * workload.max_model_len
    return tuple(
        CardMemory(
            npu=npu,
            num_pes=len(held) * topology.tensor_parallel_size,
            capacity_nbytes=len(held) * topology.tensor_parallel_size * pe_nbytes,
            weight_nbytes=topology.tensor_parallel_size * sum(stages[stage].weight_nbytes for stage in set(held)),
            kv_nbytes=topology.tensor_parallel_size * tokens * sum(stages[s].kv_nbytes_per_token for s in held),
            activation_nbytes=topology.tensor_parallel_size * sum(stages[s].activation_nbytes or 0 for s in held),
        )
        for npu, held in _held(topology).items()
    )


def kv_pages(
    topology: Topology, stages: Sequence[StageMemory], *, page_size: int, pe_nbytes: int = PE_NBYTES
) -> int | None:
    """How many pages of `page_size` tokens each replica has room for on the fullest card; None without a cache.

    All replicas get equally many. Raises CapacityError where weights and activations leave no room for a page.
    """
    if page_size < 1:
        raise CapacityError(f"page_size must be at least 1 token, got {page_size}")
    nothing = Workload(max_batch_size=1, max_model_len=1)
    counts: list[int] = []
    for card in card_memory(topology, stages, nothing, pe_nbytes=pe_nbytes):
        free = card.free_nbytes + card.kv_nbytes
        if free < 0:
            raise CapacityError(_over(card, -free))
        if card.kv_nbytes:
            counts.append(free // (card.kv_nbytes * page_size))
            if not counts[-1]:
                raise CapacityError(
                    f"npu:{card.npu} has {shown(free)} left beside weights and activations, but a page of {page_size} "
                    f"tokens takes {shown(card.kv_nbytes * page_size)}; use smaller pages or more stages"
                )
    return min(counts, default=None)


def check_weights(
    model: SplitModel, topology: Topology, stages: Sequence[Stage], *, pe_nbytes: int = PE_NBYTES
) -> None:
    """Raises CapacityError if weights alone do not fit; it says by how much, and how many stages would suffice."""
    weights = [
        StageMemory(weight_nbytes=stage.weight_nbytes, kv_nbytes_per_token=0, activation_nbytes=0) for stage in stages
    ]
    for card in card_memory(topology, weights, Workload(), pe_nbytes=pe_nbytes):
        if card.free_nbytes < 0:
            raise CapacityError(
                f"{_over(card, -card.free_nbytes)}; {_remedy(read_blocks(model), len(stages), pe_nbytes)}"
            )


def _held(topology: Topology) -> dict[int, list[int]]:
    """Card -> the stages that it holds, one entry for every replica."""
    held: dict[int, list[int]] = {}
    for replica in topology.replicas:
        for stage, group in enumerate(replica):
            held.setdefault(group[0].npu, []).append(stage)
    return dict(sorted(held.items()))


# -- steps, and what crosses between stages ---------------------------------------------------------------------------


def _steps(workload: Workload) -> tuple[dict[str, int], ...]:
    """The sizes of the largest decode step and of the last prefill step of the longest prompt."""
    longest = workload.max_model_len
    chunk = min(workload.prefill_chunk_size, longest)
    decode = {"batch": workload.max_batch_size, "sequence": 1, "past": longest - 1}
    return known_sizes(decode), known_sizes({"batch": 1, "sequence": chunk, "past": longest - chunk})


def _received_nbytes(program: Program, received: Sequence[str]) -> int | None:
    one = {"batch": 1, "sequence": 1}
    sizes = [_nbytes(kind, one) if (kind := program.types.get(name)) is not None else None for name in received]
    known = [nbytes for nbytes in sizes if nbytes is not None]
    return sum(known) if len(known) == len(sizes) else None


def _nbytes(kind: ValueType, sizes: Mapping[str, int]) -> int | None:
    """The bytes of a value; None if a size is not known."""
    names = [name for dim in kind.shape or () if isinstance(dim, str) for name in parse_dimension(dim).names]
    if kind.shape is None or not sizes.keys() >= set(names):
        return None
    return array_nbytes(kind.dtype, shape_of(kind.shape, sizes))


# -- messages ------------------------------------------------------------------------------------------------------


def _over(card: CardMemory, nbytes: int) -> str:
    activations = f" and {shown(card.activation_nbytes)} of activations" if card.activation_nbytes else ""
    return (
        f"npu:{card.npu} is to hold {shown(card.weight_nbytes)} of weights{activations} on {card.num_pes} PEs, which "
        f"is {shown(nbytes)} more than their {shown(card.capacity_nbytes)}"
    )


def _remedy(blocks: Sequence[BlockReads], stages: int, pe_nbytes: int) -> str:
    """The least number of stages with which every PE has room for its own shards."""
    for more in range(stages + 1, len(blocks) + 1):
        cut = divide_blocks(blocks, pipeline_parallel_size=more)
        if max(stage.weight_nbytes for stage in cut) <= pe_nbytes:
            return f"use pp={more}, which fits"
    return "no number of stages fits; build for a larger tensor parallel size, or with smaller weights"
