"""Turns by number, the clocks of lanes, and a run in one process that takes them in a given order."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from shardlane import turns
from shardlane.data import TokenFolder
from shardlane.errors import ConfigError
from shardlane.ids import Lane, Step, Timeline, Version
from shardlane.ledger import Entry, Expected, TimelineStart, from_line, judge, to_line
from shardlane.reference import Reference
from shardlane.tally import LaneRun, Tally
from shardlane.turn_table import Order
from shardlane.turns import LaneClock, Turn
from tests.numerics.toy import toy_config, toy_tokens

ASP = {"train.consistency": "asp", "validation.num_micro_batches": 0}
EXPECTS = Expected(tables=3, lanes=4, micro_batches=2, tokens=16, lanes_a_step=1)


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> TokenFolder:
    return toy_tokens(tmp_path_factory.mktemp("toy") / "data")


def run(tokens: TokenFolder, order: Order | None = None, checkpoints: Path | None = None, **changes: object) -> Reference:
    reference = Reference(toy_config(**{**ASP, **changes}), tokens, order=order)
    for _ in reference.run(checkpoints):
        pass
    return reference


# ---- numbers and clocks ------------------------------------------------------------------------------------------------


def test_numbers_name_lanes_and_turns_and_the_parameters_behind_the_last_lane() -> None:
    numbers = [turns.number_of(place, turn, 4) for turn in range(3) for place in range(5)]
    assert numbers == list(range(15))
    assert [turns.place_of(number, 4) for number in (0, 4, 5, 13)] == [(0, 0), (4, 0), (0, 1), (3, 2)]
    assert turns.is_before(3, 13, 5) and not turns.is_before(4, 13, 5) and not turns.is_before(13, 13, 5)


def test_clocks_move_with_the_log_and_stand_still_when_a_turn_is_refused() -> None:
    clocks = turns.beginning(Timeline(0, Version(0)), 2)
    first = turns.turn_at(clocks, Lane(1), Version(0))
    assert first == Turn(Step(1), 0, 0)
    clocks = turns.after(clocks, first, Version(1), refused=False)
    late = turns.turn_at(clocks, Lane(0), Version(1))
    assert late == Turn(Step(0), 1, 1) and turns.is_refused(late, 0) is False
    clocks = turns.after(clocks, late, Version(2), refused=True)
    assert clocks == (LaneClock(1, 1, Version(2)), LaneClock(1, 0, Version(1))) and clocks[0].clock == 0
    assert [turns.has_come(clocks, 2, number) for number in (3, 4, 6, 8, 11)] == [True, True, False, True, False]


def test_a_turn_is_of_the_batch_that_its_refused_ones_did_not_learn() -> None:
    assert [turns.batch_of(turns.number_of(1, 5, 4), refused, 4) for refused in (0, 2)] == [5, 3]
    assert turns.version_told(turns.number_of(1, 5, 4), 4) == 20, "where all lanes are at turn 5, if they are equally fast"
    assert turns.version_told(turns.number_of(4, 22, 4), 4) == 22


def test_a_bound_that_all_lanes_would_exceed_is_no_setting() -> None:
    with pytest.raises(ConfigError, match="below lanes 4"):
        toy_config(**{**ASP, "train.lanes": 4, "train.staleness_max": 3})
    with pytest.raises(ConfigError, match="under asp"):
        toy_config(**{**ASP, "train.staleness": 1})


# ---- in one process ----------------------------------------------------------------------------------------------------


def test_with_one_lane_it_is_bsp_bit_for_bit(tokens: TokenFolder) -> None:
    one = {"train.lanes": 1, "train.max_steps": 4}
    bsp = Reference(toy_config(**{**one, "validation.num_micro_batches": 0}), tokens)
    list(bsp.run())
    assert run(tokens, **one).digest() == bsp.digest()


def test_the_order_decides_the_bits_and_gives_them_again(tokens: TokenFolder) -> None:
    lanes = {"train.lanes": 2, "train.max_steps": 3}
    uneven = Order([Lane(each) for each in (0, 0, 1, 0, 0, 1)])
    assert run(tokens, uneven, **lanes).digest() == run(tokens, uneven, **lanes).digest()
    assert run(tokens, uneven, **lanes).digest() != run(tokens, **lanes).digest()


def test_a_turn_that_is_refused_teaches_nothing_and_is_computed_anew(tokens: TokenFolder) -> None:
    """Lane 1 comes after three turns of lane 0, which is too late, and at once again."""
    lanes = {"train.lanes": 2, "train.max_steps": 3, "train.staleness_max": 2}
    reference = Reference(
        toy_config(**{**ASP, **lanes}), tokens, order=Order([Lane(each) for each in (0, 0, 0, 1, 1, 0, 1, 0, 0)])
    )
    rows = list(reference.run())
    assert len(rows) == 7, "six that count, and one that was refused"
    assert reference.optimizer_step == 6 and reference.version == 7


def test_a_pause_is_a_beginning_and_the_order_says_where(tokens: TokenFolder, tmp_path: Path) -> None:
    """Every lane goes on from the checkpoint: so does the run that is repeated, if it knows."""
    lanes = {"train.lanes": 2, "train.max_steps": 4}
    before, after = [Lane(each) for each in (0, 0, 1, 0)], [Lane(each) for each in (1, 0, 1, 0)]
    run(tokens, Order(before), tmp_path, **lanes, **{"train.stop_at_step": 2})
    resumed = Reference(toy_config(**{**ASP, **lanes}), tokens, order=Order([*before, *after]))
    resumed.resume(tmp_path / "step-00000004")
    assert resumed.num_steps == 2
    list(resumed.run())
    whole = run(tokens, Order([*before, *after], frozenset({4})), **lanes)
    assert resumed.digest() == whole.digest()
    assert whole.digest() != run(tokens, Order([*before, *after]), **lanes).digest()


# ---- the ledger --------------------------------------------------------------------------------------------------------


def lines(*lanes: int, timeline: int = 0, first: int = 0) -> list[bytes]:
    def runs(of: int) -> tuple[LaneRun, ...]:
        around = (LaneRun(0, of, 0, 0), LaneRun(of, 1, 1, 1), LaneRun(of + 1, 3 - of, 0, 0))
        return tuple(each for each in around if each.size)

    return [to_line(Entry(first + step, timeline, 16, Tally(3, runs(each)))) for step, each in enumerate(lanes)]


def start(timeline: int = 0, version: int = 0) -> bytes:
    return to_line(TimelineStart(timeline, version, 0, "reason", EXPECTS))


def test_a_ledger_proves_each_contribution_and_tells_their_order() -> None:
    account = judge([start(), *lines(0, 1, 0, 3)], EXPECTS)
    assert (account.faults, account.lanes, account.restarts, account.num_micro_batches) == ([], [0, 1, 0, 3], [0], 8)


@pytest.mark.parametrize(("every", "at"), [(2, [2, 4, 6]), (0, [6])])
def test_the_held_out_loss_is_taken_as_often_as_is_asked(tokens: TokenFolder, every: int, at: list[int]) -> None:
    changes = {"train.max_steps": 6, "validation.num_micro_batches": 1, "validation.every_steps": every}
    reference = Reference(toy_config(**{**ASP, **changes}), tokens)
    assert [int(row["step"]) // reference.config.train.lanes for row in reference.run() if "val_loss" in row] == at


def test_what_a_refused_turn_was_computed_of_is_counted_where_it_is_computed_anew() -> None:
    refused, again = (from_line(line) for line in lines(0, 0))
    assert isinstance(refused, Entry)
    account = judge([start(), to_line(replace(refused, refused=True)), to_line(again)], EXPECTS)
    assert (account.faults, account.num_steps, account.num_refused, account.num_micro_batches) == ([], 2, 1, 2)


def test_of_a_timeline_that_went_back_the_order_is_the_new_one() -> None:
    account = judge([start(), *lines(0, 1, 0, 3), start(1, 2), *lines(2, 2, timeline=1, first=2)], EXPECTS)
    assert (account.faults, account.lanes, account.restarts) == ([], [0, 1, 2, 2], [0, 2])


@pytest.mark.parametrize(
    ("runs", "said"),
    [
        (((0, 2, 1, 1), (2, 2, 0, 0)), "lanes 0..1: 1"),
        (((0, 1, 2, 2), (1, 3, 0, 0)), "lane 0: 2"),
        (((0, 1, 0, 1), (1, 3, 0, 0)), "lane 0: 1"),
        (((0, 4, 0, 0),), "nothing"),
    ],
)
def test_a_step_that_is_not_one_lane_once_is_told(runs: tuple[tuple[int, int, int, int], ...], said: str) -> None:
    entry = to_line(Entry(0, 0, 16, Tally(3, tuple(LaneRun(*each) for each in runs))))
    assert judge([start(), entry], EXPECTS).faults == [f"step 0: counted {said}; a step is one lane's, once in every table"]
