"""A whole cluster on this machine: its processes, and one watch over them until the run ends."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from shardlane.cli.client import CoordinatorClient
from shardlane.cli.live import View
from shardlane.cli.rows import RowsTail
from shardlane.cli.run_folder import RunFolder
from shardlane.cli.supervisor import Child, Interrupts, Supervisor, child_environment
from shardlane.config import Config
from shardlane.errors import UnreachableError, UserError
from shardlane.pb.coordinator_pb2 import ControlAction, GetStatusResponse, RunState
from shardlane.process import EXIT_USER_ERROR

START_SECONDS = 60.0  # for the coordinator to serve
LEAVE_SECONDS = 20.0  # for members, once the coordinator has ended
STOP_SECONDS = 30.0  # for the coordinator to hear that it is to stop, should it just be starting again
CAUSE_SECONDS = 1.0  # after a failure, for the coordinator to say what it makes of it
LAST_LINES = 20
MOST_RESTARTS = 3  # of one process with no step between: what kills it again and again is no accident
SERVING_NICENESS = 5  # where cores are shared, workers compute first; shards and coordinator have what a bubble leaves idle
EXIT_INTERRUPTED = 130
_POLL_SECONDS = 0.1
_STATUS_SECONDS = 0.5

Command = list[str]


@dataclass(frozen=True)
class Commands:
    """`members` gives commands by name, once the coordinator's address is known."""

    coordinator: Command
    members: Callable[[str], Mapping[str, Command]]

    def with_coordinator(self, *flags: str) -> Commands:
        """The same, but for more flags of the coordinator."""
        return replace(self, coordinator=[*self.coordinator, *flags])


def service_commands(config: Config, folder: RunFolder, config_file: Path, *, fork: bool) -> Commands:
    cluster = config.cluster

    def service(name: str, *flags: str) -> Command:
        return [sys.executable, "-m", name, *flags]

    def members(coordinator: str) -> dict[str, Command]:
        shards = {f"shard-{index}": "ps_service" for index in range(cluster.shards)}
        workers = {f"worker-{index}": "worker_service" for index in range(cluster.stages * cluster.replicas)}
        return {
            name: service(module, "--coordinator", coordinator, "--ready-file", str(folder.ready_file(name)))
            for name, module in (shards | workers).items()
        }

    where = ("--config", str(config_file), "--run-dir", str(folder.path), "--ready-file", str(folder.coordinator_file))
    return Commands(service("coordinator", *where, *(["--fork-run"] if fork else [])), members)


class Attendant(Protocol):
    """Who looks after a cluster while it runs."""

    def attend(self, cluster: Cluster) -> bool:
        """Called at every turn of the watch until the run is stopped; whether that is to be now."""

    def leave(self) -> None:
        """The run is about to be stopped, for whatever reason. May be called more than once."""


