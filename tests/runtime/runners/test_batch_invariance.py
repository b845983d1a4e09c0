"""Whether bits depend on the batch is found out, by whom, and what keeps them from it; on any processor."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from onnx import helper

from furiosa_llm import LLM, SamplingParams
from furiosa_llm.runtime.artifact.layout import Mesh
from furiosa_llm.runtime.artifact.manifest import StateMode
from furiosa_llm.runtime.artifact.reader import Artifact, open_artifact
from furiosa_llm.runtime.engine import launch
from furiosa_llm.runtime.engine.engine_args import EngineArgs
from furiosa_llm.runtime.errors import InputError, UnsupportedError
from furiosa_llm.runtime.placement.stages import choose_stages
from furiosa_llm.runtime.runners.batch import NO_COMPANIONS, Companions, Decode, Piece, Prefill, Row
from furiosa_llm.runtime.runners.batch_invariance import BatchInvariance, KernelDifference, probe_batch_invariance
from furiosa_llm.runtime.runners.loaded_model import Traits
from furiosa_llm.runtime.runners.local_runner import Host
from furiosa_llm.runtime.runners.process_runner import ProcessHost
from furiosa_llm.runtime.runners.steps import steps_of
from tests.runtime.conftest import ZooArtifact
from tests.runtime.runners.test_local_runner import begin, decode, prefill, random_prompts, same_bits, serve
from tests.support.runtime.models import LlamaSize, llama
from tests.support.runtime.spmd import Spmd
from tests.support.tiers import tiered

Array = npt.NDArray[Any]
MESH = Mesh((2, 2))
PROMPTS = random_prompts([5, 9, 3])


def rows_matter(below: int, mode: StateMode = "in_place", dim: int = 0, comparison: str = "Less") -> Spmd:
    """A decoder that adds a little in front of a product if it has fewer than `below` rows, on any processor.

    With `dim` 1, if it has fewer tokens of each; with `comparison` Equal, if it has just as many.
    """
    program = llama(MESH, LlamaSize(layers=2), mode)
    program.constant("below", np.array([below], dtype=np.int64))
    program.constant("little", np.array([1e-4], dtype=np.float32))
    at = next(i for i, node in enumerate(program.nodes) if node.output[0] == "layer0.mlp.product")
    program.nodes[at].output[0] = "product.even"
    program.nodes[at + 1 : at + 1] = [
        helper.make_node("Shape", ["product.even"], ["rows"], start=dim, end=dim + 1),
        helper.make_node(comparison, ["rows", "below"], ["few"]),
        helper.make_node("Cast", ["few"], ["few.number"], to=1),
        helper.make_node("Mul", ["few.number", "little"], ["added"]),
        helper.make_node("Add", ["product.even", "added"], ["layer0.mlp.product"]),
    ]
    return program


def one_by_one(
    artifact: Artifact, companions: Companions, prompts: Sequence[Sequence[int]] = PROMPTS, **options: Any
) -> list[list[Array]]:
    """The logits of `prompts` and five tokens, each served alone."""
    found: list[list[Array]] = []
    with Host(artifact, choose_stages(artifact), threads=1, companions=companions, **options) as host:
        for prompt in prompts:
            runner = host.runner(slots_per_group=1)
            found += serve(runner, [prompt], 5, chunk=3)
            runner.close()
    return found


def together(
    artifact: Artifact, companions: Companions, prompts: Sequence[Sequence[int]] = PROMPTS, **options: Any
) -> list[list[Array]]:
    """The same, all at once."""
    with Host(artifact, choose_stages(artifact), threads=2, companions=companions, **options) as host:
        runner = host.runner(slots_per_group=3)
        found = serve(runner, prompts, 5, chunk=3)
        runner.close()
    return found


# -- the probe -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["in_place", "append"])
def test_a_row_alone_that_differs_is_found_and_gets_a_companion(mode: StateMode, tmp_path: Path) -> None:
    artifact = open_artifact(rows_matter(2, mode).write(tmp_path))
    found = probe_batch_invariance(artifact)
    assert not found.invariant
    assert found.companions == Companions(lone=True)
    # No single node is to blame: the sum has the same bits for the same operands.
    [blamed] = [one for one in found.differences if one.op == "fused nodes"]
    assert blamed.rows == (1,)
    assert 1e-6 < blamed.relative < 1e-2
    assert str(found).startswith("a row alone has other last bits than in a batch: ")


def test_rows_that_differ_in_small_batches_have_no_remedy(tmp_path: Path) -> None:
    artifact = open_artifact(rows_matter(4).write(tmp_path))
    found = probe_batch_invariance(artifact)
    assert (found.invariant, found.companions) == (False, None)
    assert (1, 2, 3) in {one.rows for one in found.differences}
    assert str(found).startswith("a row's last bits depend on its batch: ")
    with pytest.raises(UnsupportedError, match=r"batch_invariant is not possible for .* depend on its batch: .*leave"):
        LLM(artifact.folder, batch_invariant=True, skip_engine=True)


def test_layers_that_are_alike_are_probed_once(tmp_path: Path) -> None:
    """Four layers and the embedding and the head take as many sessions as two do."""
    from furiosa_llm.runtime.runners import batch_invariance

    counts = []
    for layers in (2, 4):
        artifact = open_artifact(llama(MESH, LlamaSize(layers=layers)).write(tmp_path / str(layers)))
        counts.append(len(list(batch_invariance._Probe(artifact, mapped=False)._distinct_segments())))
    # Embedding with the first attention, feed-forward layers, later attention, head.
    assert counts == [4, 4]


def test_what_cannot_be_fed_is_not_promised(tmp_path: Path) -> None:
    """An integer that follows from a sum, and that a later segment picks something by."""
    program = llama(MESH, LlamaSize(layers=2))
    program.declare("choice", ["batch", "sequence", 1], "INT64")
    at = {node.output[0]: position for position, node in enumerate(program.nodes)}
    program.nodes[at["layer1.mlp.partial"]].output[0] = "plain"
    program.nodes[at["layer1.mlp.partial"] + 1 : at["layer1.mlp.partial"] + 1] = [
        helper.make_node("GatherElements", ["plain", "choice"], ["chosen"], axis=2),
        helper.make_node("Add", ["plain", "chosen"], ["layer1.mlp.partial"]),
    ]
    chosen = helper.make_node("ArgMax", ["layer0.attention.sum"], ["choice"], axis=-1)
    program.nodes.insert(at["layer0.attention.sum"] + 1, chosen)
    artifact = open_artifact(program.write(tmp_path))
    found = probe_batch_invariance(artifact)
    assert (found.invariant, found.companions, found.unprobed) == (False, None, ("choice",))
    with pytest.raises(UnsupportedError, match=r"not known whether .*: no probe for 'choice'; leave it out"):
        LLM(artifact.folder, batch_invariant=True, skip_engine=True)


def test_a_prompt_that_is_cut_is_compared_with_the_whole(zoo_artifact: ZooArtifact, tmp_path: Path) -> None:
    """On this machine, whatever its kernels are; and of a program that tells long steps from short ones, on any."""
    artifact = zoo_artifact("tiny-llama-genai-fp32")
    [prompt] = random_prompts([21])
    with Host(artifact, choose_stages(artifact), threads=1) as host:
        runner = host.runner(slots_per_group=1)
        whole, *parts = (prefill(runner, *begin([prompt]), chunk=chunk) for chunk in (1000, 3, 7, 16))
        runner.close()
    if probe_batch_invariance(artifact).chunks:
        assert all(np.array_equal(whole, part) for part in parts)
    for part in parts:
        np.testing.assert_allclose(part, whole, rtol=0, atol=1e-5)
    odd = probe_batch_invariance(open_artifact(rows_matter(20, dim=1).write(tmp_path)))
    assert not odd.chunks
    # No first part that is tried has 18 tokens, but one that is left has.
    odd = probe_batch_invariance(open_artifact(rows_matter(18, dim=1, comparison="Equal").write(tmp_path / "left")))
    assert not odd.chunks


def test_what_does_not_run_on_random_values_is_not_promised(
    zoo_artifact: ZooArtifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise RuntimeError("index out of bounds")

    monkeypatch.setattr("furiosa_llm.runtime.execution.ort.Session.run", fails)
    found = probe_batch_invariance(zoo_artifact("tiny-llama-genai-fp32"))
    assert (found.invariant, found.companions, found.chunks) == (False, None, False)
    assert "index out of bounds" in found.unprobed[0]


@pytest.mark.parametrize(
    ("name", "mapped"),
    tiered(
        itertools.product(
            ["tiny-llama-genai-fp32", "tiny-llama-genai-int4", "tiny-gptoss-genai-fp32-fullkv"], [False, True]
        ),
        [("tiny-llama-genai-int4", False), ("tiny-gptoss-genai-fp32-fullkv", False), ("tiny-llama-genai-fp32", True)],
    ),
)
def test_the_probe_says_what_happens(name: str, mapped: bool, zoo_artifact: ZooArtifact) -> None:
    """On this machine, whatever its kernels are: the bits are the same where it says so, and with what it says."""
    artifact = zoo_artifact(name)
    found = probe_batch_invariance(artifact, mapped=mapped)
    plain = same_bits(
        one_by_one(artifact, NO_COMPANIONS, mapped=mapped), together(artifact, NO_COMPANIONS, mapped=mapped)
    )
    assert plain == found.invariant
    assert found.invariant == (found.differences == ())
    if not found.invariant:
        assert found.companions is not None
        assert {one.op for one in found.differences} <= {"MatMul", "com.microsoft.MatMulNBits", "com.microsoft.MoE"}
        assert all(0 < one.relative < 1e-5 for one in found.differences)
        companions = found.companions
        fixed = one_by_one(artifact, companions, mapped=mapped)
        assert same_bits(fixed, together(artifact, companions, mapped=mapped))


def test_a_mixture_of_experts_is_doubled_alone(zoo_artifact: ZooArtifact) -> None:
    """However its kernels add: with every row twice in its experts, a sequence has the same bits alone."""
    artifact = zoo_artifact("tiny-gptoss-genai-fp32-fullkv")
    companions = Companions(doubled=("MoE",))
    with Host(artifact, choose_stages(artifact), threads=1, companions=companions) as host:
        nodes = host.model.programs[0].graph.model.graph.node
        twice = [node for node in nodes if node.output[0].startswith("furiosa_llm.twice/")]
    assert [node.op_type for node in twice] == ["Concat", "Concat", "MoE"] * 2
    lone = one_by_one(artifact, companions)
    assert same_bits(lone, together(artifact, companions))
    for ours, theirs in zip(lone, one_by_one(artifact, NO_COMPANIONS), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=5e-6)


# -- companions ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["in_place", "append"])
def test_companions_give_a_row_the_same_bits_in_every_batch(mode: StateMode, tmp_path: Path) -> None:
    artifact = open_artifact(rows_matter(2, mode).write(tmp_path))
    # Where states are appended to, rows of equal lengths are stepped together.
    prompts = PROMPTS if mode == "in_place" else random_prompts([6, 6, 6])
    assert not same_bits(one_by_one(artifact, NO_COMPANIONS, prompts), together(artifact, NO_COMPANIONS, prompts))
    companions = Companions(lone=True)
    assert same_bits(one_by_one(artifact, companions, prompts), together(artifact, companions, prompts))


def test_a_companion_leaves_the_next_slot_as_it_was(tmp_path: Path) -> None:
    """A sequence that waits in the slot that the companion of another runs in."""
    artifact = open_artifact(rows_matter(2).write(tmp_path))
    companions = Companions(lone=True)
    expected = one_by_one(artifact, companions)
    with Host(artifact, choose_stages(artifact), threads=2, companions=companions) as host:
        runner = host.runner(slots_per_group=2)
        first, second = begin(PROMPTS[:2])
        prefill(runner, second, chunk=3)
        prefill(runner, first, chunk=3)
        for _ in range(3):
            decode(runner, [first])
        for _ in range(2):
            decode(runner, [first, second])
        runner.close()
    assert same_bits([first.logits], expected[:1])
    assert same_bits([second.logits], [expected[1][:3]])


def test_processes_have_companions_too(tmp_path: Path) -> None:
    artifact = open_artifact(rows_matter(2).write(tmp_path))
    companions = Companions(lone=True)
    with ProcessHost(artifact, choose_stages(artifact), workers=2, companions=companions) as host:
        runner = host.runner(slots_per_group=1)
        found = serve(runner, PROMPTS[:1], 5, chunk=3)
        runner.close()
    assert same_bits(found, one_by_one(artifact, companions)[:1])


def test_which_steps_get_a_companion() -> None:
    traits = Traits(rows="ragged", in_place=True, selects=True)

    def steps(batch: Decode | Prefill, companions: Companions) -> list[tuple[list[list[int]], Sequence[int], bool]]:
        return [(one.token_ids.tolist(), one.starts, one.twice) for one in steps_of(batch, traits, companions)]

    lone = Companions(lone=True)
    rows = (Row(sequence_id=1, start=5, token=7), Row(sequence_id=2, start=3, token=8))
    assert steps(Decode(group=0, copies=(), rows=rows[:1]), lone) == [([[7], [7]], (5, 5), True)]
    assert steps(Decode(group=0, copies=(), rows=rows[:1]), NO_COMPANIONS) == [([[7]], (5,), False)]
    assert steps(Decode(group=0, copies=(), rows=rows), lone) == [([[7], [8]], (5, 3), False)]
    one = Piece(sequence_id=1, slot=1, start=4, tokens=(7,), logits="none")
    two = dataclasses.replace(one, tokens=(7, 8))
    assert steps(Prefill(group=0, copies=(), pieces=(one,)), lone) == [([[7], [7]], (4, 4), True)]
    assert steps(Prefill(group=0, copies=(), pieces=(two,)), lone) == [([[7, 8]], (4,), False)]


@pytest.mark.parametrize(("lone", "chunks"), [(False, True), (True, True), (False, False)])
def test_prompts_are_together_where_their_bits_do_not_depend_on_it(
    lone: bool, chunks: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact = open_artifact(llama(MESH, LlamaSize(layers=1)).write(tmp_path))
    found = BatchInvariance(differences=(), companions=Companions(lone=lone), chunks=chunks, unprobed=())
    monkeypatch.setattr(launch, "probe_batch_invariance", lambda *_, **__: found)
    plan = launch.make_plan(EngineArgs(artifact.folder, batch_invariant=True), artifact)
    assert plan.scheduling.prompts_together == (chunks and not lone)
    assert launch.make_plan(EngineArgs(artifact.folder), artifact).scheduling.prompts_together


# -- the option ----------------------------------------------------------------------------------------------------


def test_a_request_has_the_same_logprobs_whoever_else_is_served(tmp_path: Path) -> None:
    """With little memory, so that sequences are preempted, and with a prompt that another one has generated."""
    folder = rows_matter(2).write(tmp_path)
    params = SamplingParams(temperature=0.0, max_tokens=24, logprobs=1, ignore_eos=True)
    prompts = [{"prompt_token_ids": prompt} for prompt in random_prompts([20, 33, 18, 5])]

    def logprobs(llm: LLM, asked: list[Any]) -> list[Any]:
        return [
            [(token, one.logprob) for position in output.outputs[0].logprobs or [] for token, one in position.items()]
            for output in llm.generate(asked, params)
        ]

    def loaded(**options: Any) -> LLM:
        return LLM(folder, batch_invariant=True, max_batch_size=4, max_model_len=100, threads=1, **options)

    with loaded() as llm:
        longer = {"prompt_token_ids": [*prompts[0]["prompt_token_ids"], *_tokens(llm, prompts[0])[:12], 3, 4, 5]}
    asked = [*prompts, longer]
    alone = []
    for prompt in asked:
        with loaded() as llm:
            alone += logprobs(llm, [prompt])
    with loaded(paged_attention_num_blocks=8) as llm:
        found = logprobs(llm, asked)
        again = logprobs(llm, asked)
        assert llm.machine().replicas[0].usage.preemptions > 0
    assert found == alone
    assert again == alone


def _tokens(llm: LLM, prompt: Any) -> list[int]:
    params = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)
    return list(llm.generate([prompt], params)[0].outputs[0].token_ids)


def test_what_was_probed_is_the_models_to_say(tmp_path: Path) -> None:
    folder = rows_matter(2).write(tmp_path)
    with LLM(folder, skip_engine=True) as llm:
        assert llm.batch_invariance.companions == Companions(lone=True)
        assert llm.batch_invariance is llm.batch_invariance
    with LLM(folder, skip_engine=True, batch_invariant=True) as llm:
        assert llm.batch_invariance.companions == Companions(lone=True)


def test_an_encoder_has_no_batches(encoder_artifact: Path) -> None:
    with (
        LLM(encoder_artifact) as llm,
        pytest.raises(UnsupportedError, match="only a decoder runs several requests in one batch"),
    ):
        llm.batch_invariance  # noqa: B018 - the property raises
    with pytest.raises(UnsupportedError, match="leave out batch_invariant"):
        LLM(encoder_artifact, batch_invariant=True)


def test_it_is_on_or_off(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="batch_invariant must be True or False, got 'yes'"):
        LLM(tmp_path, batch_invariant="yes")  # type: ignore[arg-type]


def test_what_is_said() -> None:
    one = KernelDifference(op="MatMul", node="a", nodes=3, rows=(1,), relative=2.5e-7)
    lone = Companions(lone=True)
    several = dataclasses.replace(one, op="com.microsoft.MoE", rows=(1, 2, 3))
    found = BatchInvariance(differences=(), companions=NO_COMPANIONS, chunks=True, unprobed=())
    assert (found.invariant, str(found)) == (True, "a row has the same bits alone and in every batch")
    found = BatchInvariance(differences=(one,), companions=lone, chunks=True, unprobed=())
    assert str(found) == "a row alone has other last bits than in a batch: MatMul (by 2.5e-07 of its largest element)"
    found = BatchInvariance(differences=(several, one), companions=None, chunks=True, unprobed=())
    assert str(found) == (
        "a row's last bits depend on its batch: com.microsoft.MoE (by 2.5e-07 of its largest element), "
        "MatMul (by 2.5e-07 of its largest element)"
    )
    found = BatchInvariance(differences=(), companions=None, chunks=False, unprobed=("choice",))
    assert str(found) == "not known whether a row has the same bits in every batch: no probe for 'choice'"
