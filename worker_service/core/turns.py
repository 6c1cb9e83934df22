"""Where a stage stands under ASP, and what it does next: turns of its replica's lanes.

A turn is computed as soon as the lane's turn before it is in the log, whatever other lanes do. The first stage decides in which
order: of the turns that have come the one furthest behind, and it never waits for one while there is another. So whatever was
begun by a worker that is gone, and is needed before anything else can be logged, is done again without waiting. The other stages
take the turns that they are sent. Who finds a turn closed goes on to another, and who waits for a neighbour there is woken when
the lane's next turn comes, for which it has asked. What is computed twice is the same, bit for bit, and counts once.
"""

from __future__ import annotations

from typing import assert_never

from shardlane.config import Config
from shardlane.ids import Incarnation, Lane, Version
from shardlane.lanes import lane
from shardlane.plan import Plan, Replica
from shardlane.turns import number_of, place_of
from worker_service.core.events import (
    Abandon,
    Answered,
    Ask,
    Await,
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
    Reroute,
    Rest,
    Run,
    RunState,
    StateChanged,
    Superseded,
    Validate,
    Validated,
)
from worker_service.core.stepper import Phase


class TurnStepper:
    """One worker's state machine. Call `handle` with every event, in the order they happen, and do what it returns."""

    def __init__(self, me: Incarnation, config: Config) -> None:
        self.plan: Plan | None = None
        self.phase = Phase.SPARE
        self.attempt = 0
        self._me = me
        self._config = config
        self._num_lanes = config.train.lanes
        self._replica: Replica | None = None
        self._is_first = False
        self._state: RunState = "training"
        self._logged: dict[Lane, int] = {}  # turns below are in the log, as far as is known here; of any lane, in this timeline
        self._due: dict[Lane, int] = {}  # turns below are in the log or done here, of each lane of the replica
        self._number = 0  # of the turn under way

    @property
    def replica(self) -> Replica | None:
        return self._replica

    @property
    def step(self) -> Version:
        """Which of its lane's turns is under way, or was the last."""
        return Version(place_of(self._number, self._num_lanes)[1])

    def handle(self, event: Event) -> list[Effect]:
        if self._state in ("finished", "failed"):
            return []
        match event:
            case PlanAdopted():
                return self._adopt(event.plan)
            case StateChanged():
                return self._change_state(event.state)
            case Pulled() | Validated() | Ran() | Superseded() | Offered() if event.attempt != self.attempt:
                return []
            case Offered():
                return self._pull(event.number)
            case Pulled():
                return self._on_pulled()
            case Validated():
                return self._run() if self._is_of_a_lane else self._next()
            case Ran():
                self._due[Lane(self._place)] = max(self.step + 1, self._due[Lane(self._place)])
                return self._next()
            case Superseded():
                return self._on_superseded(event.now)
            case Answered():
                again = tuple(each.key for each in event.refusals if each.outcome in ("not_yet", "not_owner"))
                return [PushAgain(again)] if again else []
            case PullEnded():
                return [] if self._replica is None else [PushAllAgain(event.shard)]
            case PeerAhead() | PeerReseated() | LaneAsked() | LaneTold():
                return []  # a seat is taken up at once, and a lane is never pushed together with others
            case _:
                assert_never(event)

    @property
    def _place(self) -> int:
        """The lane whose turn is under way, or the place behind the lanes."""
        return place_of(self._number, self._num_lanes)[0]

    @property
    def _is_of_a_lane(self) -> bool:
        return self._place < self._num_lanes

    # ---- plans and states ----------------------------------------------------------------------------------------------

    def _adopt(self, plan: Plan) -> list[Effect]:
        old = self.plan
        if old is not None and plan.number <= old.number:
            return []
        self.plan = plan
        if old is None or old.timeline.id != plan.timeline.id:
            self._logged = {Lane(index): 0 for index in range(self._num_lanes)}
            self._logged.update({Lane(index): clock for index, clock in enumerate(plan.timeline.clocks)})
            self._replica = None
        seat = plan.seat(self._me)
        if seat is None:
            self.phase, self._replica = Phase.SPARE, None
            return [self._abandon(), Rest(plan)]
        replica = plan.replicas[seat[0]]
        if self._replica is not None and self._replica.formed == replica.formed:
            return [Reroute(plan)]
        self._replica, self._is_first, self._number = replica, seat[1] == 0, 0
        self._due = {Lane(each): self._logged[Lane(each)] for block in replica.blocks for each in block.lanes}
        return [self._abandon(), Begin(plan, *seat), *self._next()]

    def _change_state(self, state: RunState) -> list[Effect]:
        before, self._state = self._state, state
        if state in ("finished", "failed"):
            self.phase = Phase.DONE
            return [self._abandon(), Leave()]
        if self._replica is None or state == before:
            return []
        if state == "finishing" and not self._is_of_a_lane:
            return []  # the stage before has heard of it sooner, and has sent the last version: it would not do so again
        if "finishing" in (state, before):
            return [self._abandon(), *self._next()]  # no turn will come any more; or they do again
        return self._next() if self.phase is Phase.HELD else []

    def _abandon(self) -> Abandon:
        self.attempt += 1
        return Abandon()

    # ---- turns ---------------------------------------------------------------------------------------------------------

    def _next(self) -> list[Effect]:
        is_finishing = self._state == "finishing"
        if not self._is_first:
            self.phase = Phase.WAITING
            return [Await(self.attempt, (), only_last=is_finishing)]
        if is_finishing:
            return self._pull(self._last_version())
        if self._state != "training":
            self.phase = Phase.HELD
            return []
        come = [each for each, turn in self._due.items() if turn == self._logged[each]]
        if come:
            return self._pull(min(self._number_of(each) for each in come))
        self.phase = Phase.WAITING
        return [Await(self.attempt, tuple(Version(self._number_of(each)) for each in self._due))]

    def _number_of(self, each: Lane) -> int:
        return number_of(each, self._due[each], self._num_lanes)

    def _last_version(self) -> int:
        """Shards say which it is by superseding any other; should one of them not have come to it yet, another one follows."""
        return number_of(self._num_lanes, 0 if self._is_of_a_lane else self.step + 1, self._num_lanes)

    def _pull(self, number: int) -> list[Effect]:
        self._number, self.phase = number, Phase.PULLING
        return [Pull(self.attempt, Version(number), Version(number), Version(number))]

    def _on_pulled(self) -> list[Effect]:
        """What comes next is asked for early: it shows that this turn is closed, or that there is a later version."""
        if self._is_of_a_lane:
            self._note(Lane(self._place), self.step)
        early = Ask(Version(self._number + self._num_lanes + 1))
        indices = self._validation_indices()
        if not indices:
            return [early, *(self._run() if self._is_of_a_lane else self._next())]
        self.phase = Phase.VALIDATING
        return [early, Validate(self.attempt, Version(self._number), indices)]

    def _validation_indices(self) -> tuple[int, ...]:
        """Validation micro-batch e belongs to lane e mod L, which validates by its own clock, but all the last version."""
        every, turn, lanes = self._config.validation.every_steps, self.step, list(self._due)
        if self._is_of_a_lane:
            if not every or not turn or turn % every or turn >= self._config.train.last_step:
                return ()
            lanes = [Lane(self._place)]
        return tuple(each for each in range(self._config.validation.num_micro_batches) if each % self._num_lanes in lanes)

    def _run(self) -> list[Effect]:
        self.phase = Phase.RUNNING
        return [Run(self.attempt, Version(self._number), (lane(self._place),))]

    def _on_superseded(self, now: Version) -> list[Effect]:
        place, turn = place_of(now, self._num_lanes)
        if place == self._num_lanes:
            return self._pull(now) if self._is_first else self._next()
        self._note(Lane(place), turn)
        return self._next()

    def _note(self, each: Lane, turn: int) -> None:
        """Turns below are in the log."""
        self._logged[each] = max(turn, self._logged[each])
        if each in self._due:
            self._due[each] = max(self._logged[each], self._due[each])
