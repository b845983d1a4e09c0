"""Which replica gets a request."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pytest

from furiosa_llm.runtime.engine.router import choose_replica
from furiosa_llm.runtime.errors import EngineDeadError


@dataclass
class Stub:
    load: int = 0
    cached: int = 0
    ready: bool = True
    death: BaseException | None = None
    adapter: int = 0

    def cached_prefix(self, tokens: Sequence[int], adapter: int) -> int:
        return min(self.cached, len(tokens) - 1) if adapter == self.adapter else 0


PROMPT = range(100)
DEAD = OSError("gone")


@pytest.mark.parametrize(
    ("replicas", "chosen"),
    [
        ([Stub()], 0),
        ([Stub(5), Stub(4), Stub(6)], 1),
        ([Stub(4), Stub(4)], 0),
        ([Stub(), Stub(cached=64)], 1),
        ([Stub(), Stub(load=63, cached=64)], 1),
        ([Stub(), Stub(load=65, cached=64)], 0),
        ([Stub(load=1), Stub(load=64, cached=64)], 1),
        ([Stub(ready=False), Stub(load=1000)], 1),
        ([Stub(ready=False), Stub(load=1000, ready=False)], 0),
        ([Stub(death=DEAD), Stub(load=1000)], 1),
        ([Stub(death=DEAD), Stub(ready=False), Stub(load=9, ready=False)], 1),
    ],
)
def test_the_choice(replicas: list[Stub], chosen: int) -> None:
    assert choose_replica(replicas, PROMPT) == chosen


def test_none_is_left() -> None:
    with pytest.raises(
        EngineDeadError, match=r"all 2 replicas failed .*, the last one over: gone; load the model again"
    ) as caught:
        choose_replica([Stub(death=DEAD), Stub(death=DEAD)], PROMPT)
    assert caught.value.__cause__ is DEAD


def test_a_prefix_of_another_adapter_attracts_nothing() -> None:
    replicas = [Stub(load=5), Stub(load=10, cached=50, adapter=2)]
    assert [choose_replica(replicas, PROMPT, adapter) for adapter in (0, 1, 2)] == [0, 0, 1]
