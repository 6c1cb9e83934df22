"""From the barrier's counts to a step's tally: what the ledger is made of, and that a broken deduplication shows in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest

from ps_service.core.barrier import Barrier
from ps_service.core.commit import decide
from ps_service.core.holdings import Terms
from ps_service.core.messages import Announce, Answer, Contribution, Decision, Effect, Envelope, Outcome, Record, Records, Refill
from ps_service.core.shard import ShardCore
from ps_service.envelopes import from_wire, record_from_wire, record_to_wire, to_wire
from shardlane.config import Config, build
from shardlane.errors import MalformedError
from shardlane.ids import ChunkId, Incarnation, Lane, PlanNumber, RunId, SiteIndex, Step, Timeline, Version
from shardlane.lanes import Block, lane
from shardlane.ledger import Entry, Expected, TimelineStart, judge, to_line
from shardlane.partition import Layout
from shardlane.pb import ps_pb2
from shardlane.plan import Member, Placement, Plan
from shardlane.tally import LaneRun, Tally
from shardlane.train_config import TrainConfig

ME = Incarnation("shard-me")
CONFIG: Config = build(
    {
        "model": {"preset": "tiny", "num_hidden_layers": 1, "tie_word_embeddings": True},
        "train": {"lanes": 4, "micro_batch_size": 1, "global_batch_size": 8, "max_steps": 5, "seq_len": 8},
    }
)
LAYOUT, EXPECTS = Layout.of(CONFIG), Expected.of(CONFIG)
TIED, PLAIN = ChunkId(0), ChunkId(1)
ONCE = (LaneRun(0, 4, 1, 1),)


def contribution(block: Block, chunk: ChunkId = TIED, site: int = 0) -> Contribution:
    return Contribution(0, Step(0), block, SiteIndex(site), chunk, 16 * block.size, 2.0)


def record(chunk: ChunkId, tally: Tally) -> Record:
    return Record(Step(0), chunk, 1.0, 64, 2.0, 7, tally)


# ---- barrier, decision -------------------------------------------------------------------------------------------------


def test_a_barrier_counts_what_was_kept_apart_from_its_masks() -> None:
    barrier = Barrier.fresh(4, 2)
    assert barrier.tally == Tally(2, (LaneRun(0, 4, 0, 0),))
    for site in (0, 1):
        barrier.count(contribution(Block(Lane(2), 2), site=site))
        barrier.count(contribution(lane(1), site=site))
    assert barrier.tally == Tally(2, (LaneRun(0, 1, 0, 0), LaneRun(1, 3, 1, 1)))
    barrier.count(contribution(lane(0)))
    assert barrier.tally == Tally(2, (LaneRun(0, 1, 0, 1), LaneRun(1, 3, 1, 1)))
    barrier.count(contribution(lane(0), site=1))
    assert barrier.has(Block(Lane(0), 4)) and barrier.tally == Tally(2, ONCE)


def test_what_is_judged_a_duplicate_counts_nowhere() -> None:
    core, effects = primary_of_all(), list[Effect]()
    for _ in range(2):
        for index in range(4):
            effects += core.on_push(contribution(lane(index), PLAIN))[1]
    assert core.chunks[PLAIN].barrier.tally == Tally(1, ONCE)


def test_a_lane_that_is_counted_although_it_is_in_shows() -> None:
    barrier = Barrier.fresh(4, 1)
    for block in (Block(Lane(0), 2), lane(1), Block(Lane(2), 2)):
        barrier.count(contribution(block))
    assert barrier.has(Block(Lane(0), 4)) and barrier.tally.runs == ((0, 1, 1, 1), (1, 1, 2, 2), (2, 2, 1, 1))


def test_a_decision_is_over_the_tables_of_all_records() -> None:
    records = [record(chunk.id, Tally(LAYOUT.num_sites(chunk.id), ONCE)) for chunk in LAYOUT.chunks]
    assert decision_of(records).tally == Tally(EXPECTS.tables, ONCE)
    records[3] = replace(records[3], tally=Tally(1, (LaneRun(0, 3, 1, 1), LaneRun(3, 1, 0, 0))))
    assert decision_of(records).tally == Tally(EXPECTS.tables, (LaneRun(0, 3, 1, 1), LaneRun(3, 1, 0, 1)))


def decision_of(records: Sequence[Record]) -> Decision:
    return decide(Step(0), records, config=CONFIG, loss_chunk=LAYOUT.loss_chunk)


# ---- wire --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tally", [Tally(2, ONCE), Tally(2, (LaneRun(0, 1, 0, 3), LaneRun(1, 3, 1, 1)))], ids=str)
def test_a_record_with_its_tally_survives_the_wire(tally: Tally) -> None:
    known = replace(record(TIED, tally), requests=3)
    assert record_from_wire(record_to_wire(known), LAYOUT, TrainConfig(lanes=4)) == known
    for message in (Records((known,)), Refill(TIED, Version(0), known, (known,))):
        envelope = Envelope(ME, PlanNumber(1, 1), 0, message)
        (framed,) = to_wire(envelope, [], run_id=RunId("r"), receiver=ME)
        assert (
            from_wire(ps_pb2.DeliverRequest.FromString(framed.header.SerializeToString()), LAYOUT, TrainConfig(lanes=4))
            == envelope
        )


@pytest.mark.parametrize(
    ("chunk", "tally", "says"),
    [
        (TIED, Tally(1, ONCE), "chunk 0 has 2 sites; found a tally over 1"),
        (PLAIN, Tally(2, ONCE), "chunk 1 has 1 sites; found a tally over 2"),
        (TIED, Tally(2, (LaneRun(0, 8, 1, 1),)), "does not name each of 4 lanes once"),
        (TIED, Tally(2, (LaneRun(0, 2, 1, 1),)), "does not name each of 4 lanes once"),
        (TIED, Tally(2, ()), "does not name each of 4 lanes once"),
        (TIED, Tally(2, ONCE * 5), "a tally of 5 runs of lanes"),
        (ChunkId(999), Tally(2, ONCE), "chunk 999 is not one of the model's"),
    ],
)
def test_a_record_of_other_sites_or_lanes_is_refused(chunk: ChunkId, tally: Tally, says: str) -> None:
    with pytest.raises(MalformedError, match=says):
        record_from_wire(record_to_wire(record(chunk, tally)), LAYOUT, TrainConfig(lanes=4))


def test_a_record_without_a_tally_is_refused() -> None:
    with pytest.raises(MalformedError, match="a tally over 0 tables"):
        record_from_wire(ps_pb2.Record(step=0, chunk=1, digest=7), LAYOUT, TrainConfig(lanes=4))


# ---- from pushes to the judge ------------------------------------------------------------------------------------------


def primary_of_all() -> ShardCore:
    core = ShardCore(
        ME,
        Terms(tuple(LAYOUT.num_sites(chunk.id) for chunk in LAYOUT.chunks), 4, 5),
        decide=lambda step, records: decision_of(records),
    )
    placements = tuple(Placement((ME,)) for _ in LAYOUT.chunks)
    core.on_plan(
        Plan(PlanNumber(1, 1), RunId("r"), Timeline(0, Version(0)), (Member(ME, "shard", "here:1"),), (), (), placements)
    )
    return core


def faults_of_a_step(repeated: ChunkId) -> list[str]:
    """What the ledger's judge finds in a step of one shard, when lane 2 comes twice at site 0 of one chunk."""
    core = primary_of_all()
    announced: list[Announce] = []
    for chunk in LAYOUT.chunks:
        for site in range(LAYOUT.num_sites(chunk.id)):
            for index in (2, 2, 0, 1, 3) if (chunk.id, site) == (repeated, 0) else (0, 1, 2, 3):
                core.on_push(contribution(lane(index), chunk.id, site))
        effects = core.on_measured(chunk.id, square_norm=1.0, digest=7)
        announced += [effect for effect in effects if isinstance(effect, Announce)]
    (told,) = announced
    entry = Entry(told.step, 0, told.decision.tokens, told.decision.tally)
    return judge([to_line(TimelineStart(0, 0, 0, "", EXPECTS)), to_line(entry)], EXPECTS, reached=1).faults


@pytest.mark.parametrize("chunk", [TIED, PLAIN, ChunkId(len(LAYOUT.chunks) - 1)])
def test_a_broken_deduplication_is_caught_by_the_ledgers_judge(chunk: ChunkId, monkeypatch: pytest.MonkeyPatch) -> None:
    assert faults_of_a_step(chunk) == []
    monkeypatch.setattr(Barrier, "judge", lambda self, site, block: Answer(Outcome.COUNTED))
    assert "step 0, lane 2 (micro-batches 4..5): counted 2 times in a table" in faults_of_a_step(chunk)
