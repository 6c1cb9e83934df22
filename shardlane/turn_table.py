"""ASP in one process: whose turn comes next, as a run's ledger tells it, or round and round."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from shardlane import turns
from shardlane.config import Config
from shardlane.ids import Lane, Timeline, Version
from shardlane.turns import Turn


@dataclass(frozen=True)
class Order:
    """Whose contribution led from each version, from 0 on, to the next; and the versions where a timeline began, from which then
    every lane went on."""

    lanes: Sequence[Lane]
    restarts: frozenset[int] = frozenset()


class TurnTable:
    """Where the lanes stand. `begin` first."""

    def __init__(self, config: Config, order: Order | None) -> None:
        self._train, self._order = config.train, order
        self._clocks: turns.Clocks = ()

    @property
    def learnt(self) -> tuple[int, ...]:
        """Batches that each lane has learnt from."""
        return tuple(each.clock for each in self._clocks)

    @property
    def num_steps(self) -> int:
        return sum(self.learnt) // self._train.lanes

    @property
    def is_at_a_step(self) -> bool:
        return sum(self.learnt) % self._train.lanes == 0

    def begin(self, timeline: Timeline) -> None:
        self._clocks = turns.beginning(timeline, self._train.lanes)

    def is_over(self, version: Version) -> bool:
        return self._order is not None and version >= len(self._order.lanes)

    def restarts_at(self, version: Version) -> bool:
        return self._order is not None and version in self._order.restarts

    def next(self, version: Version) -> tuple[int, int, Turn]:
        """The lane whose turn follows `version`, which of its batches it is computed of, and the turn."""
        lane = Lane(version % self._train.lanes) if self._order is None else self._order.lanes[version]
        return lane, self._clocks[lane].clock, turns.turn_at(self._clocks, lane, version)

    def take(self, turn: Turn, version: Version) -> bool:
        """The turn leads on from `version`. Whether it is refused."""
        refused = turns.is_refused(turn, self._train.staleness_max)
        self._clocks = turns.after(self._clocks, turn, Version(version + 1), refused=refused)
        return refused
