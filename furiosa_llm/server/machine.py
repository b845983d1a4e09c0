"""`GET /machine`: what lies on every PE, and what replicas, stages and collectives have done so far."""

from __future__ import annotations

import dataclasses
import time
from typing import Literal

from fastapi import APIRouter
from pydantic import BaseModel, Field

import furiosa_llm
from furiosa_llm.runtime.engine.machine_snapshot import MachineSnapshot, PESnapshot, ReplicaSnapshot
from furiosa_llm.runtime.execution.counters import TransferKind
from furiosa_llm.server.embedder import Embedder
from furiosa_llm.server.encoder_decoder import EncoderDecoder
from furiosa_llm.server.metrics import Metrics
from furiosa_llm.server.model import Decoder
from furiosa_llm.server.recent_load import Expectation
from furiosa_llm.server.state import State

router = APIRouter()

_TASKS: dict[type, Literal["decoder", "encoder", "encoder-decoder"]] = {
    Decoder: "decoder",
    Embedder: "encoder",
    EncoderDecoder: "encoder-decoder",
}


class Parallelism(BaseModel):
    """The sizes of parallelism, and the PEs."""

    tensor_parallel_size: int
    pipeline_parallel_size: int
    data_parallel_size: int
    devices: str


class MachinePE(BaseModel):
    """A PE: what it is (null: not used), and what lies in its memory."""

    pe: int
    replica: int | None
    stage: int | None
    rank: int | None
    memory_nbytes: int = Field(description="Its even share of the card's memory.")
    weights_nbytes: int = Field(
        description="What it reads; what several PEs of a card read counts an equal part for each."
    )
    kv_nbytes: int = Field(description="Room for KV.")
    kv_used_nbytes: int = Field(description="KV in use, that of the prefix cache included.")
    host: str | None = Field(description="The host that runs it; null: this one, or none at the moment.")


class MachineCard(BaseModel):
    """A card that is used, with all of its PEs."""

    npu: int
    pes: list[MachinePE]


class MachineReplica(BaseModel):
    """A replica: its state, its sequences, and the pages of its KV cache."""

    replica: int
    alive: bool
    ready: bool
    running: int
    waiting: int
    used_pages: int
    num_pages: int


class MachineStage(BaseModel):
    """A stage of a replica: its blocks, how long it has been running, and how often."""

    replica: int
    stage: int
    first_block: int
    num_blocks: int
    busy_seconds: float
    batches: int


class MachineCollective(BaseModel):
    """What one kind of transfer did in a stage; Send is what the stage got of earlier ones."""

    replica: int
    stage: int
    kind: TransferKind
    calls: int
    nbytes: int = Field(description="What each PE of the stage received.")
    seconds: float = Field(description="What was spent on it, waiting included.")


class MachineDifference(BaseModel):
    """An op whose kernel gives a row other last bits in one batch than in another."""

    op: str
    node: str
    nodes: int
    rows: list[int] = Field(description="Numbers of rows among which a row has other bits than among many.")
    relative: float = Field(description="The largest difference, relative to the largest element of the result.")


class MachineBatchInvariance(BaseModel):
    """Whether a request's bits depend on how many others run, as probed on this machine."""

    enabled: bool = Field(description="Whether --batch-invariant keeps them from it.")
    invariant: bool = Field(description="Whether they do not depend on it anyway.")
    possible: bool = Field(description="Whether --batch-invariant can do it.")
    chunks: bool = Field(description="Whether a prompt has the same bits however it is cut, as prefix caching does.")
    text: str = Field(description="The same in words.")
    differences: list[MachineDifference]


class MachineTokens(BaseModel):
    """Tokens of prompts, and those that were generated."""

    prompt: int
    generation: int


class MachineRequests(BaseModel):
    """Requests so far, by prompt."""

    received: int
    succeeded: int
    cancelled: int
    """Whose client stopped them, or went."""
    failed: int


class MachineFigure(BaseModel):
    """A figure of the last minute, as it was and as it was expected."""

    measured: float | None
    predicted: float | None = Field(description="null: by the device file such requests have no room.")


class MachineRecentLoad(BaseModel):
    """The requests that ended in the last minute: their means, and what was expected of so many of such sizes."""

    requests: int
    concurrency: float = Field(description="Sequences under way while they ran.")
    prompt_tokens: float = Field(description="Of a prompt, less what the prefix cache had.")
    generated_tokens: float = Field(description="Of a completion.")
    ttft_ms: MachineFigure
    tpot_ms: MachineFigure = Field(description="measured is null if every completion is one token.")
    tokens_per_second: MachineFigure = Field(description="Generated, of all requests together.")


class MachinePrediction(BaseModel):
    """What the file of --device predicts, beside what is measured."""

    device: str
    recent: MachineRecentLoad | None = Field(description="null: no request ended in the last minute.")


