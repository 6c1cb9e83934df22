"""A shard under ASP: the first chunk's primary decides whose turn it is, every contribution is applied by itself."""

from __future__ import annotations

import pytest
import torch

from ps_service.core.commit import decide
from ps_service.core.holdings import Terms
from ps_service.core.messages import (
    Announce,
    Apply,
    Close,
    Decision,
    Effect,
    Envelope,
    KeepState,
    Outcome,
    Publish,
    Record,
    Records,
    Refill,
)
from ps_service.core.shard import ShardCore
from ps_service.envelopes import from_wire
from ps_service.store import TensorStore
from shardlane.config import Config, build
from shardlane.errors import MalformedError
from shardlane.ids import Incarnation, Lane, PlanNumber, Step, Timeline, Version
from shardlane.lanes import lane
from shardlane.partition import Layout
from shardlane.pb import ps_pb2
from shardlane.plan import DONE, Placement
from shardlane.tally import LaneRun, Tally
from shardlane.turns import LaneClock, Turn, number_of
from tests.ps_service.test_shard_core import A, B, X, Y, of_kind, plan, push

SETTINGS = {"lanes": 2, "micro_batch_size": 1, "global_batch_size": 2, "max_steps": 3, "seq_len": 4, "consistency": "asp"}


def config(**changes: object) -> Config:
    return build({"train": {**SETTINGS, **changes}, "checkpoint": {"every_steps": 2}})


def core(me: Incarnation, **changes: object) -> ShardCore:
    here = config(**changes)

    def decision(step: Step, records: object) -> Decision:
        return decide(step, records, config=here, loss_chunk=X)  # type: ignore[arg-type]

    return ShardCore(me, Terms((1, 1), 2, here.train.last_step, goes_by_turns=True), decide=decision)


def number(of_lane: int, turn: int) -> Step:
    return number_of(of_lane, turn, 2)


def record(chunk: int, step: int, of_lane: int, turn: int, *, staleness: int = 0, clock_sum: int = 0) -> Record:
    tally = Tally(1, (LaneRun(0, 1, 1, 1), LaneRun(1, 1, 0, 0)) if of_lane == 0 else (LaneRun(0, 1, 0, 0), LaneRun(1, 1, 1, 1)))
    what = Turn(number(of_lane, turn), staleness, clock_sum)
    return Record(Step(step), [X, Y][chunk], 1.0, 4, 1.0, 7, tally, turn=what)


def send(shard: ShardCore, of_lane: int, turn: int, chunk: int = 0) -> list[Effect]:
    answer, effects = shard.on_push(push(lane(of_lane), step=number(of_lane, turn), chunk=[X, Y][chunk]))
    assert answer.outcome is Outcome.COUNTED
    return effects


def told(shard: ShardCore, sender: Incarnation, *records: Record) -> list[Effect]:
    return list(shard.on_message(Envelope(sender, PlanNumber(1, 1), 0, Records(records))))


def test_the_chunk_that_decides_closes_the_turn_that_is_in_first() -> None:
    shard = core(A)
    shard.on_plan(plan(Placement((A,)), Placement((B,))))
    assert of_kind(send(shard, 1, 0), Close) == [Close(X, number(1, 0), lane(1))]
    shard.on_measured(X, square_norm=1.0, digest=7)
    closed = shard.chunks[X].closed
    assert closed is not None and closed.turn == Turn(number(1, 0), 0, 0)
    assert not of_kind(send(shard, 0, 0), Close), "one after the other"


def test_another_chunk_waits_for_the_decision_and_closes_that_turn_alone() -> None:
    shard = core(B)
    shard.on_plan(plan(Placement((A,)), Placement((B,))))
    assert not of_kind([*send(shard, 0, 0, 1), *send(shard, 1, 0, 1)], Close)
    assert of_kind(told(shard, A, record(0, 0, 1, 0)), Close) == [Close(Y, number(1, 0), lane(1))]


