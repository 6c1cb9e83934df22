"""The client side of membership: how a shard or a worker joins a run, keeps its lease, hears of plans and tells its news.

A member goes on working whatever happens to the coordinator: heartbeats, plans and reports have threads and a connection of
their own, are tried until they get through, and never hold up a caller.
"""

from __future__ import annotations

import json
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import grpc

from shardlane import config as configs
from shardlane import rpc, wire
from shardlane.config import Config
from shardlane.credentials import NO_CREDENTIAL, Credential
from shardlane.errors import MalformedError, UnreachableError
from shardlane.ids import PROTOCOL_VERSION, ChunkId, Incarnation, PlanNumber, RunId, Version
from shardlane.logs import logger
from shardlane.pb import coordinator_pb2
from shardlane.plan import Plan, Role

BEAT_SECONDS_MAX = 0.5  # heartbeats come at a quarter of the lease, at least so often
ENDING_BEAT_SECONDS = 0.2  # the end of a run, or that one may go, is worth knowing soon
BEAT_DEADLINE_SECONDS = 2.0
RETRY_SECONDS = 0.5
PATIENCE_SECONDS = 60.0  # with a coordinator that does not answer when a process begins
REPORTS_MAX = 4096  # that wait for the coordinator; the oldest gives way
_SERVICE = coordinator_pb2.DESCRIPTOR.services_by_name["Coordinator"]
_REFUSED = (
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.PERMISSION_DENIED,
    grpc.StatusCode.UNIMPLEMENTED,
)


@dataclass(frozen=True)
class RunInfo:
    """What a process must know of a run before it joins."""

    run_id: RunId
    config: Config
    data_digest: str
    checkpoint_path: str  # a folder, or a prefix in an object store
    network: rpc.Network = rpc.PLAIN
    credential: Credential = NO_CREDENTIAL


@dataclass(frozen=True, slots=True)
class Beat:
    """What a heartbeat tells; `plan` is the newest that the member has adopted, `steps` those that are not acknowledged."""

    plan: PlanNumber | None
    version: Version
    steps: Sequence[coordinator_pb2.StepSummary] = ()
    activity: str = ""
    caught_up: Sequence[tuple[ChunkId, Incarnation]] = ()  # learners that a primary waits for
    lane_seconds: float = 0.0  # what a worker computes for one lane of a step, of late; 0: not known
    diverged: Sequence[ChunkId] = ()  # chunks of which a shard has dropped its copy, since it differed from the primary's


def new_incarnation(role: Role) -> Incarnation:
    return Incarnation(f"{role}-{secrets.token_hex(4)}")


def fetch_run(
    coordinator: str,
    *,
    run_id: str = "",
    patience_seconds: float = PATIENCE_SECONDS,
    network: rpc.Network = rpc.PLAIN,
    credential: Credential = NO_CREDENTIAL,
) -> RunInfo:
    """Asks the coordinator which run it has, again and again while it does not answer.

    Raises `UnreachableError` once patience is over; `UserError` with the reason if it runs another run or protocol.
    """
    request = coordinator_pb2.GetRunRequest(protocol_version=PROTOCOL_VERSION, run_id=run_id)
    what, end, has_said = f"the coordinator at {coordinator}", time.monotonic() + patience_seconds, False
    with network.connect(coordinator, to="coordinator", own_connection=True) as channel:
        client = rpc.Client(channel, _SERVICE)
        while True:
            try:
                with rpc.user_errors(what):
                    deadline = max(1.0, min(rpc.CONTROL_DEADLINE_SECONDS, end - time.monotonic()))
                    response = client.GetRun(request, timeout=deadline)
                break
            except UnreachableError as error:
                if time.monotonic() >= end:
                    raise UnreachableError(f"gave up after {patience_seconds:g} s: {error}") from error
                if not has_said:
                    logger(role="member").info("waiting for the coordinator", coordinator=coordinator)
                has_said = True
                time.sleep(min(RETRY_SECONDS, max(0.0, end - time.monotonic())))
    config = configs.build(json.loads(response.config))
    return RunInfo(RunId(response.run_id), config, response.data_digest, response.checkpoint_path, network, credential)


