"""Members and their coordinator, joined over loopback gRPC; the coordinator comes, goes and comes back."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from coordinator.core.events import RunState
from coordinator.service import CoordinatorService
from shardlane.errors import UnreachableError, UserError
from shardlane.ids import PlanNumber, Version
from shardlane.member import Beat, Membership, fetch_run, new_incarnation
from shardlane.pb import coordinator_pb2
from shardlane.plan import Plan, Role
from shardlane.wire import tally_to_wire
from tests.coordinator.cast import CPU, num_chunks, part, small_config, tally, write_part, write_token_folder

COUNTED = tally_to_wire(tally())


def until(holds: Callable[[], object], seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it did not come to pass"
        time.sleep(0.02)


@dataclass
class Process:
    """What a shard or a worker does with its membership, and no more."""

    membership: Membership
    plans: list[Plan] = field(default_factory=list)
    replies: list[coordinator_pb2.HeartbeatResponse] = field(default_factory=list)
    steps: list[coordinator_pb2.StepSummary] = field(default_factory=list)

    def beat(self) -> Beat:
        return Beat(self.plans[-1].number if self.plans else None, Version(len(self.steps)), self.steps, "testing")

    def start(self) -> None:
        self.membership.register()
        self.membership.start(self.beat, self.plans.append, self.replies.append)


@contextmanager
def coordinator(run_dir: Path, bind: str = "127.0.0.1:0", **changes: Any) -> Iterator[CoordinatorService]:
    if not (run_dir / "data").exists():
        write_token_folder(run_dir / "data")
    service = CoordinatorService(small_config(**changes), run_dir=run_dir, bind=bind)
    service.start()
    try:
        yield service
    finally:
        service.stop()


@contextmanager
def members(address: str, *roles: Role) -> Iterator[list[Process]]:
    made = []
    for number, role in enumerate(roles):
        me = new_incarnation(role)
        made.append(
            Process(Membership(address, role=role, incarnation=me, address=f"{role}{number}.local:1", numerics_class=CPU))
        )
    try:
        for each in made:
            each.start()
        yield made
    finally:
        for each in made:
            each.membership.stop()


def report(process: Process, version: int, chunks: range, root: Path) -> coordinator_pb2.ReportCheckpointRequest:
    made = replace(part(small_config(), "shard 1", version, chunks), incarnation=process.membership.incarnation)
    made = replace(made, file=f"part-{made.incarnation}.safetensors")
    write_part(root, made)
    return coordinator_pb2.ReportCheckpointRequest(
        version=version,
        optimizer_step=version,
        file=made.file,
        num_bytes=made.num_bytes,
        chunks=[coordinator_pb2.ChunkChecksums(chunk=chunk, checksums=sums) for chunk, sums in made.chunks.items()],
    )


def test_a_whole_run(tmp_path: Path) -> None:
    with coordinator(tmp_path) as service, members(service.address, "shard", "shard", "worker", "worker") as (a, b, first, last):
        until(lambda: all(each.plans for each in (a, b, first, last)))
        assert len({each.plans[-1].digest for each in (a, b, first, last)}) == 1
        assert first.membership.plan == first.plans[-1]
        a.steps += [coordinator_pb2.StepSummary(step=step, tokens=32, tally=COUNTED) for step in range(4)]
        a.membership.beat_soon()
        until(lambda: a.replies and a.replies[-1].acknowledged_steps == 4)
        until(lambda: first.membership.state == coordinator_pb2.RUN_STATE_FINISHING)
        half, root = num_chunks(small_config()) // 2, tmp_path / "checkpoints"
        a.membership.report_checkpoint(report(a, 4, range(half), root))
        b.membership.report_checkpoint(report(b, 4, range(half, num_chunks(small_config())), root))
        for index in range(2):
            last.membership.report_validation(Version(4), index, 8.0, 4)
        assert all(each.membership.flush(10) for each in (a, b, last))
        assert service.wait_finished(10) is RunState.FINISHED
        assert service.wait_left(10)
        until(lambda: all(each.membership.state == coordinator_pb2.RUN_STATE_FINISHED for each in (a, b, first, last)))


def test_fetch_run(tmp_path: Path) -> None:
    with coordinator(tmp_path) as service:
        run = fetch_run(service.address)
        assert (run.run_id, run.checkpoint_path) == (service.run_id, str(tmp_path / "checkpoints"))
        assert run.config == service.coordinator.config
        assert run.data_digest == service.coordinator.dataset.digest
        with pytest.raises(UserError, match="the sender means run 'another'"):
            fetch_run(service.address, run_id="another")


def test_fetch_run_waits_for_a_coordinator_that_is_not_there_yet_and_gives_up(tmp_path: Path) -> None:
    with coordinator(tmp_path) as service:
        address = service.address
    with pytest.raises(UnreachableError, match=r"gave up after 0.3 s"):
        fetch_run(address, patience_seconds=0.3)
    found: list[str] = []
    asking = threading.Thread(target=lambda: found.append(fetch_run(address, patience_seconds=30).run_id))
    asking.start()
    time.sleep(0.3)
    with coordinator(tmp_path, bind=address) as service:
        asking.join(20)
        assert found == [service.run_id]


def test_registration_waits_for_a_coordinator_that_is_just_starting_again(tmp_path: Path) -> None:
    with coordinator(tmp_path) as service:
        address = service.address
    member = Membership(address, role="shard", incarnation=new_incarnation("shard"), address="127.0.0.1:1", numerics_class=CPU)
    with pytest.raises(UnreachableError):
        member.register(patience_seconds=0.1)
    joining = threading.Thread(target=member.register)
    joining.start()
    time.sleep(0.3)
    with coordinator(tmp_path, bind=address) as service:
        joining.join(20)
        assert service.coordinator.members == [member.incarnation]
        member.stop()


def test_a_refusal_at_registration_is_one_line(tmp_path: Path) -> None:
    with coordinator(tmp_path) as service:
        member = Membership(
            service.address, role="shard", incarnation=new_incarnation("shard"), address="a:1", numerics_class=CPU, run_id="else"
        )
        with pytest.raises(UserError, match="run 'else'") as caught:
            member.register()
        assert "\n" not in str(caught.value)
        member.stop()


def test_members_work_on_without_the_coordinator_and_tell_it_when_it_is_back(tmp_path: Path) -> None:
    with coordinator(tmp_path) as service:
        address = service.address
        stack = members(address, "shard", "shard", "worker", "worker")
        a, b, _, last = stack.__enter__()
        until(lambda: all(each.plans for each in (a, b, last)))
        plan = a.plans[-1]
    try:
        a.steps += [coordinator_pb2.StepSummary(step=step, tokens=32, tally=COUNTED) for step in range(4)]
        last.membership.report_validation(Version(4), 0, 8.0, 4)
        assert not last.membership.flush(0.2)
        with coordinator(tmp_path, bind=address) as service:
            last.membership.report_validation(Version(4), 1, 8.0, 4)
            assert last.membership.flush(10)
            until(lambda: a.replies[-1].acknowledged_steps == 4)
            assert service.coordinator.run.validations.newest == (4, 2.0)
            assert a.membership.plan == plan and service.coordinator.plan == plan
    finally:
        stack.__exit__(None, None, None)


def test_who_was_forgotten_registers_again(tmp_path: Path) -> None:
    with coordinator(tmp_path) as service, members(service.address, "worker") as (worker,):
        run = service.coordinator.run
        until(lambda: worker.replies)
        with service.coordinator.reading():
            run.members.states[0].lease_end_seconds = 0.0
            run.members.expire(time.monotonic())
            assert not run.members.states
        until(lambda: run.members.states)
        assert worker.membership.state == coordinator_pb2.RUN_STATE_GATHERING


def test_who_has_no_way_back_is_told_that_the_run_has_failed_for_it(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    with coordinator(tmp_path / "a") as service, members(service.address, "worker") as (worker,):
        address = service.address
        worker.membership._registration.run_id = service.run_id
        until(lambda: worker.replies)
        service.stop()
        with coordinator(tmp_path / "b", bind=address):
            until(lambda: worker.membership.state == coordinator_pb2.RUN_STATE_FAILED)
            assert "this coordinator runs" in worker.membership.reason


def test_a_peers_plan_is_adopted_only_if_it_is_greater(tmp_path: Path) -> None:
    with coordinator(tmp_path) as service, members(service.address, "shard", "shard", "worker", "worker") as (a, *_):
        until(lambda: a.plans)
        plan = a.plans[-1]
        newer = replace(plan, number=PlanNumber(plan.number.term, plan.number.epoch + 1))
        a.membership.offer(newer)
        a.membership.offer(plan)
        a.membership.offer(replace(newer, reason="another of the same number"))
        until(lambda: a.plans[-1] == newer)
        assert a.membership.plan is newer and a.plans == [plan, newer]


def test_a_fault_in_the_service_costs_it_neither_lease_nor_later_plans(tmp_path: Path) -> None:
    with coordinator(tmp_path) as service, members(service.address, "shard", "shard", "worker") as others:
        me = Membership(service.address, role="worker", incarnation=new_incarnation("worker"), address="w:1", numerics_class=CPU)
        plans: list[Plan] = []
        beats: list[int] = []

        def beat() -> Beat:
            beats.append(1)
            if len(beats) % 2:
                raise ValueError("a bug")
            return Beat(None, Version(0))

        def adopt(plan: Plan) -> None:
            plans.append(plan)
            raise ValueError("another bug")

        me.register()
        me.start(beat, adopt, lambda reply: None)
        until(lambda: len(plans) == 1 and others[0].plans)
        me.offer(replace(plans[0], number=PlanNumber(plans[0].number.term, 9)))
        until(lambda: len(plans) == 2)
        until(lambda: len(beats) > 4 and me.state == coordinator_pb2.RUN_STATE_TRAINING)
        me.stop()


def test_reports_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shardlane.member.REPORTS_MAX", 3)
    me = Membership("127.0.0.1:1", role="worker", incarnation=new_incarnation("worker"), address="w:1", numerics_class=CPU)
    for index in range(5):
        me.report_validation(Version(1), index, 1.0, 1)
    assert [request.index for _, request in me._reports] == [2, 3, 4]
    me.stop()
