"""Batches on stages: the bits of a sequence stepped alone, whatever runs beside it, and failures that are told."""

from __future__ import annotations

import dataclasses
import itertools
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from onnx import helper

from furiosa_llm.runtime import Executor
from furiosa_llm.runtime.adapters.adapter import Adapter
from furiosa_llm.runtime.artifact.layout import Leaf, Mesh
from furiosa_llm.runtime.artifact.manifest import StateMode
from furiosa_llm.runtime.artifact.reader import Artifact, open_artifact
from furiosa_llm.runtime.engine.slots import cut
from furiosa_llm.runtime.errors import ExecutionError, InputError
from furiosa_llm.runtime.execution import states
from furiosa_llm.runtime.execution.decoder import DecoderSession
from furiosa_llm.runtime.execution.driver import Body
from furiosa_llm.runtime.execution.memory import Block
from furiosa_llm.runtime.execution.states import CAPACITY_STEP
from furiosa_llm.runtime.placement.stages import choose_stages
from furiosa_llm.runtime.runners.batch import (
    NO_COMPANIONS,
    Companions,
    Copy,
    Decode,
    Piece,
    Prefill,
    Row,
    Runner,
    WantedLogits,
)
from furiosa_llm.runtime.runners.batch_invariance import probe_batch_invariance
from furiosa_llm.runtime.runners.loaded_model import Traits
from furiosa_llm.runtime.runners.local_runner import Host, LocalRunner
from furiosa_llm.runtime.runners.steps import steps_of
from furiosa_llm.runtime.verification.reference import ReferenceModel
from tests.runtime.conftest import ZooArtifact
from tests.runtime.program.test_serving_graph import end_with, normalized
from tests.support.runtime.blocks import llama_blocks, with_blocks
from tests.support.runtime.models import LlamaSize, llama
from tests.support.tiers import tiered

pytestmark = pytest.mark.kernels

Array = npt.NDArray[Any]
MESH = Mesh((2, 2))
SIZE = LlamaSize(layers=4, max_length=600)
WAIT = 60

ROWS = {
    "tiny-bloom-optimum": "ragged",
    "tiny-gemma-optimum": "equal",
    "tiny-gemma2-genai-fp32-fullkv": "ragged",
    "tiny-gpt2-dynamo-tf5": "ragged",
    "tiny-gpt2-optimum": "ragged",
    "tiny-gptoss-genai-fp32-fullkv": "ragged",
    "tiny-llama-9-3-optimum": "ragged",
    "tiny-llama-dynamo-op23-tf5": "ragged",
    "tiny-llama-dynamo-tf5": "ragged",
    "tiny-llama-genai-fp16-cuda": "ragged",
    "tiny-llama-genai-fp32": "ragged",
    "tiny-llama-genai-int4": "ragged",
    "tiny-llama-genai-int4-qdq": "ragged",
    "tiny-llama-genai-int8": "ragged",
    "tiny-llama-mha-tied-optimum": "ragged",
    "tiny-llama-optimum": "ragged",
    "tiny-llama-tied-genai-int4-shared": "ragged",
    "tiny-mistral-dynamo-tf5": "equal",
    "tiny-mixtral-dynamo-tf5": "ragged",
    "tiny-neox-optimum": "ragged",
    "tiny-phi3-optimum": "ragged",
    "tiny-qwen2-14-2-optimum": "ragged",
    "tiny-qwen2-genai-int4": "ragged",
    "tiny-qwen2-optimum": "ragged",
    "tiny-qwen3-optimum": "ragged",
    "tiny-qwen3moe-optimum": "ragged",
}
"""Decoder of the zoo -> how rows of unequal lengths are decoded.

The exporter of Gemma counts positions from the cache's size, that of Mistral cuts the cache to its window.
"""
FAST = {
    *("tiny-gemma-optimum", "tiny-gptoss-genai-fp32-fullkv", "tiny-llama-9-3-optimum", "tiny-llama-dynamo-op23-tf5"),
    *("tiny-llama-genai-int4", "tiny-llama-genai-int4-qdq", "tiny-mistral-dynamo-tf5", "tiny-mixtral-dynamo-tf5"),
}

