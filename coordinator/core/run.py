"""The life of a run: gathering, training, finishing, and what to do about a death. Events in, effects out.

The shell feeds one event at a time, with `now` in seconds of any steady clock, and does the effects in order.
"""

from __future__ import annotations

from coordinator.core.beginning import Beginning, Saved
from coordinator.core.departures import Departures, all_leave
from coordinator.core.ending import Ending
from coordinator.core.events import (
    Announce,
    CheckpointFailed,
    CheckpointMark,
    CheckpointReport,
    CommitCheckpoint,
    Control,
    DropRows,
    Effect,
    Fault,
    ForgetMember,
    Heartbeat,
    KeepMember,
    Note,
    Refusal,
    Registration,
    RunState,
    ValidationReport,
    ValidationRow,
)
from coordinator.core.membership import Members
from coordinator.core.planning import Decision, Planner, Present
from coordinator.core.progress import Checkpoints, Steps, Validations
from shardlane.cadence import validates_at
from shardlane.config import Config
from shardlane.ids import ChunkId, Incarnation, PlanNumber, Version
from shardlane.partition import Layout
from shardlane.plan import REQUEST_CHECKPOINT, REQUEST_STOP

LOOK_SECONDS = 4.0  # between looks at how fast workers are
ADOPTION_SECONDS = 1.0  # that members have to hear of a plan which takes effect at a later version


