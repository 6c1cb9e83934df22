"""The book of records is bounded, whatever its shard holds."""

from __future__ import annotations

from ps_service.core.messages import Record
from ps_service.core.record_book import RecordBook
from shardlane.ids import ChunkId, Incarnation, Step
from shardlane.tally import LaneRun, Tally


def record(step: int, chunk: int = 0) -> Record:
    return Record(Step(step), ChunkId(chunk), 1.0, 4, 0.0, 7, Tally(1, (LaneRun(0, 1, 1, 1),)))


def test_two_steps_are_kept_and_what_is_older_is_not_taken_back() -> None:
    book = RecordBook(num_chunks=2, decide=lambda step, records: None)  # type: ignore[arg-type,return-value]
    for step in range(5):
        assert all(book.learn(record(step, chunk)) for chunk in (0, 1))
        book.delivered(Incarnation("shard-1"), [record(step)])
    assert sorted(book.records) == [3, 4]
    assert not book.learn(record(2)) and sorted(book.records) == [3, 4]
    assert not book.learn(record(3)), "known"
    assert book.unknown_to(Incarnation("shard-1")) == (record(3, 1), record(4, 1))
