"""What the figures say of outcomes that are known."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest
from rich.console import Console

from shardlane.chaos.outcome import Outcome, percentile, recovery
from shardlane.chaos.report import Report


def outcome(group: str = "shard, kill", seconds: float | None = 0.5, **changes: Any) -> Outcome:
    made = Outcome(group, group.rpartition(", ")[2], ["shard-0"], step_seconds=0.1, detection_seconds=0.2)
    made.recovery_seconds = seconds
    made.whole_seconds = None if seconds is None else seconds + 4.0
    for name, value in changes.items():
        setattr(made, name, value)
    return made


def report(*outcomes: Outcome, **changes: Any) -> Report:
    fixed = {"version": 90, "digest": "a" * 64, "reference_digest": "a" * 64}
    return Report({"seed": 1}, outcomes, 60.0, **{**fixed, **changes})


def test_recovery_is_the_longest_wait_beyond_a_step() -> None:
    assert recovery(10.0, [10.05, 11.15, 11.25], step_seconds=0.1) == pytest.approx(1.0)  # the open step needed no victim
    assert recovery(10.0, [12.0, 12.1, 12.2], step_seconds=0.1) == pytest.approx(1.9)
    assert recovery(10.0, [10.1, 10.2, 10.3], step_seconds=0.2) == 0.0


def test_recovery_from_silence_counts_from_when_it_was_seen() -> None:
    assert recovery(10.0, [10.1, 19.6, 19.7], step_seconds=0.1, detected=19.0) == pytest.approx(0.5)
    assert recovery(10.0, [12.0, 12.1, 12.2], step_seconds=0.1, detected=10.5) == pytest.approx(1.4)
    assert recovery(10.0, [12.0, 12.1, 12.2], step_seconds=0.1, detected=13.0) == pytest.approx(1.9)  # healed before


def test_percentiles_are_nearest_ranks() -> None:
    values = [float(value) for value in range(1, 31)]
    assert [percentile(values, share) for share in (0.0, 0.5, 0.95, 1.0)] == [1.0, 15.0, 29.0, 30.0]
    assert percentile([3.0], 0.95) == 3.0
    with pytest.raises(ValueError, match="no values"):
        percentile([], 0.5)


def test_a_good_run_misses_nothing() -> None:
    made = report(outcome(), outcome("worker, first stage, kill", 1.9), outcome("coordinator, kill", 30.0))
    assert made.misses() == []  # no target is set for coordinators: nobody waits for them


@pytest.mark.parametrize(
    ("made", "miss"),
    [
        (report(outcome(), reference_digest="b" * 64), "is not the reference's"),
        (report(outcome(), digest=""), "digest none is not"),
        (report(outcome(steps_rolled_back=3)), "shard, kill: 3 steps rolled back"),
        (report(outcome(seconds=None)), "shard, kill: 1 never recovered from"),
        (report(outcome(whole_seconds=None)), "shard, kill: 1 never recovered from"),
        (report(outcome(seconds=2.1)), "shard, kill: recovery p50 2.10 s > 2 s"),
        (report(*[outcome()] * 9, outcome(seconds=6.0)), "shard, kill: recovery p95 6.00 s > 5 s"),
        (report(*[outcome("worker, last stage, stop", 3.0)] * 2), "worker, stop: recovery p50 3.00 s > 2 s"),
        (report(outcome(), failure="no recovery within 60 s"), "no recovery within 60 s"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_each_broken_promise_is_a_line(made: Report, miss: str) -> None:
    assert [line for line in made.misses() if miss in line]


def test_a_roll_back_that_must_be_is_told_and_no_miss() -> None:
    made = report(outcome("shard+backup", 9.0, rolls_back=True, steps_rolled_back=7))
    assert made.misses() == []
    assert made.as_json()["steps_rolled_back"] == 7


def test_the_file_and_the_table_say_the_same() -> None:
    made = report(outcome(), outcome(seconds=1.5), outcome("worker, first stage, kill", 0.25))
    figures = json.loads(json.dumps(made.as_json()))
    assert figures["groups"]["shard, kill"]["recovery_seconds"] == {"p50": 0.5, "p95": 1.5, "max": 1.5}
    assert figures["digest"]["equal"] and figures["machine"]["cores"] and len(figures["faults"]) == 3
    console = Console(width=110, record=True, file=io.StringIO())
    made.show(console)
    shown = console.export_text()
    assert "shard, kill" in shown and "1.50" in shown and "digest equal" in shown and "3 faults in 60 s, 90 steps" in shown