class MachineResponse(BaseModel):
    """The live machine. What is counted is counted since the model was loaded, and only grows."""

    model: str
    task: Literal["decoder", "encoder", "encoder-decoder"]
    version: str
    time: float = Field(description="Seconds since 1970.")
    uptime_seconds: float
    parallelism: Parallelism
    batch_invariance: MachineBatchInvariance | None = Field(description="null: requests run one after another.")
    verification: str = Field(description="What verification.json said as the model was loaded: what was compared.")
    cards: list[MachineCard]
    replicas: list[MachineReplica]
    stages: list[MachineStage]
    collectives: list[MachineCollective]
    tokens: MachineTokens
    requests: MachineRequests
    prediction: MachinePrediction | None = Field(description="null: the server has no --device.")


@router.get("/machine")
async def machine(state: State) -> MachineResponse:
    """The cards, PEs, replicas and stages of the model, at this moment."""
    model, snapshot = state.model, state.model.kind.machine()
    return MachineResponse(
        model=model.names[0],
        task=_TASKS[type(model.kind)],
        version=furiosa_llm.__version__,
        time=time.time(),
        uptime_seconds=time.monotonic() - state.started,
        parallelism=Parallelism.model_validate(snapshot.topology.as_dict()),
        batch_invariance=_batch_invariance(model.kind) if isinstance(model.kind, Decoder) else None,
        verification=model.verification,
        cards=[MachineCard(npu=card.npu, pes=[_pe(one) for one in card.pes]) for card in snapshot.cards],
        replicas=[_replica(one) for one in snapshot.replicas],
        stages=_stages(snapshot),
        collectives=_collectives(snapshot),
        tokens=_tokens(state.metrics),
        requests=_requests(state.metrics),
        prediction=None if model.expected is None else await _prediction(model.expected, state.metrics),
    )


async def _prediction(expected: Expectation, metrics: Metrics) -> MachinePrediction:
    load = metrics.load.read()
    if load is None:
        return MachinePrediction(device=expected.device, recent=None)
    said = await expected.of(load)
    return MachinePrediction(
        device=expected.device,
        recent=MachineRecentLoad(
            requests=load.requests,
            concurrency=load.concurrency,
            prompt_tokens=load.prompt_tokens,
            generated_tokens=load.generated_tokens,
            ttft_ms=_figure(1000, load.ttft, None if said is None else said.ttft),
            tpot_ms=_figure(1000, load.tpot, None if said is None else said.tpot),
            tokens_per_second=_figure(1, load.output_tps, None if said is None else said.output_tps),
        ),
    )


def _figure(unit: float, measured: float | None, predicted: float | None) -> MachineFigure:
    return MachineFigure(
        measured=None if measured is None else unit * measured,
        predicted=None if predicted is None else unit * predicted,
    )


def _batch_invariance(model: Decoder) -> MachineBatchInvariance:
    probed = model.probe()
    return MachineBatchInvariance(
        enabled=model.batch_invariant,
        invariant=probed.invariant,
        possible=probed.companions is not None,
        chunks=probed.chunks,
        text=str(probed),
        differences=[MachineDifference(**dataclasses.asdict(one)) for one in probed.differences],
    )


def _tokens(metrics: Metrics) -> MachineTokens:
    prompt, generation = metrics.token_counts()
    return MachineTokens(prompt=int(prompt), generation=int(generation))


def _requests(metrics: Metrics) -> MachineRequests:
    return MachineRequests(**metrics.request_counts())


def _pe(one: PESnapshot) -> MachinePE:
    return MachinePE(
        pe=one.pe.index,
        replica=one.replica,
        stage=one.stage,
        rank=one.rank,
        memory_nbytes=one.memory_nbytes,
        weights_nbytes=one.weights_nbytes,
        kv_nbytes=one.kv_nbytes,
        kv_used_nbytes=one.kv_used_nbytes,
        host=one.host,
    )


def _replica(one: ReplicaSnapshot) -> MachineReplica:
    return MachineReplica(
        replica=one.replica,
        alive=one.alive,
        ready=one.ready,
        running=one.usage.running,
        waiting=one.usage.waiting,
        used_pages=one.usage.used_pages,
        num_pages=one.usage.num_pages,
    )


def _stages(snapshot: MachineSnapshot) -> list[MachineStage]:
    return [
        MachineStage(
            replica=replica.replica,
            stage=one.stage.index,
            first_block=one.stage.first_block,
            num_blocks=one.stage.num_blocks,
            busy_seconds=one.counts.busy_seconds,
            batches=one.counts.runs,
        )
        for replica in snapshot.replicas
        for one in replica.stages
    ]


def _collectives(snapshot: MachineSnapshot) -> list[MachineCollective]:
    return [
        MachineCollective(
            replica=replica.replica,
            stage=one.stage.index,
            kind=counts.kind,
            calls=counts.calls,
            nbytes=counts.nbytes,
            seconds=counts.seconds,
        )
        for replica in snapshot.replicas
        for one in replica.stages
        for counts in one.counts.transfers
    ]
