"""Members that come and go by their own will: others take over, and nothing is computed twice."""

from __future__ import annotations

import pytest

from coordinator.core.departures import LAST_SECONDS
from coordinator.core.events import CheckpointMark, Control, RunState
from coordinator.core.run import Run
from shardlane.ids import ChunkId, Incarnation, PlanNumber, Timeline, Version
from shardlane.plan import REQUEST_STOP
from tests.coordinator.cast import beat, fresh_run, incarnation, join, small_config, summary
from tests.coordinator.core.lives import EVERYBODY, plan_of, train_to, training

SHARDS, WORKERS = ("shard 1", "shard 2"), ("worker 1", "worker 2")


def leave(run: Run, *names: str, now: float) -> None:
    for name in names:
        run.on_heartbeat(beat(run, name, is_leaving=True), now)


def may_leave(run: Run, name: str, now: float) -> bool:
    """After the member has adopted the newest plan."""
    run.on_heartbeat(beat(run, name, is_leaving=True), now)
    return run.may_leave(incarnation(name), now)


def catch_up(run: Run, now: float) -> dict[ChunkId, Incarnation]:
    """Every learner of the plan stands where its primary does. Who learnt what."""
    learners = {ChunkId(chunk): each.learner for chunk, each in enumerate(plan_of(run).placements) if each.learner is not None}
    for shard in plan_of(run).shards:
        mine = {chunk: each for chunk, each in learners.items() if plan_of(run).placements[chunk].primary == shard}
        told = beat(run, f"shard {int(shard[-2:])}")
        run.on_heartbeat(type(told)(told.incarnation, told.plan, told.version, caught_up=mine), now)
    return learners


def test_a_worker_that_leaves_is_needed_until_the_others_have_begun_without_it() -> None:
    run = training()
    join(run, "worker 3")
    train_to(run, 2, now=2.0)  # a step a second
    leave(run, "worker 1", now=2.1)
    plan = plan_of(run)
    assert plan.reason == "worker-01 leaves" and plan.seat(incarnation("worker 1")) is None
    assert plan.replicas[0].begins_at == plan.settled_at == 5, "nobody hears of a plan at once"
    for version in (3, 4):
        run.on_heartbeat(beat(run, "shard 1", summary(version - 1)), float(version))
        assert not may_leave(run, "worker 1", float(version))


def test_a_seat_is_left_at_once_where_no_step_is_under_way() -> None:
    run = training()
    join(run, "worker 3")
    run.on_control(Control.PAUSE)
    leave(run, "worker 1", now=1.0)
    assert plan_of(run).settled_at == 0 and may_leave(run, "worker 1", 1.1)


def test_a_death_while_others_leave_is_not_waited_for() -> None:
    run = training()
    join(run, "worker 3", "worker 4")
    train_to(run, 2, now=2.0)
    leave(run, "worker 1", now=2.1)
    assert plan_of(run).settled_at == 5
    run.on_death(incarnation("worker 2"), "nobody listens", 2.2)
    assert plan_of(run).settled_at == 0
    assert all(replica.formed == plan_of(run).number for replica in plan_of(run).replicas)


def test_a_spare_that_dies_before_others_have_begun_calls_them_to_the_open_step() -> None:
    """It may be one that still works in its old place."""
    run = training()
    join(run, "worker 3")
    train_to(run, 2, now=2.0)
    leave(run, "worker 1", now=2.1)
    run.on_death(incarnation("worker 1"), "nobody listens", 2.2)
    assert plan_of(run).settled_at == 0


def test_a_shard_that_leaves_hands_over_every_copy_first() -> None:
    run = training()
    join(run, "shard 3")
    while any(each.learner for each in plan_of(run).placements):
        catch_up(run, 1.0)
    leave(run, "shard 1", now=2.0)
    assert not may_leave(run, "shard 1", 2.1)
    assert all(each.learner is None or incarnation("shard 1") in each.in_sync for each in plan_of(run).placements)
    catch_up(run, 3.0)
    assert {shard for each in plan_of(run).placements for shard in each.holders} == {
        incarnation("shard 2"),
        incarnation("shard 3"),
    }
    assert all(len(each.in_sync) == 2 for each in plan_of(run).placements)
    assert may_leave(run, "shard 1", 3.1)
    assert plan_of(run).timeline.id == 0


