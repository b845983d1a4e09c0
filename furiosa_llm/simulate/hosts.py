"""Which hosts the stages of a replica are on, as the engine places them, and what the way between hosts takes."""

from __future__ import annotations

import dataclasses
from itertools import pairwise

from furiosa_llm.builder.lower.step_costs import StepCosts
from furiosa_llm.simulate.device import Device
from furiosa_llm.simulate.errors import PlacementError
from furiosa_llm.simulate.placement import Placement


def hosts_of(device: Device, place: Placement, replica: int) -> tuple[int, ...]:
    """The host of each stage of a replica; the head, which schedules, is on host 0.

    Cards are numbered over all hosts. As the engine does, replicas that share cards have each stage on a later card;
    where PEs are too few for that, stages share cards in their order.
    """
    stages, ranks, units = place.pipeline_parallel_size, place.tensor_parallel_size, device.units_per_card
    groups = max(units // ranks, 1)
    if ranks < units and place.data_parallel_size % groups == 0:
        cards = [replica // groups * stages + stage for stage in range(stages)]
    else:
        cards = [(replica * stages + stage) * ranks // units for stage in range(stages)]
    return tuple(card // device.cards_per_host for card in cards)


def count_hosts(device: Device, place: Placement) -> int:
    """How many hosts have a stage, or a part of one; the last replica is on the last of them."""
    last = (place.units - 1) // device.units_per_card // device.cards_per_host
    return 1 + max(last, *hosts_of(device, place, place.data_parallel_size - 1))


def on_hosts(device: Device, cards: int, hosts: int) -> Device:
    """The device with `cards` spread evenly. Raises PlacementError where they cannot be."""
    if cards % hosts:
        raise PlacementError(f"{cards} cards are not spread evenly over {hosts} hosts; give a multiple of {hosts}")
    return dataclasses.replace(device, cards_per_host=cards // hosts)


def handed_on(costs: StepCosts) -> int:
    """The bytes of a token that a stage hands on: as wide as what the layers' collectives give."""
    return max((one.nbytes for one in costs.traffic if not one.head), default=0)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Ways:
    """What a step's way through the stages of one replica takes, besides the stages."""

    latency: float
    """Of a message between two hosts."""
    seconds_per_token: float
    """Of what a stage hands on to a stage on another host."""
    crossings: tuple[bool, ...]
    """From the head to stage 0, from each stage to the next, and from the last one to the head."""

    def into(self) -> float:
        """Until the first stage knows its batch."""
        return self.latency * self.crossings[0]

    def after(self, stage: int, tokens: float) -> float:
        """From a stage to what follows it: the head gets a few bytes of each sequence."""
        if not self.crossings[stage + 1]:
            return 0.0
        last = stage + 2 == len(self.crossings)
        return self.latency + (0.0 if last else tokens * self.seconds_per_token)

    def all(self, tokens: float) -> float:
        """Of all hops of a step."""
        return self.into() + sum(self.after(stage, tokens) for stage in range(len(self.crossings) - 1))


def ways_of(device: Device, place: Placement, replica: int, handed_nbytes: float) -> Ways:
    """Those of a replica."""
    hosts = (0, *hosts_of(device, place, replica), 0)
    return Ways(
        latency=device.latency_of_hosts.value,
        seconds_per_token=handed_nbytes / device.link_of_hosts.value,
        crossings=tuple(one != two for one, two in pairwise(hosts)),
    )
