"""`plan`, `topology`, `inspect`, the report of a build and the engine's admission say the same bytes."""

from __future__ import annotations

import dataclasses
import json
import random

import onnx
import pytest

from furiosa_llm.builder.lower.build import Build
from furiosa_llm.builder.model_plan import size_plan
from furiosa_llm.builder.options import BuildOptions
from furiosa_llm.builder.pipeline import analyse_model
from furiosa_llm.builder.write.artifact import planned
from furiosa_llm.runtime.artifact.card import PE_NBYTES
from furiosa_llm.runtime.artifact.reader import SplitModel, open_artifact
from furiosa_llm.runtime.artifact.tools.inspection import inspect_artifact
from furiosa_llm.runtime.engine.engine_args import EngineArgs
from furiosa_llm.runtime.engine.launch import make_plan
from furiosa_llm.runtime.engine.scheduler import PAGE_SIZE
from furiosa_llm.runtime.errors import CapacityError
from furiosa_llm.runtime.placement.workload import Workload
from tests.cli.conftest import Cli
from tests.support.artifacts import ZOO, BuiltModel, built_model
from tests.support.tiers import MECHANISMS, tiered

FAST = ("tiny-llama-optimum", 4)
WORKLOADS = 12
"""For each slow row: 200 random choices altogether."""


def build_of(name: str, tp: int) -> Build:
    path = ZOO / name if name.endswith(".onnx") else ZOO / name / "model.onnx"
    analysed = analyse_model(path, BuildOptions())
    return analysed.lowered_for(BuildOptions(tensor_parallel_size=tp))


def unwritten(model: SplitModel) -> tuple[object, ...]:
    """All but what is known only when weights are written, and what a build is called."""
    manifest = model.manifest
    program = onnx.ModelProto()
    program.CopyFrom(model.program)
    for initializer in program.graph.initializer:
        del initializer.external_data[:]
    return (
        manifest.mesh,
        manifest.inputs,
        manifest.outputs,
        manifest.states,
        manifest.collectives,
        manifest.blocks,
        tuple(dataclasses.replace(tensor, file="", sha256="") for tensor in manifest.tensors),
        tuple((entry.name, entry.dtype, entry.shape, entry.stored) for entry in manifest.initializers),
        dataclasses.replace(manifest.model, name=""),
        program.SerializeToString(deterministic=True),
    )


@pytest.mark.parametrize(
    ("name", "tp", "workloads"), tiered([(*FAST, 1), *((*row, WORKLOADS) for row in MECHANISMS)], [(*FAST, 1)])
)
def test_all_say_the_same(name: str, tp: int, workloads: int, cli: Cli) -> None:
    built, build = built_model(name, tp), build_of(name, tp)
    artifact = open_artifact(built.folder)
    assert unwritten(planned(build)) == unwritten(artifact)
    choose = random.Random(f"{name} {tp}")
    for _ in range(workloads):
        workload = Workload(
            max_model_len=choose.randint(1, artifact.manifest.model.max_sequence_length or 512),
            max_batch_size=int(10 ** choose.uniform(0, 4.8)),
        )
        compare(built, build, workload, choose, cli)


def compare(built: BuiltModel, build: Build, workload: Workload, choose: random.Random, cli: Cli) -> None:
    """One workload on all numbers of cards, with `topology` and the engine asked of one of them."""
    plan = size_plan(build, workload)
    wanted = workload.max_batch_size * workload.max_model_len
    inspected = inspect_artifact(built.folder)
    assert plan.weight_nbytes == built.report.weight_nbytes == inspected.weights.pe_nbytes
    assert plan.state_nbytes_per_token == built.report.state_nbytes_per_token == inspected.state.nbytes_per_token
    deployment = choose.choice(plan.deployments)
    devices = ",".join(f"npu:{card}" for card in range(deployment.cards))
    sizes = ("-pp", deployment.pipeline_parallel_size, "-dp", deployment.data_parallel_size, "--devices", devices)
    limits = ("--max-batch-size", workload.max_batch_size, "--max-model-len", workload.max_model_len)
    text = cli("topology", built.folder, *sizes, *limits, "--json").out
    found = json.loads(text)
    used = [-(-(card["capacity_nbytes"] - card["free_nbytes"]) // card["num_pes"]) for card in found["cards"]]
    assert max(used) == deployment.pe_nbytes
    assert found["fits"] == deployment.fits == (deployment.pe_nbytes <= PE_NBYTES)
    if deployment.fits and found["kv_tokens"] is not None:
        assert found["kv_tokens"] == deployment.free_tokens + wanted
    if build.task == "decoder":
        args = EngineArgs(
            model=built.folder,
            devices=devices,
            pipeline_parallel_size=deployment.pipeline_parallel_size,
            max_batch_size=workload.max_batch_size,
            max_model_len=workload.max_model_len,
            paged_attention_num_blocks=2**60,
        )
        room = found["kv_tokens"] and found["kv_tokens"] // PAGE_SIZE
        with pytest.raises(CapacityError, match=f"room for {room} pages of" if room else "more than their|takes"):
            make_plan(args)
