"""From an artifact's folder to an engine that runs it: topology, stages, limits, then a runner for every replica."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from contextvars import copy_context
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from furiosa_llm.runtime.adapters.registry import AdapterRegistry
from furiosa_llm.runtime.artifact.adapters.inputs import adapter_inputs
from furiosa_llm.runtime.artifact.adapters.stored import own_adapters
from furiosa_llm.runtime.artifact.composite import whole_of_part
from furiosa_llm.runtime.artifact.compute import computing
from furiosa_llm.runtime.artifact.dimensions import vocabulary_dim
from furiosa_llm.runtime.artifact.progress import tell
from furiosa_llm.runtime.artifact.reader import Artifact, open_artifact
from furiosa_llm.runtime.artifact.tools.originals import default_inputs
from furiosa_llm.runtime.engine.core import EngineCore, ModelLimits
from furiosa_llm.runtime.engine.engine_args import DEFAULT_BATCH_SIZE, EngineArgs
from furiosa_llm.runtime.engine.machine_snapshot import HostOf, layout_of
from furiosa_llm.runtime.engine.replica import FaultPolicy, Replica
from furiosa_llm.runtime.engine.scheduler import PAGE_SIZE, SchedulerLimits
from furiosa_llm.runtime.engine.slots import LEAST_CHUNK
from furiosa_llm.runtime.errors import CapacityError, ContextLengthError, InputError, UnsupportedError
from furiosa_llm.runtime.execution.scores import scores_output
from furiosa_llm.runtime.placement.block_reads import block_starts
from furiosa_llm.runtime.placement.capacity import check_weights, kv_pages, stage_memory
from furiosa_llm.runtime.placement.stages import Stage, check_tensor_parallel_size, choose_stages
from furiosa_llm.runtime.placement.topology import Topology, make_topology
from furiosa_llm.runtime.placement.workload import DEFAULT_CHUNK_SIZE, DEFAULT_LENGTH, Workload
from furiosa_llm.runtime.program.limits import LONGEST_STEP_SECONDS, step_nbytes, step_seconds
from furiosa_llm.runtime.runners.batch import NO_COMPANIONS, Companions, Runner
from furiosa_llm.runtime.runners.batch_invariance import BatchInvariance, probe_batch_invariance
from furiosa_llm.runtime.runners.local_runner import Host
from furiosa_llm.runtime.runners.process_runner import ProcessHost
from furiosa_llm.runtime.tokens.tokenizer import Tokenizer, tokenizer_of

if TYPE_CHECKING:
    from furiosa_llm.runtime.distributed.remote_host import Cluster, RemoteHost

logger = logging.getLogger(__name__)

_OF_DECODERS = (
    *("devices", "pipeline_parallel_size", "data_parallel_size", "num_blocks_per_pp_stage", "workers"),
    *("paged_attention_num_blocks", "max_batch_size", "max_model_len", "max_prompt_len", "prefill_chunk_size"),
    *("batch_invariant", "distributed_executor_backend", "ray_address", "placement_timeout", "artifact_cache"),
)
"""Options that only a model with an engine has."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What is going to run, before anything is loaded to run it."""

    artifact: Artifact
    """The artifact, its manifest and program checked."""
    tokenizer: Tokenizer | None
    """The artifact's, or the one that was given; None if there is none, and prompts have to be token ids."""
    topology: Topology
    """Which PE has which rank of which stage of which replica."""
    stages: tuple[Stage, ...]
    """The stages of a replica."""
    limits: ModelLimits
    """What requests have to keep to."""
    scheduling: SchedulerLimits
    """The same limits as a replica's scheduler sees them."""
    batch_invariance: BatchInvariance | None
    """What was found of this machine's kernels, if `batch_invariant` asks for it."""

    @property
    def companions(self) -> Companions:
        """How the bits of a row are kept from depending on other rows, if they are."""
        companions = None if self.batch_invariance is None else self.batch_invariance.companions
        return replace(companions or NO_COMPANIONS, apart=self.batch_invariance is not None)


