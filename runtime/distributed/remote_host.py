"""Makes replicas of stages on other hosts; stands where a `Host` stands for stages in this process."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from furiosa_llm.runtime.artifact.reader import Artifact
from furiosa_llm.runtime.closing import Closing
from furiosa_llm.runtime.distributed.artifact_cache import ArtifactSource
from furiosa_llm.runtime.distributed.remote_runner import RemoteRunner
from furiosa_llm.runtime.distributed.wire import Opening, package_version
from furiosa_llm.runtime.placement.stages import Stage
from furiosa_llm.runtime.program.limits import load_seconds
from furiosa_llm.runtime.runners.batch import NO_COMPANIONS, Companions

_SLACK_SECONDS = 60.0
"""What a stage may take to load beside its sessions: reading the artifact and checking its digests."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a stage is: the address of its server, and its host's name."""

    address: str
    host: str


class Cluster(Protocol):
    """Hosts that have stages."""

    @property
    def token(self) -> str:
        """What lets a head in."""
        ...

    @property
    def own_address(self) -> str:
        """This host's, as the stages reach it."""
        ...

    @property
    def card_hosts(self) -> Sequence[str]:
        """The host of each card."""
        ...

    def places(self, replica: int) -> Sequence[Place]:
        """The stages of `replica`, of which those that have ended are started anew; raises NoHostError, StageError."""
        ...

    def host_of(self, replica: int, stage: int) -> str | None:
        """The name of the host that has a stage; None while none has."""
        ...

    def close(self) -> None:
        """Ends all stages."""
        ...


class RemoteHost(Closing):
    """Replicas of an artifact whose stages a `cluster` has; nothing of the weights is read here.

    The artifact is in the same folder on each host; or its stages copy what they read of it into the folder `cache` of
    their host.
    """

    def __init__(
        self,
        artifact: Artifact,
        stages: Sequence[Stage],
        cluster: Cluster,
        *,
        max_length: int,
        mapped: bool = False,
        separate: bool = False,
        verify: bool = False,
        cache: str | None = None,
        companions: Companions = NO_COMPANIONS,
        max_step_nbytes: int | None = None,
    ) -> None:
        self._artifact = artifact
        self._stages = tuple(stages)
        self._cluster = cluster
        self._max_length = max_length
        self._mapped = mapped
        self._separate = separate
        self._verify = verify
        self._companions = companions
        self._max_step_nbytes = max_step_nbytes
        self._heads: dict[int, int] = {}
        self._cache = cache
        own = f"tcp://{cluster.own_address}:0"
        self._source = None if cache is None else ArtifactSource(artifact, own, cluster.token)

    def runner(self, replica: int, *, slots_per_group: int) -> RemoteRunner:
        """Replica `replica`; raises what a stage raises that cannot load, NoHostError if there is no room for one."""
        places = self._cluster.places(replica)
        head = self._heads.setdefault(replica, secrets.randbits(62))
        openings = [
            Opening(
                head=head,
                folder=self._cache or str(self._artifact.folder.absolute()),
                source=None if self._source is None else self._source.address,
                digest=self._artifact.digest,
                version=package_version(),
                stages=self._stages,
                stage=stage,
                addresses=tuple(one.address for one in places),
                hosts=tuple(one.host for one in places),
                slots_per_group=slots_per_group,
                max_length=self._max_length,
                compute=self._artifact.compute,
                mapped=self._mapped,
                separate=self._separate,
                verify=self._verify,
                companions=self._companions,
                max_step_nbytes=self._max_step_nbytes,
            )
            for stage, place in enumerate(places)
        ]
        nodes = len(self._artifact.program.graph.node) * self._artifact.manifest.mesh.size
        return RemoteRunner(
            openings, self._cluster.token, load_seconds=load_seconds(self._artifact.manifest, nodes) + _SLACK_SECONDS
        )

    def host_of(self, replica: int, stage: int) -> str | None:
        """The name of the host that has a stage; None while none has."""
        return self._cluster.host_of(replica, stage)

    def close(self) -> None:
        """Ends all stages."""
        if self._source is not None:
            self._source.close()
        self._cluster.close()
