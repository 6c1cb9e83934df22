"""The drill over a cluster of values: when it strikes, what it takes for recovery, when it gives up. The clock is the test's."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from shardlane.chaos import drill as drill_module
from shardlane.chaos.drill import Drill
from shardlane.chaos.schedule import Kind, Schedule, Shape, Target
from shardlane.chaos.watch import Track, parse_gauges
from shardlane.pb import coordinator_pb2

SHAPE = Shape(stages=1, replicas=2, shards=2)


def whole(**changes: Any) -> coordinator_pb2.GetStatusResponse:
    status = coordinator_pb2.GetStatusResponse(state=coordinator_pb2.RUN_STATE_TRAINING, chunks_by_shard=[3, 3])
    for role, count in ((coordinator_pb2.ROLE_SHARD, 2), (coordinator_pb2.ROLE_WORKER, 2)):
        for _ in range(count):
            status.plan.members.add(role=role)
    for index in range(2):
        status.plan.replicas.add(workers=[2 + index])
    status.plan.timeline.id = 0
    for name, value in changes.items():
        setattr(status, name, value)
    return status


class World:
    """A cluster that does what the test says, on the test's clock."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, kind: Kind = Kind.KILL, role: str = "shard", **options: Any) -> None:
        monkeypatch.setattr(drill_module, "dump_stacks", lambda cluster: self.lines.append("stacks"))
        self.now, self.lines, self.done, self.undone = 100.0, [], [], []
        self.watch: Any = SimpleNamespace(versions=Track(), epochs=Track(), under_replicated=0)
        self.status = whole()
        self.heard_seconds = 0.0
        schedule = Schedule(SHAPE, {role: 1.0}, seed=1, kinds=(kind,), each=2)
        self.drill = Drill(schedule, self.watch, self, clock=lambda: self.now, **options)  # type: ignore[arg-type]
        self.watch.epochs.take(self.now, 1)
        for version in range(10):
            self.publish(version)
            self.now += 0.1

    # as a cluster
    def note(self, text: str) -> None:
        self.lines.append(text)

    # as an injector
    def victim(self, target: Target, status: Any, cluster: Any) -> str:
        return f"{target.role}-{target.index}"

    def inflict(self, kind: Kind, name: str, cluster: Any) -> Callable[[], None]:
        self.done.append((round(self.now, 2), name))
        return lambda: self.undone.append(self.now)

    def publish(self, version: int) -> None:
        self.watch.versions.take(self.now, version)

    def turn(self, seconds: float = 0.1) -> bool:
        self.now += seconds
        self.heard_seconds = self.now
        return self.drill.attend(self)  # type: ignore[arg-type]

    def until_struck(self, count: int = 1) -> None:
        for _ in range(1000):
            if len(self.done) == count:
                return
            assert not self.turn()
        pytest.fail("it never struck")


def test_it_waits_for_a_whole_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(monkeypatch)
    world.watch.under_replicated = 1
    assert not any(world.turn() for _ in range(300)) and not world.done
    world.watch.under_replicated = 0
    world.until_struck()


def test_a_kill_is_recovered_from_by_versions_that_come_on(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(monkeypatch)
    world.until_struck()
    struck = world.now
    world.status = whole(state=coordinator_pb2.RUN_STATE_GATHERING)
    world.turn(0.05)
    world.publish(10)  # the open step ends without its victim
    world.turn(0.25)
    world.watch.epochs.take(world.now, 2)
    world.turn(0.75)
    world.publish(11)
    world.turn()
    world.publish(12)
    world.turn()
    assert not world.drill.outcomes  # recovered, and not whole
    world.status = whole()
    world.turn()
    (outcome,) = world.drill.outcomes
    assert outcome.detection_seconds == pytest.approx(0.3) and outcome.recovery_seconds == pytest.approx(0.9)
    assert outcome.whole_seconds == pytest.approx(world.now - struck) and outcome.steps_rolled_back == 0
    world.until_struck(2)


def recover(world: World, first: int) -> None:
    for version in range(first, first + 3):
        world.turn()
        world.publish(version)
    world.turn()


def test_what_hangs_is_let_go_once_it_was_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(monkeypatch, kind=Kind.STOP)
    world.until_struck()
    for _ in range(30):
        world.turn()
    assert not world.undone
    world.watch.epochs.take(world.now, 2)
    recover(world, 10)
    for _ in range(10):
        world.turn()
    assert len(world.undone) == 1
    (outcome,) = world.drill.outcomes
    assert outcome.detection_seconds == pytest.approx(3.0, abs=0.11) and outcome.recovery_seconds == pytest.approx(0.0, abs=0.11)


def test_a_roll_back_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(monkeypatch)
    world.until_struck()
    world.status = whole(version=5)
    world.status.plan.timeline.id, world.status.plan.timeline.version = 1, 4
    world.turn()
    assert world.drill.outcomes == [] or world.drill.outcomes[0].steps_rolled_back == 5
    world.turn()
    (outcome,) = world.drill.outcomes
    assert outcome.steps_rolled_back == 5 and not outcome.rolls_back


def test_no_recovery_ends_the_run_and_shows_stacks(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(monkeypatch, kind=Kind.STOP)
    world.until_struck()
    ended = [world.turn(1.0) for _ in range(62)]
    assert ended[-1] and "no recovery within 60 s" in world.drill.failure
    assert "stacks" in world.lines and world.undone  # nothing stays stopped
    assert not world.drill.outcomes[0].is_complete


def test_it_ends_after_its_faults_or_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(monkeypatch)
    for count in (1, 2):
        world.until_struck(count)
        recover(world, 7 + 3 * count)
    assert world.turn() and not world.drill.failure and len(world.drill.outcomes) == 2
    assert World(monkeypatch, seconds=0.0).turn()


def test_leaving_lets_go_of_what_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(monkeypatch, kind=Kind.STOP)
    world.until_struck()
    world.drill.leave()
    world.drill.leave()
    assert len(world.undone) == 1


def test_tracks_only_rise() -> None:
    track = Track()
    for seconds, value in ((1.0, 3), (2.0, 2), (3.0, 4), (5.0, 6)):
        track.take(seconds, value)
    assert list(track.sightings) == [(1.0, 3), (3.0, 4), (5.0, 6)]
    assert track.first(5) == 5.0 and track.first(7) is None and track.newest == 6
    assert track.ordinary_seconds() == 1.5  # 2 s a step, then 1
    assert track.longest_seconds(1.0, 6.0) == 2.0


def test_gauges_are_read_from_a_page() -> None:
    page = "# HELP a x\n# TYPE a gauge\na 3.0\n# TYPE b gauge\nb 1e3\n"
    assert parse_gauges(page) == {"a": 3.0, "b": 1000.0}
