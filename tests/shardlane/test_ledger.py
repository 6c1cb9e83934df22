"""The ledger's judge: what proves a run, and that each way to break it is found and named."""

from __future__ import annotations

from dataclasses import replace

import pytest

from shardlane import config as configs
from shardlane.ledger import Account, Entry, Expected, RollBack, TimelineStart, from_line, judge, to_line
from shardlane.tally import LaneRun, Tally

EXPECTS = Expected(tables=3, lanes=4, micro_batches=8, tokens=64)
ONCE = Tally(3, (LaneRun(0, 4, 1, 1),))


def start(timeline: int = 0, version: int = 0, lost_steps: int = 0, expects: Expected = EXPECTS) -> bytes:
    return to_line(TimelineStart(timeline, version, lost_steps, f"reason {timeline}", expects))


def entries(first: int, end: int, timeline: int = 0) -> list[bytes]:
    return [to_line(Entry(step, timeline, 64, ONCE)) for step in range(first, end)]


def entry(step: int, *runs: tuple[int, int, int, int], tables: int = 3, tokens: int = 64) -> bytes:
    return to_line(Entry(step, 0, tokens, Tally(tables, tuple(LaneRun(*run) for run in runs) or ONCE.runs)))


def faults(*lines: bytes, reached: int = 0) -> list[str]:
    return judge(lines, EXPECTS, reached=reached).faults


def test_an_undisturbed_run_is_proved() -> None:
    account = judge([start(), *entries(0, 10)], EXPECTS, reached=10)
    assert account == Account(EXPECTS, 0, 10, 0, 10, 80, restarts=[0])


def test_what_a_config_makes_of_a_step() -> None:
    train = {"lanes": 4, "micro_batch_size": 2, "global_batch_size": 16, "seq_len": 32}
    untied = Expected.of(configs.build({"model": {"preset": "tiny"}, "train": train}))
    tied = Expected.of(configs.build({"model": {"preset": "tiny", "tie_word_embeddings": True}, "train": train}))
    assert untied == tied == Expected(39, 4, 8, 512)  # 4 layers of 9 tensors, final norm, embedding and head, which may be one


def test_lines_say_what_was_written_and_are_short() -> None:
    flags = [Entry(399, 1, 64, ONCE, skipped=True), Entry(7, 0, 64, ONCE, refused=True)]
    items = [*flags, TimelineStart(1, 20, 12, "shard-1 is gone", EXPECTS)]
    assert [from_line(to_line(item)) for item in items] == items
    assert to_line(Entry(399, 0, 8192, Tally(77, ONCE.runs))) == (
        b'{"step":399,"timeline":0,"tokens":8192,"tables":77,"lanes":[[0,4,1,1]]}\n'
    )


def test_a_roll_back_supersedes_what_it_takes_back() -> None:
    lines = [start(), *entries(0, 32), start(1, 20, 12), *entries(20, 40, timeline=1)]
    account = judge(lines, EXPECTS, reached=40)
    assert (account.faults, account.num_steps, account.num_entries) == ([], 40, 52)
    assert account.roll_backs == [RollBack(1, 20, 12, "reason 1")]
    again = judge([*lines, start(2, 0, 40), *entries(0, 3, timeline=2)], EXPECTS)
    assert (again.faults, again.num_steps, [each.num_superseded for each in again.roll_backs]) == ([], 3, [12, 40])


def test_a_run_taken_up_where_it_ended_supersedes_nothing() -> None:
    account = judge([start(), *entries(0, 20), start(1, 20), *entries(20, 24, timeline=1)], EXPECTS)
    assert (account.faults, account.roll_backs, account.num_steps) == ([], [], 24)


def test_a_ledger_that_begins_with_a_later_version_covers_the_steps_from_there() -> None:
    account = judge([start(3, 20), *entries(20, 24, timeline=3)], EXPECTS, reached=24)
    assert (account.faults, account.first_step, account.num_steps) == ([], 20, 4)
    assert faults(start(3, 20), *entries(20, 24, timeline=3), start(4, 10), *entries(12, 13, timeline=4)) == [
        "steps 10..11: no entry"
    ]


