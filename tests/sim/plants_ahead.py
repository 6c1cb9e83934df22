"""Bugs to plant in what SSP adds: several steps open at a time, each computed from an older version (decision 9)."""

from __future__ import annotations

from typing import Any

from ps_service.core.holdings import HeldChunk
from ps_service.core.messages import Close, Effect
from ps_service.core.shard import ShardCore
from shardlane.ids import ChunkId, Lane, Step
from shardlane.lanes import Block
from shardlane.train_config import TrainConfig
from tests.sim.plants import Bug, patch


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
        whole = Block(Lane(0), held.barrier.num_lanes)
        if not held.barrier.has(whole) or held.closed or held.measuring:
            return []
        held.measuring = whole
        return [Close(chunk, Step(held.version), whole)]

    return close


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
}
