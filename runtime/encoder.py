"""`Encoder`: texts in, vectors out, from an artifact that reads tokens and keeps no state."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Generic, Self, TypeVar

import numpy as np
import numpy.typing as npt

from furiosa_llm.runtime.artifact.checks.composite import PROMPT_SHAPES
from furiosa_llm.runtime.artifact.compute import computing
from furiosa_llm.runtime.artifact.dtypes import Array
from furiosa_llm.runtime.artifact.manifest import Manifest, OutputInfo
from furiosa_llm.runtime.artifact.options import COUNT
from furiosa_llm.runtime.artifact.pooling import Pooling, PoolingType, pooling_of
from furiosa_llm.runtime.artifact.progress import tell
from furiosa_llm.runtime.artifact.reader import Artifact, open_artifact
from furiosa_llm.runtime.engine.machine_snapshot import MachineSnapshot, layout_of_one, replica_snapshot, snapshot
from furiosa_llm.runtime.engine.replica import ReplicaUsage
from furiosa_llm.runtime.engine.replica_counts import ReplicaCounts
from furiosa_llm.runtime.errors import ContextLengthError, InputError, TokenizerError, UnsupportedError
from furiosa_llm.runtime.execution.executor import Executor
from furiosa_llm.runtime.execution.prompt_feeds import prompt_feeds
from furiosa_llm.runtime.model import Model
from furiosa_llm.runtime.requests.prompts import Prompt, check_token_ids, listed, read_prompt
from furiosa_llm.runtime.tokens.tokenizer import Tokenizer, tokenizer_of

Vector = npt.NDArray[np.float32]

T = TypeVar("T")

MAX_BATCH_SIZE = 32

_BY_TEXT = 2
"""Dimensions of an output with one vector for each text."""

# The runtime imports nothing of the builder, where the ops' entries are, and an artifact does not say it of its ops.
_MIXES_ROWS = frozenset({"DynamicQuantizeLinear", "DynamicQuantizeMatMul"})
"""Ops that take one scale over all texts of a batch, so that the other texts alter the result of each."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolingOutput:
    """What `encode` gives of a prompt: its vector `data`, float32 `[hidden]`."""

    data: Vector


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbeddingOutput:
    """What `embed` gives of a prompt: the numbers of its vector."""

    embedding: list[float]


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolingRequestOutput(Generic[T]):
    """A prompt and its result. `prompt_token_ids` are the tokens that ran, special tokens among them."""

    request_id: str
    prompt_token_ids: list[int]
    outputs: T
    finished: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """Two texts as one: their tokens, and which of the two each token is of."""

    token_ids: list[int]
    type_ids: list[int]


