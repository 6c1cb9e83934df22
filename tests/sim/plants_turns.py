"""Bugs to plant in ASP: a log of single contributions, whose order one chunk decides (decision 10)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ps_service.core.holdings import HeldChunk, Terms
from shardlane.ids import Timeline
from shardlane.lanes import Block
from shardlane.turns import Clocks, Turn
from tests.sim.plants import Bug, patch


def decide_for_itself(take_ready: Any) -> Any:
    def patched(self: HeldChunk, *, decides: bool, decided: Turn | None) -> Block | None:
        return take_ready(self, decides=True, decided=decided)  # type: ignore[no-any-return]

    return patched


def forget_the_clocks(clocks: Any) -> Any:
    def patched(self: Terms, timeline: Timeline) -> Clocks:
        return clocks(self, replace(timeline, clocks=()))  # type: ignore[no-any-return]

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
    "turns ahead of a new primary": Bug(
        "What was counted of open turns counts although its sums were dropped.",
        patch(HeldChunk, "begin", keep_the_turns_ahead),
        "ASP, deaths",
    ),
}
