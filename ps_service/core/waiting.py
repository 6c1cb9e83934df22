"""What a shard that makes no step waits for, for people."""

from __future__ import annotations

from ps_service.core.shard import ShardCore
from shardlane.ids import Step


def waits_for(core: ShardCore) -> str:
    """What the oldest chunk lacks of those that the shard is primary of."""
    mine = [chunk for chunk in core.chunks if core.is_primary(chunk)]
    if not mine:
        return "a plan that makes it a primary"
    chunk = min(mine, key=lambda each: (core.chunks[each].version, core.chunks[each].closed is not None))
    held = core.chunks[chunk]
    where = f"step {held.version} of chunk {chunk}"
    if held.closed is None:
        tables = held.barrier.sites
        lanes = [f"{table.counted:b}".zfill(held.barrier.num_lanes)[::-1] for table in tables]
        return f"lanes of {where}; those marked 1 are in: {', '.join(lanes)}"
    if missing := [each for each in core.backups(chunk) if each not in held.acks]:
        return f"{', '.join(missing)} to hold the sum of {where}"
    return f"the other chunks of step {held.version}; {len(core.book.of(Step(held.version)))} have closed"
