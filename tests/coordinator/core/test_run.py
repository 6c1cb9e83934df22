"""The life of a run, told as stories."""

from __future__ import annotations

from coordinator.core.beginning import Saved
from coordinator.core.events import (
    Announce,
    CheckpointFailed,
    CheckpointMark,
    CommitCheckpoint,
    Control,
    DropRows,
    ForgetMember,
    KeepMember,
    RunState,
    TrainingRow,
    ValidationRow,
)
from coordinator.core.run import Run
from shardlane.ids import PlanNumber, Timeline, Version
from shardlane.plan import REQUEST_CHECKPOINT, REQUEST_STOP
from tests.coordinator.cast import (
    CPU,
    RUN,
    beat,
    deeds,
    fresh_run,
    incarnation,
    join,
    num_chunks,
    part,
    registration,
    small_config,
    summary,
    validation,
)
from tests.coordinator.core.lives import EVERYBODY, fall_silent, plan_of, train_to, training


def checkpoint(run: Run, version: int, shards: tuple[str, str] = ("shard 1", "shard 2")) -> None:
    """Both shards' parts are durable, and the manifest is written."""
    half = num_chunks(run.config) // 2
    assert run.on_checkpoint_part(part(run.config, shards[0], version, range(half), timeline=run.timeline.id)) == (None, [])
    _, effects = run.on_checkpoint_part(
        part(run.config, shards[1], version, range(half, num_chunks(run.config)), timeline=run.timeline.id)
    )
    (commit,) = effects
    assert isinstance(commit, CommitCheckpoint) and commit.version == version
    run.on_checkpoint_committed(CheckpointMark(Version(version), f"digest of {version}"))


def test_gathers_until_everybody_is_here() -> None:
    run = fresh_run(small_config())
    run.on_start(0.0)
    assert (run.state, run.waiting_for) == (
        RunState.GATHERING,
        "2 more shards (0 of 2 are here) and 2 more workers (0 of 2 are here)",
    )
    effects = join(run, "shard 1", "worker 1", "worker 2")
    assert deeds(effects) == [KeepMember(registration(name)) for name in ("shard 1", "worker 1", "worker 2")]
    assert run.waiting_for == "1 more shard (1 of 2 are here)"
    *_, announce = deeds(join(run, "shard 2"))
    assert announce == Announce(plan_of(run))
    plan = plan_of(run)
    assert (plan.number, plan.run_id, plan.timeline) == (PlanNumber(1, 1), RUN, Timeline(0, Version(0)))
    assert [replica.workers for replica in plan.replicas] == [(incarnation("worker 1"), incarnation("worker 2"))]
    assert len(plan.placements) == num_chunks(run.config)
    assert {placement.primary for placement in plan.placements} == {incarnation("shard 1"), incarnation("shard 2")}
    assert run.state is RunState.TRAINING


def test_more_workers_than_seats_are_spares() -> None:
    run = training()
    assert deeds(join(run, "worker 3")) == [KeepMember(registration("worker 3"))]  # it changes no plan


def test_steps_are_told_by_every_shard_and_counted_once_in_order() -> None:
    run = training()
    assert run.on_heartbeat(beat(run, "shard 1", summary(0), summary(1)), 2.0) == (
        None,
        [TrainingRow(summary(0), 32.0), TrainingRow(summary(1), 32.0)],  # 64 tokens since the plan, 2 s ago
    )
    assert run.on_heartbeat(beat(run, "shard 2", summary(0), summary(1)), 2.5) == (None, [])
    assert run.on_heartbeat(beat(run, "shard 2", summary(3)), 3.0) == (None, [])  # step 2 is not told yet
    assert run.on_heartbeat(beat(run, "shard 2", summary(2), summary(3)), 4.0)[1] == [
        TrainingRow(summary(2), 32.0),
        TrainingRow(summary(3), 32.0),
    ]
    assert run.version == 4 and run.state is RunState.FINISHING


def test_a_worker_or_a_shard_of_an_older_plan_tells_nothing_of_steps() -> None:
    run = training()
    assert run.on_heartbeat(beat(run, "worker 1", summary(0)), 1.0) == (None, [])
    assert run.on_heartbeat(beat(run, "shard 1", summary(0), plan=PlanNumber(0, 9)), 1.0) == (None, [])
    assert run.version == 0


def test_finishes_with_the_last_checkpoint_and_its_validation() -> None:
    run = training()
    train_to(run, 4)
    assert run.on_validation(validation("worker 2", 4, 1, 6.0)) == (None, [])
    assert run.on_validation(validation("worker 2", 4, 1, 7.0)) == (None, [])  # told again: it counted
    assert deeds(run.on_validation(validation("worker 2", 4, 0, 10.0))[1]) == [ValidationRow(Version(4), 1.0)]
    assert run.state is RunState.FINISHING
    checkpoint(run, 4)
    assert run.state is RunState.FINISHED and run.saved.finished
    assert not run.everybody_knows
    for name in EVERYBODY:
        run.on_heartbeat(beat(run, name), 2.0)
    assert run.everybody_knows
    assert fall_silent(run, "worker 1", 3.0) == [ForgetMember(incarnation("worker 1"), "silent")]  # it left: nothing to repair
    assert run.state is RunState.FINISHED and run.everybody_knows


