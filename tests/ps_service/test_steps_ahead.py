"""A shard under SSP: lanes of later steps are in before their step is open, and steps close one after the other."""

from __future__ import annotations

from ps_service.core.messages import Apply, Close, DropSums, Envelope, Outcome, Position, Publish, Records, Replicate, Send
from ps_service.core.shard import ShardCore
from shardlane.ids import PlanNumber, Step, Version
from shardlane.plan import REQUEST_STOP, Placement
from tests.ps_service.test_shard_core import BOTH, A, B, X, Y, close, core, of_kind, plan, push, record


def told(shard: ShardCore, step: int, requests: int = 0) -> list[object]:
    """Shard B's record of its own chunk."""
    return list(shard.on_message(Envelope(B, PlanNumber(1, 1), 0, Records((record(Y, step, requests=requests),)))))


def test_lanes_are_taken_in_for_as_many_steps_as_are_open() -> None:
    shard = core(A, staleness=2)
    shard.on_plan(plan(Placement((A,)), Placement((B,))))
    assert [shard.judge(push(BOTH, step=step)).outcome for step in range(4)] == [Outcome.COUNTED] * 3 + [Outcome.NOT_YET]
    _, effects = shard.on_push(push(BOTH, step=1))
    assert not of_kind(effects, Close), "step 0 is open"
    assert shard.judge(push(BOTH, step=1)).outcome is Outcome.DUPLICATE


def test_a_step_whose_lanes_are_all_in_closes_when_the_one_before_is_applied() -> None:
    shard = core(A, staleness=2)
    shard.on_plan(plan(Placement((A,)), Placement((B,))))
    shard.on_push(push(BOTH, step=1))
    close(shard, X)
    effects = told(shard, 0)
    kinds = [type(each) for each in effects if isinstance(each, Apply | Publish | Close)]
    assert kinds == [Apply, Publish, Close] and of_kind(effects, Close) == [Close(X, Step(1), BOTH)]  # type: ignore[arg-type]
    assert shard.judge(push(BOTH, step=1)).outcome is Outcome.DUPLICATE


def test_no_step_from_the_runs_end_on_closes_though_its_lanes_are_in() -> None:
    shard = core(A, staleness=2)
    shard.on_plan(plan(Placement((A,)), Placement((B,))))
    shard.on_push(push(BOTH, step=1))
    close(shard, X)
    assert not of_kind(told(shard, 0, REQUEST_STOP), Close)  # type: ignore[arg-type]
    assert shard.judge(push(BOTH, step=1)).outcome is Outcome.NOT_YET


def test_a_new_primary_has_counted_nothing_of_any_step() -> None:
    shard = core(A, staleness=2)
    shard.on_plan(plan(Placement((A, B)), Placement((B, A))))
    shard.on_push(push(BOTH, step=1))
    effects = shard.on_plan(plan(Placement((B, A)), Placement((B, A)), epoch=2))
    assert of_kind(effects, DropSums)[0] == DropSums(X, keep_closed=False)
    shard.on_plan(plan(Placement((A, B)), Placement((B, A)), epoch=3))
    assert shard.judge(push(BOTH, step=1)).outcome is Outcome.COUNTED


def test_a_sum_that_came_too_early_is_asked_for_when_its_step_begins() -> None:
    backup = core(B, staleness=2)
    backup.on_plan(plan(Placement((A, B)), Placement((B, A))))
    early = Envelope(A, PlanNumber(1, 1), 0, Replicate(record(X, 1)))
    assert backup.on_message(early) == []
    backup.on_message(Envelope(A, PlanNumber(1, 1), 0, Replicate(record(X))))
    close(backup, Y)
    effects = backup.on_message(Envelope(A, PlanNumber(1, 1), 0, Records((record(X), record(Y)))))
    asked = [each for each in of_kind(effects, Send) if isinstance(each.envelope.message, Position)]  # type: ignore[attr-defined]
    assert [(each.to, each.envelope.message) for each in asked] == [(A, Position(X, Version(1), closed=False))]  # type: ignore[attr-defined]


def test_a_primary_sends_the_sum_again_to_a_backup_that_asks() -> None:
    primary = core(A, staleness=2)
    primary.on_plan(plan(Placement((A, B)), Placement((B, A))))
    close(primary, X)
    asks = Envelope(B, PlanNumber(1, 1), 0, Position(X, Version(0), closed=False))
    sent = [each.envelope.message for each in primary.on_message(asks) if isinstance(each, Send)]
    assert [type(each) for each in sent] == [Replicate]
    assert primary.on_message(Envelope(B, PlanNumber(1, 1), 0, Position(X, Version(1), closed=False))) == []
