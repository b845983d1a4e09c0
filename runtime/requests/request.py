"""A request between its tokens and its outputs: what was generated, when it ends, and what its outputs say."""

from __future__ import annotations

from collections.abc import Sequence

from furiosa_llm.runtime.adapters.adapter import Adapter
from furiosa_llm.runtime.artifact.dtypes import Array
from furiosa_llm.runtime.errors import SamplingParamsError
from furiosa_llm.runtime.requests.logprobs import PromptLogprobs, logprob, logprobs
from furiosa_llm.runtime.requests.outputs import CompletionOutput, FinishReason, RequestOutput, TokenLogprobs
from furiosa_llm.runtime.tokens.grammar import Grammar
from furiosa_llm.runtime.tokens.sampler import Sampler
from furiosa_llm.runtime.tokens.sampling_params import RequestOutputKind, SamplingParams
from furiosa_llm.runtime.tokens.text_stream import TextStream
from furiosa_llm.runtime.tokens.tokenizer import Tokenizer


class SequenceRequest:
    """One completion of a request. `sequence_id` names it to the scheduler, `sampler` chooses its tokens."""

    def __init__(
        self,
        *,
        sequence_id: int,
        sampler: Sampler,
        params: SamplingParams,
        text: TextStream | None,
        tokenizer: Tokenizer | None,
        eos_token_ids: frozenset[int],
        max_tokens: int,
        prompt_logprobs: PromptLogprobs | None,
    ) -> None:
        self.sequence_id = sequence_id
        self.sampler = sampler
        self.token_ids: list[int] = []
        self.finish_reason: FinishReason | None = None
        self.stop_reason: int | str | None = None
        self.cumulative_logprob = 0.0
        self.has_news = False
        self._params = params
        self._text = text
        self._tokenizer = tokenizer
        self._eos_token_ids = eos_token_ids
        self._stop_token_ids = frozenset(params.stop_token_ids)
        self._max_tokens = max_tokens
        self._prompt_logprobs = prompt_logprobs
        self._logprobs: list[TokenLogprobs] = []
        self._shown_tokens = self._shown_characters = 0

    @property
    def finished(self) -> bool:
        """Whether no token will follow."""
        return self.finish_reason is not None

    @property
    def wants_prompt_logits(self) -> bool:
        """Whether `accept_prompt_logits` is still to be called for some tokens of the prompt."""
        return self._prompt_logprobs is not None and not self._prompt_logprobs.complete

    @property
    def wants_logits(self) -> bool:
        """Whether `accept` reads the logits that it is given."""
        return self._params.logprobs is not None or self._params.ranks_sequences

    def accept(self, token: int, logits: Array | None) -> None:
        """Takes the token that the sampler chose from `logits` [vocabulary], which are read before this returns.

        They may be None if no log probabilities are wanted.
        """
        assert not self.finished, "a token for a completion that has ended"
        self.has_news = True
        if logits is not None:
            self._record_logprobs(token, logits)
        self.token_ids.append(token)
        complete = self.sampler.complete
        if (complete or len(self.token_ids) > self._params.min_tokens) and self._is_stop(token):
            if self._text is not None and self._params.include_stop_str_in_output:
                self._text.push(token)
            self.finish("stop")
            if self.stop_reason is None and token not in self._eos_token_ids:
                self.stop_reason = token
            return
        if self._text is not None:
            self._text.push(token)
        if complete:
            self.finish("stop")
        elif len(self.token_ids) >= self._max_tokens or (self._text is not None and self._text.stop_string is not None):
            self.finish("length")

    def accept_prompt_logits(self, start: int, logits: Array) -> None:
        """Takes `logits` [positions, vocabulary] of the prompt, the first row after its token at `start`."""
        if self._prompt_logprobs is not None:
            self._prompt_logprobs.accept(start, logits)

    def finish(self, reason: FinishReason) -> None:
        """Ends the completion: for `reason`, or for a stop string if the text that was held back ends with one."""
        self.has_news = True
        self.finish_reason = reason
        if self._text is None:
            return
        self._text.flush()
        if self._text.stop_string is not None:
            self.finish_reason, self.stop_reason = "stop", self._text.stop_string

    def completion(self, index: int, *, delta: bool) -> CompletionOutput:
        """The completion so far, or what came to it since the last call."""
        self.has_news = False
        first_token, first_character = (self._shown_tokens, self._shown_characters) if delta else (0, 0)
        text = "" if self._text is None else self._text.text
        self._shown_tokens, self._shown_characters = len(self.token_ids), len(text)
        wants_logprobs = self._params.logprobs is not None
        return CompletionOutput(
            index=index,
            text=text[first_character:],
            token_ids=self.token_ids[first_token:],
            finish_reason=self.finish_reason,
            logprobs=self._logprobs[first_token:] if wants_logprobs else None,
            cumulative_logprob=self.cumulative_logprob if wants_logprobs or self._params.ranks_sequences else None,
            stop_reason=self.stop_reason,
        )

    def _is_stop(self, token: int) -> bool:
        return token in self._eos_token_ids or token in self._stop_token_ids

    def _record_logprobs(self, token: int, logits: Array) -> None:
        count = self._params.logprobs
        if count is not None:
            entry = logprobs(logits, token, count, self._tokenizer)
            self._logprobs.append(entry)
            self.cumulative_logprob += entry[token].logprob
        elif self._params.ranks_sequences:
            self.cumulative_logprob += logprob(logits, token)


