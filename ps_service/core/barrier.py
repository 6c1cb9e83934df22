"""Which lanes of a chunk are in for the open step, and in which order they add up (invariants 1 and 2)."""

from __future__ import annotations

from dataclasses import dataclass, field

from ps_service.core.messages import Answer, Contribution, Effect, Join, Keep, Outcome
from shardlane.lanes import Block, blocks_of, join_upwards
from shardlane.tally import Tally


@dataclass(slots=True)
class SiteTable:
    """One site's table: the lanes counted, the partial sums held, and what rides with them."""

    counted: int = 0  # bit l: lane l is in
    partials: set[Block] = field(default_factory=set)
    tokens: int = 0
    losses: dict[Block, float] = field(default_factory=dict)
    added: list[Block] = field(default_factory=list)  # every block that was kept: the ledger's own, whatever `counted` says


@dataclass(slots=True)
class Barrier:
    """The tables of all sites of one chunk for one step."""

    num_lanes: int
    sites: list[SiteTable]

    @classmethod
    def fresh(cls, num_lanes: int, num_sites: int) -> Barrier:
        return cls(num_lanes, [SiteTable() for _ in range(num_sites)])

    def anew(self) -> Barrier:
        return Barrier.fresh(self.num_lanes, len(self.sites))

    def has(self, block: Block) -> bool:
        """Whether all its lanes are in, at every site."""
        return all(not block.mask & ~table.counted for table in self.sites)

    @property
    def tokens(self) -> int:
        """Every site sees every token once, so the first one's count is the step's."""
        return self.sites[0].tokens

    def loss(self, block: Block) -> float:
        """The loss sum of a block that is in."""
        return self.sites[0].losses[block]

    @property
    def tally(self) -> Tally:
        """How often each lane was added in, over all sites."""
        return Tally.over([Tally.of_table(table.added, self.num_lanes) for table in self.sites])

    def judge(self, site: int, block: Block) -> Answer:
        """What a contribution would be answered; changes nothing."""
        missing = block.mask & ~self.sites[site].counted
        if not missing:
            return Answer(Outcome.DUPLICATE)  # a retry whose first answer was lost
        if missing != block.mask:
            return Answer(Outcome.OVERLAPS, tuple(blocks_of(missing)))  # a sum cannot be taken apart
        return Answer(Outcome.COUNTED)

    def count(self, contribution: Contribution) -> list[Effect]:
        """Counts a contribution that `judge` has found wholly new."""
        table = self.sites[contribution.site]
        block, step, chunk, site = contribution.block, contribution.step, contribution.chunk, contribution.site
        table.counted |= block.mask
        table.tokens += contribution.tokens
        table.losses[block] = contribution.loss
        table.added.append(block)
        effects: list[Effect] = [Keep(step, chunk, site, block)]
        for left, right in join_upwards(table.partials, block, self.num_lanes):
            table.losses[left.parent] = table.losses.pop(left) + table.losses.pop(right)
            effects.append(Join(step, chunk, site, left, right))
        return effects
