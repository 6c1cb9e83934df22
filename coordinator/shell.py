"""The shell around the run: one lock, the clock, the store and the files. It does what the core says and decides nothing."""

from __future__ import annotations

import socket
import sqlite3
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

from coordinator.commit import Committer
from coordinator.core.events import (
    Announce,
    CheckpointFailed,
    CheckpointMark,
    CheckpointReport,
    CommitCheckpoint,
    Control,
    DropRows,
    Effect,
    Fault,
    ForgetMember,
    Heartbeat,
    KeepMember,
    Note,
    Refusal,
    Registration,
    RunState,
    TokenUse,
    TrainingRow,
    ValidationReport,
    ValidationRow,
)
from coordinator.core.history import Event, History
from coordinator.core.run import Run
from coordinator.dataset import read_dataset
from coordinator.door import Door
from coordinator.instruments import Instruments
from coordinator.metrics_file import values_of
from coordinator.session import open_session
from coordinator.store import FencedError, Store
from coordinator.translation import checkpoint_from_wire, validation_from_wire
from shardlane import wire
from shardlane.config import Config, to_toml
from shardlane.errors import ForbiddenError, IncompatibleError, MalformedError, NotReadyError, RequestError, UserError
from shardlane.files import replace_file
from shardlane.ids import Incarnation, PlanNumber, Version
from shardlane.logs import logger
from shardlane.metrics import Metrics
from shardlane.partition import Layout
from shardlane.pb import coordinator_pb2
from shardlane.plan import Plan
from shardlane.storage import locate

PROBE_SECONDS = 0.5
PROBES = 5  # of a process that closes connections without a word

Clock = Callable[[], float]


class UnknownMemberError(RequestError):
    """An incarnation that is no member: it must register again."""