def test_a_stop_step_needs_no_validation() -> None:
    run = training(train__stop_at_step=2)
    train_to(run, 2)
    checkpoint(run, 2)
    assert run.state is RunState.FINISHED


def test_a_spare_takes_the_dead_workers_seat_at_once() -> None:
    run = training()
    join(run, "worker 3")
    forget, announce = fall_silent(run, "worker 1", 5.0)
    assert forget == ForgetMember(incarnation("worker 1"), "silent") and announce == Announce(plan_of(run))
    plan = plan_of(run)
    assert plan.number == PlanNumber(1, 2) and plan.timeline.id == 0
    assert plan.replicas[0].workers == (incarnation("worker 3"), incarnation("worker 2"))
    assert run.state is RunState.TRAINING


def test_survivors_take_the_lanes_and_give_them_back() -> None:
    run = fresh_run(small_config(cluster__replicas=2))
    join(run, *EVERYBODY, "worker 3", "worker 4")
    before = plan_of(run)
    assert [[str(block) for block in replica.blocks] for replica in before.replicas] == [["0..1"], ["2..3"]]
    fall_silent(run, "worker 3", 5.0)
    alone = plan_of(run)
    assert [[str(block) for block in replica.blocks] for replica in alone.replicas] == [["0..3"]]
    assert run.state is RunState.TRAINING and alone.placements == before.placements
    assert alone.names(incarnation("worker 4"))  # a spare now
    join(run, "worker 5", now=6.0)
    assert [replica.workers for replica in plan_of(run).replicas] == [
        (incarnation("worker 1"), incarnation("worker 2")),
        (incarnation("worker 4"), incarnation("worker 5")),
    ]


def test_begins_with_its_replicas_and_has_more_once_more_workers_come() -> None:
    run = fresh_run(small_config(cluster__replicas=2, cluster__replicas_max=3))
    join(run, *EVERYBODY)
    assert run.waiting_for == "2 more workers (2 of 4 are here)"
    join(run, "worker 3", "worker 4")
    assert [len(each.workers) for each in plan_of(run).replicas] == [2, 2]
    join(run, "worker 5")
    assert plan_of(run).number == PlanNumber(1, 1)
    join(run, "worker 6", now=1.0)
    assert plan_of(run).reason == "there are workers for 3 replicas"
    assert [each.workers for each in plan_of(run).replicas][2] == (incarnation("worker 5"), incarnation("worker 6"))
    assert sum(block.size for each in plan_of(run).replicas for block in each.blocks) == run.config.train.lanes
    join(run, "worker 7", "worker 8", now=2.0)
    assert len(plan_of(run).replicas) == 3
    fall_silent(run, "worker 6", 9.0)
    fall_silent(run, "worker 7", 9.0)
    fall_silent(run, "worker 8", 9.0)
    assert len(plan_of(run).replicas) == 2


def test_there_are_never_more_replicas_than_lanes() -> None:
    lanes = small_config().train.lanes
    assert small_config(cluster__replicas_max=1024).num_replicas_max == lanes
    assert small_config(cluster__replicas=2).num_replicas_max == 2
    run = fresh_run(small_config(cluster__stages=1, cluster__replicas_max=1024))
    join(run, *EVERYBODY, *(f"worker {index}" for index in range(3, lanes + 3)))
    assert [sum(block.size for block in each.blocks) for each in plan_of(run).replicas] == [1] * lanes


def test_with_fewer_workers_than_stages_the_survivors_take_more_layers_until_others_come() -> None:
    run = training()
    fall_silent(run, "worker 1", 5.0)
    assert run.state is RunState.TRAINING
    assert [(each.first, each.end) for each in plan_of(run).stages] == [(0, 2)]
    assert [each.workers for each in plan_of(run).replicas] == [(incarnation("worker 2"),)]
    join(run, "worker 3", now=6.0)
    assert [(each.first, each.end) for each in plan_of(run).stages] == [(0, 1), (1, 2)]
    assert [each.workers for each in plan_of(run).replicas] == [(incarnation("worker 2"), incarnation("worker 3"))]


