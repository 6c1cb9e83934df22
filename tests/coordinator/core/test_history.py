"""Events, checkpoints, and the part of the time that made steps which count."""

from __future__ import annotations

import pytest

from coordinator.core.events import CheckpointFailed, Note, RunState, TrainingRow
from coordinator.core.history import CHECKPOINTS_MAX, EVENTS_MAX, Event, History
from shardlane.ids import Version
from tests.coordinator.cast import summary

BEGUN = Event(1.0, "begun", False)


def look(history: History, state: RunState, version: int, now: float, checkpoint: int = 0) -> None:
    history.observe(state, Version(version), Version(checkpoint), now, 1000.0 + now)


def step(history: History, number: int, *, seconds: float) -> None:
    history.take(TrainingRow(summary(number), 32 / seconds), 0.0)


def test_events_are_kept_with_their_reasons_and_bounded() -> None:
    history = History(BEGUN)
    history.take(Note("worker-01 is dead: nobody listens", is_warning=True), 2.0)
    history.take(CheckpointFailed(Version(3), "disk full"), 3.0)
    assert list(history.events) == [
        BEGUN,
        Event(2.0, "worker-01 is dead: nobody listens", True),
        Event(3.0, "no checkpoint of version 3: disk full", True),
    ]
    for _ in range(EVENTS_MAX):
        history.take(Note("x" * 1000), 4.0)
    assert len(history.events) == EVENTS_MAX and BEGUN not in history.events and len(history.events[0].text) == 300


def test_checkpoints_are_seen_once() -> None:
    history = History(BEGUN)
    look(history, RunState.TRAINING, 5, 0.0, checkpoint=4)
    for version in range(5, 30):
        look(history, RunState.TRAINING, version, float(version), checkpoint=version - version % 2)
    assert len(history.checkpoints) <= CHECKPOINTS_MAX
    assert list(history.checkpoints)[-2:] == [(26, 1026.0), (28, 1028.0)]


def test_goodput_is_the_part_of_the_time_that_steps_which_count_would_have_taken() -> None:
    history = History(BEGUN)
    assert history.goodput(Version(0)) == (0.0, 0.0)
    look(history, RunState.GATHERING, 10, 0.0)
    look(history, RunState.TRAINING, 10, 50.0)  # time before the first plan does not count
    for number in range(4):
        step(history, 10 + number, seconds=2.0)
        look(history, RunState.TRAINING, 11 + number, 52.0 + 2 * number)
    assert history.goodput(Version(14)) == (1.0, pytest.approx(16.0))
    look(history, RunState.GATHERING, 14, 66.0)  # eight seconds in which somebody was dead
    assert history.goodput(Version(14)) == (pytest.approx(0.5), pytest.approx(8.0))
    assert history.goodput(Version(12)) == (pytest.approx(0.25), pytest.approx(4.0)), "a roll-back of two steps"
    assert history.goodput(Version(8))[0] == 0.0
    assert history.tokens_per_second == pytest.approx(16.0)


def test_pauses_and_the_time_after_the_end_are_left_out() -> None:
    history = History(BEGUN)
    look(history, RunState.TRAINING, 0, 0.0)
    step(history, 0, seconds=2.0)
    look(history, RunState.PAUSED, 1, 2.0)
    look(history, RunState.TRAINING, 1, 500.0)
    step(history, 1, seconds=2.0)
    look(history, RunState.FINISHED, 2, 502.0)
    look(history, RunState.FINISHED, 2, 9000.0)
    assert history.goodput(Version(2)) == (1.0, pytest.approx(16.0))


def test_steps_that_were_made_while_no_coordinator_looked_are_not_this_ones() -> None:
    history = History(BEGUN)
    look(history, RunState.TRAINING, 10, 0.0)
    for number in range(20):
        history.take(TrainingRow(summary(10 + number), 0.0), 0.0)
    step(history, 30, seconds=2.0)
    look(history, RunState.TRAINING, 31, 4.0)
    assert history.goodput(Version(31)) == (pytest.approx(0.5), pytest.approx(8.0))
