"""`coordinator.proto` ↔ the core's values."""

from __future__ import annotations

import math
import re

from coordinator.core.events import (
    CheckpointReport,
    Control,
    Heartbeat,
    Registration,
    StepSummary,
    ValidationReport,
)
from shardlane import wire
from shardlane.errors import MalformedError
from shardlane.ids import ChunkId, Incarnation, Step, Version
from shardlane.pb import coordinator_pb2

STEPS_MAX = 512  # summaries in one heartbeat
_PART = re.compile(r"part-[\w.-]{1,128}\.safetensors")

_CONTROLS: dict[int, Control] = {
    coordinator_pb2.CONTROL_ACTION_PAUSE: Control.PAUSE,
    coordinator_pb2.CONTROL_ACTION_RESUME: Control.RESUME,
    coordinator_pb2.CONTROL_ACTION_CHECKPOINT: Control.CHECKPOINT,
    coordinator_pb2.CONTROL_ACTION_STOP: Control.STOP,
}


def registration_from_wire(request: coordinator_pb2.RegisterRequest) -> Registration:
    return Registration(
        incarnation=Incarnation(request.incarnation),
        role=wire.role_from_wire(request.role),
        address=request.address,
        numerics_class=request.numerics_class[:256],
        metrics_address=request.metrics_address[:256],
        protocol_version=request.protocol_version,
        run_id=request.run_id,
        memory_bytes=request.memory_bytes,
    )


def heartbeat_from_wire(request: coordinator_pb2.HeartbeatRequest, num_lanes: int, num_chunks: int) -> Heartbeat:
    """Raises `MalformedError`."""
    wire.check_counts("a heartbeat's version", request.version)
    if (told := max(len(request.caught_up), len(request.diverged))) > num_chunks:
        raise MalformedError(f"a heartbeat tells of copies of {told} chunks; the model has {num_chunks}")
    if len(request.steps) > STEPS_MAX:
        raise MalformedError(f"a heartbeat tells of {len(request.steps)} steps; at most {STEPS_MAX} fit")
    return Heartbeat(
        incarnation=Incarnation(request.incarnation),
        plan=wire.number_from_wire(request.plan),
        version=Version(request.version),
        steps=tuple(_summary_from_wire(each, num_lanes) for each in request.steps),
        activity=request.activity,
        caught_up={ChunkId(each.chunk): Incarnation(each.learner) for each in request.caught_up},
        lane_seconds=request.lane_seconds if math.isfinite(request.lane_seconds) else 0.0,
        diverged=frozenset(map(ChunkId, request.diverged)),
        is_leaving=request.leaving,
    )


def _summary_from_wire(summary: coordinator_pb2.StepSummary, num_lanes: int) -> StepSummary:
    return StepSummary(
        step=Step(summary.step),
        loss=summary.loss,
        grad_norm=summary.grad_norm,
        learning_rate=summary.learning_rate,
        tokens=summary.tokens,
        tally=wire.tally_from_wire(summary.tally, num_lanes),
        skipped=summary.skipped,
        requests=summary.requests,
        refused=summary.refused,
    )


def summary_to_wire(summary: StepSummary) -> coordinator_pb2.StepSummary:
    return coordinator_pb2.StepSummary(
        step=summary.step,
        loss=summary.loss,
        grad_norm=summary.grad_norm,
        learning_rate=summary.learning_rate,
        tokens=summary.tokens,
        skipped=summary.skipped,
        requests=summary.requests,
        tally=wire.tally_to_wire(summary.tally),
        refused=summary.refused,
    )


def validation_from_wire(request: coordinator_pb2.ReportValidationRequest) -> ValidationReport:
    """Raises `MalformedError`."""
    wire.check_counts("a validation", request.version, request.tokens)
    return ValidationReport(
        incarnation=Incarnation(request.incarnation),
        version=Version(request.version),
        index=request.index,
        loss_sum=request.loss_sum,
        tokens=request.tokens,
    )


def checkpoint_from_wire(request: coordinator_pb2.ReportCheckpointRequest, num_lanes: int, num_chunks: int) -> CheckpointReport:
    """Raises `MalformedError` for a chunk that the model does not have, and for a file that no shard writes."""
    wire.check_counts("a checkpoint's part", request.version, request.optimizer_step, request.num_bytes, *request.clocks)
    if len(request.clocks) not in (0, num_lanes):
        raise MalformedError(f"a checkpoint's part with {len(request.clocks)} clocks; the run has {num_lanes} lanes")
    if not request.error and not _PART.fullmatch(request.file):
        raise MalformedError(f"{request.file[:64]!r} is no part of a checkpoint")
    if beyond := [each.chunk for each in request.chunks if each.chunk >= num_chunks]:
        raise MalformedError(f"{request.file} claims chunk {beyond[0]}; the model has {num_chunks}")
    return CheckpointReport(
        incarnation=Incarnation(request.incarnation),
        version=Version(request.version),
        optimizer_step=request.optimizer_step,
        file=request.file,
        num_bytes=request.num_bytes,
        chunks={ChunkId(each.chunk): dict(each.checksums) for each in request.chunks},
        error=request.error[:1024],
        timeline=request.timeline,
        clocks=tuple(request.clocks),
    )


def control_from_wire(action: int) -> Control:
    """Raises `MalformedError`."""
    try:
        return _CONTROLS[action]
    except KeyError:
        raise MalformedError(
            f"control action {action} is unknown; expected 1 (pause), 2 (resume), 3 (checkpoint) or 4 (stop)"
        ) from None
