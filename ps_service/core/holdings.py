"""What a shard holds of a chunk, and the chunks it is filling learners with."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from ps_service.core.barrier import Barrier
from ps_service.core.messages import Answer, Contribution, Decision, Effect, Outcome, Record
from shardlane import turns
from shardlane.config import Config
from shardlane.ids import ChunkId, Incarnation, Lane, Step, Timeline, Version
from shardlane.lanes import Block, lane
from shardlane.partition import Layout
from shardlane.plan import Placement
from shardlane.turns import Clocks, Turn

REFILLS_AT_ONCE = 4
"""Chunks on their way to learners: few, so that a chunk's step has not ended when the learner's position comes back."""


@dataclass(slots=True)
class HeldChunk:
    """A chunk that this shard holds: at `version`, with the step of the same number open or closed."""

    version: Version
    barrier: Barrier
    measuring: Block | None = None  # which is in; the shell is taking the sum's measure
    closed: Record | None = None  # the sum of step `version` is held, and this is its record
    acks: set[Incarnation] = field(default_factory=set)  # holders that have the sum too, in the present epoch
    awaited: set[Incarnation] = field(default_factory=set)  # learners whose acks count before a plan lists them (12)
    ahead: dict[Step, Barrier] = field(default_factory=dict)  # of later steps, for which lanes are in already
    early: Incarnation | None = None  # whose sum of the next step came before this one was applied
    clocks: Clocks = ()  # ASP: of each lane. Its turns are `ahead` until one of them is closed as the step of `version`
    turn: Turn | None = None  # and whose that is

    def judge(self, contribution: Contribution, *, last: int) -> Answer:
        """2. `last`: the newest step that is taken in."""
        step, now = contribution.step, int(self.version)
        if self.clocks:
            place, step_of_lane = turns.place_of(step, len(self.clocks))
            step, now = Step(step_of_lane), self.clocks[place].taken
            last = now
        if step < now:
            return Answer(Outcome.DUPLICATE)  # counted in a step that closed long ago
        if step > last:
            return Answer(Outcome.NOT_YET)
        if contribution.step == self.closing and (self.closed is not None or self.measuring is not None):
            return Answer(Outcome.DUPLICATE)
        return self._barrier_of(contribution.step).judge(contribution.site, contribution.block)

    @property
    def closing(self) -> int:
        """The step or turn that is closed, or will be next."""
        if not self.clocks:
            return self.version
        return -1 if self.turn is None else self.turn.number

    def count(self, contribution: Contribution) -> list[Effect]:
        """2. Of one that `judge` has found wholly new."""
        return self._barrier_of(contribution.step).count(contribution)

    def take_ready(self, *, decides: bool, decided: Turn | None) -> Block | None:
        """What may be closed as the step of `version`, if it is in. Under ASP one chunk `decides` whose turn that is: the first's
        that is in; its record says to the others what is `decided`.
        """
        if not self.clocks:
            whole = Block(Lane(0), self.barrier.num_lanes)
            return whole if self.barrier.has(whole) else None
        numbers = list(self.ahead) if decides else [] if decided is None else [decided.number]
        for number in numbers:
            place, _ = turns.place_of(number, len(self.clocks))
            block = lane(place)
            if number in self.ahead and self.ahead[number].has(block):
                self.barrier, self.turn = self.ahead.pop(number), turns.turn_at(self.clocks, Lane(place), self.version)
                return block
        return None

    def _barrier_of(self, step: Step) -> Barrier:
        if step == int(self.version) and not self.clocks:
            return self.barrier
        if step not in self.ahead:
            self.ahead[step] = self.barrier.anew()
        return self.ahead[step]

    def begin(self) -> None:
        """The step of `version` and those after it begin anew: nothing is counted."""
        self.barrier, self.turn = self.barrier.anew(), None if self.closed is None else self.closed.turn
        self.ahead.clear()

    def advance(self, *, refused: bool) -> None:
        """8. The step of `version` is applied."""
        assert self.closed is not None
        self.version = Version(self.version + 1)
        following = self.ahead.pop(Step(self.version), None) if not self.clocks else None
        if self.closed.turn is not None:
            self.ahead.pop(self.closed.turn.number, None)
            self.clocks = turns.after(self.clocks, self.closed.turn, self.version, refused=refused)
        self.closed = self.turn = None
        self.acks.clear()
        self.barrier = following or self.barrier.anew()


@dataclass(frozen=True)
class Terms:
    """What a config fixes for a shard. `num_sites[c]`: sites of chunk c. `staleness`: steps after the open one for which lanes
    are taken in already. `goes_by_turns`: ASP, where only a decision tells which version is the last.
    """

    num_sites: Sequence[int]
    num_lanes: int
    last_step: int
    staleness: int = 0
    goes_by_turns: bool = False

    @classmethod
    def of(cls, config: Config, layout: Layout) -> Terms:
        train, num_sites = config.train, tuple(layout.num_sites(chunk.id) for chunk in layout.chunks)
        return cls(num_sites, train.lanes, train.last_step, train.staleness, train.goes_by_turns)

    @property
    def last_version(self) -> int:
        return sys.maxsize if self.goes_by_turns else self.last_step

    def clocks(self, timeline: Timeline) -> Clocks:
        """Where the lanes stand as it begins."""
        return turns.beginning(timeline, self.num_lanes) if self.goes_by_turns else ()

    def hold(self, chunk: ChunkId, version: Version, clocks: Clocks, closed: Record | None = None) -> HeldChunk:
        turn = None if closed is None else closed.turn
        return HeldChunk(version, Barrier.fresh(self.num_lanes, self.num_sites[chunk]), closed=closed, clocks=clocks, turn=turn)

    def lane(self, decision: Decision) -> Lane | None:
        """ASP: whose contribution was decided on."""
        return None if decision.turn is None else Lane(turns.place_of(decision.turn.number, self.num_lanes)[0])


class Filling:
    """11. The chunks whose learners a primary fills: those that are under way, and those whose turn will come."""

    def __init__(self) -> None:
        self._waiting: dict[ChunkId, None] = {}  # next first
        self._under_way: dict[ChunkId, None] = {}

    @property
    def under_way(self) -> Sequence[ChunkId]:
        return list(self._under_way)

    def begin(self, chunks: Iterable[ChunkId]) -> None:
        """A new plan: all of its learners, from the beginning."""
        self._waiting, self._under_way = dict.fromkeys(chunks), {}

    def send(self, is_ready: Callable[[ChunkId], bool]) -> Iterator[ChunkId]:
        """Those whose turn it is now, of those that are ready."""
        for chunk in [each for each in self._waiting if is_ready(each)][: REFILLS_AT_ONCE - len(self._under_way)]:
            del self._waiting[chunk]
            self._under_way[chunk] = None
            yield chunk

    def done(self, chunk: ChunkId) -> None:
        """The learner stands where the primary does."""
        self._waiting.pop(chunk, None)
        self._under_way.pop(chunk, None)

    def again(self, chunk: ChunkId) -> None:
        """The learner has missed a step: once more, after the others."""
        if chunk in self._under_way:
            del self._under_way[chunk]
            self._waiting[chunk] = None


def stays_with(me: Incarnation, now: Placement, before: Placement | None) -> bool:
    """Whether `me` keeps a chunk under a new plan. A learner goes on only under the primary that has been filling it."""
    if me in now.in_sync:
        return True
    return now.learner == me and before is not None and before.learner == me and before.primary == now.primary
