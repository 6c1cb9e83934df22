"""A stage under ASP: the first one takes the turns that have come, the others those that they are sent."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from shardlane.ids import ChunkId, Incarnation, Lane, PlanNumber, SiteIndex, Timeline, Version
from shardlane.lanes import Block, lane
from shardlane.plan import Plan
from shardlane.turns import number_of
from tests.worker_service.core import test_stepper
from tests.worker_service.core.test_stepper import ABOVE, BELOW, ME, SHARD, config
from worker_service.core.events import (
    Abandon,
    Answered,
    Ask,
    Await,
    Begin,
    Effect,
    Event,
    Key,
    Leave,
    Offered,
    PlanAdopted,
    Pull,
    Pulled,
    PullEnded,
    PushAgain,
    PushAllAgain,
    Ran,
    Refusal,
    Reroute,
    Rest,
    Run,
    StateChanged,
    Superseded,
    Validate,
    Validated,
)
from worker_service.core.stepper import Phase
from worker_service.core.turns import TurnStepper

NUM_LANES = 4
FIRST, MIDDLE = (ME, BELOW, ABOVE), (ABOVE, ME, BELOW)  # the replica in which this worker is the first, or a middle, stage


def plan(epoch: int = 1, **changes: Any) -> Plan:
    """One replica, of all lanes."""
    made = test_stepper.plan(epoch, **changes)
    return replace(made, replicas=(replace(made.replicas[0], blocks=(Block(Lane(0), NUM_LANES),)),))


def turn(of_lane: int, number: int) -> Version:
    return Version(number_of(of_lane, number, NUM_LANES))


class Story:
    def __init__(self, chain: tuple[Incarnation, ...] = FIRST, first: Plan | None = None, **changes: object) -> None:
        fixed = {"train.consistency": "asp", "validation.num_micro_batches": 0}
        self.stepper = TurnStepper(ME, config(**{**fixed, **changes}))
        self.effects = self.tell(PlanAdopted(first or plan(workers=chain)))

    def tell(self, event: Event) -> list[Effect]:
        self.effects = self.stepper.handle(event)
        return self.effects

    def pulled(self) -> list[Effect]:
        return self.tell(Pulled(self.stepper.attempt))

    def ran(self) -> list[Effect]:
        return self.tell(Ran(self.stepper.attempt, Version(0)))

    def superseded(self, now: Version) -> list[Effect]:
        return self.tell(Superseded(self.stepper.attempt, now))

    def offered(self, number: Version) -> list[Effect]:
        return self.tell(Offered(self.stepper.attempt, number))

    @property
    def pulls(self) -> list[int]:
        return [effect.version for effect in self.effects if isinstance(effect, Pull)]

    def run_all(self) -> None:
        for _ in range(NUM_LANES):
            self.pulled()
            self.ran()


def test_the_first_stage_takes_every_lane_in_turn_and_asks_for_its_next_one_early() -> None:
    story = Story()
    for index in range(NUM_LANES):
        assert story.pulls == [turn(index, 0)]
        early, run = story.pulled()
        assert early == Ask(turn(index, 1)) and isinstance(run, Run) and run.blocks == (lane(index),)
        story.ran()
    assert story.effects == [Await(story.stepper.attempt, tuple(turn(index, 1) for index in range(NUM_LANES)))]
    assert story.offered(turn(2, 1)) == [Pull(story.stepper.attempt, *[turn(2, 1)] * 3)], "whichever is in the log first"


def test_of_the_turns_that_have_come_the_one_furthest_behind_is_taken() -> None:
    story = Story()
    assert story.superseded(turn(0, 7)) and story.pulls == [turn(1, 0)]
    assert story.superseded(turn(1, 3)) and story.pulls == [turn(2, 0)]
    story.superseded(turn(2, 5))
    story.superseded(turn(3, 4))
    assert story.pulls == [turn(1, 3)]


def test_no_turn_is_waited_for_while_another_may_be_computed() -> None:
    """Another worker began lane 3's turn and died: nothing else is logged before that is done again."""
    story = Story()
    story.pulled()
    assert story.ran() and story.pulls == [turn(1, 0)], "lane 0's next turn has not come"
    story.pulled()
    story.ran()
    story.pulled()
    story.ran()
    assert story.pulls == [turn(3, 0)]


def test_who_begins_anew_does_again_what_is_not_known_to_be_in_the_log() -> None:
    story = Story()
    story.run_all()
    effects = story.tell(PlanAdopted(plan(epoch=2, workers=FIRST)))
    assert [type(each) for each in effects] == [Abandon, Begin, Pull] and story.pulls == [turn(0, 0)]


