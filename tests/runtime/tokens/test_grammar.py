"""Grammars followed token by token: what may follow, what is drawn, and when a completion has ended."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from llguidance import LLParserLimits

from furiosa_llm.runtime import RequestOutput, SamplingParams, StructuredOutputsParams
from furiosa_llm.runtime.errors import SamplingParamsError
from furiosa_llm.runtime.requests.logprobs import logprob
from furiosa_llm.runtime.requests.request import Request
from furiosa_llm.runtime.tokens import grammar as module
from furiosa_llm.runtime.tokens.grammar import Constraint, Grammar, Grammars
from furiosa_llm.runtime.tokens.sampler import Sampler, sample_rows
from furiosa_llm.runtime.tokens.tokenizer import Tokenizer
from tests.support.runtime import tokenizer_kinds

TOKENIZER = tokenizer_kinds.byte_level()
WIDTH = TOKENIZER.vocab_size + 99
"""Logits of models are often wider than the tokenizer's vocabulary."""

TEXTS = [TOKENIZER.decode([token], skip_special_tokens=False) for token in range(TOKENIZER.vocab_size)]
EOS = TEXTS.index("</s>")
START = TEXTS.index("<s>")
LAST_PIECE = TEXTS.index("<tool>") - 1
CHOICES = ["abé", "ab a", "a😀", "ab", "<tool>"]


def compiled(tokenizer: Tokenizer | None = TOKENIZER, **values: Any) -> Grammar:
    return Grammars(tokenizer).compile(StructuredOutputsParams(**values).llguidance_grammar)


def tokens_of(text: str) -> list[int]:
    """Byte by byte, though there are longer tokens."""
    return [_byte_token(byte) for byte in text.encode()]


def _byte_token(byte: int) -> int:
    letter = tokenizer_kinds._byte_letters()[byte]
    return next(token for token in range(256) if TOKENIZER.id_to_token(token) == letter)


def allowed(constraint: Constraint) -> set[int]:
    scores = np.zeros(WIDTH, np.float32)
    constraint.mask(scores)
    assert set(scores.tolist()) <= {0.0, -np.inf}
    return set(np.flatnonzero(scores == 0.0).tolist())


def bytes_of(token: int) -> bytes:
    """What a token is in a text; special tokens are nothing."""
    if token > LAST_PIECE:  # added tokens: none of a tag's form is taken for text
        return b""
    written = TOKENIZER.id_to_token(token)
    assert written is not None
    letters = {letter: byte for byte, letter in tokenizer_kinds._byte_letters().items()}
    return bytes(letters[letter] for letter in written)


@pytest.mark.parametrize("prefix", ["", "a", "ab", "ab ", "abé", "<to"])
def test_exactly_the_tokens_that_lead_to_a_choice_may_follow(prefix: str) -> None:
    constraint = compiled(choice=CHOICES).start([EOS])
    for token in tokens_of(prefix):
        constraint.record(token)
    begun = prefix.encode()
    left = [choice.encode()[len(begun) :] for choice in CHOICES if choice.encode().startswith(begun)]
    expected = {
        token
        for token in range(TOKENIZER.vocab_size)
        if (text := bytes_of(token)) and any(rest.startswith(text) for rest in left)
    }
    assert allowed(constraint) == expected | ({EOS} if b"" in left else set())


def test_where_one_text_alone_may_follow_it_is_written_in_one_way() -> None:
    constraint = compiled(choice=CHOICES).start([EOS])
    smile = "😀".encode()
    for token in (*tokens_of("a"), _byte_token(smile[0])):
        constraint.record(token)
    [token] = allowed(constraint)
    assert smile[1:].startswith(bytes_of(token))


def test_the_end_of_a_grammar_needs_no_end_token() -> None:
    constraint = compiled(regex="ab").start([])
    for token in tokens_of("ab"):
        assert not constraint.complete
        constraint.record(token)
    assert constraint.complete


