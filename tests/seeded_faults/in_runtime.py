"""Faults of the runtime: scheduling, sampling, states, execution, topology, accounts and text."""

from __future__ import annotations

from tests.seeded_faults.fault import Fault

_TRACES = "tests/runtime/engine/test_scheduler.py::test_random_traces"

SCHEDULING = (
    Fault(
        name="pages are rounded down",
        file="runtime/engine/slots.py",
        old="return -(-length // self.size)",
        new="return length // self.size",
        effect="more sequences are admitted than the KV cache holds",
        hints=("tests/runtime/engine/test_scheduler_cache.py",),
    ),
    Fault(
        name="copies are run backwards",
        file="runtime/engine/slots.py",
        old="copies = tuple(self._copies)",
        new="copies = tuple(reversed(self._copies))",
        effect="a slot is overwritten before it is saved: sequences go on with another one's KV",
        hints=(_TRACES,),
    ),
    Fault(
        name="a match leaves nothing to compute",
        file="runtime/engine/slots.py",
        old="return max(0, length - LEAST_CHUNK)",
        new="return length",
        effect="a prompt that was seen before has no logits to sample from",
        hints=("tests/runtime/engine/test_scheduler_cache.py",),
    ),
    Fault(
        name="who leaves keeps the pages",
        file="runtime/engine/slots.py",
        old="        self._pages.held -= sequence.pages\n        self._pages.cached",
        new="        self._pages.cached",
        effect="the KV cache runs full of sequences that have ended; the server stops admitting",
        hints=("tests/runtime/engine/test_scheduler_cache.py",),
    ),
    Fault(
        name="the earliest gives way",
        file="runtime/engine/scheduler.py",
        old="self._preempt(max(running, key=_arrival))",
        new="self._preempt(min(running, key=_arrival))",
        effect="short of pages, the request that waited longest is computed again",
        hints=("tests/runtime/engine/test_scheduler_cache.py",),
    ),
    Fault(
        name="an aborted sequence is sampled",
        file="runtime/engine/scheduler.py",
        old="for sequence in members if not sequence.aborted)",
        new="for sequence in members)",
        effect="a client that went away costs tokens, or ends the replica",
        hints=("tests/runtime/engine/test_scheduler.py",),
    ),
    Fault(
        name="cached prompts repel requests",
        file="runtime/engine/router.py",
        old="replicas[index].load - replicas[index].cached_prefix(prompt, adapter)",
        new="replicas[index].load + replicas[index].cached_prefix(prompt, adapter)",
        effect="conversations go to the replica that has to compute them from the beginning",
        hints=("tests/runtime/engine/test_router.py",),
    ),
)

SAMPLING = (
    Fault(
        name="temperature multiplies",
        file="runtime/tokens/sampler.py",
        old="weights = np.exp((scores - top) / np.float32(temperature))",
        new="weights = np.exp((scores - top) * np.float32(temperature))",
        effect="a low temperature makes answers random, a high one makes them dull",
        hints=("tests/runtime/tokens/test_sampler.py",),
    ),
    Fault(
        name="one token too few before a stop",
        file="runtime/tokens/sampler.py",
        old="return len(self._output) < self._params.min_tokens and",
        new="return len(self._output) < self._params.min_tokens - 1 and",
        effect="completions end with one token less than `min_tokens`",
        hints=("tests/runtime/tokens/test_sampler.py::test_stop_tokens_wait_for_the_least_number_of_tokens",),
    ),
    Fault(
        name="completions share their random numbers",
        file="runtime/tokens/sampler.py",
        old="np.random.SeedSequence(chosen, spawn_key=(index,))",
        new="np.random.SeedSequence(chosen)",
        effect="with a seed, the `n` completions of a prompt are all the same",
        hints=("tests/runtime/requests/test_request.py::test_completions_draw_their_own_random_numbers",),
    ),
    Fault(
        name="presence counts the prompt",
        file="runtime/tokens/token_counts.py",
        old="np.float32(params.presence_penalty) * (counts > 0)",
        new="np.float32(params.presence_penalty)",
        effect="`presence_penalty` punishes words of the question",
        hints=("tests/runtime/tokens/test_sampler.py",),
    ),
    Fault(
        name="log probabilities of a prompt are one place early",
        file="runtime/requests/logprobs.py",
        old="for position, row in enumerate(logits, start + 1):",
        new="for position, row in enumerate(logits, start):",
        effect="scores of a text (lm-eval, echo) are those of other tokens",
        hints=("tests/runtime/requests/test_request.py::test_log_probabilities_of_a_prompt_are_wanted_once",),
    ),
    Fault(
        name="the newest grammar is given up",
        file="runtime/tokens/grammar.py",
        old="self._kept.popitem(last=False)",
        new="self._kept.popitem(last=True)",
        effect="once 32 schemas were used, every further one is compiled at each request",
        hints=("tests/runtime/tokens/test_grammar.py::test_grammars_are_kept_and_the_oldest_given_up",),
    ),
)

