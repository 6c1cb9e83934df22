"""The shard's core as stories with exact effects."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from ps_service.core.commit import decide
from ps_service.core.holdings import REFILLS_AT_ONCE, Terms
from ps_service.core.messages import (
    Ack,
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
    KeepSum,
    Load,
    Outcome,
    Position,
    Publish,
    Record,
    Records,
    Refill,
    Replicate,
    Send,
)
from ps_service.core.shard import COMPARED_EVERY_STEPS, ShardCore
from ps_service.core.waiting import waits_for
from shardlane.config import Config, build
from shardlane.errors import StaleError
from shardlane.ids import ChunkId, Incarnation, Lane, PlanNumber, RunId, SiteIndex, Step, Timeline, Version
from shardlane.lanes import Block, lane
from shardlane.plan import REQUEST_CHECKPOINT, REQUEST_STOP, Member, Placement, Plan
from shardlane.tally import LaneRun, Tally

A, B, C = Incarnation("shard-a"), Incarnation("shard-b"), Incarnation("shard-c")
X, Y = ChunkId(0), ChunkId(1)
CONFIG: Config = build({"train": {"lanes": 2, "micro_batch_size": 1, "global_batch_size": 2, "max_steps": 9, "seq_len": 4}})


def plan(*placements: Placement, epoch: int = 1, timeline: int = 0) -> Plan:
    shards = sorted({each for placement in placements for each in placement.holders})
    members = tuple(Member(each, "shard", f"{each}:1") for each in shards)
    return Plan(PlanNumber(1, epoch), RunId("r"), Timeline(timeline, Version(0)), members, (), (), placements)


def core(me: Incarnation, sites: tuple[int, ...] = (1, 1), last: int = 9, staleness: int = 0) -> ShardCore:
    def decision(step: Step, records: object) -> Decision:
        return decide(step, records, config=CONFIG, loss_chunk=X)  # type: ignore[arg-type]

    return ShardCore(me, Terms(tuple(sites), 2, last, staleness), decide=decision)


def push(block: Block, *, step: int = 0, chunk: ChunkId = X, site: int = 0, timeline: int = 0, loss: float = 1.0) -> Contribution:
    return Contribution(timeline, Step(step), block, SiteIndex(site), chunk, 4 * block.size, loss)


BOTH = Block(Lane(0), 2)
ONCE = Tally(1, (LaneRun(0, 2, 1, 1),))


def record(chunk: ChunkId, step: int = 0, digest: int = 7, requests: int = 0) -> Record:
    return Record(Step(step), chunk, 1.0, 8, 2.0, digest, ONCE, requests)


def close(shard: ShardCore, chunk: ChunkId, step: int = 0, digest: int = 7) -> list[Effect]:
    shard.on_push(push(BOTH, step=step, chunk=chunk, loss=2.0))
    return shard.on_measured(chunk, square_norm=1.0, digest=digest)


def of_kind(effects: list[Effect], *kinds: type) -> list[Effect]:
    return [effect for effect in effects if isinstance(effect, kinds)]


def test_the_first_plan_loads_and_publishes() -> None:
    shard = core(A)
    effects = shard.on_plan(plan(Placement((A,)), Placement((B,))))
    assert effects == [Load(Timeline(0, Version(0)), (X,)), Publish(X, Version(0))]


def test_lanes_are_kept_joined_and_closed_once() -> None:
    shard = core(A)
    shard.on_plan(plan(Placement((A,)), Placement((B,))))
    answer, effects = shard.on_push(push(lane(1)))
    assert (answer.outcome, effects) == (Outcome.COUNTED, [Keep(Step(0), X, SiteIndex(0), lane(1))])
    again, nothing = shard.on_push(push(lane(1)))
    assert (again.outcome, nothing) == (Outcome.DUPLICATE, [])
    overlap, nothing = shard.on_push(push(BOTH))
    assert (overlap.outcome, overlap.missing, nothing) == (Outcome.OVERLAPS, (lane(0),), [])
    answer, effects = shard.on_push(push(lane(0)))
    assert effects == [
        Keep(Step(0), X, SiteIndex(0), lane(0)),
        Join(Step(0), X, SiteIndex(0), lane(0), lane(1)),
        Close(X, Step(0), BOTH),
    ]


def test_a_tied_chunk_waits_for_both_sites() -> None:
    shard = core(A, sites=(2, 1))
    shard.on_plan(plan(Placement((A,)), Placement((B,))))
    _, effects = shard.on_push(push(BOTH, site=1))
    assert not of_kind(effects, Close)
    _, effects = shard.on_push(push(BOTH, site=0))
    assert of_kind(effects, Close) == [Close(X, Step(0), BOTH)]


def test_nobody_applies_before_every_chunk_of_the_model_has_closed() -> None:
    shard = core(A)
    shard.on_plan(plan(Placement((A,)), Placement((B,))))
    effects = close(shard, X)
    assert [effect.envelope.message for effect in effects if isinstance(effect, Send)] == [Records((record(X),))]
    assert not of_kind(effects, Apply)
    effects = shard.on_message(Envelope(B, PlanNumber(1, 1), 0, Records((record(Y),))))
    assert of_kind(effects, Apply, Publish) == [
        Apply(X, Step(0), pytest.approx(1 / 8 * min(1, 1 / (2**0.5 / 8 + 1e-6))), CONFIG.optimizer.learning_rate),
        Publish(X, Version(1)),
    ]
    assert shard.judge(push(lane(0), step=0)).outcome is Outcome.DUPLICATE
    assert shard.judge(push(lane(0), step=1)).outcome is Outcome.COUNTED
    assert shard.judge(push(lane(0), step=2)).outcome is Outcome.NOT_YET


def test_a_chunk_closes_only_when_its_backup_holds_the_sum() -> None:
    both = plan(Placement((A, B)), Placement((B, A)))
    primary, backup = core(A), core(B)
    primary.on_plan(both), backup.on_plan(both)
    effects = close(primary, X)
    (sent,) = of_kind(effects, Send)
    assert isinstance(sent, Send) and sent.envelope.message == Replicate(record(X), is_compared=True)
    kept = backup.on_message(sent.envelope)
    assert of_kind(kept, KeepSum) == [KeepSum(X)]
    (ack,) = [effect for effect in kept if isinstance(effect, Send)]
    assert ack.envelope.message == Ack(Step(0), (X,))
    effects = primary.on_message(ack.envelope)
    assert [effect.envelope.message for effect in effects if isinstance(effect, Send)] == [Records((record(X),))]


def test_an_ack_of_an_older_epoch_does_not_close() -> None:
    shard = core(A)
    shard.on_plan(plan(Placement((A, B)), Placement((B, A))))
    close(shard, X)
    shard.on_plan(plan(Placement((A, B)), Placement((B, A)), epoch=2))
    with pytest.raises(StaleError):
        shard.on_message(Envelope(B, PlanNumber(1, 1), 0, Ack(Step(0), (X,))))


def test_a_copy_that_is_not_what_the_primarys_is_is_dropped_and_told() -> None:
    shard = core(B)
    shard.on_plan(plan(Placement((A, B)), Placement((B, A))))
    told = Envelope(A, PlanNumber(1, 1), 0, Replicate(record(X), (), True, 5))
    assert of_kind(shard.on_message(told), KeepSum, Send, Compare) == [KeepSum(X), Compare(X, A, 5)]
    effects = shard.on_compared(X, A, is_equal=False)
    assert of_kind(effects, Forget, Send) == [Forget(X)] and of_kind(effects, Alarm) and shard.diverged == {X}
    shard.on_plan(plan(Placement((A,), B), Placement((B, A)), epoch=2))
    assert shard.diverged == set()


def test_a_copy_that_is_the_same_is_acknowledged() -> None:
    shard = core(B)
    shard.on_plan(plan(Placement((A, B)), Placement((B, A))))
    shard.on_message(Envelope(A, PlanNumber(1, 1), 0, Replicate(record(X), (), True, 5)))
    (sent,) = of_kind(shard.on_compared(X, A, is_equal=True), Send)
    assert isinstance(sent, Send) and sent.envelope.message == Ack(Step(0), (X,))


def test_every_chunk_is_compared_in_turn() -> None:
    shard = core(A, last=99)
    shard.on_plan(plan(Placement((A, B)), Placement((A, B))))
    compared = {}
    for step in range(2 * COMPARED_EVERY_STEPS):
        shard.end_version = 99  # beyond the config's last step
        for chunk in (X, Y):
            (sent,) = of_kind(close(shard, chunk, step=step), Send)
            compared[step, chunk] = sent.envelope.message.is_compared  # type: ignore[attr-defined]
        for chunk in (X, Y):
            shard.on_message(Envelope(B, PlanNumber(1, 1), 0, Ack(Step(step), (chunk,))))
    assert sum(compared.values()) == 4 and compared[0, X] and compared[COMPARED_EVERY_STEPS - 1, Y]


def test_a_chunk_is_refilled_while_its_step_is_open_and_again_if_the_learner_has_missed_one() -> None:
    shard = core(A)
    shard.on_plan(plan(Placement((A,)), Placement((A,))))
    close(shard, X)
    effects = shard.on_plan(plan(Placement((A,), B), Placement((A,)), epoch=2))
    assert not any(isinstance(each.envelope.message, Refill) for each in of_kind(effects, Send))  # type: ignore[attr-defined]
    effects = close(shard, Y)  # the step is decided
    (refill,) = (e.envelope.message for e in of_kind(effects, Send) if isinstance(e.envelope.message, Refill))  # type: ignore[attr-defined]
    assert (refill.chunk, refill.version, refill.closed) == (X, 1, None)
    for step in (1, 2):
        close(shard, X, step=step), close(shard, Y, step=step)
    effects = shard.on_message(Envelope(B, PlanNumber(1, 2), 0, Position(X, Version(1), False)))
    (refill,) = (e.envelope.message for e in of_kind(effects, Send) if isinstance(e.envelope.message, Refill))  # type: ignore[attr-defined]
    assert refill.version == 3


def test_a_call_to_another_shard_that_fails_takes_no_refill_with_it() -> None:
    shard = core(A)
    shard.on_plan(plan(Placement((A,)), Placement((A,))))
    close(shard, X)
    shard.on_plan(plan(Placement((A,), B), Placement((A,)), epoch=2))  # X waits for its turn: its step is closed
    assert shard.on_lost(C) == []
    effects = close(shard, Y)
    assert any(isinstance(each.envelope.message, Refill) for each in of_kind(effects, Send))  # type: ignore[attr-defined]


def test_a_deposed_primary_applies_only_the_sum_that_was_decided_on() -> None:
    shard = core(A)
    shard.on_plan(plan(Placement((A, B)), Placement((B, A))))
    close(shard, X, digest=7)
    shard.on_plan(plan(Placement((B, A)), Placement((B, A)), epoch=2))
    effects = shard.on_message(Envelope(B, PlanNumber(1, 2), 0, Records((record(X, digest=8), record(Y)))))
    assert of_kind(effects, DropSums, Apply) == [DropSums(X, keep_closed=False)]


def test_what_a_primary_has_counted_stays_counted_as_long_as_it_is_primary() -> None:
    shard = core(A)
    shard.on_plan(plan(Placement((A, B)), Placement((A, B))))
    close(shard, X)
    shard.on_push(push(lane(0), chunk=Y))
    assert of_kind(shard.on_plan(plan(Placement((A,)), Placement((A, B)), epoch=2)), DropSums) == []
    assert shard.judge(push(lane(0), chunk=Y)).outcome is Outcome.DUPLICATE
    effects = shard.on_plan(plan(Placement((B, A)), Placement((B, A)), epoch=3))
    assert of_kind(effects, DropSums) == [DropSums(X, keep_closed=True), DropSums(Y, keep_closed=False)]
    shard.on_plan(plan(Placement((B, A)), Placement((A, B)), epoch=4))
    assert shard.judge(push(lane(0), chunk=Y)).outcome is Outcome.COUNTED


def test_a_new_plan_keeps_closed_sums() -> None:
    shard = core(A)
    shard.on_plan(plan(Placement((A, B)), Placement((A, B))))
    close(shard, X)
    effects = shard.on_plan(plan(Placement((B, A)), Placement((B, A)), epoch=2))
    assert of_kind(effects, DropSums) == [DropSums(X, keep_closed=True), DropSums(Y, keep_closed=False)]


def test_who_takes_over_a_chunk_writes_its_part_of_the_version_to_be_checkpointed() -> None:
    """Its primary may have died before it did."""
    shard = core(B)
    shard.on_plan(plan(Placement((A, B)), Placement((B, A))))
    shard.on_message(Envelope(A, PlanNumber(1, 1), 0, Replicate(record(X))))
    shard.requests = REQUEST_CHECKPOINT
    close(shard, Y)
    shard.on_message(Envelope(A, PlanNumber(1, 1), 0, Ack(Step(0), (Y,))))
    shard.on_message(Envelope(A, PlanNumber(1, 1), 0, Records((record(X),))))
    effects = shard.on_plan(plan(Placement((B,)), Placement((B,)), epoch=2))
    assert of_kind(effects, Checkpoint) == [Checkpoint(Version(1), (X,))]


def test_who_becomes_primary_publishes_the_version_it_holds() -> None:
    shard = core(B)
    shard.on_plan(plan(Placement((A, B)), Placement((B, A))))
    assert of_kind(shard.on_plan(plan(Placement((B, A)), Placement((B, A)), epoch=2)), Publish) == [Publish(X, Version(0))]
    assert of_kind(shard.on_plan(plan(Placement((B, A)), Placement((A, B)), epoch=3)), Publish) == []


def test_a_learner_is_filled_a_few_chunks_at_a_time_and_waited_for_where_it_stands() -> None:
    num_chunks = REFILLS_AT_ONCE + 2
    placements = [Placement((A,))] * num_chunks
    shard = core(A, sites=(1,) * num_chunks)
    shard.on_plan(plan(*placements))

    def sent(effects: list[Effect], kind: type) -> list[Any]:
        return [each for effect in effects if isinstance(effect, Send) and isinstance(each := effect.envelope.message, kind)]

    def refilled(effects: list[Effect]) -> list[ChunkId]:
        return [message.chunk for message in sent(effects, Refill)]

    def stands(chunk: int, version: int, closed: bool = False) -> list[Effect]:
        return shard.on_message(Envelope(B, PlanNumber(1, 2), 0, Position(ChunkId(chunk), Version(version), closed)))

    learning = plan(*(replace(each, learner=B) for each in placements), epoch=2)
    assert refilled(shard.on_plan(learning)) == [0, 1, 2, 3]
    assert refilled(stands(0, 0)) == [4]
    assert sent(close(shard, ChunkId(1)), Replicate) == [Replicate(record(ChunkId(1)))], "the sum follows behind its refill"
    assert refilled(stands(1, 0)) == [], "it only lags"
    effects = stands(1, 0, closed=True)
    assert refilled(effects) == [5] and of_kind(effects, AskInSync) == [AskInSync(PlanNumber(1, 2), ChunkId(1), B)]
    assert of_kind(stands(1, 0, closed=True), AskInSync) == [], "asked once"
    assert shard.caught_up() == [(0, B), (1, B)]
    assert sent(close(shard, ChunkId(0)), Replicate) == [Replicate(record(ChunkId(0)), is_compared=True)], (
        "who is waited for gets the sum"
    )


def test_a_stop_and_a_checkpoint_ride_in_the_record_and_act_everywhere_at_one_version() -> None:
    shard = core(A)
    shard.on_plan(plan(Placement((A,)), Placement((B,))))
    shard.requests = REQUEST_CHECKPOINT
    close(shard, X)
    effects = shard.on_message(Envelope(B, PlanNumber(1, 1), 0, Records((record(Y, requests=REQUEST_STOP),))))
    assert of_kind(effects, Checkpoint) == [Checkpoint(Version(1), (X,))]
    (announced,) = of_kind(effects, Announce)
    assert isinstance(announced, Announce) and announced.decision.stop
    assert shard.judge(push(lane(0), step=1)).outcome is Outcome.NOT_YET
    assert shard.requests == 0


def test_a_step_that_is_not_finite_is_skipped() -> None:
    shard = core(A)
    shard.on_plan(plan(Placement((A,)), Placement((B,))))
    shard.on_push(push(BOTH))
    shard.on_measured(X, square_norm=float("nan"), digest=7)
    effects = shard.on_message(Envelope(B, PlanNumber(1, 1), 0, Records((record(Y),))))
    (applied,) = of_kind(effects, Apply)
    assert isinstance(applied, Apply) and applied.scale is None and shard.version == 1


def test_what_a_shard_waits_for_is_said() -> None:
    shard = core(A)
    assert waits_for(shard) == "a plan that makes it a primary"
    shard.on_plan(plan(Placement((A, B)), Placement((B,))))
    shard.on_push(push(lane(1)))
    assert waits_for(shard) == "lanes of step 0 of chunk 0; those marked 1 are in: 01"
    shard.on_push(push(lane(0)))
    shard.on_measured(X, square_norm=1.0, digest=7)
    assert waits_for(shard) == "shard-b to hold the sum of step 0 of chunk 0"
    shard.on_message(Envelope(B, PlanNumber(1, 1), 0, Ack(Step(0), (X,))))
    assert waits_for(shard) == "the other chunks of step 0; 1 have closed"


def test_a_new_timeline_voids_everything() -> None:
    shard = core(A)
    shard.on_plan(plan(Placement((A,)), Placement((A,))))
    close(shard, X)
    shard.on_plan(plan(Placement((A,)), Placement((A,)), epoch=2, timeline=1))
    assert shard.judge(push(lane(0), timeline=0)).outcome is Outcome.STALE
    assert shard.judge(push(lane(0), timeline=1)).outcome is Outcome.COUNTED
    with pytest.raises(StaleError, match="timeline 0"):
        shard.on_message(Envelope(B, PlanNumber(1, 2), 0, Records((record(Y),))))


def test_equal_numbers_with_other_contents_are_refused() -> None:
    shard = core(A)
    shard.on_plan(plan(Placement((A,)), Placement((B,))))
    with pytest.raises(StaleError, match=r"two plans are numbered 1\.1"):
        shard.on_plan(plan(Placement((B,)), Placement((B,))))


def test_who_is_listed_in_sync_without_the_chunk_raises_an_alarm() -> None:
    shard = core(A)
    shard.on_plan(plan(Placement((B,)), Placement((A,))))
    effects = shard.on_plan(plan(Placement((A,)), Placement((A,)), epoch=2))
    assert len(of_kind(effects, Alarm)) == 1


def test_what_was_lost_is_sent_again_until_it_is_known_there() -> None:
    shard = core(A)
    shard.on_plan(plan(Placement((A,)), Placement((B,))))
    close(shard, X)
    (again,) = shard.on_tick()
    assert isinstance(again, Send) and again.envelope.message == Records((record(X),))
    shard.on_delivered(B, again.envelope)
    assert shard.on_tick() == []


def test_who_was_told_something_before_a_roll_back_is_told_again() -> None:
    shard = core(A)
    shard.on_plan(plan(Placement((A,)), Placement((B,))))
    close(shard, X)
    (told,) = shard.on_tick()
    shard.on_plan(plan(Placement((A,)), Placement((B,)), epoch=2, timeline=1))
    assert isinstance(told, Send)
    shard.on_delivered(B, told.envelope)  # the answer comes late
    shard.on_push(push(BOTH, timeline=1, loss=2.0))
    assert [each for each in shard.on_measured(X, square_norm=1.0, digest=7) if isinstance(each, Send)]
