"""The ledger of a whole cluster, whose last copies die: what was counted anew supersedes what was lost, and all is proved."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from coordinator.core.events import Control
from ps_service.service import ShardService
from shardlane import config as configs
from shardlane.cli.__main__ import main
from shardlane.ledger import Expected, judge
from shardlane.prepare import ensure_prepared
from tests.cluster.threads import running

TINY = Path(__file__).parents[2] / "configs" / "tiny.toml"
SHAPE = ["--cluster.stages", "1", "--cluster.replicas", "2", "--cluster.shards", "2", "--cluster.replication", "1"]
EVERY = 20
SETTINGS = ["--train.max_steps", "1000", "--checkpoint.every_steps", str(EVERY), "--validation.num_micro_batches", "0"]


def until(what: str, holds: Callable[[], bool], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, f"{seconds:g} s, and still not {what}"
        time.sleep(0.005)


def kill(shard: ShardService) -> None:
    """As SIGKILL ends one: nobody listens at its address any more, and the stream by which it hears of plans breaks."""
    shard._server.stop()
    shard._membership.stop()


def test_a_roll_back_is_in_the_ledger_and_every_step_stands_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = configs.load(TINY, [*SHAPE, *SETTINGS])
    ensure_prepared(config, tmp_path, lambda line: None)
    with running(config, tmp_path) as cluster:
        coordinator = cluster.coordinator.coordinator
        run = coordinator.run
        # and far from the next one, which would leave nothing to lose
        until("a little beyond a checkpoint", lambda: 1 <= run.version - run.checkpoint.version <= EVERY // 2 < run.version)
        kill(cluster.shards[0])
        another = ShardService(cluster.coordinator.address, cluster.run)
        cluster.shards.append(another)
        another.start()
        until("training again", lambda: run.timeline.id == 1 and run.version > run.timeline.version)
        coordinator.control(Control.STOP)
        cluster.wait()
        end = run.version
    with (tmp_path / "ledger.jsonl").open("rb") as lines:
        account = judge(lines, Expected.of(config), reached=end)
    assert (account.faults, account.num_steps) == ([], end)
    (roll_back,) = account.roll_backs
    assert roll_back.num_superseded == account.num_entries - end >= 1 and roll_back.timeline == 1
    assert roll_back.reason.endswith(f"back to version {roll_back.version}")
    assert main(["ledger", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"{end} steps, {8 * end} micro-batches of 4 lanes: each counted exactly once in all 77 tables; ")
    assert f"superseded by 1 roll-back (timeline 1 began at version {roll_back.version}); " in said
