"""The model that is served: a decoder on its engine, or an encoder or encoder-decoder on threads of their own."""

from __future__ import annotations

import itertools
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from furiosa_llm.runtime import model
from furiosa_llm.runtime.adapters.adapter import LoRARequest
from furiosa_llm.runtime.artifact.composite import Composite, is_composite, open_composite
from furiosa_llm.runtime.artifact.errors import AdapterError
from furiosa_llm.runtime.artifact.reader import Artifact
from furiosa_llm.runtime.artifact.tools.record_summary import verification_of
from furiosa_llm.runtime.async_engine import AsyncLLMEngine
from furiosa_llm.runtime.encoder import Encoder
from furiosa_llm.runtime.engine.engine_args import EngineArgs
from furiosa_llm.runtime.engine.launch import Plan, make_plan, only_of_one_replica, open_model
from furiosa_llm.runtime.engine.machine_snapshot import MachineSnapshot
from furiosa_llm.runtime.errors import UnsupportedError
from furiosa_llm.runtime.requests.outputs import RequestOutput
from furiosa_llm.runtime.requests.prompts import Prompt
from furiosa_llm.runtime.runners.batch_invariance import BatchInvariance
from furiosa_llm.runtime.seq2seq import Seq2Seq
from furiosa_llm.runtime.tokens.sampling_params import SamplingParams
from furiosa_llm.runtime.tokens.tokenizer import Tokenizer
from furiosa_llm.server.embedder import Embedder
from furiosa_llm.server.encoder_decoder import EncoderDecoder
from furiosa_llm.server.recent_load import Expectation
from furiosa_llm.server.settings import is_text


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoder:
    """A model that generates."""

    engine: AsyncLLMEngine
    """What runs its requests."""
    probe: Callable[[], BatchInvariance]
    """Whether its bits depend on how many requests run at once, on this machine; probed in the first call."""
    batch_invariant: bool
    """Whether they are kept from doing so."""

    def generate(
        self, prompt: Prompt, params: SamplingParams, request_id: str, adapter: LoRARequest | None = None
    ) -> AsyncGenerator[RequestOutput, None]:
        """See `AsyncLLMEngine.generate`."""
        return self.engine.generate(prompt, params, request_id, adapter)

    def machine(self) -> MachineSnapshot:
        """What lies on every PE, and what was done so far."""
        return self.engine.core.machine()


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    """One model under its names."""

    names: tuple[str, ...]
    """What requests may call it; the first is used in answers."""
    artifact_id: str
    """What its artifact calls it."""
    kind: Decoder | Embedder | EncoderDecoder
    """What runs it."""
    max_length: int | None
    """The most tokens of a prompt and its completion, or of a text to embed; None if there is no limit."""
    max_prompt_length: int | None
    """The most tokens of the prompt alone."""
    parallelism: Mapping[str, int | str]
    """Its tensor, pipeline and data parallel sizes, and the PEs."""
    created: int
    """When it was loaded, in seconds since 1970."""
    verification: str
    """What verification.json said then, in words."""
    expected: Expectation | None = None
    """What its machine should do, by a device file."""
    adapters: dict[str, LoRARequest] = field(default_factory=dict)
    """The adapters that requests may ask for, by the names that they have beside the model's."""
    adapter_ids: Iterator[int] = field(default_factory=lambda: itertools.count(1))
    """None is given twice."""

    @property
    def tokenizer(self) -> Tokenizer | None:
        """Its tokenizer; encoders may have none."""
        match self.kind:
            case Decoder():
                return self.kind.engine.core.tokenizer
            case Embedder():
                return self.kind.encoder.tokenizer
            case EncoderDecoder():
                return self.kind.model.tokenizer

    @property
    def dead(self) -> bool:
        """Whether it cannot run any request any more."""
        return isinstance(self.kind, Decoder) and self.kind.engine.core.dead

    @property
    def ready(self) -> bool:
        """Whether it answers requests now, and not only when a replica is there again."""
        return not isinstance(self.kind, Decoder) or self.kind.engine.core.ready

    def close(self) -> None:
        """Ends its threads; requests that have not ended fail."""
        if isinstance(self.kind, Decoder):
            self.kind.engine.shutdown()
        else:
            self.kind.close()


