"""The faults of a seed: always the same ones, at their rates, at every place."""

from __future__ import annotations

import itertools
import statistics
from collections import Counter
from dataclasses import replace

import pytest

from shardlane.chaos.schedule import Event, Kind, Pair, Schedule, Shape, Target
from shardlane.errors import UserError

MEANS = {"worker": 10.0, "shard": 20.0, "coordinator": 40.0}
SCHEDULE = Schedule(Shape(stages=3, replicas=2, shards=2), MEANS, seed=7)


def first(count: int, schedule: Schedule = SCHEDULE) -> list[Event]:
    return list(itertools.islice(schedule.events(), count))


def test_a_seed_fixes_everything() -> None:
    assert first(200) == first(200)
    assert first(200) != first(200, replace(SCHEDULE, seed=8))


def test_roles_are_hit_at_their_rates_with_exponential_delays() -> None:
    events = first(20_000)
    roles = Counter(event.targets[0].role for event in events)
    assert [round(roles[role] / 20_000, 1) for role in MEANS] == [0.6, 0.3, 0.1]  # 4 : 2 : 1
    delays = [event.delay_seconds for event in events]
    mean = 1 / sum(1 / seconds for seconds in MEANS.values())
    assert statistics.mean(delays) == pytest.approx(mean, rel=0.03)
    assert statistics.pstdev(delays) == pytest.approx(mean, rel=0.05)


def test_every_place_is_hit() -> None:
    targets = Counter(event.targets[0] for event in first(5_000))
    expected = {Target("coordinator"), Target("shard", 0), Target("shard", 1)}
    expected |= {Target("worker", replica, stage) for replica in range(2) for stage in range(3)}
    assert targets.keys() == expected


def test_counted_faults_come_so_often_in_every_group() -> None:
    schedule = replace(SCHEDULE, kinds=(Kind.KILL, Kind.STOP), each=4)
    events = list(schedule.events())
    assert len(events) == schedule.num_events == 4 * 5 * 2
    assert Counter(event.group for event in events) == dict.fromkeys(schedule.groups, 4)
    assert set(schedule.groups) == {
        f"{who}, {kind}"
        for who in ("worker, first stage", "worker, middle stage", "worker, last stage", "shard", "coordinator")
        for kind in ("kill", "stop")
    }


def test_a_mean_of_0_spares_a_role() -> None:
    assert {e.targets[0].role for e in first(100, replace(SCHEDULE, mean_seconds={**MEANS, "shard": 0}))} == {
        "worker",
        "coordinator",
    }
    with pytest.raises(UserError, match="no fault would ever come"):
        replace(SCHEDULE, mean_seconds=dict.fromkeys(MEANS, 0.0))


def test_pairs_hit_two_at_once_and_nothing_else_happens() -> None:
    events = list(replace(SCHEDULE, pairs=tuple(Pair), each=20).events())
    by_pair = {pair: [event for event in events if event.group == pair] for pair in Pair}
    assert [len(found) for found in by_pair.values()] == [20, 20, 20]
    assert all([t.role for t in event.targets] == ["worker", "shard"] for event in by_pair[Pair.WORKER_SHARD])
    assert all([t.role for t in event.targets] == ["shard", "coordinator"] for event in by_pair[Pair.SHARD_COORDINATOR])
    assert all({t.index for t in event.targets} == {0, 1} and event.rolls_back for event in by_pair[Pair.SHARD_BACKUP])
    assert not any(event.rolls_back for event in by_pair[Pair.WORKER_SHARD])


def test_where_there_is_one_copy_a_shards_death_rolls_back() -> None:
    alone = replace(SCHEDULE, shape=Shape(1, 2, 1, copies=1))
    assert {(event.targets[0].role, event.rolls_back) for event in first(200, alone)} == {
        ("worker", False),
        ("shard", True),
        ("coordinator", False),
    }
    with pytest.raises(UserError, match="needs a backup"):
        replace(alone, pairs=(Pair.SHARD_BACKUP,))


def test_places_have_names() -> None:
    assert [Shape(4, 1, 1).place(stage) for stage in range(4)] == ["first stage", "middle stage", "middle stage", "last stage"]
    assert [Shape(2, 1, 1).place(stage) for stage in range(2)] == ["first stage", "last stage"]
    assert Shape(1, 1, 1).place(0) == "only stage"
