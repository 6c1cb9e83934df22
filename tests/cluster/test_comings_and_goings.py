"""Real workers and shards that join and leave while a run goes on: the weights come out as if nobody had moved."""

from __future__ import annotations

import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from benchmarks.pipeline_cluster import counter
from shardlane import config as configs
from shardlane.cli.client import CoordinatorClient
from shardlane.cli.run_folder import RunFolder
from shardlane.errors import UserError
from shardlane.manifest import tensor_names
from shardlane.partition import BYTES_PER_ELEMENT, Layout
from shardlane.pb import coordinator_pb2
from tests.cluster.processes import SECONDS_MAX, TINY, Run, assert_as_undisturbed

LEAVE_SECONDS_MAX = 30.0


class Guests:
    """Members that a run was not begun with."""

    def __init__(self, run: Run, stack: ExitStack) -> None:
        self._run, self._stack = run, stack

    @property
    def address(self) -> str:
        address = RunFolder(self._run.folder).coordinator_address()
        assert address is not None
        return address

    def start(self, module: str, number: int) -> subprocess.Popen[bytes]:
        log = self._stack.enter_context((self._run.folder / "logs" / f"guest-{module}-{number}.log").open("wb"))
        command = [sys.executable, "-m", module, "--coordinator", self.address]
        process = subprocess.Popen(command, stdout=log, stderr=log)
        self._stack.callback(process.wait)
        self._stack.callback(process.kill)
        return process

    def status(self) -> coordinator_pb2.GetStatusResponse | None:
        try:
            with CoordinatorClient(self.address) as client:
                return client.status(timeout_seconds=2.0)
        except UserError:
            return None

    def wait_status(self, what: str, is_true: Callable[[coordinator_pb2.GetStatusResponse], bool]) -> None:
        self._run.wait(what, lambda: (status := self.status()) is not None and is_true(status))

    def refilled_share(self, shard: str) -> float:
        """Bytes that a shard which has joined was sent, over an equal share of all there are."""
        status = self.status()
        assert status is not None
        (member,) = [each for each in status.members if each.member.incarnation == shard]
        config = configs.load(TINY)
        tensors = len(tensor_names(config.optimizer.name, config.train.num_past))
        num_shards = sum(each.member.role == coordinator_pb2.ROLE_SHARD for each in status.members)
        share = (
            Layout.of(config).num_parameters * BYTES_PER_ELEMENT * tensors * config.cluster.num_copies(num_shards) / num_shards
        )
        return counter(member.metrics_address, "shardlane_shard_refilled_bytes_total") / share

    def newest_shard(self) -> str:
        status = self.status()
        assert status is not None
        return [each.member.incarnation for each in status.members if each.member.role == coordinator_pb2.ROLE_SHARD][-1]


def num_serving(status: coordinator_pb2.GetStatusResponse) -> int:
    """Shards that are primary of some chunk."""
    return sum(count > 0 for count in status.chunks_by_shard)


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    folder = tmp_path / "run"
    folder.mkdir()
    made = Run(folder, ["--train.max_steps", "100000", "--validation.num_micro_batches", "0"])
    try:
        yield made
    finally:
        made.close()


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("rounds", [pytest.param(1, marks=pytest.mark.long), pytest.param(5, marks=pytest.mark.slow)])
def test_joins_and_leaves_cost_no_step_and_no_bit(run: Run, tmp_path: Path, rounds: int) -> None:
    run.wait("whole", run.is_whole)
    shares = []
    with ExitStack() as stack:
        guests = Guests(run, stack)
        for number in range(rounds):
            shard, workers = guests.start("ps_service", number), [guests.start("worker_service", 10 * number + i) for i in (0, 1)]
            guests.wait_status("three shards serve", lambda status: num_serving(status) == 3)
            guests.wait_status("six workers are here", lambda status: len(status.members) == 9)
            shares.append(guests.refilled_share(guests.newest_shard()))
            before = run.num_steps()
            run.wait("two steps further", lambda before=before: run.num_steps() >= before + 2)  # type: ignore[misc]
            for process in (shard, *workers):
                process.terminate()
            for process in (shard, *workers):
                assert process.wait(LEAVE_SECONDS_MAX) == 0, (run.folder / "logs").as_posix()
            guests.wait_status("the others serve alone", lambda status: num_serving(status) == 2 and len(status.members) == 6)
    log = (run.folder / "logs" / "coordinator.log").read_text(encoding="utf-8")
    if rounds > 1:
        assert statistics.median(shares) <= 1.1, shares
    assert log.count("has left") == 3 * rounds and "is dead" not in log
    assert_as_undisturbed(run, tmp_path)


@pytest.mark.timeout(300)
def test_when_everybody_is_told_to_go_a_checkpoint_is_taken_and_all_exit_0(run: Run, tmp_path: Path) -> None:
    """As when a whole cluster is shut down, its services in any order; and another one takes the run up."""
    run.wait("whole", run.is_whole)
    run.wait("a few steps done", lambda: run.num_steps() >= 3)
    pids = [pid for module in ("worker_service", "coordinator", "ps_service") for pid in run.pids(module)]
    subprocess.run(["kill", "-TERM", *map(str, pids)], check=True)
    assert run.process.wait(SECONDS_MAX) == 0, (run.folder / "local.log").read_text(encoding="utf-8")
    steps = run.num_steps()
    assert (run.folder / "checkpoints").exists() and steps >= 3
    again = Run(run.folder, ["--train.max_steps", "100000", "--validation.num_micro_batches", "0"])
    try:
        again.wait("further than before", lambda: again.num_steps() > steps + 2)
        assert_as_undisturbed(again, tmp_path)
    finally:
        again.close()
