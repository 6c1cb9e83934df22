"""The schedules that the tests walk, in two files of equal work, for two cores: 13,500 of them, and 4,500 in `make test`."""

from __future__ import annotations

from collections import Counter

import pytest

from tests.sim.walk import walk

NUM_SEEDS = 540
BLOCK = 180  # seeds a test
BLOCKS = [0, *(pytest.param(block, marks=pytest.mark.long) for block in range(1, NUM_SEEDS // BLOCK))]

HAPPENS: dict[str, str] = {
    # What must have happened in each of a shape's blocks, or the walk proves nothing.
    "deaths": "kill shard, kill worker, roll-backs, asked in sync, duplicate, not_owner, stale",
    "deaths, sums that differ in bits": "kill shard, kill worker, roll-backs, checkpoint, measured",
    "deaths in a bad network": "kill shard, kill worker, roll-backs, lost, doubled",
    "deaths of pipelines": "kill worker, kill shard, lost",
    "silences": "stop shard, stop worker, part shard, part worker, part all, registered again, cut, stale",
    "silences, sums that differ in bits": "stop shard, part shard, registered again, checkpoint, measured",
    "silences of pipelines": "stop shard, part worker, registered again",
    "three copies, one lane": "kill shard, stop shard, registered again, asked in sync",
    "one copy": "kill shard, roll-backs, checkpoints",
    "one copy of pipelines": "kill shard, roll-backs, checkpoints",
    "one-step delay, deaths": "kill shard, kill worker, roll-backs, computed ahead, duplicate, not_owner",
    "one-step delay, comings, a bad network": "join shard, join worker, leave shard, leave worker, computed ahead",
    "one-step delay, pipelines": "stop shard, part shard, leave worker, registered again, computed ahead",
    "SSP, everything": "kill shard, kill coordinator, part shard, leave shard, checkpoint, pause run, lost, computed ahead",
    "SSP after a warm-up": "kill shard, kill worker, join worker, leave shard, roll-backs, computed ahead",
    "ASP, deaths": "kill shard, kill worker, roll-backs, asked in sync, duplicate, not_owner, stale",
    "ASP, sums that differ in bits, a bad network": "kill shard, kill worker, roll-backs, checkpoint, measured, lost, doubled",
    "ASP, comings and silences of pipelines": "join shard, leave worker, stop worker, part shard, registered again, stop run",
    "ASP, one copy": "kill shard, kill worker, roll-backs, checkpoints",
    "ASP, everything": "kill shard, kill coordinator, stop shard, part shard, leave shard, checkpoint, pause run, roll-backs",
    "a coordinator that dies": "kill coordinator, stop coordinator, part coordinator, kill shard",
    "comings and goings": "join shard, join worker, leave shard, leave worker, asked in sync",
    "comings and goings of pipelines": "join shard, join worker, leave shard, leave worker",
    "everything": "kill shard, kill coordinator, stop shard, part shard, leave shard, checkpoint, pause run, roll-backs",
    "everything, zero bubble, a bad network": "kill shard, kill coordinator, lost, doubled, roll-backs",
}


def check(name: str, block: int) -> None:
    """Every schedule ends as if nothing had happened, after faults that mattered."""
    total = walk(name, range(block * BLOCK, (block + 1) * BLOCK)).num
    seldom = Counter({what: total[what] for what in HAPPENS[name].split(", ") if total[what] < BLOCK // 24})
    assert not seldom, f"{name}: too seldom in {BLOCK} schedules"
    assert total["commits"] > 3 * BLOCK