EXECUTION = (
    Fault(
        name="the first of the new positions are kept",
        file="runtime/execution/states.py",
        old="source, target = rows.span(length - added, length), rows.span(total - added, total)",
        new="source, target = rows.span(0, added), rows.span(total - added, total)",
        effect="caches that are appended to repeat their beginning: nonsense from the second token on",
        hints=("tests/runtime/execution/test_states.py",),
    ),
    Fault(
        name="growing forgets later slots",
        file="runtime/execution/states.py",
        old="self._used = max(self._used, count)",
        new="self._used = max(self._used, 1)",
        effect="when the cache grows, sequences in the last slots lose their KV",
        hints=("tests/runtime/execution/test_states.py",),
    ),
    Fault(
        name="sums are added one after another",
        file="runtime/program/lanes.py",
        old="return group[: 1 << ((len(group) - 1).bit_length() - 1)]",
        new="return group[:-1]",
        effect="results depend on the number of threads in their last bits",
        hints=("tests/runtime/program/test_lanes.py::test_partial_sums_are_added_as_a_tree",),
    ),
    Fault(
        name="two exchanges move one value",
        file="runtime/execution/exchange.py",
        old="return used[part] == 1 and part.name in",
        new="return part.name in",
        effect="of two collectives of one value one reads memory that nothing was written to",
        hints=("tests/runtime/program/test_lanes.py::test_collectives_of_one_value",),
    ),
    Fault(
        name="pieces of a sum end one early",
        file="runtime/execution/collectives.py",
        old="begin, end = flat_out.size * index // count, flat_out.size * (index + 1) // count",
        new="begin, end = flat_out.size // count * index, flat_out.size // count * (index + 1)",
        effect="large sums on several threads leave their last elements unset",
        hints=("tests/runtime/execution/test_collectives.py",),
    ),
    Fault(
        name="old buffers stay bound",
        file="runtime/runners/steps.py",
        old="            for other in self._uses.values():\n",
        new="            for other in (use,):\n",
        effect="after the cache has grown, decodes of other sizes read the old one",
        hints=("tests/runtime/runners/test_local_runner.py::test_old_buffers_are_let_go_of_when_slots_grow",),
    ),
    Fault(
        name="memory is reused one step early",
        file="runtime/execution/memory.py",
        old="if last + 2 <= lifetime.first",
        new="if last + 1 <= lifetime.first",
        effect="a thread overwrites what another one still reads: now and then wrong tokens",
        hints=("tests/runtime/execution/test_memory.py",),
    ),
    Fault(
        name="a shorter row sees one position more",
        file="runtime/execution/feeds.py",
        old="(np.arange(total) < totals[:, None])",
        new="(np.arange(total) <= totals[:, None])",
        effect="in batches of unequal lengths short sequences attend to an empty position",
        hints=("tests/runtime/execution/test_feeds.py",),
    ),
)

PLACES = (
    Fault(
        name="stages are balanced by blocks",
        file="runtime/placement/stages.py",
        old="before[0] + (sums[stop] - sums[start]) ** 2,",
        new="before[0] + (sums[stop] - sums[start]),",
        effect="pipeline stages are less even than they could be: lower throughput",
        hints=("tests/runtime/placement/test_stages.py::test_known_cuts",),
    ),
    Fault(
        name="two stages on one card",
        file="runtime/placement/topology.py",
        old="if not stages or g[0].npu > stages[-1][0].npu)",
        new="if not stages or g[0].npu >= stages[-1][0].npu)",
        effect="replicas are placed as the vendor's rule does not",
        hints=("tests/runtime/placement/test_topology.py",),
    ),
    Fault(
        name="replicas on a card keep weights twice",
        file="runtime/placement/capacity.py",
        old="sum(stages[stage].weight_nbytes for stage in set(held))",
        new="sum(stages[stage].weight_nbytes for stage in held)",
        effect="models are refused that fit, and too few pages are given",
        hints=("tests/runtime/placement/test_capacity.py",),
    ),
    Fault(
        name="pages of the roomiest card",
        file="runtime/placement/capacity.py",
        old="return min(counts, default=None)",
        new="return max(counts, default=None)",
        effect="the KV cache is larger than the tightest card has memory for",
        hints=("tests/runtime/placement/test_capacity.py",),
    ),
)

TEXT = (
    Fault(
        name="half a character is shown",
        file="runtime/tokens/text_stream.py",
        old="        end = len(text) - text.endswith(_REPLACEMENT)\n",
        new="        end = len(text)\n",
        effect="streams hold replacement characters in place of emoji",
        hints=(
            "tests/runtime/tokens/test_tokenizer.py::test_a_character_comes_with_its_last_byte",
            "tests/runtime/tokens/test_tokenizer.py::test_pieces_add_up_and_never_hold_half_a_character",
        ),
    ),
    Fault(
        name="the beginning of a stop string is shown",
        file="runtime/tokens/text_stream.py",
        old="range(min(self._longest - 1, len(self._held)), 0, -1)",
        new="range(min(self._longest - 2, len(self._held)), 0, -1)",
        effect="a stop string that comes in pieces is shown but for its last character",
        hints=(
            "tests/runtime/tokens/test_tokenizer.py::test_a_stop_string_may_begin_early",
            "tests/runtime/tokens/test_tokenizer.py::test_text_ends_before_the_first_stop_string",
        ),
    ),
    Fault(
        name="special tokens come on top",
        file="runtime/tokens/tokenizer.py",
        old="encoding.truncate(max(0, max_length - added))",
        new="encoding.truncate(max_length)",
        effect="texts cut to what an encoder takes are two tokens too long, and refused",
        hints=("tests/runtime/test_encoder.py::test_special_tokens_stay_around_a_text_that_is_cut",),
    ),
    Fault(
        name="templates escape what is not ASCII",
        file="runtime/tokens/chat_template.py",
        old="json.dumps(value, ensure_ascii=ensure_ascii,",
        new="json.dumps(value,",
        effect="tools whose descriptions are not English reach the model as escapes",
        hints=("tests/runtime/tokens/test_tokenizer.py::test_what_templates_use",),
    ),
)

FAULTS = (*SCHEDULING, *SAMPLING, *EXECUTION, *PLACES, *TEXT)