APART = 1e-5
"""How far a row alone and the same row in a batch may be apart, relative to the largest logit, where kernels add in
another order: docs/determinism.md has what was measured, 4e-7 at most."""


@dataclass
class Stepped:
    """A sequence in a slot: its tokens, how many of them are there, and the logits that the later ones come from."""

    slot: int
    tokens: list[int]
    stepped: int = 0
    logits: list[Array] = field(default_factory=list)

    def take(self, logits: Array) -> None:
        self.logits.append(logits.copy())
        self.tokens.append(int(logits.argmax()))


def prefill(
    runner: Runner,
    one: Stepped,
    *,
    chunk: int = 1000,
    group: int = 0,
    copies: Sequence[Copy] = (),
    wanted: WantedLogits = "last",
) -> Array:
    """Runs the tokens of `one` that are not in its slot, cut as the scheduler cuts them; returns the last logits."""
    found = np.empty((0, 0))
    last = False
    while not last:
        stop = cut(one.stepped, chunk, len(one.tokens))
        last = stop == len(one.tokens)
        piece = Piece(
            sequence_id=one.slot,
            slot=one.slot,
            start=one.stepped,
            tokens=tuple(one.tokens[one.stepped : stop]),
            logits=wanted if last else "none",
        )
        found = runner.submit(Prefill(group=group, copies=tuple(copies), pieces=(piece,))).result(WAIT)
        copies = ()
        assert last or found.shape[0] == 0
        one.stepped = stop
    if wanted == "last":
        one.take(found[0])
    return found.copy()


def decode(runner: Runner, rows: Sequence[Stepped], *, group: int = 0, copies: Sequence[Copy] = ()) -> None:
    """One more token for each of `rows`, which are in slots 0, 1, ..."""
    assert [one.slot for one in rows] == list(range(len(rows)))
    batch = Decode(
        group=group,
        copies=tuple(copies),
        rows=tuple(Row(sequence_id=one.slot, start=one.stepped, token=one.tokens[-1]) for one in rows),
    )
    logits = runner.submit(batch).result(WAIT)
    assert logits.shape[0] == len(rows)
    for one, row in zip(rows, logits, strict=True):
        one.stepped += 1
        one.take(row)


def begin(prompts: Sequence[Sequence[int]]) -> list[Stepped]:
    return [Stepped(slot, list(prompt)) for slot, prompt in enumerate(prompts)]


def serve(
    runner: Runner, prompts: Sequence[Sequence[int]], steps: int, *, chunk: int = 1000, group: int = 0
) -> list[list[Array]]:
    """The logits of each of `prompts` and of `steps` greedy tokens, decoded together."""
    rows = begin(prompts)
    for one in rows:
        prefill(runner, one, chunk=chunk, group=group)
    for _ in range(steps):
        decode(runner, rows, group=group)
    return [one.logits for one in rows]


def serve_together(runner: Runner, prompts: Sequence[Sequence[int]], steps: int) -> list[list[Array]]:
    """The same, with all prompts in one batch, the last one first."""
    rows = begin(prompts)
    pieces = [
        Piece(sequence_id=one.slot, slot=one.slot, start=0, tokens=tuple(one.tokens), logits="last") for one in rows
    ]
    batch = Prefill(group=0, copies=(), pieces=tuple(reversed(pieces)))
    for one, logits in zip(reversed(rows), runner.submit(batch).result(WAIT), strict=True):
        one.stepped = len(one.tokens)
        one.take(logits)
    for _ in range(steps):
        decode(runner, rows)
    return [one.logits for one in rows]


