"""The simulator itself: a seed replays, and the oracle can fail."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from ps_service.core.messages import Record
from shardlane.ids import ChunkId, Step, Version
from tests.sim.oracle import BrokenInvariant
from tests.sim.shape import CALM, SHAPES, Shape
from tests.sim.shard import ShardProcess
from tests.sim.walk import FailedSchedule, replay
from tests.sim.world import World

QUIET = Shape(faults={}, weather=CALM)


def trace_of(seed: int) -> list[str]:
    lines: list[str] = []
    World(seed, SHAPES["everything"], lines.append).run()
    return lines


def test_a_seed_replays() -> None:
    assert trace_of(7) == trace_of(7)
    assert trace_of(7) != trace_of(8)


def test_an_undisturbed_world_counts_everything_once() -> None:
    world = World(1, QUIET)
    world.run()
    contributions_a_step = 4 * QUIET.num_replicas  # three chunks, one of them with two sites; a replica's lanes are one block
    assert world.num["counted"] == contributions_a_step * (QUIET.num_steps - 1) + 4 * QUIET.num_lanes  # the first goes by lanes
    assert not {"duplicate", "overlaps", "not_owner", "lost", "struck"} & world.num.keys()


def test_a_schedule_that_nothing_befell_proves_nothing() -> None:
    SHAPES["quiet"] = QUIET
    try:
        with pytest.raises(FailedSchedule, match=r"nothing befell it\n.*--shape 'quiet' --seed 3"):
            replay("quiet", 3)
    finally:
        del SHAPES["quiet"]


def spoil_history(shard: ShardProcess) -> None:
    shard.texts.parameters[ChunkId(0)] = ("another",)


def spoil_sum(shard: ShardProcess) -> None:
    chunk = next(chunk for chunk, held in shard.core.chunks.items() if held.closed is not None)
    shard.texts.sums[chunk] += "+l0@0.0"


def lose_sum(shard: ShardProcess) -> None:
    shard.texts.sums.clear()


def invent_record(shard: ShardProcess) -> None:
    tally = shard.world.oracle.decisions[0, 0].tally
    shard.core.book.learn(Record(Step(shard.core.version), ChunkId(0), 1.0, 4, 0.0, 7, tally))


def publish_early(shard: ShardProcess) -> None:
    shard.world.oracle.publish(0, ChunkId(0), Version(3), shard.texts.parameters[ChunkId(0)])


def publish_another(shard: ShardProcess) -> None:
    shard.world.oracle.publish(0, ChunkId(0), Version(1), ("another",))


def decide_otherwise(shard: ShardProcess) -> None:
    decision = shard.world.oracle.decisions[0, 0]
    shard.world.oracle.decide(0, 0, replace(decision, scale=0.5))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (spoil_history, "1, 2: chunk 0 at version"),
        (spoil_sum, "1: chunk . on"),
        (lose_sum, "record and sum do not go together"),
        (invent_record, "6: .* is told, and .* does not hold the sum"),
        (publish_early, "8: .* before it was applied"),
        (publish_another, "8: version 1 of chunk 0 was published as"),
        (decide_otherwise, "4: two decisions of step 0"),
    ],
)
def test_the_oracle_can_fail(spoil: Callable[[ShardProcess], None], message: str) -> None:
    world = World(1, QUIET)
    world.begin()

    def a_sum_is_held() -> ShardProcess | None:
        """In the second step, by who holds chunk 0."""
        for shard in world.shards.values():
            chunks = shard.core.chunks
            if ChunkId(0) in chunks and shard.core.version == 1 and any(held.closed for held in chunks.values()):
                return shard
        return None

    while (shard := a_sum_is_held()) is None:
        world.step()

    def look() -> None:
        spoil(shard)
        world.on_shard_event(shard)

    with pytest.raises(BrokenInvariant, match=message):
        look()


def test_a_history_that_was_read_torn_is_found() -> None:
    world = World(1, QUIET)
    world.begin()
    while world.version < 1:
        world.step()
    for shard in world.shards.values():
        shard.published = dict.fromkeys(shard.published, Version(2))  # nothing is at that version yet

        def answer(shard: ShardProcess = shard) -> None:
            for call in shard.pulls:
                for chunk in sorted(call.waiting):
                    call.on_data(chunk, shard.texts.parameters[chunk])

        answer()

    def go_on() -> None:
        for _ in range(1000):
            world.step()

    with pytest.raises(BrokenInvariant, match=r"8: version \d of chunk \d was read as"):
        go_on()
