"""What a shard holds of a chunk, and the chunks it is filling learners with."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from ps_service.core.barrier import Barrier
from ps_service.core.messages import Answer, Contribution, Effect, Outcome, Record
from shardlane.ids import ChunkId, Incarnation, Step, Version
from shardlane.plan import Placement

REFILLS_AT_ONCE = 4
"""Chunks on their way to learners: few, so that a chunk's step has not ended when the learner's position comes back."""


@dataclass(slots=True)
class HeldChunk:
    """A chunk that this shard holds: at `version`, with the step of the same number open or closed."""

    version: Version
    barrier: Barrier
    measuring: bool = False  # every lane is in; the shell is taking the sum's measure
    closed: Record | None = None  # the sum of step `version` is held, and this is its record
    acks: set[Incarnation] = field(default_factory=set)  # holders that have the sum too, in the present epoch
    awaited: set[Incarnation] = field(default_factory=set)  # learners whose acks count before a plan lists them (12)
    ahead: dict[Step, Barrier] = field(default_factory=dict)  # of later steps, for which lanes are in already
    early: Incarnation | None = None  # whose sum of the next step came before this one was applied

    def judge(self, contribution: Contribution, *, last: int) -> Answer:
        """2. `last`: the newest step that is taken in."""
        step = contribution.step
        if step < self.version:
            return Answer(Outcome.DUPLICATE)  # counted in a step that closed long ago
        if step > last:
            return Answer(Outcome.NOT_YET)
        if step == int(self.version) and (self.closed is not None or self.measuring):
            return Answer(Outcome.DUPLICATE)
        return self._barrier_of(step).judge(contribution.site, contribution.block)

    def count(self, contribution: Contribution) -> list[Effect]:
        """2. Of one that `judge` has found wholly new."""
        return self._barrier_of(contribution.step).count(contribution)

    def _barrier_of(self, step: Step) -> Barrier:
        if step == int(self.version):
            return self.barrier
        if step not in self.ahead:
            self.ahead[step] = self.barrier.anew()
        return self.ahead[step]

    def begin(self) -> None:
        """The step of `version` and those after it begin anew: nothing is counted."""
        self.barrier = self.barrier.anew()
        self.ahead.clear()

    def advance(self) -> None:
        """8. The step of `version` is applied."""
        self.version = Version(self.version + 1)
        self.closed = None
        self.acks.clear()
        self.barrier = self.ahead.pop(Step(self.version)) if Step(self.version) in self.ahead else self.barrier.anew()


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
