"""How long chunks take is measured from their whole sums, once for each step."""

from __future__ import annotations

import pytest

from ps_service.instruments import ShardInstruments
from shardlane.ids import ChunkId, Step, Version
from shardlane.metrics import Metrics


def test_words_and_versions_are_timed_from_the_sum_that_they_are_of(monkeypatch: pytest.MonkeyPatch) -> None:
    metrics, now = Metrics("shard"), 10.0
    monkeypatch.setattr("ps_service.instruments.time.perf_counter", lambda: now)
    instruments = ShardInstruments(metrics)

    def seen(what: str) -> tuple[float | None, float | None]:
        read = metrics.registry.get_sample_value
        return read(f"shardlane_shard_{what}_seconds_count"), read(f"shardlane_shard_{what}_seconds_sum")

    chunk, other = ChunkId(0), ChunkId(1)
    instruments.published(chunk, Version(5))  # as a plan has it published that begins here
    instruments.closed(chunk, Step(5))
    now = 11.0
    instruments.acknowledged([chunk, other], Step(5))
    instruments.acknowledged([chunk], Step(4))  # of an earlier step, told again
    assert seen("replication") == (1, 1.0) and seen("publish") == (0, 0.0)
    now = 13.0
    instruments.published(chunk, Version(6))
    now = 99.0
    instruments.published(chunk, Version(6))  # another plan
    assert seen("replication") == (1, 1.0) and seen("publish") == (1, 3.0)
