"""Gradients added up along the tree over lanes (DESIGN.md, invariant 2): one expression for reference, workers and shards."""

from __future__ import annotations

from torch import Tensor

from shardlane.lanes import Block, join_upwards


class LaneSums:
    """Partial sums of one parameter at one site. Lanes that arrive in order hold at most log2(lanes) + 1 tensors.

    A tensor given to `add` belongs to the sums from then on. The first addend is that tensor itself, never a zeroed buffer,
    since 0 + (−0.0) is +0.0.
    """

    def __init__(self, num_lanes: int) -> None:
        self._num_lanes = num_lanes
        self._held: set[Block] = set()
        self._sums: dict[Block, Tensor] = {}

    @property
    def blocks(self) -> list[Block]:
        """The blocks whose sums are held, in lane order."""
        return sorted(self._held)

    def add(self, block: Block, values: Tensor) -> None:
        """`values`: the sum over `block`'s lanes, none of which may be held. Siblings are joined as soon as both are there."""
        self._sums[block] = values
        for left, right in join_upwards(self._held, block, self._num_lanes):
            self._sums[left.parent] = self._sums.pop(left).add_(self._sums.pop(right))

    def take(self, block: Block) -> Tensor:
        """Gives away the sum of exactly `block`. Raises `KeyError` if it is not whole, or joined into a larger one."""
        self._held.remove(block)
        return self._sums.pop(block)

    def clear(self) -> None:
        self._held.clear()
        self._sums.clear()