class Encoder(Model):
    """An encoder loaded from an artifact.

    Make one with `load_artifact` or `of_artifact`. Close it, or use it as a context manager, to end its threads.
    `output` names the output of the model to take where it has several; `tokenizer` may be None if prompts are token
    ids.

    Prompts of equal length are run together, at most `max_batch_size` of them; with `padded`, prompts of any lengths
    are, filled up under the attention mask, which alters results by rounding. Where an op of the model takes one scale
    over a whole batch, every prompt is run by itself.
    """

    without_engine = (
        "generate API can only be used for generative models; this is an encoder: use embed, or `furiosa-llm "
        "embed`; `furiosa-llm run` gives its outputs as they are"
    )

    def __init__(
        self,
        executor: Executor,
        tokenizer: Tokenizer | None,
        pooling: Pooling,
        *,
        output: str | None = None,
        max_batch_size: int = MAX_BATCH_SIZE,
        padded: bool = False,
    ) -> None:
        manifest = executor.artifact.manifest
        COUNT.check("max_batch_size", max_batch_size, InputError)
        _check_inputs(manifest)
        self._inputs = manifest.inputs
        self._output = _output_of(manifest, output)
        if padded and not any(info.role == "attention_mask" for info in self._inputs):
            raise InputError("padded=True needs a model with an attention mask; leave it out: lengths run separately")
        self.tokenizer = tokenizer
        self.pooling = pooling
        limits = (manifest.model.max_sequence_length, pooling.max_sequence_length)
        self.max_length = self.max_prompt_length = min((limit for limit in limits if limit is not None), default=None)
        # What a classifier calls logits is as wide as its labels, and says nothing of its tokens.
        self._vocab_size = manifest.model.vocab_size
        if len(self._output.shape) == _BY_TEXT:
            self._vocab_size = None if tokenizer is None else tokenizer.vocab_size
        self._executor = executor
        self._layout = layout_of_one(executor.artifact)
        self._padded = padded
        mixed = any(node.op_type in _MIXES_ROWS for node in executor.artifact.program.graph.node)
        self._batch_size = 1 if mixed else max_batch_size
        self._request_ids = itertools.count()

    @classmethod
    def load_artifact(
        cls,
        path: str | os.PathLike[str],
        *,
        tokenizer: str | os.PathLike[str] | Tokenizer | None = None,
        pooling: Pooling | None = None,
        output: str | None = None,
        max_batch_size: int = MAX_BATCH_SIZE,
        padded: bool = False,
        threads: int | None = None,
        mapped: bool = False,
        compute: str | None = None,
        full_verification: bool | None = None,
    ) -> Self:
        """Loads the artifact in the folder `path`; `pooling` stands for what the artifact says of it.

        `tokenizer` is the folder of another tokenizer than the artifact's, `compute` the type to compute in. Raises
        ArtifactError for a damaged artifact, and UnsupportedError for one that makes no vectors from tokens.
        """
        return cls.of_artifact(
            computing(open_artifact(path, full=full_verification), compute),
            tokenizer=tokenizer,
            pooling=pooling,
            output=output,
            max_batch_size=max_batch_size,
            padded=padded,
            threads=threads,
            mapped=mapped,
        )

    @classmethod
    def of_artifact(
        cls,
        artifact: Artifact,
        *,
        tokenizer: str | os.PathLike[str] | Tokenizer | None = None,
        pooling: Pooling | None = None,
        output: str | None = None,
        max_batch_size: int = MAX_BATCH_SIZE,
        padded: bool = False,
        threads: int | None = None,
        mapped: bool = False,
    ) -> Self:
        """Loads an artifact that is open; `load_artifact` says the rest."""
        _check_inputs(artifact.manifest)
        executor = Executor(artifact, threads=threads, mapped=mapped)
        try:
            return cls(
                executor,
                tokenizer_of(artifact, tokenizer),
                pooling or pooling_of(artifact),
                output=output,
                max_batch_size=max_batch_size,
                padded=padded,
            )
        except BaseException:
            executor.close()
            raise

    def embed(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        pooling: PoolingType | None = None,
        normalize: bool | None = None,
        truncate_prompt_tokens: int | None = None,
    ) -> list[PoolingRequestOutput[EmbeddingOutput]]:
        """`encode`, with each vector as a list of numbers."""
        pooled = self.encode(
            prompts, pooling=pooling, normalize=normalize, truncate_prompt_tokens=truncate_prompt_tokens
        )
        return [
            PoolingRequestOutput(
                request_id=one.request_id,
                prompt_token_ids=one.prompt_token_ids,
                outputs=EmbeddingOutput(embedding=one.outputs.data.tolist()),
                finished=True,
            )
            for one in pooled
        ]

    def encode(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        pooling: PoolingType | None = None,
        normalize: bool | None = None,
        truncate_prompt_tokens: int | None = None,
    ) -> list[PoolingRequestOutput[PoolingOutput]]:
        """The vectors of `prompts` (one, or a list of them), in their order.

        `pooling` and `normalize` stand for the model's own. `truncate_prompt_tokens` cuts prompts to that many tokens,
        special ones among them; -1: to the model's limit. Raises ContextLengthError for a prompt beyond the limit,
        InputError for what is no prompt or has no tokens, TokenizerError for text without a tokenizer.
        """
        how = self.pooling
        if pooling is not None or normalize is not None:
            how = replace(
                how, pooling=pooling or how.pooling, normalize=how.normalize if normalize is None else normalize
            )
        rows = self.tokens(prompts, truncate_prompt_tokens=truncate_prompt_tokens)
        vectors: dict[int, Vector] = {}
        tell("reading texts", 0, len(rows))
        for batch in self._batches(rows):
            vectors.update(zip(batch, self.vectors([rows[index] for index in batch], how), strict=True))
            tell("reading texts", len(vectors), len(rows))
        return [
            PoolingRequestOutput(
                request_id=str(next(self._request_ids)),
                prompt_token_ids=row,
                outputs=PoolingOutput(data=vectors[index]),
                finished=True,
            )
            for index, row in enumerate(rows)
        ]

    def tokens(
        self, prompts: Prompt | Sequence[Prompt], *, truncate_prompt_tokens: int | None = None
    ) -> list[list[int]]:
        """What is run for each of `prompts`; raises what `encode` does of them."""
        limit = self._truncation(truncate_prompt_tokens)
        return [self._token_ids(prompt, limit) for prompt in listed(prompts)]

    def pair(self, text: str, other: str, *, truncate_prompt_tokens: int | None = None) -> Pair:
        """The same of two texts as the tokenizer puts them together, of which the end of the `other` is cut."""
        if self.tokenizer is None:
            raise TokenizerError("the artifact has no tokenizer.json, by which two texts are put together")
        limit = self._truncation(truncate_prompt_tokens)
        token_ids, type_ids = self.tokenizer.encode_pair(text, other, max_length=limit)
        self._check_length(token_ids)
        return Pair(token_ids=check_token_ids(token_ids, self._vocab_size), type_ids=type_ids)

    @property
    def scores_pairs(self) -> bool:
        """Whether the model gives one number for each text, as models do that score a question and an answer."""
        return self._output.shape == ("batch", 1)

    def scores(self, pairs: Sequence[Pair]) -> list[float]:
        """The model's number for each of `pairs`, which are of one length, between 0 and 1; only of such a model."""
        rows, types = [one.token_ids for one in pairs], [one.type_ids for one in pairs]
        outputs = self._executor.run(prompt_feeds(self._inputs, rows, types))[self._output.name]
        return [float(one) for one in 1 / (1 + np.exp(-outputs[:, 0].astype(np.float64)))]

    @property
    def batch_size(self) -> int:
        """How many texts run together."""
        return self._batch_size

    @property
    def dimensions(self) -> int | None:
        """The length of a vector; None if the model does not say."""
        width = self._output.shape[-1]
        return width if isinstance(width, int) else None

    def machine(self, *, running: int = 0, waiting: int = 0) -> MachineSnapshot:
        """What lies on every PE, and what the model has done so far, as one replica of one stage.

        The caller says how many texts are `running` and `waiting`: an encoder knows only what it runs.
        """
        usage = ReplicaUsage(running=running, waiting=waiting, used_pages=0, num_pages=0, preemptions=0)
        counts = ReplicaCounts(stages=self._executor.counts)
        one = replica_snapshot(self._layout, 0, usage=usage, counts=counts, alive=True, ready=True)
        return snapshot(self._layout, [one])

    def close(self) -> None:
        """Ends the threads; the model cannot run any more."""
        self._executor.close()

    def _truncation(self, wanted: int | None) -> int | None:
        if wanted is None or wanted == -1:
            return None if wanted is None else self.max_length
        if wanted < 1:
            raise InputError(f"truncate_prompt_tokens must be at least 1, or -1 for the model's limit, got {wanted}")
        return wanted

    def _token_ids(self, prompt: Prompt, limit: int | None) -> list[int]:
        _, row = read_prompt(prompt, self.tokenizer, self._vocab_size, add_special_tokens=True, max_length=limit)
        self._check_length(row)
        return row

    def _check_length(self, row: Sequence[int]) -> None:
        if self.max_length is not None and len(row) > self.max_length:
            raise ContextLengthError(
                f"the prompt has {len(row)} tokens, the model takes at most {self.max_length}; give a shorter one, or "
                f"truncate_prompt_tokens=-1 to cut it"
            )

    def _batches(self, rows: Sequence[Sequence[int]]) -> Iterator[list[int]]:
        """The positions in `rows` of the prompts that run together."""
        order = sorted(range(len(rows)), key=lambda index: len(rows[index]))
        groups = [order] if self._padded else [list(g) for _, g in itertools.groupby(order, lambda i: len(rows[i]))]
        for group in groups:
            yield from (group[start : start + self._batch_size] for start in range(0, len(group), self._batch_size))

    def vectors(self, rows: Sequence[Sequence[int]], how: Pooling | None = None) -> list[Vector]:
        """The vectors of texts that run together, given as `tokens` gives them; `how` stands for the model's own."""
        how = how or self.pooling
        states = self._executor.run(prompt_feeds(self._inputs, rows))[self._output.name]
        if states.ndim == _BY_TEXT:
            return [_finished(row, how) for row in states]
        return [_pooled(row[: len(tokens)], how) for row, tokens in zip(states, rows, strict=True)]


