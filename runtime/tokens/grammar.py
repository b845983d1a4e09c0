"""Grammars that completions keep to: compiled for a tokenizer once, then followed token by token by each completion."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from typing import TypeVar

import numpy as np
import numpy.typing as npt
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper

from furiosa_llm.runtime.errors import SamplingParamsError
from furiosa_llm.runtime.tokens.tokenizer import Tokenizer

Floats = npt.NDArray[np.float32]
T = TypeVar("T")

MAX_GRAMMAR_NBYTES = 256 * 1024
_STACK_NBYTES = 512 * 2**20
"""The library recurses over rules that refer to rules: less would not do for the longest chain that a grammar of
MAX_GRAMMAR_NBYTES can hold, and running out of it ends the process. Only what is used takes memory."""

_LIMITS = LLParserLimits(max_lexer_states=50_000, verbose_errors=False)
"""A mask may take 15 ms at worst, and a completion's lexer 100 MB; the library's own limits, but for the memory."""

_NUM_KEPT = 32
_COMPLETE = ("NoExtension", "NoExtensionBias", "EndOfSentence")


class _DeepThread:
    """One thread with a deep stack, for all that compiles: a grammar that takes long holds up others, and no tokens."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, "furiosa-grammar")
        self._lock = threading.Lock()
        self._started = False

    def run(self, work: Callable[[], T]) -> T:
        """What `work` gives, or raises."""
        return self._submit(work).result()

    def _submit(self, work: Callable[[], T]) -> Future[T]:
        with self._lock:
            if self._started:
                return self._pool.submit(work)
            # The pool's thread starts with the first piece of work; threads that start meanwhile get the same address
            # space, which costs them nothing.
            before = threading.stack_size(_STACK_NBYTES)
            try:
                submitted = self._pool.submit(work)
            finally:
                threading.stack_size(before)
            self._started = True
            return submitted


_deep_thread = _DeepThread()


def check_grammar(text: str, name: str) -> None:
    """Raises SamplingParamsError, with the library's reason, unless `text` is a grammar; `name` is what was given."""
    nbytes = len(text.encode("utf-8", "surrogatepass"))
    if nbytes > MAX_GRAMMAR_NBYTES:
        raise SamplingParamsError(
            f"{name}: the grammar takes {nbytes} bytes, at most {MAX_GRAMMAR_NBYTES} are compiled; make it smaller"
        )
    if reason := looked_at(text)[0]:
        raise SamplingParamsError(f"{name} cannot be compiled: {reason}")


@lru_cache(64)
def looked_at(text: str) -> tuple[str, list[str]]:
    """Why the library does not compile `text`, empty if it does; and what it warns of."""
    try:
        failed, reasons = _deep_thread.run(lambda: LLMatcher.validate_grammar_with_warnings(text, limits=_LIMITS))
    except UnicodeEncodeError as error:
        return f"it holds half of a surrogate pair, which is no character: {error}", []
    said = [" ".join(reason.split())[:500] for reason in reasons]
    return (said[0], []) if failed else ("", said)


class Grammars:
    """The grammars that were used last, compiled for one model's tokenizer; for any thread."""

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self._tokenizer = tokenizer
        self._vocabulary: tuple[LLTokenizer, int] | None = None
        self._kept: OrderedDict[str, Grammar] = OrderedDict()
        self._lock = threading.Lock()

    def compile(self, text: str) -> Grammar:
        """The grammar `text`, which `check_grammar` has seen.

        It may take a second: for a large grammar, and for the first one of a model, whose vocabulary is taken in.
        Raises SamplingParamsError if the model's tokens cannot be constrained, or none can begin what is wanted.
        """
        with self._lock:
            found = self._kept.get(text)
            if found is not None:
                self._kept.move_to_end(text)
                return found
        made = _deep_thread.run(lambda: self._make(text))
        with self._lock:
            self._kept[text] = made
            while len(self._kept) > _NUM_KEPT:
                self._kept.popitem(last=False)
        return made

    def _make(self, text: str) -> Grammar:
        if self._vocabulary is None:  # only the deep thread comes here
            self._vocabulary = self._take_in()
        vocabulary, end = self._vocabulary
        return Grammar(LLMatcher(vocabulary, text, log_level=0, limits=_LIMITS), end)

    def _take_in(self) -> tuple[LLTokenizer, int]:
        """The vocabulary as the library has it, with an end token that the model does not have.

        Which tokens end a completion differs from request to request, so that the model's own are added by them.
        """
        if self._tokenizer is None:
            raise SamplingParamsError("structured_outputs needs a tokenizer; leave it out, or load one")
        text, end = self._tokenizer.with_another_token()
        try:
            return _readable(LLTokenizer(text, eos_token=end), end), end
        except ValueError as error:
            raise SamplingParamsError(
                f"structured_outputs: the tokens of this model's tokenizer are not known byte by byte, so that they "
                f"cannot be constrained: {error}"
            ) from error


