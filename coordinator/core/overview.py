"""Figures of a run for people and gauges: who holds how much, and how far workers are apart. Pure functions of the run."""

from __future__ import annotations

from dataclasses import dataclass

from coordinator.core.run import Run
from shardlane.plan import Plan


@dataclass(slots=True)
class Holding:
    """How many chunks a shard holds, by what it is to them."""

    primary: int = 0
    backup: int = 0
    learner: int = 0


def holdings(plan: Plan) -> list[Holding]:
    """Of each shard of the plan, in its order."""
    found = {shard: Holding() for shard in plan.shards}
    for placement in plan.placements:
        found[placement.primary].primary += 1
        for backup in placement.in_sync[1:]:
            found[backup].backup += 1
        if placement.learner is not None:
            found[placement.learner].learner += 1
    return list(found.values())


def under_replicated(run: Run) -> int:
    """Chunks with fewer copies in sync than they are to have."""
    if run.plan is None:
        return 0
    cluster = run.config.cluster
    copies = cluster.num_copies(cluster.shards)
    return sum(len(placement.in_sync) < copies for placement in run.plan.placements)


def clock_spread(run: Run) -> int:
    """Steps between the worker that is furthest on and the one that is least, of those with a seat."""
    seated = {worker for replica in run.plan.replicas for worker in replica.workers} if run.plan else set()
    steps = [state.version for state in run.members.states if state.registration.incarnation in seated]
    return max(steps) - min(steps) if steps else 0
