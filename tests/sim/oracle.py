"""What must hold after every event (DESIGN.md, section 3), told from outside: by texts, and by what every process has."""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from typing import TYPE_CHECKING

from ps_service.core.messages import Decision, Record
from shardlane.ids import ChunkId, Step, Version
from shardlane.plan import Plan, Timeline
from shardlane.turns import place_of
from tests.sim.log import Log
from tests.sim.sketch import SKIPPED, History, Sketch, lanes_text, plain, plainly, sum_text

if TYPE_CHECKING:
    from tests.sim.shard import ShardProcess


class BrokenInvariant(AssertionError):
    """Carries the number of the invariant (DESIGN.md, section 3)."""


class Oracle:
    """Knows everything, tells nobody, and raises `BrokenInvariant`."""

    def __init__(self, layout: Sketch, num_lanes: int, goes_by_turns: bool = False) -> None:
        self._num_sites = [layout.num_sites(chunk.id) for chunk in layout.chunks]
        self._num_lanes = num_lanes
        self.plan: Plan | None = None  # the newest that is durable
        self.lineages: dict[int, tuple[int, ...]] = {}  # of a timeline: in which timeline each step before its own was made
        self.decisions: dict[tuple[int, int], Decision] = {}  # by timeline and step
        self.records: dict[tuple[int, int, ChunkId], Record] = {}
        self.published: dict[tuple[int, ChunkId, int], History] = {}
        self.skips: set[tuple[int, int]] = set()  # timeline, step
        self.version = 0  # the newest that was published in the newest timeline
        self._expected: dict[tuple[int, ChunkId, int], History] = {}
        self.logs: dict[int, Log] = {}  # ASP, by timeline
        self._goes_by_turns = goes_by_turns

    # ---- what is told --------------------------------------------------------------------------------------------------

    def announce(self, plan: Plan, origin: int | None) -> None:
        """A plan is durable. `origin`: the timeline in which the checkpoint that it begins with was made."""
        if self.plan is not None and plan.number <= self.plan.number:
            raise BrokenInvariant(f"8: plan {plan.number} was announced after {self.plan.number}")
        self.plan, timeline = plan, plan.timeline
        if timeline.id not in self.lineages:
            before = () if origin is None else self.lineage(origin, timeline.version)
            self.lineages[timeline.id] = before
            self.version = int(timeline.version)
            if self._goes_by_turns:
                learnt = () if origin is None else self.logs[origin].clocks_at(timeline.version)
                if timeline.clocks != learnt:
                    raise BrokenInvariant(f"1: {timeline} began with clocks that its checkpoint does not have, {learnt}")
                self.logs[timeline.id] = Log(timeline, self._num_lanes)

    def decide(self, timeline: int, step: int, decision: Decision) -> None:
        known = self.decisions.setdefault((timeline, step), decision)
        if known != decision:
            raise BrokenInvariant(f"4: two decisions of step {step}: {known} and {decision}")
        if self._goes_by_turns:
            if fault := self.logs[timeline].fault_of(Step(step), decision):
                raise BrokenInvariant(f"1, 4: {fault}")
        elif not all(run.is_exact for run in decision.tally.runs):
            raise BrokenInvariant(f"1: in step {step} lanes were counted as {decision.tally}")
        if decision.skipped or decision.refused:
            self.skips.add((timeline, step))

    def publish(self, timeline: int, chunk: ChunkId, version: Version, history: History) -> None:
        """Step `version - 1` is over, so that pulls of `version` may be answered."""
        if len(history) != version:
            raise BrokenInvariant(f"8: version {version} of chunk {chunk} was published before it was applied: {history}")
        known = self.published.setdefault((timeline, chunk, version), history)
        if known != history:
            raise BrokenInvariant(f"8: version {version} of chunk {chunk} was published as {known} and as {history}")
        if self.plan is not None and timeline == self.plan.timeline.id:
            self.version = max(self.version, version)

    def is_published(self, timeline: Timeline, chunk: ChunkId, version: Version, history: History) -> bool:
        """Whether this is what was published; of a version before the timeline, under SSP, what its checkpoint says of it."""
        if self._goes_by_turns:
            place, turn = place_of(version, self._num_lanes)
            version = Version(turn) if place == self._num_lanes else self.logs[timeline.id].read[version]
        if version < timeline.version:
            return plainly(history) == self.expected(timeline.id, chunk, version)
        return history == self.published.get((timeline.id, chunk, version))

    # ---- what is expected ----------------------------------------------------------------------------------------------

    def lineage(self, timeline: int, version: int) -> tuple[int, ...]:
        known = self.lineages[timeline]
        return (*known, *[timeline] * (version - len(known)))[:version]

    def expected(self, timeline: int, chunk: ChunkId, version: int) -> History:
        """The undisturbed history, without marks."""
        key = (timeline, chunk, version)
        if key not in self._expected:
            self._expected[key] = tuple(
                SKIPPED if (made_in, step) in self.skips else self.sum_of(step, made_in, chunk)
                for step, made_in in enumerate(self.lineage(timeline, version))
            )
        return self._expected[key]

    def sum_of(self, step: int, timeline: int, chunk: ChunkId) -> str:
        if self._goes_by_turns:
            turn = self.decisions[timeline, step].turn
            assert turn is not None
            return self.turn_sum(turn.number, timeline, chunk)
        return sum_text(step, timeline, self._num_lanes, self._num_sites[chunk])

    def turn_sum(self, number: int, timeline: int, chunk: ChunkId) -> str:
        """ASP: a lane's contribution over the chunk's sites."""
        lane, _ = place_of(number, self._num_lanes)
        return "+".join([lanes_text(number, timeline, lane, 1)] * self._num_sites[chunk])

    # ---- what is looked at ---------------------------------------------------------------------------------------------

    def inspect(self, shard: ShardProcess, everybody: Iterable[ShardProcess]) -> None:
        """After an event of `shard`."""
        core, texts = shard.core, shard.texts
        if core.plan is None:
            return
        timeline = core.plan.timeline
        for chunk, held in core.chunks.items():
            history = texts.parameters[chunk]
            expected = self.expected(timeline.id, chunk, held.version)
            if history != expected and plainly(history) != expected:
                raise BrokenInvariant(f"1, 2: chunk {chunk} at version {held.version} on {shard} is {history}, not {expected}")
            total = texts.sums.get(chunk)
            if (held.closed is None) != (total is None):
                raise BrokenInvariant(f"1: chunk {chunk} on {shard}: record and sum do not go together")
            if held.closed is not None and total is not None:
                if zlib.crc32(total.encode()) != held.closed.digest or held.closed.step != int(held.version):
                    raise BrokenInvariant(f"1: chunk {chunk} on {shard} has the sum {total} with {held.closed}")
                turn = held.closed.turn
                if plain(total) != (
                    self.sum_of(held.version, timeline.id, chunk)
                    if turn is None
                    else self.turn_sum(turn.number, timeline.id, chunk)
                ):
                    raise BrokenInvariant(f"1, 2: the sum of step {held.version} of chunk {chunk} on {shard} is {total}")
        if texts.parameters.keys() != core.chunks.keys():
            raise BrokenInvariant(f"1: {shard} has parameters of {sorted(texts.parameters)}, holds {sorted(core.chunks)}")
        for step, records in core.book.records.items():
            for chunk, record in records.items():
                if self.records.get((timeline.id, step, chunk)) is not record:
                    self._hear(timeline, record, everybody)

    def _hear(self, timeline: Timeline, record: Record, everybody: Iterable[ShardProcess]) -> None:
        """A record is told, or known again: whoever the newest plan lists in sync must hold the sum by now."""
        known = self.records.setdefault((timeline.id, record.step, record.chunk), record)
        if known != record:
            raise BrokenInvariant(f"4: two records of step {record.step} of chunk {record.chunk}: {known} and {record}")
        if known is not record or self.plan is None or self.plan.timeline != timeline:
            return
        in_sync = self.plan.placements[record.chunk].in_sync
        for shard in everybody:
            if shard.alive and shard.me in in_sync:
                held = shard.core.chunks.get(record.chunk)
                if held is None or held.version < record.step or (held.version == record.step and held.closed != record):
                    raise BrokenInvariant(f"6: {record} is told, and {shard} does not hold the sum")

    def compare(self, everybody: Iterable[ShardProcess]) -> None:
        """Copies that are in sync are within one version of one another (invariant 4: nobody is ahead of who needs it)."""
        if self.plan is None:
            return
        for chunk, placement in enumerate(self.plan.placements):
            versions = {
                held.version
                for shard in everybody
                if shard.alive and shard.me in placement.in_sync and shard.core.plan is not None
                if shard.core.plan.timeline == self.plan.timeline and (held := shard.core.chunks.get(ChunkId(chunk))) is not None
            }
            if versions and max(versions) - min(versions) > 1:
                raise BrokenInvariant(f"4: copies of chunk {chunk} are at versions {sorted(versions)}")
