"""A parameter shard as a service: sockets, threads and the membership around one `Shard`."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

from ps_service.instruments import ShardInstruments
from ps_service.peers import CALLERS, SERVICE
from ps_service.servicer import ShardServicer
from ps_service.shard import Shard
from shardlane import rpc, wire
from shardlane.errors import MalformedError, StaleError, UserError
from shardlane.ids import Incarnation, Version
from shardlane.logs import logger
from shardlane.member import Beat, Membership, RunInfo, new_incarnation
from shardlane.metrics import Metrics
from shardlane.numerics import configure_torch, numerics_class
from shardlane.pb import coordinator_pb2
from shardlane.plan import Plan
from shardlane.storage import locate

SUMMARIES_A_BEAT = 512
FLUSH_SECONDS_MAX = 5.0  # for reports that the coordinator has not taken yet
TICK_SECONDS = 1.0  # a shard that has not moved for so long sends again what may be lost
STALLED_TICKS = 15  # without a step, and the log says what is missing
PUSHES_MAX = 32  # push streams served at a time, each with one chunk in memory
PULLS_MAX = 64  # pulls that wait or stream at a time; further ones queue. Under ASP none may: each waits for something else
DELIVERIES_MAX = 256  # calls of other shards at a time: two of each, and threads are only made when needed


class ShardService:
    """Joins the run that `run` describes and serves until stopped. Usable in a test's own process."""

    def __init__(
        self, coordinator: str, run: RunInfo, *, bind: str = "127.0.0.1:0", advertise: str = "", metrics_bind: str = ""
    ) -> None:
        """`advertise`: host:port, or host alone, under which peers reach it; empty: as bound."""
        configure_torch(run.config.numerics)
        self.me: Incarnation = new_incarnation("shard")
        self.metrics = Metrics("shard")
        if run.network.tls is not None:
            self.metrics.watch_certificate(run.network.tls.expiry)
        self.shard = Shard(
            self.me,
            run.config,
            run_id=run.run_id,
            checkpoint_path=locate(run.checkpoint_path),
            instruments=ShardInstruments(self.metrics),
            report_checkpoint=self._report_checkpoint,
            on_plan=self._on_peers_plan,
            on_milestone=lambda: self._membership.beat_soon(),
            network=run.network,
        )
        self._log = logger(role="shard", run=run.run_id, rank=self.me)
        num_turns = 2 * run.config.train.lanes * run.config.cluster.stages if run.config.train.goes_by_turns else 0
        pools = {
            "Push": ThreadPoolExecutor(PUSHES_MAX, thread_name_prefix="push"),
            "Pull": ThreadPoolExecutor(max(PULLS_MAX, num_turns), thread_name_prefix="pull"),
            "Deliver": ThreadPoolExecutor(DELIVERIES_MAX, thread_name_prefix="deliver"),
        }
        handler = rpc.handler(SERVICE, ShardServicer(self.shard), pools=pools, observer=self.metrics.observer, callers=CALLERS)
        self._server = run.network.serve(bind, {SERVICE.full_name: handler})
        self.address = rpc.advertised(bind, advertise, self._server.port)
        self.metrics_address = (
            rpc.advertised_metrics(metrics_bind, advertise, self.metrics.serve(metrics_bind)) if metrics_bind else ""
        )
        self._membership = Membership(
            coordinator,
            role="shard",
            incarnation=self.me,
            address=self.address,
            numerics_class=numerics_class(run.config.numerics),
            metrics_address=self.metrics_address,
            run_id=run.run_id,
            network=run.network,
            credential=run.credential,
        )
        self._stopping = threading.Event()
        self._failure: UserError | None = None
        self._ticker = threading.Thread(target=self._tick, name="tick", daemon=True)

    def start(self) -> None:
        """Raises `UserError` if the coordinator refuses the shard."""
        self._server.start()
        self._membership.register()
        self._membership.start(self._beat, self._adopt, self._on_reply)
        self._ticker.start()

    @property
    def run_has_ended(self) -> bool:
        """As far as it is known here. Raises `UserError` if this shard cannot do what a plan says, such as load a checkpoint."""
        if self._failure is not None:
            raise self._failure
        return self._membership.state in (coordinator_pb2.RUN_STATE_FINISHED, coordinator_pb2.RUN_STATE_FAILED)

    @property
    def exit_status(self) -> int:
        return int(self._membership.state == coordinator_pb2.RUN_STATE_FAILED)

    def leave(self, timeout_seconds: float) -> None:
        """Serves on until others hold what this shard holds, or there is nothing more that they could take over."""
        if not self._membership.leave(timeout_seconds):
            self._log.warning("leaving before others have taken over", version=self.shard.publications.oldest())

    def stop(self) -> None:
        """What was asked to be written is written and reported first."""
        self._stopping.set()
        self.shard.publications.fail_waiting()
        self.shard.close()
        self._membership.flush(FLUSH_SECONDS_MAX)
        self._membership.stop()
        self._server.stop()
        self.metrics.close()

    # ---- membership ----------------------------------------------------------------------------------------------------

    def _beat(self) -> Beat:
        number, caught_up, diverged = self.shard.copies()
        version = self.shard.publications.oldest()
        activity = "waiting for a plan" if number is None else f"version {version}"
        steps = self.shard.unacknowledged(SUMMARIES_A_BEAT)
        return Beat(number, Version(max(version, 0)), steps, activity, caught_up, diverged=diverged)

    def _on_reply(self, reply: coordinator_pb2.HeartbeatResponse) -> None:
        self.shard.hear(reply.timeline, num_told=reply.acknowledged_steps, requests=reply.requests)

    def _adopt(self, plan: Plan) -> None:
        try:
            self.shard.adopt(plan)
        except StaleError as error:
            self._log.error(str(error))
        except UserError as error:
            self._failure = error

    def _on_peers_plan(self, plan: coordinator_pb2.Plan) -> None:
        try:
            self._membership.offer(wire.plan_from_wire(plan))
        except MalformedError as error:
            self._log.warning(str(error))

    def _report_checkpoint(self, report: coordinator_pb2.ReportCheckpointRequest) -> None:
        if report.error:
            self._log.error("checkpoint part not written", version=report.version, error=report.error)
        self._membership.report_checkpoint(report)

    def _tick(self) -> None:
        before, num_idle = -2, 0
        while not self._stopping.wait(TICK_SECONDS):
            now = self.shard.publications.oldest()
            num_idle = num_idle + 1 if now == before else 0
            if num_idle:
                self.shard.tick()
            if num_idle == STALLED_TICKS and now >= 0:
                self._log.info("no step for a while", waits_for=self.shard.waits_for())
            before = now