def open_model(args: EngineArgs) -> Artifact:
    """The artifact that `args` name, which is a model by itself.

    Raises ArtifactError for a damaged one, and InputError for one of another tensor parallel size than asked for.
    """
    whole = whole_of_part(args.model)
    if whole is not None:
        raise UnsupportedError(f"{args.model} is a part of the encoder-decoder in {whole}; load that one")
    tell("opening the artifact")
    full = False if args.remote else args.full_verification  # there, each host compares what it reads
    artifact = computing(open_artifact(args.model, full=full), args.compute)
    check_tensor_parallel_size(artifact, args.tensor_parallel_size)
    return artifact


def only_of_one_replica(args: EngineArgs, what: str) -> None:
    """Raises UnsupportedError if `args` ask of `what`, which runs as one replica of one stage, for more than that."""
    refused = [name for name in _OF_DECODERS if (value := getattr(args, name)) is True or value not in (None, 1, False)]
    if refused:
        raise UnsupportedError(f"{what} runs as one replica of one stage, without a KV cache; leave out {refused[0]}")


def make_plan(args: EngineArgs, artifact: Artifact | None = None) -> Plan:
    """Reads the artifact, if it is not given, and decides how it will run.

    Raises ArtifactError for a damaged artifact, UnsupportedError for one that does not generate, TokenizerError,
    TopologyError if sizes and devices do not go together, CapacityError if the weights do not fit the PEs, and
    InputError for an artifact of another tensor parallel size than asked for.
    """
    artifact = open_model(args) if artifact is None else artifact
    _check_generates(artifact)
    stages = choose_stages(
        artifact,
        pipeline_parallel_size=args.pipeline_parallel_size,
        num_blocks_per_pp_stage=args.num_blocks_per_pp_stage,
    )
    topology = make_topology(
        artifact.manifest.mesh.size,
        pipeline_parallel_size=len(stages),
        data_parallel_size=args.data_parallel_size,
        devices=args.devices,
        allow_subset=args.allow_subset,
        max_pipeline_parallel_size=len(block_starts(artifact)),
    )
    check_weights(artifact, topology, stages)
    invariance = _invariance(artifact, args) if args.batch_invariant else None
    limits, scheduling = _limits(artifact, topology, stages, args)
    if invariance is not None and not (invariance.chunks and scheduling.prefill_chunk_size > LEAST_CHUNK):
        # What follows a prefix that is found would have other bits than in the whole prompt.
        scheduling = replace(scheduling, prefix_caching=False)
    if invariance is not None and not (invariance.chunks and invariance.invariant):
        scheduling = replace(scheduling, prompts_together=False)
    return Plan(
        artifact=artifact,
        tokenizer=tokenizer_of(artifact, args.tokenizer, wait=False),
        topology=topology,
        stages=stages,
        limits=limits,
        scheduling=scheduling,
        batch_invariance=invariance,
    )


def _invariance(artifact: Artifact, args: EngineArgs) -> BatchInvariance:
    """What `batch_invariant` takes on this machine; raises UnsupportedError if nothing helps."""
    invariance = probe_batch_invariance(artifact, mapped=args.mapped)
    if invariance.companions is None:
        raise UnsupportedError(
            f"batch_invariant is not possible for {artifact.folder} on this machine: {invariance}; leave it out"
        )
    return invariance


def start(plan: Plan, args: EngineArgs) -> EngineCore:
    """Loads the weights, once for all replicas, and starts the replicas; raises TokenizerError for a malformed one."""
    policy = FaultPolicy(step_timeout=args.step_timeout or _step_timeout(plan))
    with ExitStack() as opened:
        host = _open_host(plan, args)
        opened.callback(host.close)
        count = plan.topology.data_parallel_size
        with ThreadPoolExecutor(count if args.remote else 1) as pool:
            made = [
                # in this context, whose progress is shown
                pool.submit(copy_context().run, Replica, index, partial(host.make, index), plan.scheduling, policy)
                for index in range(count)
            ]
        for one in made:
            if one.exception() is None:
                opened.callback(one.result().close)
        replicas = [one.result() for one in made]
        if plan.tokenizer is not None:
            plan.tokenizer.wait_until_loaded()  # it was loading while the weights were
        opened.pop_all()
    return EngineCore(
        replicas=replicas,
        tokenizer=plan.tokenizer,
        limits=plan.limits,
        adapters=registry_of(plan.artifact),
        seed=args.seed,
        layout=replace(layout_of(plan.artifact, plan.topology, plan.stages, page_size=PAGE_SIZE), host_of=host.host_of),
        close_model=host.close,
    )


