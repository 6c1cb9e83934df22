"""The coordinator as a service: socket, threads and clock around one `Coordinator`."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from coordinator.core.events import RunState
from coordinator.doubts import Doubts
from coordinator.servicer import CoordinatorServicer
from coordinator.shell import Coordinator
from shardlane import rpc
from shardlane.config import Config
from shardlane.errors import NotReadyError
from shardlane.ids import RunId
from shardlane.metrics import Metrics
from shardlane.pb import coordinator_pb2

SERVICE = coordinator_pb2.DESCRIPTOR.services_by_name["Coordinator"]
MEMBERS = ("shard", "worker")
CALLERS = {
    "GetRun": (*MEMBERS, "operator"),
    "Register": MEMBERS,
    "Heartbeat": MEMBERS,
    "WatchPlans": MEMBERS,
    "ReportValidation": ("worker",),
    "ReportCheckpoint": ("shard",),
    "Control": ("operator",),
}
TICK_SECONDS = 0.1
WATCHES_MAX = 1024  # plans watched at a time; with more members each is held for a shorter time


class CoordinatorService:
    """Serves one run until stopped. Usable in a test's own process."""

    def __init__(
        self,
        config: Config,
        *,
        run_dir: Path,
        bind: str = "127.0.0.1:0",
        advertise: str = "",
        fork: bool = False,
        clock: Callable[[], float] = time.monotonic,
        metrics: Metrics | None = None,
        network: rpc.Network = rpc.PLAIN,
        join_secret_file: Path | None = None,
    ) -> None:
        """Binds, and takes over the run of `run_dir`. Raises `UserError` in one of its kinds."""
        metrics = metrics or Metrics("coordinator")
        if network.tls is not None:
            metrics.watch_certificate(network.tls.expiry)
        self._server = network.serve(bind)  # first: who cannot serve must not take the run from who does
        try:
            self.coordinator = Coordinator(
                config, run_dir=run_dir, fork=fork, clock=clock, metrics=metrics, join_secret_file=join_secret_file
            )
        except Exception:
            self._server.stop()
            raise
        self.doubts = Doubts(self.coordinator)
        num_watches = min(WATCHES_MAX, 16 + 2 * self.coordinator.run.num_expected)
        self._watches = ThreadPoolExecutor(num_watches, thread_name_prefix="watch")
        handler = rpc.handler(
            SERVICE,
            CoordinatorServicer(self.coordinator, num_watches, self.doubts),
            pools={"WatchPlans": self._watches},
            observer=metrics.observer,
            callers=CALLERS,
        )
        self._server.add(SERVICE.full_name, handler)
        self.address = rpc.advertised(bind, advertise, self._server.port)
        self._stopping = threading.Event()
        self._ticker = threading.Thread(target=self._tick, name="tick", daemon=True)

    @property
    def run_id(self) -> RunId:
        return self.coordinator.run_id

    @property
    def state(self) -> RunState:
        return self.coordinator.state

    def start(self) -> None:
        self._server.start()
        self._ticker.start()

    def wait_finished(self, timeout_seconds: float) -> RunState:
        """Waits until the run is finished or has failed. Raises `FencedError` if another coordinator takes over."""
        self.coordinator.wait(lambda: self.coordinator.has_ended, timeout_seconds)
        return self.state

    def wait_left(self, timeout_seconds: float) -> bool:
        """Waits until the whole cluster has heard that the run has ended."""
        return self.coordinator.wait(lambda: self.coordinator.run.everybody_knows, timeout_seconds)

    def wait_departures(self, notice_seconds: float, timeout_seconds: float) -> None:
        """Waits while members are leaving: those that say so within `notice_seconds`, for `timeout_seconds` at most."""
        members, begin = self.coordinator.run.members, time.monotonic()
        while members.states and time.monotonic() - begin < (timeout_seconds if members.leaving else notice_seconds):
            self._stopping.wait(TICK_SECONDS)

    def stop(self) -> None:
        self._stopping.set()
        if self._ticker.ident is not None:
            self._ticker.join()
        self.coordinator.close()
        self._server.stop()
        self.doubts.close()
        self._watches.shutdown(wait=False)

    def _tick(self) -> None:
        while not self._stopping.wait(TICK_SECONDS):
            try:
                self.coordinator.tick()
                self.doubts.probe()
            except NotReadyError:  # fenced: whoever waits is told
                return
