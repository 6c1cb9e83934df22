"""Bugs to plant: each leaves out one rule of the protocol (DESIGN.md, section 4; numbers in comments there)."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest

from coordinator.core import planning
from coordinator.core.placement import surviving
from ps_service.core.barrier import Barrier
from ps_service.core.holdings import HeldChunk
from ps_service.core.messages import (
    Ack,
    Answer,
    Contribution,
    Decision,
    DropSums,
    Effect,
    Envelope,
    KeepState,
    KeepSum,
    Outcome,
    Position,
    Publish,
    Refill,
    Replicate,
)
from ps_service.core.record_book import RecordBook
from ps_service.core.shard import ShardCore
from shardlane.errors import StaleError
from shardlane.ids import ChunkId, Incarnation, Step
from shardlane.plan import Placement, Plan

Plant = Callable[[pytest.MonkeyPatch], None]


@dataclass(frozen=True)
class Bug:
    """`hunted_in`: a shape of the walks, or a setting of the search."""

    sentence: str
    plant: Plant
    hunted_in: str


def patch(owner: type, name: str, make: Callable[[Any], Any]) -> Plant:
    """Replaces a method by what `make` makes of it."""
    return lambda monkeypatch: monkeypatch.setattr(owner, name, make(getattr(owner, name)))


def no_dedup(_: Any) -> Any:
    def judge(self: Barrier, site: int, block: object) -> Answer:
        return Answer(Outcome.COUNTED)

    return judge


def decide_early(_: Any) -> Any:
    def decision(self: RecordBook, step: Step) -> Decision | None:
        known = self.of(step)
        return self._decide(step, [known[chunk] for chunk in sorted(known)]) if len(known) >= self._num_chunks - 1 else None

    return decision


def promote_without_sum(take_role: Any) -> Any:
    def patched(self: ShardCore, chunk: ChunkId, now: Placement, before: Placement | None) -> list[Effect]:
        effects: list[Effect] = take_role(self, chunk, now, before)
        held = self.chunks.get(chunk)
        if held is not None and before is not None and now.primary == self.me != before.primary:
            held.closed, held.barrier = None, held.barrier.anew()
            effects.append(DropSums(chunk, keep_closed=False))
        return effects

    return patched


def acknowledge_unseen(on_replicate: Any) -> Any:
    def patched(self: ShardCore, sender: Incarnation, message: Replicate) -> list[Effect]:
        record = message.record
        effects: list[Effect] = on_replicate(self, sender, message)
        held = self.chunks.get(record.chunk)
        if held is None or held.version < int(record.step):
            effects.append(self._send(sender, Ack(record.step, (record.chunk,))))
        return effects

    return patched


def report_unacknowledged(_: Any) -> Any:
    def report_closed(self: ShardCore, touched: object) -> list[Effect]:
        closed = [held.closed for chunk, held in self.chunks.items() if held.closed is not None and self.is_primary(chunk)]
        fresh = [record for record in closed if self.book.learn(record)]
        return self._send_records(fresh) if fresh else []

    return report_closed


def unfenced(kind: type) -> Callable[[Any], Any]:
    """Messages of `kind` are taken whatever their epoch."""

    def make(on_message: Any) -> Any:
        def patched(self: ShardCore, envelope: Envelope) -> list[Effect]:
            if self.plan is not None and isinstance(envelope.message, kind):
                envelope = replace(envelope, plan=self.plan.number)
            effects: list[Effect] = on_message(self, envelope)
            return effects

        return patched

    return make


def follow_the_deposed(on_message: Any) -> Any:
    """A backup takes a sum from whoever sends one."""

    def patched(self: ShardCore, envelope: Envelope) -> list[Effect]:
        message = envelope.message
        if isinstance(message, Replicate) and self.plan is not None and envelope.plan < self.plan.number:
            held = self.chunks.get(message.record.chunk)
            if held is not None and held.version == int(message.record.step):
                held.closed, held.barrier = message.record, held.barrier.anew()
                chunk = message.record.chunk
                return [DropSums(chunk, keep_closed=False), KeepSum(chunk), *self._settle([chunk])]
        effects: list[Effect] = on_message(self, envelope)
        return effects

    return patched


def keep_acks(take_role: Any) -> Any:
    def patched(self: ShardCore, chunk: ChunkId, now: Placement, before: Placement | None) -> list[Effect]:
        held = self.chunks.get(chunk)
        acks = set(held.acks) if held is not None else set()
        effects: list[Effect] = take_role(self, chunk, now, before)
        if held is not None:
            held.acks |= acks
        return effects

    return patched


def recompute_records(on_plan: Any) -> Any:
    """Who is promoted makes a record of its own of the sum that it holds."""

    def patched(self: ShardCore, plan: Plan) -> list[Effect]:
        old, self.plan = self.plan, self.plan
        if old is not None and plan.number > old.number and plan.timeline == old.timeline:
            for chunk, held in self.chunks.items():
                if held.closed is not None and plan.placements[chunk].primary == self.me != old.placements[chunk].primary:
                    held.closed = replace(held.closed, requests=held.closed.requests ^ 1)
        effects: list[Effect] = on_plan(self, plan)
        return effects

    return patched


def refill_without_sum(refill: Any) -> Any:
    def patched(self: ShardCore, chunk: ChunkId) -> Effect:
        effect = refill(self, chunk)
        message = effect.envelope.message
        return replace(effect, envelope=replace(effect.envelope, message=replace(message, closed=None)))

    return patched


def compare_versions_only(on_position: Any) -> Any:
    """A learner at the primary's version is taken for one that has its sum, too."""

    def patched(self: ShardCore, sender: Incarnation, message: Position) -> list[Effect]:
        held = self.chunks.get(message.chunk)
        if held is not None and held.version == message.version:
            message = replace(message, closed=held.closed is not None)
        effects: list[Effect] = on_position(self, sender, message)
        return effects

    return patched