class Cluster:
    """One life of a run's processes. `run` may be called once."""

    def __init__(
        self, config: Config, folder: RunFolder, view: View, commands: Commands, attendant: Attendant | None = None
    ) -> None:
        self.status: GetStatusResponse | None = None  # the newest that was heard
        self.heard_seconds = 0.0  # when: of `time.monotonic`
        self.complaint: list[str] = []  # lines for stderr, once the view is closed
        self._folder = folder
        self._view = view
        self._commands = commands
        self._attendant = attendant
        self._supervisor = Supervisor(folder.logs, child_environment(os.environ, config.numerics.threads))
        self._stop_by_seconds: float | None = None  # the coordinator has until then to accept a stop
        self._started: dict[str, Command] = {}  # by name, to start what was killed again
        self._settled: set[int] = set()  # processes that have been seen to serve
        self._restarts: dict[str, tuple[int, int]] = {}  # by name: the version at the last restart, restarts since
        self._next_status_seconds = 0.0

    def run(self, on_accepted: Callable[[], object] = lambda: None) -> int:
        """Trains to the end; the exit status. `on_accepted` is called once the coordinator has taken the run up.

        Raises `UserError` if it does not.
        """
        try:
            with self._supervisor, Interrupts() as interrupts:
                address = self._start_coordinator()
                on_accepted()
                rows = RowsTail(self._folder.metrics_file)
                self._started = {"coordinator": [*self._commands.coordinator, "--bind", address, *self._same_page()]}
                for name, command in self._commands.members(address).items():
                    self._started[name] = command
                    self._supervisor.start(name, command)
                with CoordinatorClient(address) as client:
                    return self._watch(client, rows, interrupts)
        except KeyboardInterrupt:
            self._view.note("stopped at once; the newest checkpoint is where the next run goes on from")
            return EXIT_INTERRUPTED
        finally:
            self._folder.coordinator_file.unlink(missing_ok=True)

    @property
    def children(self) -> Mapping[str, Child]:
        """The present lives, by name."""
        return {child.name: child for child in self._supervisor.children}

    def note(self, text: str) -> None:
        """A line for people."""
        self._view.note(text)

    def _start_coordinator(self) -> str:
        """Its address. Raises `UserError`, in the coordinator's own words if it has said why."""
        ready = self._folder.coordinator_file
        ready.unlink(missing_ok=True)
        child = self._supervisor.start("coordinator", self._commands.coordinator)
        if self._supervisor.wait_for_file(child, ready, START_SECONDS) and (address := self._folder.coordinator_address()):
            return address
        if words := own_words(child):
            raise UserError(words)
        if child.status is None:
            raise UserError(f"the coordinator does not serve after {START_SECONDS:g} s; see {child.log}")
        if not child.last_lines(1):
            raise UserError(f"the coordinator {child.how_it_ended} and could not say why in {child.log}; is the disk full?")
        self.complaint += last_lines(child)
        raise UserError(f"the coordinator {child.how_it_ended}; see {child.log}")

    def _same_page(self) -> list[str]:
        """For a coordinator that starts again: who looks at the status page goes on looking."""
        page = self._folder.ready("coordinator").get("status_address")
        if not page:
            return []
        self._view.note(f"status page: http://{page}/")
        return ["--status-bind", str(page)]

    def _watch(self, client: CoordinatorClient, rows: RowsTail, interrupts: Interrupts) -> int:
        members_end_seconds: float | None = None
        is_stopping = False
        while self._supervisor.running:
            coordinator = self._supervisor.children[0]
            self._look(client, rows, is_serving=coordinator.status is None)
            lost = self._start_killed_again()
            self._give_way()
            if lost and not self._has_finished:
                return self._fail(client, rows, lost[0])
            wants_stop = self._attendant is not None and not is_stopping and self._attendant.attend(self)
            if (interrupts.requested.is_set() or wants_stop) and not is_stopping:
                if self._attendant is not None:
                    self._attendant.leave()
                try:
                    is_stopping = self._ask_to_stop(client)
                except UserError as error:
                    self._view.note(f"stopping without a checkpoint: {error}")
                    self._supervisor.stop(grace_seconds=10.0)
                    return EXIT_INTERRUPTED
            if self._supervisor.children[0].status is None:
                members_end_seconds = None  # it may have been dead for a moment, and have started again
            else:
                members_end_seconds = members_end_seconds or time.monotonic() + LEAVE_SECONDS
                if time.monotonic() > members_end_seconds:
                    self._supervisor.stop(grace_seconds=10.0)
            time.sleep(_POLL_SECONDS)
        self._view.show_rows(rows.read())
        if self._supervisor.failed and not self._has_finished:
            return self._fail(client, rows, self._supervisor.failed[0])
        for child in self._supervisor.failed:
            self._view.note(f"{child.name} {child.how_it_ended} after the run had finished; see {child.log}")
        return 0

    def _start_killed_again(self) -> list[Child]:
        """A process that a signal ended takes nothing along: another life of it joins the run where it stands.

        Those that have failed and do not start again; who dies from now on is the next look's concern.
        """
        if self._has_finished:
            return []
        lost = []
        version = 0 if self.status is None else self.status.version
        for child in self._supervisor.failed:
            then, count = self._restarts.get(child.name, (version, 0))
            count = 0 if version > then else count
            if child.status is not None and child.status < 0 and count < MOST_RESTARTS:
                self._view.note(f"{child.name} {child.how_it_ended}; starting it again")
                self._restarts[child.name] = (version, count + 1)
                self._supervisor.restart(child, self._started[child.name])
            else:
                lost.append(child)
        return lost

    def _give_way(self) -> None:
        """Once it serves, and no sooner: until then training may wait for a process, or stand without a copy because of it."""
        for child in self._supervisor.running:
            if child.pid not in self._settled and self._folder.ready(child.name).get("pid") == child.pid:
                self._settled.add(child.pid)
                if not child.name.startswith("worker"):
                    child.give_way(SERVING_NICENESS)

    @property
    def _has_finished(self) -> bool:
        """It may end before we see it finished; the coordinator's status says as much."""
        is_seen = self.status is not None and self.status.state == RunState.RUN_STATE_FINISHED
        return is_seen or self._supervisor.children[0].status == 0

    def _look(self, client: CoordinatorClient, rows: RowsTail, *, is_serving: bool) -> None:
        self._view.show_rows(rows.read())
        if not is_serving or time.monotonic() < self._next_status_seconds:
            return
        try:
            self.status = client.status(timeout_seconds=1.0)
            self.heard_seconds = time.monotonic()
            self._view.show_status(self.status)
        except UserError:  # it is busy, or has just ended: its exit status will tell
            pass
        is_near_the_end = self.status is not None and self.status.state >= RunState.RUN_STATE_FINISHING
        is_wanted = is_near_the_end or self._attendant is not None
        self._next_status_seconds = time.monotonic() + (_POLL_SECONDS if is_wanted else _STATUS_SECONDS)

    def _ask_to_stop(self, client: CoordinatorClient) -> bool:
        """Whether the coordinator has heard it, and the run will end by itself.

        Raises `UserError` if there is no step to save, or nobody hears it within `STOP_SECONDS`.
        """
        if self.status is None or self.status.state == RunState.RUN_STATE_GATHERING:
            raise UserError("no step has been trained yet")
        self._stop_by_seconds = self._stop_by_seconds or time.monotonic() + STOP_SECONDS
        try:
            client.control(ControlAction.CONTROL_ACTION_STOP)
        except UnreachableError:  # it may just be starting again
            if time.monotonic() > self._stop_by_seconds:
                raise
            return False
        self._view.note("stopping after this step, with a checkpoint; once more (Ctrl-C) to stop at once")
        return True

    def _fail(self, client: CoordinatorClient, rows: RowsTail, culprit: Child) -> int:
        """Notes who failed first and why, in one line if that is something a person can mend; the others are stopped."""
        coordinator = self._supervisor.children[0]
        coordinator.wait(CAUSE_SECONDS)
        self._next_status_seconds = 0.0
        self._look(client, rows, is_serving=coordinator.status is None)
        self._supervisor.stop(grace_seconds=10.0)
        for child in (coordinator, culprit):
            if words := own_words(child):
                self.complaint.append(f"shardlane: {words}; see {child.log}")
                return EXIT_USER_ERROR
        reason = f": {self.status.reason}" if self.status is not None and self.status.reason else ""
        self.complaint += [*last_lines(culprit), f"shardlane: {culprit.name} {culprit.how_it_ended}{reason}; see {culprit.log}"]
        return 1


def own_words(child: Child) -> str:
    """What a person can mend, in the last line of a service that ended for it (`shardlane.process.run_main`); else empty."""
    lines = child.last_lines(1) if child.status == EXIT_USER_ERROR else []
    return lines[0].partition(": ")[2] if lines else ""


def last_lines(child: Child) -> list[str]:
    """For people, with a headline."""
    return [f"--- last lines of {child.log}", *(f"    {line}" for line in child.last_lines(LAST_LINES))]
