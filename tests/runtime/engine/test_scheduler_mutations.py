"""The random traces find out each of these wrong schedulers: the source with one line changed."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType

import pytest

from furiosa_llm.runtime.engine import scheduler as right_scheduler
from furiosa_llm.runtime.engine import slots as right_slots
from tests.support.runtime.scheduler_model import MakeScheduler, WrongScheduleError, run_trace
from tests.support.tiers import tiered

FOUND_OUT = (WrongScheduleError, AssertionError, ValueError, LookupError)
SEEDS = (53, 155, *range(1060, 1300))
"""Among these the rarest mistakes come up."""

IN_SLOTS = {
    "pages are rounded down": ("-(-length // self.size)", "length // self.size"),
    "no page for the first new token": ("needed(len(sequence.tokens) + 1)", "needed(len(sequence.tokens))"),
    "copies are run backwards": ("tuple(self._copies)", "tuple(reversed(self._copies))"),
    "copies are repeated": ("self._copies.clear()", "pass"),
    "a moved row loses its last position": ("length=left.length)", "length=left.length - 1)"),
    "a row moves before what it overwrites is saved": (
        """            self._save(hole, 0, behind=count)
            self._pages.keep_only(hole, 0)
            left = sequence.slot
            self._copies.append(Copy(source=left.index, target=hole.index, length=left.length))
""",
        """            left = sequence.slot
            self._copies.append(Copy(source=left.index, target=hole.index, length=left.length))
            self._save(hole, 0, behind=count)
            self._pages.keep_only(hole, 0)
