"""Lanes, blocks, and the one order in which they add up (DESIGN.md, invariants 1 and 2).

A block is an aligned run of 2^k lanes: a node of the binary tree over the lanes. Whatever order blocks arrive in, joining
siblings as soon as both are there yields the same expression, so arrival order cannot change a bit.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from shardlane.ids import Lane


@dataclass(frozen=True, order=True, slots=True)
class Block:
    """Lanes `first … first + size - 1`; `size` is a power of two that divides `first`."""

    first: Lane
    size: int

    @property
    def lanes(self) -> range:
        return range(self.first, self.first + self.size)

    @property
    def mask(self) -> int:
        """Bit l is set for each lane l of the block."""
        return ((1 << self.size) - 1) << self.first

    @property
    def parent(self) -> Block:
        return Block(Lane(self.first & ~(2 * self.size - 1)), 2 * self.size)

    @property
    def sibling(self) -> Block:
        return Block(Lane(self.first ^ self.size), self.size)

    def __str__(self) -> str:
        return f"{self.first}..{self.first + self.size - 1}" if self.size > 1 else f"{self.first}"


def is_block(first: int, size: int, num_lanes: int) -> bool:
    """Whether a peer's numbers name a block of a tree over `num_lanes` lanes."""
    return size > 0 and size & (size - 1) == 0 and first >= 0 and first % size == 0 and first + size <= num_lanes


def lane(index: int) -> Block:
    """The block of one lane."""
    return Block(Lane(index), 1)


def blocks_of(mask: int) -> list[Block]:
    """The fewest blocks that cover exactly the lanes set in `mask`, in lane order."""
    blocks: list[Block] = []
    first = 0
    while mask >> first:
        if not mask >> first & 1:
            first += 1
            continue
        size = 1
        while first % (2 * size) == 0 and (wider := Block(Lane(first), 2 * size).mask) & mask == wider:
            size *= 2
        blocks.append(Block(Lane(first), size))
        first += size
    return blocks


def lanes_of(mask: int) -> list[Lane]:
    return [Lane(index) for index in range(mask.bit_length()) if mask >> index & 1]


def mask_of(lanes: Iterable[int]) -> int:
    mask = 0
    for index in lanes:
        mask |= 1 << index
    return mask


def join_upwards(held: set[Block], arrived: Block, num_lanes: int) -> Iterator[tuple[Block, Block]]:
    """Adds `arrived` to the partial sums `held`, yielding each pair (left, right) to add: left += right.

    `held` is updated as the pairs are drawn. `arrived` must not overlap what is held.
    """
    block = arrived
    while block.size < num_lanes and block.sibling in held:
        sibling = block.sibling
        held.discard(sibling)
        yield min(block, sibling), max(block, sibling)
        block = block.parent
    held.add(block)