def test_the_decision_may_come_before_the_contribution() -> None:
    shard = core(B)
    shard.on_plan(plan(Placement((A,)), Placement((B,))))
    told(shard, A, record(0, 0, 1, 0))
    assert not of_kind(send(shard, 0, 0, 1), Close)
    assert of_kind(send(shard, 1, 0, 1), Close) == [Close(Y, number(1, 0), lane(1))]


def test_a_turn_that_is_applied_moves_its_lane_on_and_no_other() -> None:
    shard = core(A)
    shard.on_plan(plan(Placement((A,)), Placement((B,))))
    send(shard, 1, 0)
    send(shard, 0, 0)
    shard.on_measured(X, square_norm=1.0, digest=7)
    effects = told(shard, B, record(1, 0, 1, 0))
    clocks = (LaneClock(0, 0, Version(0)), LaneClock(1, 0, Version(1)))
    (applied,) = of_kind(effects, Apply)
    assert isinstance(applied, Apply) and (applied.lane, applied.clocks) == (Lane(1), clocks)
    assert of_kind(effects, Publish) == [Publish(X, Version(1), clocks)]
    assert of_kind(effects, Close) == [Close(X, number(0, 0), lane(0))], "lane 0 is in, and its turn comes now"
    assert shard.judge(push(lane(1), step=number(1, 0))).outcome is Outcome.DUPLICATE
    assert shard.judge(push(lane(1), step=number(1, 1))).outcome is Outcome.COUNTED
    assert shard.judge(push(lane(1), step=number(1, 2))).outcome is Outcome.NOT_YET
    assert shard.judge(push(lane(0), step=number(0, 0))).outcome is Outcome.DUPLICATE, "it is being closed"


def test_a_stale_turn_is_refused_and_its_lane_goes_on_from_the_present() -> None:
    shard = core(A, staleness_max=2)
    shard.on_plan(plan(Placement((A,)), Placement((B,))))
    for version in range(3):
        send(shard, 1, version)
        shard.on_measured(X, square_norm=1.0, digest=7)
        told(shard, B, record(1, version, 1, version, clock_sum=version))
    send(shard, 0, 0)
    shard.on_measured(X, square_norm=1.0, digest=7)
    effects = told(shard, B, record(1, 3, 0, 0, staleness=3, clock_sum=3))
    (applied,) = of_kind(effects, Apply)
    assert isinstance(applied, Apply) and applied.scale is None
    assert applied.clocks[0] == LaneClock(1, 1, Version(4)) and applied.clocks[0].clock == 0, "the same batch, anew"
    (announced,) = of_kind(effects, Announce)
    assert isinstance(announced, Announce) and announced.decision.refused and not announced.decision.skipped


def test_the_run_is_done_when_the_clocks_add_up() -> None:
    here, records = config(), [record(chunk, 6, 1, 4, staleness=1, clock_sum=5) for chunk in (0, 1)]
    decision = decide(Step(6), records, config=here, loss_chunk=X)
    assert decision.stop and decision.checkpoint and decision.requests == DONE
    before = decide(Step(3), [record(chunk, 3, 0, 1, clock_sum=3) for chunk in (0, 1)], config=here, loss_chunk=X)
    assert (before.stop, before.checkpoint) == (False, True), "two steps of two lanes"
    refused = decide(Step(6), records, config=config(staleness_max=2), loss_chunk=X)
    assert refused.stop, "a version as old as the bound is no older"


@pytest.mark.parametrize(("staleness", "factor"), [(0, 1.0), (1, 1.0), (4, 0.25)])
def test_the_rate_is_that_of_the_mean_clock_over_the_age_of_the_version(staleness: int, factor: float) -> None:
    fresh, old = (
        decide(Step(9), [record(chunk, 9, 1, 4, staleness=each, clock_sum=3) for chunk in (0, 1)], config=config(), loss_chunk=X)
        for each in (0, staleness)
    )
    assert old.learning_rate == fresh.learning_rate * factor
    plain = config(staleness_aware=False)
    records = [record(chunk, 9, 1, 4, staleness=staleness, clock_sum=3) for chunk in (0, 1)]
    assert decide(Step(9), records, config=plain, loss_chunk=X).learning_rate == fresh.learning_rate


