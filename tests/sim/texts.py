"""What a simulated shard holds of parameters and sums: texts."""

from __future__ import annotations

from dataclasses import dataclass, field

from ps_service.core.holdings import HeldChunk
from shardlane.ids import ChunkId, SiteIndex, Step, Version
from shardlane.lanes import Block
from shardlane.turns import Clocks, has_come, number_of, place_of
from tests.sim.sketch import History


@dataclass
class Texts:
    """What the shell holds for the core."""

    parameters: dict[ChunkId, History] = field(default_factory=dict)
    copies: dict[ChunkId, list[History]] = field(default_factory=dict)  # ASP: that each lane's turn is computed from
    partials: dict[tuple[ChunkId, Step, SiteIndex, Block], str] = field(default_factory=dict)
    sums: dict[ChunkId, str] = field(default_factory=dict)

    def drop_partials(self, chunk: ChunkId) -> None:
        for key in [key for key in self.partials if key[0] == chunk]:
            del self.partials[key]

    def past(self, chunk: ChunkId, held: HeldChunk, number: int, num_past: int) -> tuple[Version, History | None]:
        """As `TensorStore.parameter_of`: what there is of a version that has come, or the one that supersedes it."""
        place, version, num_lanes = len(held.clocks), number, len(held.clocks)
        if held.clocks:
            place, version = place_of(number, num_lanes)
        if place < num_lanes:
            taken = held.clocks[place].taken
            return Version(number_of(place, taken, num_lanes)), self.copies[chunk][place] if taken == version else None
        now = number_of(place, held.version, num_lanes) if held.clocks else Step(held.version)
        return Version(now), self.parameters[chunk][:version] if held.version - version <= num_past else None


def has_come_to(published: tuple[Version, Clocks] | None, number: int) -> bool:
    if published is None:
        return False
    version, clocks = published
    return has_come(clocks, version, number) if clocks else version >= number