class Run:
    """The coordinator's state machine."""

    def __init__(self, config: Config, beginning: Beginning, *, now: float) -> None:
        self.config = config
        self.run_id = beginning.run_id
        self.plan = beginning.plan
        self.timeline = beginning.timeline
        self.checkpoint = beginning.checkpoint
        self.waiting_for = ""  # for people: what is missing while gathering
        self.failure = ""
        self.steps = Steps(beginning.version, config.train.staleness)
        self.validations = Validations(config.validation.num_micro_batches)
        self.checkpoints = Checkpoints(len(Layout.of(config).chunks))
        self.members = Members(
            beginning.run_id,
            lease_seconds=config.cluster.lease_seconds,
            refuse_other_classes=config.numerics.determinism == "strict",
            classes=beginning.classes,
        )
        self.members.restore(beginning.registrations, now)
        for version, loss in beginning.validations.items():
            self.validations.mark_done(version, loss)
        self._term = beginning.term
        self._planner = Planner(config, beginning.run_id)
        self._paused = beginning.saved.paused
        self._ending = Ending(config.train, beginning.saved, beginning.checkpoint, beginning.version)
        self._departures = Departures(beginning.saved.suspending)
        self._finished = False
        self._looked_seconds = now
        self._caught_up: dict[ChunkId, Incarnation] = {}  # learners of the present plan
        self._diverged: dict[Incarnation, frozenset[ChunkId]] = {}  # copies dropped under it
        self._ready: list[CommitCheckpoint] = []  # all parts are in
        self._told: set[Incarnation] = set()  # members that know that the run has ended

    # ---- what a shell may ask ------------------------------------------------------------------------------------------

    @property
    def version(self) -> Version:
        """Steps done, as far as the coordinator knows."""
        return self.steps.version

    @property
    def end_version(self) -> Version:
        """The version at which this run ends, as far as is known."""
        return self._ending.expected(self.version)

    @property
    def requests(self) -> int:
        """REQUEST_* bits for the next record to close."""
        return self._ending.requests

    @property
    def state(self) -> RunState:
        if self.failure:
            return RunState.FAILED
        if self._finished:
            return RunState.FINISHED
        if self.plan is None or self.waiting_for:
            return RunState.GATHERING
        if self.version >= self.end_version:
            return RunState.FINISHING
        return RunState.PAUSED if self._paused else RunState.TRAINING

    @property
    def has_ended(self) -> bool:
        return self._finished or bool(self.failure)

    @property
    def saved(self) -> Saved:
        ending = self._ending
        facts = (ending.requests, ending.version, self._finished, ending.is_done, self._departures.is_suspending)
        return Saved(self._paused, *facts)

    @property
    def is_suspended(self) -> bool:
        """All shards leave, and what they held is in a checkpoint."""
        at = self._ending.version
        return self._departures.is_suspending and at is not None and min(self.version, self.checkpoint.version) >= at

    def may_leave(self, incarnation: Incarnation, now: float) -> bool:
        """Whether a member that is leaving is not needed any more."""
        if incarnation not in self.members.leaving:
            return False
        if self.has_ended or self.plan is None or self.is_suspended:
            return True
        return self.members.plan(incarnation) == self.plan.number and self._departures.may_leave(
            incarnation, self._present(), self.plan, version=self.version, is_stuck=bool(self.waiting_for), now=now
        )

    @property
    def num_expected(self) -> int:
        """Members of the whole cluster."""
        return self.config.cluster.shards + self.config.cluster.stages * self.config.cluster.replicas

    @property
    def everybody_knows(self) -> bool:
        """Whether the run has ended and the whole cluster has heard so."""
        here = {state.registration.incarnation for state in self.members.states}
        return self.has_ended and here <= self._told and len(self._told) >= self.num_expected

    # ---- events --------------------------------------------------------------------------------------------------------

    def on_start(self, now: float) -> list[Effect]:
        """The first event: a run may be done already, or lack members."""
        return self._settle() + self._reconsider(now)

    def on_register(self, registration: Registration, now: float) -> tuple[Refusal | None, list[Effect]]:
        answer = self.members.register(registration, now)
        if isinstance(answer, Refusal):
            return answer, [Note(f"refused: {answer.reason}", is_warning=True)]
        if not answer.is_new:
            return None, []
        effects: list[Effect] = [KeepMember(registration)]
        for dead in answer.succeeded:
            effects += [ForgetMember(dead, "replaced"), Note(f"{dead} is dead: {registration.incarnation} has its address")]
        effects.append(Note(f"{registration.incarnation} joined from {registration.address}"))
        if answer.warning:
            effects.append(Note(f"{answer.warning}; bits may differ from a run of one class", is_warning=True))
        return None, effects + self._reconsider(now)

    def on_heartbeat(self, beat: Heartbeat, now: float) -> tuple[Refusal | None, list[Effect]]:
        was_leaving = beat.incarnation in self.members.leaving
        member = self.members.heartbeat(beat, now)
        if isinstance(member, Refusal):
            return member, []
        effects: list[Effect] = []
        # Before the plan's own heartbeat a shard may still tell of another timeline. It tells again.
        if member.registration.role == "shard" and self.plan is not None and beat.plan >= self.plan.number:
            for row in self.steps.take(beat.steps, now):
                effects.append(row)
                self._ending.take_effect(row.summary.requests, Version(row.summary.step + 1))
        effects += [*self._commit_ready(), *self._settle()]
        has_news = self.plan is not None and beat.plan == self.plan.number and self._note_copies(beat)
        if member.is_leaving and not was_leaving:
            effects += [Note(f"{beat.incarnation} is leaving"), *self._note_leaving(now)]
        if has_news or member.is_leaving != was_leaving:
            effects += self._reconsider(now)
        if self.has_ended:
            self._told.add(beat.incarnation)
        return None, effects

    def on_validation(self, report: ValidationReport) -> tuple[Refusal | None, list[Effect]]:
        if (refusal := self._unknown(report.incarnation)) is not None:
            return refusal, []
        if not validates_at(report.version, self.config):
            return Refusal(Fault.MALFORMED, f"version {report.version} is not one that this run validates"), []
        if not 0 <= report.index < self.config.validation.num_micro_batches:
            most = self.config.validation.num_micro_batches - 1
            return Refusal(Fault.MALFORMED, f"validation micro-batch {report.index} is not within 0 … {most}"), []
        loss = self.validations.take(report)
        if loss is None:
            return None, []
        return None, [ValidationRow(report.version, loss), *self._settle()]

    def on_checkpoint_part(self, report: CheckpointReport) -> tuple[Refusal | None, list[Effect]]:
        if (refusal := self._unknown(report.incarnation)) is not None:
            return refusal, []
        if report.version <= self.checkpoint.version:
            return None, []  # told again: it is committed
        if report.timeline != self.timeline.id:
            return None, []  # 14. It is of steps that were made anew, or will be
        if report.error:
            return None, self.on_checkpoint_failed(report.version, f"{report.incarnation}: {report.error}")
        self._ending.answered(report.version)
        parts = self.checkpoints.take(report)
        if not parts:
            return None, []
        commit = CommitCheckpoint(
            run_id=self.run_id,
            version=report.version,
            optimizer_step=report.optimizer_step,
            timeline=self.timeline.id,
            numerics_class=self.members.numerics_class,
            parts=parts,
        )
        self._ready.append(commit)
        return None, self._commit_ready()

    def _commit_ready(self) -> list[Effect]:
        """A checkpoint is one only when the steps that lead to it are told: a resumed run would miss their rows."""
        ready = [each for each in self._ready if each.version <= self.version]
        self._ready = [each for each in self._ready if each.version > self.version]
        return list(ready)

    def on_checkpoint_committed(self, mark: CheckpointMark) -> list[Effect]:
        if mark.version > self.checkpoint.version:
            self.checkpoint = mark
            self.checkpoints.finish(mark.version)
        return [Note(f"checkpoint of version {mark.version} is complete"), *self._settle()]

    def on_checkpoint_failed(self, version: Version, reason: str) -> list[Effect]:
        """Training goes on; but a run cannot end without its last checkpoint."""
        self.checkpoints.give_up(version)
        if version == self.end_version:
            self.failure = f"the last checkpoint, of version {version}, was not taken: {reason}"
        return [CheckpointFailed(version, reason)]

    def on_control(self, action: Control) -> list[Effect]:
        if self.has_ended:
            return []
        match action:
            case Control.PAUSE:
                self._paused = True
            case Control.RESUME:
                self._paused = False
            case Control.CHECKPOINT:
                self._ending.ask(REQUEST_CHECKPOINT, self.version)
            case Control.STOP:
                self._ask_to_stop()
                self._departures.is_suspending = False
        return [Note(f"asked to {action.value}")]

    def on_death(self, incarnation: Incarnation, reason: str, now: float) -> list[Effect]:
        """Somebody has seen that a member is gone; its lease need not run out."""
        has_left = incarnation in self.members.leaving
        if self.has_ended or not self.members.drop(incarnation):
            return []
        said = Note(f"{incarnation} has left") if has_left else Note(f"{incarnation} is dead: {reason}", is_warning=True)
        return [ForgetMember(incarnation, "left" if has_left else "connection_refused"), said, *self._reconsider(now)]

    def on_tick(self, now: float) -> list[Effect]:
        """Time has passed."""
        effects: list[Effect] = []
        for incarnation, seconds in self.members.expire(now):
            said = f"{incarnation} was silent for {seconds:.1f} s"
            effects += [ForgetMember(incarnation, "silent"), Note(said, is_warning=not self.has_ended)]
        is_due = now - self._looked_seconds > LOOK_SECONDS and self.state is RunState.TRAINING
        return effects + (self._reconsider(now) if effects or is_due or self.is_suspended else [])

    # ---- decisions -----------------------------------------------------------------------------------------------------

    def _unknown(self, incarnation: Incarnation) -> Refusal | None:
        if incarnation in self.members:
            return None
        return Refusal(Fault.UNKNOWN_MEMBER, f"{incarnation[:64]} is no member: register again")

    def _note_copies(self, beat: Heartbeat) -> bool:
        """12. Whether a shard has told of learners that it was not known to wait for, or of copies that it has dropped."""
        assert self.plan is not None
        news = {
            chunk: learner
            for chunk, learner in beat.caught_up.items()
            if chunk < len(self.plan.placements)
            and self.plan.placements[chunk].primary == beat.incarnation
            and self.plan.placements[chunk].learner == learner
            and chunk not in self._caught_up
        }
        self._caught_up |= news
        self._diverged |= {beat.incarnation: beat.diverged} if beat.diverged else {}
        return bool(news or beat.diverged)

    def _ask_to_stop(self) -> None:
        """It takes effect with a step, so there must be one."""
        self._ending.ask(REQUEST_STOP, self.version)
        self._paused = False

    def _note_leaving(self, now: float) -> list[Effect]:
        """When all shards leave there is nobody to hand over to: the run stops with a checkpoint until others come."""
        is_stopping = self.has_ended or self._departures.is_suspending or self._ending.version is not None
        if not self._departures.note(self._present(), now) or self.plan is None or is_stopping:
            return []
        if not self.requests & REQUEST_STOP:
            self._departures.is_suspending = True
            self._ask_to_stop()
        return [Note("all shards are leaving: the run stops with a checkpoint until others come")]

    def _settle(self) -> list[Effect]:
        """Ends the run when its last version is published, checkpointed and, where that is due, validated."""
        end = self.end_version
        validated = self.validations.is_done(end) or not validates_at(end, self.config)
        is_whole = min(self.version, self.checkpoint.version) >= end and validated
        is_suspending = self._departures.is_suspending and not self._ending.is_last(end)
        if self.has_ended or not is_whole or is_suspending:
            return []
        self._finished = True
        return [Note(f"the run is finished at version {self.version}")]

    def _reconsider(self, now: float) -> list[Effect]:
        """Makes another plan where the present one does not serve."""
        if self.has_ended:
            return []
        self._looked_seconds = now
        present, is_gentle = self._present(), self._is_calm
        is_suspended = self.is_suspended and not all_leave(present.shards, present.leaving)
        decision, reason = self._planner.judge(self.plan, present, version=self.version, is_suspended=is_suspended)
        if decision is Decision.WAIT:
            changed, self.waiting_for = self.waiting_for != reason, reason
            return [Note(f"waiting for {reason}")] if changed else []
        self.waiting_for = ""
        if decision is Decision.KEEP:
            return []
        effects: list[Effect] = []
        if decision is Decision.BEGIN and self.plan is not None:
            self.timeline = self._planner.next_timeline(self.timeline, self.checkpoint)
            reason = f"{reason}: back to version {self.timeline.version}"
            effects += self._rewind()
        if decision is Decision.BEGIN:
            self.steps.start_clock(now)
        number = PlanNumber(self._term, 1 if self.plan is None else self.plan.number.epoch + 1)
        self.plan = self._planner.make(
            number,
            self.timeline,
            present,
            previous=self.plan,
            reason=reason,
            begins_at=self.steps.forecast(now, ADOPTION_SECONDS) if is_gentle else Version(0),
            version=self.version,
        )
        self._caught_up, self._diverged = {}, {}
        return [*effects, Announce(self.plan), Note(f"plan {number}: {reason}")]

    @property
    def _is_calm(self) -> bool:
        """Whether all workers are at work as the plan says. Only then may another one say "as before, until a later version":
        who has missed this plan, or is still to take it up, means something else by that, and a lane could be nobody's."""
        if self.plan is None or self.state is not RunState.TRAINING or self.plan.settled_at > self.version:
            return False
        if self.config.train.goes_by_turns:
            return False  # no version is anybody's turn before it has come
        seats = [(worker, replica.formed) for replica in self.plan.replicas for worker in replica.workers]
        return all(worker in self.members and self.members.plan(worker) >= formed for worker, formed in seats)

    def _present(self) -> Present:
        return Present(
            self.members.alive("shard"),
            self.members.alive("worker"),
            self.members.leaving,
            self._caught_up,
            {each.registration.incarnation: each.registration.memory_bytes for each in self.members.states},
            dict(self._diverged),
            {each.registration.incarnation: each.lane_seconds for each in self.members.states},
        )

    def _rewind(self) -> list[Effect]:
        """14. The steps since the checkpoint are lost, and said to be."""
        version, lost = self.timeline.version, self.version - self.timeline.version
        self.steps.rewind(version)
        self.validations.rewind(version)
        self.checkpoints.clear()
        self._ready.clear()
        self._ending.rewind(version, is_suspending=self._departures.is_suspending)
        self._departures.is_suspending = False
        if not lost:
            return []
        return [DropRows(version), Note(f"rolled back to version {version}: {lost} steps are lost", is_warning=True)]
