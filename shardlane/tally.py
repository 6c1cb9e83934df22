"""How often lanes were counted: the figures of the ledger, on their way from a shard's barrier to RUN_DIR/ledger.jsonl.

A table is one site of one chunk in one step. Figures are the least and the most over all tables and never a sum, in which a lane
that was counted twice here and not at all there would look right.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import groupby
from operator import or_
from typing import NamedTuple

from shardlane.lanes import Block


class LaneRun(NamedTuple):
    """Lanes `first … first + size - 1`, all with the same figures."""

    first: int
    size: int
    least: int  # how often each of them was counted in the table that counted it least
    most: int  # and in the one that counted it most

    @property
    def is_exact(self) -> bool:
        """Counted exactly once in every table."""
        return (self.least, self.most) == (1, 1)


@dataclass(frozen=True, slots=True)
class Tally:
    """Over `tables` tables. `runs` name every lane once, in order."""

    tables: int
    runs: tuple[LaneRun, ...]

    @classmethod
    def of_table(cls, blocks: Sequence[Block], num_lanes: int) -> Tally:
        """Of one table, by the blocks that were added in there."""
        covered = reduce(or_, (block.mask for block in blocks), 0)
        if sum(block.size for block in blocks) == num_lanes and covered == (1 << num_lanes) - 1:
            return cls(1, (LaneRun(0, num_lanes, 1, 1),))  # as ever, and without a walk over the lanes
        counts = [0] * num_lanes
        for block in blocks:
            for lane in block.lanes:
                counts[lane] += 1
        return cls(1, _runs((count, count) for count in counts))

    @classmethod
    def over(cls, tallies: Sequence[Tally]) -> Tally:
        """Over the tables of all of them: at least one, each of the same lanes."""
        tables = sum(tally.tables for tally in tallies)
        different = {tally.runs for tally in tallies}
        if len(different) == 1:
            return cls(tables, different.pop())
        by_lane = zip(*([run for run in runs for _ in range(run.size)] for runs in different), strict=True)
        return cls(tables, _runs((min(run.least for run in lane), max(run.most for run in lane)) for lane in by_lane))


def are_runs(runs: Sequence[LaneRun], num_lanes: int) -> bool:
    """Whether somebody's numbers name each of `num_lanes` lanes once, in order, with figures that can be."""
    end = 0
    for run in runs:
        if run.first != end or run.size < 1 or not 0 <= run.least <= run.most:
            return False
        end += run.size
    return end == num_lanes


def _runs(figures: Iterable[tuple[int, int]]) -> tuple[LaneRun, ...]:
    """`figures`: (least, most) of each lane, from lane 0."""
    runs: list[LaneRun] = []
    for (least, most), lanes in groupby(figures):
        first = runs[-1].first + runs[-1].size if runs else 0
        runs.append(LaneRun(first, sum(1 for _ in lanes), least, most))
    return tuple(runs)
