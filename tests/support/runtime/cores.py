"""Engine cores without a model, for tests of what lies above."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from furiosa_llm.runtime.engine.core import EngineCore, ModelLimits
from furiosa_llm.runtime.engine.replica import FaultPolicy, Replica
from furiosa_llm.runtime.engine.scheduler import SchedulerLimits
from furiosa_llm.runtime.runners.batch import Runner
from furiosa_llm.runtime.tokens.tokenizer import Tokenizer
from tests.support.runtime.runners import VOCAB

ZOO = Path(__file__).parents[3] / "fixtures" / "zoo" / "tiny-llama-genai-fp32"


def make_core(
    *factories: Callable[[], Runner],
    max_failures: int = 5,
    seed: int | None = None,
    close_model: Callable[[], None] = lambda: None,
) -> EngineCore:
    """A core with a replica for each factory of runners; sequences may have 64 tokens."""
    scheduling = SchedulerLimits(
        num_groups=1, slots_per_group=4, num_pages=64, page_size=4, max_length=64, prefill_chunk_size=8
    )
    policy = FaultPolicy(backoff=0.001, close_timeout=0.05, max_failures=max_failures)
    return EngineCore(
        replicas=[Replica(index, make, scheduling, policy) for index, make in enumerate(factories)],
        tokenizer=Tokenizer.from_folder(ZOO),
        limits=ModelLimits(
            max_length=64, max_prompt_length=None, capacity=256, vocab_size=VOCAB, eos_token_ids=frozenset()
        ),
        seed=seed,
        close_model=close_model,
    )
