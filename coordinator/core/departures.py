"""Members that want to go: who is still needed, and what happens when nobody is left to hand over to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from coordinator.core.planning import Present
from shardlane.ids import Incarnation
from shardlane.plan import Member, Plan

LAST_SECONDS = 2.0  # when all workers or all shards leave: how long somebody may still come


@dataclass(slots=True)
class Departures:
    """`is_suspending`: all shards leave, so the run stops with a checkpoint, until others come."""

    is_suspending: bool = False
    lonely_seconds: float | None = None  # since when all workers, or all shards, are leaving

    def note(self, present: Present, now: float) -> bool:
        """After a member has said that it leaves. Whether all shards do."""
        have_no_shard, have_no_worker = (all_leave(each, present.leaving) for each in (present.shards, present.workers))
        self.lonely_seconds = now if have_no_shard or have_no_worker else None
        return have_no_shard

    def may_leave(self, member: Incarnation, present: Present, plan: Plan, *, version: int, is_stuck: bool, now: float) -> bool:
        """Whether a leaving member is not needed any more. `is_stuck`: no step can be made, so nothing will change."""
        is_last = self.lonely_seconds is not None and now - self.lonely_seconds >= LAST_SECONDS
        if any(each.incarnation == member for each in present.workers):
            is_unseated = plan.seat(member) is None and version >= plan.settled_at
            return is_unseated or (is_last and not self.is_suspending) or is_stuck
        is_unused = not any(member in each.holders for each in plan.placements)
        return is_unused or (is_last and is_stuck)


def all_leave(members: Sequence[Member], leaving: frozenset[Incarnation]) -> bool:
    return bool(members) and all(member.incarnation in leaving for member in members)
