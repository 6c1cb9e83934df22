"""ledger.jsonl as a coordinator leaves it: appended, never rewritten, each step of a timeline once."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from coordinator.ledger_file import LedgerFile
from shardlane.ids import Timeline, Version
from shardlane.ledger import Entry, Expected, TimelineStart, from_line, judge
from tests.coordinator.cast import small_config, summary
from tests.coordinator.test_service import NAMES, cluster

EXPECTS = Expected.of(small_config())
FIRST = Timeline(0, Version(0))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger.jsonl"


def fill(path: Path, num_steps: int) -> LedgerFile:
    file = LedgerFile(path, EXPECTS)
    file.begin(FIRST, "everybody is here")
    for step in range(num_steps):
        file.append(summary(step))
    file.flush()
    return file


def items(path: Path) -> list[TimelineStart | Entry]:
    return [from_line(line) for line in path.read_bytes().splitlines(keepends=True)]


def steps(path: Path) -> list[int]:
    return [item.step for item in items(path) if isinstance(item, Entry)]


def faults(path: Path) -> list[str]:
    return judge(path.read_bytes().splitlines(keepends=True), EXPECTS).faults


def test_an_entry_has_what_the_shards_counted(path: Path) -> None:
    file = fill(path, 1)
    file.append(replace(summary(1), skipped=True))
    file.append(replace(summary(2), refused=True))
    file.flush()
    counted = summary(0).tally
    assert items(path) == [
        TimelineStart(0, 0, 0, "everybody is here", EXPECTS),
        Entry(0, 0, 32, counted),
        Entry(1, 0, 32, counted, skipped=True),
        Entry(2, 0, 32, counted, refused=True),
    ]


def test_a_restart_goes_on_behind_the_last_whole_line_and_writes_no_step_twice(path: Path) -> None:
    fill(path, 3)
    whole = path.read_bytes()
    with path.open("ab") as torn:
        torn.write(b'{"step":3,"timel')
    file = LedgerFile(path, EXPECTS)
    assert path.read_bytes() == whole and (file.timeline, file.version) == (0, 3)
    file.begin(FIRST, "another reason, of a later plan")
    for step in (1, 2, 3):  # rows that were on their way to metrics.jsonl are told again
        file.append(summary(step))
    file.flush()
    assert steps(path) == [0, 1, 2, 3] and path.read_bytes().startswith(whole) and faults(path) == []


def test_a_roll_back_is_a_line_and_takes_nothing_away(path: Path) -> None:
    file = fill(path, 3)
    before = path.read_bytes()
    file.append(summary(3))  # not written yet, and all the same it has been
    file.begin(Timeline(1, Version(2), "digest"), "shard-2 is gone")
    file.append(summary(2))
    file.flush()
    assert path.read_bytes().startswith(before) and steps(path) == [0, 1, 2, 3, 2]
    assert TimelineStart(1, 2, 2, "shard-2 is gone", EXPECTS) in items(path)
    again = LedgerFile(path, EXPECTS)
    assert (again.timeline, again.version) == (1, 3) and faults(path) == []


def test_a_damaged_line_does_not_keep_a_coordinator_from_its_work(path: Path) -> None:
    fill(path, 2)
    with path.open("ab") as damaged:
        damaged.write(b"\0\0\0\n")
    file = LedgerFile(path, EXPECTS)
    assert (file.timeline, file.version) == (0, 2)
    assert faults(path)[0].startswith("line 4: ")


def test_a_full_disk_leaves_no_half_entry_and_loses_none(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = fill(path, 1)
    before = path.read_bytes()
    file.append(summary(1))

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("shardlane.files.os.fsync", full)
        with pytest.raises(OSError, match="No space"):
            file.flush()
    assert path.read_bytes() == before
    file.flush()
    file.flush()
    assert steps(path) == [0, 1]


# ---- the coordinator writes it -----------------------------------------------------------------------------------------


def test_a_run_with_a_restart_has_each_step_once(tmp_path: Path) -> None:
    with cluster(tmp_path) as c:
        c.register(*NAMES)
        c.beat("shard 1", 0, 1)
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_bytes(metrics.read_bytes().splitlines(keepends=True)[0])  # killed between the two files
    with cluster(tmp_path) as c:
        assert c.beat("shard 1").acknowledged_steps == 1
        assert c.beat("shard 2", 1, 2, 3).acknowledged_steps == 4
    assert steps(tmp_path / "ledger.jsonl") == [0, 1, 2, 3] and faults(tmp_path / "ledger.jsonl") == []


def test_no_step_is_acknowledged_before_its_entry_is_durable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(file: object) -> None:
        raise OSError(28, "No space left on device")

    with cluster(tmp_path) as c:
        c.register(*NAMES)
        with monkeypatch.context() as patch:
            patch.setattr("coordinator.ledger_file.LedgerFile.flush", full)
            assert c.beat("shard 1", 0, 1).acknowledged_steps == 0
        assert c.beat("shard 1").acknowledged_steps == 2
        assert steps(tmp_path / "ledger.jsonl") == [0, 1]


def test_a_run_resumed_from_an_earlier_checkpoint_supersedes_what_lies_beyond(tmp_path: Path) -> None:
    with cluster(tmp_path, train__stop_at_step=2) as c:
        c.register(*NAMES)
        c.beat("shard 1", 0, 1, 2)  # the third is of a run that should not have gone on, or of a lost disk
        c.checkpoint(2)
    with cluster(tmp_path, cluster__shards=1, cluster__stages=1) as c:
        c.register("shard 5", "worker 5")
        c.beat("shard 5", 2, 3)
        timeline = c.plan().timeline
    account = judge((tmp_path / "ledger.jsonl").read_bytes().splitlines(keepends=True), EXPECTS, reached=2)
    assert (account.faults, account.num_steps) == ([], 4)
    (roll_back,) = account.roll_backs
    assert (roll_back.timeline, roll_back.version, roll_back.num_superseded) == (timeline.id, 2, 1)


def test_a_timeline_never_has_the_name_of_one_in_the_ledger(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    file = fill(path, 3)
    file.begin(Timeline(7, Version(0)), "the state was in a file that is gone")
    file.append(summary(0))
    file.flush()
    with cluster(tmp_path) as c:
        c.register(*NAMES)
        assert c.plan().timeline.id == 8
        c.beat("shard 1", 0)
    assert faults(path) == []
