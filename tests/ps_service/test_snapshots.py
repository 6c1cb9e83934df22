"""What a shard makes of checkpoints that cannot be written: each is told, the newest is always tried, and none piles up."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

from ps_service import snapshots
from ps_service.snapshots import SnapshotWriter
from ps_service.store import TensorStore
from shardlane.checkpoint import PartWriter
from shardlane.ids import ChunkId, Incarnation, Version
from shardlane.partition import Layout
from shardlane.pb import coordinator_pb2
from tests.shardlane.checkpoints import small_config, state

CONFIG = small_config()
CHUNKS = tuple(chunk.id for chunk in Layout.of(CONFIG).chunks)


def test_after_a_failure_only_the_newest_of_those_that_waited_is_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "step-00000002").touch()  # no folder can be made there
    has_begun, may_go_on = threading.Event(), threading.Event()

    def slowly(*arguments: Any) -> PartWriter:
        has_begun.set()
        assert may_go_on.wait(30)
        return PartWriter(*arguments)

    monkeypatch.setattr(snapshots, "PartWriter", slowly)
    store = TensorStore(CONFIG, Layout.of(CONFIG))
    for chunk in CHUNKS:
        store.put(chunk, Version(2), state(CONFIG, ChunkId(chunk)), num_steps=2)
    reports: list[coordinator_pb2.ReportCheckpointRequest] = []
    writer = SnapshotWriter(Incarnation("shard-1"), tmp_path, CONFIG, store, reports.append)
    writer.take(0, Version(2), CHUNKS)
    assert has_begun.wait(30)
    for version in (4, 6, 8):
        writer.take(0, Version(version), CHUNKS)
    may_go_on.set()
    writer.close()
    assert [(report.version, report.error[:20]) for report in reports] == [
        (2, f"cannot write {tmp_path}"[:20]),
        (4, "it waited while that"),
        (6, "it waited while that"),
        (8, ""),
    ]
    assert len(reports[-1].chunks) == len(CHUNKS) and (tmp_path / "step-00000008" / reports[-1].file).is_file()