def _step_timeout(plan: Plan) -> float:
    """What a batch may take, with those of the other groups that it may wait for."""
    tokens = max(plan.scheduling.prefill_chunk_size, plan.scheduling.slots_per_group)
    seconds = step_seconds(plan.artifact.manifest, tokens) * len(plan.stages)
    return min(LONGEST_STEP_SECONDS, seconds)


def registry_of(artifact: Artifact) -> AdapterRegistry:
    """The adapters that `artifact` takes, and those in its folder."""
    inputs = adapter_inputs(artifact.manifest, artifact.program.graph, default_inputs(artifact))
    return AdapterRegistry(inputs, model=artifact.manifest.model.name, own=own_adapters(artifact))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Host:
    """What makes the runner of a replica, what ends it all, and where stages are, if not here."""

    make: Callable[[int], Runner]
    close: Callable[[], None]
    host_of: HostOf | None = None


def _open_host(plan: Plan, args: EngineArgs) -> _Host:
    nbytes = args.max_step_nbytes or step_nbytes(
        plan.artifact.manifest,
        tokens=max(plan.scheduling.prefill_chunk_size, plan.scheduling.slots_per_group),
        length=plan.scheduling.max_length,
    )
    options: dict[str, Any] = {
        "mapped": args.mapped,
        "separate": args.separate,
        "companions": plan.companions,
        "max_step_nbytes": nbytes,
    }
    slots = plan.scheduling.slots_per_group
    if args.spin_us and (args.remote or args.workers is not None):
        raise InputError(
            f"spin_us={args.spin_us} is for the threads of this process; leave it out, or workers and the backend ray"
        )
    if args.remote:
        remote = _remote_host(plan, args, options)
        make = partial(remote.runner, slots_per_group=slots)
        return _Host(make=make, close=remote.close, host_of=remote.host_of)
    if args.workers is not None and args.threads is not None:
        raise InputError(f"workers={args.workers} and threads={args.threads} exclude each other: leave one out")
    host: Host | ProcessHost
    if args.workers is None:
        host = Host(plan.artifact, plan.stages, threads=args.threads, spin_us=args.spin_us, **options)
    else:
        host = ProcessHost(plan.artifact, plan.stages, workers=args.workers, **options)
    return _Host(make=lambda _: host.runner(slots_per_group=slots), close=host.close)


def _remote_host(plan: Plan, args: EngineArgs, options: dict[str, Any]) -> RemoteHost:
    """The stages on other hosts; raises UnsupportedError if what they need is not installed."""
    refuse_without_ray()
    if args.workers is not None or args.threads is not None:
        raise InputError("workers and threads are of stages in this process; leave them out, or the backend ray")
    from furiosa_llm.runtime.distributed.remote_host import RemoteHost

    cluster = open_cluster(plan.topology, args)
    try:
        return RemoteHost(
            plan.artifact,
            plan.stages,
            cluster,
            max_length=plan.scheduling.max_length,
            verify=args.full_verification is not False,
            cache=None if args.artifact_cache is None else str(args.artifact_cache),
            **options,
        )
    except BaseException:
        cluster.close()
        raise


def open_cluster(topology: Topology, args: EngineArgs) -> Cluster:
    """The hosts of `topology`, found by Ray, with token authentication unless the environment says otherwise."""
    if "ray" not in sys.modules:  # it looks at its environment as it is imported
        os.environ.setdefault("RAY_AUTH_MODE", "token")
        os.environ.setdefault("RAY_worker_niceness", "0")
    from furiosa_llm.runtime.distributed.ray_cluster import RayCluster

    return RayCluster(topology, address=args.ray_address, placement_seconds=args.placement_timeout)


def card_hosts(topology: Topology, ray_address: str) -> tuple[str, ...]:
    """The host of each card of the Ray cluster at the address, which must have those of `topology`."""
    refuse_without_ray()
    cluster = open_cluster(topology, EngineArgs("", ray_address=ray_address, placement_timeout=1.0))
    try:
        return tuple(cluster.card_hosts)
    finally:
        cluster.close()


def refuse_without_ray() -> None:
    """Raises UnsupportedError that names the extra if it is not installed."""
    missing = [name for name, module in (("ray", "ray"), ("pyzmq", "zmq")) if find_spec(module) is None]
    if missing:
        raise UnsupportedError(
            f"distributed_executor_backend='ray' needs {' and '.join(missing)}; "
            f"`pip install 'furiosa-llm-onnx[ray]'` has what it takes"
        )


