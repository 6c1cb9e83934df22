"""The coordinator around its core, as its shell and `session.py` build it, with a store and a disk that outlive it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple, assert_never

from coordinator.core.beginning import Beginning, Saved
from coordinator.core.events import (
    NO_CHECKPOINT,
    Announce,
    CheckpointFailed,
    CheckpointMark,
    CheckpointReport,
    CommitCheckpoint,
    Control,
    DropRows,
    Effect,
    ForgetMember,
    Heartbeat,
    KeepMember,
    Note,
    Refusal,
    Registration,
    RunState,
    TrainingRow,
    ValidationReport,
    ValidationRow,
)
from coordinator.core.progress import Checkpoints
from coordinator.core.run import Run
from shardlane.ids import ChunkId, Incarnation, RunId, Timeline, Version
from shardlane.plan import Plan
from tests.sim.network import Process, RefusedError
from tests.sim.sketch import History

if TYPE_CHECKING:
    from tests.sim.world import World

RUN = RunId("sim")
TICK_SECONDS = 0.25
_Report = CheckpointReport | ValidationReport


class Reply(NamedTuple):
    """To a heartbeat; with the newest plan, which members ask for beside it."""

    state: RunState
    acknowledged_steps: int
    requests: int
    may_leave: bool
    timeline: int
    plan: Plan | None


@dataclass(frozen=True)
class Manifest:
    """A complete checkpoint."""

    version: Version
    timeline: int
    histories: dict[ChunkId, History]
    clocks: tuple[int, ...] = ()

    @property
    def mark(self) -> CheckpointMark:
        return CheckpointMark(self.version, f"{self.timeline}:{self.version}", self.clocks)


@dataclass
class Disk:
    """Checkpoints: parts by version and file, and manifests by their digest."""

    parts: dict[tuple[int, str], dict[ChunkId, History]] = field(default_factory=dict)
    manifests: dict[str, Manifest] = field(default_factory=dict)
    newest: Manifest | None = None

    def commit(self, manifest: Manifest) -> None:
        self.manifests[manifest.mark.digest] = manifest
        if self.newest is None or manifest.version >= self.newest.version:
            self.newest = manifest


@dataclass
class Store:
    """What `coordinator.sqlite` and `metrics.jsonl` keep."""

    term: int = 0
    plan: Plan | None = None
    saved: Saved = field(default_factory=Saved)
    registrations: dict[Incarnation, Registration] = field(default_factory=dict)
    reports: dict[tuple[str, int, str], _Report] = field(default_factory=dict)
    rows_version: Version = NO_CHECKPOINT.version
    validations: dict[Version, float] = field(default_factory=dict)


class CoordinatorProcess(Process):
    """One life of the coordinator."""

    def __init__(self, world: World) -> None:
        world.store.term += 1
        super().__init__(f"coordinator-{world.store.term}")
        self.world, self.clock, self.store, self.disk = world, world.clock, world.store, world.disk
        self._saved = self.store.saved
        self._to_do: deque[Effect] = deque()
        self.effects_left: int | None = None  # it dies in the midst of what it does, after so many effects more
        self.run = Run(world.config, self._beginning(), now=self.clock.now)
        # The sketch's chunks, not those of the config's model.
        self.run.checkpoints = Checkpoints(len(world.layout.chunks))
        self.run._planner.__dict__["_sizes"] = world.layout.sizes

    def _beginning(self) -> Beginning:
        store = self.store
        checkpoint = NO_CHECKPOINT if self.disk.newest is None else self.disk.newest.mark
        timeline = (
            store.plan.timeline
            if store.plan is not None
            else Timeline(0, checkpoint.version, checkpoint.digest, checkpoint.clocks)
        )
        return Beginning(
            run_id=RUN,
            term=store.term,
            timeline=timeline,
            plan=store.plan,
            version=max(store.rows_version, timeline.version),
            checkpoint=checkpoint,
            validations=dict(store.validations),
            registrations=tuple(store.registrations.values()),
            saved=store.saved,
        )

    def start(self) -> None:
        self._perform(self.run.on_start(self.clock.now))
        for report in list(self.store.reports.values()):
            self._replay(report)
        self.clock.after(TICK_SECONDS, self, self._tick)

    def _replay(self, report: _Report) -> None:
        if isinstance(report, ValidationReport):
            self._perform(self.run.on_validation(report)[1])
        else:
            self._perform(self.run.on_checkpoint_part(report)[1])

    def _tick(self) -> None:
        self._perform(self.run.on_tick(self.clock.now))
        self.clock.after(TICK_SECONDS, self, self._tick)

    # ---- what members call ---------------------------------------------------------------------------------------------

    def register(self, registration: Registration) -> None:
        self._feed(self.run.on_register(registration, self.clock.now))

    def heartbeat(self, beat: Heartbeat) -> Reply:
        run = self.run
        self._feed(run.on_heartbeat(beat, self.clock.now))
        return Reply(
            run.state,
            max(self.store.rows_version, run.timeline.version),
            run.requests,
            beat.is_leaving and run.may_leave(beat.incarnation, self.clock.now),
            run.timeline.id,
            self.store.plan,
        )

    def report(self, report: _Report) -> None:
        run = self.run
        if isinstance(report, ValidationReport):
            self._feed(run.on_validation(report))
            if self.alive and not run.validations.is_done(report.version):
                self.store.reports["validation", report.version, str(report.index)] = report
            return
        self._feed(run.on_checkpoint_part(report))
        if self.alive and report.version > run.checkpoint.version and report.timeline == run.timeline.id:
            self.store.reports["checkpoint", report.version, report.file] = report

    def suspect(self, incarnation: Incarnation) -> None:
        """A stream of a process that is dead has broken, and nobody listens at its address."""
        self._perform(self.run.on_death(incarnation, "nobody listens", self.clock.now))

    def control(self, action: Control) -> None:
        self._perform(self.run.on_control(action))

    def _feed(self, answer: tuple[Refusal | None, list[Effect]]) -> None:
        refusal, effects = answer
        self._perform(effects)
        if refusal is not None:
            raise RefusedError(refusal.fault.name.lower().replace("_", " "))

    # ---- effects -------------------------------------------------------------------------------------------------------

    def _perform(self, effects: list[Effect]) -> None:
        for effect in effects:
            if self.effects_left is not None:
                if self.effects_left == 0:
                    self.world.kill(self)
                    return
                self.effects_left -= 1
            self._do(effect)
        if self.run.saved != self._saved:
            self.store.saved = self._saved = self.run.saved

    def _do(self, effect: Effect) -> None:
        store = self.store
        match effect:
            case Announce(plan):
                store.plan = plan
                self.world.on_announced(self, plan)
            case KeepMember(registration):
                store.registrations[registration.incarnation] = registration
            case ForgetMember(incarnation=incarnation):
                store.registrations.pop(incarnation, None)
            case TrainingRow(summary):
                store.rows_version = max(store.rows_version, Version(summary.step + 1))
                self.world.on_row(self, effect)
            case ValidationRow(version, loss):
                store.validations[version] = loss
                self._settle_reports(lambda kind, each: kind == "validation" and each == version)
            case DropRows(version):
                store.rows_version = version
                store.validations = {each: loss for each, loss in store.validations.items() if each <= version}
                self._settle_reports(lambda kind, each: each > version)
            case CommitCheckpoint():
                self.clock.after(0.02 + self.world.random.random() * 0.3, self, lambda: self._commit(effect))
            case CheckpointFailed():
                raise AssertionError(f"{effect}: nothing failed")
            case Note(text):
                self.world.say(f"  {self}: {text}")
            case _:
                assert_never(effect)

    def _settle_reports(self, is_settled: Callable[[str, int], bool]) -> None:
        for key in [key for key in self.store.reports if is_settled(key[0], key[1])]:
            del self.store.reports[key]

    def _commit(self, commit: CommitCheckpoint) -> None:
        histories: dict[ChunkId, History] = {}
        for part in commit.parts:
            for chunk, history in self.disk.parts[part.version, part.file].items():
                self.world.check_part(commit, chunk, history, histories.get(chunk))
                histories[chunk] = history
        manifest = Manifest(commit.version, commit.timeline, histories, commit.parts[0].clocks)
        self.disk.commit(manifest)
        self.world.num["checkpoints"] += 1
        self._perform(self.run.on_checkpoint_committed(manifest.mark))
        if self.alive:
            self._settle_reports(lambda kind, each: kind == "checkpoint" and each <= commit.version)