def alone(artifact: Artifact, prompts: Sequence[Sequence[int]], steps: int) -> list[list[Array]]:
    """The same from sequences that are stepped alone by the whole program."""
    found = []
    with Executor(artifact, threads=1) as executor:
        for prompt in prompts:
            session = DecoderSession(executor)
            logits = [session.step(np.array([prompt]))[0].copy()]
            for _ in range(steps):
                logits.append(session.step(np.array([[logits[-1].argmax()]]))[0].copy())
            found.append(logits)
    return found


@contextmanager
def runner_of(
    artifact: Artifact,
    *,
    stages: int = 1,
    threads: int = 1,
    slots: int = 4,
    companions: Companions = NO_COMPANIONS,
    spin_us: int = 0,
) -> Iterator[tuple[Host, LocalRunner]]:
    placed = choose_stages(artifact, pipeline_parallel_size=stages)
    with Host(artifact, placed, threads=threads, companions=companions, spin_us=spin_us) as host:
        runner = host.runner(slots_per_group=slots)
        try:
            yield host, runner
        finally:
            runner.close()


def same_bits(found: Sequence[Sequence[Array]], expected: Sequence[Sequence[Array]]) -> bool:
    return all(
        len(ours) == len(theirs) and all(np.array_equal(a, b) for a, b in zip(ours, theirs, strict=True))
        for ours, theirs in zip(found, expected, strict=True)
    )


def random_prompts(lengths: Sequence[int], vocabulary: int = 90) -> list[list[int]]:
    rng = np.random.default_rng(5)
    return [rng.integers(1, vocabulary, length).tolist() for length in lengths]


