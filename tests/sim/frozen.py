"""A shard's core and the texts beside it as one hashable value, and back: what a search over states needs.

Two shards of equal values behave alike: what cannot matter any more is left out, such as the table of a chunk that is closed.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import NamedTuple

from ps_service.core.barrier import Barrier
from ps_service.core.holdings import HeldChunk, Terms
from ps_service.core.messages import (
    Alarm,
    Announce,
    Apply,
    AskInSync,
    Checkpoint,
    Close,
    Compare,
    Contribution,
    Decision,
    DropSums,
    Effect,
    Envelope,
    Forget,
    Join,
    Keep,
    KeepState,
    KeepSum,
    Load,
    Publish,
    Record,
    Refill,
    Replicate,
    Send,
)
from ps_service.core.shard import ShardCore
from shardlane.ids import ChunkId, Incarnation, SiteIndex, Step, Version
from shardlane.lanes import lane, lanes_of
from shardlane.plan import Plan
from tests.sim.oracle import BrokenInvariant

# Every field there is: a new one must be thought about here.
FIELDS: dict[str, set[str]] = {
    "ShardCore": {
        *("me", "plan", "chunks", "book", "end_version", "diverged", "requests"),
        *("_terms", "_filling"),
    },
    "RecordBook": {"records", "decided", "news", "begun", "_num_chunks", "_decide", "_delivered"},
    "Filling": {"_waiting", "_under_way"},
    "HeldChunk": {"version", "barrier", "measuring", "closed", "acks", "awaited", "ahead", "early", "clocks", "turn"},
    "Barrier": {"num_lanes", "sites"},
    "SiteTable": {"counted", "partials", "tokens", "losses", "added"},
}

Values = tuple[int, ...]  # digests: of the sums that were applied


class FrozenChunk(NamedTuple):
    chunk: ChunkId
    version: Version
    counted: int
    closed: Record | None
    acks: frozenset[Incarnation]
    awaited: frozenset[Incarnation]
    early: Incarnation | None
    history: Values
    total: int | None  # the digest of the sum that the shell holds


class Frozen(NamedTuple):
    plan: Plan | None
    chunks: tuple[FrozenChunk, ...]
    records: tuple[Record, ...]
    waiting: tuple[ChunkId, ...]
    under_way: tuple[ChunkId, ...]


class Letter(NamedTuple):
    """A message between shards, with the values that go along."""

    to: Incarnation
    envelope: Envelope
    total: int | None
    history: Values


class Outcome(NamedTuple):
    """What an event of a shard came to."""

    after: Frozen
    letters: tuple[Letter, ...]
    asks: tuple[AskInSync, ...]
    applied: tuple[tuple[Step, ChunkId, int], ...]  # with the digest of what was applied
    published: tuple[tuple[ChunkId, Version, Values], ...]
    decisions: tuple[tuple[Step, Decision], ...]


class Bench:
    """One shard, put together from a value, that takes one event."""

    def __init__(self, me: Incarnation, num_chunks: int, num_lanes: int, last_version: int, frozen: Frozen | None) -> None:
        self._num_lanes = num_lanes
        self.core = ShardCore(me, Terms((1,) * num_chunks, num_lanes, last_version), decide=decide_by_digests)
        self._histories: dict[ChunkId, Values] = {}
        self._totals: dict[ChunkId, int] = {}
        self._letters: list[Letter] = []
        self._asks: list[AskInSync] = []
        self._applied: list[tuple[Step, ChunkId, int]] = []
        self._published: list[tuple[ChunkId, Version, Values]] = []
        self._decisions: list[tuple[Step, Decision]] = []
        if frozen is not None:
            self._thaw(frozen)

    def _thaw(self, frozen: Frozen) -> None:
        core = self.core
        core.plan = frozen.plan
        for each in frozen.chunks:
            barrier = Barrier.fresh(self._num_lanes, 1)
            for index in lanes_of(each.counted):
                barrier.count(Contribution(0, Step(each.version), lane(index), SiteIndex(0), each.chunk, 1, 0.0))
            held = HeldChunk(each.version, barrier, None, each.closed, set(each.acks), set(each.awaited), early=each.early)
            core.chunks[each.chunk] = held
            self._histories[each.chunk] = each.history
            if each.total is not None:
                self._totals[each.chunk] = each.total
        for record in frozen.records:
            core.book.learn(record)
        core.book.news.clear()  # whatever they decide has been done
        core._filling._waiting = dict.fromkeys(frozen.waiting)
        core._filling._under_way = dict.fromkeys(frozen.under_way)

    def freeze(self) -> Frozen:
        core = self.core
        chunks = tuple(
            FrozenChunk(
                chunk,
                held.version,
                0 if held.closed is not None else held.barrier.sites[0].counted,
                held.closed,
                frozenset(held.acks),
                frozenset(held.awaited),
                held.early,
                self._histories.get(chunk, ()),
                self._totals.get(chunk),
            )
            for chunk, held in sorted(core.chunks.items())
        )
        assert not core.book.news  # the core has looked at it all
        records = (record for step in sorted(core.book.records) for _, record in sorted(core.book.records[step].items()))
        return Frozen(core.plan, chunks, tuple(records), tuple(core._filling._waiting), tuple(core._filling._under_way))

    def outcome(self, effects: Sequence[Effect], letter: Letter | None = None) -> Outcome:
        """Does the effects; whatever a tick would send then is sent, too, and nothing else of the tick happens."""
        self._do(effects, letter)
        self._check()
        after = self.freeze()
        if self.core.plan is not None:
            self._do(self.core.on_tick(), None)
        return Outcome(
            after,
            tuple(dict.fromkeys(self._letters)),
            tuple(self._asks),
            tuple(self._applied),
            tuple(self._published),
            tuple(self._decisions),
        )

    def _check(self) -> None:
        """Record and sum go together, and a chunk is at the version that its history says (invariant 1)."""
        me = self.core.me
        for chunk, held in self.core.chunks.items():
            total, history = self._totals.get(chunk), self._histories.get(chunk, ())
            if (held.closed.digest if held.closed is not None else None) != total:
                raise BrokenInvariant(f"1: {me} has the sum {total} of chunk {chunk} with {held.closed}")
            if len(history) != held.version:
                raise BrokenInvariant(f"1: chunk {chunk} is at version {held.version} on {me}, with {history}")

    def _do(self, effects: Sequence[Effect], letter: Letter | None) -> None:
        todo = list(effects)
        while todo:
            todo += self._do_one(todo.pop(0), letter)

    def _do_one(self, effect: Effect, letter: Letter | None) -> Sequence[Effect]:
        histories, totals = self._histories, self._totals
        match effect:
            case Send(to=to, envelope=envelope):
                self._letters.append(self._pack(to, envelope))
            case Close(chunk=chunk, step=step):
                assert self.core.plan is not None
                digest = zlib.crc32(
                    f"{chunk} {step} {self.core.me} {self.core.plan.number}".encode()
                )  # bits differ by who closes
                totals[chunk] = digest
                return self.core.on_measured(chunk, square_norm=1.0, digest=digest)
            case KeepSum(chunk=chunk):
                assert letter is not None and letter.total is not None
                totals[chunk] = letter.total
            case Compare(chunk=chunk, sender=sender):
                return self.core.on_compared(chunk, sender, is_equal=True)
            case KeepState(chunk=chunk):
                assert letter is not None
                histories[chunk] = letter.history
                totals.pop(chunk, None)
                if effect.with_sum and letter.total is not None:
                    totals[chunk] = letter.total
            case Apply(chunk=chunk, step=step):
                total = totals.pop(chunk)
                histories[chunk] = (*histories[chunk], total)
                self._applied.append((step, chunk, total))
            case Publish(chunk=chunk, version=version):
                self._published.append((chunk, version, histories[chunk]))
            case DropSums(chunk=chunk):
                if not effect.keep_closed:
                    totals.pop(chunk, None)
            case Forget(chunk=chunk):
                histories.pop(chunk, None)
                totals.pop(chunk, None)
            case Load(chunks=chunks):
                histories.update(dict.fromkeys(chunks, ()))
            case Announce(step=step, decision=decision):
                self._decisions.append((step, decision))
            case AskInSync():
                self._asks.append(effect)
            case Alarm(text=text):
                raise BrokenInvariant(f"alarm: {text}")
            case Keep() | Join() | Checkpoint():
                pass
        return ()

    def _pack(self, to: Incarnation, envelope: Envelope) -> Letter:
        message = envelope.message
        if isinstance(message, Replicate):
            return Letter(to, envelope, self._totals.get(message.record.chunk), ())
        if isinstance(message, Refill):
            total = self._totals.get(message.chunk) if message.closed is not None else None
            return Letter(to, envelope, total, self._histories[message.chunk])
        return Letter(to, envelope, None, ())


def decide_by_digests(step: Step, records: Sequence[Record]) -> Decision:
    """Any difference between records shows in the decision."""
    requests = sum(record.digest for record in records)
    return Decision(False, 1.0, 1.0, 0.1, len(records), 0.0, records[0].tally, requests, False, False)
