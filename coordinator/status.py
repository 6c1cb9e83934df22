"""Where the run stands, as `GetStatus` and the status page tell it."""

from __future__ import annotations

import time

from google.protobuf.json_format import MessageToJson

from coordinator.core.curve import POINTS_MAX
from coordinator.core.events import RunState
from coordinator.core.overview import clock_spread, holdings, under_replicated
from coordinator.core.run import Run
from coordinator.shell import Coordinator
from coordinator.translation import summary_to_wire
from shardlane import wire
from shardlane.pb import coordinator_pb2

UINT32_MAX = (1 << 32) - 1


def status_of(coordinator: Coordinator, points: int) -> coordinator_pb2.GetStatusResponse:
    """`points`: most of each curve; 0: without curves, events and checkpoints."""
    with coordinator.reading():
        run, history, train = coordinator.run, coordinator.history, coordinator.config.train
        goodput, goodput_tokens_per_second = history.goodput(run.version)
        response = coordinator_pb2.GetStatusResponse(
            run_id=run.run_id,
            run_name=run.config.run_name,
            state=state_to_wire(run),
            reason=run.failure,
            version=run.version,
            last_step=run.end_version,
            tokens_per_second=history.tokens_per_second,
            waiting_for=coordinator.waiting_for,
            newest_checkpoint=run.checkpoint.version,
            validation_loss=run.validations.newest[1] if run.validations.newest else 0.0,
            under_replicated_chunks=under_replicated(run),
            goodput=goodput,
            goodput_tokens_per_second=goodput_tokens_per_second,
            consistency=train.consistency,
            staleness=train.staleness,
            clock_spread_steps=min(clock_spread(run), UINT32_MAX),
            skipped_steps=run.steps.num_skipped,
            unix_seconds=time.time(),
        )
        if run.steps.newest is not None:
            response.newest.CopyFrom(summary_to_wire(run.steps.newest))
        _add_plan(response, run)
        _add_members(response, run, coordinator.now())
        if points > 0:
            _add_past(response, coordinator, min(points, POINTS_MAX))
    return response


def json_of(coordinator: Coordinator) -> bytes:
    """All of it, as `shardlane status --json` prints it."""
    return MessageToJson(status_of(coordinator, POINTS_MAX), always_print_fields_with_no_presence=True, indent=None).encode()


def _add_plan(response: coordinator_pb2.GetStatusResponse, run: Run) -> None:
    if run.plan is None:
        return
    response.plan.CopyFrom(wire.plan_to_wire(run.plan))
    response.plan.ClearField("chunks")
    for each in holdings(run.plan):
        response.chunks_by_shard.append(each.primary)
        response.holdings.add(primary=each.primary, backup=each.backup, learner=each.learner)


def _add_members(response: coordinator_pb2.GetStatusResponse, run: Run, now: float) -> None:
    for state in run.members.states:
        member = state.member
        response.members.add(
            member=coordinator_pb2.Member(
                incarnation=member.incarnation, role=wire.role_to_wire(member.role), address=member.address
            ),
            metrics_address=state.registration.metrics_address,
            lease_age_seconds=max(0.0, now - state.heard_seconds),
            version=state.version,
            activity=state.activity,
            plan=wire.number_to_wire(state.plan),
            leaving=state.is_leaving,
        )


def _add_past(response: coordinator_pb2.GetStatusResponse, coordinator: Coordinator, points: int) -> None:
    for event in coordinator.history.events:
        response.events.add(unix_seconds=event.unix_seconds, text=event.text, is_warning=event.is_warning)
    for version, unix_seconds in coordinator.history.checkpoints:
        response.checkpoints.add(version=version, unix_seconds=unix_seconds)
    for field, curve in ((response.losses, coordinator.losses), (response.validations, coordinator.validation_losses)):
        for step, loss in curve.points(points):
            field.add(step=step, loss=loss)


_STATES = {
    RunState.GATHERING: coordinator_pb2.RUN_STATE_GATHERING,
    RunState.TRAINING: coordinator_pb2.RUN_STATE_TRAINING,
    RunState.PAUSED: coordinator_pb2.RUN_STATE_PAUSED,
    RunState.FINISHING: coordinator_pb2.RUN_STATE_FINISHING,
    RunState.FINISHED: coordinator_pb2.RUN_STATE_FINISHED,
    RunState.FAILED: coordinator_pb2.RUN_STATE_FAILED,
}


def state_to_wire(run: Run) -> coordinator_pb2.RunState:
    return _STATES[run.state]