""",
    ),
    "a match with tokens that are not computed yet": (
        "            return slot.length\n        return",
        "            return len(slot.tokens)\n        return",
    ),
    "a match leaves nothing to compute": ("return max(0, length - LEAST_CHUNK)", "return length"),
    "a match one token too long": ("return same\n", "return min(same + 1, limit)\n"),
    "a match hides the logits of the prompt": (
        "            return 0 if self.batch_invariant else self.delivered\n",
        "            pass\n",
    ),
    "logits of the prompt left out": ('(cut(start, size, self.delivered), "none")', '(end, "none")'),
    "logits of the prompt twice": ('(cut(start, size, self.delivered), "none")', '(end, "all")'),
    "a slot keeps tokens without pages": ("self._pages.cached += self._pages.needed(slot.length)", "pass"),
    "a reused slot keeps its pages": ("        self._pages.keep_only(target, 0)\n", ""),
    "nothing is evicted for a prompt that is not found": (
        "            self._pages.evict(sequence.pages)\n            target",
        "            target",
    ),
    "nothing is evicted for a prompt in its place": (
        "            self._pages.evict(sequence.pages - self._pages.needed(target.length), but_not=target)\n",
        "",
    ),
    "what is copied from is never evicted": (
        "            self._pages.evict(sequence.pages)\n        target.tokens",
        "        target.tokens",
    ),
    "who leaves keeps the pages": ("self._pages.held -= sequence.pages", "pass"),
    "a saved slot overwrites a sequence": ("if spare.owner is None and spare is not but_not", ""),
    "a saved slot overwrites the match": (" and spare is not but_not", ""),
    "a long prompt sits in the middle": (" and end == len(sequence.tokens)", ""),
    "a prompt sits in the middle though decodes go first": (
        "self.is_ready_for_a_prompt and end",
        "self.under_way is None and end",
    ),
    "generated tokens are taken over": ("min(slot.length, slot.prompt_length) if", "slot.length if"),
    "generated tokens are found again as chunks": ("self.prompt_length if self.batch_invariant else len", "len"),
    "a prompt of one token is taken over": (" if slot.prompt_length >= LEAST_CHUNK else 0", ""),
    "what was generated is computed as a prompt": ("start >= self.prompt_length", "False"),
    "a prompt's last chunk has what was generated": ("self.batch_invariant and not behind_prompt", "False"),
    "a moved slot forgets its prompt": (
        "hole.prompt_length, hole.adapter = left.prompt_length, left.adapter",
        "hole.adapter = left.adapter",
    ),
    "a moved slot forgets its adapter": (
        "hole.prompt_length, hole.adapter = left.prompt_length, left.adapter",
        "hole.prompt_length = left.prompt_length",
    ),
    "a saved slot forgets its adapter": (
        "spare.prompt_length, spare.adapter = slot.prompt_length, slot.adapter",
        "spare.prompt_length = slot.prompt_length",
    ),
    "a slot keeps the adapter of who was there before": (
        "target.prompt_length, target.adapter = sequence.prompt_length, adapter",
        "target.prompt_length = sequence.prompt_length",
    ),
    "the KV of another adapter is taken over": ("if slot.adapter != adapter:", "if False:"),
    "prefixes are cached though they must not": ("if not self._prefix_caching:", "if False:"),
    "prompts together though they must not": ("if not self._prompts_together or ", "if "),
    "a prompt joins a batch that is under way": ("isinstance(self.under_way, Prefill)", "False"),
    "more tokens together than a batch may have": ("in everyone) > self._chunk_size", "in everyone) > 1000"),
    "a part of a prompt beside another": ("if any(one.chunk(0, self._chunk_size)[0] < len(one.tokens)", "if any(False"),
    "what is found is computed beside other prompts": ("self.worthwhile_match(sequence) or any(", "any("),
    "prompts that begin alike together": ("common_prefix(other.tokens, sequence.tokens, limit) >=", "0 >="),
    "what is left of a prompt beside another": ("        if other.slot.length:\n            return True\n", ""),
}

IN_SCHEDULER = {
    "nothing is evicted for a token": ("not self._pages.evict(1)", "self._pages.free < 1"),
    "the page of a token is not noted": ("                self._pages.held += 1\n", ""),
    "tokens go without pages": ("len(sequence.tokens) > sequence.pages", "len(sequence.tokens) > 2 * sequence.pages"),
    "prompts are admitted without pages": ("self._pages.held + needed > self._pages.total", "False"),
    "the earliest gives way": ("max(running, key=_arrival)", "min(running, key=_arrival)"),
    "a preempted sequence goes to the end": (
        "insort(self._waiting, sequence, key=_arrival)",
        "self._waiting.append(sequence)",
    ),
    "the last comes first": ("sequence = self._waiting[0]", "sequence = self._waiting.pop()"),
    "prefills go first": ("group.last_was_prefill = isinstance(batch, Prefill)", "group.last_was_prefill = False"),
    "decodes go first": ("group.last_was_prefill = isinstance(batch, Prefill)", "group.last_was_prefill = True"),
    "decoding slots are not compacted": ("        group.compact()\n        rows", "        rows"),
    "two batches of a group at once": ("if group.under_way is None]", "]"),
    "an abort takes a running row away": ("elif sequence_id in _members(sequence.group.under_way)", "elif False"),
    "an aborted sequence stays": ("if sequence.aborted or sequence_id in finished", "if sequence_id in finished"),
    "a finished sequence stays": ("if sequence.aborted or sequence_id in finished", "if sequence.aborted"),
    "an aborted sequence is sampled": ("for sequence in members if not sequence.aborted)", "for sequence in members)"),
    "a prompt is computed with no adapter": ("                    adapter=sequence.adapter,\n", ""),
    "a row is decoded with no adapter": ("\n                adapter=sequence.adapter,", ""),
    "a step is not noted": ("slot.length += 1", "slot.length += 0"),
    "a group forgets its prompt": ("            group.decoding.append(sequence)\n", ""),
    "clear() keeps the slots": ("        self._reset()\n        return", "        return"),
}

MUTATIONS = {name: ("slots", *change) for name, change in IN_SLOTS.items()}
MUTATIONS |= {name: ("scheduler", *change) for name, change in IN_SCHEDULER.items()}


def changed(module: ModuleType, old: str, new: str) -> ModuleType:
    """A copy of a module, registered as it, with its source changed everywhere that `old` is found."""
    assert module.__file__ is not None
    source = Path(module.__file__).read_text()
    assert old == new or old in source, f"{module.__name__} has no {old!r} any more: change this test with it"
    copy = ModuleType(module.__name__)
    sys.modules[module.__name__] = copy
    exec(compile(source.replace(old, new), module.__file__, "exec"), copy.__dict__)
    return copy


def is_found_out(make: MakeScheduler, seeds: Iterable[int] = SEEDS) -> bool:
    try:
        for seed in seeds:
            run_trace(seed, make)
    except FOUND_OUT:
        return True
    return False


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a test puts in the modules' place, they come back."""
    for module in (right_slots, right_scheduler):
        monkeypatch.setitem(sys.modules, module.__name__, module)


@pytest.mark.usefixtures("modules")
@pytest.mark.parametrize("name", tiered(MUTATIONS, list(MUTATIONS)[::6]))
def test_a_wrong_scheduler_is_found_out(name: str) -> None:
    file, old, new = MUTATIONS[name]
    changed(right_slots, *((old, new) if file == "slots" else ("", "")))
    wrong = changed(right_scheduler, *((old, new) if file == "scheduler" else ("", "")))
    assert is_found_out(wrong.Scheduler)


@pytest.mark.usefixtures("modules")
def test_an_unchanged_copy_is_not() -> None:
    changed(right_slots, "", "")
    assert not is_found_out(changed(right_scheduler, "", "").Scheduler, SEEDS[:50])