def _pooled(states: Array, how: Pooling) -> Vector:
    """The vector of one text, for the states `[sequence, hidden]` of its tokens."""
    if how.pooling == "mean":
        return _finished(states.astype(np.float32).mean(axis=0), how)
    return _finished(states[0 if how.pooling == "cls" else -1], how)


def _finished(vector: Array, how: Pooling) -> Vector:
    result: Vector = vector.astype(np.float32)
    norm = np.linalg.norm(result)
    return result / norm if how.normalize and norm > 0 else result


def _check_inputs(manifest: Manifest) -> None:
    if manifest.model.task != "encoder":
        raise UnsupportedError(
            f"encode and embed are for encoders; {manifest.model.name!r:.80} is of the task {manifest.model.task!r}: "
            f"use `furiosa-llm {'generate' if manifest.model.task == 'decoder' else 'run'}`"
        )
    for info in manifest.inputs:
        if info.shape not in PROMPT_SHAPES.get(info.role, ()):
            raise UnsupportedError(
                f"input {info.name!r:.80} of role {info.role!r} and shape {list(info.shape)} cannot be made from token "
                f"ids; use `furiosa-llm run` and give it as a tensor"
            )


def _output_of(manifest: Manifest, name: str | None) -> OutputInfo:
    """The output that vectors are made of: a state for every token, or else a vector for every text."""
    floats = [info for info in manifest.outputs if info.dtype in ("FLOAT", "FLOAT16", "BFLOAT16", "DOUBLE")]
    by_token = [i for i in floats if len(i.shape) == 3 and i.shape[:2] == ("batch", "sequence")]
    by_text = [i for i in floats if len(i.shape) == 2 and i.shape[0] == "batch"]
    fit = [*by_token, *by_text]
    shown = ", ".join(f"{info.name} {list(info.shape)}" for info in (fit or manifest.outputs))
    if name is not None:
        named = next((info for info in fit if info.name == name), None)
        if named is None:
            raise InputError(
                f"output={name!r:.80} is no output that vectors can be made of; the model has {shown:.400}"
            )
        return named
    choice = by_token or by_text
    if not choice:
        raise UnsupportedError(
            f"none of the outputs is a vector for each token or text: {shown:.400}; use `furiosa-llm run`"
        )
    if len(choice) > 1:
        raise InputError(f"the model has several outputs that vectors can be made of: {shown:.400}; give output=NAME")
    return choice[0]
