"""Which replica gets a request: the one that has the least to do for it, prompts found in a cache counted in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from furiosa_llm.runtime.errors import EngineDeadError


class Target(Protocol):
    """What a router asks of a replica; see `Replica`."""

    @property
    def death(self) -> BaseException | None: ...  # noqa: D102

    @property
    def ready(self) -> bool: ...  # noqa: D102

    @property
    def load(self) -> int: ...  # noqa: D102

    def cached_prefix(self, tokens: Sequence[int], adapter: int) -> int: ...  # noqa: D102


def choose_replica(replicas: Sequence[Target], prompt: Sequence[int], adapter: int = 0) -> int:
    """The index of the replica that is to run `prompt`, with the adapter of that key.

    It is the one with the least sum of its load and of what of the prompt it would have to compute, both in tokens: a
    cached prefix attracts requests until the replica has as many tokens more to carry than another. Of equal ones the
    first is taken. Replicas that are being rebuilt are taken if there are no others. Raises EngineDeadError, with the
    last death as its cause, if all are dead.
    """
    alive = [index for index, replica in enumerate(replicas) if replica.death is None]
    if not alive:
        raise EngineDeadError(
            f"all {len(replicas)} replicas failed and could not be rebuilt, the last one over: "
            f"{replicas[-1].death}; load the model again"
        ) from replicas[-1].death
    if len(alive) == 1:
        return alive[0]
    candidates = [index for index in alive if replicas[index].ready] or alive

    def cost(index: int) -> tuple[int, int]:
        return replicas[index].load - replicas[index].cached_prefix(prompt, adapter), index

    return min(candidates, key=cost)
