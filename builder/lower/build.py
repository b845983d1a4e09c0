"""What is known about one build once its program is lowered."""

from __future__ import annotations

import dataclasses

import onnx_ir as ir

from furiosa_llm.builder.factors.analysis import Analysis
from furiosa_llm.builder.factors.probe import Probes
from furiosa_llm.builder.factors.scores import find_scores
from furiosa_llm.builder.factors.states import States, is_rolled
from furiosa_llm.builder.lower.emit import Lowered
from furiosa_llm.builder.lower.program_builder import ShardedTensor
from furiosa_llm.builder.plan.plan import Plan
from furiosa_llm.builder.rewrite.fusion import Fusion
from furiosa_llm.builder.shapes.interface import role_of
from furiosa_llm.builder.shapes.roles import GIVEN, Role, distinct_roles
from furiosa_llm.builder.source.load import Source
from furiosa_llm.runtime.artifact.dimensions import vocabulary_dim
from furiosa_llm.runtime.artifact.manifest import Task

_OLDEST_IR_VERSION = 8
"""The least IR version that the graph in memory is written with."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Build:
    """The source, its analysis and plan, and the program made of it."""

    source: Source
    model: ir.Model
    """The source, normalised."""
    probes: Probes
    states: States
    fusion: Fusion
    analysis: Analysis
    max_length: int | None
    """The longest sequence that the configuration allows and the tables of positions reach, in tokens."""
    plan: Plan
    lowered: Lowered

    @property
    def ir_version(self) -> int:
        """The program's IR version."""
        return max(self.source.model.ir_version, _OLDEST_IR_VERSION)

    @property
    def reads_tokens(self) -> bool:
        """Whether token ids are among the inputs."""
        return any(role_of(value) == "token_ids" for value in self.model.graph.inputs)

    @property
    def task(self) -> Task:
        """`decoder` if the model carries state from token to token, `encoder` if it reads tokens, else `other`."""
        if self.states.pairs and self.logits is not None:
            return "decoder"
        return "encoder" if self.reads_tokens else "other"

    @property
    def logits(self) -> ir.Value | None:
        """The output that holds next-token scores, if the model takes tokens."""
        if not self.reads_tokens:
            return None
        return find_scores(self.model.graph, self.probes.facts, self.states.values)

    @property
    def vocab_size(self) -> int | None:
        """How many tokens the scores are of; None without scores."""
        if self.logits is None:
            return None
        one, other = (facts[self.logits].shape for facts in (self.probes.facts, self.probes.others))
        sizes = [a if a == b else "dynamic" for a, b in zip(one, other, strict=True)]
        return one[vocabulary_dim(sizes)]

    @property
    def roles(self) -> dict[ir.Value, Role]:
        """What each input is for; a mask over caches that roll is not told by the positions so far."""
        found, facts = distinct_roles(self.model.graph.inputs), self.probes.facts
        rolled = {size for pair in self.states.pairs if is_rolled(pair) for size in facts[pair.input].shape}
        for value, role in found.items():
            if role.name == "attention_mask" and role.why != GIVEN and facts[value].shape[-1] in rolled:
                why = f"{role.why}; but the caches roll, so which places are filled follows from no position"
                found[value] = Role(name="other", why=why)
        return found

    def tensors(self) -> list[ShardedTensor]:
        """Stored tensors in the order in which they are written.

        Those with the largest elements come first, so that every window of a file is aligned to its elements; then in
        the order in which the program first reads their sources, unused ones last. The tensors of one source follow
        each other, so that it is read once.
        """
        reads = (str(value.name) for node in self.lowered.graph for value in node.inputs if value is not None)
        order = {name: position for position, name in enumerate(dict.fromkeys(reads))}
        first: dict[int, int] = {}

        def own_place(tensor: ShardedTensor) -> int:
            return order.get(tensor.name, len(order))

        for tensor in self.lowered.tensors.values():
            key = id(tensor.source)
            first[key] = min(first.get(key, len(order)), own_place(tensor))

        def place(tensor: ShardedTensor) -> tuple[int, int, int, int]:
            group = own_place(tensor) if tensor.source is None else first[id(tensor.source)]
            return -tensor.dtype.bitwidth, group, sources.setdefault(id(tensor.source), len(sources)), own_place(tensor)

        sources: dict[int, int] = {}
        return sorted(self.lowered.tensors.values(), key=place)

    def stored_initializers(self) -> dict[str, tuple[str, ...]]:
        """Original initializer -> the stored tensors that make it up; initializers kept in source.onnx are absent."""
        by_source: dict[int, dict[object, list[str]]] = {}
        for tensor in self.lowered.tensors.values():
            if tensor.source is not None:
                by_layout = by_source.setdefault(id(tensor.source), {})
                by_layout.setdefault(tensor.whole_layout, []).append(tensor.name)
        return {
            name: tuple(next(iter(by_source[id(value.const_value)].values())))
            for name, value in self.source.model.graph.initializers.items()
            if id(value.const_value) in by_source
        }
