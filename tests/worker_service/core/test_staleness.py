"""A stage under SSP: step t reads version t - s, and several steps are open at a time."""

from __future__ import annotations

from shardlane.ids import ChunkId, Lane, PlanNumber, SiteIndex, Version
from shardlane.lanes import Block
from shardlane.plan import Plan
from tests.worker_service.core.test_stepper import ABOVE, BELOW, ME, SHARD, config, plan
from worker_service.core.events import (
    Abandon,
    Answered,
    Ask,
    Begin,
    Effect,
    Event,
    Key,
    PeerAhead,
    PlanAdopted,
    Pull,
    Pulled,
    PullEnded,
    PushAgain,
    PushAllAgain,
    Ran,
    Refusal,
    Reroute,
    Run,
    StateChanged,
    Superseded,
    Validate,
    Validated,
)
from worker_service.core.stepper import Phase, Stepper

FORMED = PlanNumber(1, 1)


class Story:
    """A stage of which every pull brings what was asked for, and every run ends."""

    def __init__(self, staleness: int, first: Plan | None = None, **changes: object) -> None:
        fixed = {"train.consistency": "ssp", "train.staleness": staleness, "validation.num_micro_batches": 0}
        self.stepper = Stepper(ME, config(**{**fixed, **changes}))
        self.effects = self.tell(PlanAdopted(first or plan()))

    def tell(self, event: Event) -> list[Effect]:
        self.effects = self.stepper.handle(event)
        return self.effects

    def pulled(self) -> list[Effect]:
        return self.tell(Pulled(self.stepper.attempt))

    def ran(self, published: int = 0) -> list[Effect]:
        return self.tell(Ran(self.stepper.attempt, Version(published)))

    @property
    def pulls(self) -> list[int]:
        return [effect.version for effect in self.effects if isinstance(effect, Pull)]

    @property
    def runs(self) -> list[int]:
        return [effect.step for effect in self.effects if isinstance(effect, Run)]

    def until_running(self, step: int) -> None:
        while (self.stepper.phase, self.stepper.step) != (Phase.RUNNING, step):
            self.ran() if self.stepper.phase is Phase.RUNNING else self.pulled()


def test_the_first_steps_read_version_0_and_each_later_one_the_version_before_the_last() -> None:
    story, read = Story(2), list[tuple[int, int]]()
    loaded = story.pulls[0]
    while story.stepper.phase is not Phase.DONE:
        story.pulled()
        while story.runs:
            read.append((story.runs[0], loaded))
            story.ran()
        loaded = story.pulls[0] if story.pulls else loaded
    assert read == [(0, 0), (1, 0), (2, 0), (3, 1), (4, 2), (5, 3)]
    assert loaded == 6, "every version up to the last is pulled, in case it is to be validated"


def test_a_warm_up_is_bsp_and_what_follows_falls_behind_step_by_step() -> None:
    train = Story(2, **{"train.staleness_warmup_steps": 3, "train.look_ahead": True}).stepper._config.train
    assert [train.reads(step) for step in range(8)] == [0, 1, 2, 3, 3, 3, 4, 5]
    assert [train.steps_ahead(step) for step in range(8)] == [0, 0, 0, 0, 1, 2, 2, 2]


def test_the_next_version_is_asked_for_while_the_step_runs_that_does_not_need_it() -> None:
    story = Story(1)
    attempt = story.stepper.attempt
    assert story.pulled() == [Run(attempt, Version(0), story.stepper.replica.blocks and (Block(Lane(0), 1), Block(Lane(1), 1)))]  # type: ignore[union-attr]
    assert [type(each) for each in story.ran()] == [Ask, Run], "step 1 reads version 0, too, and waits for nothing"
    assert story.effects[0] == Ask(Version(1))
    assert story.ran() == [Pull(attempt, Version(1), Version(2), Version(1))]


def test_a_validation_of_every_version_comes_when_it_is_loaded() -> None:
    story = Story(1, **{"validation.every_steps": 1, "validation.num_micro_batches": 4})
    validated = list[int]()
    while story.stepper.phase is not Phase.DONE:
        validated += [each.version for each in story.effects if isinstance(each, Validate)]
        if story.stepper.phase is Phase.VALIDATING:
            story.tell(Validated(story.stepper.attempt))
        elif story.runs:
            story.ran()
        else:
            story.pulled()
    assert validated == [1, 2, 3, 4, 5, 6]


