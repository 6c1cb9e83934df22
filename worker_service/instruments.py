"""What a worker shows on `/metrics`."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

from shardlane.metrics import Metrics
from shardlane.top_k import Residuals

Phase = Literal["compute", "bubble", "pull_wait", "push_wait"]
PHASES: tuple[Phase, ...] = ("compute", "bubble", "pull_wait", "push_wait")
STALENESS = (0, 1, 2, 3, 4, 8, 16)  # bounds of the histogram's buckets


class WorkerInstruments:
    """Where a step's time goes, by phase: waiting for a neighbour is `bubble`, for a version `pull_wait`, for room in the push
    queue `push_wait`, and the rest of a run is `compute`."""

    def __init__(self, metrics: Metrics) -> None:
        self._gauge = metrics.gauge
        self.step_seconds = metrics.histogram("shardlane_worker_step_seconds", "From one version to the next.")
        phases = metrics.counter("shardlane_worker_phase_seconds_total", "Where the time of steps goes.", ("phase",))
        self._phases = {phase: phases.labels(phase) for phase in PHASES}
        self.computed_seconds = 0.0  # in all
        self._waited_seconds = 0.0  # by whichever thread computes: on CUDA, autograd's while the one that began it waits
        self.gradient_bytes = metrics.counter("shardlane_worker_gradient_bytes_total", "Gradients to push, before coding.")
        self.rescaled_chunks = metrics.counter(
            "shardlane_worker_rescaled_chunks_total", "Chunks with a gradient beyond fp16's range, which were scaled to fit."
        )
        self.pushed_bytes = metrics.counter(
            "shardlane_worker_pushed_bytes_total", "Gradient bytes sent to shards, after coding; a repeated one counts again."
        )
        self.pulled_bytes = metrics.counter("shardlane_worker_pulled_bytes_total", "Parameter bytes received from shards.")
        self.tokens = metrics.counter("shardlane_worker_tokens_total", "Tokens whose gradients this stage computed.")
        self.loss = metrics.gauge("shardlane_worker_loss", "Mean loss of this replica's lanes in the last step, in nats.")
        self.version = metrics.gauge("shardlane_worker_version", "The step that this stage computes, by the version before it.")
        self.staleness = metrics.histogram(
            "shardlane_worker_staleness_versions", "How much older than a step is what it is computed from.", buckets=STALENESS
        )
        self.broken_streams = metrics.counter("shardlane_worker_broken_streams_total", "Streams to neighbours that broke.")

        self._seat = metrics.gauge(
            "shardlane_worker_seat_info",
            "1 for the seat that this worker has in the plan; none: it is a spare.",
            ("replica", "stage"),
        )

    def sit(self, seat: tuple[int, int] | None) -> None:
        """(replica, stage); None: it has no seat any more."""
        self._seat.clear()
        if seat is not None:
            self._seat.labels(*seat).set(1)

    def watch(
        self,
        inbox_bytes: Callable[[], float],
        push_queue_bytes: Callable[[], float],
        device_bytes: Callable[[], float],
        residuals: Residuals,
    ) -> None:
        gauge = self._gauge
        gauge("shardlane_worker_residual_norm", "L2 norm of the gradients that top-k has left out so far.").set_function(
            lambda: residuals.norm
        )
        begun = gauge("shardlane_worker_residuals_begun", "Lanes' chunks begun without what an earlier worker has left out.")
        begun.set_function(lambda: residuals.num_begun)
        gauge("shardlane_worker_inbox_bytes", "Received from neighbours and not used yet.").set_function(inbox_bytes)
        gauge("shardlane_worker_device_memory_bytes", "Memory of a CUDA device that torch holds; 0 on a CPU.").set_function(
            device_bytes
        )
        gauge("shardlane_worker_push_queue_bytes", "Gradients not sent yet.").set_function(push_queue_bytes)

    @contextmanager
    def waiting(self, phase: Phase) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            seconds = time.perf_counter() - began
            self._phases[phase].inc(seconds)
            self._waited_seconds += seconds

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Counts what passes inside, less the waits."""
        began, waited = time.perf_counter(), self._waited_seconds
        try:
            yield
        finally:
            waited = self._waited_seconds - waited
            computed = max(0.0, time.perf_counter() - began - waited)
            self._phases["compute"].inc(computed)
            self.computed_seconds += computed
