"""Child processes: started, watched, stopped. What they are for is their caller's business.

Each has a session of its own, so that Ctrl-C reaches us alone; they watch for our death themselves (`shardlane.process`).
"""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType, TracebackType
from typing import Self

from shardlane.errors import UserError
from shardlane.process import PARENT_VARIABLE, process_environment

TAIL_BYTES = 64 << 10  # of a log that are looked at for its last lines
_POLL_SECONDS = 0.05


def child_environment(environment: Mapping[str, str], threads: int) -> dict[str, str]:
    """What services are started with. Settings are resolved already, so no SHARDLANE_ variable of the caller's goes on."""
    kept = {name: value for name, value in environment.items() if not name.startswith("SHARDLANE_")}
    own = {"GRPC_ENABLE_FORK_SUPPORT": "0", "PYTHONUNBUFFERED": "1", PARENT_VARIABLE: str(os.getpid())}
    return {**kept, **process_environment(threads), **own}


class Child:
    """A process whose output goes to the end of `log`."""

    def __init__(self, name: str, command: Sequence[str], log: Path, environment: Mapping[str, str]) -> None:
        self.name = name
        self.log = log
        try:
            log.parent.mkdir(parents=True, exist_ok=True)
            with log.open("ab") as output:
                self._log_start = output.tell()
                self._process = subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment, start_new_session=True
                )
        except OSError as error:
            raise UserError(f"cannot start {name}: {error.strerror} ({error.filename})") from error

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def status(self) -> int | None:
        """None while it runs; negative: the signal that killed it."""
        return self._process.poll()

    @property
    def how_it_ended(self) -> str:
        status = self.status
        if status is None:
            return "is running"
        if status < 0:
            return f"was killed by {signal.Signals(-status).name}"
        return f"ended with status {status}"

    def last_lines(self, most: int) -> list[str]:
        """Of what this process wrote."""
        with self.log.open("rb") as file:
            end = file.seek(0, os.SEEK_END)
            file.seek(max(self._log_start, end - TAIL_BYTES))
            return file.read().decode(errors="replace").splitlines()[-most:]

    def give_way(self, niceness: int) -> None:
        """Beyond what we do. Nothing if it has ended."""
        with suppress(ProcessLookupError):
            os.setpriority(os.PRIO_PROCESS, self.pid, os.getpriority(os.PRIO_PROCESS, 0) + niceness)

    def send(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def wait(self, timeout_seconds: float) -> bool:
        """Whether it has ended by then."""
        try:
            self._process.wait(timeout_seconds)
        except subprocess.TimeoutExpired:
            return False
        return True


class Supervisor:
    """Leaves no child behind: on exit all are stopped, at once if the block ended with an exception."""

    def __init__(self, logs: Path, environment: Mapping[str, str]) -> None:
        self.children: list[Child] = []
        self._logs = logs
        self._environment = environment

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None:
        self.stop(grace_seconds=10.0 if kind is None else 0.0)

    def start(self, name: str, command: Sequence[str]) -> Child:
        """Raises `UserError`."""
        child = Child(name, command, self._logs / f"{name}.log", self._environment)
        self.children.append(child)
        return child

    def restart(self, child: Child, command: Sequence[str]) -> Child:
        """Another life for one that has ended, in its place. Raises `UserError`."""
        again = Child(child.name, command, child.log, self._environment)
        self.children[self.children.index(child)] = again
        return again

    @property
    def running(self) -> list[Child]:
        return [child for child in self.children if child.status is None]

    @property
    def failed(self) -> list[Child]:
        """Those that have ended with anything but status 0."""
        return [child for child in self.children if child.status]

    def wait(self, timeout_seconds: float) -> bool:
        """Whether all have ended by then."""
        end = time.monotonic() + timeout_seconds
        for child in self.children:
            child.wait(max(0.0, end - time.monotonic()))
        return not self.running

    def stop(self, grace_seconds: float) -> None:
        """SIGTERM to all that run, time to end, then SIGKILL."""
        if grace_seconds > 0:
            for child in self.running:
                child.send(signal.SIGTERM)
            self.wait(grace_seconds)
        for child in self.running:
            child.send(signal.SIGKILL)
        self.wait(10.0)

    def wait_for_file(self, child: Child, file: Path, timeout_seconds: float) -> bool:
        """Waits until `child` has written `file`; False if it ends or time runs out first."""
        end = time.monotonic() + timeout_seconds
        while not file.exists():
            if child.status is not None or time.monotonic() > end:
                return file.exists()
            time.sleep(_POLL_SECONDS)
        return True


class Interrupts:
    """Within it the first SIGINT or SIGTERM is noted, and the second raises `KeyboardInterrupt` wherever the main thread is."""

    def __init__(self) -> None:
        self.requested = threading.Event()
        self._previous: dict[signal.Signals, object] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]  # whatever signal.signal gave

    def _on_signal(self, _: int, __: FrameType | None) -> None:
        if self.requested.is_set():
            raise KeyboardInterrupt
        self.requested.set()