def test_stop_tokens_come_where_the_grammar_may_end_and_only_there() -> None:
    [a], [b] = tokens_of("a"), tokens_of("b")
    constraint = compiled(regex="b(ab)*").start([EOS, a])
    assert a not in allowed(constraint)
    constraint.record(b)
    assert allowed(constraint) == {a, TEXTS.index("ab"), EOS}
    constraint.record(a)
    assert constraint.complete


def test_a_token_that_does_not_fit_is_an_error_at_the_next() -> None:
    constraint = compiled(regex="ab").start([EOS], "seven")
    constraint.record(START)
    assert not constraint.complete
    with pytest.raises(SamplingParamsError, match="request 'seven': structured_outputs cannot be followed any further"):
        constraint.mask(np.zeros(WIDTH, np.float32))


def test_a_grammar_that_grows_too_complex_is_an_error_and_not_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    grammar = compiled(regex="(a|b)*a(a|b){18}x")
    constraint = grammar.start([EOS])
    monkeypatch.setattr(module, "_LIMITS", LLParserLimits(max_lexer_states=60, verbose_errors=False))
    limited = compiled(regex="(a|b)*a(a|b){18}x").start([EOS])
    chance = np.random.default_rng(1)
    tokens = [tokens_of("ab")[one] for one in chance.integers(2, size=60)]
    follow(constraint, tokens)
    with pytest.raises(SamplingParamsError, match=r"cannot be followed any further: .*states"):
        follow(limited, tokens)


def follow(constraint: Constraint, tokens: Sequence[int]) -> None:
    """Masks before each of `tokens`, none of which completes it."""
    for token in tokens:
        constraint.mask(np.zeros(WIDTH, np.float32))
        constraint.record(token)
        assert not constraint.complete


def test_completions_of_one_grammar_are_independent() -> None:
    grammar = compiled(regex="a+b")
    one, other = grammar.start([EOS]), grammar.start([EOS])
    for token in tokens_of("ab"):
        one.record(token)
    assert one.complete
    assert not other.complete
    assert allowed(other) == allowed(grammar.start([EOS]))


def test_chosen_tokens_have_the_probabilities_of_the_model_among_themselves() -> None:
    grammar = compiled(regex="[a-e]z")
    logits = np.random.default_rng(0).standard_normal(WIDTH).astype(np.float32)
    logits[START] = 50.0
    letters = tokens_of("abcde")
    weights = np.exp(logits[letters] / 2.0)
    params = SamplingParams(temperature=2.0)
    count = 4000
    draws: Counter[int] = Counter()
    for seed in range(count):
        draws[Sampler(params, [], constraint=grammar.start([EOS]), seed=seed).sample(logits)] += 1
    assert set(draws) == set(letters)
    for token, share in zip(letters, weights / weights.sum(), strict=True):
        assert abs(draws[token] / count - share) < 4 * np.sqrt(share / count)


def test_only_the_mask_comes_before_the_other_steps() -> None:
    grammar = compiled(regex="[a-c]+")
    [a], [b], [c] = tokens_of("a"), tokens_of("b"), tokens_of("c")
    logits = np.zeros(WIDTH, np.float32)
    logits[[a, b, START]] = 2.0, 1.5, 9.0

    def first(**values: Any) -> int:
        params = SamplingParams(temperature=0.0, **values)
        return Sampler(params, [a], constraint=grammar.start([EOS])).sample(logits)

    assert first() == a
    assert first(repetition_penalty=2.0) == b
    assert first(logit_bias={c: 5.0, START: 100.0}) == c
    assert first(allowed_token_ids=[c, START]) == c


def request(grammar: Grammar, n: int = 1, eos: Sequence[int] = (EOS,), **values: Any) -> Request:
    params = SamplingParams(n=n, **values)
    limit = params.max_tokens or 1000
    return Request(
        request_id="seven",
        prompt="a",
        prompt_token_ids=[1],
        params=params,
        tokenizer=TOKENIZER,
        eos_token_ids=frozenset(eos),
        max_tokens=limit,
        sequence_ids=range(n),
        seed=1,
        grammar=grammar,
    )


