"""Stories of one stage, with exact effects; and chains of stages that run lanes again, from a seed."""

from __future__ import annotations

import random
from collections import deque

import pytest

from shardlane.config import Config, build
from shardlane.ids import ChunkId, Incarnation, Lane, PlanNumber, RunId, SiteIndex, Timeline, Version
from shardlane.lanes import Block, lane
from shardlane.partition import StageLayers
from shardlane.plan import Member, Placement, Plan, Replica
from worker_service.core.events import (
    Abandon,
    Answered,
    Ask,
    AskAbove,
    Begin,
    Effect,
    Event,
    Key,
    LaneAsked,
    LaneTold,
    Leave,
    PeerAhead,
    PeerReseated,
    PlanAdopted,
    Pull,
    Pulled,
    PullEnded,
    PushAgain,
    PushAllAgain,
    Ran,
    Refusal,
    Reopen,
    Reroute,
    Rest,
    Run,
    StateChanged,
    Superseded,
    TellBelow,
    Validate,
    Validated,
)
from worker_service.core.stepper import Phase, Stepper

ABOVE, ME, BELOW = (Incarnation(each) for each in ("worker-a", "worker-b", "worker-c"))
SHARD = Incarnation("shard-a")
ORIGIN = Timeline(0, Version(0))
BLOCKS = (Block(Lane(0), 2),)
KEY = Key(Version(2), ChunkId(3), SiteIndex(0), BLOCKS[0])


def pull(attempt: int, version: Version) -> Pull:
    """Under BSP: for the step from it, and nobody knows of a later one."""
    return Pull(attempt, version, version, version)


def ran(attempt: int) -> Ran:
    return Ran(attempt, Version(0))


def config(**changes: object) -> Config:
    values = {"train": {"lanes": 4, "max_steps": 6, "global_batch_size": 16}, "validation": {"num_micro_batches": 6}}
    return build(values).with_changes(changes)


def plan(
    epoch: int = 1,
    workers: tuple[Incarnation, ...] = (ABOVE, ME, BELOW),
    timeline: Timeline = ORIGIN,
    *,
    formed: int | None = None,
    begins_at: int = 0,
) -> Plan:
    """`formed`: the epoch that formed the replica; None: this one."""
    return Plan(
        PlanNumber(1, epoch),
        RunId("run"),
        timeline,
        (*(Member(each, "worker", f"{each}:1") for each in workers), Member(SHARD, "shard", "s:1")),
        tuple(StageLayers(each, each + 1, 3) for each in range(3)),
        (Replica(workers, BLOCKS, PlanNumber(1, epoch) if formed is None else PlanNumber(1, formed), Version(begins_at)),),
        (Placement((SHARD,)),) * 4,
    )


def at_work(version: int = 0, *, is_first_step: bool = False, **changes: object) -> Stepper:
    """A middle stage that runs the step from `version`."""
    stepper = Stepper(ME, config(**changes))
    begin = version if is_first_step else version - 1
    stepper.handle(PlanAdopted(plan(timeline=Timeline(0, Version(begin)))))
    stepper.handle(Pulled(stepper.attempt))
    if stepper.phase is Phase.VALIDATING:
        stepper.handle(Validated(stepper.attempt))
    if not is_first_step:
        stepper.handle(ran(stepper.attempt))
        stepper.handle(Pulled(stepper.attempt))
    assert (stepper.phase, stepper.step) == (Phase.RUNNING, version)
    return stepper


def test_a_step_from_plan_to_next_version() -> None:
    stepper = Stepper(ME, config())
    one = plan()
    assert stepper.handle(PlanAdopted(one)) == [Abandon(), Begin(one, 0, 1), pull(1, Version(0))]
    lanes = (lane(0), lane(1))  # the step may have been open before this plan
    assert stepper.handle(Pulled(1)) == [Ask(Version(1)), Run(1, Version(0), lanes)]
    assert stepper.handle(ran(1)) == [pull(1, Version(1))]
    assert stepper.handle(Pulled(1)) == [Ask(Version(2)), Run(1, Version(1), BLOCKS)]


def test_a_version_that_is_past_leads_to_the_present_one() -> None:
    stepper = Stepper(ME, config())
    stepper.handle(PlanAdopted(plan()))
    assert stepper.handle(Superseded(1, Version(4))) == [Abandon(), pull(2, Version(4))]
    assert stepper.handle(Superseded(1, Version(5))) == [], "of a pull that was abandoned"
    assert stepper.handle(Superseded(2, Version(4))) == [Abandon(), pull(3, Version(4))], "the pull is over: another one"
    assert stepper.handle(Pulled(3)) == [Ask(Version(5)), Run(3, Version(4), (lane(0), lane(1)))]


