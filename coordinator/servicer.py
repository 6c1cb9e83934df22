"""Wire in, one call, wire out."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import grpc

from coordinator import translation
from coordinator.core.membership import protocol_mismatch, wrong_run
from coordinator.doubts import Doubts
from coordinator.shell import Coordinator, UnknownMemberError
from coordinator.status import state_to_wire, status_of
from shardlane import rpc, wire
from shardlane.errors import IncompatibleError
from shardlane.ids import PROTOCOL_VERSION, Incarnation
from shardlane.pb import coordinator_pb2
from shardlane.tls import check_caller


class CoordinatorServicer:
    """`shardlane.coordinator.v1.Coordinator` over one run."""

    def __init__(self, coordinator: Coordinator, num_watches: int, doubts: Doubts) -> None:
        """`num_watches`: threads that hold a WatchPlans."""
        self._coordinator = coordinator
        self._num_watches = num_watches
        self._doubts = doubts

    def GetRun(self, request: coordinator_pb2.GetRunRequest, context: grpc.ServicerContext) -> coordinator_pb2.GetRunResponse:
        coordinator = self._coordinator
        if request.protocol_version != PROTOCOL_VERSION:
            raise IncompatibleError(protocol_mismatch(request.protocol_version))
        if request.run_id not in ("", coordinator.run_id):
            raise IncompatibleError(wrong_run(request.run_id, coordinator.run_id))
        return coordinator_pb2.GetRunResponse(
            run_id=coordinator.run_id,
            config=coordinator.config.model_dump_json(),
            data_digest=coordinator.dataset.digest,
            checkpoint_path=str(coordinator.root),
        )

    def Register(
        self, request: coordinator_pb2.RegisterRequest, context: grpc.ServicerContext
    ) -> coordinator_pb2.RegisterResponse:
        registration = translation.registration_from_wire(request)
        check_caller(context, method=f"Register as {registration.role}", allowed=(registration.role,))
        readmission = self._coordinator.register(registration, request.join_token)
        return coordinator_pb2.RegisterResponse(
            lease_seconds=self._coordinator.config.cluster.lease_seconds, readmission=readmission
        )

    def Heartbeat(
        self, request: coordinator_pb2.HeartbeatRequest, context: grpc.ServicerContext
    ) -> coordinator_pb2.HeartbeatResponse:
        coordinator = self._coordinator
        with _not_found(context):
            coordinator.heartbeat(
                translation.heartbeat_from_wire(request, coordinator.config.train.lanes, coordinator.num_chunks)
            )
        with coordinator.reading():
            return coordinator_pb2.HeartbeatResponse(
                lease_seconds=coordinator.config.cluster.lease_seconds,
                state=state_to_wire(coordinator.run),
                acknowledged_steps=coordinator.acknowledged_steps,
                requests=coordinator.run.requests,
                timeline=coordinator.run.timeline.id,
                reason=coordinator.run.failure,
                may_leave=coordinator.run.may_leave(Incarnation(request.incarnation), coordinator.now()),
            )

    def WatchPlans(
        self, request: coordinator_pb2.WatchPlansRequest, context: grpc.ServicerContext
    ) -> Iterator[coordinator_pb2.WatchPlansResponse]:
        coordinator = self._coordinator
        crowd = max(1.0, len(coordinator.run.members.states) / self._num_watches)
        incarnation = Incarnation(request.incarnation)
        is_over = threading.Event()

        def on_end() -> None:
            coordinator.wake()  # a watcher that is gone must not hold its thread
            self._doubts.closed(incarnation, is_broken=not is_over.is_set())

        self._doubts.opened(incarnation)
        if not context.add_callback(on_end):
            self._doubts.closed(incarnation, is_broken=True)
            return
        have = wire.number_from_wire(request.have)
        for plan in coordinator.plans_after(have, rpc.WAIT_SECONDS / crowd, context.is_active):
            yield coordinator_pb2.WatchPlansResponse(plan=wire.plan_to_wire(plan))
        if context.is_active():
            is_over.set()

    def ReportValidation(
        self, request: coordinator_pb2.ReportValidationRequest, context: grpc.ServicerContext
    ) -> coordinator_pb2.ReportValidationResponse:
        with _not_found(context):
            self._coordinator.report_validation(translation.validation_from_wire(request), request.SerializeToString())
        return coordinator_pb2.ReportValidationResponse()

    def ReportCheckpoint(
        self, request: coordinator_pb2.ReportCheckpointRequest, context: grpc.ServicerContext
    ) -> coordinator_pb2.ReportCheckpointResponse:
        report = translation.checkpoint_from_wire(request, self._coordinator.config.train.lanes, self._coordinator.num_chunks)
        with _not_found(context):
            self._coordinator.report_checkpoint(report, request.SerializeToString())
        return coordinator_pb2.ReportCheckpointResponse()

    def GetStatus(
        self, request: coordinator_pb2.GetStatusRequest, context: grpc.ServicerContext
    ) -> coordinator_pb2.GetStatusResponse:
        return status_of(self._coordinator, request.points)

    def Control(self, request: coordinator_pb2.ControlRequest, context: grpc.ServicerContext) -> coordinator_pb2.ControlResponse:
        self._coordinator.control(translation.control_from_wire(request.action))
        with self._coordinator.reading():
            return coordinator_pb2.ControlResponse(state=state_to_wire(self._coordinator.run))


@contextmanager
def _not_found(context: grpc.ServicerContext) -> Iterator[None]:
    try:
        yield
    except UnknownMemberError as error:
        context.abort(grpc.StatusCode.NOT_FOUND, rpc.reason_of(error))
