"""Where this stage stands, and what it does next (DESIGN.md, sections 4 and 6).

A worker takes up a plan by beginning again at the version it knows: shards answer `superseded` if that is past, and whatever it
computes twice is counted once. All stages of a replica do so for the same plan, so their transfers match. The first step under a
plan may have been open before it, so it goes lane by lane (invariant 2).

When a part of a block is counted already, its missing lanes run again. All stages must take part, and in one order, or two of
them would wait for each other: a stage asks upwards, and what the first stage tells downwards is the order.
"""

from __future__ import annotations

from enum import StrEnum
from typing import assert_never

from shardlane.cadence import validates_at
from shardlane.config import Config
from shardlane.ids import Incarnation, Lane, Version
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
    PeerAhead,
    PlanAdopted,
    Pull,
    Pulled,
    PullEnded,
    PushAgain,
    PushAllAgain,
    Ran,
    Reopen,
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
    PULLING = "pulling"  # `version` is on its way into the parameters
    VALIDATING = "validating"
    RUNNING = "running"  # computes the step from `version`
    WAITING = "waiting"  # all of the step is pushed; the next version is on its way into the parameters
    HELD = "held"  # has `version`, and may not begin another step
    DONE = "done"  # has the last version, or the run is over


class Stepper:
    """One worker's state machine. Call `handle` with every event, in the order they happen, and do what it returns."""

    def __init__(self, me: Incarnation, config: Config) -> None:
        self.plan: Plan | None = None
        self.version = Version(0)
        self.phase = Phase.SPARE
        self.attempt = 0
        self._me = me
        self._config = config
        self._stage = 0
        self._state: RunState = "training"
        self._lane_by_lane = True
        self._queue: list[Lane] = []  # lanes to run again once the present run is over
        self._told: set[Lane] = set()  # lanes of the open step that ran again, or will
        self._asked: set[Lane] = set()  # and those already asked for

    @property
    def replica(self) -> Replica | None:
        """The replica that this worker has a seat in."""
        seat = self.plan.seat(self._me) if self.plan else None
        return self.plan.replicas[seat[0]] if self.plan and seat else None

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
                return self._begin_step()
            case Ran():
                return self._next_run()
            case Superseded():
                return self._go_to(max(event.now, self.version)) if event.attempt == self.attempt else []
            case PeerAhead():
                return self._on_peer_ahead(event.version)
            case Answered():
                return self._on_answers(event)
            case PullEnded():
                return [PushAllAgain(event.shard)] if self._step_is_open else []
            case LaneAsked():
                return self._want(event.version, [event.lane])
            case LaneTold():
                return self._run_again(event.lane) if self._may_run_again(event.version, event.lane) else []
            case _:
                assert_never(event)

    @property
    def _step_is_open(self) -> bool:
        return self.phase in (Phase.RUNNING, Phase.WAITING)

    # ---- plans, states, versions ---------------------------------------------------------------------------------------

    def _adopt(self, plan: Plan) -> list[Effect]:
        old = self.plan
        if old is not None and plan.number <= old.number:
            return []
        if old is None or old.timeline.id != plan.timeline.id:
            self.version = plan.timeline.version
        self.plan = plan
        seat = plan.seat(self._me)
        if seat is None:
            self.phase = Phase.SPARE
            return [self._abandon(), Rest(plan)]
        self._stage = seat[1]
        self._lane_by_lane = True
        first, pull = self._go_to(self.version)
        return [first, Begin(plan, *seat), pull]

    def _change_state(self, state: RunState) -> list[Effect]:
        self._state = state
        if state in ("finished", "failed"):
            self.phase = Phase.DONE
            return [self._abandon(), Leave()]
        return self._begin_step() if self.phase is Phase.HELD else []

    def _abandon(self) -> Abandon:
        self.attempt += 1
        self._drop_reruns()
        return Abandon()

    def _drop_reruns(self) -> None:
        self._queue.clear()
        self._told.clear()
        self._asked.clear()

    def _go_to(self, version: Version) -> list[Effect]:
        """Drops what is under way, for `version`."""
        abandon = self._abandon()
        self.version, self.phase = version, Phase.PULLING
        return [abandon, Pull(self.attempt, version)]

    def _on_peer_ahead(self, version: Version) -> list[Effect]:
        """A neighbour is at a version that this stage neither has nor waits for: the others have closed its step."""
        if self.phase in (Phase.SPARE, Phase.DONE) or version <= self.version + (self.phase is Phase.WAITING):
            return []
        return self._go_to(version)

    def _on_pulled(self) -> list[Effect]:
        if self.phase is Phase.WAITING:
            self.version = Version(self.version + 1)
            self._lane_by_lane = False
            self._drop_reruns()
        indices = self._validation_indices()
        if not indices:
            return self._begin_step()
        self.phase = Phase.VALIDATING
        return [Validate(self.attempt, self.version, indices)]

    def _validation_indices(self) -> tuple[int, ...]:
        """Validation micro-batch e belongs to lane e mod L."""
        if self.replica is None or not validates_at(self.version, self._config):
            return ()
        lanes, count = self._lanes, self._config.validation.num_micro_batches
        return tuple(index for index in range(count) if lanes >> index % self._config.train.lanes & 1)

    @property
    def _lanes(self) -> int:
        """The mask of the replica's lanes."""
        return mask_of(each for block in self.replica.blocks for each in block.lanes) if self.replica else 0

    # ---- a step --------------------------------------------------------------------------------------------------------

    def _begin_step(self) -> list[Effect]:
        if self.version >= self._config.train.last_step:
            self.phase = Phase.DONE
            return []
        if self._state != "training":
            self.phase = Phase.HELD
            return []
        if self.replica is None:
            return []
        self.phase = Phase.RUNNING
        lanes = tuple(lane(each) for each in lanes_of(self._lanes))
        blocks = lanes if self._lane_by_lane else self.replica.blocks
        return [Ask(Version(self.version + 1)), Run(self.attempt, self.version, blocks)]

    def _next_run(self) -> list[Effect]:
        if not self._queue:
            self.phase = Phase.WAITING
            return [Pull(self.attempt, Version(self.version + 1))]
        again = self._queue.pop(0)
        # The first stage is the last to finish a run, so nobody still waits for a transfer that is void from now on.
        announce = self._announce(again) if self._stage == 0 else []
        return [*announce, Run(self.attempt, self.version, (lane(again),), again=True)]

    def _on_answers(self, answered: Answered) -> list[Effect]:
        if answered.version != self.version or not self._step_is_open:
            return []
        again = tuple(each.key for each in answered.refusals if each.outcome in ("not_yet", "not_owner"))
        missing: list[Lane] = []
        for refusal in answered.refusals:
            missing += [Lane(each) for block in refusal.missing for each in block.lanes if refusal.outcome == "overlaps"]
        effects: list[Effect] = [PushAgain(again)] if again else []
        return effects + self._want(answered.version, missing)

    # ---- lanes that run again ------------------------------------------------------------------------------------------

    def _may_run_again(self, version: Version, wanted: Lane) -> bool:
        mine = bool(self._lanes >> wanted & 1)
        return version == self.version and self._step_is_open and mine and wanted not in self._told

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
        return [Reopen(self.version, again), *([] if is_last else [TellBelow(self.version, again)])]