class Coordinator:
    """One run. Every public method may be called from any thread."""

    def __init__(
        self,
        config: Config,
        *,
        run_dir: Path,
        fork: bool = False,
        clock: Clock = time.monotonic,
        metrics: Metrics,
        join_secret_file: Path | None = None,
    ) -> None:
        """Takes over the run of `run_dir`. Raises `DataError`, `CheckpointError`, or `UserError` for a folder it cannot use."""
        self._clock = clock
        self.dataset = read_dataset(config, run_dir)
        self.root = locate(config.checkpoint.path or str(run_dir / "checkpoints"))
        self.config = config.with_changes({"data.path": str(self.dataset.path)})
        self.num_chunks = len(Layout.of(config).chunks)
        self._log = logger(role="coordinator")
        _prepare_folder(run_dir, config)
        self._store = Store(run_dir / "coordinator.sqlite")
        try:
            self._door = Door(join_secret_file, self._store.token_uses(), metrics)
            session = open_session(config, self.dataset, self._store, run_dir=run_dir, root=self.root, fork=fork)
        except (OSError, sqlite3.Error) as error:
            self._store.close()
            raise UserError(f"cannot keep the run in {run_dir}: {error}; free the disk, or give another --run-dir") from error
        except UserError:
            self._store.close()
            raise
        self._file = session.metrics_file
        self._ledger = session.ledger_file
        self.losses, self.validation_losses = self._file.losses, self._file.validation_losses
        begun = f"coordinator of term {self._store.term} has begun, at version {session.beginning.version}"
        self.history = History(Event(time.time(), begun, is_warning=False))
        self.run = Run(config, session.beginning, now=clock())
        self.run_id = self.run.run_id
        self._log = logger(role="coordinator", run=self.run_id, step=lambda: self.run.version)
        self._instruments = Instruments(metrics, self.run, clock)
        self._changed = threading.Condition()  # the one lock: around the core, the store and the files
        self._to_do: deque[Effect] = deque()  # effects that a full disk holds up
        self._announced = session.beginning.plan
        self._saved = session.beginning.saved
        self._validated: list[Version] = []  # whose reports need not be kept once the rows are durable
        self._fenced: FencedError | None = None
        self._held_up = ""  # by what error of the disk
        self._is_closed = False
        self._committer = Committer(
            config, self.dataset, self.root, committed=self._on_committed, failed=self._on_failed, warn=self._log.warning
        )
        with self._changed:
            self._perform(self.run.on_start(clock()))
            for kind, body in session.snapshot.reports if session.is_restart else ():
                self._replay(kind, body)

    # ---- what others may ask -------------------------------------------------------------------------------------------

    @property
    def state(self) -> RunState:
        return self.run.state

    @property
    def acknowledged_steps(self) -> int:
        """Rows of all steps below are durable."""
        return max(self._file.version, self.run.timeline.version)

    @property
    def has_ended(self) -> bool:
        """Whether the run has, and all that there is to keep of it is kept."""
        return self.state is RunState.FAILED or (
            self.state is RunState.FINISHED and not self._to_do and not self._file.num_pending
        )

    @property
    def waiting_for(self) -> str:
        """What is missing, for people; empty: nothing."""
        return f"room on the disk ({self._held_up})" if self._held_up else self.run.waiting_for

    @property
    def plan(self) -> Plan | None:
        """The newest plan that is durable."""
        return self._announced

    def wait(self, until: Callable[[], bool], timeout_seconds: float) -> bool:
        """Whether `until` holds; waits for it. Raises `FencedError` once another coordinator has taken over."""
        with self._changed:
            self._changed.wait_for(lambda: until() or self._fenced is not None, timeout_seconds)
            if self._fenced is not None:
                raise self._fenced
            return until()

    def plans_after(self, have: PlanNumber, hold_seconds: float, is_wanted: Callable[[], bool]) -> Iterator[Plan]:
        """The newest plan, whenever there is one newer than the last, for so long as it `is_wanted` (see `wake`)."""
        end = time.monotonic() + hold_seconds

        def is_over() -> bool:
            return self._is_closed or self._fenced is not None or not is_wanted()

        while not is_over() and (left := end - time.monotonic()) > 0:
            with self._changed:
                self._changed.wait_for(lambda have=have: is_over() or self._is_newer(have), left)  # type: ignore[misc]
                plan = self._announced
            if plan is not None and plan.number > have:
                have = plan.number
                yield plan

    def _is_newer(self, have: PlanNumber) -> bool:
        return self._announced is not None and self._announced.number > have

    def wake(self) -> None:
        """Whoever waits looks again whether it has to."""
        with self._changed:
            self._changed.notify_all()

    def reading(self) -> threading.Condition:
        """Held while something consistent is read of `run`."""
        return self._changed

    def now(self) -> float:
        return self._clock()

    # ---- events --------------------------------------------------------------------------------------------------------

    def register(self, registration: Registration, join_token: str = "") -> str:
        """What admits it again; empty: nothing is needed. Raises `IncompatibleError`, `MalformedError` or `ForbiddenError`."""
        self._feed(lambda now: self._door.admit(registration, join_token, lambda: self.run.on_register(registration, now)))
        return self._door.readmission(registration)

    def heartbeat(self, beat: Heartbeat) -> None:
        """Raises `UnknownMemberError`."""
        self._feed(lambda now: self.run.on_heartbeat(beat, now))

    def report_validation(self, report: ValidationReport, body: bytes) -> None:
        """Durable when this returns."""

        def keep() -> None:
            if not self.run.validations.is_done(report.version):
                self._store.keep_report("validation", report.version, f"{report.index:08d}", body)

        self._feed(lambda now: self.run.on_validation(report), keep)

    def report_checkpoint(self, report: CheckpointReport, body: bytes) -> None:
        """Durable when this returns."""

        def keep() -> None:
            if not report.error and report.version > self.run.checkpoint.version and report.timeline == self.run.timeline.id:
                self._store.keep_report("checkpoint", report.version, report.file, body)

        self._feed(lambda now: self.run.on_checkpoint_part(report), keep)

    @property
    def members(self) -> list[Incarnation]:
        """Everybody whose lease runs."""
        with self._changed:
            return [state.registration.incarnation for state in self.run.members.states]

    def suspect(self, incarnation: Incarnation) -> None:
        """A member has no stream here. If nobody listens at its address any more it is dead; else its lease decides."""
        with self._changed:
            address = None if self._is_closed else self.run.members.address(incarnation)
            is_expected = address is not None and self.run.may_leave(incarnation, self._clock())
        if address is not None and (is_expected or is_refused(address)):
            with suppress(NotReadyError):
                self._feed(lambda now: (None, self.run.on_death(incarnation, f"nobody listens at {address}", now)))

    def control(self, action: Control) -> RunState:
        self._feed(lambda now: (None, self.run.on_control(action)))
        return self.run.state

    def tick(self) -> None:
        """Time has passed: leases end, and what a full disk held up is tried again."""
        self._feed(lambda now: (None, self.run.on_tick(now)))

    def close(self) -> None:
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        self._committer.close()
        with self._changed:
            self._store.close()

    def _feed(
        self, event: Callable[[float], tuple[Refusal | None, list[Effect]]], keep: Callable[[], None] | None = None
    ) -> None:
        """`keep` makes durable what the event told, unless it was refused."""
        with self._changed:
            if self._is_closed or self._fenced is not None:
                raise NotReadyError("this coordinator has stopped; another one may have taken over")
            try:
                refusal, effects = event(self._clock())
                self._perform(effects)
                if refusal is None and keep is not None:
                    keep()
            except FencedError as error:
                self._fenced = error
                self._changed.notify_all()
                raise NotReadyError(str(error)) from error
            except sqlite3.Error as error:
                self._instruments.write_failures.inc()
                raise NotReadyError(f"the report cannot be kept now ({error}); tell it again") from error
        if refusal is not None:
            raise _FAULTS[refusal.fault](refusal.reason)

    def _replay(self, kind: str, body: bytes) -> None:
        """A report that an earlier coordinator kept."""
        if kind == "validation":
            validation = validation_from_wire(coordinator_pb2.ReportValidationRequest.FromString(body))
            self._perform(self.run.on_validation(validation)[1])
        else:
            part = checkpoint_from_wire(
                coordinator_pb2.ReportCheckpointRequest.FromString(body), self.config.train.lanes, self.num_chunks
            )
            self._perform(self.run.on_checkpoint_part(part)[1])

    def _on_committed(self, mark: CheckpointMark) -> None:
        with suppress(NotReadyError):  # stopping: the manifest is there for the next one
            self._feed(
                lambda now: (None, self.run.on_checkpoint_committed(mark)), lambda: self._store.settle_checkpoints(mark.version)
            )

    def _on_failed(self, version: Version, reason: str) -> None:
        with suppress(NotReadyError):
            self._feed(lambda now: (None, self.run.on_checkpoint_failed(version, reason)))

    # ---- effects -------------------------------------------------------------------------------------------------------

    def _perform(self, effects: list[Effect]) -> None:
        """Does what there is to do, in order. What a full disk holds up waits, and everything behind it."""
        self._to_do.extend(effects)
        try:
            while self._to_do:
                self._do(self._to_do[0])
                self.history.take(self._to_do.popleft(), time.time())
            self._ledger.flush()  # first: a step is acknowledged, and forgotten by the shards, once its row is durable
            self._file.flush()
            while self._validated:
                self._store.settle_validation(self._validated.pop())
            if self.run.saved != self._saved:
                self._store.save(self.run.saved)
                self._saved = self.run.saved
            self._held_up = ""
        except (OSError, sqlite3.Error) as error:
            self._instruments.write_failures.inc()
            if not self._held_up:
                self._log.error("cannot write; trying again until it works", error=str(error))
            self._held_up = str(error)
        finally:
            run = self.run
            self.history.observe(run.state, run.version, run.checkpoint.version, self._clock(), time.time())
            self._changed.notify_all()

    def _do(self, effect: Effect) -> None:
        match effect:
            case Announce(plan):
                self._store.save_plan(wire.plan_to_wire(plan).SerializeToString(), plan.timeline.id)
                self._announced = plan
                self._ledger.begin(plan.timeline, plan.reason)
                self._instruments.planned()
            case KeepMember(registration):
                self._store.keep_member(registration)
                self._instruments.joins.labels(registration.role).inc()
            case ForgetMember(incarnation, farewell):
                self._store.forget_member(incarnation)
                self._instruments.lost(incarnation, farewell, self._announced)
            case TokenUse():
                self._store.keep_use(effect, time.time())
            case TrainingRow(summary):
                self._file.append(effect)
                self._ledger.append(summary)
                self._instruments.stepped(0 if summary.refused else summary.tokens)
                if summary.skipped or summary.step % self.config.log.every_steps == 0:
                    self._log.info("trained", **values_of(effect))
            case ValidationRow(version):
                self._file.append(effect)
                self._validated.append(version)
                self._log.info("validated", **values_of(effect))
            case DropRows(version):
                self._file.drop_after(version)
                self._store.drop_reports_after(version)
            case CommitCheckpoint():
                self._committer.put(effect)
            case CheckpointFailed(version, reason):
                self._instruments.checkpoint_failures.inc()
                self._log.error("no checkpoint", version=version, reason=reason)
            case Note(text, is_warning):
                (self._log.warning if is_warning else self._log.info)(text)