class Request:
    """A prompt and the completions that are generated for it, one for each of `sequence_ids`.

    `max_tokens` is the limit of each completion, `seed` is used if the parameters have none; `num_cached_tokens` and
    `began` are set by who runs it. Penalties count the tokens of `penalised`, the prompt if it is None. Completions
    keep to `grammar`, and are computed with `adapter`. Raises SamplingParamsError if the parameters need a tokenizer
    and there is none.
    """

    def __init__(
        self,
        *,
        request_id: str,
        prompt: str | None,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        tokenizer: Tokenizer | None,
        eos_token_ids: frozenset[int],
        max_tokens: int,
        sequence_ids: Sequence[int],
        seed: int | None = None,
        penalised: Sequence[int] | None = None,
        grammar: Grammar | None = None,
        adapter: Adapter | None = None,
    ) -> None:
        if tokenizer is None and (params.stop_strings or params.bad_words):
            raise SamplingParamsError("stop and bad_words need a tokenizer; leave them out, or load one")
        assert len(sequence_ids) == params.num_sequences, "a sequence id for each completion"
        self.request_id = request_id
        self.prompt = prompt
        self.prompt_token_ids = list(prompt_token_ids)
        self.params = params
        self.num_cached_tokens: int | None = None
        self.began: float | None = None
        self.adapter = adapter
        self._tokenizer = tokenizer
        self._eos_token_ids = frozenset() if params.ignore_eos else eos_token_ids
        self.max_tokens = max_tokens
        self._penalised = self.prompt_token_ids if penalised is None else penalised
        self._grammar = grammar
        self._prompt_logprobs = self._make_prompt_logprobs()
        self._bad_words = _word_tokens(params.bad_words, tokenizer)
        self._ended = False
        self.sequences = tuple(
            self._make_sequence(index, sequence_id, seed) for index, sequence_id in enumerate(sequence_ids)
        )

    @property
    def finished(self) -> bool:
        """Whether every completion has ended."""
        return all(sequence.finished for sequence in self.sequences)

    def abort(self, reason: FinishReason = "abort") -> None:
        """Ends the completions that are under way."""
        for sequence in self.sequences:
            if not sequence.finished:
                sequence.finish(reason)

    def output(self) -> RequestOutput | None:
        """What is new since the last call, in the form of `output_kind`; None if that is nothing.

        If the best of several completions are wanted, that is all of them at the end.
        """
        finished = self.finished
        kind = self.params.output_kind
        only_end = kind is RequestOutputKind.FINAL or self.params.ranks_sequences
        if self._ended or (only_end and not finished) or not any(sequence.has_news for sequence in self.sequences):
            return None
        self._ended = finished
        prompt_logprobs = None if self._prompt_logprobs is None else self._prompt_logprobs.entries
        delta = kind is RequestOutputKind.DELTA
        if delta:
            self._prompt_logprobs = None
        return RequestOutput(
            request_id=self.request_id,
            prompt=self.prompt,
            prompt_token_ids=self.prompt_token_ids,
            outputs=self._completions(delta=delta),
            finished=finished,
            prompt_logprobs=prompt_logprobs,
            num_cached_tokens=self.num_cached_tokens,
            began=self.began,
        )

    def _completions(self, *, delta: bool) -> list[CompletionOutput]:
        shown = [(index, one) for index, one in enumerate(self._best()) if one.has_news or not delta]
        return [sequence.completion(index, delta=delta) for index, sequence in shown]

    def _best(self) -> Sequence[SequenceRequest]:
        """The completions of the output, the likeliest first if there are more than are wanted."""
        if not self.params.ranks_sequences:
            return self.sequences
        ranked = sorted(self.sequences, key=lambda sequence: -sequence.cumulative_logprob)
        return ranked[: self.params.n]

    def _make_prompt_logprobs(self) -> PromptLogprobs | None:
        count = self.params.prompt_logprobs
        return None if count is None else PromptLogprobs(self.prompt_token_ids, count, self._tokenizer)

    def _make_sequence(self, index: int, sequence_id: int, seed: int | None) -> SequenceRequest:
        params = self.params
        stops = self._eos_token_ids | frozenset(params.stop_token_ids)
        sampler = Sampler(
            params,
            self._penalised,
            stop_token_ids=stops,
            bad_words=self._bad_words,
            constraint=None if self._grammar is None else self._grammar.start(stops, self.request_id),
            seed=seed,
            index=index,
            name=self.request_id,
        )
        return SequenceRequest(
            sequence_id=sequence_id,
            sampler=sampler,
            params=params,
            text=self._make_text(),
            tokenizer=self._tokenizer,
            eos_token_ids=self._eos_token_ids,
            max_tokens=self.max_tokens,
            prompt_logprobs=self._prompt_logprobs if index == 0 else None,
        )

    def _make_text(self) -> TextStream | None:
        params = self.params
        if self._tokenizer is None or not params.detokenize:
            return None
        return TextStream(
            self._tokenizer,
            params.stop_strings,
            min_tokens=params.min_tokens,
            skip_special_tokens=params.skip_special_tokens,
            include_stop=params.include_stop_str_in_output,
        )


def _word_tokens(words: Sequence[str], tokenizer: Tokenizer | None) -> set[tuple[int, ...]]:
    """How `words` are written in tokens, at the beginning of a text and after a space."""
    if tokenizer is None:
        return set()
    written = {tuple(tokenizer.encode(start + word)) for word in words for start in ("", " ")}
    return written - {()}
