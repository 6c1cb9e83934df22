"""Bugs to plant in ASP: a log of single contributions, whose order one chunk decides (decision 10)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ps_service.core.holdings import HeldChunk, Terms
from shardlane import turns
from shardlane.ids import Lane, Timeline, Version
from shardlane.lanes import Block
from shardlane.turns import Clocks, Turn
from tests.sim.plants import Bug, patch
from worker_service.core.events import Await, Effect
from worker_service.core.turns import TurnStepper


def decide_for_itself(take_ready: Any) -> Any:
    def patched(self: HeldChunk, *, decides: bool, decided: Turn | None) -> Block | None:
        return take_ready(self, decides=True, decided=decided)  # type: ignore[no-any-return]

    return patched


def forget_the_clocks(clocks: Any) -> Any:
    def patched(self: Terms, timeline: Timeline) -> Clocks:
        return clocks(self, replace(timeline, clocks=()))  # type: ignore[no-any-return]

    return patched


def wait_in_order(following: Any) -> Any:
    """The lane furthest behind, whether its turn has come or not."""

    def patched(self: TurnStepper) -> list[Effect]:
        if not self._is_first or self._state != "training" or not self._due:
            return following(self)  # type: ignore[no-any-return]
        number = min(self._number_of(each) for each in self._due)
        place, turn = turns.place_of(number, self._num_lanes)
        if turn == self._logged[Lane(place)]:
            return self._pull(number)
        return [Await(self.attempt, (Version(number),))]

    return patched


def keep_the_turns_ahead(_: Any) -> Any:
    def begin(self: HeldChunk) -> None:
        self.barrier, self.turn = self.barrier.anew(), None if self.closed is None else self.closed.turn

    return begin


TURNS: dict[str, Bug] = {
    "every chunk decides": Bug(
        "Each chunk takes the turn that is in first, so they are applied in different orders.",
        patch(HeldChunk, "take_ready", decide_for_itself),
        "ASP, deaths",
    ),
    "clocks of a checkpoint": Bug(
        "A timeline begins as if no lane had learnt from anything.",
        patch(Terms, "clocks", forget_the_clocks),
        "ASP, one copy",
    ),
    "turns waited for in order": Bug(
        "A worker waits for one lane's turn while another's would have to be done again first.",
        patch(TurnStepper, "_next", wait_in_order),
        "ASP, sums that differ in bits, a bad network",
    ),
    "turns ahead of a new primary": Bug(
        "What was counted of open turns counts although its sums were dropped.",
        patch(HeldChunk, "begin", keep_the_turns_ahead),
        "ASP, deaths",
    ),
}
