"""Bugs that are planted are caught: by the walks within a thousand schedules, or by the search."""

from __future__ import annotations

import pytest

from tests.sim.oracle import BrokenInvariant
from tests.sim.plants import BUGS
from tests.sim.plants_ahead import AHEAD
from tests.sim.plants_turns import TURNS
from tests.sim.search import Search
from tests.sim.settings import SETTINGS
from tests.sim.shape import SHAPES
from tests.sim.walk import EmptySchedule, FailedSchedule, replay

NUM_SCHEDULES_MAX = 1_000


def is_caught_by_a_walk(name: str) -> bool:
    for seed in range(NUM_SCHEDULES_MAX):
        try:
            replay(name, seed)
        except FailedSchedule as failed:
            if not isinstance(failed.__cause__, EmptySchedule):
                return True
    return False


def is_caught_by_the_search(name: str) -> bool:
    try:
        Search(SETTINGS[name]).run()
    except (BrokenInvariant, KeyError):  # the latter out of the core, which is red as well
        return True
    return False


@pytest.mark.parametrize("name", [*BUGS, *AHEAD, *TURNS])
def test_a_planted_bug_is_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    bug = (BUGS | AHEAD | TURNS)[name]
    bug.plant(monkeypatch)
    if bug.hunted_in in SHAPES:
        assert is_caught_by_a_walk(bug.hunted_in), bug.sentence
    else:
        assert is_caught_by_the_search(bug.hunted_in), bug.sentence
