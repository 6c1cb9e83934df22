"""Whether the present plan still serves, and if not, the next one: pure functions of who is alive."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from types import MappingProxyType
from typing import NamedTuple

from coordinator.core.events import CheckpointMark
from coordinator.core.placement import (
    form_replicas,
    listed,
    place_chunks,
    seat_workers,
    surviving,
    with_even_primaries,
    with_learners,
)
from shardlane.config import Config
from shardlane.ids import ChunkId, Incarnation, PlanNumber, RunId, Timeline
from shardlane.partition import Layout, layer_costs, split_layers
from shardlane.plan import Member, Placement, Plan

NOBODY: Mapping[ChunkId, Incarnation] = MappingProxyType({})


class Decision(Enum):
    KEEP = "keep"  # the plan serves
    WAIT = "wait"  # it does not, and there is nobody to make another of
    REPLAN = "replan"  # another plan in the same timeline
    BEGIN = "begin"  # another timeline, from the newest checkpoint


class Verdict(NamedTuple):
    decision: Decision
    reason: str  # WAIT: what is waited for


@dataclass(frozen=True)
class Planner:
    """The arithmetic that a config fixes."""

    config: Config
    run_id: RunId

    @cached_property
    def _sizes(self) -> list[int]:
        return [chunk.num_bytes for chunk in Layout.of(self.config).chunks]

    def judge(
        self,
        plan: Plan | None,
        shards: Sequence[Member],
        workers: Sequence[Member],
        caught_up: Mapping[ChunkId, Incarnation] = NOBODY,
    ) -> Verdict:
        """A first plan waits for the whole cluster. Later ones make do with one replica, and grow again when workers come.

        `caught_up`: learners of the plan that hold all that their primaries do. They are listed all at once, since every plan
        begins the open step anew.
        """
        cluster = self.config.cluster
        if plan is None:
            wanted = cluster.stages * cluster.replicas
            missing = [*_missing("shard", cluster.shards, len(shards)), *_missing("worker", wanted, len(workers))]
            return Verdict(Decision.WAIT, " and ".join(missing)) if missing else Verdict(Decision.BEGIN, "everybody is here")
        alive = {member.incarnation for member in (*shards, *workers)}
        missing = _missing("worker", cluster.stages, len(workers)) if len(workers) < cluster.stages else []
        if surviving(plan.placements, [member.incarnation for member in shards]) is None:
            missing = [*_missing("shard", cluster.shards, len(shards)), *missing]
            lost = ", ".join(shard for shard in plan.shards if shard not in alive)
            return Verdict(Decision.WAIT, " and ".join(missing)) if missing else Verdict(Decision.BEGIN, f"{lost} is gone")
        gone = [shard for shard in plan.shards if shard not in alive]
        gone += [worker for replica in plan.replicas for worker in replica.workers if worker not in alive]
        wanted = min(cluster.replicas, len(workers) // cluster.stages)
        if missing:
            return Verdict(Decision.WAIT, " and ".join(missing))
        if gone:
            return Verdict(Decision.REPLAN, f"{', '.join(gone)} is gone")
        if wanted > len(plan.replicas):
            return Verdict(Decision.REPLAN, f"there are workers for {wanted} replicas")
        learning = {ChunkId(chunk): each.learner for chunk, each in enumerate(plan.placements) if each.learner is not None}
        if learning:
            done = all(caught_up.get(chunk) == learner for chunk, learner in learning.items())
            return Verdict(Decision.REPLAN, f"{len(learning)} new copies are complete") if done else Verdict(Decision.KEEP, "")
        fuller = self._with_learners(plan.placements, shards, plan)
        if fuller != plan.placements:
            missing_copies = sum(each.learner is not None for each in fuller)
            return Verdict(Decision.REPLAN, f"{missing_copies} chunks get another copy")
        return Verdict(Decision.KEEP, "")

    def make(
        self,
        number: PlanNumber,
        timeline: Timeline,
        shards: Sequence[Member],
        workers: Sequence[Member],
        *,
        previous: Plan | None,
        reason: str,
        caught_up: Mapping[ChunkId, Incarnation] = NOBODY,
    ) -> Plan:
        """The plan of `timeline`. In the timeline of `previous` chunks stay with their copies, and get those that they lack."""
        config, cluster = self.config, self.config.cluster
        rows = seat_workers(
            [member.incarnation for member in workers],
            stages=cluster.stages,
            replicas=cluster.replicas,
            previous=() if previous is None else [replica.workers for replica in previous.replicas],
        )
        placements = self._place(timeline, shards, previous, caught_up)
        holders = {shard for placement in placements for shard in placement.holders}
        chosen = _choose_shards(shards, cluster.shards, previous)
        named = tuple(member for member in shards if member.incarnation in holders | set(chosen))
        return Plan(
            number=number,
            run_id=self.run_id,
            timeline=timeline,
            members=(*named, *workers),
            stages=tuple(split_layers(layer_costs(config.model, config.train.seq_len), cluster.stages)),
            replicas=form_replicas(rows, config.train.lanes),
            placements=placements,
            reason=reason,
        )

    def _place(
        self, timeline: Timeline, shards: Sequence[Member], previous: Plan | None, caught_up: Mapping[ChunkId, Incarnation]
    ) -> tuple[Placement, ...]:
        before = () if previous is None else previous.placements
        if previous is not None and previous.timeline == timeline:
            kept = surviving(before, [member.incarnation for member in shards])
            if kept is None:
                raise ValueError("a chunk has no copy left in this timeline; a roll-back needs another one")
            kept = with_even_primaries(listed(kept, caught_up), self._sizes)
            return self._with_learners(kept, shards, previous)
        chosen = _choose_shards(shards, self.config.cluster.shards, previous)
        return place_chunks(self._sizes, chosen, replication=self.config.cluster.num_copies, previous=before)

    def _with_learners(
        self, placements: tuple[Placement, ...], shards: Sequence[Member], previous: Plan
    ) -> tuple[Placement, ...]:
        chosen = _choose_shards(shards, self.config.cluster.shards, previous)
        return with_learners(placements, self._sizes, chosen, replication=self.config.cluster.num_copies)

    def next_timeline(self, present: Timeline | None, checkpoint: CheckpointMark) -> Timeline:
        return Timeline(0 if present is None else present.id + 1, checkpoint.version, checkpoint.digest)


def _choose_shards(shards: Sequence[Member], num_shards: int, previous: Plan | None) -> list[Incarnation]:
    """Those that the plan had, then newcomers; in order of registration."""
    before = () if previous is None else previous.shards
    ranked = sorted(shards, key=lambda member: member.incarnation not in before)[:num_shards]
    return [member.incarnation for member in shards if member in ranked]


def _missing(role: str, wanted: int, found: int) -> list[str]:
    if found >= wanted:
        return []
    count = wanted - found
    return [f"{count} more {role}{'s' if count > 1 else ''} ({found} of {wanted} are here)"]
