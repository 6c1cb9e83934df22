"""Whether the present plan still serves, and if not, the next one: pure functions of who is there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from functools import cached_property
from typing import NamedTuple

from coordinator.core.events import CheckpointMark
from coordinator.core.placement import (
    listed,
    place_chunks,
    surviving,
    trimmed,
    with_even_primaries,
    with_fair_shares,
    with_learners,
)
from coordinator.core.seating import Seating, seat
from shardlane.config import Config
from shardlane.ids import ChunkId, Incarnation, PlanNumber, RunId, Timeline, Version
from shardlane.partition import Layout, layer_costs, split_layers, stage_bytes
from shardlane.plan import Member, Placement, Plan

_GIB = 1 << 30


class Decision(Enum):
    KEEP = "keep"  # the plan serves
    WAIT = "wait"  # it does not, and there is nobody to make another of
    REPLAN = "replan"  # another plan in the same timeline
    BEGIN = "begin"  # another timeline, from the newest checkpoint


class Verdict(NamedTuple):
    decision: Decision
    reason: str  # WAIT: what is waited for


@dataclass(frozen=True)
class Present:
    """Who is there, each in order of registration.

    `caught_up`: learners of the present plan that hold all that their primaries do. `memory_bytes`: what a worker's stage may
    take, where that is known. `diverged`: copies that shards have dropped under the present plan.
    `lane_seconds`: what a worker computes for a lane, of late; 0 or nothing where it is not known.
    """

    shards: tuple[Member, ...]
    workers: tuple[Member, ...]
    leaving: frozenset[Incarnation] = frozenset()
    caught_up: Mapping[ChunkId, Incarnation] = field(default_factory=dict)
    memory_bytes: Mapping[Incarnation, int] = field(default_factory=dict)
    diverged: Mapping[Incarnation, frozenset[ChunkId]] = field(default_factory=dict)
    lane_seconds: Mapping[Incarnation, float] = field(default_factory=dict)

    @property
    def staying_shards(self) -> list[Incarnation]:
        """All of them if all leave: nobody is left to hand over to."""
        return _staying(self.shards, self.leaving)

    def staying_workers(self, plan: Plan | None) -> list[Incarnation]:
        """Those of `plan` if all leave: they work as long as they are here."""
        names = _staying(self.workers, self.leaving)
        if plan is None or not self.leaving.issuperset(names):
            return names
        return [name for name in names if plan.seat(name)] or names

    def __contains__(self, incarnation: Incarnation) -> bool:
        return any(member.incarnation == incarnation for member in (*self.shards, *self.workers))


def _staying(members: Sequence[Member], leaving: frozenset[Incarnation]) -> list[Incarnation]:
    names = [member.incarnation for member in members]
    return [name for name in names if name not in leaving] or names


@dataclass(frozen=True)
class Planner:
    """The arithmetic that a config fixes."""

    config: Config
    run_id: RunId

    @cached_property
    def _sizes(self) -> list[int]:
        return [chunk.num_bytes for chunk in Layout.of(self.config).chunks]

    # ---- judging -------------------------------------------------------------------------------------------------------

    def judge(self, plan: Plan | None, present: Present, *, version: Version, is_suspended: bool = False) -> Verdict:
        """A first plan waits for the whole cluster. Later ones make do with whom there is, and grow again when others come.

        `version`: steps that are known to be done. `is_suspended`: the shards of the plan make no further step.
        """
        cluster, shards, workers = self.config.cluster, present.staying_shards, present.staying_workers(plan)
        if plan is None:
            missing = _missing("shard", cluster.shards, len(shards))
            missing += _missing("worker", cluster.stages * cluster.replicas, len(workers))
            return Verdict(Decision.WAIT, " and ".join(missing)) if missing else Verdict(Decision.BEGIN, "everybody is here")
        is_lost = is_suspended or self._surviving(plan, present) is None
        missing = _missing("shard", cluster.shards, len(shards)) if is_lost else []
        missing += self._missing_workers(workers, present.memory_bytes)
        if missing:
            return Verdict(Decision.WAIT, " and ".join(missing))
        if is_suspended:
            return Verdict(Decision.BEGIN, "shards are here again")
        if is_lost:
            return Verdict(Decision.BEGIN, f"{', '.join(shard for shard in plan.shards if shard not in present)} is gone")
        seating = self.seat(present, plan, number=plan.number, begins_at=Version(0))
        placements = self.place(present, plan)
        reason = self._reason(plan, present, seating, placements, version)
        return Verdict(Decision.REPLAN, reason) if reason else Verdict(Decision.KEEP, "")

    def _reason(self, plan: Plan, present: Present, seating: Seating, placements: tuple[Placement, ...], version: Version) -> str:
        """Why the plan does not serve any more; empty: it does."""
        planned = Seating(plan.stages, plan.replicas)
        is_same_seating = seating.chains == planned.chains and seating.stages == planned.stages
        is_awaited = plan.settled_at > version  # some still work as they did before the plan, and must not be missing
        if is_same_seating and placements == plan.placements and not (is_awaited and _has_lost_worker(plan, present)):
            return ""
        used = {*plan.shards, *(worker for replica in plan.replicas for worker in replica.workers)}
        if gone := [each.incarnation for each in plan.members if each.incarnation in used and each.incarnation not in present]:
            return f"{', '.join(gone)} is gone"
        if going := [each for each in plan.addresses if each in present.leaving and each in used]:
            return f"{', '.join(going)} leaves"
        if len(seating.stages) != len(plan.stages):
            return f"there are workers for {len(seating.stages)} stages"
        if _lanes(seating).keys() - {each.workers for each in plan.replicas}:
            return f"there are workers for {len(_lanes(seating))} replicas"
        if present.diverged:
            return f"copies of {', '.join(present.diverged)} are wrong"
        learning = sum(each.learner is not None for each in placements)
        if learning:
            return f"{learning} chunks get another copy"
        if present.caught_up:
            return f"{len(present.caught_up)} new copies are complete"
        if seating.chains == planned.chains:
            return "a worker is gone before others have begun in its place"
        return "lanes move to faster workers" if _lanes(seating) != _lanes(planned) else "a replica's lag has changed"

    def _missing_workers(self, workers: Sequence[Incarnation], memory_bytes: Mapping[Incarnation, int]) -> list[str]:
        """What keeps `workers` from forming one replica: with fewer of them than stages, each takes more layers."""
        wanted = self.config.cluster.stages
        if not workers:
            return _missing("worker", wanted, 0)
        num_stages = min(wanted, len(workers))
        need = stage_bytes(self.config, num_stages, 1) if num_stages < wanted else 0
        room = min(memory_bytes.get(worker) or need for worker in workers)
        if room < need:
            (missing,) = _missing("worker", wanted, len(workers))
            return [f"{missing}; {num_stages} stages take {need / _GIB:.1f} GiB each, and a worker has {room / _GIB:.1f} GiB"]
        return []

    # ---- making --------------------------------------------------------------------------------------------------------

    def make(
        self,
        number: PlanNumber,
        timeline: Timeline,
        present: Present,
        *,
        previous: Plan | None,
        reason: str,
        begins_at: Version,
        version: Version,
    ) -> Plan:
        """The plan of `timeline`. In the timeline of `previous` chunks stay with their copies, and get those that they lack.

        `begins_at`: where those who are seated anew begin, unless somebody is missing until then. `version`: steps that are
        known to be done.
        """
        is_new = previous is None or previous.timeline != timeline
        if is_new or _has_lost_worker(previous, present):
            begins_at = Version(0)
        seating = self.seat(present, previous, number=number, begins_at=begins_at)
        if begins_at == 0 and previous is not None:  # nobody may wait for a version that those who are gone do not bring
            replicas = (
                replace(each, formed=number, begins_at=begins_at) if is_new or each.begins_at > version else each
                for each in seating.replicas
            )
            seating = Seating(seating.stages, tuple(replicas))
        placements = self._place_anew(present, previous) if previous is None or is_new else self.place(present, previous)
        holders = {shard for placement in placements for shard in placement.holders} | set(present.staying_shards)
        named = tuple(member for member in present.shards if member.incarnation in holders)
        return Plan(
            number=number,
            run_id=self.run_id,
            timeline=timeline,
            members=(*named, *present.workers),
            stages=seating.stages,
            replicas=seating.replicas,
            placements=placements,
            reason=reason,
        )

    def seat(self, present: Present, previous: Plan | None, *, number: PlanNumber, begins_at: Version) -> Seating:
        """As many whole replicas as there are workers for; fewer stages if there is not one."""
        config, cluster, workers = self.config, self.config.cluster, present.staying_workers(previous)
        num_stages = min(cluster.stages, len(workers))
        stages = tuple(split_layers(layer_costs(config.model, config.train.seq_len), num_stages))
        before = () if previous is None or previous.stages != stages else previous.replicas
        return seat(
            workers,
            {} if config.train.goes_by_turns else present.lane_seconds,  # nobody waits for a lane that lags
            stages=stages,
            num_replicas=config.num_replicas_max,
            num_lanes=config.train.lanes,
            previous=before,
            number=number,
            begins_at=begins_at,
        )

    def place(self, present: Present, previous: Plan) -> tuple[Placement, ...]:
        """Copies that are left, those that have caught up, and learners: for what is missing, else for fair shares.

        Learners are listed all at once, when the last of them has caught up or something else asks for a plan.
        """
        staying = present.staying_shards
        copies = self.config.cluster.num_copies(len(staying))
        kept = self._surviving(previous, present)
        if kept is None:
            raise ValueError("a chunk has no copy left in this timeline; a roll-back needs another one")
        learning = [ChunkId(chunk) for chunk, each in enumerate(kept) if each.learner is not None]
        if kept != previous.placements or all(chunk in present.caught_up for chunk in learning):
            kept = listed(kept, present.caught_up)
        whole = trimmed(kept, self._sizes, staying, replication=copies)
        if [each.in_sync for each in whole] != [each.in_sync for each in previous.placements]:
            whole = with_even_primaries(whole, self._sizes, staying)
        if any(each.learner is not None for each in whole) and whole == previous.placements:
            return whole  # one thing after another
        filled = with_learners(whole, self._sizes, staying, replication=copies)
        if any(each.learner is not None for each in filled):
            return filled
        return with_fair_shares(filled, self._sizes, staying)

    def _surviving(self, plan: Plan, present: Present) -> tuple[Placement, ...] | None:
        return surviving(plan.placements, [member.incarnation for member in present.shards], present.diverged)

    def _place_anew(self, present: Present, previous: Plan | None) -> tuple[Placement, ...]:
        staying = present.staying_shards
        before = () if previous is None else previous.placements
        copies = self.config.cluster.num_copies(len(staying))
        return place_chunks(self._sizes, staying, replication=copies, previous=before)

    def next_timeline(self, present: Timeline | None, checkpoint: CheckpointMark) -> Timeline:
        return Timeline(0 if present is None else present.id + 1, checkpoint.version, checkpoint.digest, checkpoint.clocks)


def _lanes(seating: Seating) -> dict[tuple[Incarnation, ...], object]:
    """Of each replica that is no shadow."""
    return {each.workers: each.blocks for each in seating.replicas if not each.is_shadow}


def _has_lost_worker(plan: Plan | None, present: Present) -> bool:
    """Whether a worker that the plan knew is gone: it may have been at work, if only as before that plan."""
    return plan is not None and any(each.role == "worker" and each.incarnation not in present for each in plan.members)


def _missing(role: str, wanted: int, found: int) -> list[str]:
    if found >= wanted:
        return []
    count = wanted - found
    return [f"{count} more {role}{'s' if count > 1 else ''} ({found} of {wanted} are here)"]
