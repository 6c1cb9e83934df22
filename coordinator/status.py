"""Where the run stands, as `GetStatus` tells it."""

from __future__ import annotations

from coordinator.core.events import RunState
from coordinator.core.placement import num_primary
from coordinator.core.run import Run
from coordinator.translation import summary_to_wire
from shardlane import wire
from shardlane.pb import coordinator_pb2


def status_of(run: Run, now: float, waiting_for: str) -> coordinator_pb2.GetStatusResponse:
    """`run` must stand still meanwhile."""
    response = coordinator_pb2.GetStatusResponse(
        run_id=run.run_id,
        run_name=run.config.run_name,
        state=state_to_wire(run),
        reason=run.failure,
        version=run.version,
        last_step=run.end_version,
        tokens_per_second=run.steps.tokens_per_second,
        waiting_for=waiting_for,
        newest_checkpoint=run.checkpoint.version,
        validation_loss=run.validations.newest[1] if run.validations.newest else 0.0,
    )
    if run.steps.newest is not None:
        response.newest.CopyFrom(summary_to_wire(run.steps.newest))
    if run.plan is not None:
        response.plan.CopyFrom(wire.plan_to_wire(run.plan))
        response.plan.ClearField("chunks")
        response.chunks_by_shard.extend(num_primary(run.plan.placements, run.plan.shards))
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
        )
    return response


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