PROMPTS = random_prompts([5, 9, 3, 17])


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return llama_blocks(MESH, SIZE, tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def expected(artifact: Artifact) -> list[list[Array]]:
    return alone(artifact, PROMPTS, 5)


# -- the bits of a sequence alone ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", tiered(ROWS, FAST))
def test_the_zoo_in_stages_chunks_and_batches_gives_the_bits_of_sequences_alone(
    name: str, zoo_artifact: ZooArtifact
) -> None:
    """Each rank in a graph of its own, against all ranks in one graph.

    Where this machine's kernels give a row other bits in a batch, with the companions that make them the same. Where
    they give a token others in a chunk, with whole prompts. Otherwise they are nearly the same.
    """
    artifact = zoo_artifact(name)
    vocabulary = min(artifact.manifest.model.vocab_size or 90, 90)
    prompts = random_prompts([5, 9, 3], vocabulary)
    probed = probe_batch_invariance(artifact)
    assert probed.companions is not None, str(probed)
    chunk = 3 if probed.chunks else 1000
    reference = alone(artifact, prompts, 4)
    with runner_of(artifact, stages=2, threads=4) as (host, runner):
        assert (host.model.traits.rows, host.model.traits.selects) == (ROWS[name], True)
        found = serve(runner, prompts, 4, chunk=3)
        together = serve_together(runner, prompts, 4)
        if probed.invariant:
            assert same_bits(serve(runner, prompts, 4, chunk=chunk), reference)
        if probed.invariant and probed.chunks:
            assert same_bits(together, reference)
    with runner_of(artifact, threads=2, spin_us=50) as (_, runner):
        one_lane = serve(runner, prompts, 4, chunk=chunk)
        if probed.invariant:
            assert same_bits(one_lane, reference)
    for ours, theirs in zip([*found, *together, *one_lane], 3 * reference, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=APART * np.abs(theirs).max())
        assert [row.argmax() for row in ours] == [row.argmax() for row in theirs]
    if probed.invariant:
        return
    singly: list[list[Array]] = []
    for prompt in prompts:
        with runner_of(artifact, companions=probed.companions) as (_, runner):
            singly += serve(runner, [prompt], 4)
    with runner_of(artifact, stages=2, threads=4, companions=probed.companions) as (_, runner):
        assert same_bits(serve(runner, prompts, 4, chunk=chunk), singly)


def test_every_decoder_of_the_zoo_is_in_the_table(zoo: Path) -> None:
    others = {"tiny-bert-optimum", "tiny-t5-optimum", "tiny-vit-optimum"}
    assert {folder.name for folder in zoo.iterdir() if folder.is_dir()} - others == set(ROWS)


@pytest.mark.parametrize(
    ("stages", "threads", "spin_us"),
    tiered(itertools.product([1, 2, 4], [1, 2, 3], [0, 50]), [(1, 2, 0), (2, 3, 0), (4, 1, 0), (1, 2, 50)]),
)
def test_stages_threads_and_chunks_do_not_change_a_bit(
    stages: int, threads: int, spin_us: int, artifact: Artifact, expected: list[list[Array]]
) -> None:
    with runner_of(artifact, stages=stages, threads=threads, spin_us=spin_us) as (_, runner):
        assert runner.num_groups == stages
        assert same_bits(serve(runner, PROMPTS, 5), expected)
        if probe_batch_invariance(artifact).chunks:
            assert same_bits(serve(runner, PROMPTS, 5, chunk=3, group=stages - 1), expected)


@pytest.mark.parametrize("mode", ["in_place", "append"])
def test_rows_outgrow_their_buffers_together(mode: StateMode, tmp_path: Path) -> None:
    size = LlamaSize(layers=1, max_length=600)
    artifact = open_artifact(llama(MESH, size, mode).write(tmp_path))
    prompts = random_prompts([CAPACITY_STEP - 3, 4, CAPACITY_STEP - 9])
    with runner_of(artifact) as (host, runner):
        assert host.model.traits.rows == ("ragged" if mode == "in_place" else "equal")
        assert same_bits(serve(runner, prompts, 12), alone(artifact, prompts, 12))


def test_what_each_rank_has_of_its_own_is_sent_by_rank(tmp_path: Path) -> None:
    """The first layer makes a value that every rank has another of, and the second one, in another stage, adds it."""
    program = llama(MESH, LlamaSize(layers=2))
    program.weight("mine", np.linspace(-1, 1, 64 * 4, dtype=np.float32), Leaf(64 * 4, (0, 1)))
    at = {node.output[0]: position for position, node in enumerate(program.nodes)}
    program.nodes[at["layer1.attention.partial"]].output[0] = "without"
    program.nodes.insert(
        at["layer1.attention.partial"] + 1, helper.make_node("Add", ["without", "own"], ["layer1.attention.partial"])
    )
    program.nodes.insert(at["layer0.mlp.sum"], helper.make_node("Mul", ["a0.sum", "mine"], ["own"]))
    program.declare("own", ["batch", "sequence", 64])
    artifact = with_blocks(program, tmp_path, [0, at["layer0.mlp.sum"] + 2])
    for threads in (1, 2):
        with runner_of(artifact, stages=2, threads=threads) as (host, runner):
            assert "own" in host.model.programs[1].graph.received
            assert same_bits(serve(runner, PROMPTS, 2), alone(artifact, PROMPTS, 2))


def test_logits_of_no_the_last_and_all_tokens(artifact: Artifact) -> None:
    (prompt,) = random_prompts([7])
    chunks = probe_batch_invariance(artifact).chunks
    with runner_of(artifact, stages=2) as (_, runner):
        everything = prefill(runner, Stepped(0, list(prompt)), wanted="all")
        assert everything.shape == (7, SIZE.vocab)
        assert prefill(runner, Stepped(1, list(prompt)), wanted="none").shape == (0, SIZE.vocab)
        for length in range(1, 8):
            last = prefill(runner, Stepped(2, prompt[:length]))
            assert last.shape == (1, SIZE.vocab)
            if length > 1 and chunks:
                assert np.array_equal(last[0], everything[length - 1])
            np.testing.assert_allclose(last[0], everything[length - 1], rtol=0, atol=1e-5)


def test_logits_of_a_program_that_makes_all_of_them(tmp_path: Path) -> None:
    artifact = open_artifact(end_with(llama(MESH, LlamaSize(layers=1)), normalized).write(tmp_path))
    (prompt,) = random_prompts([7])
    with runner_of(artifact) as (host, runner):
        assert not host.model.traits.selects
        everything = prefill(runner, Stepped(0, list(prompt)), wanted="all")
        assert everything.shape == (7, 160)
        assert np.array_equal(prefill(runner, Stepped(1, list(prompt))), everything[-1:])
        assert prefill(runner, Stepped(2, list(prompt)), wanted="none").shape == (0, 160)
        rows = begin([prompt, prompt[:3]])
        for one in rows:
            prefill(runner, one)
        decode(runner, rows)
        assert np.array_equal(rows[0].logits[0], everything[-1])
        assert [len(one.logits) for one in rows] == [2, 2]


# -- slots ---------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["in_place", "append"])
def either(request: pytest.FixtureRequest, tmp_path: Path) -> Artifact:
    """A decoder with states in place, and one whose steps append to them."""
    mode: StateMode = request.param
    return open_artifact(llama(MESH, LlamaSize(layers=2), mode).write(tmp_path))


def test_a_prefix_is_copied_and_not_computed_again(either: Artifact) -> None:
    first, second = random_prompts([12, 9])
    second = first[:6] + second
    with runner_of(either) as (_, runner):
        rows = begin([first, second])
        prefill(runner, rows[0])
        rows[1].stepped = 6
        prefill(runner, rows[1], copies=[Copy(source=0, target=1, length=6)])
        for _ in range(4):
            decode(runner, rows)
    assert same_bits([one.logits for one in rows], alone(either, [first, second], 4))


def test_the_last_row_moves_into_a_slot_that_is_left(either: Artifact) -> None:
    prompts = random_prompts([5, 9, 7])
    reference = alone(either, prompts, 6)
    with runner_of(either) as (_, runner):
        rows = begin(prompts)
        for one in rows:
            prefill(runner, one)
        for _ in range(3):
            decode(runner, rows)
        left, kept, moved = rows
        moved.slot = 0
        rows = [moved, kept]
        decode(runner, rows, copies=[Copy(source=2, target=0, length=moved.stepped)])
        for _ in range(2):
            decode(runner, rows)
    assert same_bits([left.logits, kept.logits, moved.logits], [reference[0][:4], *reference[1:]])


def test_a_shorter_sequence_takes_a_slot_over(either: Artifact) -> None:
    long, other, short = random_prompts([40, 8, 3])
    with runner_of(either, slots=2) as (_, runner):
        serve(runner, [long, other], 3)
        found = serve(runner, [short, other], 5)
    assert same_bits(found, alone(either, [short, other], 5))


def test_old_buffers_are_let_go_of_when_slots_grow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of one, two and three rows have bindings of their own, none of which may keep what there was before."""
    artifact = open_artifact(llama(MESH, LlamaSize(layers=1, max_length=600)).write(tmp_path))
    made: list[weakref.ref[Array]] = []

    class Watched(Block):
        def __init__(self, nbytes: int) -> None:
            super().__init__(nbytes)
            memory = self._bytes.base
            assert memory is not None
            made.append(weakref.ref(memory))

    monkeypatch.setattr(states, "Block", Watched)
    with runner_of(artifact) as (_, runner):
        rows = begin(random_prompts([CAPACITY_STEP - 2, 4, 5]))
        for count, one in enumerate(rows, start=1):
            prefill(runner, one)
            if count > 1:
                decode(runner, rows[:count])
        buffers = len(made)
        assert all(ref() is not None for ref in made)
        decode(runner, rows)
        assert len(made) == 2 * buffers
        assert [ref() is not None for ref in made] == [False] * buffers + [True] * buffers


# -- several at once -----------------------------------------------------------------------------------------------


def in_threads(works: Sequence[Callable[[], list[list[Array]]]]) -> list[list[list[Array]]]:
    """What `works` return, all run at once."""
    found: dict[int, list[list[Array]]] = {}
    ready = threading.Barrier(len(works))

    def work(index: int) -> None:
        ready.wait(WAIT)
        found[index] = works[index]()

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(works))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT)
    return [found[index] for index in range(len(works))]


def test_groups_under_way_at_once_give_the_same_bits(artifact: Artifact, expected: list[list[Array]]) -> None:
    with runner_of(artifact, stages=2, threads=2) as (_, runner):
        found = in_threads([lambda: serve(runner, PROMPTS, 5), lambda: serve(runner, PROMPTS[::-1], 5, group=1)])
        assert same_bits(found[0], expected)
        assert same_bits(found[1], expected[::-1])
        assert all(seconds > 0 for seconds in runner.busy_seconds)


def test_replicas_of_one_host_do_not_mix(artifact: Artifact, expected: list[list[Array]]) -> None:
    with runner_of(artifact, stages=2, threads=2) as (host, first):
        second = host.runner(slots_per_group=4)
        found = in_threads([lambda: serve(first, PROMPTS, 5), lambda: serve(second, PROMPTS[::-1], 5)])
        second.close()
        assert same_bits(found[0], expected)
        assert same_bits(found[1], expected[::-1])
        assert same_bits(serve(first, PROMPTS, 5), expected)


# -- failures and the end ------------------------------------------------------------------------------------------


def batch_of(*tokens: int, group: int = 0) -> Prefill:
    piece = Piece(sequence_id=1, slot=0, start=0, tokens=tokens, logits="last")
    return Prefill(group=group, copies=(), pieces=(piece,))


def threads_of_runners() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith(("furiosa-group", "furiosa-core"))]


def test_a_segment_that_fails_fails_its_batch(artifact: Artifact) -> None:
    with runner_of(artifact, stages=2, threads=2) as (_, runner):
        failed = runner.submit(batch_of(3, SIZE.vocab)).result
        with pytest.raises(ExecutionError, match=r"segment 0 failed on ranks \d to \d: .*indices element out of data"):
            failed(WAIT)
        assert runner.progress() == "nothing is under way"
        # The other group's KV has not been touched.
        assert runner.submit(batch_of(3, 4, group=1)).result(WAIT).shape == (1, SIZE.vocab)


def test_any_other_failure_is_typed_too(artifact: Artifact) -> None:
    with runner_of(artifact) as (_, runner):
        batch = Decode(group=0, copies=(), rows=(Row(sequence_id=1, start=0, token=2**70),))
        with pytest.raises(ExecutionError, match="a batch of group 0 failed: OverflowError: ") as caught:
            runner.submit(batch).result(WAIT)
        assert isinstance(caught.value.__cause__, OverflowError)


def test_progress_names_the_stage_the_segment_and_the_last_collective(
    artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    with runner_of(artifact, stages=2, threads=2) as (host, runner):
        seen: list[str] = []
        run = host.crew.run

        def watched(body: Body, lanes: int) -> None:
            run(body, lanes)
            seen.append(runner.progress())

        monkeypatch.setattr(host.crew, "run", watched)
        assert runner.progress() == "nothing is under way"
        runner.submit(batch_of(3, 4)).result(WAIT)
        assert runner.progress() == "nothing is under way"
    ranks = [f"ranks {a} to {a + 1} in segment 3 of 4" for a in (0, 2)]
    assert seen[0] == f"stage 0: {', '.join(ranks)}; last collective done: collective2"
    assert seen[1].startswith("stage 1: ranks 0 to 1 in segment ")


def test_a_batch_that_nobody_waits_for_is_passed_over(artifact: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    with runner_of(artifact) as (host, runner):
        go = threading.Event()
        run = host.crew.run

        def held(body: Body, lanes: int) -> None:
            assert go.wait(WAIT)
            run(body, lanes)

        monkeypatch.setattr(host.crew, "run", held)
        first, second, third = [runner.submit(batch_of(3, 4 + index)) for index in range(3)]
        assert second.cancel()
        go.set()
        assert first.result(WAIT).shape == third.result(WAIT).shape == (1, SIZE.vocab)
        assert second.cancelled()


def test_closing_ends_the_threads(artifact: Artifact) -> None:
    before = threads_of_runners()
    with runner_of(artifact, stages=2, threads=2) as (host, runner):
        assert len(threads_of_runners()) == len(before) + 2 + 1
        under_way = runner.submit(batch_of(3, 4))
        runner.close()
        ended = under_way.exception(WAIT)
        assert ended is None or "the runner was closed before the batch was done" in str(ended)
        assert len(threads_of_runners()) == len(before) + 1
        with pytest.raises(ExecutionError, match="the runner is closed; make another one"):
            runner.submit(batch_of(3, 4))
        runner.close()
        other = host.runner(slots_per_group=1)
        host.close()
        with pytest.raises(ExecutionError, match="the executor is closed"):
            other.submit(batch_of(3, 4)).result(WAIT)
        other.close()
    assert threads_of_runners() == before


def test_a_host_has_at_least_one_thread(artifact: Artifact) -> None:
    with pytest.raises(InputError, match="threads must be an integer of at least 1, got 0"):
        Host(artifact, choose_stages(artifact), threads=0)


LENGTHS = {1: 3, 2: 7, 3: 7, 4: 12, 6: 7, 7: 1, 8: 1}
"""Slot -> tokens of a prompt."""


# -- which rows are a step -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("traits", "expected"),
    [
        (Traits(rows="ragged", in_place=True, selects=True), [(0, 1, 2, 3, 4)]),
        (Traits(rows="equal", in_place=True, selects=True), [(0, 1), (3, 4), (2,)]),
        (Traits(rows="equal", in_place=False, selects=True), [(0, 1, 3, 4), (2,)]),
    ],
)
def test_which_rows_are_stepped_together(traits: Traits, expected: list[tuple[int, ...]]) -> None:
    """In place they must also be side by side in memory."""
    starts = (5, 5, 2, 5, 5)
    rows = tuple(Row(sequence_id=i, start=start, token=10 + i) for i, start in enumerate(starts))
    steps = steps_of(Decode(group=0, copies=(), rows=rows), traits)
    assert [step.rows for step in steps] == [step.slots for step in steps] == expected
    for step in steps:
        assert step.starts == tuple(starts[row] for row in step.rows)
        assert step.token_ids.tolist() == [[10 + row] for row in step.rows]
        assert step.wanted == tuple(range(len(step.rows)))
    count = len(expected[0])
    assert steps[0].sizes(5) == {"batch": count, "sequence": 1, "past": 5, "total": 6, "wanted": count}


ALL = Traits(rows="ragged", in_place=True, selects=True, pads=True)


@pytest.mark.parametrize(
    ("traits", "expected"),
    [
        (ALL, [(1, 2, 3), (4,), (6,), (7, 8)]),
        (dataclasses.replace(ALL, batch=2), [(1, 2), (3,), (4,), (6,), (7, 8)]),
        (dataclasses.replace(ALL, mixes=False), [(1, 2), (3,), (4,), (6,), (7, 8)]),
        (dataclasses.replace(ALL, pads=False), [(1,), (2, 3), (4,), (6,), (7, 8)]),
        (Traits(rows="equal", in_place=False, selects=True), [(1,), (2, 3), (4,), (6,), (7, 8)]),
        (
            dataclasses.replace(ALL, singly=True),
            [(slot,) for slot in (8, 6, 3, 2, 1, 7, 4) for _ in range(LENGTHS[slot])],
        ),
    ],
)
def test_which_prompts_are_stepped_together(traits: Traits, expected: list[tuple[int, ...]]) -> None:
    """A token alone is not padded, and what costs more to pad than a step of its own is not either."""
    adapter = Adapter(key=1, name="1", arrays={})
    pieces = {
        slot: Piece(
            sequence_id=slot,
            slot=slot,
            start=0,
            tokens=tuple(range(count)),
            logits="all" if slot == 2 else "last",
            adapter=adapter if slot == 3 else None,
        )
        for slot, count in LENGTHS.items()
    }
    batch = Prefill(group=0, copies=(), pieces=tuple(pieces[slot] for slot in (8, 6, 3, 2, 1, 7, 4)))
    steps = steps_of(batch, traits)
    assert [step.slots for step in steps] == expected
    found: list[tuple[int, int]] = []
    for step in steps:
        positions = step.token_ids.shape[1]
        assert step.lengths == tuple(1 if traits.singly else LENGTHS[slot] for slot in step.slots) + (
            step.lengths[-1:] * step.padding
        )
        places = [divmod(place, positions) for place in step.wanted[: len(step.rows)]]
        found += [(row, step.slots[index]) for row, (index, _) in zip(step.rows, places, strict=True)]
        if not traits.singly:
            assert all(step.token_ids[index, position] == position for index, position in places)
    assert sorted(found) == [(0, 8), (1, 6), (2, 3), *((3 + i, 2) for i in range(7)), (10, 1), (11, 7), (12, 4)]


@pytest.mark.parametrize(
    ("traits", "expected"),
    [
        (Traits(rows="ragged", in_place=True, selects=True, mixes=True), [(0, 1, 2, 3, 4)]),
        (Traits(rows="ragged", in_place=True, selects=True, mixes=False), [(0, 1), (4,), (2,), (3,)]),
        (Traits(rows="equal", in_place=False, selects=True, mixes=False), [(0, 4), (1,), (2,), (3,)]),
    ],
)
def test_which_adapters_are_stepped_together(traits: Traits, expected: list[tuple[int, ...]]) -> None:
    one, two = (Adapter(key=key, name=str(key), arrays={}) for key in (1, 2))
    adapters, starts = (one, one, None, two, one), (5, 7, 5, 5, 5)
    rows = tuple(
        Row(sequence_id=i, start=start, token=1, adapter=adapter)
        for i, (start, adapter) in enumerate(zip(starts, adapters, strict=True))
    )
    steps = steps_of(Decode(group=0, copies=(), rows=rows), traits)
    assert [step.rows for step in steps] == expected
    assert [step.adapters for step in steps] == [tuple(adapters[row] for row in rows) for rows in expected]


@pytest.mark.parametrize(("chunk", "stages"), [(1000, 1), (40, 2), (20, 1)])
def test_beyond_the_window_that_a_model_cuts_its_cache_to(
    chunk: int, stages: int, zoo_artifact: ZooArtifact, zoo: Path
) -> None:
    """The cache of tiny-mistral holds 63 positions; the unsplit model reads all tokens anew, without a cache."""
    name = "tiny-mistral-dynamo-tf5"
    artifact = zoo_artifact(name)
    manifest = artifact.manifest
    reference = ReferenceModel(
        zoo / name / "model.onnx", inputs=manifest.inputs, outputs=manifest.outputs, states=manifest.states
    )
    past = {s.input: np.zeros((1, 2, 0, 16), dtype=np.float32) for s in manifest.states}
    rows = [Stepped(slot, np.random.default_rng(slot).integers(1, 1000, n).tolist()) for slot, n in ((0, 90), (1, 58))]
    with Host(artifact, choose_stages(artifact, pipeline_parallel_size=stages), threads=2) as host:
        runner = host.runner(slots_per_group=2)
        for one in rows:
            prefill(runner, one, chunk=chunk)
        for _ in range(12):
            decode(runner, rows)
        runner.close()
    for one in rows:
        tokens = np.array([one.tokens[:-1]])
        feeds = {
            "input_ids": tokens,
            "attention_mask": np.ones_like(tokens),
            "position_ids": np.arange(tokens.size)[None],
        }
        expected = reference.run(feeds | past)["logits"][0, -13:]
        np.testing.assert_allclose(np.array(one.logits), expected, atol=1e-5)
