"""Stages as actors of a Ray cluster: which host each is on, how it is started, and where it is started anew.

Ray places actors, starts them and ends them with the head. What stages and head say to each other goes past it, over
sockets of their own.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from furiosa_llm.runtime.artifact.card import PES_PER_CARD
from furiosa_llm.runtime.artifact.progress import tell
from furiosa_llm.runtime.distributed.link import split_address, unreachable
from furiosa_llm.runtime.distributed.remote_host import Place
from furiosa_llm.runtime.distributed.stage_server import StageServer
from furiosa_llm.runtime.errors import NoHostError, StageError, TopologyError
from furiosa_llm.runtime.placement.topology import Topology

logger = logging.getLogger(__name__)

RESOURCE = "npu"
"""Ray's name for the cards of a host: `ray start --resources='{"npu": 4}'`."""
PLACEMENT_SECONDS = 60.0
_NODE_ID = "ray.io/node-id"
_ANSWER_SECONDS = 2.0
"""A stage that does not say within so long where it is, has ended, or its host has."""
_SPARE_SECONDS = 2.0
"""So long a stage waits for a place on a spare host before its replica asks again."""
_SUSPECT_SECONDS = 30.0
"""So long nothing is placed on a host that did not answer: Ray itself may take a minute to notice."""
_CONNECT_SECONDS = 1.0
_HEAD_SECONDS = 5.0
"""So long Ray's own address may take to answer."""
_STORE_NBYTES = 80_000_000
"""Ray's least object store: nothing of ours goes through it."""


class StageActor:
    """A stage server in a process of its own on a host."""

    def __init__(self, token: str) -> None:
        self._server = StageServer(f"tcp://{_own_address()}:0", token)
        threading.Thread(target=self._server.serve, name="furiosa-stage", daemon=True).start()

    def address(self) -> str:
        """The server's."""
        return self._server.address


@dataclass(frozen=True, slots=True, kw_only=True)
class _Node:
    """A host of the cluster, with so many cards."""

    node_id: str
    host: str
    cards: int
    address: tuple[str, int]
    """Of Ray's own process there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Stage:
    """A stage that was started; `actor` is Ray's handle."""

    node: _Node
    group: PlacementGroup
    actor: Any
    place: Place


class RayCluster:
    """The stages of `topology`, whose cards are numbered over all hosts, in the order of these.

    `address` is Ray's own (None: a Ray on this machine is started, and ended by `close`). Hosts are in the order of
    their addresses, the head's first. Raises StageError if there is no Ray at the address, TopologyError if the hosts
    have not had the cards after `placement_seconds`.
    """

    def __init__(
        self, topology: Topology, *, address: str | None = None, placement_seconds: float | None = None
    ) -> None:
        self.token = secrets.token_hex(32)
        self._share = topology.tensor_parallel_size / PES_PER_CARD
        self._cards = [[pes[0].npu for pes in stages] for stages in topology.replicas]
        self._seconds = PLACEMENT_SECONDS if placement_seconds is None else placement_seconds
        self._started: list[list[_Stage | None]] = [[None] * len(stages) for stages in topology.replicas]
        self._suspects: dict[str, float] = {}
        count = max(map(max, self._cards)) + 1
        self._ours = _connect(address, count)
        try:
            self._owners = [node for node in self._await_cards(count) for _ in range(node.cards)]
        except BaseException:
            self.close()
            raise

    @property
    def card_hosts(self) -> Sequence[str]:
        """See `Cluster`."""
        return [node.host for node in self._owners]

    @property
    def own_address(self) -> str:
        """See `Cluster`."""
        return _own_address()

    def places(self, replica: int) -> Sequence[Place]:
        """See `Cluster`."""
        stages = self._started[replica]
        first = all(stage is None for stage in stages)
        self._forget_ended(stages)
        for index, stage in enumerate(stages):
            if stage is None:
                card = self._cards[replica][index]
                stages[index] = self._start(f"stage {index} of replica {replica}", card, first=first)
        return [stage.place for stage in stages if stage is not None]

    def host_of(self, replica: int, stage: int) -> str | None:
        """See `Cluster`."""
        there = self._started[replica][stage]
        return None if there is None else there.node.host

    def close(self) -> None:
        """Ends all stages, and Ray if it was started for them."""
        for stages in self._started:
            for index, stage in enumerate(stages):
                if stage is not None:
                    _end(stage)
                stages[index] = None
        if self._ours:
            ray.shutdown()

    def _await_cards(self, count: int) -> list[_Node]:
        deadline = time.monotonic() + self._seconds
        while True:
            nodes = _nodes()
            there = sum(node.cards for node in nodes)
            if there >= count:
                return nodes
            if time.monotonic() > deadline:
                found = ", ".join(f"{node.host} has {node.cards}" for node in nodes)
                raise TopologyError(
                    f"npu:{count - 1} is not there: the hosts have {there} cards ({found}); start Ray on more hosts "
                    f"with `ray start --address=... --resources='{{\"{RESOURCE}\": N}}'`, or name other devices"
                )
            tell("waiting for hosts", there, count)
            time.sleep(0.2)

    def _forget_ended(self, stages: list[_Stage | None]) -> None:
        """Takes the stages out that do not answer; those of hosts that are gone are not waited for."""
        there = {index: stage for index, stage in enumerate(stages) if stage is not None}
        gone = self._gone({stage.node for stage in there.values()})
        asked = {index: stage.actor.address.remote() for index, stage in there.items() if stage.node not in gone}
        references = list(asked.values())
        answered = ray.wait(references, num_returns=len(asked), timeout=_ANSWER_SECONDS)[0] if asked else []
        for index, stage in there.items():
            why = gone.get(stage.node)
            if why is None:
                why = _failure(asked[index]) if asked[index] in answered else "it does not answer"
            if why is not None:
                logger.warning("a stage on %s is started anew: %s", stage.node.host, why)
                _end(stage)
                stages[index] = None

    def _gone(self, nodes: Collection[_Node]) -> dict[_Node, str]:
        """Of these hosts those that Ray's own process does not answer on, and why; they are suspects from now on."""
        with ThreadPoolExecutor(max(1, len(nodes))) as pool:
            found = zip(nodes, pool.map(lambda node: unreachable(node.address, _CONNECT_SECONDS), nodes), strict=True)
            gone = {node: why for node, why in found if why is not None}
        until = time.monotonic() + _SUSPECT_SECONDS
        self._suspects.update({node.node_id: until for node in gone})
        return gone

    def _start(self, name: str, card: int, *, first: bool) -> _Stage:
        """Starts a stage on the host of its card, or on a spare one if that host is gone."""
        now = time.monotonic()
        self._suspects = {node_id: until for node_id, until in self._suspects.items() if until > now}
        alive = {node.node_id: node for node in _nodes()}
        home = self._owners[card]  # as the cluster was found
        if home.node_id in alive and home.node_id not in self._suspects:
            wanted = {_NODE_ID: home.node_id}
        else:
            wanted = {_NODE_ID: f"!in({','.join(self._suspects)})"} if self._suspects else {}
        group = placement_group([{RESOURCE: self._share}], bundle_label_selector=[wanted])
        if not group.wait(self._seconds if first else _SPARE_SECONDS):
            remove_placement_group(group)
            text = f"{name} has no host: {self._share:g} of a card is free on none"
            if first:
                raise StageError(f"{text}, after {self._seconds:g} s; end what uses them, or give other devices")
            raise NoHostError(f"{text} but those that are lost; start another host, or this one again")
        return self._start_in(group, name)

    def _start_in(self, group: PlacementGroup, name: str) -> _Stage:
        strategy = PlacementGroupSchedulingStrategy(group, 0)
        options = {"num_cpus": 0, "resources": {RESOURCE: self._share}, "scheduling_strategy": strategy}
        remote: Any = ray.remote(StageActor)
        actor = remote.options(**options).remote(self.token)
        try:
            address = str(ray.get(actor.address.remote(), timeout=self._seconds))
            node_id = ray.util.placement_group_table(group)["bundles_to_node_id"][0]
        except RayError as error:
            ray.kill(actor)
            remove_placement_group(group)
            raise StageError(f"{name} cannot be started: {type(error).__name__}: {error}") from error
        node = next((one for one in _nodes() if one.node_id == node_id), None)
        if node is None:
            remove_placement_group(group)
            raise NoHostError(f"{name} was started on a host that has ended since")
        place = Place(address=address, host=node.host)
        return _Stage(node=node, group=group, actor=actor, place=place)


