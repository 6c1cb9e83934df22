"""What a shard tells its backups again: after a lost call, and under another plan."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ps_service.peers import Parcel
from shardlane.ids import Incarnation, PlanNumber
from shardlane.plan import Member, Placement
from tests.ps_service.test_interoperation import LAYOUT, ME, Served, everything


class Box:
    """An outbox that delivers nothing."""

    def __init__(self, receiver: Incarnation, *_: object, **__: object) -> None:
        self.parcels: list[Parcel] = []

    def put(self, parcel: Parcel) -> None:
        self.parcels.append(parcel)

    def drop(self) -> None:
        self.parcels.clear()

    def close(self) -> None:
        pass


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    made = Served(tmp_path)
    yield made
    made.stop()


def test_what_waits_for_a_backup_waits_once_whatever_fails(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ps_service.shard.Outbox", Box)
    backup, old = Incarnation("shard-other"), served.shard.plan
    assert old is not None
    members = (*old.members, Member(backup, "shard", "127.0.0.1:1"))
    placements = tuple(Placement((ME, backup)) for _ in LAYOUT.chunks)
    two = replace(old, number=PlanNumber(1, 2), members=members, placements=placements)
    served.shard.adopt(two)
    served.stub.Push(everything(1.0), timeout=20)
    box: Any = served.shard._outboxes[backup]
    sums = sorted(parcel.envelope.message.record.chunk for parcel in box.parcels)
    assert sums == [chunk.id for chunk in LAYOUT.chunks]
    served.shard._on_done(backup, [], "lost")
    assert len(box.parcels) == len(sums), "a lost record has lost no sum"
    served.shard.adopt(replace(two, number=PlanNumber(1, 3)))
    assert {parcel.envelope.plan for parcel in box.parcels} == {PlanNumber(1, 3)} and len(box.parcels) == len(sums)
    box.parcels.clear()
    served.shard._on_done(backup, [], "lost with tensors")
    assert len(box.parcels) == len(sums)