def test_without_memory_for_more_layers_it_waits_and_says_for_what() -> None:
    run = fresh_run(small_config())
    join(run, "shard 1", "shard 2")
    for name in ("worker 1", "worker 2"):
        run.on_register(registration(name, memory_bytes=1 << 10), 0.0)
    before = plan_of(run)
    assert fall_silent(run, "worker 1", 5.0) == [ForgetMember(incarnation("worker 1"), "silent")]
    assert (run.state, run.plan) == (RunState.GATHERING, before)
    assert run.waiting_for == "1 more worker (1 of 2 are here); 1 stages take 0.0 GiB each, and a worker has 0.0 GiB"
    join(run, "worker 3", now=6.0)
    assert run.state is RunState.TRAINING and plan_of(run).number == PlanNumber(1, 2)


def test_without_any_worker_it_waits() -> None:
    run = training()
    for name in ("worker 1", "worker 2"):
        fall_silent(run, name, 5.0)
    assert (run.state, run.waiting_for) == (RunState.GATHERING, "2 more workers (0 of 2 are here)")


def test_a_member_suspected_by_mistake_comes_back_to_its_own_place() -> None:
    run = training(cluster__replication=1)
    before = plan_of(run)
    fall_silent(run, "shard 1", 5.0)
    assert run.state is RunState.GATHERING
    assert deeds(join(run, "shard 1", now=5.1)) == [KeepMember(registration("shard 1"))]
    assert run.state is RunState.TRAINING and run.plan is before


def test_a_lost_shard_takes_everybody_back_to_the_newest_checkpoint() -> None:
    run = training(validation__every_steps=1, cluster__replication=1)
    train_to(run, 2)
    checkpoint(run, 2)
    train_to(run, 3)
    for index in (0, 1):
        run.on_validation(validation("worker 2", 3, index))
    run.on_checkpoint_part(part(run.config, "shard 1", 4, [0]))
    fall_silent(run, "shard 2", 5.0)
    assert (run.state, run.waiting_for, run.version) == (RunState.GATHERING, "1 more shard (1 of 2 are here)", 3)
    effects = deeds(join(run, "shard 3", now=6.0))
    assert effects == [KeepMember(registration("shard 3")), DropRows(Version(2)), Announce(plan_of(run))]
    plan = plan_of(run)
    assert plan.timeline == Timeline(1, Version(2), "digest of 2") and plan.number == PlanNumber(1, 2)
    assert plan.shards == (incarnation("shard 1"), incarnation("shard 3"))
    assert (run.version, run.validations.newest) == (2, None)
    assert run.on_heartbeat(beat(run, "shard 1", summary(2), plan=PlanNumber(1, 1)), 6.5) == (None, [])  # of the old timeline
    train_to(run, 4, now=7.0)
    checkpoint(run, 4, ("shard 1", "shard 3"))  # of the part that the old timeline left nothing counts


def test_a_roll_back_without_a_checkpoint_begins_again() -> None:
    run = training(cluster__replication=1)
    train_to(run, 3)
    join(run, "shard 3")
    fall_silent(run, "shard 1", 5.0)
    assert plan_of(run).timeline == Timeline(1, Version(0)) and run.version == 0


def test_a_requested_checkpoint_is_asked_for_until_a_step_has_taken_it() -> None:
    run = training()
    run.on_control(Control.CHECKPOINT)
    assert run.requests == REQUEST_CHECKPOINT
    run.on_heartbeat(beat(run, "shard 1", summary(0)), 1.0)
    assert run.requests == REQUEST_CHECKPOINT
    run.on_heartbeat(beat(run, "shard 1", summary(1, requests=REQUEST_CHECKPOINT)), 2.0)
    assert run.requests == 0
    run.on_control(Control.CHECKPOINT)
    run.on_checkpoint_part(part(run.config, "shard 1", 3, [0]))  # one that was due anyway
    assert run.requests == 0


def test_a_stop_ends_the_run_at_the_version_that_took_it() -> None:
    run = training()
    run.on_control(Control.PAUSE)
    assert run.state is RunState.PAUSED
    run.on_control(Control.STOP)
    assert run.state is RunState.TRAINING and run.requests == REQUEST_STOP  # a stop needs a step
    run.on_heartbeat(beat(run, "shard 1", summary(0), summary(1, requests=REQUEST_STOP)), 1.0)
    assert (run.requests, run.end_version, run.state) == (0, 2, RunState.FINISHING)
    checkpoint(run, 2)
    assert run.state is RunState.FINISHED
    assert run.on_control(Control.PAUSE) == []


def test_a_stop_that_a_roll_back_undid_is_asked_for_again() -> None:
    run = training(cluster__replication=1)
    run.on_control(Control.STOP)
    run.on_heartbeat(beat(run, "shard 1", summary(0, requests=REQUEST_STOP)), 1.0)
    fall_silent(run, "shard 1", 5.0)
    join(run, "shard 3", now=6.0)
    assert (run.version, run.end_version, run.requests) == (0, 4, REQUEST_STOP)