def _connect(address: str | None, cards: int) -> bool:
    """Connects to Ray, unless this process is; whether to end that."""
    if ray.is_initialized():
        return False
    if address is not None and address != "auto":
        _check_address(address)
    quiet: dict[str, Any] = {"configure_logging": False, "log_to_driver": False, "logging_level": "error"}
    try:
        if address is not None:
            ray.init(address=address, **quiet)
            return True
        own: dict[str, Any] = {"include_dashboard": False, "object_store_memory": _STORE_NBYTES}
        ray.init(address="local", resources={RESOURCE: cards}, **own, **quiet)
    except (RayError, ConnectionError, ValueError, RuntimeError) as error:
        raise _no_ray(address, f"{type(error).__name__}: {error}") from error
    return True


def _check_address(address: str) -> None:
    """Raises StageError if nothing is there: Ray itself would try for minutes."""
    why = unreachable(split_address(address), _HEAD_SECONDS)
    if why is not None:
        raise _no_ray(address, why)


def _no_ray(address: str | None, why: str) -> StageError:
    return StageError(
        f"no Ray at {address or 'this machine'}: {why}; start one with `ray start --head`, and see docs/cluster.md for "
        f"its token"
    )


def _own_address() -> str:
    """The address that Ray has for this host."""
    return str(ray.util.get_node_ip_address())  # type: ignore[no-untyped-call]  # Ray has no type of it


def _nodes() -> list[_Node]:
    """The hosts that are alive, the head's first and then by address."""
    found = []
    for node in ray.nodes():  # type: ignore[no-untyped-call]  # nor of this
        if node["Alive"]:
            host = f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']})"
            cards = int(node["Resources"].get(RESOURCE, 0))
            order = ("node:__internal_head__" not in node["Resources"], _sort_key(node["NodeManagerAddress"]))
            address = (node["NodeManagerAddress"], node["NodeManagerPort"])
            known = _Node(node_id=node["NodeID"], host=host, cards=cards, address=address)
            found.append(((*order, known.node_id), known))
    return [node for _, node in sorted(found, key=lambda pair: pair[0])]


def _sort_key(address: str) -> tuple[tuple[int, str], ...]:
    """Addresses by their numbers."""
    return tuple((int(part), "") if part.isdigit() else (0, part) for part in address.replace(":", ".").split("."))


def _failure(reference: Any) -> str | None:
    """Why a call has failed; None if it has not."""
    try:
        ray.get(reference)
    except RayError as error:
        return f"{type(error).__name__}: {error}".partition("\n")[0]
    return None


def _end(stage: _Stage) -> None:
    """Ends a stage, if it has not ended, and gives its place back."""
    try:
        ray.kill(stage.actor)
        remove_placement_group(stage.group)
    except RayError as error:
        logger.warning("a stage on %s could not be ended: %s", stage.node.host, error)