def run(found: Request, seed: int = 0) -> RequestOutput:
    """Random logits for each token, the same for all sequences."""
    chance = np.random.default_rng(seed)
    while not found.finished:
        logits = chance.standard_normal((1, WIDTH)).astype(np.float32)
        for sequence in found.sequences:
            if not sequence.finished:
                [token] = sample_rows([sequence.sampler], logits)
                sequence.accept(token, logits[0])
    output = found.output()
    assert output is not None
    return output


@pytest.mark.parametrize("ignore_eos", [False, True])
def test_a_completion_that_is_whole_ends_with_stop(ignore_eos: bool) -> None:
    output = run(request(compiled(regex="[ab]{3}"), temperature=1.0, ignore_eos=ignore_eos, max_tokens=3))
    [completion] = output.outputs
    assert set(completion.text) <= {"a", "b"}
    assert len(completion.text) == 3
    assert (completion.finish_reason, completion.stop_reason) == ("stop", None)


def test_ignoring_the_end_token_goes_on_as_long_as_the_grammar_does() -> None:
    grammar = compiled(regex="a{2,9}")
    short = {len(run(request(grammar), seed).outputs[0].text) for seed in range(8)}
    long = {len(run(request(grammar, ignore_eos=True), seed).outputs[0].text) for seed in range(8)}
    assert min(short) < 9
    assert long == {9}


def test_the_grammar_goes_before_min_tokens() -> None:
    [completion] = run(request(compiled(regex="ab"), min_tokens=9)).outputs
    assert (completion.text, completion.finish_reason) == ("ab", "stop")
    lengths = [len(run(request(compiled(regex="[xy]+"), min_tokens=9), seed).outputs[0].text) for seed in range(8)]
    assert min(lengths) >= 9
    [completion] = run(
        request(
            compiled(
                regex="(ab)?",
            ),
            min_tokens=9,
        )
    ).outputs
    assert (completion.text, completion.finish_reason) == ("ab", "stop")


def test_an_empty_completion() -> None:
    grammar = compiled(grammar='start: "" | "a"')
    found = {run(request(grammar, temperature=0.0), seed).outputs[0].text for seed in range(20)}
    assert found == {"", "a"}
    only = compiled(grammar='start: ""')
    [completion] = run(request(only, min_tokens=3)).outputs
    assert (completion.text, completion.token_ids, completion.finish_reason) == ("", [EOS], "stop")


def test_a_stop_string_cuts() -> None:
    [completion] = run(request(compiled(regex="abab"), stop="ba")).outputs
    assert (completion.text, completion.finish_reason, completion.stop_reason) == ("a", "stop", "ba")


def test_log_probabilities_are_those_of_the_model() -> None:
    found = request(compiled(regex="[ab]{4}"), logprobs=2, temperature=0.0)
    chance = np.random.default_rng(0)
    rows = [chance.standard_normal(WIDTH).astype(np.float32) for _ in range(4)]
    [sequence] = found.sequences
    for row in rows:
        if not sequence.finished:
            [token] = sample_rows([sequence.sampler], row[None])
            sequence.accept(token, row)
    output = found.output()
    assert output is not None
    [completion] = output.outputs
    assert completion.logprobs is not None
    for row, token, entry in zip(rows, completion.token_ids, completion.logprobs, strict=False):
        assert entry[token].logprob == pytest.approx(logprob(row, token))
        assert set(entry) == {token, *np.argsort(-row)[:2].tolist()}


def test_several_completions_follow_it_each_by_itself() -> None:
    output = run(request(compiled(regex="[a-d]{6}"), n=4, temperature=1.5))
    texts = [completion.text for completion in output.outputs]
    assert all(len(text) == 6 and set(text) <= set("abcd") for text in texts)
    assert len(set(texts)) == 4
    assert [one.text for one in run(request(compiled(regex="[a-d]{6}"), n=4, temperature=1.5)).outputs] == texts


