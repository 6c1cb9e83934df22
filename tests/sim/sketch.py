"""The model that is trained: a few chunks, whose sums and parameters are texts.

A lane's contribution is `l3@5.0` (lane, step, timeline), a join is `(left+right)`, the sum of a chunk with two sites is
`site0+site1`. A chunk's parameters are the history of what was applied, so a lane counted twice, or added in another order,
shows.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from shardlane.ids import ChunkId
from shardlane.lanes import Block
from shardlane.partition import BYTES_PER_ELEMENT, EMBEDDING, FINAL_NORM, HEAD, Chunk, Layout, TensorSpec

History = tuple[str, ...]

SKIPPED = "skipped"

_TENSORS = (  # name, elements, the layers of its sites
    (EMBEDDING, 40, (0, 1)),
    ("layers.0", 30, (0,)),
    (FINAL_NORM, 30, (1,)),
    ("layers.1", 30, (1,)),
)
NUM_CHUNKS_MAX = len(_TENSORS)


class Sketch(Layout):
    """A layout of three chunks or four, over two decoder layers; the first one is tied, so it has a site in each."""

    def __init__(self, num_chunks: int) -> None:
        self.tensors = [
            TensorSpec(index, name, (size,), layers, (name, HEAD)[: len(layers)], decay=True)
            for index, (name, size, layers) in enumerate(_TENSORS[:num_chunks])
        ]
        self.chunks = [Chunk(ChunkId(index), index, 0, size) for index, (_, size, _) in enumerate(_TENSORS[:num_chunks])]

    @property
    def sizes(self) -> list[int]:
        return [chunk.num_elements * BYTES_PER_ELEMENT for chunk in self.chunks]


@lru_cache(maxsize=1 << 14)
def lanes_text(step: int, timeline: int, first: int, size: int) -> str:
    """The one way in which lanes `first … first + size - 1` add up (invariant 2)."""
    if size == 1:
        return f"l{first}@{step}.{timeline}"
    half = size // 2
    return f"({lanes_text(step, timeline, first, half)}+{lanes_text(step, timeline, first + half, half)})"


def block_text(step: int, timeline: int, block: Block) -> str:
    return lanes_text(step, timeline, block.first, block.size)


@lru_cache(maxsize=1 << 14)
def sum_text(step: int, timeline: int, num_lanes: int, num_sites: int) -> str:
    """A chunk's whole sum: its sites in order."""
    return "+".join([lanes_text(step, timeline, 0, num_lanes)] * num_sites)


def plain(text: str) -> str:
    """Without the mark of who measured a sum (see `Shape.wobbles`)."""
    return text.partition("~")[0]


def plainly(history: Sequence[str]) -> History:
    return tuple(map(plain, history))