def list_any_learner(on_position: Any) -> Any:
    """A learner is listed before it has caught up."""

    def patched(self: ShardCore, sender: Incarnation, message: Position) -> list[Effect]:
        held = self.chunks.get(message.chunk)
        if held is not None:
            message = replace(message, version=held.version, closed=held.closed is not None)
        effects: list[Effect] = on_position(self, sender, message)
        return effects

    return patched


def wait_for_no_learner(_: Any) -> Any:
    """12 without "waits for that learner's acks too"."""

    def backups(self: ShardCore, chunk: ChunkId) -> list[Incarnation]:
        assert self.plan is not None
        return list(self.plan.placements[chunk].in_sync[1:])

    return backups


def refill_backwards(_: Any) -> Any:
    """A learner takes whatever comes, even what is behind what it has."""

    def on_refill(self: ShardCore, sender: Incarnation, message: Refill) -> list[Effect]:
        assert self.plan is not None
        chunk = message.chunk
        if self.plan.placements[chunk].learner != self.me:
            return []
        self.chunks[chunk] = self._terms.hold(chunk, message.version, message.clocks, message.closed)
        keep = KeepState(chunk, message.version, message.closed is not None, message.clocks)
        return [keep, *self._learn(message.previous), *self._tell_position(chunk)]

    return on_refill


def any_timeline(on_message: Any) -> Any:
    def patched(self: ShardCore, envelope: Envelope) -> list[Effect]:
        if self.plan is None:
            raise StaleError("no plan")
        effects: list[Effect] = on_message(self, replace(envelope, timeline=self.plan.timeline.id))
        return effects

    return patched


def count_any_timeline(on_push: Any) -> Any:
    def patched(self: ShardCore, contribution: Contribution) -> tuple[Answer, list[Effect]]:
        if self.plan is not None:
            contribution = replace(contribution, timeline=self.plan.timeline.id)
        answer: tuple[Answer, list[Effect]] = on_push(self, contribution)
        return answer

    return patched


def forget_early(forget_before: Any) -> Any:
    """9. The records of a step are dropped as soon as it is applied here."""
    return lambda self, oldest: forget_before(self, oldest + 1)


def publish_early(apply: Any) -> Any:
    def patched(self: ShardCore, chunk: ChunkId, held: HeldChunk, decision: Decision) -> list[Effect]:
        effects: list[Effect] = apply(self, chunk, held, decision)
        early = [effect for effect in effects if isinstance(effect, Publish)]
        return [*early, *(effect for effect in effects if effect not in early)]

    return patched


def apply_any_sum(apply_decided: Any) -> Any:
    """8 without the comparison of digests: a deposed primary applies its own sum."""

    def patched(self: ShardCore, step: Step, chunks: Collection[ChunkId]) -> list[Effect]:
        for held in self.chunks.values():
            if held.closed is not None and (record := self.book.of(held.closed.step).get(held.closed.chunk)) is not None:
                held.closed = record
        effects: list[Effect] = apply_decided(self, step, chunks)
        return effects

    return patched


def keep_own_sum(on_replicate: Any) -> Any:
    """5 without "replacing any sum not yet applied"."""

    def patched(self: ShardCore, sender: Incarnation, message: Replicate) -> list[Effect]:
        held = self.chunks.get(message.record.chunk)
        if held is not None and held.closed is not None and held.version == int(message.record.step):
            return self._acknowledge(message.record.chunk, message.record.step, sender)
        effects: list[Effect] = on_replicate(self, sender, message)
        return effects

    return patched