def test_parameters_that_leave_no_token() -> None:
    sampler = Sampler(
        SamplingParams(allowed_token_ids=[START]), [], constraint=compiled(regex="ab").start([EOS]), name="seven"
    )
    with pytest.raises(
        SamplingParamsError, match=r"request 'seven': structured_outputs, allowed_token_ids, .* leave no"
    ):
        sampler.sample(np.zeros(WIDTH, np.float32))


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback"])
def test_tokenizers_whose_bytes_are_known(kind: str) -> None:
    tokenizer = getattr(tokenizer_kinds, kind)()
    grammar = compiled(tokenizer, choice=["aé€b"])
    sampler = Sampler(SamplingParams(temperature=0.0), [], constraint=grammar.start([]))
    tokens = []
    while not sampler.complete:
        tokens.append(sampler.sample(np.zeros(tokenizer.vocab_size, np.float32)))
    assert tokenizer.decode(tokens) == "aé€b"


@pytest.mark.parametrize("kind", ["metaspace", "word_piece", "suffixed", "plain"])
def test_tokenizers_whose_bytes_are_not(kind: str) -> None:
    with pytest.raises(SamplingParamsError, match="tokens of this model's tokenizer are not known byte by byte"):
        compiled(getattr(tokenizer_kinds, kind)(), regex="a")


def test_no_tokenizer() -> None:
    with pytest.raises(SamplingParamsError, match="structured_outputs needs a tokenizer"):
        compiled(None, regex="a")


def test_tokens_that_cannot_begin_it() -> None:
    vocabulary = tokenizer_kinds.byte_level()
    few = tokenizer_kinds.make(["a", "b"], vocabulary._tokenizer.decoder)
    with pytest.raises(SamplingParamsError, match="the grammar has no beginning that this model has tokens for"):
        compiled(few, regex="x")


def test_a_name_that_is_taken_is_no_obstacle() -> None:
    wider = tokenizer_kinds.make(["a", "<|another|>"], TOKENIZER._tokenizer.decoder)
    text, number = wider.with_another_token()
    assert '"<|another|>>"' in text
    assert number == wider.vocab_size


def test_grammars_are_kept_and_the_oldest_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_NUM_KEPT", 2)
    grammars = Grammars(TOKENIZER)
    texts = [StructuredOutputsParams(regex=regex).llguidance_grammar for regex in "abc"]
    first, second = grammars.compile(texts[0]), grammars.compile(texts[1])
    assert grammars.compile(texts[0]) is first
    grammars.compile(texts[2])
    assert grammars.compile(texts[0]) is first
    assert grammars.compile(texts[1]) is not second


CHAINS = """
from furiosa_llm.runtime import StructuredOutputsParams
from furiosa_llm.runtime.errors import SamplingParamsError

def definitions(count, refer):
    chain = {f"{i:x}": refer({"$ref": f"#/$defs/{i + 1:x}"}) for i in range(count)}
    return {"$ref": "#/$defs/0", "$defs": {**chain, f"{count:x}": {"const": "a"}}}

rules = "start:r0\\n" + "".join(f"r{i:x}:r{i + 1:x}\\n" for i in range(21_000)) + 'r5208:"a"'
for given in (
    {"grammar": rules},
    {"json": definitions(7_500, lambda schema: schema)},
    {"json": definitions(4_000, lambda schema: {"anyOf": [{"items": schema}]})},
):
    try:
        print(len(StructuredOutputsParams(**given).llguidance_grammar))
    except SamplingParamsError as error:
        print(error)
"""


def test_the_longest_chains_of_rules_do_not_end_the_process() -> None:
    done = subprocess.run([sys.executable, "-c", CHAINS], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    rules, plain, nested = done.stdout.splitlines()
    assert int(rules) > 0.8 * module.MAX_GRAMMAR_NBYTES
    assert int(plain) > 0.7 * module.MAX_GRAMMAR_NBYTES
    assert "schema too large" in nested or int(nested) > 0.5 * module.MAX_GRAMMAR_NBYTES
