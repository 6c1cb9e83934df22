"""Random walks over the real cores: every seed is one schedule, and every schedule must have got somewhere."""

from __future__ import annotations

from collections import Counter

import pytest

from tests.sim.world import BrokenInvariant, Shape, World

SHAPES = {
    "one owner": Shape(),
    "one shard": Shape(num_shards=1, num_chunks=2, num_lanes=2),
    "replicated": Shape(replication=2),
    "replicated twice, one lane": Shape(replication=3, num_lanes=1),
    "a bad network": Shape(replication=2, lose=0.4, double=0.4),
}


@pytest.mark.parametrize("name", SHAPES)
def test_every_schedule_ends_with_the_canonical_sums(name: str) -> None:
    total = Counter[str]()
    for seed in range(60):
        world = World(seed, SHAPES[name])
        try:
            world.run()
        except BrokenInvariant as broken:
            pytest.fail(f"World({seed}, SHAPES[{name!r}]).run(): {broken}")
        assert all(core.version == world.shape.num_steps for core in world.cores.values()), f"seed {seed} got stuck"
        total += world.num
    assert total["duplicate"] > 100, "no retry: the walk proves nothing"
    if SHAPES[name].num_lanes > 1:
        assert total["overlaps"] > 100, "no partly counted block: the walk proves nothing"
    if SHAPES[name].num_shards > 1:
        assert total["lost"] > 100
        assert total["doubled"] > 100


def test_a_seed_replays() -> None:
    first, second = World(7, SHAPES["replicated"]), World(7, SHAPES["replicated"])
    first.run(), second.run()
    assert first.num == second.num


def test_a_sum_in_order_of_arrival_is_caught() -> None:
    """The oracle can fail: with joins done in arrival order, the first schedule breaks the canonical sum."""
    world = World(1, SHAPES["one owner"])
    original = world.close

    def by_arrival(me: object, chunk: object) -> object:
        partials = world.tensors[me].partials  # type: ignore[index]
        for key in [key for key in partials if key[0] == chunk]:
            partials[key] = partials[key][::-1]
        return original(me, chunk)  # type: ignore[arg-type]

    world.close = by_arrival  # type: ignore[method-assign,assignment]
    with pytest.raises(BrokenInvariant, match="1, 2"):
        world.run()
