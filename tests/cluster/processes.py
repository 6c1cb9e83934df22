"""The command line as a process, and a run of it that a test can look at and disturb."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from shardlane.cli.client import CoordinatorClient
from shardlane.cli.run_folder import RunFolder
from shardlane.errors import UserError
from shardlane.pb import coordinator_pb2
from tests.cluster.threads import comparable, rows_of

TINY = Path(__file__).parents[2] / "configs" / "tiny.toml"
SECONDS_MAX = 60.0
KINDS = ("worker_service", "ps_service", "coordinator")
NUM_SHARDS, NUM_WORKERS = 2, 4
SHAPE = ["--stages", "2", "--replicas", "2", "--shards", str(NUM_SHARDS)]


def shardlane(*arguments: str, seconds_max: float = SECONDS_MAX) -> str:
    command = [sys.executable, "-m", "shardlane.cli", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=seconds_max, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


class Run:
    """`shardlane local` under way in `folder`."""

    def __init__(self, folder: Path, settings: list[str]) -> None:
        self.folder = folder
        self._output = (folder / "local.log").open("w+", encoding="utf-8")
        command = [sys.executable, "-m", "shardlane.cli", "local", str(TINY), "--run-dir", str(folder), *SHAPE, *settings]
        self.process = subprocess.Popen(command, stdout=self._output, stderr=subprocess.STDOUT)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self._output.close()

    def num_steps(self) -> int:
        return len([row for row in rows_of(self.folder) if "loss" in row]) if (self.folder / "metrics.jsonl").exists() else 0

    def is_whole(self) -> bool:
        """Everybody is there under one plan, and every chunk has its copies: shards with all of theirs share the primaries."""
        address = RunFolder(self.folder).coordinator_address()
        if address is None:
            return False
        try:
            with CoordinatorClient(address) as client:
                status = client.status(timeout_seconds=2.0)
        except UserError:
            return False
        workers = sum(len(replica.workers) for replica in status.plan.replicas)
        shards = [each for each in status.plan.members if each.role == coordinator_pb2.ROLE_SHARD]
        is_shared = len(shards) == NUM_SHARDS and all(status.chunks_by_shard)
        return status.state == coordinator_pb2.RUN_STATE_TRAINING and workers == NUM_WORKERS and is_shared

    def pids(self, module: str) -> list[int]:
        """Of this run's processes of a kind."""
        mine = f"SHARDLANE_PARENT_PID={self.process.pid}".encode()
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    is_mine = mine in (entry / "environ").read_bytes().split(b"\0")
                    if is_mine and module.encode() in (entry / "cmdline").read_bytes().split(b"\0"):
                        found.append(int(entry.name))
                except OSError:
                    continue
        return sorted(found)

    def wait(self, what: str, is_true: Callable[[], bool]) -> None:
        end = time.monotonic() + SECONDS_MAX
        while not is_true():
            assert self.process.poll() is None, (self.folder / "local.log").read_text(encoding="utf-8")
            if time.monotonic() > end:
                for module in KINDS:
                    for pid in self.pids(module):
                        os.kill(pid, signal.SIGUSR1)  # their logs will show where they hang
                time.sleep(1.0)
                pytest.fail(f"{SECONDS_MAX:g} s, and still not {what}; see {self.folder / 'logs'}")
            time.sleep(0.02)


def assert_as_undisturbed(run: Run, tmp_path: Path) -> None:
    """Stops the run: digest and losses are the reference's, and no step was lost on the way."""
    run.process.send_signal(signal.SIGINT)
    assert run.process.wait(SECONDS_MAX) == 0, (run.folder / "local.log").read_text(encoding="utf-8")
    found, version = shardlane("digest", str(run.folder)).split()
    reference = tmp_path / "reference"
    settings = ["--train.max_steps", "100000", "--validation.num_micro_batches", "0", "--train.stop_at_step", version]
    shardlane("reference", str(TINY), "--run-dir", str(reference), "--data.path", str(run.folder / "data"), *settings)
    assert shardlane("digest", str(reference)).split() == [found, version]
    assert comparable(rows_of(run.folder)) == comparable(rows_of(reference))
    assert "exactly once" in (proof := shardlane("ledger", str(run.folder))) and "superseded" not in proof
    assert "rolled back" not in (run.folder / "logs" / "coordinator.log").read_text(encoding="utf-8")