def test_a_learner_takes_over_where_the_lanes_stand() -> None:
    shard = core(B)
    shard.on_plan(plan(Placement((A,), learner=B), Placement((A,))))
    clocks = (LaneClock(3, 1, Version(5)), LaneClock(2, 0, Version(4)))
    message = Refill(X, Version(5), None, (), clocks=clocks)
    effects = shard.on_message(Envelope(A, PlanNumber(1, 1), 0, message))
    assert of_kind(effects, KeepState) == [KeepState(X, Version(5), False, clocks)]
    assert shard.chunks[X].clocks == clocks


def test_a_refill_of_another_than_the_primary_is_passed_over() -> None:
    shard = core(B)
    shard.on_plan(plan(Placement((A,), learner=B), Placement((A,))))
    message = Refill(X, Version(5), None, (), clocks=(LaneClock(5, 0, Version(5)), LaneClock(0, 0, Version(0))))
    assert shard.on_message(Envelope(Incarnation("shard-else"), PlanNumber(1, 1), 0, message)) == [] and not shard.chunks


@pytest.mark.parametrize("clock", [LaneClock(2, 3, Version(1)), LaneClock(9, 0, Version(1)), LaneClock(2, 0, Version(9))])
def test_clocks_that_cannot_be_are_refused(clock: LaneClock) -> None:
    clocks = [ps_pb2.LaneClock(**each._asdict()) for each in (clock, LaneClock(1, 0, Version(1)))]
    request = ps_pb2.DeliverRequest(refill=ps_pb2.Refill(chunk=0, version=5, clocks=clocks))
    with pytest.raises(MalformedError, match="a refill of version 5 with a lane at"):
        from_wire(request, Layout.of(config()), config().train)


def test_a_timeline_goes_on_from_the_clocks_of_its_checkpoint() -> None:
    shard = core(A)
    first = plan(Placement((A,)), Placement((A,)))
    back = Timeline(1, Version(7), "d" * 64, clocks=(4, 3))
    shard.on_plan(type(first)(first.number, first.run_id, back, first.members, (), (), first.placements))
    assert shard.chunks[X].clocks == (LaneClock(4, 0, Version(7)), LaneClock(3, 0, Version(7)))


def test_pulls_find_what_a_lanes_turn_is_computed_from_and_how_many_were_refused() -> None:
    here = config(staleness_max=2)
    layout = Layout.of(here)
    chunk = min(layout.chunks, key=lambda each: each.num_elements)
    store = TensorStore(here, layout)
    start = torch.zeros(chunk.num_elements)
    store.put(chunk.id, Version(3), {"parameter": start}, 0, (LaneClock(2, 1, Version(3)), LaneClock(1, 0, Version(3))))
    store.keep_sum(chunk.id, torch.ones(chunk.num_elements))
    clocks = (LaneClock(2, 1, Version(3)), LaneClock(2, 0, Version(4)))
    store.apply(Apply(chunk.id, Step(3), 1.0, 0.5, Lane(1), clocks))
    with store.parameter_of(chunk.id, number(0, 2)) as old, store.parameter_of(chunk.id, number(1, 2)) as new:
        assert old is not None and old.parameter is not None and old.refused == 1 and not old.parameter.any()
        assert new is not None and new.parameter is not None and new.refused == 0 and new.parameter.all()
    with store.parameter_of(chunk.id, number(1, 1)) as past, store.parameter_of(chunk.id, number_of(2, 4, 2)) as present:
        assert past is not None and past.parameter is None and past.version == number(1, 2)
        assert present is not None and present.parameter is not None and present.parameter.all()
