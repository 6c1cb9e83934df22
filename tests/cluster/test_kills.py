"""Processes of real runs die, hang and are cut off, by `shardlane chaos`: nothing is lost, not even a bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.processes import shardlane
from tests.cluster.threads import comparable, rows_of

SHAPE = ["--stages", "3", "--shards", "2", "--replicas"]  # a first, a middle and a last stage
PLACES = ["coordinator", "shard", "worker, first stage", "worker, last stage", "worker, middle stage"]
HASTE = ["--worker-mtbf", "1", "--shard-mtbf", "1", "--coordinator-mtbf", "1"]
RUN_SECONDS_MAX = 3000.0


def chaos(folder: Path, *arguments: str) -> dict[str, Any]:
    """The figures of a run in `folder`. Whether it was fast enough is `make evidence`'s to say, on a machine of its own."""
    file = folder / "figures.json"
    shardlane("chaos", "--run-dir", str(folder), "--json", str(file), *HASTE, *arguments, seconds_max=RUN_SECONDS_MAX)
    figures: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return figures


def assert_nothing_was_lost(folder: Path, figures: dict[str, Any], *, groups: list[str], each: int) -> None:
    assert {name: group["faults"] for name, group in figures["groups"].items()} == dict.fromkeys(groups, each)
    assert all(fault["recovery_seconds"] is not None and fault["whole_seconds"] is not None for fault in figures["faults"])
    assert figures["digest"]["equal"], figures["digest"]
    assert comparable(rows_of(folder)) == comparable(rows_of(folder / "reference"))
    assert "exactly once" in (proof := shardlane("ledger", str(folder))) and "superseded" not in proof
    assert figures["steps_rolled_back"] == 0
    assert "rolled back" not in (folder / "logs" / "coordinator.log").read_text(encoding="utf-8")


@pytest.mark.timeout(RUN_SECONDS_MAX)
@pytest.mark.parametrize(
    ("replicas", "each", "seed"),
    [
        pytest.param(1, 3, 1, marks=pytest.mark.long),
        *(pytest.param(2, 10, seed, marks=pytest.mark.slow) for seed in (2, 3, 4)),
    ],  # the fewest processes start soonest
    ids=str,
)
def test_killed_processes_cost_no_step_and_no_bit(tmp_path: Path, replicas: int, each: int, seed: int) -> None:
    figures = chaos(tmp_path, *SHAPE, str(replicas), "--faults", str(each), "--seed", str(seed))
    assert_nothing_was_lost(tmp_path, figures, groups=[f"{place}, kill" for place in PLACES], each=each)


@pytest.mark.long
@pytest.mark.timeout(RUN_SECONDS_MAX)
def test_local_steps_and_what_is_rounded_by_chance_come_out_alike_again(tmp_path: Path) -> None:
    changed = ["--communication.push", "int8_stochastic", "--communication.pull", "bf16", "--train.local_steps", "2"]
    figures = chaos(tmp_path, *SHAPE, "1", "--faults", "1", *changed)
    assert_nothing_was_lost(tmp_path, figures, groups=[f"{place}, kill" for place in PLACES], each=1)


@pytest.mark.timeout(RUN_SECONDS_MAX)
def test_kills_with_several_steps_open_cost_no_step_and_no_bit(tmp_path: Path) -> None:
    figures = chaos(
        tmp_path,
        *SHAPE,
        "1",
        "--faults",
        "1",
        "--train.consistency",
        "ssp",
        "--train.staleness",
        "1",
        "--train.look_ahead",
        "true",
    )
    assert_nothing_was_lost(tmp_path, figures, groups=[f"{place}, kill" for place in PLACES], each=1)


@pytest.mark.slow
@pytest.mark.timeout(RUN_SECONDS_MAX)
@pytest.mark.parametrize("kind", ["stop", "half-open"])
def test_what_hangs_or_is_cut_off_and_comes_back_harms_nothing(tmp_path: Path, kind: str) -> None:
    figures = chaos(tmp_path, *SHAPE, "2", "--faults", "3", "--kinds", kind)
    assert_nothing_was_lost(tmp_path, figures, groups=[f"{place}, {kind}" for place in PLACES], each=3)


@pytest.mark.slow
@pytest.mark.timeout(RUN_SECONDS_MAX)
@pytest.mark.parametrize("pair", ["worker+shard", "shard+coordinator"])
def test_two_deaths_at_once_cost_no_step_and_no_bit(tmp_path: Path, pair: str) -> None:
    figures = chaos(tmp_path, "--faults", "10", "--pairs", pair)
    assert_nothing_was_lost(tmp_path, figures, groups=[pair], each=10)


@pytest.mark.slow
@pytest.mark.timeout(RUN_SECONDS_MAX)
def test_the_death_of_every_copy_costs_steps_and_no_bit(tmp_path: Path) -> None:
    figures = chaos(tmp_path, "--faults", "2", "--pairs", "shard+backup", "--checkpoint.every_steps", "20")
    assert figures["steps_rolled_back"] > 0 and figures["digest"]["equal"]
    assert comparable(rows_of(tmp_path)) == comparable(rows_of(tmp_path / "reference"))
    assert figures["misses"] == [] and len(figures["faults"]) == 2
