"""The service over loopback gRPC, with members that are no more than their messages."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from coordinator.core.events import RunState
from coordinator.service import SERVICE, CoordinatorService
from coordinator.store import FencedError
from shardlane import rpc, wire
from shardlane.config import Config, load
from shardlane.errors import CheckpointError, UserError
from shardlane.ids import PROTOCOL_VERSION
from shardlane.manifest import checkpoint_folder, newest_complete, read_manifest
from shardlane.metrics import Metrics
from shardlane.pb import coordinator_pb2, tensor_pb2
from shardlane.plan import Plan
from tests.coordinator.cast import (
    CPU,
    incarnation,
    num_chunks,
    part,
    registration,
    small_config,
    tally,
    write_part,
    write_token_folder,
)

NAMES = ("shard 1", "shard 2", "worker 1", "worker 2")
LEISURE: dict[str, Any] = {"cluster__lease_seconds": 60.0}  # nobody in these tests sends heartbeats by itself


class Cluster:
    """A coordinator, and members by name that say what they are told to say."""

    def __init__(self, config: Config, run_dir: Path, **options: Any) -> None:
        self.config, self.run_dir = config, run_dir
        self.service = CoordinatorService(config, run_dir=run_dir, **options)
        self.service.start()
        self.channel = rpc.connect(self.service.address)
        self.client = rpc.Client(self.channel, SERVICE)

    def stop(self) -> None:
        self.channel.close()
        self.service.stop()

    def call(self, method: str, **fields: Any) -> Any:
        (request,) = (each.input_type.name for each in SERVICE.methods if each.name == method)
        return getattr(self.client, method)(getattr(coordinator_pb2, request)(**fields), timeout=10)

    def register(self, *names: str, **changes: Any) -> None:
        for name in names:
            each = registration(name, **changes)
            self.call(
                "Register",
                protocol_version=each.protocol_version,
                role=wire.role_to_wire(each.role),
                incarnation=each.incarnation,
                address=each.address,
                numerics_class=each.numerics_class,
                run_id=each.run_id,
            )

    def plan(self) -> Plan:
        stream = self.client.WatchPlans(coordinator_pb2.WatchPlansRequest(incarnation="worker-01"), timeout=10)
        plan = wire.plan_from_wire(next(stream).plan)
        stream.cancel()
        return plan

    def beat(self, name: str, *steps: int, requests: int = 0) -> coordinator_pb2.HeartbeatResponse:
        plan = self.service.coordinator.plan
        counted = wire.tally_to_wire(tally(self.config))
        summaries = [
            coordinator_pb2.StepSummary(step=step, loss=3.0, tokens=32, requests=requests, tally=counted) for step in steps
        ]
        number = wire.number_to_wire(plan.number) if plan else tensor_pb2.PlanNumber()
        answer: coordinator_pb2.HeartbeatResponse = self.call(
            "Heartbeat", incarnation=incarnation(name), plan=number, steps=summaries, version=max(steps, default=0)
        )
        return answer

    def report_part(self, name: str, version: int, chunks: range, error: str = "") -> None:
        each = part(self.config, name, version, chunks, error)
        if not error:
            write_part(self.service.coordinator.root, each)
        self.call(
            "ReportCheckpoint",
            incarnation=each.incarnation,
            version=version,
            optimizer_step=version,
            file=each.file,
            num_bytes=each.num_bytes,
            chunks=[coordinator_pb2.ChunkChecksums(chunk=chunk, checksums=sums) for chunk, sums in each.chunks.items()],
            error=error,
        )

    def checkpoint(self, version: int) -> None:
        half = num_chunks(self.config) // 2
        self.report_part("shard 1", version, range(half))
        self.report_part("shard 2", version, range(half, num_chunks(self.config)))
        until(lambda: self.status().newest_checkpoint == version)

    def validate(self, version: int, *indices: int) -> None:
        for index in indices:
            self.call("ReportValidation", incarnation="worker-02", version=version, index=index, loss_sum=8.0, tokens=4)

    def status(self) -> coordinator_pb2.GetStatusResponse:
        answer: coordinator_pb2.GetStatusResponse = self.call("GetStatus")
        return answer

    def rows(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.run_dir / "metrics.jsonl").read_text().splitlines()]


def until(holds: Callable[[], bool], seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it did not come to pass"
        time.sleep(0.02)


@contextmanager
def cluster(run_dir: Path, *, options: dict[str, Any] | None = None, **changes: Any) -> Iterator[Cluster]:
    if not (run_dir / "data").exists():
        write_token_folder(run_dir / "data")
    made = Cluster(small_config(**{**LEISURE, **changes}), run_dir, **(options or {}))
    try:
        yield made
    finally:
        made.stop()


def test_a_run_from_gathering_to_its_end(tmp_path: Path) -> None:
    with cluster(tmp_path) as c:
        run = c.call("GetRun", protocol_version=PROTOCOL_VERSION)
        assert run.checkpoint_path == str(tmp_path / "checkpoints")
        assert json.loads(run.config)["data"]["path"] == str(tmp_path / "data")
        assert c.status().waiting_for.startswith("2 more shards")
        c.register(*NAMES)
        plan = c.plan()
        assert plan.run_id == run.run_id and len(plan.members) == 4
        assert c.beat("shard 1", 0, 1).acknowledged_steps == 2
        assert c.beat("shard 2", 0, 1, 2, 3).acknowledged_steps == 4
        status = c.status()
        assert (status.state, status.version, status.newest.step) == (coordinator_pb2.RUN_STATE_FINISHING, 4, 3)
        assert sum(status.chunks_by_shard) == num_chunks(c.config) and not status.plan.chunks
        assert [member.lease_age_seconds < 60 for member in status.members] == [True] * 4
        c.validate(4, 0, 1)
        c.checkpoint(4)
        assert c.service.wait_finished(5) is RunState.FINISHED
        for name in NAMES:
            assert c.beat(name).state == coordinator_pb2.RUN_STATE_FINISHED
        assert c.service.wait_left(5)
        assert [row["step"] for row in c.rows() if "loss" in row] == [0, 1, 2, 3]
        assert c.rows()[-1] == {"step": 4, "val_loss": 2.0}
        assert load(tmp_path / "config.resolved.toml") == c.config
        folder = newest_complete(tmp_path / "checkpoints")
        assert folder is not None
        manifest = read_manifest(folder)
        assert (manifest.run_id, manifest.version, manifest.numerics_class) == (run.run_id, 4, CPU)
        assert manifest.data_hash == run.data_digest


def test_the_log_tells_how_training_goes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "shardlane.coordinator")
    with cluster(tmp_path, validation__every_steps=2, log__every_steps=3, train__max_steps=8) as c:
        c.register(*NAMES)
        c.beat("shard 1", *range(8))
        c.validate(2, 0, 1)
    lines = [vars(record)["msg"] for record in caplog.records]
    assert [line["step"] for line in lines if line["event"] == "trained"] == [0, 3, 6]
    (validated,) = [line for line in lines if line["event"] == "validated"]
    assert (validated["step"], validated["val_loss"]) == (2, 2.0)


def test_refusals_have_their_status_and_reason(tmp_path: Path) -> None:
    with cluster(tmp_path, numerics__determinism="strict") as c:
        c.register("worker 1")
        cases: list[tuple[grpc.StatusCode, str, Callable[[], object]]] = [
            (grpc.StatusCode.FAILED_PRECONDITION, "protocol version 99", lambda: c.register("worker 2", protocol_version=99)),
            (grpc.StatusCode.FAILED_PRECONDITION, "run 'else'", lambda: c.register("worker 2", run_id="else")),
            (grpc.StatusCode.FAILED_PRECONDITION, "numerics class", lambda: c.register("worker 2", numerics_class="gpu")),
            (grpc.StatusCode.FAILED_PRECONDITION, "protocol version 0", lambda: c.call("GetRun")),
            (grpc.StatusCode.INVALID_ARGUMENT, "role 0", lambda: c.call("Register", protocol_version=PROTOCOL_VERSION)),
            (grpc.StatusCode.INVALID_ARGUMENT, "control action 0", lambda: c.call("Control")),
            (grpc.StatusCode.INVALID_ARGUMENT, "at most 512", lambda: c.beat("worker 1", *range(513))),
            (grpc.StatusCode.NOT_FOUND, "register again", lambda: c.beat("worker 9")),
            (grpc.StatusCode.NOT_FOUND, "register again", lambda: c.validate(4, 0)),
            (grpc.StatusCode.NOT_FOUND, "\N{CRAB}", lambda: c.call("Heartbeat", incarnation="\N{CRAB}" * 1024)),
            (grpc.StatusCode.INVALID_ARGUMENT, "beyond any count", lambda: c.call("Heartbeat", version=2**63)),
            (grpc.StatusCode.INVALID_ARGUMENT, "copies of 5000 chunks", lambda: c.call("Heartbeat", diverged=range(5000))),
            (grpc.StatusCode.INVALID_ARGUMENT, "beyond any count", lambda: c.call("ReportValidation", version=2**63)),
            (grpc.StatusCode.INVALID_ARGUMENT, "beyond any count", lambda: c.call("ReportCheckpoint", version=2**63)),
            (grpc.StatusCode.INVALID_ARGUMENT, "no part of a checkpoint", lambda: c.call("ReportCheckpoint", file="../x")),
            (grpc.StatusCode.INVALID_ARGUMENT, "with 3 clocks", lambda: c.call("ReportCheckpoint", clocks=[0] * 3)),
            (grpc.StatusCode.INVALID_ARGUMENT, "claims chunk 10000", lambda: c.report_part("worker 1", 1, range(10000, 10001))),
        ]
        for code, says, ask in cases:
            with pytest.raises(grpc.RpcError) as caught:
                ask()
            assert caught.value.code() == code and says in caught.value.details()
        assert len(c.status().members) == 1


def test_plans_reach_those_who_wait_and_more_of_them_than_there_are_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("coordinator.service.WATCHES_MAX", 4)
    monkeypatch.setattr("coordinator.servicer.rpc.WAIT_SECONDS", 1.0)
    with cluster(tmp_path) as c:
        seen: list[Plan] = []

        def watch() -> None:
            while not seen or len(seen) < 12:
                request = coordinator_pb2.WatchPlansRequest(incarnation="worker-01")
                for response in c.client.WatchPlans(request, timeout=30):
                    seen.append(wire.plan_from_wire(response.plan))
                    return

        threads = [threading.Thread(target=watch) for _ in range(12)]
        for thread in threads:
            thread.start()
        time.sleep(0.3)
        c.register(*NAMES)  # and heartbeats are answered meanwhile
        assert c.beat("shard 1").state == coordinator_pb2.RUN_STATE_TRAINING
        for thread in threads:
            thread.join(20)
        assert len(seen) == 12 and {plan.number for plan in seen} == {c.plan().number}


def test_control_over_the_wire(tmp_path: Path) -> None:
    with cluster(tmp_path) as c:
        c.register(*NAMES)
        assert c.call("Control", action=coordinator_pb2.CONTROL_ACTION_PAUSE).state == coordinator_pb2.RUN_STATE_PAUSED
        assert c.call("Control", action=coordinator_pb2.CONTROL_ACTION_RESUME).state == coordinator_pb2.RUN_STATE_TRAINING
        c.call("Control", action=coordinator_pb2.CONTROL_ACTION_CHECKPOINT)
        c.call("Control", action=coordinator_pb2.CONTROL_ACTION_STOP)
        assert c.beat("shard 1", 0).requests == 3
        assert c.beat("shard 1", 1, requests=3).requests == 0
        assert c.status().last_step == 2
        c.checkpoint(2)
        assert c.service.wait_finished(5) is RunState.FINISHED


def test_a_restart_in_the_middle_goes_on(tmp_path: Path) -> None:
    half = num_chunks(small_config()) // 2
    with cluster(tmp_path) as c:
        c.register(*NAMES)
        plan, run_id = c.plan(), c.service.run_id
        c.beat("shard 1", 0, 1)
        c.report_part("shard 1", 2, range(half))
        c.validate(4, 0)
    with cluster(tmp_path) as c:
        assert c.service.run_id == run_id and c.service.state is RunState.TRAINING
        assert c.plan() == plan
        assert c.beat("worker 1").acknowledged_steps == 2  # still a member
        c.report_part("shard 2", 2, range(half, num_chunks(c.config)))  # what shard 1 told the first one is not lost
        until(lambda: c.status().newest_checkpoint == 2)
        c.beat("shard 2", 2, 3)
        c.validate(4, 1)
        assert c.rows()[-1] == {"step": 4, "val_loss": 2.0}
        c.checkpoint(4)
        assert c.service.wait_finished(5) is RunState.FINISHED
        assert [row["step"] for row in c.rows() if "loss" in row] == [0, 1, 2, 3]


def test_members_that_did_not_survive_a_restart_are_replaced(tmp_path: Path) -> None:
    with cluster(tmp_path, cluster__lease_seconds=1.0) as c:
        c.register(*NAMES)
        c.beat("shard 1", 0, 1)
        c.checkpoint(2)
        c.beat("shard 1", 2)
        assert c.status().version == 3
    with cluster(tmp_path, cluster__lease_seconds=1.0) as c:
        until(lambda: c.service.state is RunState.GATHERING)
        c.register("shard 3", "shard 4", "worker 3", "worker 4")
        plan = c.plan()
        assert (plan.timeline.id, plan.timeline.version) == (1, 2) and plan.number.term == 2
        assert [row["step"] for row in c.rows()] == [0, 1]
        folder = newest_complete(tmp_path / "checkpoints")
        assert folder is not None and plan.timeline.digest == read_manifest(folder).digest


def test_an_older_coordinator_is_fenced_by_a_newer_one(tmp_path: Path) -> None:
    with cluster(tmp_path) as old, cluster(tmp_path) as new:
        with pytest.raises(grpc.RpcError) as caught:
            old.register(*NAMES)
        assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
        with pytest.raises(FencedError):
            old.service.wait_finished(5)
        new.register(*NAMES)
        assert new.plan().number.term == 2


def test_a_finished_run_is_taken_up_in_another_shape(tmp_path: Path) -> None:
    with cluster(tmp_path, train__stop_at_step=2) as c:
        run_id = c.service.run_id
        c.register(*NAMES)
        c.beat("shard 1", 0, 1)
        c.checkpoint(2)
        assert c.service.wait_finished(5) is RunState.FINISHED
    with cluster(tmp_path, train__stop_at_step=2) as c:
        assert c.service.wait_finished(5) is RunState.FINISHED  # nothing is left to do
    with cluster(tmp_path, cluster__stages=1, cluster__shards=1) as c:
        assert c.service.run_id == run_id
        c.register("shard 5", "worker 5")
        plan = c.plan()
        assert (plan.timeline.version, len(plan.stages)) == (2, 1) and plan.timeline.id > 0
        assert c.beat("shard 5").acknowledged_steps == 2
        c.beat("shard 5", 2)
        assert [row["step"] for row in c.rows()] == [0, 1, 2]


def test_other_mathematics_are_refused_unless_forked(tmp_path: Path) -> None:
    with cluster(tmp_path) as c:
        run_id = c.service.run_id
        c.register(*NAMES)
        c.beat("shard 1", 0, 1)
        c.checkpoint(2)
    with pytest.raises(CheckpointError, match=r"optimizer.learning_rate was 0.003 and is now 0.1"):
        CoordinatorService(small_config(optimizer__learning_rate=0.1), run_dir=tmp_path)
    with pytest.raises(CheckpointError, match=r'resume is "never"'):
        CoordinatorService(small_config(optimizer__learning_rate=0.1, checkpoint__resume="never"), run_dir=tmp_path)
    with cluster(tmp_path, optimizer__learning_rate=0.1, options={"fork": True}) as c:
        assert c.service.run_id != run_id
        c.register(*NAMES)
        assert c.plan().timeline.version == 2


def test_without_a_checkpoint_another_config_begins_another_run(tmp_path: Path) -> None:
    with cluster(tmp_path) as c:
        run_id = c.service.run_id
        c.register(*NAMES)
        c.beat("shard 1", 0)
    with cluster(tmp_path, optimizer__learning_rate=0.1) as c:
        assert c.service.run_id != run_id and c.rows() == [] and c.service.state is RunState.GATHERING


def test_a_manifest_that_cannot_be_written_ends_only_the_last_version(tmp_path: Path) -> None:
    with cluster(tmp_path) as c:
        c.register(*NAMES)
        blocked = checkpoint_folder(tmp_path / "checkpoints", 2)
        blocked.parent.mkdir()
        for version, state in ((2, RunState.TRAINING), (4, RunState.FAILED)):
            c.beat("shard 1", *range(version))
            everything = part(c.config, "shard 1", version, range(num_chunks(c.config)))
            c.call(  # no file was written
                "ReportCheckpoint", incarnation=everything.incarnation, version=version, file=everything.file,
                chunks=[coordinator_pb2.ChunkChecksums(chunk=k, checksums=v) for k, v in everything.chunks.items()],
            )  # fmt: skip
            until(lambda state=state: c.service.state is state)
        assert "version 4" in c.status().reason and c.service.wait_finished(5) is RunState.FAILED


def test_a_full_disk_holds_up_rows_but_no_member(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(file: object) -> None:
        raise OSError(28, "No space left on device")

    metrics = Metrics("coordinator")
    with cluster(tmp_path, options={"metrics": metrics}) as c:
        c.register(*NAMES)
        with monkeypatch.context() as patch:
            patch.setattr("coordinator.metrics_file.MetricsFile.flush", full)
            assert c.beat("shard 1", 0, 1).acknowledged_steps == 0
            assert c.status().version == 2
        until(lambda: c.beat("shard 1").acknowledged_steps == 2)
        assert [row["step"] for row in c.rows()] == [0, 1]
    read = metrics.registry.get_sample_value
    assert (read("shardlane_coordinator_write_failures_total") or 0) > 0
    assert read("shardlane_coordinator_tokens_total") == 64 and read("shardlane_coordinator_steps_done") == 2
    assert read("shardlane_coordinator_members", {"role": "shard"}) == 2
    assert read("grpc_server_handled_total", {"grpc_type": "unary", "grpc_service": SERVICE.full_name,
                                              "grpc_method": "Register", "grpc_code": "OK"}) == 4  # fmt: skip


def test_a_port_in_use_is_a_user_error(tmp_path: Path) -> None:
    with cluster(tmp_path / "a") as c:
        write_token_folder(tmp_path / "b" / "data")
        with pytest.raises(UserError, match="cannot listen on"):
            CoordinatorService(small_config(), run_dir=tmp_path / "b", bind=c.service.address)
