"""A checkpoint target that is full or slow: training goes on, the fault is seen, and nothing half-written is resumed from."""

from __future__ import annotations

import errno
import os
import time
from pathlib import Path

import pytest

from shardlane import config as configs
from shardlane.config import Config
from shardlane.data import TokenFolder
from shardlane.manifest import list_complete
from shardlane.prepare import ensure_prepared
from tests.cluster.threads import comparable, digest_of, rows_of, running, train, train_reference

TINY = Path(__file__).parents[2] / "configs" / "tiny.toml"
FULL_UNTIL = 6  # versions below it find the disk full
STEPS = 10


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, TokenFolder]:
    folder = tmp_path_factory.mktemp("data")
    settings = ["--train.max_steps", str(STEPS), "--checkpoint.every_steps", "2", "--validation.num_micro_batches", "0"]
    config = configs.load(TINY, [*settings, "--cluster.shards", "2"])
    tokens = ensure_prepared(config, folder, lambda line: None)
    return config.with_changes({"data.path": str(folder / "data")}), tokens


def version_of(file: str) -> int:
    """From `…/step-00000004/part-….tmp`, as a descriptor's link names it."""
    return int("".join(each for each in Path(file).parent.name if each.isdigit()) or 0)


def test_a_full_disk_costs_checkpoints_and_no_step(
    prepared: tuple[Config, TokenFolder], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, tokens = prepared
    write = os.pwrite

    def full(descriptor: int, data: memoryview, offset: int) -> int:
        name = os.readlink(f"/proc/self/fd/{descriptor}")
        if "part-" in name and version_of(name) < FULL_UNTIL:
            write(descriptor, data[: len(data) // 2], offset)  # half of it, and then no more
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", full)
    with running(config.with_changes({"train.stop_at_step": 5}), tmp_path) as cluster:
        while cluster.coordinator.coordinator.run.version < 5:
            time.sleep(0.01)
        cluster.coordinator.coordinator.wait(lambda: cluster.coordinator.coordinator.has_ended, 60)
        failures = cluster.coordinator.coordinator._instruments.checkpoint_failures._value.get()
        reason = cluster.coordinator.coordinator.run.failure
    assert failures >= 2 and "No space left" in reason, "the run's last checkpoint is the one that it cannot end without"
    assert list_complete(tmp_path / "checkpoints") == []
    assert len([row for row in rows_of(tmp_path) if "loss" in row]) == 5
    assert not list((tmp_path / "checkpoints").rglob("*.tmp"))

    digest, rows = train_reference(config, tokens)
    assert train(config, tmp_path) == digest, "with room again: from the beginning, for there was no whole checkpoint"
    assert comparable(rows_of(tmp_path)) == comparable(rows)
    assert [version for version, _ in list_complete(tmp_path / "checkpoints")] == [6, 8, 10]


def test_a_slow_disk_holds_up_no_step(
    prepared: tuple[Config, TokenFolder], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, tokens = prepared
    sync, seen, is_slow = os.fsync, [], [True]

    def slow(descriptor: int) -> None:
        if "part-" in os.readlink(f"/proc/self/fd/{descriptor}"):
            while is_slow[0] and cluster.coordinator.coordinator.run.version < STEPS:
                time.sleep(0.01)
            seen.append(cluster.coordinator.coordinator.run.version)
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", slow)
    with running(config, tmp_path) as cluster:
        cluster.wait()
    assert seen[0] == STEPS, "the part of version 2 was durable only when all steps were done"
    assert digest_of(tmp_path) == train_reference(config, tokens)[0]
