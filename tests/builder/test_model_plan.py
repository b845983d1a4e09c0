"""`plan_model`: the figures of a plan equal those of the build, without the weights, at full size, and explained."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import math
import shutil
from pathlib import Path

import onnx
import pytest

from furiosa_llm.builder import OptionError, plan_model
from furiosa_llm.builder.lower.program_builder import INLINE_NBYTES
from furiosa_llm.builder.lower.weight_reads import weight_reads
from furiosa_llm.builder.lower.working_memory import facts_at, working_memory
from furiosa_llm.builder.options import BuildOptions
from furiosa_llm.builder.pipeline import analyse_model
from furiosa_llm.builder.plan.explain import Explained
from furiosa_llm.builder.plan_figures import ModelPlan, SizePlan
from furiosa_llm.builder.write.artifact import planned
from furiosa_llm.runtime.artifact.card import PE_NBYTES
from furiosa_llm.runtime.artifact.console import Console
from furiosa_llm.runtime.placement.capacity import stage_memory
from furiosa_llm.runtime.placement.stages import choose_stages
from furiosa_llm.runtime.placement.workload import Workload
from tests.support.artifacts import built_model
from tests.support.builder.stacks import stack
from tests.support.tiers import tiered

LAYERS = {
    "gemma-2-9b-genai-bf16-cuda": 42,
    "llama-3.1-405b-genai-bf16-cuda": 126,
    "llama-3.1-70b-dynamo-op21-bf16": 80,
    "llama-3.1-70b-genai-bf16-cuda": 80,
    "llama-3.1-8b-dynamo-op21-fp16": 32,
    "mixtral-8x7b-dynamo-op21-bf16": 32,
    "qwen2.5-0.5b-dynamo-op21-fp32": 24,
    "qwen2.5-0.5b-optimum-fp32": 24,
    "qwen3-30b-a3b-dynamo-op21-bf16": 48,
    "smollm2-135m-optimum-fp32": 30,
}
FEWEST = {
    "llama-3.1-8b-dynamo-op21-fp16": (2, 1),
    "llama-3.1-70b-dynamo-op21-bf16": (5, 4),
    "mixtral-8x7b-dynamo-op21-bf16": (3, 3),
    "qwen3-30b-a3b-dynamo-op21-bf16": (2, 2),
}
"""The fewest cards at tp 4 and 8 for one sequence of the model's own limit."""
FAST = {"qwen2.5-0.5b-dynamo-op21-fp32"}
"""The others, a few seconds each, run with the slow tests; of models of the same kind, one is left to a release."""
LEFT = {"mixtral-8x7b-dynamo-op21-bf16", "llama-3.1-405b-genai-bf16-cuda"}


@functools.cache
def plan_of(path: Path, tp: int, context: int | None = None, batch: int = 1) -> SizePlan:
    found = plan_model(path, tensor_parallel_sizes=(tp,), context=context, batch=batch)
    return found.plans[0]


def choice(plan: SizePlan, role: str, size: int | None = None) -> Explained:
    (found,) = (c for c in plan.choices if c.role == role and size in (None, c.size))
    return found


