"""A cluster whose processes a benchmark stops and starts one by one, measured at its workers."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

from benchmarks.pipeline_cluster import Seen, seen
from shardlane import rpc
from shardlane.cli.client import CoordinatorClient
from shardlane.cli.cluster import Command, Commands, service_commands
from shardlane.cli.run_folder import RunFolder
from shardlane.cli.supervisor import Child, Supervisor, child_environment
from shardlane.config import Config
from shardlane.errors import UserError
from shardlane.pb import coordinator_pb2
from shardlane.pb.coordinator_pb2 import GetStatusResponse

WAIT_SECONDS = 120.0
PAUSE_SECONDS = 4.0  # for every worker to hold, or somebody had begun another step
_POLL_SECONDS = 0.1


class Fleet:
    """All processes of `config` in `run_dir`; the data must be prepared. Nothing is started again by itself."""

    def __init__(
        self,
        config: Config,
        run_dir: Path,
        place: Callable[[str, Command], Command] = lambda name, command: command,
        network: rpc.Network = rpc.PLAIN,
    ) -> None:
        """`place` may change the command of a service, by its name. `network`: how the coordinator is asked from here."""
        self._place, self._network = place, network
        self.folder = RunFolder(run_dir)
        self._supervisor = Supervisor(self.folder.logs, child_environment(os.environ, config.numerics.threads))
        file = self.folder.write_config(config, run_dir / "config.proposed.toml")
        self._commands: Commands = service_commands(config, self.folder, file, fork=False)
        self.coordinator = self._start_coordinator([])
        address = self.folder.coordinator_address()
        assert address is not None
        self.address = address
        commands = {name: place(name, command) for name, command in self._commands.members(address).items()}
        self.members = {name: self._supervisor.start(name, command) for name, command in commands.items()}
        self.wait(lambda status: status.state == coordinator_pb2.RUN_STATE_TRAINING and status.version > 0)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None) -> None:
        self._supervisor.stop(grace_seconds=0.0)

    def _start_coordinator(self, flags: list[str]) -> Child:
        self.folder.coordinator_file.unlink(missing_ok=True)
        child = self._supervisor.start("coordinator", self._place("coordinator", [*self._commands.coordinator, *flags]))
        if not self._supervisor.wait_for_file(child, self.folder.coordinator_file, WAIT_SECONDS):
            raise RuntimeError(f"the coordinator does not serve: {child.last_lines(5)}")
        return child

    def kill_coordinator(self) -> None:
        self.coordinator.send(signal.SIGKILL)
        self.coordinator.wait(WAIT_SECONDS)

    def restart_coordinator(self) -> None:
        """At its old address; returns once every member has spoken to it."""
        self.coordinator = self._start_coordinator(["--bind", self.address])
        self.wait(lambda status: all(each.lease_age_seconds < 1.0 for each in status.members))

    def pause(self, seconds_max: float = PAUSE_SECONDS) -> int:
        """Waits until every worker has made its step and holds; the version then.

        Who hears of the pause a step later than others has begun that step, and would wait for them: all go on, and try again.
        """
        deadline = time.monotonic() + WAIT_SECONDS
        while True:
            with CoordinatorClient(self.address, self._network) as client:
                client.control(coordinator_pb2.CONTROL_ACTION_PAUSE)
            try:
                return int(self.wait(_all_hold, seconds_max).version)
            except RuntimeError:
                if time.monotonic() > deadline:
                    raise
            self.resume()
            stood = self.wait(lambda now: True).version
            self.wait(lambda now, stood=stood: now.version > stood)  # type: ignore[misc]

    def resume(self) -> None:
        with CoordinatorClient(self.address, self._network) as client:
            client.control(coordinator_pb2.CONTROL_ACTION_RESUME)

    def status(self) -> GetStatusResponse | None:
        try:
            with CoordinatorClient(self.address, self._network) as client:
                return client.status(timeout_seconds=2.0)
        except UserError:
            return None

    def wait(self, is_true: Callable[[GetStatusResponse], bool], seconds_max: float = WAIT_SECONDS) -> GetStatusResponse:
        """Raises `RuntimeError` if it does not come to pass."""
        deadline = time.monotonic() + seconds_max
        while time.monotonic() < deadline:
            status = self.status()
            if status is not None and is_true(status):
                return status
            time.sleep(_POLL_SECONDS)
        raise RuntimeError(f"it did not come to pass in {seconds_max:g} s; see {self.folder.logs}")

    def workers(self) -> list[str]:
        """`/metrics` of each worker."""
        status = self.wait(lambda status: True)
        return [each.metrics_address for each in status.members if each.member.role == coordinator_pb2.ROLE_WORKER]


def _all_hold(status: GetStatusResponse) -> bool:
    workers = [each for each in status.members if each.member.role == coordinator_pb2.ROLE_WORKER]
    return all(each.activity.startswith("held") for each in workers)


def step_seconds(workers: list[str], seconds: float) -> float:
    """The mean time of a step over the next `seconds`, as the workers measure it. Raises `RuntimeError` without a step."""
    before = [seen(worker) for worker in workers]
    time.sleep(seconds)
    after = [seen(worker) for worker in workers]
    return mean_step_seconds(before, after)


def mean_step_seconds(before: list[Seen], after: list[Seen]) -> float:
    num_steps = sum(late.num_steps - early.num_steps for early, late in zip(before, after, strict=True))
    if num_steps < 1:
        raise RuntimeError("no step was made between two looks")
    return sum(late.seconds - early.seconds for early, late in zip(before, after, strict=True)) / num_steps
