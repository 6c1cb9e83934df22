"""Where this stage stands, and what it does next (DESIGN.md, sections 4 and 6).

A plan that leaves this worker's replica as it is changes nothing but where it pushes and pulls. Another one gives it another
seat, or none. Where somebody died, that is taken up at once, by beginning again at the version it knows: shards answer
`superseded` if that is past, and whatever is computed twice is counted once. The first step in the seat may have been open
before, so it goes lane by lane (invariant 2). Where nobody died, the new seat waits for the version from which it begins: until
that is published, all lanes of the step before it are needed in their old places; then none of them is.
All stages of a replica take up the same seat, and what they send one another names the plan that formed it.

When a part of a block is counted already, its missing lanes run again. All stages must take part, and in one order, or two of
them would wait for each other: a stage asks upwards, and what the first stage tells downwards is the order.

Under SSP step t is computed from version t - s, so up to s + 1 steps are open at a time; what is pushed of each is kept until it
is closed. Lanes are pushed one by one then, so that nothing has to run again for a part of a block.
"""

from __future__ import annotations

from enum import StrEnum
from typing import assert_never

from shardlane.cadence import validates_at
from shardlane.config import Config
from shardlane.ids import Incarnation, Lane, PlanNumber, Version
from shardlane.lanes import lane, lanes_of, mask_of
from shardlane.plan import Plan, Replica
from worker_service.core.events import (
    Abandon,
    Answered,
    Ask,
    AskAbove,
    Begin,
    Effect,
    Event,
    LaneAsked,
    LaneTold,
    Leave,
    Offered,
    PeerAhead,
    PeerReseated,
    PlanAdopted,
    Pull,
    Pulled,
    PullEnded,
    PushAgain,
    PushAllAgain,
    Ran,
    Reopen,
    Reroute,
    Rest,
    Run,
    RunState,
    StateChanged,
    Superseded,
    TellBelow,
    Validate,
    Validated,
)


class Phase(StrEnum):
    SPARE = "spare"  # no plan, or no seat in it
    PULLING = "pulling"  # the version that `step` reads is on its way into the parameters
    VALIDATING = "validating"
    RUNNING = "running"  # computes `step`
    WAITING = "waiting"  # all of `step` is pushed; the version that the next one reads is on its way into the parameters
    HELD = "held"  # may not begin `step`
    DONE = "done"  # has the last version, or the run is over