class Membership:
    """One process's place in a run. Every public method may be called from any thread."""

    def __init__(
        self,
        coordinator: str,
        *,
        role: Role,
        incarnation: Incarnation,
        address: str,
        numerics_class: str,
        metrics_address: str = "",
        run_id: str = "",
        memory_bytes: int = 0,
        network: rpc.Network = rpc.PLAIN,
        credential: Credential = NO_CREDENTIAL,
    ) -> None:
        self.incarnation = incarnation
        self._role, self._credential, self._readmission = role, credential, ""
        self._coordinator = coordinator
        self._registration = coordinator_pb2.RegisterRequest(
            protocol_version=PROTOCOL_VERSION,
            role=wire.role_to_wire(role),
            incarnation=incarnation,
            address=address,
            numerics_class=numerics_class,
            run_id=run_id,
            metrics_address=metrics_address,
            memory_bytes=memory_bytes,
        )
        self._log = logger(role=role, rank=incarnation, run=run_id or None)
        # Heartbeats do not wait behind plans and reports, nor these behind tensors.
        self._beats, self._talk = (network.connect(coordinator, to="coordinator", own_connection=True) for _ in range(2))
        self._beat_client, self._talk_client = rpc.Client(self._beats, _SERVICE), rpc.Client(self._talk, _SERVICE)
        self._changed = threading.Condition()
        self._plan: Plan | None = None
        self._reply = coordinator_pb2.HeartbeatResponse()
        self._reports: deque[tuple[str, Any]] = deque()
        self._stopping = threading.Event()
        self._beat_now = threading.Event()
        self._lease_seconds = 4 * BEAT_SECONDS_MAX
        self._threads: list[threading.Thread] = []
        self._is_away = False
        self._is_leaving = False

    # ---- what a service uses -------------------------------------------------------------------------------------------

    @property
    def plan(self) -> Plan | None:
        """The newest plan, whoever told it."""
        return self._plan

    @property
    def state(self) -> coordinator_pb2.RunState:
        """The run's state as last heard; unspecified before the first answer."""
        return self._reply.state

    @property
    def reason(self) -> str:
        """Of a failure."""
        return self._reply.reason

    def register(self, *, patience_seconds: float = PATIENCE_SECONDS) -> None:
        """Again and again while the coordinator does not answer: it may be starting again just now.

        Raises `UserError` with the reason of a refusal, `UnreachableError` once patience is over.
        """
        end = time.monotonic() + patience_seconds
        while True:
            try:
                with rpc.user_errors(f"the coordinator at {self._coordinator}"):
                    self._lease_seconds = self._register(rpc.CONTROL_DEADLINE_SECONDS)
                return
            except UnreachableError:
                if time.monotonic() >= end or self._stopping.wait(RETRY_SECONDS):
                    raise

    def _register(self, timeout_seconds: float) -> float:
        """The lease in seconds. The same life of this process is admitted again by what the first answer gave it."""
        self._registration.join_token = self._credential.present(self._role, self._readmission)
        response = self._beat_client.Register(self._registration, timeout=timeout_seconds)
        self._readmission = response.readmission
        return float(response.lease_seconds)

    def start(
        self,
        beat: Callable[[], Beat],
        on_plan: Callable[[Plan], None],
        on_reply: Callable[[coordinator_pb2.HeartbeatResponse], None],
    ) -> None:
        """Begins after `register`. `on_plan` hears of ever greater plans, one at a time; of a burst, of the newest alone."""
        runs = {"beats": lambda: self._run_beats(beat, on_reply), "watch": self._run_watch}
        runs |= {"plans": lambda: self._run_plans(on_plan), "reports": self._run_reports}
        self._threads = [threading.Thread(target=run, name=f"member-{name}", daemon=True) for name, run in runs.items()]
        for thread in self._threads:
            thread.start()

    def offer(self, plan: Plan) -> None:
        """A plan that a peer has passed on: adopted if it is greater than what is known here."""
        with self._changed:
            known = self._plan
            if known is None or plan.number > known.number:
                self._plan = plan
                self._changed.notify_all()
            elif plan.number == known.number and plan.digest != known.digest:
                self._log.error("two plans of one number", epoch=str(plan.number), here=known.digest[:12], there=plan.digest[:12])

    def beat_soon(self) -> None:
        """There is news that should not wait for the next heartbeat."""
        self._beat_now.set()

    def report_validation(self, version: Version, index: int, loss_sum: float, tokens: int) -> None:
        request = coordinator_pb2.ReportValidationRequest(version=version, index=index, loss_sum=loss_sum, tokens=tokens)
        self._report("ReportValidation", request)

    def report_checkpoint(self, request: coordinator_pb2.ReportCheckpointRequest) -> None:
        self._report("ReportCheckpoint", request)

    def leave(self, timeout_seconds: float) -> bool:
        """Says that this member wants to go, and waits until it is not needed; whether it is told so in time.

        Nobody takes over while the coordinator is away, and nothing is lost by going then.
        """
        self._is_leaving = True
        self.beat_soon()
        is_over = (coordinator_pb2.RUN_STATE_FINISHED, coordinator_pb2.RUN_STATE_FAILED)
        with self._changed:
            self._changed.wait_for(
                lambda: self._reply.may_leave or self._is_away or self.state in is_over or self._stopping.is_set(),
                timeout_seconds,
            )
            return self._reply.may_leave

    def flush(self, timeout_seconds: float) -> bool:
        """Waits until every report is delivered."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._reports, timeout_seconds)

    def stop(self) -> None:
        self._stopping.set()
        self._beat_now.set()
        with self._changed:
            self._changed.notify_all()
        self._beats.close()
        self._talk.close()
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(timeout=2.0)

    # ---- heartbeats ----------------------------------------------------------------------------------------------------

    def _run_beats(self, beat: Callable[[], Beat], on_reply: Callable[[coordinator_pb2.HeartbeatResponse], None]) -> None:
        while not self._stopping.is_set():
            self._beat_now.clear()
            try:
                self._send_beat(beat(), on_reply)
            except Exception:  # a fault in what the service told or did must not cost it its lease
                self._log.exception("heartbeat went wrong")
            self._beat_now.wait(self._beat_seconds())

    def _beat_seconds(self) -> float:
        if self._is_away:
            return RETRY_SECONDS
        is_ending = self._is_leaving or self.state == coordinator_pb2.RUN_STATE_FINISHING
        return min(ENDING_BEAT_SECONDS if is_ending else BEAT_SECONDS_MAX, self._lease_seconds / 4)

    def _send_beat(self, beat: Beat, on_reply: Callable[[coordinator_pb2.HeartbeatResponse], None]) -> None:
        request = coordinator_pb2.HeartbeatRequest(
            incarnation=self.incarnation,
            plan=wire.number_to_wire(beat.plan) if beat.plan is not None else None,
            version=beat.version,
            steps=beat.steps,
            activity=beat.activity[:64],
            caught_up=[coordinator_pb2.CaughtUp(chunk=chunk, learner=learner) for chunk, learner in beat.caught_up],
            diverged=beat.diverged,
            lane_seconds=beat.lane_seconds,
            leaving=self._is_leaving,
        )
        try:
            reply = self._beat_client.Heartbeat(request, timeout=BEAT_DEADLINE_SECONDS)
        except (grpc.RpcError, ValueError) as error:  # ValueError: the channel was closed
            if (failed := self._on_failed_beat(error)) is None:
                return
            reply = failed
        else:
            self._set_away(False)
            self._lease_seconds = reply.lease_seconds or self._lease_seconds
        with self._changed:
            self._reply = reply
            self._changed.notify_all()
        on_reply(reply)

    def _on_failed_beat(self, error: Exception) -> coordinator_pb2.HeartbeatResponse | None:
        """Registers again where that is what is missing. An answer that says FAILED: there is no way back into this run."""
        if self._stopping.is_set():
            return None
        try:
            if isinstance(error, grpc.RpcError) and error.code() == grpc.StatusCode.NOT_FOUND:
                self._lease_seconds = self._register(BEAT_DEADLINE_SECONDS)
                self._log.info("registered again")
                self._beat_now.set()
                return None
        except grpc.RpcError as refusal:
            if refusal.code() in _REFUSED:
                self._log.error("the coordinator refuses", reason=refusal.details())
                return coordinator_pb2.HeartbeatResponse(state=coordinator_pb2.RUN_STATE_FAILED, reason=refusal.details())
        self._set_away(True)
        return None

    def _set_away(self, is_away: bool) -> None:
        if is_away and not self._is_away:
            self._log.warning("the coordinator does not answer; going on without it")
        elif self._is_away and not is_away:
            self._log.info("the coordinator answers again")
        with self._changed:
            self._is_away = is_away
            self._changed.notify_all()

    # ---- plans ---------------------------------------------------------------------------------------------------------

    def _run_watch(self) -> None:
        """Asks for plans, in calls that the coordinator holds for up to `rpc.WAIT_SECONDS`."""
        while not self._stopping.is_set():
            have = self._plan
            request = coordinator_pb2.WatchPlansRequest(
                incarnation=self.incarnation, have=wire.number_to_wire(have.number) if have is not None else None
            )
            try:
                for response in self._talk_client.WatchPlans(request, timeout=2 * rpc.WAIT_SECONDS):
                    self.offer(wire.plan_from_wire(response.plan))
            except MalformedError as error:
                self._log.error("not a plan", error=str(error))
                self._stopping.wait(RETRY_SECONDS)
            except (grpc.RpcError, ValueError):
                self._stopping.wait(RETRY_SECONDS)

    def _run_plans(self, on_plan: Callable[[Plan], None]) -> None:
        told: Plan | None = None
        while True:
            with self._changed:
                self._changed.wait_for(lambda told=told: self._stopping.is_set() or self._plan is not told)  # type: ignore[misc]
                plan = self._plan
            if self._stopping.is_set() or plan is None:
                return
            told = plan
            try:
                on_plan(plan)
            except Exception:  # the next plan may be a better one
                self._log.exception("plan not adopted", epoch=str(plan.number))

    # ---- reports -------------------------------------------------------------------------------------------------------

    def _report(self, method: str, request: Any) -> None:
        request.incarnation = self.incarnation
        with self._changed:
            if len(self._reports) >= REPORTS_MAX:
                lost, _ = self._reports.popleft()
                self._log.error("too many reports wait for the coordinator; the oldest is dropped", method=lost)
            self._reports.append((method, request))
            self._changed.notify_all()

    def _run_reports(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._stopping.is_set() or bool(self._reports))
                if self._stopping.is_set():
                    return
                method, request = self._reports[0]
            if not self._deliver(method, request):
                self._stopping.wait(RETRY_SECONDS)
                continue
            with self._changed:
                if self._reports and self._reports[0][1] is request:
                    self._reports.popleft()
                self._changed.notify_all()

    def _deliver(self, method: str, request: Any) -> bool:
        """Whether the report is done with: taken, or refused for good."""
        try:
            getattr(self._talk_client, method)(request, timeout=rpc.CONTROL_DEADLINE_SECONDS)
        except ValueError:
            return False
        except grpc.RpcError as error:
            if error.code() not in _REFUSED:  # it is not there; or knows us not, and the next beat registers
                return False
            self._log.error("report refused", method=method, reason=error.details())
        return True
