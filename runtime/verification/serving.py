"""An engine's steps compared with the unsplit model: prompts whole and in chunks, batches, and a slot that moves.

Where the model takes adapters, the sequences of a batch have unlike ones, and one has none.

The engine cuts the program for serving and keeps the states of its sequences in slots, which no run on whole tensors
does. Tokens are given, not chosen; the model is stepped with the same ones, sequence by sequence.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import wait
from functools import partial

import numpy as np

from furiosa_llm.runtime.adapters.adapter import Adapter
from furiosa_llm.runtime.adapters.bank import AdapterBank
from furiosa_llm.runtime.artifact.adapters.inputs import AdapterInputs, adapter_inputs
from furiosa_llm.runtime.artifact.dimensions import known_sizes, shape_of
from furiosa_llm.runtime.artifact.dtypes import DTYPES, Array
from furiosa_llm.runtime.artifact.manifest import Manifest
from furiosa_llm.runtime.artifact.reader import Artifact
from furiosa_llm.runtime.artifact.tools.originals import default_inputs
from furiosa_llm.runtime.errors import ExecutionError, StepTimeoutError
from furiosa_llm.runtime.execution.decoder import check_interface, interface_of
from furiosa_llm.runtime.execution.feeds import StepFeeds
from furiosa_llm.runtime.execution.scores import by_position, scores_output
from furiosa_llm.runtime.placement.stages import choose_stages
from furiosa_llm.runtime.program.interruption import Allowance
from furiosa_llm.runtime.runners.batch import Batch, Copy, Decode, Piece, Prefill, Row
from furiosa_llm.runtime.runners.local_runner import Host, LocalRunner
from furiosa_llm.runtime.verification.cases import Lengths, Model
from furiosa_llm.runtime.verification.errors import OutputDifference, output_error

_DECODED = 4
"""Tokens of each sequence that are not in its prompt."""
SHORTEST = 2 * _DECODED
"""The shortest sequence that is stepped in parts."""
_SLOTS = 3
_RANK = 3
"""The ranks of adapters are a little greater, and unlike."""

_Run = Callable[[Batch], Array]
"""Runs a batch, and gives its logits."""


class _Sequence:
    """A sequence in a slot: `tokens`, of which `stepped` are in the slot, and the model's states after these."""

    def __init__(
        self, slot: int, tokens: list[int], reference: Model, manifest: Manifest, adapters: AdapterInputs, seed: int
    ) -> None:
        self.slot = slot
        self.tokens = tokens
        self.stepped = 0
        self._reference = reference
        self._manifest = manifest
        self._logits = scores_output(manifest.outputs)
        shape = next(info.shape for info in manifest.inputs if info.role == "token_ids")
        self._rows, self._width = (dim if isinstance(dim, int) else None for dim in shape)
        self.adapter = _adapter(slot, adapters, seed)
        self._others = AdapterBank(adapters, apart=True).feeds(self.adapter, rows=self._rows or 1)
        self._feeds = [info for info in manifest.inputs if info.name not in self._others]
        sizes = known_sizes({"batch": 1, "sequence": 0, "past": 0})
        self._states = {
            info.name: np.zeros(shape_of(info.shape, sizes), dtype=DTYPES[info.dtype].numpy)
            for info in manifest.inputs
            if info.role == "state"
        }

    @property
    def prompt(self) -> int:
        """The tokens that are not decoded one by one."""
        return len(self.tokens) - _DECODED

    def advance(self, count: int) -> Array:
        """The model's logits for the next `count` tokens: of each, or of the last one where the model gives no others.

        A model for one token at a time is stepped token by token. A model for a fixed number of sequences gets this
        sequence in each row.
        """
        width = self._width or count
        return np.concatenate([self._step(width) for _ in range(count // width)])

    def _step(self, count: int) -> Array:
        tokens = np.array([self.tokens[self.stepped : self.stepped + count]] * (self._rows or 1), dtype=np.int64)
        feeds = dict(StepFeeds(self._feeds).update(tokens, self.stepped))
        found = self._reference.run(feeds | self._others | self._states)
        self._states = {state.input: found[state.output] for state in self._manifest.states}
        self.stepped += count
        rows: Array = by_position(self._logits, found[self._logits.name], len(tokens))[0]
        return rows


def engine_errors(
    artifact: Artifact,
    reference: Model,
    lengths: Lengths,
    *,
    threads: int,
    random: np.random.Generator,
    step_timeout: float,
) -> tuple[OutputDifference, ...]:
    """The errors of logits in each kind of the engine's steps.

    `lengths` allow SHORTEST tokens. Raises ExecutionError if the engine cannot run the program, StepTimeoutError if a
    step takes longer than `step_timeout` seconds, and UnsupportedError if it cannot feed it.
    """
    check_interface(interface_of(artifact.manifest))
    longest = int(random.integers(max(SHORTEST, 3 * lengths.new // 4), lengths.new + 1))
    sizes = [longest, *(int(size) for size in random.integers(SHORTEST, longest + 1, _SLOTS - 1))]
    vocabulary = artifact.manifest.model.vocab_size or 2
    adapters = _adapter_inputs(artifact)
    seed = int(random.integers(2**32)) if adapters.infos else 0
    sequences = [
        _Sequence(slot, random.integers(0, vocabulary, size).tolist(), reference, artifact.manifest, adapters, seed)
        for slot, size in enumerate(sizes)
    ]
    pairs: dict[str, list[tuple[Array, Array]]] = defaultdict(list)
    with Host(artifact, choose_stages(artifact), threads=threads, exact=True) as host:
        runner = host.runner(slots_per_group=_SLOTS)
        try:
            for case, ours, theirs in _steps(partial(_run, runner, step_timeout), sequences, random):
                if ours.shape != theirs.shape:
                    raise ExecutionError(
                        f"{case}: the engine gives logits {list(ours.shape)}, expected {list(theirs.shape)}"
                    )
                pairs[case].append((ours, theirs))
        finally:
            runner.close()
    return tuple(
        output_error(case, "logits", rows, np.concatenate([theirs for _, theirs in rows]), logits=True)
        for case, rows in pairs.items()
    )


def _adapter(slot: int, inputs: AdapterInputs, seed: int) -> Adapter | None:
    """A random adapter for the sequence in a slot; none for the first."""
    if not inputs.infos or slot == 0:
        return None
    random = np.random.default_rng([seed, slot])
    arrays = {info.name: inputs.drawn(info, random, rank=_RANK + slot) for info in inputs.infos}
    return Adapter(key=slot, name=f"{slot}", arrays=arrays)


def without_adapter(artifact: Artifact) -> dict[str, Array]:
    """What the inputs for adapters are in a step of one sequence that has none."""
    return AdapterBank(_adapter_inputs(artifact)).feeds(None, rows=1)


def _adapter_inputs(artifact: Artifact) -> AdapterInputs:
    return adapter_inputs(artifact.manifest, artifact.program.graph, default_inputs(artifact))


def _steps(
    run: _Run, sequences: Sequence[_Sequence], random: np.random.Generator
) -> Iterator[tuple[str, Array, Array]]:
    """Logits by case: the engine's, and the model's in steps of the same tokens."""
    chunked, whole, last = sequences
    cuts = sorted({0, *(int(cut) for cut in random.integers(1, chunked.prompt, 2)), chunked.prompt})
    for start, stop in itertools.pairwise(cuts):
        yield _prefilled(run, chunked, stop, "prompt" if not start else "chunk of a prompt")
    for one in (whole, last):
        yield _prefilled(run, one, one.prompt, "prompt")
    for _ in range(_DECODED // 2):
        yield _decoded(run, sequences, (), "decode of three")
    copy = Copy(source=last.slot, target=chunked.slot, length=last.stepped)
    yield _decoded(run, (last, whole), (copy,), "decode from a moved slot")
    yield _decoded(run, (last, whole), (), "decode from a moved slot")


def _prefilled(run: _Run, one: _Sequence, stop: int, case: str) -> tuple[str, Array, Array]:
    start = one.stepped
    theirs = one.advance(stop - start)
    piece = Piece(
        sequence_id=one.slot,
        slot=one.slot,
        start=start,
        tokens=tuple(one.tokens[start:stop]),
        logits="all" if len(theirs) == stop - start else "last",
        adapter=one.adapter,
    )
    return case, run(Prefill(group=0, copies=(), pieces=(piece,))), theirs


def _decoded(run: _Run, rows: Sequence[_Sequence], copies: tuple[Copy, ...], case: str) -> tuple[str, Array, Array]:
    batch = Decode(
        group=0,
        copies=copies,
        rows=tuple(
            Row(sequence_id=one.slot, start=one.stepped, token=one.tokens[one.stepped], adapter=one.adapter)
            for one in rows
        ),
    )
    return case, run(batch), np.concatenate([one.advance(1) for one in rows])


def _run(runner: LocalRunner, seconds: float, batch: Batch) -> Array:
    logits = runner.submit(batch)
    if not Allowance(seconds).wait(lambda wanted: bool(wait([logits], wanted).done)):
        raise StepTimeoutError(
            f"a step of the engine was not done within {seconds:g} s; give a greater step_timeout if the model is that "
            f"slow"
        )
    return logits.result().copy()