def load_engine(args: EngineArgs) -> EngineCore:
    """`make_plan`, then `start`."""
    return start(make_plan(args), args)


def _check_generates(artifact: Artifact) -> None:
    model = artifact.manifest.model
    if model.task != "decoder":
        raise UnsupportedError(
            f"generate API can only be used for generative models; {model.name!r:.80} is of the task {model.task!r}: "
            f"use `furiosa-llm run`"
        )


def _limits(
    artifact: Artifact, topology: Topology, stages: tuple[Stage, ...], args: EngineArgs
) -> tuple[ModelLimits, SchedulerLimits]:
    model, scheduler, buckets = artifact.manifest.model, args.scheduler(), args.bucket_config
    max_length = _max_length(model.max_sequence_length, args)
    max_prompt = args.max_prompt_len or (buckets.max_prompt_len if buckets else None)
    batch = args.max_batch_size or (buckets.max_batch_size if buckets else DEFAULT_BATCH_SIZE)
    batch = min(batch, scheduler.max_processing_samples)
    workload = Workload(
        max_batch_size=batch,
        max_model_len=max_length or DEFAULT_LENGTH,
        prefill_chunk_size=scheduler.prefill_chunk_size or DEFAULT_CHUNK_SIZE,
    )
    num_pages = _num_pages(artifact, topology, stages, workload, args)
    capacity = num_pages * PAGE_SIZE
    if max_length is not None and capacity < max_length:
        logger.warning(
            "the KV cache has room for %d tokens: no sequence can be as long as the limit of %d", capacity, max_length
        )
    limits = ModelLimits(
        max_length=max_length,
        max_prompt_length=max_prompt,
        capacity=capacity,
        vocab_size=model.vocab_size or _num_logits(artifact),
        eos_token_ids=frozenset(model.eos_token_ids),
    )
    scheduling = SchedulerLimits(
        num_groups=len(stages),
        slots_per_group=-(-batch // len(stages)),
        num_pages=num_pages,
        page_size=PAGE_SIZE,
        max_length=min(max_length or capacity, capacity),
        prefill_chunk_size=workload.prefill_chunk_size,
        # Of states that are appended to, not every position need be kept: a window may have cut some off.
        prefix_caching=scheduler.enable_prefix_caching
        and all(state.mode == "in_place" for state in artifact.manifest.states),
        batch_invariant=args.batch_invariant,
    )
    return limits, scheduling


def _num_logits(artifact: Artifact) -> int | None:
    """How many tokens the model chooses between, by the shape of its logits."""
    shape = scores_output(artifact.manifest.outputs).shape
    size = shape[vocabulary_dim(shape)]
    return size if isinstance(size, int) else None


def _max_length(of_model: int | None, args: EngineArgs) -> int | None:
    """The limit of prompt and completion together: the model's, or a lower one that was asked for."""
    wanted = args.max_model_len or (args.bucket_config.max_model_len if args.bucket_config else None)
    if wanted is None or of_model is None:
        return wanted or of_model
    if wanted > of_model:
        raise ContextLengthError(
            f"`max_model_len` is larger than the model's max number of positions: {wanted} > {of_model}; "
            f"give at most {of_model}"
        )
    return wanted


def _num_pages(
    artifact: Artifact, topology: Topology, stages: tuple[Stage, ...], workload: Workload, args: EngineArgs
) -> int:
    """The pages asked for, or the pages that a full batch of the longest sequences takes, if they fit the PEs."""
    fitting = kv_pages(topology, stage_memory(artifact, stages, workload), page_size=PAGE_SIZE)
    wanted = args.paged_attention_num_blocks
    if wanted is not None and fitting is not None and wanted > fitting:
        raise CapacityError(
            f"paged_attention_num_blocks={wanted}, but the PEs have room for {fitting} pages of {PAGE_SIZE} tokens "
            f"next to the weights; give at most that, or use more stages"
        )
    full = workload.max_batch_size * -(-workload.max_model_len // PAGE_SIZE)
    pages = wanted or (full if fitting is None else min(full, fitting))
    return max(1, int(pages * (1.0 - args.scheduler().spare_blocks_ratio)))
