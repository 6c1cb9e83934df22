"""One fault after another, each on a cluster that is whole again after the one before."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from shardlane.chaos.injector import Injector, dump_stacks
from shardlane.chaos.outcome import STEPS_LOOKED_AT, Outcome, recovery
from shardlane.chaos.schedule import Event, Kind, Schedule, Shape
from shardlane.chaos.watch import Watch
from shardlane.cli.cluster import Cluster
from shardlane.pb.coordinator_pb2 import GetStatusResponse, Role, RunState

RECOVERY_SECONDS_MAX = 60.0  # a longer pause is no recovery
WHOLE_SECONDS_MAX = 120.0  # for everybody to be back, and every chunk to have its copies
COORDINATOR_HOLD_SECONDS = 4.0  # of a fault that nobody notices
HOLD_SECONDS = 0.5  # past its detection, before what can be undone is undone
HOLD_SECONDS_MAX = 20.0  # for one that is not detected

Clock = Callable[[], float]


@dataclass
class _Open:
    """The fault under way."""

    event: Event
    outcome: Outcome
    signalled: float
    version: int  # published when the signal went out
    epoch: int
    timeline: int
    undo: list[Callable[[], None]]
    recovered: float | None = None
    healed: float | None = None
    published: list[float] = field(default_factory=list)


class Drill:
    """An attendant of `Cluster.run`: ends the run when the schedule is through, or a fault was not recovered from."""

    def __init__(
        self, schedule: Schedule, watch: Watch, injector: Injector, *, seconds: float | None = None, clock: Clock = time.monotonic
    ) -> None:
        """`seconds`: for how long faults come, from when the cluster is whole first."""
        self.outcomes: list[Outcome] = []
        self.failure = ""  # why it ended early
        self._shape = schedule.shape
        self._events = schedule.events()
        self._num_events = schedule.num_events
        self._watch = watch
        self._injector = injector
        self._seconds = seconds
        self._clock = clock
        self._next: Event | None = None
        self._due: float | None = None  # None: the cluster has not been seen whole yet
        self._began: float | None = None
        self._waiting_since = clock()
        self._open: _Open | None = None

    def attend(self, cluster: Cluster) -> bool:
        """Whether the run is to be stopped now."""
        now, status = self._clock(), cluster.status
        if status is None or self.failure:
            return bool(self.failure)
        if status.state == RunState.RUN_STATE_FINISHED:
            self.failure = "the run was finished before its faults were; raise train.max_steps"
            return True
        if self._open is None:
            return self._between(cluster, status, now)
        self._during(self._open, cluster, status, now)
        return bool(self.failure)

    def leave(self) -> None:
        """Nothing stays stopped or cut off, so that all can end in order. A fault under way does not count."""
        if self._open is not None:
            self._heal(self._open)

    # ---- between faults ------------------------------------------------------------------------------------------------

    def _between(self, cluster: Cluster, status: GetStatusResponse, now: float) -> bool:
        if not self._is_whole(status) or not self._watch.versions.ordinary_seconds():
            if now - self._waiting_since > WHOLE_SECONDS_MAX:
                self._give_up(f"not whole after {WHOLE_SECONDS_MAX:g} s", cluster)
            return bool(self.failure)
        self._began = self._began or now
        if self._due is None:
            is_over = self._seconds is not None and now - self._began >= self._seconds
            self._next = None if is_over else next(self._events, None)
            if self._next is None:
                return True
            self._due = now + self._next.delay_seconds
        if self._next is not None and now >= self._due:
            self._begin(self._next, cluster, status)
        return False

    def _begin(self, event: Event, cluster: Cluster, status: GetStatusResponse) -> None:
        victims = [self._injector.victim(target, status, cluster) for target in event.targets]
        names = [name for name in victims if name is not None]
        if len(names) < len(victims):
            return  # somebody is still starting; the next turn will find them
        said = ", ".join(f"{target} ({name})" for target, name in zip(event.targets, names, strict=True))
        count = f"{len(self.outcomes) + 1}" + (f" of {self._num_events}" if self._num_events else "")
        step_seconds = self._watch.versions.ordinary_seconds()
        outcome = Outcome(event.group, event.kind, names, step_seconds, rolls_back=event.rolls_back)
        version, epoch = self._watch.versions.newest, self._watch.epochs.newest
        signalled = self._clock()
        undo = [self._injector.inflict(event.kind, name, cluster) for name in names]
        self._open = _Open(event, outcome, signalled, version, epoch, status.plan.timeline.id, undo)
        self._due = self._next = None
        cluster.note(f"fault {count}: {event.kind}, {said}")

    # ---- during a fault ------------------------------------------------------------------------------------------------

    def _during(self, fault: _Open, cluster: Cluster, status: GetStatusResponse, now: float) -> None:
        elapsed = now - fault.signalled
        self._look(fault, cluster, status, now)
        if fault.healed is None and elapsed >= self._hold_seconds(fault):
            self._heal(fault)
        if fault.recovered is None:
            if elapsed > RECOVERY_SECONDS_MAX:
                self._give_up(f"no recovery within {RECOVERY_SECONDS_MAX:g} s: {fault.event.group}", cluster)
            return
        is_news = fault.healed is not None and cluster.heard_seconds > max(fault.healed, fault.signalled)
        if is_news and self._is_whole(status):
            self._close(fault, cluster, now)
        elif elapsed > WHOLE_SECONDS_MAX:
            self._give_up(f"not whole {WHOLE_SECONDS_MAX:g} s after: {fault.event.group}", cluster)

    def _look(self, fault: _Open, cluster: Cluster, status: GetStatusResponse, now: float) -> None:
        """What there is to see of detection and recovery."""
        outcome, versions = fault.outcome, self._watch.versions
        if outcome.detection_seconds is None and (seen := self._watch.epochs.first(fault.epoch + 1)) is not None:
            outcome.detection_seconds = max(0.0, seen - fault.signalled)
        timeline = status.plan.timeline
        if status.HasField("plan") and timeline.id > fault.timeline:
            outcome.steps_rolled_back += max(0, fault.version - timeline.version)
            fault.timeline, fault.version = timeline.id, timeline.version
            fault.published = []
            outcome.notes.append(f"rolled back to version {timeline.version}")
        if fault.recovered is not None:
            return
        if outcome.steps_rolled_back:  # shards may show what they had until they have adopted the plan
            if status.version > fault.version:
                fault.recovered = now
                outcome.recovery_seconds = max(0.0, now - fault.signalled - outcome.step_seconds)
            return
        seen_at = [versions.first(fault.version + 1 + index) for index in range(STEPS_LOOKED_AT)]
        fault.published = [seconds for seconds in seen_at if seconds is not None]
        if len(fault.published) == STEPS_LOOKED_AT:
            fault.recovered = fault.published[-1]
            is_silent = fault.event.kind is not Kind.KILL and outcome.detection_seconds is not None
            detected = fault.signalled + (outcome.detection_seconds or 0.0) if is_silent else None
            outcome.recovery_seconds = recovery(
                fault.signalled, fault.published, step_seconds=outcome.step_seconds, detected=detected
            )

    def _heal(self, fault: _Open) -> None:
        if fault.healed is None:
            fault.healed = self._clock()
            for undo in fault.undo:
                undo()

    def _hold_seconds(self, fault: _Open) -> float:
        """After the signal, until a fault that can be undone is."""
        if fault.event.kind is Kind.KILL:
            return 0.0
        if fault.event.targets[0].role == "coordinator":
            return COORDINATOR_HOLD_SECONDS
        detected = fault.outcome.detection_seconds
        return HOLD_SECONDS_MAX if detected is None or fault.recovered is None else detected + HOLD_SECONDS

    def _close(self, fault: _Open, cluster: Cluster, now: float) -> None:
        outcome = fault.outcome
        outcome.whole_seconds = now - fault.signalled
        pause = self._watch.versions.longest_seconds(fault.recovered or now, now)
        outcome.later_pause_seconds = max(0.0, pause - outcome.step_seconds)
        if outcome.steps_rolled_back:
            self._watch.versions.forget()
        self.outcomes.append(outcome)
        self._open = None
        self._waiting_since = now
        seen = f", seen after {outcome.detection_seconds:.2f} s" if outcome.detection_seconds is not None else ""
        lost = f"; {outcome.steps_rolled_back} steps rolled back" if outcome.steps_rolled_back else ""
        cluster.note(f"  recovered in {outcome.recovery_seconds:.2f} s{seen}, whole after {outcome.whole_seconds:.1f} s{lost}")

    def _give_up(self, why: str, cluster: Cluster) -> None:
        self.failure = f"{why}; the logs show every process' stacks"
        dump_stacks(cluster)
        if self._open is not None:
            self._heal(self._open)
            self.outcomes.append(self._open.outcome)
            self._open = None

    def _is_whole(self, status: GetStatusResponse) -> bool:
        return is_whole(status, self._shape) and self._watch.under_replicated == 0


def is_whole(status: GetStatusResponse, shape: Shape) -> bool:
    """Whether everybody is seated, and the shards share the primaries: those that have all their copies do."""
    workers = sum(len(replica.workers) for replica in status.plan.replicas)
    shards = [member for member in status.plan.members if member.role == Role.ROLE_SHARD]
    is_shared = len(shards) == shape.shards and all(status.chunks_by_shard)
    return status.state == RunState.RUN_STATE_TRAINING and workers == shape.num_workers and is_shared