def test_a_new_plan_abandons_the_step_and_begins_it_again_lane_by_lane() -> None:
    stepper = at_work(2)
    two = plan(epoch=2)
    attempt = stepper.attempt
    assert stepper.handle(PlanAdopted(two)) == [Abandon(), Begin(two, 0, 1), pull(attempt + 1, Version(2))]
    assert stepper.handle(ran(attempt)) == [], "the end of what was abandoned"
    assert stepper.handle(Pulled(attempt + 1)) == [Ask(Version(3)), Run(attempt + 1, Version(2), (lane(0), lane(1)))]


def test_a_plan_that_leaves_the_replica_as_it_is_changes_only_where_its_shards_are() -> None:
    stepper = at_work(2)
    two = plan(epoch=2, formed=1)
    assert stepper.handle(PlanAdopted(two)) == [Reroute(two)]
    assert (stepper.phase, stepper.step) == (Phase.RUNNING, 2)
    assert stepper.handle(ran(stepper.attempt)) == [pull(stepper.attempt, Version(3))]


def test_a_seat_for_a_later_version_waits_for_it_and_runs_whole_blocks_then() -> None:
    stepper = at_work(2)
    two = plan(epoch=2, workers=(ME, ABOVE, BELOW), begins_at=4)
    assert stepper.handle(PlanAdopted(two)) == [Reroute(two)]
    for version in (2, 3):
        assert stepper.step == version
        assert stepper.handle(ran(stepper.attempt)) == [pull(stepper.attempt, Version(version + 1))]
        effects = stepper.handle(Pulled(stepper.attempt))
    assert effects == [Abandon(), Begin(two, 0, 0), pull(stepper.attempt, Version(4))]
    assert stepper.handle(Pulled(stepper.attempt)) == [Ask(Version(5)), Run(stepper.attempt, Version(4), BLOCKS)]


def test_who_has_no_seat_any_more_works_until_the_others_have_begun() -> None:
    stepper = at_work(2)
    two = plan(epoch=2, workers=(ABOVE, Incarnation("worker-d"), BELOW), begins_at=3)
    assert stepper.handle(PlanAdopted(two)) == [Reroute(two)]
    stepper.handle(ran(stepper.attempt))
    assert stepper.handle(Pulled(stepper.attempt)) == [Abandon(), Rest(two)]
    assert stepper.phase is Phase.SPARE


def test_a_newcomer_goes_straight_to_the_version_where_its_replica_begins() -> None:
    stepper = Stepper(ME, config())
    one = plan(begins_at=5)
    assert stepper.handle(PlanAdopted(one)) == [Abandon(), Begin(one, 0, 1), pull(1, Version(5))]
    assert stepper.handle(Pulled(1)) == [Ask(Version(6)), Run(1, Version(5), BLOCKS)]


def test_a_death_before_that_version_calls_everybody_to_the_open_step() -> None:
    newcomer, seated = Stepper(ME, config()), at_work(2)
    later, now = plan(epoch=2, workers=(ME, ABOVE, BELOW), begins_at=5), plan(epoch=3, workers=(ME, ABOVE, BELOW))
    newcomer.handle(PlanAdopted(later))
    assert newcomer.handle(PlanAdopted(now)) == [Abandon(), Begin(now, 0, 0), pull(2, Version(0))], "where it is, shards say"
    assert newcomer.handle(Superseded(2, Version(2))) == [Abandon(), pull(3, Version(2))]
    seated.handle(PlanAdopted(later))
    assert seated.handle(PlanAdopted(now)) == [Abandon(), Begin(now, 0, 0), pull(seated.attempt, Version(2))]
    assert seated.handle(Pulled(seated.attempt))[1] == Run(seated.attempt, Version(2), (lane(0), lane(1)))


@pytest.mark.parametrize("neighbour_first", [True, False])
def test_nobody_stays_behind_a_neighbour_that_has_begun(neighbour_first: bool) -> None:
    """It heard of the plan before a version that this stage had passed when it heard."""
    stepper, two = at_work(2), plan(epoch=2, workers=(ME, ABOVE, BELOW), begins_at=4)
    heard = [PlanAdopted(two), PeerReseated(PlanNumber(1, 2))]
    *_, last = [stepper.handle(event) for event in (reversed(heard) if neighbour_first else heard)]
    assert last == [Abandon(), Begin(two, 0, 0), pull(stepper.attempt, Version(4))]


def test_an_old_plan_is_ignored() -> None:
    stepper = Stepper(ME, config())
    stepper.handle(PlanAdopted(plan(epoch=3)))
    assert stepper.handle(PlanAdopted(plan(epoch=2))) == []
    assert stepper.handle(PlanAdopted(plan(epoch=3))) == []


