"""The requests of a soak: prompts that begin alike, parameters of every kind, and what greedy ones must answer."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

from furiosa_llm.runtime.llm import LLM
from furiosa_llm.runtime.requests.outputs import CompletionOutput, RequestOutput
from furiosa_llm.runtime.tokens.sampling_params import RequestOutputKind, SamplingParams

TIE = 1e-3
"""Tokens whose log probabilities are closer may change places: kernels may sum in another order for other batches."""
_KINDS = tuple(RequestOutputKind)


@dataclass(frozen=True, slots=True, kw_only=True)
class Expected:
    """What a greedy prompt answers alone. `gaps`: how much likelier each token is than the next likely one."""

    token_ids: list[int]
    text: str
    finish_reason: str | None
    stop_reason: int | str | None
    gaps: list[float]
    prompt_logprobs: list[float] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A request; `expected` is None if it is sampled at random or its parameters change the logits."""

    prompt: tuple[int, ...]
    params: SamplingParams
    expected: Expected | None


class Cases:
    """Requests that are drawn with `rng`; the greedy ones are answered by `alone` beforehand, one at a time."""

    def __init__(self, alone: LLM, rng: random.Random, *, vocab_size: int, longest: int) -> None:
        self._rng = rng
        self._vocab_size = vocab_size
        self._longest = longest
        beginnings = [self._tokens(rng.randint(1, longest // 2)) for _ in range(6)]
        self._prompts = [tuple(rng.choice(beginnings) + self._tokens(rng.randint(1, longest // 4))) for _ in range(24)]
        self._greedy = [self._answered(alone, prompt) for prompt in self._prompts for _ in range(3)]

    def draw(self) -> Case:
        """The next request; every other one is greedy."""
        rng = self._rng
        if rng.random() < 0.5:
            case = rng.choice(self._greedy)
            return replace(case, params=replace(case.params, output_kind=rng.choice(_KINDS)))
        params = self._random_params()
        return Case(prompt=rng.choice(self._prompts), params=params, expected=None)

    def _tokens(self, count: int) -> list[int]:
        return [self._rng.randrange(3, self._vocab_size) for _ in range(count)]

    def _answered(self, alone: LLM, prompt: tuple[int, ...]) -> Case:
        """A greedy request, with an end of its own that is found in what the prompt would answer without one."""
        rng = self._rng
        length = rng.randint(1, self._longest // 2)
        params = SamplingParams(temperature=0.0, max_tokens=length, logprobs=2)
        plain = _generate(alone, prompt, params)
        kind = rng.randrange(5)
        if kind == 1 and len(plain.outputs[0].text) > 3:
            start = rng.randrange(len(plain.outputs[0].text) - 2)
            params = replace(params, stop=plain.outputs[0].text[start : start + 3], min_tokens=rng.randint(0, length))
        elif kind == 2:
            stops = [rng.choice(plain.outputs[0].token_ids)]
            params = replace(params, stop_token_ids=stops, include_stop_str_in_output=rng.random() < 0.5)
        elif kind == 3:
            params = replace(params, prompt_logprobs=1, ignore_eos=True)
        found = _generate(alone, prompt, params)
        wants = rng.choice([None, 2])
        return Case(prompt=prompt, params=replace(params, logprobs=wants), expected=_expected(found))

    def _random_params(self) -> SamplingParams:
        rng = self._rng
        length = rng.randint(1, self._longest // 2)
        params = SamplingParams(
            temperature=rng.choice([0.5, 1.0, 3.0]),
            seed=rng.choice([None, rng.randrange(2**32)]),
            max_tokens=length,
            min_tokens=rng.choice([0, rng.randint(0, length)]),
            logprobs=rng.choice([None, 0, 3]),
            output_kind=rng.choice(_KINDS),
            skip_special_tokens=rng.random() < 0.5,
        )
        match rng.randrange(6):
            case 0:
                return replace(params, n=rng.randint(2, 3), max_tokens=length, min_tokens=0)
            case 1:
                return replace(params, best_of=rng.randint(2, 4), n=rng.randint(1, 2))
            case 2:
                return replace(params, presence_penalty=1.0, frequency_penalty=0.5, repetition_penalty=1.3)
            case 3:
                biased = {rng.randrange(self._vocab_size): 5.0 for _ in range(3)}
                return replace(params, logit_bias=biased, top_k=20, top_p=0.9, min_p=0.01, bad_words=["the"])
            case 4:
                return replace(params, allowed_token_ids=self._tokens(8), detokenize=False)
            case _:
                return replace(params, temperature=0.0, repetition_penalty=1.5, stop=["a", "e"], prompt_logprobs=0)


def _generate(alone: LLM, prompt: Sequence[int], params: SamplingParams) -> RequestOutput:
    return alone.generate("", params, prompt_token_ids=list(prompt))


def _expected(output: RequestOutput) -> Expected:
    [one] = output.outputs
    assert one.logprobs is not None
    best = [sorted((entry.logprob for entry in found.values()), reverse=True) for found in one.logprobs]
    return Expected(
        token_ids=one.token_ids,
        text=one.text,
        finish_reason=one.finish_reason,
        stop_reason=one.stop_reason,
        gaps=[first - second for first, second, *_ in best],
        prompt_logprobs=prompt_logprobs_of(output),
    )


def prompt_logprobs_of(output: RequestOutput) -> list[float] | None:
    """The log probability of each token of the prompt but the first."""
    if output.prompt_logprobs is None:
        return None
    tokens = zip(output.prompt_token_ids[1:], output.prompt_logprobs[1:], strict=True)
    return [entry[token].logprob for token, entry in tokens if entry is not None]


class Answer:
    """The outputs of one request put together, and what is wrong with them."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self._tokens: list[list[int]] = [[] for _ in range(case.params.n)]
        self._texts = [""] * case.params.n
        self._ended: dict[int, CompletionOutput] = {}
        self._prompt_logprobs: list[float] | None = None

    def add(self, output: RequestOutput) -> None:
        """Takes the next output."""
        delta = self.case.params.output_kind is RequestOutputKind.DELTA and not self.case.params.ranks_sequences
        self._prompt_logprobs = prompt_logprobs_of(output) or self._prompt_logprobs
        for one in output.outputs:
            before, text = (self._tokens[one.index], self._texts[one.index]) if delta else ([], "")
            self._tokens[one.index], self._texts[one.index] = before + one.token_ids, text + one.text
            if one.finish_reason is not None:
                self._ended[one.index] = one

    def problem(self, *, may_be_aborted: bool) -> str | None:
        """What is wrong with the finished request; None if nothing is."""
        params = self.case.params
        if len(self._ended) != params.n:
            return f"{len(self._ended)} of {params.n} completions have ended"
        reasons = {str(one.finish_reason) for one in self._ended.values()}
        if not reasons <= {"stop", "length"} | ({"abort"} if may_be_aborted else set()):
            return f"it ended for {sorted(reasons)}"
        for tokens, one in zip(self._tokens, (self._ended[index] for index in range(params.n)), strict=True):
            least = 0 if one.finish_reason == "abort" else max(1, params.min_tokens)
            if not least <= len(tokens) <= (params.max_tokens or 0):
                return f"{len(tokens)} tokens, expected {least} to {params.max_tokens}"
        return None if self.case.expected is None else self._compared(self.case.expected, reasons)

    @property
    def is_tie(self) -> bool:
        """Whether it differs from what is expected where two tokens were as good as alike."""
        return self.case.expected is not None and self._first_difference(self.case.expected) == "tie"

    def _first_difference(self, expected: Expected) -> int | str | None:
        [found] = self._tokens
        for position, (token, wanted) in enumerate(zip(found, expected.token_ids, strict=False)):
            if token != wanted:
                return "tie" if expected.gaps[position] < TIE else position
        return None

    def _compared(self, expected: Expected, reasons: set[str]) -> str | None:
        difference = self._first_difference(expected)
        if difference == "tie":
            return None
        [found] = self._tokens
        if difference is not None:
            return f"token {difference} is another than alone: {found}, expected {expected.token_ids}"
        if "abort" in reasons:
            return None
        [text], [one] = self._texts, self._ended.values()
        whole = (found, text, one.finish_reason, one.stop_reason)
        wanted = (expected.token_ids, expected.text, expected.finish_reason, expected.stop_reason)
        if whole != wanted:
            return f"{whole}, expected {wanted}"
        if (self._prompt_logprobs is None) != (expected.prompt_logprobs is None):
            return "log probabilities of the prompt are there or not, and should not or should be"
        pairs = zip(self._prompt_logprobs or [], expected.prompt_logprobs or [], strict=True)
        worst = max((abs(ours - theirs) for ours, theirs in pairs), default=0.0)
        return f"a log probability of the prompt is {worst} off" if worst > TIE else None
