"""Who computes: stages, replicas, and how many lanes each runs; slow ones run fewer, and idle workers run a lagging one's too.

A lane's time is what a worker reports of its own computing, without waiting for others; a replica is as slow as its slowest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise
from statistics import mean
from typing import NamedTuple

from coordinator.core.placement import Row, cover, seat_workers, share_by_speed, share_lanes
from shardlane.ids import Incarnation, PlanNumber, Version
from shardlane.lanes import Block
from shardlane.partition import StageLayers
from shardlane.plan import Replica

UNEVEN = 1.5  # times slower than another: lanes may move; less is noise
WORTHWHILE = 1.4  # times as long as need be: they do
LAGGING = 2.0  # times later than the first: another runs its lanes as well
CAUGHT_UP = 1.4  # and no longer than until then

Share = tuple[Block, ...]


class Seating(NamedTuple):
    stages: tuple[StageLayers, ...]
    replicas: tuple[Replica, ...]

    @property
    def chains(self) -> list[tuple[Row, Share]]:
        """What a plan must agree with, whenever its replicas were formed."""
        return [(each.workers, each.blocks) for each in self.replicas]


def seat(
    workers: Sequence[Incarnation],
    lane_seconds: Mapping[Incarnation, float],
    *,
    stages: tuple[StageLayers, ...],
    num_replicas: int,
    num_lanes: int,
    previous: Sequence[Replica],
    number: PlanNumber,
    begins_at: Version,
) -> Seating:
    """Replicas of `previous` that stay as they are keep the plan that formed them and where they begin."""
    before = [each for each in previous if len(each.workers) == len(stages)]
    rows = seat_workers(workers, stages=len(stages), replicas=num_replicas, previous=[each.workers for each in _in_order(before)])
    seconds = [_row_seconds(row, lane_seconds) for row in rows]
    shares = _shares(rows, seconds, num_lanes, before)
    chains = [(row, share, False) for row, share in zip(rows, shares, strict=True) if share]
    idle = [worker for worker in workers if not any(worker in row for row, _, _ in chains)]
    chains += _shadows(idle, chains, rows, seconds, len(stages), before)
    known = {(each.workers, each.blocks, each.is_shadow): each for each in previous}
    replicas = (known.get(chain) or Replica(*chain[:2], number, begins_at, chain[2]) for chain in chains)
    return Seating(stages, tuple(replicas))


def _in_order(previous: Sequence[Replica]) -> list[Replica]:
    """Who shadows another has a seat of its own in view, behind those who work."""
    return sorted(previous, key=lambda each: each.is_shadow)


def _row_seconds(row: Row, lane_seconds: Mapping[Incarnation, float]) -> float:
    """Of its slowest worker; 0: not known."""
    told = [lane_seconds.get(worker, 0.0) for worker in row]
    return max(told) if all(told) else 0.0


def _shares(rows: Sequence[Row], seconds: Sequence[float], num_lanes: int, previous: Sequence[Replica]) -> list[Share]:
    """Equal ones, unless replicas are known to be of different speed; those that there are, while they are good enough."""
    equal = share_lanes(num_lanes, len(rows))
    known = [each for each in seconds if each]
    if not known:
        return _kept(rows, previous, num_lanes) or equal
    guessed = [each or mean(known) for each in seconds]
    wanted = equal
    if max(guessed) > UNEVEN * min(guessed):
        ends = list(accumulate(share_by_speed(num_lanes, guessed), initial=0))
        wanted = [cover(first, end) for first, end in pairwise(ends)]
    kept = _kept(rows, previous, num_lanes)
    if kept and _slowest(kept, guessed) <= WORTHWHILE * _slowest(wanted, guessed):
        return kept
    return wanted


def _kept(rows: Sequence[Row], previous: Sequence[Replica], num_lanes: int) -> list[Share] | None:
    """The shares of `previous`, if its rows are these."""
    before = {each.workers: () if each.is_shadow else each.blocks for each in previous}
    shares = [before[row] for row in rows if row in before]
    is_whole = len(shares) == len(rows) and sum(block.size for share in shares for block in share) == num_lanes
    return shares if is_whole else None


def _slowest(shares: Sequence[Share], seconds: Sequence[float]) -> float:
    return max(sum(block.size for block in share) * each for share, each in zip(shares, seconds, strict=True))


def _shadows(
    idle: Sequence[Incarnation],
    chains: Sequence[tuple[Row, Share, bool]],
    rows: Sequence[Row],
    seconds: Sequence[float],
    num_stages: int,
    previous: Sequence[Replica],
) -> list[tuple[Row, Share, bool]]:
    """A replica that lags behind another is run by an idle chain as well; and one that got no lane shows how fast it is."""
    of_row = dict(zip(rows, seconds, strict=True))
    due = {row: sum(block.size for block in share) * of_row[row] for row, share, _ in chains}
    latest = max(due, key=due.__getitem__)
    before = [each.workers for each in previous if each.is_shadow]
    is_lagging = all(due.values()) and due[latest] > (CAUGHT_UP if before else LAGGING) * min(due.values())
    if not is_lagging and len(chains) == len(rows):
        return []
    shadows = seat_workers(idle, stages=num_stages, replicas=1, previous=before)
    return [(row, share, True) for row in shadows for other, share, _ in chains if other == latest]
