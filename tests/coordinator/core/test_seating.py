"""Slow machines get fewer lanes, idle ones help; noise moves nothing."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from coordinator.core.placement import share_by_speed
from coordinator.core.seating import Seating, seat
from shardlane.ids import Incarnation, PlanNumber, Version
from shardlane.partition import StageLayers
from tests.coordinator.cast import beat, fresh_run, join, small_config, summary
from tests.coordinator.core.lives import plan_of

W = [Incarnation(f"worker-{index:02d}") for index in range(8)]
ONE = (StageLayers(0, 4, 4),)


def seated(
    workers: list[Incarnation],
    seconds: dict[Incarnation, float] | None = None,
    *,
    previous: Seating | None = None,
    lanes: int = 8,
    replicas: int = 2,
    epoch: int = 1,
) -> Seating:
    return seat(
        workers,
        seconds or {},
        stages=ONE,
        num_replicas=replicas,
        num_lanes=lanes,
        previous=() if previous is None else previous.replicas,
        number=PlanNumber(1, epoch),
        begins_at=Version(0),
    )


def lanes_of(seating: Seating) -> dict[Incarnation, int]:
    return {each.workers[0]: sum(block.size for block in each.blocks) for each in seating.replicas if not each.is_shadow}


def shadows_of(seating: Seating) -> dict[Incarnation, int]:
    return {each.workers[0]: sum(block.size for block in each.blocks) for each in seating.replicas if each.is_shadow}


@given(st.lists(st.floats(0.1, 10.0), min_size=1, max_size=5), st.integers(1, 16))
def test_no_other_share_is_done_sooner(seconds: list[float], lanes: int) -> None:
    counts = share_by_speed(lanes, seconds)
    assert sum(counts) == lanes
    latest = max(count * each for count, each in zip(counts, seconds, strict=True))
    for giver in range(len(counts)):
        for taker in range(len(counts)):
            if counts[giver] and giver != taker:
                other = list(counts)
                other[giver] -= 1
                other[taker] += 1
                assert max(count * each for count, each in zip(other, seconds, strict=True)) >= latest


def test_a_machine_four_times_slower_gets_a_lane_of_eight() -> None:
    before = seated(W[:2])
    assert lanes_of(before) == {W[0]: 4, W[1]: 4}
    after = seated(W[:2], {W[0]: 1.0, W[1]: 4.0}, previous=before, epoch=2)
    assert lanes_of(after) == {W[0]: 7, W[1]: 1}
    assert seated(W[:2], {W[0]: 1.1, W[1]: 3.6}, previous=after, epoch=3) == after, "and that stays so"


def test_noise_moves_nothing() -> None:
    before = seated(W[:2])
    assert seated(W[:2], {W[0]: 1.0, W[1]: 1.4}, previous=before, epoch=2) == before
    assert seated(W[:2], {W[0]: 1.0}, previous=before, epoch=2) == before
    assert seated(W[:2], {}, previous=before, epoch=2) == before


def test_who_is_too_slow_for_a_lane_runs_those_of_others_as_well_and_is_measured_that_way() -> None:
    after = seated(W[:2], {W[0]: 1.0, W[1]: 9.0}, previous=seated(W[:2]), epoch=2)
    assert (lanes_of(after), shadows_of(after)) == ({W[0]: 8}, {W[1]: 8})
    assert seated(W[:2], {W[0]: 1.0, W[1]: 8.5}, previous=after, epoch=3) == after
    recovered = seated(W[:2], {W[0]: 1.0, W[1]: 1.0}, previous=after, epoch=4)
    assert (lanes_of(recovered), shadows_of(recovered)) == ({W[0]: 4, W[1]: 4}, {})


def test_an_idle_worker_runs_the_lane_of_one_that_lags_and_has_no_lane_to_give() -> None:
    before = seated(W[:3], lanes=2)
    assert shadows_of(before) == {}
    assert seated(W[:3], {W[0]: 1.0, W[1]: 1.8}, previous=before, lanes=2, epoch=2) == before
    slow = {W[0]: 1.0, W[1]: 2.7, W[2]: 0.0}
    after = seated(W[:3], slow, previous=before, lanes=2, epoch=2)
    assert (lanes_of(after), shadows_of(after)) == ({W[0]: 1, W[1]: 1}, {W[2]: 1})
    assert after.replicas[2].blocks == after.replicas[1].blocks
    assert after.replicas[:2] == before.replicas, "those who work go on untouched"
    assert seated(W[:3], {W[0]: 1.0, W[1]: 1.0}, previous=after, lanes=2, epoch=3).replicas == before.replicas


def test_a_newcomer_gets_its_share_whatever_was_before() -> None:
    before = seated(W[:2], lanes=4, replicas=4)
    assert lanes_of(seated(W[:4], previous=before, lanes=4, replicas=4, epoch=2)) == dict.fromkeys(W[:4], 1)


def test_a_run_looks_at_its_workers_from_time_to_time_and_moves_lanes_at_a_steps_border() -> None:
    run = fresh_run(small_config(cluster__stages=1, cluster__replicas=2, cluster__lease_seconds=60.0))
    join(run, "shard 1", "shard 2", "worker 1", "worker 2")
    for step in range(3):
        run.on_heartbeat(beat(run, "shard 1", summary(step)), float(step))
    for name, seconds in (("worker 1", 1.0), ("worker 2", 3.5)):
        run.on_heartbeat(replace(beat(run, name), lane_seconds=seconds), 3.0)
    number = plan_of(run).number
    run.on_tick(5.1)
    plan = plan_of(run)
    assert plan.number > number and plan.reason == "lanes move to faster workers"
    assert [sum(block.size for block in each.blocks) for each in plan.replicas] == [3, 1]
    assert all(each.begins_at > 3 for each in plan.replicas)
    run.on_tick(14.1)
    assert plan_of(run) is plan
