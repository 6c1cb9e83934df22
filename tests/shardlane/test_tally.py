"""How often lanes were counted: figures over tables, and what of them is taken from the wire."""

from __future__ import annotations

import random

import pytest

from shardlane.errors import MalformedError
from shardlane.ids import Lane
from shardlane.lanes import Block, lane
from shardlane.pb import tensor_pb2
from shardlane.tally import LaneRun, Tally, are_runs
from shardlane.wire import tally_from_wire, tally_to_wire

ONCE = Tally(1, (LaneRun(0, 4, 1, 1),))


def test_a_table_in_which_every_lane_came_once_is_one_run() -> None:
    assert Tally.of_table([Block(Lane(2), 2), lane(1), lane(0)], 4) == ONCE
    assert Tally.of_table([Block(Lane(0), 4)], 4) == ONCE


def test_a_lane_that_came_twice_or_never_shows() -> None:
    twice = Tally.of_table([Block(Lane(0), 2), lane(1), Block(Lane(2), 2)], 4)
    assert twice.runs == ((0, 1, 1, 1), (1, 1, 2, 2), (2, 2, 1, 1))
    assert Tally.of_table([Block(Lane(0), 2)], 4).runs == ((0, 2, 1, 1), (2, 2, 0, 0))
    assert Tally.of_table([], 4).runs == ((0, 4, 0, 0),)
    other_for_one = Tally.of_table([lane(0), lane(0), lane(1), lane(2)], 4)  # four lanes were added in, and not all four
    assert other_for_one.runs == ((0, 1, 2, 2), (1, 2, 1, 1), (3, 1, 0, 0))


def test_twice_in_one_table_does_not_make_up_for_never_in_another() -> None:
    twice, never = Tally.of_table([lane(0), lane(0), lane(1)], 2), Tally.of_table([lane(1)], 2)
    assert Tally.over([twice, never]) == Tally(2, (LaneRun(0, 1, 0, 2), LaneRun(1, 1, 1, 1)))
    assert Tally.over([ONCE, Tally.over([ONCE, ONCE])]) == Tally(3, ONCE.runs)


def test_figures_do_not_depend_on_the_order_of_tables() -> None:
    rng = random.Random(3)
    num_uneven = 0
    for _ in range(200):
        tables = [[lane(rng.randrange(8)) for _ in range(rng.randrange(12))] for _ in range(3)]
        tallies = [Tally.of_table(blocks, 8) for blocks in tables]
        counts = [[blocks.count(lane(index)) for index in range(8)] for blocks in tables]
        total = Tally.over(tallies)
        assert total == Tally.over([tallies[2], Tally.over(tallies[:2])])
        assert are_runs(total.runs, 8)
        by_lane = [(run.least, run.most) for run in total.runs for _ in range(run.size)]
        assert by_lane == [(min(lanes), max(lanes)) for lanes in zip(*counts, strict=True)]
        num_uneven += len(total.runs) > 1
    assert num_uneven > 100


@pytest.mark.parametrize("tally", [ONCE, Tally(77, (LaneRun(0, 1, 0, 2), LaneRun(1, 3, 1, 1)))], ids=str)
def test_a_tally_survives_the_wire(tally: Tally) -> None:
    assert tally_from_wire(tensor_pb2.Tally.FromString(tally_to_wire(tally).SerializeToString()), 4) == tally


@pytest.mark.parametrize(
    ("tables", "runs"),
    [
        (1, []),
        (0, [(0, 4, 1, 1)]),
        (1, [(0, 3, 1, 1)]),
        (1, [(0, 5, 1, 1)]),
        (1, [(0, 2, 1, 1), (3, 1, 1, 1)]),
        (1, [(0, 2, 1, 1), (1, 3, 1, 1)]),
        (1, [(2, 2, 1, 1), (0, 2, 1, 1)]),
        (1, [(0, 0, 1, 1), (0, 4, 1, 1)]),
        (1, [(0, 4, 2, 1)]),
        (1, [(index, 1, 1, 1) for index in range(5)]),
        (1, [(0, 4, 1, 1)] * 1000),
    ],
)
def test_a_malformed_tally_is_refused(tables: int, runs: list[tuple[int, int, int, int]]) -> None:
    names = ("first", "size", "least", "most")
    message = tensor_pb2.Tally(tables=tables, runs=[tensor_pb2.LaneRun(**dict(zip(names, run, strict=True))) for run in runs])
    with pytest.raises(MalformedError, match="tally"):
        tally_from_wire(message, 4)