def test_without_a_seat_a_worker_rests_until_a_plan_has_one() -> None:
    stepper = Stepper(ME, config())
    without = plan(workers=(ABOVE, Incarnation("worker-x"), BELOW))
    assert stepper.handle(PlanAdopted(without)) == [Abandon(), Rest(without)]
    assert stepper.handle(PeerAhead(Version(3), PlanNumber(1, 1))) == []
    two = plan(epoch=2)
    assert stepper.handle(PlanAdopted(two)) == [Abandon(), Begin(two, 0, 1), pull(2, Version(0))]


def test_a_new_timeline_takes_a_worker_back() -> None:
    stepper = at_work(4)
    back = plan(epoch=2, timeline=Timeline(1, Version(2), "d" * 64))
    assert stepper.handle(PlanAdopted(back))[-1] == pull(stepper.attempt, Version(2))


@pytest.mark.parametrize(("phase", "ahead", "goes"), [("running", 3, True), ("waiting", 3, False), ("waiting", 4, True)])
def test_a_peer_ahead_ends_a_step_that_is_closed(phase: str, ahead: int, goes: bool) -> None:
    stepper = at_work(2)
    if phase == "waiting":
        stepper.handle(ran(stepper.attempt))
    effects = stepper.handle(PeerAhead(Version(ahead), PlanNumber(1, 1)))
    assert effects == ([Abandon(), pull(stepper.attempt, Version(ahead))] if goes else [])
    assert stepper.handle(PeerAhead(Version(2), PlanNumber(1, 1))) == []


# ---- states -------------------------------------------------------------------------------------------------------------


def test_a_paused_run_begins_no_other_step_and_finishes_this_one() -> None:
    stepper = at_work(2)
    assert stepper.handle(StateChanged("paused")) == []
    assert stepper.handle(ran(stepper.attempt)) == [pull(stepper.attempt, Version(3))]
    assert stepper.handle(Pulled(stepper.attempt)) == []
    assert stepper.phase is Phase.HELD
    assert stepper.handle(StateChanged("training")) == [Ask(Version(4)), Run(stepper.attempt, Version(3), BLOCKS)]


@pytest.mark.parametrize("state", ["finished", "failed"])
def test_the_end_of_the_run_ends_everything(state: str) -> None:
    stepper = at_work(2)
    assert stepper.handle(StateChanged(state)) == [Abandon(), Leave()]  # type: ignore[arg-type]
    assert stepper.handle(PlanAdopted(plan(epoch=9))) == []


def test_the_last_version_is_validated_and_no_step_begins() -> None:
    stepper = at_work(5)
    stepper.handle(ran(stepper.attempt))
    # Validation micro-batch e belongs to lane e mod 4, and this replica has lanes 0 and 1.
    assert stepper.handle(Pulled(stepper.attempt)) == [Validate(stepper.attempt, Version(6), (0, 1, 4, 5))]
    assert stepper.handle(Validated(stepper.attempt)) == []
    assert stepper.phase is Phase.DONE


def test_validation_comes_before_the_step_when_it_is_due() -> None:
    stepper = at_work(1, **{"validation.every_steps": 2})
    stepper.handle(ran(stepper.attempt))
    assert stepper.handle(Pulled(stepper.attempt)) == [Validate(stepper.attempt, Version(2), (0, 1, 4, 5))]
    assert stepper.handle(Validated(stepper.attempt)) == [Ask(Version(3)), Run(stepper.attempt, Version(2), BLOCKS)]


def test_a_run_that_stops_early_ends_at_that_version() -> None:
    stepper = at_work(2, **{"train.stop_at_step": 3})
    stepper.handle(ran(stepper.attempt))
    assert stepper.handle(Pulled(stepper.attempt)) == []
    assert stepper.phase is Phase.DONE


# ---- answers ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("phase", ["running", "waiting"])
def test_what_was_not_taken_is_pushed_again(phase: str) -> None:
    stepper = at_work(2)
    if phase == "waiting":
        stepper.handle(ran(stepper.attempt))
    refusals = (Refusal(KEY, "not_yet"), Refusal(KEY, "stale"), Refusal(KEY, "not_owner"))
    assert stepper.handle(Answered(refusals)) == [PushAgain((KEY, KEY))]


def test_a_pull_that_ends_early_has_everything_pushed_again() -> None:
    stepper = at_work(2)
    assert stepper.handle(PullEnded(SHARD)) == [PushAllAgain(SHARD)]
    stepper.handle(PlanAdopted(plan(epoch=2)))
    assert stepper.handle(PullEnded(SHARD)) == [], "nothing of the step is pushed yet"


def overlaps(*lanes: int) -> Answered:
    return Answered((Refusal(KEY, "overlaps", tuple(lane(each) for each in lanes)),))