def is_refused(address: str) -> bool:
    """Whether the machine at `address` is there and says that nobody listens. Anything else proves nothing.

    A process that is being killed may still accept connections for a moment, but does not greet (a gRPC server does) any more.
    """
    host, _, port = address.rpartition(":")
    for _ in range(PROBES):
        try:
            with socket.create_connection((host.strip("[]"), int(port)), timeout=PROBE_SECONDS) as connection:
                if connection.recv(1):
                    return False
        except ConnectionRefusedError:
            return True
        except ConnectionResetError:
            continue
        except (OSError, ValueError):
            return False
    return False


_FAULTS: dict[Fault, type[RequestError]] = {
    Fault.INCOMPATIBLE: IncompatibleError,
    Fault.MALFORMED: MalformedError,
    Fault.UNKNOWN_MEMBER: UnknownMemberError,
    Fault.NOT_ADMITTED: ForbiddenError,
}


def _prepare_folder(run_dir: Path, config: Config) -> None:
    """Raises `UserError`."""
    resolved = run_dir / "config.resolved.toml"
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        if not resolved.exists():
            replace_file(resolved, to_toml(config).encode())
    except OSError as error:
        raise UserError(f"cannot write into {run_dir}: {error.strerror}; free the disk, or give another --run-dir") from error
