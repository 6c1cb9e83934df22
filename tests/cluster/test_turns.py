"""ASP in real processes, which die: every batch of every lane counts once, and the ledger's order gives the same bits again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cluster.processes import TINY, shardlane
from tests.cluster.test_kills import HASTE, PLACES, RUN_SECONDS_MAX, SHAPE
from tests.cluster.threads import comparable, rows_of

ASP = ["--train.consistency", "asp", "--validation.every_steps", "0"]


@pytest.mark.timeout(RUN_SECONDS_MAX)
def test_kills_cost_no_contribution_and_the_ledger_repeats_the_run_bit_for_bit(tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    bound = ["--train.staleness_max", "6"]
    shardlane(
        *("chaos", "--run-dir", str(tmp_path), "--json", str(file), *HASTE, *SHAPE, "1", "--faults", "1", *ASP, *bound),
        seconds_max=RUN_SECONDS_MAX,
    )
    figures = json.loads(file.read_text(encoding="utf-8"))
    assert {name: group["faults"] for name, group in figures["groups"].items()} == {f"{each}, kill": 1 for each in PLACES}
    assert figures["digest"]["equal"], figures["digest"]
    assert figures["steps_rolled_back"] == 0
    assert "exactly once" in shardlane("ledger", str(tmp_path))
    ours, theirs = ([row for row in rows_of(each) if "loss" in row] for each in (tmp_path, tmp_path / "reference"))
    assert comparable(ours) == comparable(theirs)


def test_a_run_ends_with_its_clocks_validates_and_goes_on_from_where_its_lanes_were(tmp_path: Path) -> None:
    """Two replicas of two stages, with a pause in the midst of the schedule and another cluster afterwards."""
    run_dir, shape = str(tmp_path / "run"), ["--stages", "2", "--replicas", "2", "--shards", "2"]
    shardlane("local", str(TINY), "--run-dir", run_dir, *shape, *ASP, "--train.max_steps", "6", "--train.stop_at_step", "3")
    ended = shardlane("local", str(TINY), "--run-dir", run_dir, "--shards", "1", *ASP, "--train.max_steps", "6")
    assert "6 of 6" in ended and "validation" in ended
    again = shardlane("local", str(TINY), "--run-dir", run_dir, *ASP, "--train.max_steps", "6")
    assert "is finished" in again
    repeated = str(tmp_path / "again")
    ledger = str(tmp_path / "run" / "ledger.jsonl")
    shardlane("reference", str(TINY), "--run-dir", repeated, "--ledger", ledger, *ASP, "--train.max_steps", "6")
    assert shardlane("digest", run_dir) == shardlane("digest", repeated)
    assert "24 steps" in shardlane("ledger", run_dir), "of one lane each"
