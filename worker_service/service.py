"""A worker as a service: feeds the stepper what happens, and does what it says on one thread."""

from __future__ import annotations

import threading
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property

from shardlane import rpc
from shardlane.config import Config
from shardlane.data import TokenFolder
from shardlane.errors import DataError
from shardlane.ids import Incarnation, Lane, MicroBatch, Version
from shardlane.lane_compute import micro_batches_of
from shardlane.logs import logger
from shardlane.member import Beat, Membership, RunInfo, new_incarnation
from shardlane.metrics import Metrics
from shardlane.numerics import configure_torch, numerics_class
from shardlane.partition import Layout
from shardlane.pb import coordinator_pb2
from shardlane.plan import Plan
from shardlane.token_cache import open_tokens
from shardlane.top_k import Residuals
from worker_service.attempt import Abandoned, Attempt
from worker_service.core import events
from worker_service.core.stepper import Stepper
from worker_service.core.turns import TurnStepper
from worker_service.device import memory_of, memory_taken, pick_device
from worker_service.inbox import Direction, Inbox
from worker_service.instruments import WorkerInstruments
from worker_service.links import CALLERS, SERVICE
from worker_service.pace import Pace
from worker_service.pulls import Superseded
from worker_service.seat import Seat, Surroundings
from worker_service.servicer import WorkerServicer
from worker_service.staging import Staging

TRANSFERS_MAX = 16  # streams of neighbours at a time: two, and those of plans that are just going
REPORT_SECONDS = 5.0  # that reports have to reach the coordinator when the run is over

_SITTING = (events.Begin, events.Rest, events.Leave)  # never abandoned

_STATES: dict[int, events.RunState] = {
    coordinator_pb2.RUN_STATE_GATHERING: "gathering",
    coordinator_pb2.RUN_STATE_TRAINING: "training",
    coordinator_pb2.RUN_STATE_PAUSED: "paused",
    coordinator_pb2.RUN_STATE_FINISHING: "finishing",
    coordinator_pb2.RUN_STATE_FINISHED: "finished",
    coordinator_pb2.RUN_STATE_FAILED: "failed",
}