def test_pause_and_resume() -> None:
    run = training()
    run.on_control(Control.PAUSE)
    assert run.state is RunState.PAUSED and run.saved == Saved(paused=True)
    run.on_control(Control.RESUME)
    assert run.state is RunState.TRAINING


def test_a_part_that_could_not_be_written_costs_the_checkpoint_but_not_the_run() -> None:
    run = training()
    run.on_checkpoint_part(part(run.config, "shard 1", 2, [0]))
    failed = part(run.config, "shard 2", 2, [], error="no space left")
    assert run.on_checkpoint_part(failed)[1] == [CheckpointFailed(Version(2), "shard-02: no space left")]
    assert run.state is RunState.TRAINING
    train_to(run, 4)
    assert run.on_checkpoint_failed(Version(4), "no space left")
    assert run.state is RunState.FAILED and "no space left" in run.failure and "version 4" in run.failure


def test_parts_may_be_told_again_and_overlap() -> None:
    run = training()
    train_to(run, 2)
    everything = range(num_chunks(run.config))
    assert run.on_checkpoint_part(part(run.config, "shard 1", 2, everything[:-1])) == (None, [])
    assert run.on_checkpoint_part(part(run.config, "shard 1", 2, everything[:-1])) == (None, [])
    _, (commit,) = run.on_checkpoint_part(part(run.config, "shard 2", 2, everything[1:]))
    assert isinstance(commit, CommitCheckpoint)
    assert [each.incarnation for each in commit.parts] == [incarnation("shard 1"), incarnation("shard 2")]
    assert (commit.numerics_class, commit.optimizer_step, commit.timeline) == (CPU, 2, 0)
    assert run.on_checkpoint_part(part(run.config, "shard 2", 2, everything[1:])) == (None, [])
    run.on_checkpoint_committed(CheckpointMark(Version(2), "d"))
    assert run.on_checkpoint_part(part(run.config, "shard 2", 2, everything[1:])) == (None, [])


def test_a_checkpoint_waits_for_the_steps_that_lead_to_it() -> None:
    """Were everything lost now, a run that is resumed from it would not know them."""
    run = training()
    train_to(run, 1)
    everything = range(num_chunks(run.config))
    assert run.on_checkpoint_part(part(run.config, "shard 1", 2, everything)) == (None, [])
    _, effects = run.on_heartbeat(beat(run, "shard 2", summary(1)), 2.0)
    assert [type(effect) for effect in effects] == [TrainingRow, CommitCheckpoint]


def test_reports_of_strangers_and_of_what_is_not_validated_are_refused() -> None:
    run = training()
    for report in (validation("worker 9", 4, 0), validation("worker 2", 3, 0), validation("worker 2", 4, 2)):
        refusal, effects = run.on_validation(report)
        assert refusal is not None and effects == []
    refusal, effects = run.on_checkpoint_part(part(run.config, "shard 9", 2, [0]))
    assert refusal is not None and effects == []


def test_a_run_that_is_done_already_is_finished_at_once() -> None:
    run = fresh_run(
        small_config(),
        version=Version(4),
        checkpoint=CheckpointMark(Version(4), "d"),
        timeline=Timeline(1, Version(4), "d"),
        validations={Version(4): 1.0},
    )
    assert deeds(run.on_start(0.0)) == [] and run.state is RunState.FINISHED
    assert deeds(join(run, *EVERYBODY)) == [KeepMember(registration(name)) for name in EVERYBODY]  # they hear it and leave


def test_a_run_whose_last_validation_is_missing_gathers_for_it() -> None:
    mark = CheckpointMark(Version(4), "d")
    run = fresh_run(small_config(), version=Version(4), checkpoint=mark, timeline=Timeline(1, Version(4), "d"))
    run.on_start(0.0)
    join(run, *EVERYBODY)
    assert run.state is RunState.FINISHING
    for index in (0, 1):
        run.on_validation(validation("worker 2", 4, index))
    assert run.state is RunState.FINISHED


def test_a_restarted_coordinator_goes_on_with_the_plan_and_its_members() -> None:
    old = training()
    train_to(old, 2)
    old.on_control(Control.PAUSE)
    run = fresh_run(
        small_config(),
        term=2,
        plan=old.plan,
        version=old.version,
        registrations=tuple(registration(name) for name in EVERYBODY),
        saved=old.saved,
    )
    assert deeds(run.on_start(100.0)) == []
    assert (run.state, run.plan, run.version) == (RunState.PAUSED, old.plan, 2)
    run.on_control(Control.RESUME)
    run.on_heartbeat(beat(run, "shard 1", summary(2)), 100.5)
    assert run.version == 3
    fall_silent(run, "worker 1", 103.0)
    join(run, "worker 3", now=104.0)
    assert plan_of(run).number == PlanNumber(2, 3)  # greater than all of the older term