async def load_adapter(model: ServedModel, name: str, path: str) -> None:
    """Makes an adapter known under `name`; raises AdapterError if it is not the model's, or the name is taken."""
    if not isinstance(model.kind, Decoder):
        raise UnsupportedError(f"{model.names[0]} runs without an engine, and takes no adapters")
    _check_free(model, name)
    request = LoRARequest(name, next(model.adapter_ids), path)
    await model.kind.engine.add_lora(request)
    _check_free(model, name)  # another may have taken it meanwhile
    model.adapters[name] = request


async def unload_adapter(model: ServedModel, name: str) -> bool:
    """Forgets an adapter; whether there was one. Requests that run with it end with it."""
    request = model.adapters.pop(name, None)
    if request is None or not isinstance(model.kind, Decoder):
        return False
    return await model.kind.engine.remove_lora(request.lora_int_id)


def _check_free(model: ServedModel, name: str) -> None:
    if not is_text(name):
        raise AdapterError(f"{name!r:.80} is not UTF-8, and cannot be sent in an answer; give the adapter another name")
    if name in model.names or name in model.adapters:
        raise AdapterError(f"{name!r:.80} is a name of the server's already; give the adapter another")


def open_served(args: EngineArgs) -> tuple[Artifact | Composite, Plan | None]:
    """The artifact, and how it will run if it has an engine; raises what `make_plan` does."""
    if is_composite(args.model):
        only_of_one_replica(args, "an encoder-decoder")
        return open_composite(args.model, full=args.full_verification, compute=args.compute), None
    artifact = open_model(args)
    if artifact.manifest.model.task == "encoder":
        only_of_one_replica(args, "an encoder")
        return artifact, None
    return artifact, make_plan(args, artifact)


def load_served(
    args: EngineArgs,
    artifact: Artifact | Composite,
    plan: Plan | None,
    names: Sequence[str] | None,
    created: int,
    lora_modules: Sequence[tuple[str, str]] = (),
) -> ServedModel:
    """Loads what `open_served` gave, with the adapters of the artifact's own and those that `lora_modules` name."""
    if plan is None and lora_modules:
        raise UnsupportedError("a model without an engine takes no adapters; leave --lora-modules out")
    if isinstance(artifact, Composite):
        return _encoder_decoder(args, artifact, names, created)
    shown = tuple(names or (artifact.manifest.model.name,))
    verification = str(verification_of(artifact.folder, artifact.digest))
    if plan is None:
        encoder = Encoder.of_artifact(artifact, tokenizer=args.tokenizer, threads=args.threads, mapped=args.mapped)
        return ServedModel(
            names=shown,
            artifact_id=artifact.manifest.model.name,
            kind=Embedder(encoder),
            max_length=encoder.max_length,
            max_prompt_length=encoder.max_length,
            parallelism={"tensor_parallel_size": artifact.manifest.mesh.size},
            created=created,
            verification=verification,
        )
    decoder = model.Decoder(plan, args, skip_engine=False)
    served = ServedModel(
        names=shown,
        artifact_id=artifact.manifest.model.name,
        kind=Decoder(
            engine=AsyncLLMEngine.from_llm(decoder),
            probe=lambda: decoder.batch_invariance,
            batch_invariant=args.batch_invariant,
        ),
        max_length=decoder.max_length,
        max_prompt_length=decoder.max_prompt_length,
        parallelism=plan.topology.as_dict(),
        created=created,
        verification=verification,
    )
    own = [(name, "") for name in sorted(decoder.core.adapters.own)]
    try:
        for name, path in (*own, *lora_modules):
            _check_free(served, name)
            served.adapters[name] = LoRARequest(name, next(served.adapter_ids), path)
            decoder.core.adapters.add(served.adapters[name])
    except BaseException:
        decoder.close()
        raise
    return served


def _encoder_decoder(args: EngineArgs, composite: Composite, names: Sequence[str] | None, created: int) -> ServedModel:
    model = Seq2Seq.of_composite(
        composite, tokenizer=args.tokenizer, seed=args.seed, threads=args.threads, mapped=args.mapped
    )
    return ServedModel(
        names=tuple(names or (composite.manifest.name,)),
        artifact_id=composite.manifest.name,
        kind=EncoderDecoder(model),
        max_length=model.max_length,
        max_prompt_length=model.max_prompt_length,
        parallelism={"tensor_parallel_size": composite.encoder.manifest.mesh.size},
        created=created,
        verification=str(verification_of(composite.folder, composite.digest)),
    )
