"""ASP: whose turn it is, as one number (decision 10).

A contribution of one lane is one entry of a log that all chunks share, and makes one version. A lane's *turn* n is what it
computes after n entries of its own, from the version that the last of them made: so a gradient is a function of the log.

Shards and workers name turn n of lane l by n * (L + 1) + l, where BSP has the step and the version: the numbers of one worker
rise. In the place after the last lane stand the parameters themselves, whose turn is their version.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from shardlane.ids import Lane, Step, Timeline, Version


class LaneClock(NamedTuple):
    """Where a lane stands in the log."""

    taken: int  # its entries
    refused: int  # of them: computed from too old a version, and so computed anew
    read: Version  # that its present turn is computed from

    @property
    def clock(self) -> int:
        """Which of the lane's batches its present turn is computed of."""
        return self.taken - self.refused


Clocks = tuple[LaneClock, ...]  # of each lane; empty but for ASP


@dataclass(frozen=True, slots=True)
class Turn:
    """What an entry of the log is of."""

    number: Step
    staleness: int  # versions that were made since the one that it was computed from
    clock_sum: int  # batches that all lanes together have learnt from before it


def number_of(place: int, turn: int, num_lanes: int) -> Step:
    """`place`: a lane, or `num_lanes` for the parameters themselves."""
    return Step(turn * (num_lanes + 1) + place)


def place_of(number: int, num_lanes: int) -> tuple[int, int]:
    """(place, turn)."""
    turn, place = divmod(number, num_lanes + 1)
    return place, turn


def beginning(timeline: Timeline, num_lanes: int) -> Clocks:
    """All lanes go on from the version that the timeline begins with."""
    return tuple(LaneClock(clock, 0, timeline.version) for clock in timeline.clocks or (0,) * num_lanes)


def turn_at(clocks: Clocks, lane: Lane, version: Version) -> Turn:
    """The present turn of `lane`, as the entry that leads on from `version`."""
    now = clocks[lane]
    return Turn(number_of(lane, now.taken, len(clocks)), version - now.read, sum(each.clock for each in clocks))


def after(clocks: Clocks, turn: Turn, version: Version, *, refused: bool) -> Clocks:
    """The clocks at `version`, which `turn` has made."""
    lane, _ = place_of(turn.number, len(clocks))
    now = clocks[lane]
    return (*clocks[:lane], LaneClock(now.taken + 1, now.refused + refused, version), *clocks[lane + 1 :])


def batch_of(number: int, refused: int, num_lanes: int) -> int:
    """Which of the lane's batches turn `number` is computed of, after `refused` of its turns that taught nothing."""
    return place_of(number, num_lanes)[1] - refused


def version_told(number: int, num_lanes: int) -> Version:
    """Under which a validation is told: that of the parameters; of turn n of each lane, where all are at n if equally fast."""
    place, turn = place_of(number, num_lanes)
    return Version(turn if place == num_lanes else turn * num_lanes)


def is_before(number: int, other: int, num_places: int) -> bool:
    """Whether it is an earlier turn of the same place. Steps and versions have one place only."""
    return number < other and (other - number) % num_places == 0


def is_refused(turn: Turn, staleness_max: int) -> bool:
    """Whether it was computed from too old a version. 0: none is."""
    return 0 < staleness_max < turn.staleness


def has_come(clocks: Sequence[LaneClock], version: int, number: int) -> bool:
    """Whether turn `number` may be computed, at `version`."""
    place, turn = place_of(number, len(clocks))
    return (version if place == len(clocks) else clocks[place].taken) >= turn
