"""Invariant 2: whatever order blocks arrive in, they add up to one expression."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardlane.ids import Lane
from shardlane.lanes import Block, blocks_of, is_block, join_upwards, lane, lanes_of, mask_of

lane_counts = st.sampled_from([1, 2, 4, 8, 16, 64])


@st.composite
def tilings(draw: st.DrawFn, first: int = 0, size: int | None = None) -> list[Block]:
    """The lanes 0 … L-1 cut into blocks at random, shuffled: an order of arrival."""
    size = size or draw(lane_counts)

    def cut(block: Block) -> list[Block]:
        if block.size == 1 or draw(st.booleans()):
            return [block]
        half = block.size // 2
        return cut(Block(block.first, half)) + cut(Block(Lane(block.first + half), half))

    return draw(st.permutations(cut(Block(Lane(first), size))))


def tree(block: Block) -> str:
    """The canonical expression of a block's sum."""
    if block.size == 1:
        return str(block.first)
    half = block.size // 2
    return f"({tree(Block(block.first, half))}+{tree(Block(Lane(block.first + half), half))})"


@given(tilings())
def test_arrival_order_changes_no_bit(arrivals: list[Block]) -> None:
    num_lanes = sum(block.size for block in arrivals)
    held: set[Block] = set()
    sums: dict[Block, str] = {}
    for block in arrivals:
        sums[block] = tree(block)  # a replica adds its lanes along the same tree
        for left, right in join_upwards(held, block, num_lanes):
            assert left.sibling == right
            assert left < right
            sums[left.parent] = f"({sums.pop(left)}+{sums.pop(right)})"
        assert held == sums.keys(), "each partial sum held has its values"
    assert sums == {Block(Lane(0), num_lanes): tree(Block(Lane(0), num_lanes))}


@given(tilings(size=64))
def test_partial_sums_held_are_at_most_half_the_lanes(arrivals: list[Block]) -> None:
    held: set[Block] = set()
    for block in arrivals:
        list(join_upwards(held, block, 64))
        assert len(held) <= 32


def test_joining_goes_on_upwards() -> None:
    held = {lane(0), lane(2), Block(Lane(4), 4)}
    pairs = list(join_upwards(held, lane(3), 8))
    assert pairs == [(lane(2), lane(3))]
    assert held == {lane(0), Block(Lane(2), 2), Block(Lane(4), 4)}
    pairs = list(join_upwards(held, lane(1), 8))
    assert [(str(left), str(right)) for left, right in pairs] == [("0", "1"), ("0..1", "2..3"), ("0..3", "4..7")]
    assert held == {Block(Lane(0), 8)}


@given(st.integers(0, (1 << 64) - 1))
def test_the_fewest_blocks_cover_exactly_a_mask(mask: int) -> None:
    blocks = blocks_of(mask)
    assert blocks == sorted(blocks)
    assert sum(block.mask for block in blocks) == mask, "disjoint, and nothing else"
    assert all(is_block(block.first, block.size, 1 << 62) for block in blocks)
    assert all(block.sibling not in blocks for block in blocks), "two siblings would be one block"
    assert mask_of(lanes_of(mask)) == mask
    assert [index for block in blocks for index in block.lanes] == lanes_of(mask)


@given(st.integers(0, 63), st.integers(0, 6))
def test_parents_and_siblings(first: int, power: int) -> None:
    block = Block(Lane(first << power), 1 << power)
    assert block.sibling.sibling == block
    assert block.parent == block.sibling.parent
    assert block.parent.mask == block.mask | block.sibling.mask
    assert block.mask == mask_of(block.lanes)


@pytest.mark.parametrize(
    ("first", "size", "num_lanes", "answer"),
    [
        (0, 1, 1, True), (0, 8, 8, True), (4, 4, 8, True), (6, 2, 8, True), (7, 1, 8, True),
        (0, 0, 8, False), (0, 3, 8, False), (2, 4, 8, False), (8, 1, 8, False), (4, 8, 8, False), (0, 16, 8, False),
        (-1, 1, 8, False), (-4, 4, 8, False), (0, -1, 8, False),
    ],
)  # fmt: skip
def test_what_a_peer_may_call_a_block(first: int, size: int, num_lanes: int, answer: bool) -> None:
    assert is_block(first, size, num_lanes) is answer


def test_names_read_well() -> None:
    assert [str(block) for block in (lane(3), Block(Lane(4), 4))] == ["3", "4..7"]