def test_a_plan_that_leaves_the_replica_as_it_is_only_reroutes() -> None:
    story = Story()
    again = plan(epoch=2, workers=FIRST, formed=1)
    assert story.tell(PlanAdopted(again)) == [Reroute(again)]
    rest = plan(epoch=3, workers=(ABOVE, BELOW))
    assert story.tell(PlanAdopted(rest)) == [Abandon(), Rest(rest)] and story.stepper.phase is Phase.SPARE


def test_another_timeline_goes_on_from_the_clocks_of_its_checkpoint() -> None:
    story = Story()
    story.run_all()
    back = Timeline(1, Version(6), "d" * 64, clocks=(3, 1, 1, 1))
    story.tell(PlanAdopted(plan(epoch=2, workers=FIRST, timeline=back)))
    assert story.pulls == [turn(1, 1)]


def test_a_later_stage_takes_what_it_is_sent_and_passes_over_what_is_closed() -> None:
    story = Story(MIDDLE)
    assert story.effects[-1] == Await(story.stepper.attempt, ())
    story.offered(turn(3, 0))
    assert story.pulls == [turn(3, 0)]
    assert story.superseded(turn(3, 1)) == [Await(story.stepper.attempt, ())]
    story.offered(turn(1, 0))
    assert isinstance(story.pulled()[-1], Run)
    assert story.ran() == [Await(story.stepper.attempt, ())]
    assert story.tell(Offered(story.stepper.attempt - 1, turn(2, 0))) == [], "of work that was abandoned"


def test_a_lane_validates_by_its_own_clock_and_then_runs() -> None:
    story = Story(**{"validation.num_micro_batches": 6, "validation.every_steps": 2})
    story.superseded(turn(0, 2))
    for index in (1, 2, 3):
        story.superseded(turn(index, 9))
    assert story.pulls == [turn(0, 2)]
    early, validate = story.pulled()
    assert early == Ask(turn(0, 3)) and validate == Validate(story.stepper.attempt, turn(0, 2), (0, 4))
    assert isinstance(story.tell(Validated(story.stepper.attempt))[-1], Run)


def test_all_lanes_of_the_replica_validate_the_last_version_once_it_is_known() -> None:
    story = Story(**{"validation.num_micro_batches": 6})
    story.run_all()
    assert [type(each) for each in story.tell(StateChanged("finishing"))] == [Abandon, Pull]
    assert story.pulls == [turn(NUM_LANES, 0)]
    story.superseded(turn(NUM_LANES, 22))
    assert story.pulls == [turn(NUM_LANES, 22)]
    assert story.pulled()[-1] == Validate(story.stepper.attempt, turn(NUM_LANES, 22), tuple(range(6)))
    story.tell(Validated(story.stepper.attempt))
    assert story.pulls == [turn(NUM_LANES, 23)], "in case that was not the last one yet"
    assert story.tell(StateChanged("finished")) == [Abandon(), Leave()]


def test_a_later_stage_takes_nothing_but_the_last_version_once_no_turn_can_come() -> None:
    story = Story(MIDDLE)
    story.offered(turn(1, 0))
    story.pulled()
    assert story.tell(StateChanged("finishing")) == [Abandon(), Await(story.stepper.attempt, (), only_last=True)]


def test_a_later_stage_that_is_at_the_last_version_before_it_hears_that_there_is_one_stays_with_it() -> None:
    story = Story(MIDDLE, **{"validation.num_micro_batches": 6})
    story.offered(turn(NUM_LANES, 22))
    assert isinstance(story.pulled()[-1], Validate)
    assert story.tell(StateChanged("finishing")) == []
    assert story.tell(Validated(story.stepper.attempt)) == [Await(story.stepper.attempt, (), only_last=True)]


def test_a_run_that_is_held_begins_no_turn() -> None:
    story = Story()
    story.pulled()
    story.tell(StateChanged("paused"))
    assert story.ran() == [] and story.stepper.phase is Phase.HELD
    story.tell(StateChanged("training"))
    assert story.pulls == [turn(1, 0)]


def test_sums_are_sent_again_as_shards_ask_for_them() -> None:
    story = Story()
    key = Key(turn(0, 0), ChunkId(0), SiteIndex(0), Block(Lane(0), 1))
    assert story.tell(Answered((Refusal(key, "not_owner"), Refusal(key, "stale")))) == [PushAgain((key,))]
    assert story.tell(PullEnded(SHARD)) == [PushAllAgain(SHARD)]
    assert story.stepper.plan is not None and story.stepper.plan.number == PlanNumber(1, 1)
