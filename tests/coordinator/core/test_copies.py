"""Backups, learners, and lives with many deaths."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from coordinator.core.events import Announce, CheckpointMark, DropRows, ForgetMember, KeepMember, Note, RunState, TrainingRow
from coordinator.core.run import Run
from shardlane.ids import ChunkId, Incarnation, PlanNumber, Timeline, Version
from shardlane.plan import Placement
from tests.coordinator.cast import beat, fresh_run, incarnation, join, small_config, summary
from tests.coordinator.core.lives import fall_silent, plan_of, train_to, training


def learners_of(run: Run, primary: Incarnation) -> dict[ChunkId, Incarnation]:
    """All learners that `primary` fills under the present plan."""
    placements = () if run.plan is None else run.plan.placements
    return {
        ChunkId(chunk): each.learner
        for chunk, each in enumerate(placements)
        if each.primary == primary and each.learner is not None
    }


def test_a_lost_shard_with_a_backup_costs_no_step() -> None:
    run = training()
    assert all(len(each.in_sync) == 2 for each in plan_of(run).placements)
    timeline = plan_of(run).timeline
    train_to(run, 2)
    fall_silent(run, "shard 1", 5.0)
    assert run.state is RunState.TRAINING and run.version == 2
    survivor = incarnation("shard 2")
    assert plan_of(run).timeline == timeline and {each.holders for each in plan_of(run).placements} == {(survivor,)}


def test_a_newcomer_is_filled_and_then_listed_with_its_share_of_primaries() -> None:
    run = training()
    fall_silent(run, "shard 1", 5.0)
    join(run, "shard 3", now=6.0)
    survivor, newcomer = incarnation("shard 2"), incarnation("shard 3")
    assert {(each.in_sync, each.learner) for each in plan_of(run).placements} == {((survivor,), newcomer)}
    learners, number = learners_of(run, survivor), plan_of(run).number
    last = max(learners)
    some = {chunk: learner for chunk, learner in learners.items() if chunk != last}
    run.on_heartbeat(replace(beat(run, "shard 2"), caught_up=some), 6.1)
    run.on_heartbeat(replace(beat(run, "shard 3"), caught_up={last: newcomer}), 6.2)  # only a primary may say so
    run.on_heartbeat(replace(beat(run, "shard 2", plan=PlanNumber(1, 1)), caught_up=learners), 6.3)  # of an older plan
    assert plan_of(run).number == number, "a plan begins the open step anew: all copies are listed at once"
    run.on_heartbeat(replace(beat(run, "shard 2"), caught_up={last: newcomer}), 6.4)
    assert plan_of(run).number > number
    assert all(set(each.in_sync) == {survivor, newcomer} and each.learner is None for each in plan_of(run).placements)
    assert {each.primary for each in plan_of(run).placements} == {survivor, newcomer}


def test_a_copy_that_was_found_wrong_is_filled_again() -> None:
    run = training()
    placements = plan_of(run).placements
    chunk = next(ChunkId(index) for index, each in enumerate(placements) if each.primary == incarnation("shard 1"))
    wrong = incarnation("shard 2")
    run.on_heartbeat(replace(beat(run, "shard 2", plan=PlanNumber(1, 0)), diverged=frozenset({chunk})), 0.5)
    assert plan_of(run).number == PlanNumber(1, 1), "of an older plan"
    run.on_heartbeat(replace(beat(run, "shard 2"), diverged=frozenset({chunk})), 0.6)
    assert plan_of(run).placements[chunk] == Placement((incarnation("shard 1"),), wrong)
    others = [index for index in range(len(placements)) if index != chunk]
    assert all(plan_of(run).placements[index] == placements[index] for index in others)
    run.on_heartbeat(replace(beat(run, "shard 1"), caught_up={chunk: wrong}), 0.7)
    assert set(plan_of(run).placements[chunk].in_sync) == {incarnation("shard 1"), wrong}


def test_a_shard_and_its_only_backup_take_everybody_back() -> None:
    run = training()
    train_to(run, 3)
    for name in ("shard 1", "shard 2"):
        fall_silent(run, name, 5.0 if name == "shard 1" else 5.2)
    assert run.state is RunState.GATHERING
    for name in ("shard 3", "shard 4"):
        join(run, name, now=9.5)
    assert plan_of(run).timeline == Timeline(1, Version(0)) and run.version == 0


@pytest.mark.parametrize("seed", range(20))
def test_a_random_life_keeps_its_promises(seed: int) -> None:
    """Members come and go, steps are told out of order: every plan is greater, whole, and names nobody who is gone."""
    rng = random.Random(seed)
    copies = 1 + seed % 2
    config = small_config(
        cluster__replicas=2, cluster__replication=copies, train__max_steps=5000, validation__num_micro_batches=0
    )
    run = fresh_run(config)
    now, plans, rows, number, dead = 0.0, [PlanNumber(0, 0)], [], 0, set()
    num_rewinds = 0
    for _ in range(600):
        now += rng.random() * 0.3
        if run.members.states and rng.random() < 0.1:
            dead.add(rng.choice(run.members.states).registration.incarnation)
        effects = run.on_tick(now)
        for state in run.members.states:
            if state.registration.incarnation not in dead and rng.random() < 0.9:
                steps = [summary(step) for step in range(max(0, run.version - 2), run.version + rng.randrange(3))]
                name = state.registration.incarnation.replace("-0", " ").replace("-", " ")
                told = replace(
                    beat(run, name, *steps), caught_up=learners_of(run, incarnation(name)) if rng.random() < 0.3 else {}
                )
                effects += run.on_heartbeat(told, now)[1]
        if rng.random() < 0.2 and len(run.members.states) < 9:
            number += 1
            effects += join(run, f"{rng.choice(['shard', 'worker'])} {number}", now=now)
        if rng.random() < 0.05 and run.version > run.checkpoint.version:
            effects += run.on_checkpoint_committed(CheckpointMark(run.version, f"digest of {run.version}"))
        for effect in effects:
            match effect:
                case Announce(plan):
                    assert plan.number > plans[-1]
                    plans.append(plan.number)
                    alive = {state.registration.incarnation for state in run.members.states}
                    assert {member.incarnation for member in plan.members} <= alive
                    lanes = [lane for replica in plan.replicas for block in replica.blocks for lane in block.lanes]
                    assert lanes == [0, 1, 2, 3]
                    assert {shard for each in plan.placements for shard in each.holders} <= set(plan.shards)
                    assert all(len(set(each.holders)) == len(each.holders) <= copies + 1 for each in plan.placements)
                case TrainingRow(told):
                    rows.append(told.step)
                case DropRows(version):
                    rows = [step for step in rows if step < version]
                    num_rewinds += 1
                case Note() | KeepMember() | ForgetMember():
                    pass
                case _:
                    raise AssertionError(effect)
        assert rows == list(range(run.version))  # each step once, whatever was rolled back
    assert len(plans) > 3 and run.version > 3 and (num_rewinds or copies > 1)
