"""A run in the midst of its life, for the tests of the core."""

from __future__ import annotations

from coordinator.core.events import Heartbeat, RunState
from coordinator.core.run import Run
from shardlane.plan import Plan
from tests.coordinator.cast import beat, deeds, fresh_run, incarnation, join, small_config, summary

EVERYBODY = ("shard 1", "shard 2", "worker 1", "worker 2")


def training(**changes: object) -> Run:
    run = fresh_run(small_config(**changes))
    join(run, *EVERYBODY)
    assert run.state is RunState.TRAINING
    return run


def plan_of(run: Run) -> Plan:
    assert run.plan is not None
    return run.plan


def train_to(run: Run, version: int, now: float = 1.0) -> None:
    for state in run.members.states:  # everybody has heard of the plan
        if state.registration.role == "worker":
            run.on_heartbeat(Heartbeat(state.registration.incarnation, plan_of(run).number, run.version), now)
    run.on_heartbeat(beat(run, "shard 1", *(summary(step) for step in range(run.version, version))), now)
    assert run.version == version


def fall_silent(run: Run, name: str, now: float) -> list[object]:
    """Everybody but `name` keeps its lease."""
    for state in run.members.states:
        if state.registration.incarnation != incarnation(name):
            state.lease_end_seconds = now + 100.0
        else:
            state.lease_end_seconds = now - 0.1
    return list(deeds(run.on_tick(now)))