def stop_for_ever(begin_timeline: Any) -> Any:
    def patched(self: ShardCore) -> list[Effect]:
        end = self.end_version
        effects: list[Effect] = begin_timeline(self)
        self.end_version = end
        return effects

    return patched


def promote_learners(monkeypatch: pytest.MonkeyPatch) -> None:
    """13 without "in-sync": a learner is primary when nobody else is left."""

    def patched(previous: Sequence[Placement], alive: Sequence[Incarnation], dropped: Any = None) -> tuple[Placement, ...] | None:
        def with_learner(placement: Placement) -> Placement:
            left = [shard for shard in placement.in_sync if shard in alive]
            if left or placement.learner not in alive or placement.learner is None:
                return placement
            return Placement((placement.learner,))

        return surviving([with_learner(each) for each in previous], alive, dropped)

    monkeypatch.setattr(planning, "surviving", patched)


WALKS = "deaths, sums that differ in bits"
BUGS: dict[str, Bug] = {
    "no dedup": Bug("A contribution that comes twice is counted twice.", patch(Barrier, "judge", no_dedup), "deaths"),
    "decided early": Bug(
        "A step is decided when a chunk's record is missing.", patch(RecordBook, "decision", decide_early), "a death"
    ),
    "promoted without the sum": Bug(
        "A new primary throws away the closed sum, and makes another.", patch(ShardCore, "_take_role", promote_without_sum), WALKS
    ),
    "acknowledged unseen": Bug(
        "A backup acknowledges a sum that it could not keep yet.", patch(ShardCore, "_on_replicate", acknowledge_unseen), WALKS
    ),
    "reported unacknowledged": Bug(
        "A primary gives up on a silent backup by itself.", patch(ShardCore, "_report_closed", report_unacknowledged), "a death"
    ),
    "acks of another epoch": Bug(
        "An ack that was given under an older plan counts.",
        lambda monkeypatch: (
            patch(ShardCore, "on_message", unfenced(Ack))(monkeypatch),
            patch(ShardCore, "_take_role", keep_acks)(monkeypatch),
        )[0],
        "hand-overs, nothing forgotten",
    ),
    "a deposed primary followed": Bug(
        "A backup takes a sum from a primary of an older plan.",
        patch(ShardCore, "on_message", follow_the_deposed),
        "hand-overs, nothing forgotten",
    ),
    "records recomputed": Bug(
        "A new primary makes a record of its own of a sum that was closed.", patch(ShardCore, "on_plan", recompute_records), WALKS
    ),
    "refilled without the sum": Bug(
        "A learner is filled with parameters only, and passes for equal.",
        lambda monkeypatch: (
            patch(ShardCore, "_refill", refill_without_sum)(monkeypatch),
            patch(ShardCore, "_on_position", compare_versions_only)(monkeypatch),
        )[0],
        "a refill",
    ),
    "listed early": Bug(
        "A learner is listed before it has caught up.", patch(ShardCore, "_on_position", list_any_learner), "a refill"
    ),
    "learners not waited for": Bug(
        "A learner is asked to be listed, and its acks are not waited for.",
        patch(ShardCore, "backups", wait_for_no_learner),
        "a refill",
    ),
    "refilled backwards": Bug(
        "A learner goes back to an older state that comes late.", patch(ShardCore, "_on_refill", refill_backwards), "a refill"
    ),
    "timeline not fenced": Bug(
        "Messages of the timeline before a roll-back are taken.", patch(ShardCore, "on_message", any_timeline), "one copy"
    ),
    "old contributions counted": Bug(
        "Contributions of the timeline before a roll-back are counted.",
        patch(ShardCore, "on_push", count_any_timeline),
        "one copy",
    ),
    "records dropped early": Bug(
        "The records of a step are dropped as soon as it is applied.", patch(RecordBook, "forget_before", forget_early), "a death"
    ),
    "published early": Bug("A version is published before it is there.", patch(ShardCore, "_apply", publish_early), "deaths"),
    "another sum applied": Bug(
        "A sum is applied though another one was decided on.", patch(ShardCore, "_apply_decided", apply_any_sum), "a mistake"
    ),
    "own sum kept": Bug(
        "A backup acknowledges, and keeps the sum that it had.", patch(ShardCore, "_on_replicate", keep_own_sum), "hand-overs"
    ),
    "a stop that outlives its timeline": Bug(
        "After a roll-back a shard still ends where the run was to stop.",
        patch(ShardCore, "_begin_timeline", stop_for_ever),
        "everything",
    ),
    "learners promoted": Bug("A learner becomes primary when nobody else is left.", promote_learners, "deaths"),
}