@pytest.mark.parametrize("name", tiered(sorted(LAYERS), FAST, LEFT))
def test_full_size_graphs(
    name: str, graphs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """2L+1 AllReduces (two a layer and one for the embedding), one AllGather of the scores, and the verdict first."""
    found = plan_model(graphs / name / "model.onnx")
    monkeypatch.setenv("COLUMNS", "80")
    console = Console(soft_wrap=True, highlight=False, markup=False)  # as the command shows it, but for two lines
    for one in found.shown():
        console.print(one)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 38
    for line, plan in zip(lines[1:3], found.plans, strict=True):
        assert plan.fewest is not None
        cards = f"{plan.fewest.cards} card{'s' if plan.fewest.cards > 1 else ''}"
        assert line.startswith(f"Fits on {cards} at tp {plan.tensor_parallel_size}: ")
    if name in FEWEST:
        assert tuple(plan.fewest.cards for plan in found.plans if plan.fewest is not None) == FEWEST[name]
    assert [plan.tensor_parallel_size for plan in found.plans] == [4, 8]
    for plan in found.plans:
        counts = {kind: sum(c.count for c in plan.collectives if c.kind == kind) for kind in ("AllReduce", "AllGather")}
        assert counts == {"AllReduce": 2 * LAYERS[name] + 1, "AllGather": 1}
        assert plan.num_blocks == LAYERS[name]
        assert plan.replicated_nbytes < 0.02 * found.nbytes


@pytest.mark.parametrize(
    ("name", "tp"),
    tiered(
        itertools.product(
            ["tiny-llama-genai-fp32", "tiny-qwen2-14-2-optimum", "tiny-t5-optimum/decoder_with_past_model.onnx"], [4, 8]
        ),
        [("tiny-qwen2-14-2-optimum", 8), ("tiny-t5-optimum/decoder_with_past_model.onnx", 4)],
    ),
)
def test_a_plan_says_what_the_build_does(name: str, tp: int, zoo: Path) -> None:
    model = zoo / name if name.endswith(".onnx") else zoo / name / "model.onnx"
    plan = plan_of(model, tp, context=16, batch=3)
    report = built_model(name, tp).report
    assert plan.weight_nbytes == report.weight_nbytes
    assert plan.replicated_nbytes == report.replicated_nbytes
    assert plan.padding_nbytes == report.padding_nbytes
    assert plan.state_nbytes_per_token == report.state_nbytes_per_token
    counts = {kind: sum(c.count for c in plan.collectives if c.kind == kind) for kind in report.collectives}
    assert counts == report.collectives
    assert sum(c.nbytes * c.count for c in plan.collectives) == report.collective_nbytes
    assert plan.state_nbytes == 16 * 3 * report.state_nbytes_per_token


@pytest.mark.slow
def test_weights_need_not_be_there(graphs: Path) -> None:
    folder = graphs / "qwen2.5-0.5b-dynamo-op21-fp32"
    assert {path.name for path in folder.iterdir()} == {"model.onnx", "config.json"}
    assert plan_of(folder / "model.onnx", 8).weight_nbytes > 2e8


@pytest.mark.parametrize(
    "name",
    tiered(
        ["tiny-llama-genai-fp32", "tiny-llama-genai-int4-qdq", "tiny-gptoss-genai-fp32-fullkv"],
        ["tiny-llama-genai-int4-qdq"],
    ),
)
def test_without_its_data_a_graph_has_the_same_plan(name: str, zoo: Path, tmp_path: Path) -> None:
    shutil.copy(zoo / name / "model.onnx", tmp_path)
    with_data, without = (
        plan_of(zoo / name / "model.onnx", 4, context=64),
        plan_of(tmp_path / "model.onnx", 4, context=64),
    )
    assert without.collectives == with_data.collectives
    assert without.choices == with_data.choices
    # Small weights that are here are written into the program; those that are not count as stored.
    initializers = onnx.load(zoo / name / "model.onnx").graph.initializer
    small = sum(len(t.raw_data) for t in initializers if len(t.raw_data) <= INLINE_NBYTES)
    assert with_data.weight_nbytes <= without.weight_nbytes <= with_data.weight_nbytes + small


def test_why_heads_are_as_they_are(zoo: Path) -> None:
    """14 query and 2 key heads over 8 PEs: key heads on four PEs each, the seven query heads of each padded to 8."""
    plan = plan_of(zoo / "tiny-qwen2-14-2-optimum" / "model.onnx", 8)
    keys, queries = choice(plan, "key/value heads"), choice(plan, "query heads per key/value head")
    assert (keys.size, keys.parts) == (2, 2)
    assert "held alike by 4 PEs" in keys.why
    assert keys.replicated_nbytes > 0
    wider = {a.parts: a.reason for a in keys.alternatives}
    assert wider[4] == "2 over 4 needs padding to 4 (2.00x, limit 1.34x)"
    assert (queries.size, queries.parts, queries.padded_size) == (7, 4, 8)
    assert "7 padded to 8, +14%" in queries.why
    # Each of the two layers' query and output projections (224 x 224) and the bias: one part in seven of an eighth.
    assert queries.padding_nbytes == pytest.approx(2 * (2 * 224 * 224 + 224) * 4 / 8 / 7, rel=0.01)
    whole = next(a for a in queries.alternatives if a.parts == 1)
    assert whole.saved_nbytes is not None
    assert whole.saved_nbytes < 0
    assert "saves" in queries.why


def test_every_alternative_is_refused_with_a_price_or_a_reason(zoo: Path) -> None:
    plan = plan_of(zoo / "tiny-llama-9-3-optimum" / "model.onnx", 8)
    for explained in plan.choices:
        parts = {a.parts for a in explained.alternatives}
        assert parts == {p for p in (1, 2, 4, 8) if p > explained.parts or (p == 1 < explained.parts)}
        for other in explained.alternatives:
            assert other.reason
            assert (other.saved_nbytes is None) == (other.collectives is None)


def test_activations_are_the_most_that_is_alive(tmp_path: Path) -> None:
    """At the end: the residual stream (16 floats a position), the local scores (10) and the gathered ones (40)."""
    onnx.save(stack(9), tmp_path / "model.onnx")
    options = BuildOptions(fuse_attention=False)
    build = analyse_model(tmp_path / "model.onnx", options).lowered_for(options)
    inner, residual, scores = 5 * 64 // 4 * 4, 5 * 16 * 4, 5 * 40 * 4
    layer = residual + 2 * inner  # the inner values before and behind Relu, beside what is added to later
    workload = Workload(max_model_len=32, max_batch_size=5, prefill_chunk_size=1)
    found = working_memory(build, workload, functools.partial(facts_at, build))
    assert found is not None
    assert found.nbytes == max(layer, scores // 4 + scores)
    assert found.op in ("Relu", "MatMul", "AllGather")


def test_what_fits(graphs: Path) -> None:
    """812 GB of weights in 6 GB PEs: 17 cards at least."""
    plan = plan_of(graphs / "llama-3.1-405b-genai-bf16-cuda" / "model.onnx", 8, context=4096, batch=2)
    fits = {d.cards: d for d in plan.deployments if d.fits}
    assert plan.fewest == fits[min(fits)]
    assert 17 <= min(fits) < 32
    assert [d.cards for d in plan.deployments] == list(range(1, 33))
    for deployment in plan.deployments:
        d = deployment
        assert 8 * d.cards == 8 * d.pipeline_parallel_size * d.data_parallel_size
        assert d.pipeline_parallel_size <= d.cards
        assert d.fits == (d.pe_nbytes <= PE_NBYTES)
        assert (d.free_tokens > 0) <= d.fits


def test_a_token_reads_the_experts_that_it_goes_through(zoo: Path) -> None:
    """Two of four experts in each layer for one sequence, and for four sequences two to four; one row of the table."""
    analysed = analyse_model(zoo / "tiny-mixtral-dynamo-tf5" / "model.onnx", BuildOptions())
    build = analysed.lowered_for(BuildOptions())
    tensors = build.lowered.tensors.values()
    experts = sum(t.local_nbytes for t in tensors if len(t.local_shape) == 3 and t.local_shape[0] == 4)
    table = next(t.local_nbytes for t in tensors if t.source is not None and "embed_tokens" in str(t.source.name))
    rest = sum(t.local_nbytes for t in tensors) - experts - table
    assert experts > rest / 4
    row = table // 256  # of a vocabulary of 1024
    for batch in (1, 2, 4):
        weights = {name: tensor.local_nbytes for name, tensor in build.lowered.tensors.items()}
        least, most = weight_reads(
            build, Workload(max_batch_size=batch, max_model_len=16), weights, functools.partial(facts_at, build)
        )
        assert least == rest + experts // 2 + row
        assert most == rest + min(batch * experts // 2, experts) + min(batch * row, table)


def test_a_plan_shows_itself(zoo: Path) -> None:
    found = plan_model(zoo / "tiny-llama-optimum" / "model.onnx", context=64)
    assert repr(found) == f"<ModelPlan of {found.model}: tp 4, tp 8, 1 x 64 tokens>"
    shown = str(found)
    assert "Fits on 1 card at tp 4: " in shown
    assert "collectives for a token" in shown
    assert "\x1b" not in shown
    page = found._repr_html_()
    assert page.startswith("<pre style=")
    assert "Fits on 1 card at tp 4: " in page


def test_a_report_shows_itself() -> None:
    report = built_model("tiny-llama-optimum", 4).report
    assert repr(report).startswith(f"<BuildReport of {report.artifact}: tp 4, ")
    shown = str(report)
    assert "tensor parallel over 4 PEs" in shown
    assert "static proof" in shown
    page = dataclasses.replace(report, warnings=("no <b>",))._repr_html_()
    assert page.startswith("<pre style=")
    assert "warning: no &lt;b&gt;" in page


def test_a_plan_s_names_steer_no_page(zoo: Path) -> None:
    found = plan_model(zoo / "tiny-llama-optimum" / "model.onnx", context=64, tensor_parallel_sizes=(4,))
    page = dataclasses.replace(found, model="<script>\x1b[2J[bold]")._repr_html_()
    assert "&lt;script&gt;\\u001b[2J[bold]: " in page


def test_ranks_of_more_than_a_card_have_no_place(zoo: Path) -> None:
    """As `topology` and the engine say of such an artifact."""
    found = plan_model(zoo / "tiny-llama-optimum" / "model.onnx", tensor_parallel_sizes=(16,), experimental_tp=True)
    assert found.plans[0].deployments == ()


@pytest.mark.parametrize("option", ["context", "batch", "chunk"])
def test_workloads_below_one_mean_nothing(option: str, zoo: Path) -> None:
    with pytest.raises(OptionError, match=f"{option} must be an integer of at least 1, got 0"):
        plan_model(zoo / "tiny-llama-genai-fp32" / "model.onnx", **{option: 0})  # type: ignore[arg-type]


def test_json_holds_everything(zoo: Path) -> None:
    found = plan_model(zoo / "tiny-llama-genai-fp32" / "model.onnx")
    again = json.loads(json.dumps(found.to_json()))
    assert set(again) == set(ModelPlan.__dataclass_fields__) - {"builds"}
    assert [set(plan) for plan in again["plans"]] == 2 * [set(SizePlan.__dataclass_fields__)]
    assert all(math.isfinite(plan["floor_us"]) for plan in again["plans"])
    room = again["plans"][0]["rooms"][0]
    assert (room["cards"], room["context"], room["data_parallel_size"]) == (1, 512, 2)


def test_a_state_is_kept_where_its_next_value_is_made(zoo: Path) -> None:
    """An exporter of sliding windows cuts all states before the first layer."""
    analysed = analyse_model(zoo / "tiny-mistral-dynamo-tf5" / "model.onnx", BuildOptions())
    model = planned(analysed.lowered_for(BuildOptions()))
    first, second = stage_memory(model, choose_stages(model, pipeline_parallel_size=2), Workload())
    assert first.kv_nbytes_per_token == second.kv_nbytes_per_token == sum(model.manifest.state_nbytes.values()) // 2