def test_who_looks_ahead_loads_the_version_before_first() -> None:
    story = Story(2, **{"train.look_ahead": True})
    story.tell(Superseded(1, Version(5)))
    assert (story.stepper.step, story.pulls) == (5, [2])
    story.pulled()
    assert (story.pulls, story.runs) == ([3], [])
    story.pulled()
    assert story.runs == [5]


def test_a_superseded_version_leads_to_the_oldest_open_step() -> None:
    story = Story(2)
    story.tell(Superseded(1, Version(5)))
    assert (story.stepper.step, story.pulls) == (5, [3])


def test_a_step_that_is_closed_is_left_and_neighbours_are_told_by_the_pull() -> None:
    story = Story(1)
    story.until_running(2)
    assert story.ran(published=4) == [Abandon(), Pull(story.stepper.attempt, Version(3), Version(4), Version(4))]


def test_a_step_that_is_closed_when_it_is_done_leads_to_the_next_as_any() -> None:
    story = Story(1)
    story.until_running(2)
    assert story.ran(published=3) == [Pull(story.stepper.attempt, Version(2), Version(3), Version(2))], "step 3 is open"


def test_a_neighbour_one_step_on_is_no_news_and_one_that_knows_the_step_closed_is() -> None:
    story = Story(1)
    story.until_running(3)
    assert story.tell(PeerAhead(Version(3), FORMED)) == [], "it computes step 4 from version 3, and needs this stage there"
    story.tell(PeerAhead(Version(4), FORMED))
    assert (story.stepper.step, story.pulls) == (4, [3])
    assert story.tell(PeerAhead(Version(9), PlanNumber(1, 0))) == [], "said in another replica, of another timeline maybe"


def test_a_later_seat_waits_until_all_is_closed_that_was_pushed_in_this_one() -> None:
    story, two = Story(2, **{"train.max_steps": 12}), plan(epoch=2, workers=(ME, ABOVE, BELOW), begins_at=5)
    story.until_running(3)
    assert story.tell(PlanAdopted(two)) == [Reroute(two)]
    story.until_running(4)
    story.ran()
    for version in (3, 4, 5):
        assert story.pulls == [version], "step 5 would read version 3, but belongs to the other seat"
        story.pulled()
    assert story.effects == [Abandon(), Begin(two, 0, 0), Pull(story.stepper.attempt, Version(3), Version(5), Version(5))]


def test_a_run_that_is_held_loads_what_may_be_its_last_version_and_goes_back_when_it_goes_on() -> None:
    story = Story(1)
    story.until_running(2)
    story.tell(StateChanged("paused"))
    story.ran()
    story.pulled()
    assert (story.stepper.phase, story.stepper.step, story.pulls) == (Phase.HELD, 3, [3])
    story.tell(StateChanged("training"))
    assert (story.stepper.phase, story.pulls) == (Phase.PULLING, [2]), "version 3 may be half in the parameters"
    story.pulled()
    assert story.runs == [3]


def test_a_step_beyond_the_last_version_is_left_for_the_versions_that_may_be_validated() -> None:
    story = Story(2)
    story.until_running(4)
    story.tell(StateChanged("finishing"))
    for version in (3, 4, 5):
        assert story.pulls == [version]
        story.pulled()
    assert story.runs == []


def test_a_validation_in_a_pause_gives_way_to_neighbours_that_go_on() -> None:
    story = Story(1, **{"validation.every_steps": 3, "validation.num_micro_batches": 4})
    story.until_running(2)
    story.tell(StateChanged("paused"))
    story.ran()
    story.pulled()
    story.pulled()
    assert story.stepper.phase is Phase.VALIDATING
    story.tell(StateChanged("training"))
    assert (story.stepper.phase, story.pulls) == (Phase.PULLING, [2])


def test_what_is_refused_of_an_earlier_open_step_is_pushed_again() -> None:
    story = Story(1)
    story.until_running(3)
    key = Key(Version(2), ChunkId(3), SiteIndex(0), Block(Lane(0), 1))
    assert story.tell(Answered((Refusal(key, "not_owner"),))) == [PushAgain((key,))]
    story.tell(StateChanged("paused"))
    story.ran()
    assert story.tell(PullEnded(SHARD)) == [PushAllAgain(SHARD)], "while it waits, too"