def test_a_middle_stage_asks_upwards_once_and_runs_what_it_is_told() -> None:
    stepper = at_work(2)
    assert stepper.handle(overlaps(1)) == [AskAbove(Version(2), Lane(1))]
    assert stepper.handle(overlaps(1)) == []
    assert stepper.handle(LaneAsked(Version(2), Lane(1))) == [], "asked already"
    assert stepper.handle(LaneAsked(Version(2), Lane(0))) == [AskAbove(Version(2), Lane(0))]
    assert stepper.handle(LaneTold(Version(2), Lane(1))) == [Reopen(Version(2), Lane(1)), TellBelow(Version(2), Lane(1))]
    assert stepper.handle(LaneTold(Version(2), Lane(1))) == [], "a second stream said it again"
    assert stepper.handle(ran(stepper.attempt)) == [Run(stepper.attempt, Version(2), (lane(1),), again=True)]
    assert stepper.handle(ran(stepper.attempt)) == [pull(stepper.attempt, Version(3))]


def test_a_lane_that_is_not_this_replicas_is_not_run() -> None:
    stepper = at_work(2)
    assert stepper.handle(overlaps(3)) == []
    assert stepper.handle(LaneTold(Version(2), Lane(3))) == []
    assert stepper.handle(LaneTold(Version(1), Lane(1))) == []


def test_waiting_for_the_next_version_gives_way_to_a_lane() -> None:
    stepper = at_work(2)
    stepper.handle(ran(stepper.attempt))
    attempt = stepper.attempt
    assert stepper.handle(LaneTold(Version(2), Lane(0))) == [
        Reopen(Version(2), Lane(0)),
        TellBelow(Version(2), Lane(0)),
        Abandon(),
        Run(attempt + 1, Version(2), (lane(0),), again=True),
    ]
    assert stepper.handle(Pulled(attempt)) == []
    assert stepper.handle(ran(attempt + 1)) == [pull(attempt + 1, Version(3))]


class Chain:
    """Three stages of one replica. Work takes as long as the walk pleases; words between neighbours keep their order."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        names = (ABOVE, ME, BELOW)
        self.steppers = [Stepper(each, config()) for each in names]
        self.works: list[deque[Effect]] = [deque() for _ in names]
        self.words: dict[tuple[int, int], deque[Event]] = {(a, b): deque() for a in range(3) for b in range(3)}
        self.runs: list[list[int]] = [[] for _ in names]  # lanes run again by each stage, in order
        for stage in range(3):
            self.feed(stage, PlanAdopted(plan(timeline=Timeline(0, Version(2)))))

    def feed(self, stage: int, event: Event) -> None:
        for effect in self.steppers[stage].handle(event):
            match effect:
                case Abandon():
                    self.works[stage].clear()
                case AskAbove():
                    self.words[stage, stage - 1].append(LaneAsked(effect.version, effect.lane))
                case TellBelow():
                    self.words[stage, stage + 1].append(LaneTold(effect.version, effect.lane))
                case Pull() | Run():
                    self.works[stage].append(effect)

    def step(self) -> bool:
        """One thing happens; False when nothing can."""
        choices = [("word", way) for way, queue in self.words.items() if queue]
        choices += [("work", (stage, 0)) for stage in range(3) if self.can_end(stage)]
        if not choices:
            return False
        kind, (first, second) = self.random.choice(choices)
        if kind == "word":
            self.feed(second, self.words[first, second].popleft())
            return True
        work = self.works[first].popleft()
        if isinstance(work, Run) and work.again:
            self.runs[first].append(work.blocks[0].first)
        attempt = self.steppers[first].attempt
        self.feed(first, ran(attempt) if isinstance(work, Run) else Pulled(attempt))
        return True

    def can_end(self, stage: int) -> bool:
        """The next version never comes. A run needs its neighbours: stages end one in the order last to first."""
        if not self.works[stage]:
            return False
        work = self.works[stage][0]
        if isinstance(work, Pull):
            return work.version == 2
        assert isinstance(work, Run)
        if not work.again:
            return stage == 2 or self.steppers[stage + 1].phase is Phase.WAITING or bool(self.runs[stage + 1])
        return stage == 2 or len(self.runs[stage + 1]) > len(self.runs[stage])


@pytest.mark.parametrize("seed", range(200))
def test_all_stages_run_lanes_again_once_and_in_one_order(seed: int) -> None:
    chain = Chain(seed)
    for _ in range(200):
        if chain.random.random() < 0.2:
            stage = chain.random.randrange(3)
            if chain.steppers[stage].phase in (Phase.RUNNING, Phase.WAITING) and chain.runs[stage] != [0, 1]:
                chain.feed(stage, overlaps(chain.random.randrange(2)))
        chain.step()
    chain.feed(2, overlaps(0, 1))
    while chain.step():
        pass
    assert sorted(chain.runs[0]) == [0, 1]
    assert chain.runs[0] == chain.runs[1] == chain.runs[2]
    assert {each.phase for each in chain.steppers} == {Phase.WAITING}