class WorkerService:
    """Joins the run that `run` describes and works until it is over or `stop`. Usable in a test's own process."""

    def __init__(
        self,
        coordinator: str,
        run: RunInfo,
        *,
        bind: str = "127.0.0.1:0",
        advertise: str = "",
        device: str = "auto",
        metrics_bind: str = "",
    ) -> None:
        """`advertise`: host:port, or host alone, under which peers reach it; empty: as bound. `device`: auto, cpu or cuda."""
        self.me: Incarnation = new_incarnation("worker")
        self.run = run
        self.config: Config = run.config
        configure_torch(run.config.numerics)
        self._device = pick_device(device)
        self.metrics = Metrics("worker")
        if run.network.tls is not None:
            self.metrics.watch_certificate(run.network.tls.expiry)
        self.instruments = WorkerInstruments(self.metrics)
        self._staging = Staging(self._device)
        self.stepper = (TurnStepper if run.config.train.goes_by_turns else Stepper)(self.me, run.config)
        self._log = logger(role="worker", run=run.run_id, rank=self.me, step=lambda: self.stepper.step, epoch=self._epoch)
        self.inbox = Inbox(
            self.me,
            run.run_id,
            run.config.transport.inbox_bytes,
            self._staging.pool,
            on_ahead=lambda version, formed: self._post(events.PeerAhead(version, formed)),
            on_reseated=lambda formed: self._post(events.PeerReseated(formed)),
            on_lane=self._on_lane,
            reads=run.config.train.reads,
            num_places=run.config.train.num_places,
        )
        pools = {"Transfer": ThreadPoolExecutor(TRANSFERS_MAX, thread_name_prefix="transfer")}
        handler = rpc.handler(SERVICE, WorkerServicer(self.inbox), pools=pools, observer=self.metrics.observer, callers=CALLERS)
        self._server = run.network.serve(bind, {SERVICE.full_name: handler})
        self.address = rpc.advertised(bind, advertise, self._server.port)
        self.metrics_address = (
            rpc.advertised_metrics(metrics_bind, advertise, self.metrics.serve(metrics_bind)) if metrics_bind else ""
        )
        self._membership = Membership(
            coordinator,
            role="worker",
            incarnation=self.me,
            address=self.address,
            numerics_class=numerics_class(run.config.numerics, self._device),
            metrics_address=self.metrics_address,
            run_id=run.run_id,
            memory_bytes=memory_of(self._device),
            network=run.network,
            credential=run.credential,
        )
        self._changed = threading.Condition()
        self._work: deque[events.Work] = deque()
        self._attempt = Attempt()
        self._seat: Seat | None = None
        self._routing: Plan | None = None  # the newest plan that left the seat as it is
        self._stopping = False
        self._ended = threading.Event()
        self._failure: BaseException | None = None
        self._began_seconds = 0.0
        self._pace = Pace()
        self._thread = threading.Thread(target=self._main, name="compute", daemon=True)
        self._residuals = Residuals(1 + self.config.train.staleness)
        self.instruments.watch(
            lambda: self.inbox.num_bytes,
            lambda: self._seat.push_queue_bytes if self._seat else 0,
            lambda: memory_taken(self._device),
            self._residuals,
        )
        self._around = self._surroundings()

    def _surroundings(self) -> Surroundings:
        return Surroundings(
            me=self.me,
            run_id=self.run.run_id,
            config=self.config,
            layout=Layout.of(self.config),
            staging=self._staging,
            inbox=self.inbox,
            network=self.run.network,
            residuals=self._residuals,
            instruments=self.instruments,
            tokens=lambda: self._tokens,
            report_validation=self._membership.report_validation,
            offer=self._membership.offer,
            on_answers=lambda refusals: self._post(events.Answered(refusals)),
            on_pull_ended=lambda shard: self._post(events.PullEnded(shard)),
            on_broken=self._on_broken,
            on_fault=lambda fault: self._log.error("a peer is at fault, or this worker", fault=fault),
        )

    # ---- what a process uses -------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Raises `UserError` if the coordinator refuses the worker."""
        self._server.start()
        self._membership.register()
        self._thread.start()
        self._membership.start(self._beat, lambda plan: self._post(events.PlanAdopted(plan)), self._on_reply)

    def wait(self, timeout: float | None = None) -> bool:
        """Whether the run is over for this worker. Raises what went wrong in it."""
        ended = self._ended.wait(timeout)
        if self._failure is not None:
            raise self._failure
        return ended

    @property
    def exit_status(self) -> int:
        return int(self._membership.state == coordinator_pb2.RUN_STATE_FAILED)

    def leave(self, timeout_seconds: float) -> None:
        """Works on until others have its lanes."""
        if not self._membership.leave(timeout_seconds):
            self._log.warning("leaving before others have taken over", version=self.stepper.step)

    def stop(self) -> None:
        if self._ended.is_set():
            self._membership.flush(REPORT_SECONDS)
        with self._changed:
            self._stopping = True
            self._work.clear()
            self._attempt.abandon()
            self._changed.notify_all()
        self.inbox.stop()
        if self._thread.is_alive():
            self._thread.join(timeout=30.0)
        if self._seat is not None:
            self._seat.close()
        self._membership.stop()
        self._server.stop()
        self.metrics.close()

    # ---- what happens --------------------------------------------------------------------------------------------------

    def _post(self, event: events.Event) -> None:
        """Any thread tells the stepper; what can be done at once is done here, the rest by the thread that computes."""
        with self._changed:
            for effect in self.stepper.handle(event):
                self._do(effect)
            self.instruments.version.set(self.stepper.step)
            self._changed.notify_all()

    def _do(self, effect: events.Effect) -> None:
        seat = self._seat
        match effect:
            case events.Abandon():
                self._work = deque(work for work in self._work if isinstance(work, _SITTING))
                self._attempt.abandon()
                self._attempt = Attempt()
            case events.Reroute():
                self._routing = effect.plan
                if seat is not None:
                    seat.reroute(effect.plan)
                    self.instruments.sit(seat.place)
            case events.PushAgain() if seat is not None:
                seat.push_again(effect.keys)
            case events.PushAllAgain() if seat is not None:
                seat.push_all_again(effect.shard)
            case events.AskAbove() if seat is not None:
                seat.ask_above(effect.version, effect.lane)
            case events.TellBelow() if seat is not None:
                seat.tell_below(effect.version, effect.lane)
            case events.Reopen() if seat is not None:
                seat.reopen(effect.version, effect.lane)
            case events.PushAgain() | events.PushAllAgain() | events.AskAbove() | events.TellBelow() | events.Reopen():
                pass  # the seat is gone, and what was to be done with it
            case events.Begin() | events.Rest() | events.Leave():
                self._work = deque([effect])  # what was to be done in another seat is void
            case _:
                self._work.append(effect)

    def _on_reply(self, reply: coordinator_pb2.HeartbeatResponse) -> None:
        state = _STATES.get(reply.state)
        if state is not None:
            self._post(events.StateChanged(state))

    def _on_lane(self, direction: Direction, version: Version, first: MicroBatch) -> None:
        lane = Lane(first // len(micro_batches_of(0, self.config.train)))
        self._post(events.LaneAsked(version, lane) if direction == "below" else events.LaneTold(version, lane))

    def _on_broken(self, neighbour: Incarnation, reason: str) -> None:
        self.instruments.broken_streams.inc()
        self._log.warning("stream broke; opening it again", neighbour=neighbour, reason=reason)

    def _beat(self) -> Beat:
        plan, version = self.stepper.plan, self.stepper.step
        activity = f"{self.stepper.phase} at step {version}"
        return Beat(plan.number if plan else None, version, activity=activity, lane_seconds=self._pace.lane_seconds)

    def _epoch(self) -> str | None:
        return str(self.stepper.plan.number) if self.stepper.plan else None

    # ---- the thread that computes --------------------------------------------------------------------------------------

    def _main(self) -> None:
        try:
            while (work := self._next_work()) is not None:
                try:
                    self._perform(*work)
                except Abandoned:
                    self._log.debug("abandoned", work=type(work[0]).__name__)
        except BaseException as failure:  # a bug, or something of the person's: told by `wait`
            self._failure = failure
            self._log.error("this worker cannot go on", error=str(failure))
        finally:
            self._ended.set()

    def _next_work(self) -> tuple[events.Work, Attempt] | None:
        with self._changed:
            self._changed.wait_for(lambda: self._stopping or bool(self._work))
            return None if self._stopping else (self._work.popleft(), self._attempt)

    def _perform(self, work: events.Work, attempt: Attempt) -> None:
        if isinstance(work, _SITTING):
            self._sit(work)
            return
        seat = self._seat
        assert seat is not None, f"{work} without a seat"
        match work:
            case events.Ask():
                seat.ask(work.version)
            case events.Await():
                self._post(events.Offered(work.attempt, seat.wait_turn(work, attempt)))
            case events.Pull():
                self._pull(seat, work, attempt)
            case events.Validate():
                seat.validate(work.version, work.indices, attempt)
                self._post(events.Validated(work.attempt))
            case events.Run():
                began = self.instruments.computed_seconds
                loss = seat.run(work.step, work.blocks, attempt)
                self._pace.add(self.instruments.computed_seconds - began, sum(block.size for block in work.blocks))
                if loss is not None and not work.again:
                    self.instruments.loss.set(loss)
                self._post(events.Ran(work.attempt, seat.published))

    def _pull(self, seat: Seat, work: events.Pull, attempt: Attempt) -> None:
        try:
            seat.pull(work, attempt)
        except Superseded as superseded:
            self._post(events.Superseded(work.attempt, superseded.now))
            return
        now = time.perf_counter()
        if self._began_seconds:
            self.instruments.step_seconds.observe(now - self._began_seconds)
        self._began_seconds = now
        self._post(events.Pulled(work.attempt))

    def _sit(self, work: events.Begin | events.Rest | events.Leave) -> None:
        old, self._seat = self._seat, None
        self._began_seconds = 0.0
        self._pace = Pace()
        if old is not None:
            old.close()
        match work:
            case events.Begin():
                self._log.info("seat taken", replica=work.replica, stage=work.stage, reason=work.plan.reason)
                seat = Seat(self._around, work.plan, work.replica, work.stage, old.compute if old else None)
                with self._changed:
                    if self._routing is not None:
                        seat.reroute(self._routing)  # it came while this seat was on its way
                    self._seat = seat
                    self.instruments.sit(seat.place)
            case events.Rest():
                with self._changed:
                    self.instruments.sit(None)
                self.inbox.open(work.plan.number, None)
            case events.Leave():
                self._ended.set()

    @cached_property
    def _tokens(self) -> TokenFolder:
        """Raises `DataError` if it is not the data that the coordinator means, or too little of it."""
        folder = open_tokens(self.config)
        if folder.digest != self.run.data_digest:
            raise DataError(
                f"{self.config.data.path} has data hash {folder.digest[:12]}; the run trains on {self.run.data_digest[:12]}"
            )
        folder.train.num_windows(self.config.train.seq_len)
        if self.config.validation.num_micro_batches:
            folder.held_out.num_windows(self.config.train.seq_len)
        return folder