@pytest.mark.parametrize("replication", [1, 2])
def test_a_shard_that_joins_is_filled_with_its_fair_share_and_no_more(replication: int) -> None:
    run = training(cluster__replication=replication, numerics__chunk_bytes=1024)
    sizes = run._planner._sizes
    held = lambda: {  # noqa: E731
        shard: sum(size for size, each in zip(sizes, plan_of(run).placements, strict=True) if shard in each.in_sync)
        for shard in plan_of(run).shards
    }
    join(run, "shard 3", now=1.0)
    moved = sum(sizes[chunk] for chunk in catch_up(run, 2.0))
    fair = replication * sum(sizes) / 3
    assert fair - max(sizes) <= moved <= fair
    assert held()[incarnation("shard 3")] == moved and sum(held().values()) == replication * sum(sizes)
    primaries = [sum(s for s, p in zip(sizes, plan_of(run).placements, strict=True) if p.primary == shard) for shard in held()]
    assert max(primaries) - min(primaries) <= 2 * max(sizes)
    number = plan_of(run).number
    catch_up(run, 3.0)
    assert plan_of(run).number == number, "and then there is rest"


def test_all_workers_may_go_when_nobody_else_has_come_for_a_while() -> None:
    run = training()
    train_to(run, 2)
    leave(run, *WORKERS, now=2.0)
    assert run.state is RunState.TRAINING and plan_of(run).replicas, "they work on as long as they are here"
    assert plan_of(run).number == PlanNumber(1, 2), "of the first there was somebody to take over"
    assert not may_leave(run, "worker 1", 2.1)
    assert may_leave(run, "worker 1", 2.0 + LAST_SECONDS)


def test_when_everybody_leaves_a_checkpoint_is_taken_and_the_run_goes_on_from_there_when_others_come() -> None:
    run = training()
    train_to(run, 2)
    leave(run, *WORKERS, *SHARDS, now=3.0)
    assert run.requests == REQUEST_STOP and run.saved.suspending
    assert not any(may_leave(run, name, 9.0) for name in ("worker 2", *SHARDS)), "and worker 1 has no seat any more"
    run.on_heartbeat(beat(run, "shard 1", summary(2, requests=REQUEST_STOP), is_leaving=True), 9.1)
    assert run.end_version == 3 and not may_leave(run, "shard 1", 9.2)
    run.on_checkpoint_committed(CheckpointMark(Version(3), "digest of 3"))
    assert all(may_leave(run, name, 9.3) for name in EVERYBODY) and not run.has_ended
    for name in EVERYBODY:
        run.on_death(incarnation(name), "nobody listens", 9.4)
    assert run.state is RunState.GATHERING

    for each in (run, _restarted(run)):
        join(each, "shard 3", "shard 4", "worker 3", "worker 4", now=20.0)
        assert (each.state, each.version, each.end_version) == (RunState.TRAINING, 3, 4)
        assert plan_of(each).timeline == Timeline(1, Version(3), "digest of 3")


def _restarted(run: Run) -> Run:
    mark = CheckpointMark(Version(3), "digest of 3")
    return fresh_run(small_config(), term=2, plan=run.plan, version=Version(3), checkpoint=mark, saved=run.saved)


def test_a_lone_shard_that_is_replaced_costs_no_step() -> None:
    run = training(cluster__shards=1)
    train_to(run, 2)
    leave(run, "shard 1", "shard 2", now=1.1)
    join(run, "shard 3", "shard 4", now=1.2)
    run.on_heartbeat(beat(run, "shard 1", summary(2, requests=REQUEST_STOP), is_leaving=True), 1.3)
    run.on_checkpoint_committed(CheckpointMark(Version(3), "digest of 3"))
    for name in WORKERS:
        run.on_heartbeat(beat(run, name), 1.3)
    run.on_tick(1.4)
    assert (run.state, run.version, plan_of(run).timeline.version) == (RunState.TRAINING, 3, 3)
    assert {each.primary for each in plan_of(run).placements} == {incarnation("shard 3"), incarnation("shard 4")}