class Stepper:
    """One worker's state machine. Call `handle` with every event, in the order they happen, and do what it returns."""

    def __init__(self, me: Incarnation, config: Config) -> None:
        self.plan: Plan | None = None
        self.step = Version(0)  # numbered by the version before it
        self.phase = Phase.SPARE
        self.attempt = 0
        self._me = me
        self._config = config
        self._stage = 0
        self._replica: Replica | None = None  # that this worker is at work in
        self._published = Version(0)  # the newest that is known to be: steps below it are closed
        self._loaded = Version(0)  # that the parameters are of
        self._pulling: Version | None = None  # that is on its way into them, or was when that was abandoned
        self._reads = config.train.reads
        self._awaited: Plan | None = None  # its seat is taken up later
        self._peers_formed = PlanNumber(0, 0)  # the newest replica that a neighbour was heard from
        self._state: RunState = "training"
        self._lane_by_lane = True
        self._queue: list[Lane] = []  # lanes to run again once the present run is over
        self._told: set[Lane] = set()  # lanes of the open step that ran again, or will
        self._asked: set[Lane] = set()  # and those already asked for
        self._validates_in = Phase.PULLING  # the phase that goes on once the validation is over

    @property
    def replica(self) -> Replica | None:
        """The replica that this worker is at work in."""
        return self._replica

    def handle(self, event: Event) -> list[Effect]:
        if self._state in ("finished", "failed"):
            return []
        match event:
            case PlanAdopted():
                return self._adopt(event.plan)
            case StateChanged():
                return self._change_state(event.state)
            case Pulled() | Validated() | Ran() if event.attempt != self.attempt:
                return []
            case Pulled():
                return self._on_pulled()
            case Validated():
                return self._on_validated()
            case Ran():
                return self._on_ran(event.published)
            case Superseded():
                return self._on_superseded(event.now) if event.attempt == self.attempt else []
            case PeerAhead():
                return self._on_peer_ahead(event)
            case PeerReseated():
                return self._on_peer_reseated(event.formed)
            case Answered():
                return self._on_answers(event)
            case PullEnded():
                return [PushAllAgain(event.shard)] if self._has_pushed else []
            case LaneAsked():
                return self._want(event.version, [event.lane])
            case Offered():
                return []  # of ASP
            case LaneTold():
                return self._run_again(event.lane) if self._may_run_again(event.version, event.lane) else []
            case _:
                assert_never(event)

    @property
    def _step_is_open(self) -> bool:
        return self.phase in (Phase.RUNNING, Phase.WAITING)

    @property
    def _has_pushed(self) -> bool:
        """What may be needed still."""
        is_at_work = self.phase not in (Phase.SPARE, Phase.DONE)
        return self._step_is_open or (is_at_work and self._config.train.staleness > 0)

    # ---- plans, states, versions ---------------------------------------------------------------------------------------

    def _adopt(self, plan: Plan) -> list[Effect]:
        old = self.plan
        if old is not None and plan.number <= old.number:
            return []
        self.plan, self._awaited = plan, None
        if old is None or old.timeline.id != plan.timeline.id:
            self._published = plan.timeline.version
            return self._take_seat(plan)
        seat = plan.seat(self._me)
        replica = plan.replicas[seat[0]] if seat is not None else None
        if self._replica is None or self.phase is Phase.DONE:
            return self._take_seat(plan)
        if replica is not None and replica.formed == self._replica.formed:
            return [Reroute(plan)]
        if self._begins_at(plan) <= self._published or (replica is not None and replica.formed <= self._peers_formed):
            return self._take_seat(plan)
        self._awaited = plan
        return [Reroute(plan)]

    def _begins_at(self, plan: Plan) -> Version:
        """The version from which this worker is what `plan` says."""
        seat = plan.seat(self._me)
        return plan.settled_at if seat is None else plan.replicas[seat[0]].begins_at

    def _take_seat(self, plan: Plan, *, is_fresh: bool = False) -> list[Effect]:
        """`is_fresh`: nobody has begun the step from the version that is published."""
        self._awaited = None
        seat = plan.seat(self._me)
        if seat is None:
            self.phase, self._replica = Phase.SPARE, None
            return [self._abandon(), Rest(plan)]
        self._replica, self._stage = plan.replicas[seat[0]], seat[1]
        begins_at = self._replica.begins_at
        abandon, pull = self._go_to(max(self._published, begins_at))
        self._lane_by_lane = self._published > begins_at or (self._published == begins_at and not is_fresh)
        return [abandon, Begin(plan, *seat), pull]

    def _on_peer_reseated(self, formed: PlanNumber) -> list[Effect]:
        """A neighbour that heard of the plan sooner has begun: this stage must not stay behind, and does not wait any more."""
        self._peers_formed = max(formed, self._peers_formed)
        plan = self._awaited
        seat = plan.seat(self._me) if plan is not None else None
        if plan is None or seat is None or plan.replicas[seat[0]].formed > formed:
            return []
        return self._take_seat(plan)

    def _change_state(self, state: RunState) -> list[Effect]:
        self._state = state
        if state in ("finished", "failed"):
            self.phase = Phase.DONE
            return [self._abandon(), Leave()]
        if state == "training":
            return self._resume()
        if state == "finishing" and self._config.train.staleness and self._step_is_open:
            abandon, self.phase = self._abandon(), Phase.HELD  # the step is beyond the last version, which may be to be validated
            return [abandon, *self._begin_step()]
        return []

    def _resume(self) -> list[Effect]:
        if self.phase is Phase.VALIDATING and self._validates_in is Phase.HELD:
            return self._go_to(self.step)  # neighbours that are not held do not take part
        return self._begin_step() if self.phase is Phase.HELD else []

    def _abandon(self) -> Abandon:
        self.attempt += 1
        self._drop_reruns()
        return Abandon()

    def _drop_reruns(self) -> None:
        self._queue.clear()
        self._told.clear()
        self._asked.clear()

    def _go_to(self, step: Version) -> list[Effect]:
        """Drops what is under way, for `step`, which may be open already."""
        abandon, self._lane_by_lane = self._abandon(), True
        self.step, self.phase = step, Phase.PULLING
        version = self._reads(step)  # and the one before it, to look ahead
        return [abandon, self._pull(version - 1 if version and self._config.train.looks_ahead else version)]

    def _pull(self, version: int) -> Pull:
        self._pulling = Version(version)
        step = Version(self.step + (self.phase is Phase.WAITING))
        return Pull(self.attempt, self._pulling, step, max(self._published, self._pulling))

    def _on_superseded(self, now: Version) -> list[Effect]:
        self._published = max(now, self._published)
        return self._go_to(max(now, self.step))

    def _on_peer_ahead(self, ahead: PeerAhead) -> list[Effect]:
        """A neighbour knows a version that this stage neither has nor waits for: the others have closed its step."""
        if self._replica is None or ahead.formed != self._replica.formed or self.phase is Phase.DONE:
            return []  # what was true in another timeline may be undone in this one
        self._published = max(ahead.version, self._published)
        return self._go_to(ahead.version) if ahead.version > self.step + (self.phase is Phase.WAITING) else []

    def _on_pulled(self) -> list[Effect]:
        assert self._pulling is not None
        self._loaded, self._pulling = self._pulling, None
        self._published = max(self._loaded, self._published)
        if self._awaited is not None and self._begins_at(self._awaited) <= self._loaded:
            return self._take_seat(self._awaited, is_fresh=True)
        if self.phase is Phase.WAITING and self._loaded >= self._awaits:
            self._advance()
        indices = self._validation_indices()
        if not indices:
            return self._go_on()
        self._validates_in, self.phase = self.phase, Phase.VALIDATING
        return [Validate(self.attempt, self._loaded, indices)]

    def _on_validated(self) -> list[Effect]:
        self.phase = self._validates_in
        return self._go_on()

    def _go_on(self) -> list[Effect]:
        """`_loaded` is in the parameters, and validated if it is to be."""
        is_short = self.phase is Phase.PULLING and self._loaded < self._reads(self.step)
        return [self._pull(self._loaded + 1)] if self.phase is Phase.WAITING or is_short else self._begin_step()

    def _advance(self) -> None:
        self.step, self.phase = Version(self.step + 1), Phase.PULLING
        self._lane_by_lane = False
        self._drop_reruns()

    @property
    def _awaits(self) -> Version:
        """What must be in the parameters for the step after this one: what it reads; at the run's end every version there is; and
        before another seat is taken up, the version from which it begins: until then all is needed that was pushed in this one.
        """
        following = self.step + 1
        if self._awaited is not None and self._begins_at(self._awaited) <= following:
            return self._begins_at(self._awaited)
        return Version(following if following >= self._config.train.last_step else self._reads(following))

    def _validation_indices(self) -> tuple[int, ...]:
        """Validation micro-batch e belongs to lane e mod L."""
        if self.replica is None or self.replica.is_shadow or not validates_at(self._loaded, self._config):
            return ()
        lanes, count = self._lanes, self._config.validation.num_micro_batches
        return tuple(index for index in range(count) if lanes >> index % self._config.train.lanes & 1)

    @property
    def _lanes(self) -> int:
        """The mask of the replica's lanes."""
        return mask_of(each for block in self.replica.blocks for each in block.lanes) if self.replica else 0

    # ---- a step --------------------------------------------------------------------------------------------------------

    def _begin_step(self) -> list[Effect]:
        if self.step >= self._config.train.last_step:
            if self._loaded < self.step:
                return [self._pull(self._loaded + 1)]  # to validate it
            self.phase = Phase.DONE
            return []
        if self._state != "training":
            self.phase = Phase.HELD  # and validates what may be the last version
            is_more = self._loaded < self.step or (self._state == "finishing" and self._config.train.staleness > 0)
            return [self._pull(self._loaded + 1)] if is_more else []
        if self.replica is None:
            return []
        if self._pulling is not None or self._loaded != self._reads(self.step):
            return self._go_to(self.step)  # it was to be the last, and is not: a later version has been loaded
        self.phase = Phase.RUNNING
        lanes = tuple(lane(each) for each in lanes_of(self._lanes))
        # A shadow takes no block of another apart: what it has pushed of one would have to be left out by the other.
        blocks = lanes if self._lane_by_lane and not self.replica.is_shadow else self.replica.blocks
        early = [Ask(Version(self._loaded + 1))] if self._loaded < self._awaits else []
        return [*early, Run(self.attempt, self.step, blocks)]

    def _on_ran(self, published: Version) -> list[Effect]:
        if self._config.train.staleness and published > self.step + 1:
            return self._on_superseded(published)  # what the next step reads may still be here, and that step be closed, too
        return self._next_run()

    def _next_run(self) -> list[Effect]:
        if not self._queue:
            self.phase = Phase.WAITING
            if self._pulling is None and self._loaded >= self._awaits:
                self._advance()
            return self._go_on()
        again = self._queue.pop(0)
        # The first stage is the last to finish a run, so nobody still waits for a transfer that is void from now on.
        announce = self._announce(again) if self._stage == 0 else []
        return [*announce, Run(self.attempt, self.step, (lane(again),), again=True)]

    def _on_answers(self, answered: Answered) -> list[Effect]:
        again = tuple(each.key for each in answered.refusals if each.outcome in ("not_yet", "not_owner"))
        missing: list[Lane] = []
        for refusal in answered.refusals:
            if refusal.outcome == "overlaps" and refusal.key.step == int(self.step):
                missing += [Lane(each) for block in refusal.missing for each in block.lanes]
        effects: list[Effect] = [PushAgain(again)] if again else []
        return effects + self._want(self.step, missing)

    # ---- lanes that run again ------------------------------------------------------------------------------------------

    def _may_run_again(self, version: Version, wanted: Lane) -> bool:
        mine = bool(self._lanes >> wanted & 1)
        return version == self.step and self._step_is_open and mine and wanted not in self._told

    def _want(self, version: Version, wanted: list[Lane]) -> list[Effect]:
        """The first stage runs them again; another one asks the stage before, once."""
        effects: list[Effect] = []
        for each in sorted(set(wanted) - self._asked):
            if not self._may_run_again(version, each):
                continue
            if self._stage == 0:
                effects += self._run_again(each)
            else:
                self._asked.add(each)
                effects.append(AskAbove(version, each))
        return effects

    def _run_again(self, wanted: Lane) -> list[Effect]:
        """Were the next version half in the parameters, the step would be closed, and whatever is pushed now a duplicate."""
        self._told.add(wanted)
        self._queue.append(wanted)
        effects = self._announce(wanted) if self._stage else []
        if self.phase is Phase.WAITING:
            self.phase = Phase.RUNNING
            self.attempt += 1  # the wait for the next version begins again after the lanes
            effects += [Abandon(), *self._next_run()]
        return effects

    def _announce(self, again: Lane) -> list[Effect]:
        is_last = self.replica is None or self._stage + 1 == len(self.replica.workers)
        return [Reopen(self.step, again), *([] if is_last else [TellBelow(self.step, again)])]
