"""Where a run ends, which under ASP only a decision tells."""

from __future__ import annotations

from coordinator.core.beginning import Saved
from coordinator.core.ending import Ending
from coordinator.core.events import NO_CHECKPOINT, CheckpointMark
from shardlane.ids import Version
from shardlane.plan import DONE, REQUEST_STOP
from shardlane.train_config import TrainConfig

ASP = TrainConfig(lanes=2, max_steps=3, consistency="asp")


def ending(checkpoint: CheckpointMark = NO_CHECKPOINT) -> Ending:
    return Ending(ASP, Saved(), checkpoint, checkpoint.version)


def test_refused_turns_put_the_end_off_until_a_decision_names_it() -> None:
    run = ending()
    assert [run.expected(Version(each)) for each in (0, 5, 6, 7)] == [6, 6, 7, 8]
    run.take_effect(DONE, Version(8))
    assert run.expected(Version(7)) == 8 and run.is_last(Version(8))


def test_a_stop_is_asked_for_again_after_a_roll_back_and_a_natural_end_is_not() -> None:
    stopped, done = ending(), ending()
    stopped.take_effect(REQUEST_STOP, Version(4))
    done.take_effect(DONE, Version(6))
    assert not stopped.is_last(Version(4))
    for run in (stopped, done):
        run.rewind(Version(2), is_suspending=False)
        assert run.version is None and not run.is_done
    assert (stopped.requests, done.requests) == (REQUEST_STOP, 0)


def test_a_checkpoint_of_all_batches_is_the_end_and_one_of_fewer_is_not() -> None:
    assert ending(CheckpointMark(Version(7), "d", (4, 2))).expected(Version(7)) == 7
    assert ending(CheckpointMark(Version(7), "d", (3, 2))).expected(Version(7)) == 8