def test_a_fault_that_was_rolled_back_is_none() -> None:
    assert faults(start(), *entries(0, 3), entry(3, (0, 4, 1, 2)), start(1, 2), *entries(2, 4, timeline=1)) == []


def test_a_fork_is_measured_by_its_own_config_from_where_it_began() -> None:
    wider = Expected(3, 4, 16, 128)
    forked = [to_line(Entry(step, 1, 128, ONCE)) for step in range(2, 4)]
    account = judge([start(), *entries(0, 2), start(1, 2, expects=wider), *forked], wider)
    assert (account.faults, account.num_micro_batches) == ([], 2 * 8 + 2 * 16)


def test_the_same_fact_told_twice_is_one_fact() -> None:
    assert faults(start(), *entries(0, 3), *entries(1, 3), *entries(3, 4)) == []


def test_a_last_line_that_is_being_written_is_left_out() -> None:
    account = judge([start(), *entries(0, 3), entries(3, 4)[0][:-9]], EXPECTS)
    assert (account.faults, account.num_steps) == ([], 3)


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        ([entry(0), entry(1, (0, 2, 1, 1), (2, 1, 1, 2), (3, 1, 1, 1))],
         "step 1, lane 2 (micro-batches 4..5): counted 2 times in a table"),
        ([entry(0, (0, 2, 1, 1), (2, 2, 0, 1))], "step 0, lanes 2..3 (micro-batches 4..7): counted 0 times in a table"),
        ([entry(0, (0, 1, 0, 2), (1, 3, 1, 1))], "step 0, lane 0 (micro-batches 0..1): counted 2 times in a table"),
        ([entry(0, (0, 3, 1, 1))], "step 0: lanes [[0, 3, 1, 1]] are not lanes 0..3, each once"),
        ([entry(0, (0, 5, 1, 1))], "step 0: lanes [[0, 5, 1, 1]] are not lanes 0..3, each once"),
        ([entry(0, tables=2)], "step 0: counted in 2 tables; the model has 3"),
        ([entry(0, tokens=63)], "step 0: 63 tokens counted; the config makes them 64"),
        ([entry(0), entry(2)], "step 1: no entry"),
        ([entry(3)], "steps 0..2: no entry"),
        ([entry(0), entry(0, tokens=32)], "step 0: there are two entries in timeline 0, and they differ"),
        ([entry(0), *entries(1, 2, timeline=1)], "line 3: step 1 is of timeline 1, which has not begun there"),
        ([entry(0), b"garbage\n", entry(1)], "line 3: "),
        ([b'{"step":-1,"timeline":0,"tokens":1,"tables":1,"lanes":[]}\n'], "line 2: found -1 where a count was expected"),
        ([b'{"step":true,"timeline":0,"tokens":1,"tables":1,"lanes":[]}\n'], "line 2: found True where a count"),
        ([b"[]\n"], "line 2: not a line of a ledger"),
        ([entry(0), start(1, 1, expects=replace(EXPECTS, lanes=2))], "the newest timeline was begun for 2 lanes a step"),
    ],
)  # fmt: skip
def test_each_violation_is_found_and_named(lines: list[bytes], says: str) -> None:
    found = faults(start(), *lines)
    assert found and found[0].startswith(says), found


def test_a_ledger_that_ends_before_the_newest_checkpoint_has_lost_its_end() -> None:
    assert faults(start(), *entries(0, 3), reached=3) == []
    assert faults(start(), *entries(0, 3), reached=5) == ["steps 3..4: no entry; there is a checkpoint of version 5"]


def test_an_entry_before_any_timeline_is_a_fault() -> None:
    assert faults(*entries(0, 1)) == ["line 1: step 0 is of timeline 0, which has not begun there"]
