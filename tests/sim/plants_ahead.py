"""Bugs to plant in what SSP adds: several steps open at a time, each computed from an older version (decision 9)."""

from __future__ import annotations

from typing import Any

from ps_service.core.holdings import HeldChunk
from ps_service.core.messages import Close, Effect
from ps_service.core.shard import ShardCore
from shardlane.config import TrainConfig
from shardlane.ids import ChunkId, Step, Version
from shardlane.plan import Plan
from tests.sim.plants import Bug, patch
from worker_service.core.stepper import Stepper


def read_fresher(reads: Any) -> Any:
    def patched(self: TrainConfig, step: int) -> int:
        return min(step, int(reads(self, step)) + 1)

    return patched


def keep_ahead(_: Any) -> Any:
    def begin(self: HeldChunk) -> None:
        self.barrier = self.barrier.anew()

    return begin


def close_beyond_the_end(_: Any) -> Any:
    def close(self: ShardCore, chunk: ChunkId) -> list[Effect]:
        held = self.chunks[chunk]
        if not held.barrier.complete or held.closed or held.measuring:
            return []
        held.measuring = True
        return [Close(chunk, Step(held.version))]

    return close


def change_seats_early(begins_at: Any) -> Any:
    def patched(self: Stepper, plan: Plan) -> Version:
        return Version(max(0, begins_at(self, plan) - 1))

    return patched


def stay_in_closed_steps(_: Any) -> Any:
    def on_ran(self: Stepper, published: Version) -> list[Any]:
        return self._next_run()

    return on_ran


AHEAD: dict[str, Bug] = {
    "a fresher version read": Bug(
        "A step is computed from a newer version than the others'.",
        patch(TrainConfig, "reads", read_fresher),
        "one-step delay, deaths",
    ),
    "lanes ahead of a new primary": Bug(
        "What was counted of later steps counts although its sums were dropped.",
        patch(HeldChunk, "begin", keep_ahead),
        "one-step delay, deaths",
    ),
    "closed beyond the end": Bug(
        "A step after the one where the run was to stop is made.",
        patch(ShardCore, "_close", close_beyond_the_end),
        "one-step delay, pipelines",
    ),
    "seats changed early": Bug(
        "A worker leaves a seat while a step that it has pushed in it is open.",
        patch(Stepper, "_begins_at", change_seats_early),
        "SSP, everything",
    ),
    "closed steps not left": Bug(
        "A stage that others have overtaken goes on to the next step, and its neighbour waits for it.",
        patch(Stepper, "_on_ran", stay_in_closed_steps),
        "SSP, everything",
    ),
}
