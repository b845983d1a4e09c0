"""Faults of the face: the server, the command line, and the benchmarks' figures."""

from __future__ import annotations

from tests.seeded_faults.fault import Fault

SERVER = (
    Fault(
        name="answers of later prompts are mixed up",
        file="furiosa_llm/server/completions.py",
        old="index = prompt_index * self._body.num_choices + part.index",
        new="index = prompt_index + part.index",
        effect="streams of several prompts with several completions have two under one index",
        hints=("tests/server/test_completions.py::test_several_prompts_of_several_completions_are_in_order",),
    ),
    Fault(
        name="cached tokens are not told",
        file="furiosa_llm/server/completions.py",
        old="prompt_tokens_details=CachedTokens(cached_tokens=cached)",
        new="prompt_tokens_details=CachedTokens(cached_tokens=0)",
        effect="`usage` never shows that a prompt was found in the cache",
        hints=("tests/server/test_status.py::test_metrics",),
    ),
    Fault(
        name="every stop is a call of a tool",
        file="furiosa_llm/server/chat_service.py",
        old='reason == "stop" and self.num_calls and not self._is_named',
        new='reason == "stop" and not self._is_named',
        effect="clients wait for calls of tools behind every answer",
        hints=("tests/server/test_chat.py::test_a_call_of_what_was_not_offered_is_text",),
    ),
    Fault(
        name="an error is followed by [DONE]",
        file="furiosa_llm/server/events.py",
        old="            yield failed(api_error(error))\n            return\n",
        new="            yield failed(api_error(error))\n",
        effect="clients take a stream that broke off for a whole one",
        hints=("tests/server/test_failures.py::test_nothing_follows_the_event_of_a_failure",),
    ),
    Fault(
        name="the limit counts prompts",
        file="furiosa_llm/server/generation.py",
        old="self.gate.admit(len(prompts) * params.num_sequences)",
        new="self.gate.admit(len(prompts))",
        effect="one request with a large `n` takes the whole server",
        hints=("tests/server/test_errors.py::test_the_queue_has_a_limit",),
    ),
    Fault(
        name="what begins like an open path is open",
        file="furiosa_llm/server/middleware.py",
        old='scope["path"] in _OPEN_PATHS or',
        new='scope["path"].startswith(tuple(_OPEN_PATHS)) or',
        effect="everything is answered without an API key",
        hints=("tests/server/test_errors.py::test_keys",),
    ),
    Fault(
        name="only one piece of a body is counted",
        file="furiosa_llm/server/middleware.py",
        old='self._count += len(message.get("body", b""))',
        new='self._count = len(message.get("body", b""))',
        effect="a body without a length fills the memory",
        hints=("tests/server/test_errors.py::test_every_piece_of_a_body_counts",),
    ),
    Fault(
        name="line breaks reach the log",
        file="furiosa_llm/server/notes.py",
        old="return text.translate(_ESCAPES)",
        new="return text",
        effect="clients write lines of their own into the log",
        hints=("tests/server/test_errors.py::test_bodies_are_one_line_of_the_log_each",),
    ),
    Fault(
        name="offsets begin anew with every token",
        file="furiosa_llm/server/logprobs.py",
        old="self._offset += len(self._shown.push(token))",
        new="self._offset = len(self._shown.push(token))",
        effect="`text_offset` points to other tokens: wrong scores in lm-eval",
        hints=("tests/server/test_completions.py::test_logprobs_with_echo_are_those_of_the_engine",),
    ),
    Fault(
        name="tools that were not offered are called",
        file="furiosa_llm/server/tools.py",
        old=" and name in self._functions else None\n            if shown",
        new=" else None\n            if shown",
        effect="clients are asked to call functions that they do not have",
        hints=("tests/server/test_tools.py",),
    ),
    Fault(
        name="a tag in pieces is text",
        file="furiosa_llm/server/tools.py",
        old="keep = max((overlap(self._held, tag) for tag in self._form.opens), default=0)",
        new="keep = 0",
        effect="calls of tools in streams come as text, with half a tag",
        hints=("tests/server/test_tools.py",),
    ),
    Fault(
        name="who goes away has succeeded",
        file="furiosa_llm/server/metrics.py",
        old="if not self._finished or self._first is None:",
        new="if self._first is None:",
        effect="`/metrics` counts requests that were given up as completed",
        hints=("tests/server/test_disconnects.py::test_a_client_that_goes_aborts_its_request",),
    ),
    Fault(
        name="no field is to blame",
        file="furiosa_llm/server/errors.py",
        old="param=first if first in _PARAMETERS else None",
        new="param=None",
        effect="a refused sampling parameter is not named in `param`",
        hints=("tests/server/test_errors.py::test_bad_requests",),
    ),
    Fault(
        name="vectors of doubles",
        file="furiosa_llm/server/embeddings.py",
        old='vector.astype("<f4")',
        new='vector.astype("<f8")',
        effect="the openai client reads embeddings of twice the length, all wrong",
        hints=("tests/server/test_embeddings.py::test_vectors",),
    ),
)

COMMANDS = (
    Fault(
        name="a difference is no failure",
        file="furiosa_llm/cli/diff.py",
        old="sys.exit(0 if found.same else 1)",
        new="sys.exit(0)",
        effect="scripts take different artifacts for the same",
        hints=("tests/cli/test_artifact_commands.py::test_diff_of_two_sizes",),
    ),
    Fault(
        name="the text is printed again and again",
        file="furiosa_llm/cli/generate.py",
        old="            shown = len(completed)\n",
        new="",
        effect="`generate` prints the whole completion at every token",
        hints=("tests/cli/test_generate.py::test_the_text_is_that_of_the_engine",),
    ),
    Fault(
        name="a failed check is verified",
        file="furiosa_llm/cli/verify.py",
        old="sys.exit(0 if found.passed else _UNDECIDED if found.undecided else 1)",
        new="sys.exit(0)",
        effect="`furiosa-llm verify` in a script lets a damaged artifact pass",
        hints=("tests/cli/test_verify.py::test_a_damaged_artifact_is_shown_and_recorded",),
    ),
    Fault(
        name="the first token has an interval, too",
        file="furiosa_llm/bench/metrics.py",
        old="return (times[-1] - times[0]) / (len(times) - 1) if",
        new="return (times[-1] - times[0]) / len(times) if",
        effect="`bench` shows a TPOT that is too good",
        hints=("tests/bench/test_metrics.py",),
    ),
)

FAULTS = (*SERVER, *COMMANDS)
