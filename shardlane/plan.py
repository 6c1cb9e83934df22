"""The plan: what the coordinator decided for one membership epoch, as a value that every service's core can read."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Literal

from shardlane.ids import ChunkId, Incarnation, PlanNumber, RunId, Timeline, Version
from shardlane.lanes import Block
from shardlane.partition import StageLayers

Role = Literal["shard", "worker"]

REQUEST_CHECKPOINT = 1
REQUEST_STOP = 2
DONE = 4  # asked by nobody: under ASP only a decision tells which version is the run's last
"""Bits that ride in a chunk's record; a step's decision ORs them over all chunks, so that every shard acts at one version."""


@dataclass(frozen=True, slots=True)
class Member:
    incarnation: Incarnation
    role: Role
    address: str


@dataclass(frozen=True, slots=True)
class Replica:
    """A chain of workers, one a stage, and the lanes that it runs.

    `formed` is the plan since which these workers run these lanes of these stages. Where nobody died, they begin with the step
    from `begins_at`, and until then everybody goes on as before: nothing is computed twice.
    """

    workers: tuple[Incarnation, ...]
    blocks: tuple[Block, ...]
    formed: PlanNumber
    begins_at: Version
    is_shadow: bool = False  # its lanes are another replica's too, which lags; whoever is first counts


@dataclass(frozen=True, slots=True)
class Placement:
    """Who holds one chunk: `in_sync[0]` is its primary, the rest are backups; a learner is being filled."""

    in_sync: tuple[Incarnation, ...]
    learner: Incarnation | None = None

    @property
    def primary(self) -> Incarnation:
        return self.in_sync[0]

    @property
    def holders(self) -> tuple[Incarnation, ...]:
        return self.in_sync if self.learner is None else (*self.in_sync, self.learner)


@dataclass(frozen=True)
class Plan:
    """Whole, never a delta. `placements[c]` belongs to chunk c; `replicas` are ordered by their first lane."""

    number: PlanNumber
    run_id: RunId
    timeline: Timeline
    members: tuple[Member, ...]
    stages: tuple[StageLayers, ...]
    replicas: tuple[Replica, ...]
    placements: tuple[Placement, ...]
    reason: str = ""

    @cached_property
    def digest(self) -> str:
        """Hex SHA-256 of everything that the plan says."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()

    @cached_property
    def addresses(self) -> dict[Incarnation, str]:
        return {member.incarnation: member.address for member in self.members}

    @cached_property
    def shards(self) -> tuple[Incarnation, ...]:
        return tuple(member.incarnation for member in self.members if member.role == "shard")

    def names(self, incarnation: Incarnation) -> bool:
        return incarnation in self.addresses

    def seat(self, worker: Incarnation) -> tuple[int, int] | None:
        """(index of the replica, index of the stage) of a worker; None for a spare."""
        for index, replica in enumerate(self.replicas):
            if worker in replica.workers:
                return index, replica.workers.index(worker)
        return None

    @property
    def settled_at(self) -> Version:
        """Where the last of the replicas begins: who has no seat any more is needed until then."""
        return max((replica.begins_at for replica in self.replicas), default=Version(0))

    def by_primary(self, chunks: list[ChunkId]) -> dict[Incarnation, list[ChunkId]]:
        """`chunks` grouped by who serves them, in order."""
        grouped: dict[Incarnation, list[ChunkId]] = {}
        for chunk in chunks:
            grouped.setdefault(self.placements[chunk].primary, []).append(chunk)
        return grouped