_PROBES = ("a", '{"name": "a b", "x": [-1.5e3, true]}', "  a\n\t\r\n", "Aé€😀")


def _readable(vocabulary: LLTokenizer, end: int) -> LLTokenizer:
    """`vocabulary`, or one that makes tokens of a text in its own way if the tokenizer's are another text's.

    Where a grammar allows one text only, the library allows one way to write it: the tokenizer's, which models know
    best. A tokenizer that puts a space in front, for instance, would so lead away from the grammar.
    """
    if all(vocabulary.decode_bytes(vocabulary.tokenize_str(probe)) == probe.encode() for probe in _PROBES):
        return vocabulary
    return LLTokenizer(TokenizerWrapper(_Greedy(vocabulary, end)), eos_token=end)


class _Greedy:
    """A tokenizer as the library wants one: the longest token first."""

    def __init__(self, vocabulary: LLTokenizer, end: int) -> None:
        tokens = range(vocabulary.vocab_size)
        self.eos_token_id = end
        self.bos_token_id = None
        self.tokens = [vocabulary.decode_bytes([token]) for token in tokens]
        self.special_token_ids = [token for token in tokens if vocabulary.is_special_token(token)]
        self._vocabulary = vocabulary

    def __call__(self, text: str) -> list[int]:
        return self._vocabulary.greedy_tokenize(text)


class Grammar:
    """A grammar at its beginning. `end` is the token that stands for the end of a completion in it."""

    def __init__(self, matcher: LLMatcher, end: int) -> None:
        self._matcher = matcher
        self._end = end
        if matcher.is_error():
            raise SamplingParamsError(f"structured_outputs cannot be compiled: {_reason(matcher)}")
        Constraint(matcher, end, ()).check()

    def start(self, stops: Iterable[int], name: str = "") -> Constraint:
        """A completion of it, which ends with one of the `stops`; `name` is the request's, for errors."""
        return Constraint(self._matcher.deep_copy(), self._end, stops, name)


class Constraint:
    """Follows one completion through a grammar.

    A stop token is allowed where the grammar may end, and only there, even if its text would fit elsewhere.
    """

    def __init__(self, matcher: LLMatcher, end: int, stops: Iterable[int], name: str = "") -> None:
        self._matcher = matcher
        self._end = end
        self._stops = np.fromiter(stops, dtype=np.int64)
        self._stop_set = frozenset(self._stops.tolist())
        self._name = name
        self.complete = False
        """Whether nothing may follow: the grammar is at its end, or a stop token was chosen."""

    def check(self) -> None:
        """Raises SamplingParamsError if no token of the model may follow, and the completion may not end either."""
        allowed = self._allowed()
        if self._has_failed() or not (allowed.any() or self._matcher.is_accepting()):
            raise SamplingParamsError(
                f"structured_outputs: the grammar has no beginning that this model has tokens for: "
                f"{_reason(self._matcher)}"
            )

    def mask(self, scores: Floats) -> None:
        """Makes the `scores` [vocabulary] of tokens that may not follow -inf; raises SamplingParamsError."""
        allowed = self._allowed()
        if self._has_failed():
            raise SamplingParamsError(
                f"request {self._name!r}: structured_outputs cannot be followed any further: {_reason(self._matcher)}; "
                f"simplify it"
            )
        stops = self._stops[self._stops < allowed.size]
        allowed[stops] = self._matcher.is_accepting()
        width = min(allowed.size, scores.size)
        # Logits may be wider than the tokenizer's vocabulary: what lies beyond is no token.
        scores[width:] = -np.inf
        np.copyto(scores[:width], -np.inf, where=~allowed[:width])

    def record(self, token: int) -> None:
        """Takes the token that was chosen."""
        if token in self._stop_set:
            self.complete = True
        elif self._matcher.consume_token(token):
            self.complete = self._matcher.is_stopped() and not self._has_failed()

    def _allowed(self) -> npt.NDArray[np.bool_]:
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        allowed = np.unpackbits(bits, bitorder="little").view(np.bool_)
        allowed[self._end] = False
        return allowed

    def _has_failed(self) -> bool:
        """Whether it has stopped without being complete.

        The library allows nothing but the end then, as it does at the end of a grammar.
        """
        matcher = self._matcher
        if not matcher.is_stopped():
            return False
        return matcher.is_error() or matcher.stop_reason() not in _COMPLETE or not matcher.is_accepting()


def _reason(matcher: LLMatcher) -> str:
    return " ".join((matcher.get_error() or matcher.stop_reason()).partition("<state>")[0].split())[:500]
