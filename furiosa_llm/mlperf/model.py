"""The model under test: loaded, warmed up, with every sample as token ids before the clock starts."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from queue import SimpleQueue

from furiosa_llm.dataset import Sample
from furiosa_llm.mlperf.benchmarks import Benchmark
from furiosa_llm.mlperf.scoring import Scores, score_completions, score_vectors
from furiosa_llm.mlperf.sut import DecoderSystem, EncoderSystem, SystemUnderTest
from furiosa_llm.runtime.artifact.composite import is_composite
from furiosa_llm.runtime.artifact.reader import Artifact
from furiosa_llm.runtime.closing import Closing
from furiosa_llm.runtime.encoder import Encoder
from furiosa_llm.runtime.engine.core import EngineCore
from furiosa_llm.runtime.engine.engine_args import EngineArgs
from furiosa_llm.runtime.engine.launch import make_plan, only_of_one_replica, open_model, start
from furiosa_llm.runtime.errors import InputError, UnsupportedError
from furiosa_llm.runtime.requests.outputs import RequestOutput, raise_error
from furiosa_llm.runtime.tokens.sampling_params import SamplingParams

_WARM_UP_SAMPLES = 4


class Model(Closing):
    """A loaded model and its samples."""

    @abstractmethod
    def system(self, *, first_tokens: bool) -> SystemUnderTest:
        """A system under test on it; `first_tokens`: LoadGen hears of each one when it is there."""

    @abstractmethod
    def score(self, answers: dict[int, bytes]) -> Scores:
        """The scores of what an accuracy run gave for each sample."""


def load_model(
    args: EngineArgs, benchmark: Benchmark, samples: Sequence[Sample], *, max_output_tokens: int | None
) -> Model:
    """Loads what `args` name, once it is clear that it is for this benchmark and can read every sample.

    Raises UnsupportedError for an artifact of another task, InputError for a sample that it cannot read, and what
    loading a model does.
    """
    if is_composite(args.model):
        raise UnsupportedError(
            f"{args.model} is an encoder-decoder, which no benchmark is for; give a {benchmark.task}"
        )
    artifact = open_model(args)
    task = artifact.manifest.model.task
    if task != benchmark.task:
        other = {"encoder": "bert-offline or bert-server", "decoder": "llama-3.1-offline or -server"}.get(task)
        raise UnsupportedError(
            f"{benchmark.command} runs {benchmark.task}s, but {args.model} is of the task {task!r}; give another "
            f"artifact{f', or use {other}' if other else ''}"
        )
    if benchmark.max_output_tokens is None:
        only_of_one_replica(args, "an encoder")
        if max_output_tokens is not None:
            raise UnsupportedError("--max-output-tokens: an encoder generates no tokens; leave it out")
        return _EncoderModel(args, artifact, samples)
    return _DecoderModel(args, artifact, samples, max_output_tokens or benchmark.max_output_tokens)


class _DecoderModel(Model):
    def __init__(self, args: EngineArgs, artifact: Artifact, samples: Sequence[Sample], max_output_tokens: int) -> None:
        plan = make_plan(args, artifact)
        self._samples, self._max_output_tokens = samples, max_output_tokens
        self._prompts = [one.token_ids(plan.tokenizer, plan.limits.vocab_size) for one in samples]
        room = min(plan.limits.capacity, plan.limits.max_length or plan.limits.capacity)
        for sample, prompt in zip(samples, self._prompts, strict=True):
            if len(prompt) + max_output_tokens > room:
                raise InputError(
                    f"--dataset: {sample.where}: {len(prompt)} tokens and {max_output_tokens} for the completion, but "
                    f"the model has room for {room}; give a shorter prompt, or a lower --max-output-tokens"
                )
        self._core = start(plan, args)
        try:
            _warm_up(self._core, self._prompts[:_WARM_UP_SAMPLES])
        except BaseException:
            self._core.close()
            raise

    def system(self, *, first_tokens: bool) -> SystemUnderTest:
        return DecoderSystem(
            self._core, self._prompts, max_output_tokens=self._max_output_tokens, first_tokens=first_tokens
        )

    def score(self, answers: dict[int, bytes]) -> Scores:
        return score_completions(answers, self._samples, self._core.tokenizer)

    def close(self) -> None:
        """Unloads the model."""
        self._core.close()


class _EncoderModel(Model):
    def __init__(self, args: EngineArgs, artifact: Artifact, samples: Sequence[Sample]) -> None:
        self._samples = samples
        self._encoder = Encoder.of_artifact(
            artifact, tokenizer=args.tokenizer, threads=args.threads, mapped=args.mapped
        )
        try:
            self._prompts = [self._token_ids(sample) for sample in samples]
            self._encoder.encode([{"prompt_token_ids": one} for one in self._prompts[:_WARM_UP_SAMPLES]])
        except BaseException:
            self._encoder.close()
            raise

    def _token_ids(self, sample: Sample) -> list[int]:
        limit = self._encoder.max_length
        return sample.token_ids(self._encoder.tokenizer, None, add_special_tokens=True, max_length=limit)

    def system(self, *, first_tokens: bool) -> SystemUnderTest:  # noqa: ARG002 - an encoder has no tokens
        return EncoderSystem(self._encoder, self._prompts)

    def score(self, answers: dict[int, bytes]) -> Scores:
        return score_vectors(answers, self._samples)

    def close(self) -> None:
        """Unloads the model."""
        self._encoder.close()


def _warm_up(core: EngineCore, prompts: Sequence[list[int]]) -> None:
    """Runs some requests that no clock sees: the first ones of a process are slower."""
    ready: SimpleQueue[RequestOutput] = SimpleQueue()

    def take(outputs: Sequence[tuple[int, RequestOutput]]) -> None:
        for _, output in outputs:
            ready.put(output)

    params = SamplingParams(temperature=0.0, max_tokens=1, detokenize=False)
    for number, prompt in enumerate(prompts):
        core.submit(f"warm-up-{number}", {"prompt_token_ids": prompt}, params, take)
    left = len(prompts)
    while left:
        output = ready.get()
        raise_error(output)
        left -= output.finished
